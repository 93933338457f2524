"""The front end that comes with the package: MediaPipe's models, dlib's ResNet, soft edges."""

import hashlib
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

data = pytest.importorskip("skimage.data")

from spinmeround_jax.photo import background, face_resnet, mediapipe  # noqa: E402
from spinmeround_jax.photo.prepare import Models, NoFace, Options, prepare  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402

DOCS = ROOT / "docs" / "images"
MODELS = pathlib.Path(mediapipe.__file__).parent / "models"


@pytest.fixture(scope="module")
def finder():
    return mediapipe.FaceFinder()


@pytest.fixture(scope="module")
def astronaut():
    return data.astronaut()


@pytest.fixture(scope="module")
def found(finder, astronaut):
    return finder.find(astronaut)


def test_every_model_is_the_one_that_the_notice_names():
    named = dict(re.findall(r"^(\S+) +([0-9a-f]{64})$", (MODELS / "NOTICE").read_text(), re.M))
    shipped = {
        path.name for path in MODELS.iterdir() if path.suffix in (".tflite", ".bin", ".json")
    }
    assert named.keys() == shipped
    for name, sha256 in named.items():
        assert hashlib.sha256((MODELS / name).read_bytes()).hexdigest() == sha256


# --------------------------------------------------------------------------------------------------
# Faces


def test_the_astronaut(found):
    (face,) = found
    assert face.score > 0.8
    by_hand = json.loads((DOCS / "photo_astronaut.landmarks.json").read_text())["astronaut.png"]
    np.testing.assert_allclose(face.landmarks5, by_hand, atol=4)
    assert face.landmarks.shape == (68, 3)
    # The nose is nearer to the camera than the ears.
    assert face.landmarks[30, 2] < face.landmarks[[0, 16], 2].min()


def test_landmarks_move_with_the_photo(finder, astronaut, found):
    (face,) = finder.find(astronaut[:300, 60:360])
    np.testing.assert_allclose(face.landmarks5 + [60, 0], found[0].landmarks5, atol=2)


def test_a_tilted_head(finder, astronaut, found):
    tilted = Image.fromarray(astronaut).rotate(30, Image.Resampling.BICUBIC)
    (face,) = finder.find(np.asarray(tilted))
    # PIL turns counter-clockwise about the middle.
    cosine, sine = np.cos(np.pi / 6), np.sin(np.pi / 6)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    np.testing.assert_allclose((found[0].landmarks5 - 256) @ turn + 256, face.landmarks5, atol=3)


def test_a_small_face_in_a_large_photo_and_several(finder, astronaut, found):
    photo = np.full((600, 1100, 3), 200, np.uint8)
    photo[50:562, 40:552] = astronaut
    photo[100:500, 650:1050] = np.asarray(Image.fromarray(astronaut).resize((400, 400)))
    large, other = finder.find(photo)
    np.testing.assert_allclose(large.landmarks5 - [40, 50], found[0].landmarks5, atol=3)
    np.testing.assert_allclose(
        (other.landmarks5 - [650, 100]) * 512 / 400, found[0].landmarks5, atol=4
    )
    alone = np.full((1200, 1600, 3), 200, np.uint8)
    alone[600:900, 300:600] = np.asarray(Image.fromarray(astronaut).resize((300, 300)))
    (small,) = finder.find(alone)
    np.testing.assert_allclose(
        (small.landmarks5 - [300, 600]) * 512 / 300, found[0].landmarks5, atol=6
    )


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (240, 320)])
def test_nobody(finder, size):
    assert finder.find(np.full((*size, 3), 120, np.uint8)) == []


def test_warp_cuts_pixels_as_they_are_and_averages_what_it_shrinks():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (12, 16, 3), np.uint8)
    cut = mediapipe.warp(image, np.array([8.0, 6.0]), 4.0, 0.0, 4)
    np.testing.assert_array_equal(cut, image[4:8, 6:10])
    # A quarter turn clockwise: the square's right is down in the image.
    turned = mediapipe.warp(image, np.array([8.0, 6.0]), 4.0, np.pi / 2, 4)
    np.testing.assert_array_equal(turned, np.rot90(image[4:8, 6:10]))
    half = mediapipe.warp(image, np.array([8.0, 6.0]), 8.0, 0.0, 4)
    mean = image[2:10, 4:12].reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(half, mean, atol=1)
    outside = mediapipe.warp(image, np.array([-50.0, -50.0]), 8.0, 0.3, 4)
    assert not outside.any()


# --------------------------------------------------------------------------------------------------
# Identity


def identity(finder, image):
    return face_resnet.embed(image, finder.find(image)[0].landmarks)


def test_one_person_is_nearer_to_herself_than_to_others(finder, astronaut):
    own = identity(finder, astronaut)
    assert own.shape == (512,) and own.dtype == np.float32
    assert np.linalg.norm(own) == pytest.approx(1.0, abs=1e-5)
    assert face_resnet.is_one(own)
    photo = Image.fromarray(astronaut)
    variants = {
        "mirrored": photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "dark": photo.point(lambda value: value // 2),
        "half": photo.resize((256, 256)),
        "tilted": photo.rotate(15, Image.Resampling.BICUBIC),
        "grey": photo.convert("L").convert("RGB"),
    }
    alike = [float(own @ identity(finder, np.asarray(image))) for image in variants.values()]
    others = []
    for face in data.lfw_subset()[:12]:
        enlarged = Image.fromarray(np.rint(255 * face).astype(np.uint8)).resize((150, 150))
        pixels = np.pad(np.asarray(enlarged.convert("RGB")), ((60, 60), (60, 60), (0, 0)), "edge")
        if found := finder.find(pixels):
            others.append(float(own @ face_resnet.embed(pixels, found[0].landmarks)))
    assert len(others) >= 8
    assert min(alike) > 0.75
    assert max(others) < min(alike)


def test_arcface_vectors_and_random_ones_are_told_apart():
    assert not face_resnet.is_one(np.random.default_rng(0).standard_normal(512))


def test_the_aligned_face_has_its_eyes_in_their_place(astronaut, found):
    aligned = face_resnet.aligned(astronaut, found[0].landmarks)
    assert aligned.shape == (150, 150, 3)
    (face,) = mediapipe.FaceFinder().find(np.pad(aligned, ((75, 75), (75, 75), (0, 0)), "edge"))
    # dlib's mean face: the outer corners of the eyes, at a quarter of the face's size around it.
    corners = (np.array([[0.1206, 0.2137], [0.8596, 0.2135]]) + 0.25) / 1.5 * 150
    np.testing.assert_allclose(face.landmarks[[36, 45], :2] - 75, corners, atol=6)


# --------------------------------------------------------------------------------------------------
# Background


def test_a_mask_follows_the_edges_of_the_picture():
    image = np.zeros((256, 256, 3), np.uint8)
    image[:, 120:] = 255
    truth = (image[..., 0] > 0).astype(np.float32)
    rough = np.clip((np.arange(256) - 117) / 6, 0, 1)[None].repeat(256, axis=0).astype(np.float32)
    refined = background.refined(rough, image)
    assert abs(refined - truth)[:, 110:130].max() < 0.8 * abs(rough - truth).max()
    for constant in (0.0, 1.0):
        same = background.refined(np.full((256, 256), constant, np.float32), image)
        np.testing.assert_allclose(same, constant, atol=1e-3)


def test_the_old_background_does_not_shine_through():
    mask = np.clip((np.arange(96) - 40) / 16, 0, 1)[None].repeat(96, axis=0).astype(np.float32)
    hair, wall = np.array([0.3, 0.2, 0.1]), np.array([0.1, 0.5, 0.9])
    seen = (mask[..., None] * hair + (1 - mask[..., None]) * wall).astype(np.float32)
    colour = background.foreground(seen, mask)
    edge = (mask > 0.2) & (mask < 0.9)
    assert abs(colour - hair)[edge].max() < 0.4 * abs(seen - hair)[edge].max()
    np.testing.assert_allclose(colour[mask == 1], seen[mask == 1], atol=0.02)


def test_the_astronaut_becomes_a_portrait(astronaut, tmp_path):
    path = tmp_path / "astronaut.png"
    Image.fromarray(astronaut).save(path)
    prepared = prepare(path, Options(), Models())
    assert abs(prepared.alignment.head.yaw) < 8 and abs(prepared.alignment.head.pitch) < 12
    assert prepared.recognition == {"name": face_resnet.NAME, "sha256": face_resnet.sha256()}
    assert np.linalg.norm(prepared.id_embedding) == pytest.approx(1.0, abs=1e-5)
    # White around the head, and the face itself kept.
    assert (prepared.image[:60] > 250).mean() > 0.95
    assert prepared.mask[250:350, 200:300].min() > 0.95
    without = prepare(path, Options(identity=False), Models())
    assert without.id_embedding is None and "none was asked for" in without.record()["no_identity"]


def test_a_photo_of_nobody(tmp_path):
    path = tmp_path / "wall.png"
    Image.new("RGB", (300, 200), (120, 130, 140)).save(path)
    with pytest.raises(NoFace, match=r"wall\.png: no face found"):
        prepare(path, Options(), Models())
