"""The Frechet distance where its value is known, and the plumbing to an Inception of the right shape."""

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax.evaluation import fid

pytest.importorskip("onnxruntime", reason="pip install '.[photo]'")
onnx = pytest.importorskip("onnx", reason="pip install '.[dev]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from spinmeround_jax.files import InputError  # noqa: E402


def with_moments(rng, mean, covariance, count=400):
    """(count, d) samples whose own mean and covariance are exactly these."""
    x = rng.standard_normal((count, len(mean)))
    x -= x.mean(0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(x.T)))
    return x @ whiten.T @ np.linalg.cholesky(covariance).T + mean


def test_distance_of_gaussians_whose_axes_agree():
    rng = np.random.default_rng(0)
    mean_a, mean_b = rng.standard_normal((2, 8))
    deviation_a, deviation_b = rng.uniform(0.1, 3, (2, 8))
    turn = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    a = with_moments(rng, mean_a, turn @ np.diag(deviation_a**2) @ turn.T)
    b = with_moments(rng, mean_b, turn @ np.diag(deviation_b**2) @ turn.T, 300)
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((deviation_a - deviation_b) ** 2)
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert fid.frechet_distance(a, a + 2.0) == pytest.approx(32.0)


def test_distance_is_that_of_the_matrix_root():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    rng = np.random.default_rng(1)
    a = rng.standard_normal((200, 24)) @ rng.standard_normal((24, 24))
    b = rng.standard_normal((150, 24)) @ rng.standard_normal((24, 24)) + 0.5
    one, other = np.cov(a.T), np.cov(b.T)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(
        one + other - 2 * np.real(sqrtm(one @ other))
    )
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_features_that_never_vary_do_no_harm():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 100, 6))
    dead = [np.concatenate([x, np.zeros((100, 3)), x[:, :1]], axis=1) for x in (a, b)]
    distance = fid.frechet_distance(*dead)
    assert np.isfinite(distance) and distance > fid.frechet_distance(a, b)


def test_too_few_images_are_refused():
    rng = np.random.default_rng(3)
    a = rng.standard_normal((20, 16))
    with pytest.raises(ValueError, match="more than 16 images on each side, got 20 and 16"):
        fid.frechet_distance(a, a[:16])
    assert fid.frechet_distance(a, a[:17]) > 0
    with pytest.raises(ValueError, match="expected"):
        fid.frechet_distance(a, a[:, :4])
    with pytest.raises(ValueError, match="finite"):
        fid.frechet_distance(a, np.where(a > 2, np.nan, a) * np.inf)


def save_network(path, features=2048, side=299, batch="b", pooled=False):
    """Means of 13 x 13 blocks through a fixed projection, with Inception's inputs and outputs."""
    weights = (
        np.random.default_rng(0)
        .standard_normal((3 * (side // 13) ** 2, features))
        .astype(np.float32)
    )
    nodes = [
        helper.make_node("AveragePool", ["x"], ["p"], kernel_shape=[13, 13], strides=[13, 13]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["m"]),
        helper.make_node("Unsqueeze" if pooled else "Identity", ["m", "axes"][: 1 + pooled], ["y"]),
    ]
    axes = [numpy_helper.from_array(np.array([2, 3], np.int64), "axes")] if pooled else []
    shape = [batch, features, 1, 1] if pooled else [batch, features]
    graph = helper.make_graph(
        nodes,
        "features",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weights, "w"), *axes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return weights


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("fid") / "inception.onnx"
    return path, save_network(path)


def test_features_are_the_network_s_of_enlarged_pictures(network):
    path, weights = network
    features = fid.InceptionFeatures(path)
    assert len(features.sha256) == 64
    rng = np.random.default_rng(0)
    small = rng.uniform(-1.2, 1.2, (1, 2, 40, 24, 3)).astype(np.float32)
    found = features(small)
    assert found.shape == (1, 2, 2048) and found.dtype == np.float32
    np.testing.assert_allclose(found[0, 1], features(small[0, 1:])[0], atol=1e-4)
    pixels = np.rint(np.clip(small[0, 0], -1, 1) * 127.5 + 127.5).astype(np.uint8)
    large = Image.fromarray(pixels).resize((299, 299), Image.Resampling.BICUBIC)
    blocks = (np.asarray(large) / 127.5 - 1).reshape(23, 13, 23, 13, 3).mean((1, 3))
    expected = blocks.transpose(2, 0, 1).ravel() @ weights
    # Pillow rounds 8-bit pictures; we do not.
    np.testing.assert_allclose(found[0, 0], expected, atol=0.5 / 127.5 * abs(weights).sum(0).max())
    assert np.corrcoef(found[0, 0], expected)[0, 1] > 0.9995


def test_a_fixed_batch_is_filled_up(tmp_path, network):
    save_network(tmp_path / "four.onnx", batch=4)
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (5, 16, 16, 3))
    found = fid.InceptionFeatures(tmp_path / "four.onnx")(images)
    np.testing.assert_allclose(found, fid.InceptionFeatures(network[0])(images), atol=1e-4)


def test_the_pooling_may_keep_its_axes(tmp_path, network):
    save_network(tmp_path / "pooled.onnx", pooled=True)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3))
    found = fid.InceptionFeatures(tmp_path / "pooled.onnx")(images)
    np.testing.assert_allclose(found, fid.InceptionFeatures(network[0])(images), atol=1e-4)


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"missing\.onnx: no such file"):
        fid.InceptionFeatures(tmp_path / "missing.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"broken\.onnx: not a readable ONNX model"):
        fid.InceptionFeatures(tmp_path / "broken.onnx")
    save_network(tmp_path / "classes.onnx", features=1008)
    with pytest.raises(InputError, match="not a classifier's scores"):
        fid.InceptionFeatures(tmp_path / "classes.onnx")
    save_network(tmp_path / "small.onnx", side=224)
    with pytest.raises(InputError, match="expected floats"):
        fid.InceptionFeatures(tmp_path / "small.onnx")
