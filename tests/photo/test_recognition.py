"""Similarity of pictures, with small models of the real ones' shapes."""

import numpy as np
import pytest

pytest.importorskip("insightface", reason="faces need insightface: pip install '.[photo]'")
pytest.importorskip("onnx")

from spinmeround_jax.photo import assets, recognition
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.landmarks import FIVE_OF_68
from tests.support import photo_models
from tests.support.photo_models import draw_photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_models.save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def recogniser(folder):
    return recognition.Recogniser(folder)


def views():
    """(2, 2, 640, 640, 3) in [-1, 1]: a face, it moved, another face, none; and the first's square."""
    photos = [
        draw_photo(),
        draw_photo([(240, 400)]),
        draw_photo(skin=(90, 60, 200)),
        (draw_photo()[0].convert("L").convert("RGB"), None),
    ]
    images = np.stack([np.asarray(image, np.float32) for image, _ in photos]) / 127.5 - 1
    return images.reshape(2, 2, 640, 640, 3), photos[0][1][0]


def test_similarity_is_the_cosine():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 4, 8))
    expected = [
        [x @ y / np.sqrt(x @ x * (y @ y)) for x, y in zip(*r, strict=True)]
        for r in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(recognition.similarity(a, b), expected)
    a[1, 2] = np.nan
    b[0, 0] = 0.0
    unknown = np.isnan(recognition.similarity(a, b))
    assert unknown[1, 2] and unknown[0, 0] and unknown.sum() == 2


def test_the_same_face_is_similar_wherever_it_is(recogniser):
    images, square = views()
    landmarks5 = recogniser.find(images)
    assert landmarks5.shape == (2, 2, 5, 2)
    np.testing.assert_allclose(
        landmarks5[0, 0], FIVE_OF_68 @ square.to_photo(photo_models.canonical()), atol=0.6
    )
    assert np.isnan(landmarks5[1, 1]).all() and np.isfinite(landmarks5).sum() == 30
    vectors = recogniser.embed(images)
    assert vectors.shape == (2, 2, 512) and vectors.dtype == np.float32
    np.testing.assert_allclose(
        np.linalg.norm(vectors, axis=-1)[np.isfinite(vectors[..., 0])], 1.0, atol=1e-5
    )
    same, moved, other, none = recognition.similarity(vectors, vectors[:1, :1]).ravel()
    assert same == pytest.approx(1.0) and moved > 0.99 and other < 0.95 and np.isnan(none)
    np.testing.assert_allclose(recogniser.embed(images, landmarks5), vectors)


def test_a_missing_face_counts_at_the_true_one_s_place(recogniser):
    images, _ = views()
    truth, none = images[0, :1], images[1, 1:]
    landmarks5 = recogniser.find(truth)
    likeness = recognition.similarity(
        recogniser.embed(none, landmarks5), recogniser.embed(truth, landmarks5)
    )
    assert np.isfinite(likeness).all()  # NaN where its own face is looked for
    with pytest.raises(ValueError, match="landmarks"):
        recogniser.embed(images, landmarks5)


def test_a_second_model_by_path(folder, recogniser, tmp_path):
    small = photo_models.save_recognition(tmp_path / "other.onnx", size=128)
    other = recognition.Recogniser(small, models=folder)
    images, _ = views()
    vectors = other.embed(images[0])
    assert vectors.shape == (2, 128) and other.size == 128
    assert recognition.similarity(*vectors) > 0.99
    assert other.sha256 != recogniser.sha256 and other.path == small


def test_what_is_no_recognition_model(folder, tmp_path):
    with pytest.raises(AssetError, match=r"absent\.onnx: no such recognition model"):
        recognition.Recogniser(tmp_path / "absent.onnx")
    with pytest.raises(AssetError, match=r"glintr100\.onnx: missing"):
        recognition.Recogniser(tmp_path)
    with pytest.raises(AssetError, match="a model for detection, expected one for recognition"):
        recognition.Recogniser(folder / assets.DETECTOR.name)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(AssetError, match="not a readable ONNX model"):
        recognition.Recogniser(tmp_path / "broken.onnx")
    network = recognition.Recogniser(folder / assets.RECOGNITION.name, models=tmp_path)
    with pytest.raises(AssetError, match="finds faces"):
        network.embed(np.zeros((1, 64, 64, 3)))
