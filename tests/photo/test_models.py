"""The plumbing to insightface and onnxruntime, with small models of the real ones' shapes."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("insightface", reason="photos need insightface: pip install '.[photo]'")
pytest.importorskip("onnx")

from spinmeround_jax import files
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import align, assets
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.background import Parser, connected
from spinmeround_jax.photo.faces import FaceFinder, Recogniser
from spinmeround_jax.photo.landmarks import FIVE_OF_68, FaceError
from spinmeround_jax.photo.prepare import Models, Options, prepare
from tests.support import photo_models
from tests.support.photo_models import draw_photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_models.save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def finder(folder):
    return FaceFinder(folder)


@pytest.fixture(scope="module")
def models(folder):
    return Models(folder, allow_other_recognition=True, front_end="insightface")


def saved(path, *arguments, **options):
    image, squares = draw_photo(*arguments, **options)
    image.save(path)
    return path, squares


# --------------------------------------------------------------------------------------------------
# Detection and landmarks


def test_boxes_and_landmarks_are_where_the_models_say(finder):
    image, (square,) = draw_photo([(200, 328)])
    (face,) = finder.find(np.asarray(image))
    truth = square.to_photo(photo_models.canonical())
    np.testing.assert_allclose(face.landmarks5, FIVE_OF_68 @ truth, atol=0.6)
    np.testing.assert_allclose(face.landmarks[:, :2], truth, atol=0.6)
    np.testing.assert_allclose(face.box, [152.5, 280.5, 248.5, 376.5], atol=0.6)
    assert face.score > 0.9
    # Nearer to the camera is the same way for all: the nose is nearest, the ears are farthest.
    assert np.argmax(face.landmarks[:, 2]) in (29, 30, 33)
    assert np.argmin(face.landmarks[:, 2]) in (0, 1, 15, 16)


def test_large_photos_are_seen_smaller(finder):
    image, (square,) = draw_photo([(320, 240)])
    (face,) = finder.find(np.asarray(image.resize((2560, 2560), Image.Resampling.BICUBIC)))
    truth = 4 * square.to_photo(photo_models.canonical())
    np.testing.assert_allclose(face.landmarks[:, :2], truth, atol=8)


def test_no_face(finder):
    assert finder.find(np.full((300, 200, 3), 90, np.uint8)) == []


# --------------------------------------------------------------------------------------------------
# Identity


def test_identity_follows_the_face(models):
    image, (square,) = draw_photo()
    five = FIVE_OF_68 @ square.to_photo(photo_models.canonical())
    vector = models.recogniser.embed(np.asarray(image), five)
    assert vector.shape == (512,)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    # The same face elsewhere, larger and turned; and another face in the same place.
    turned = image.rotate(-25, Image.Resampling.BICUBIC, center=(320, 320), fillcolor=(40, 160, 70))
    turned = turned.resize((960, 960), Image.Resampling.BICUBIC)
    angle = np.deg2rad(25)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    moved = 1.5 * ((five - 320) @ rotation + 320)
    assert vector @ models.recogniser.embed(np.asarray(turned), moved) > 0.99
    other, _ = draw_photo(skin=(90, 60, 200))
    assert vector @ models.recogniser.embed(np.asarray(other), five) < 0.95
    # Red and blue are not exchanged on the way: the projection of a red face, by hand.
    red = np.zeros((300, 300, 3), np.uint8)
    red[..., 0] = 255
    (weights,) = (
        photo_models.numpy_helper.to_array(w)
        for w in photo_models.onnx.load(models.recogniser.path).graph.initializer
    )
    planes = np.stack([np.full((16, 16), v) for v in (1.0, -1.0, -1.0)]).ravel()
    expected = planes @ weights
    got = models.recogniser.embed(red, 0.3 * five)
    assert got @ (expected / np.linalg.norm(expected)) > 0.999


def test_other_recognition_models_are_refused(folder, tmp_path):
    with pytest.raises(AssetError, match="Another model's vectors give another person's face"):
        Recogniser(folder / assets.RECOGNITION.name)
    small = photo_models.save_recognition(tmp_path / "small.onnx", size=128)
    with pytest.raises(AssetError, match="128 numbers, the weights need 512"):
        Recogniser(small, allow_other=True)


def test_wrong_and_broken_models(folder, tmp_path):
    with pytest.raises(AssetError, match="a model for detection, expected one for recognition"):
        Recogniser(folder / assets.DETECTOR.name, allow_other=True)
    broken = tmp_path / assets.DETECTOR.name
    broken.write_bytes(b"not a model")
    photo_models.save_landmarks(tmp_path / assets.LANDMARKS.name)
    with pytest.raises(AssetError, match="not a readable ONNX model"):
        FaceFinder(tmp_path)
    with pytest.raises(AssetError, match=r"missing; it finds faces.*photo\.fetch"):
        FaceFinder(tmp_path / "nowhere")
    (tmp_path / assets.PARSING.name).write_bytes(b"not a model")
    with pytest.raises(AssetError, match="not a readable ONNX model"):
        Parser(tmp_path)
    photo_models.save_parsing(tmp_path / assets.PARSING.name, classes=3)
    with pytest.raises(AssetError, match=r"face parsing gives \(1, 19, s, s\)"):
        Parser(tmp_path).person(np.zeros((64, 64, 3), np.uint8))


# --------------------------------------------------------------------------------------------------
# Background


def test_parsing(folder):
    image, (square,) = draw_photo()
    crop = align.crop(np.asarray(image.convert("RGBA")), square)
    person = Parser(folder).person(np.rint(255 * crop[..., :3]).astype(np.uint8))
    assert person.shape == (512, 512)
    assert person[300, 256] > 0.95  # below the nose
    assert person[20, 20] < 0.05
    assert 0.1 < person.mean() < 0.5


def test_only_what_touches_the_face_is_kept():
    mask = np.zeros((60, 80), np.float32)
    mask[10:50, 10:40] = 1.0
    mask[20:30, 40:42] = 0.7
    mask[5:55, 60:75] = 1.0  # somebody else
    # A spiral arm that only a path around corners reaches.
    mask[52:58, 10:14] = 1.0
    mask[48:54, 10:12] = 1.0
    seed = np.zeros(mask.shape, bool)
    seed[30, 20] = True
    kept = connected(mask, seed)
    assert (kept[:, :50] == mask[:, :50]).all()
    assert kept[:, 60:].max() == 0.0
    assert connected(np.zeros_like(mask), seed).max() == 0.0


@pytest.mark.slow  # importing rembg compiles for a minute
def test_rembg(monkeypatch, tmp_path):
    """The real rembg, with a small model in place of U2-Net."""
    pytest.importorskip("rembg", reason="optional: pip install 'rembg[cpu]'")
    from onnx import helper

    weights = np.zeros((1, 3, 1, 1), np.float32)
    weights[0, :2, 0, 0] = [3.0, -3.0]  # redder than green is person
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Sigmoid", ["c"], ["y"])]
    photo_models._save(
        tmp_path / "u2net_human_seg.onnx", nodes,
        [photo_models._info("x", [1, 3, 320, 320])], [photo_models._info("y", [1, 1, 320, 320])],
        [photo_models._initializer("w", weights)],
    )  # fmt: skip
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    monkeypatch.setenv("MODEL_CHECKSUM_DISABLED", "1")
    from spinmeround_jax.photo.background import Remover

    image, (square,) = draw_photo()
    crop = align.crop(np.asarray(image.convert("RGBA")), square)
    person = Remover().person(np.rint(255 * crop[..., :3]).astype(np.uint8))
    assert person[200, 256] > 0.9 > 0.1 > person[20, 20]


# --------------------------------------------------------------------------------------------------
# All together


def test_a_photo_becomes_a_portrait(models, tmp_path):
    path, (square,) = saved(tmp_path / "a.png", [(240, 320)])
    prepared = prepare(path, Options(), models)
    head = prepared.alignment.head
    np.testing.assert_allclose(head.square.centre, square.centre, atol=2.0)
    assert head.square.side == pytest.approx(square.side, rel=0.02)
    assert abs(head.yaw) < 1.5
    assert abs(head.pitch) < 2.0
    assert prepared.image.shape == (512, 512, 3)
    assert (prepared.image[:40, :40] == 255).all()  # the wall became white
    assert np.abs(prepared.image[330, 200] - np.array([205.0, 150.0, 120.0])).max() < 6
    assert prepared.background == assets.PARSING.name
    (note,) = prepared.notes
    assert "139 pixels tall" in note
    record = prepared.record()
    assert len(record["id_embedding"]) == 512
    assert record["recognition"]["sha256"] == files.sha256(models.recogniser.path)
    # The identity is that of the portrait: of its pixels on white, at the landmarks carried over.
    at = head.square.from_photo(prepared.chosen.landmarks5) * 512 - 0.5
    again = models.recogniser.embed(prepared.image, at)
    np.testing.assert_allclose(prepared.id_embedding, again, atol=1e-6)


def test_landmarks_by_hand_agree_with_detection(models, tmp_path):
    path, (square,) = saved(tmp_path / "a.png")
    points = square.to_photo(photo_models.canonical())
    found = prepare(path, Options(), models)
    for given in (points, FIVE_OF_68 @ points):
        prepared = prepare(path, Options(), models, given)
        assert prepared.id_embedding @ found.id_embedding > 0.98
        assert prepared.record()["alignment"]["landmarks_from"] == "hand"
        np.testing.assert_allclose(
            prepared.alignment.head.square.centre, found.alignment.head.square.centre, atol=4
        )


def test_several_faces(models, tmp_path):
    path, squares = saved(tmp_path / "a.png", [(200, 400), (456, 200)])
    first = prepare(path, Options(), models)
    assert "2 faces; the largest is used" in first.notes[0]
    chosen = [prepare(path, Options(face=n), models) for n in (1, 2)]
    centres = np.array([p.alignment.head.square.centre for p in chosen])
    assert not any("faces" in note for note in chosen[1].notes)
    for square in squares:
        assert np.linalg.norm(centres - square.centre, axis=1).min() < 3
    with pytest.raises(InputError, match="--face 3: only 2 found"):
        prepare(path, Options(face=3), models)


def test_the_photos_own_transparency(models, tmp_path):
    image, _ = draw_photo()
    cut = image.convert("RGBA")
    alpha = np.full((640, 640), 255, np.uint8)
    alpha[:, :240] = 0
    cut.putalpha(Image.fromarray(alpha))
    cut.save(tmp_path / "a.png")
    prepared = prepare(tmp_path / "a.png", Options(), models)
    assert prepared.background == "the photo's own transparency"
    assert (prepared.image[:, :2] == 255).all()
    assert np.abs(prepared.image[30, 480] - np.array(photo_models.WALL, float)).max() < 4
    kept = prepare(tmp_path / "a.png", Options(background="keep"), models)
    assert kept.background == "kept"
    assert (kept.image == prepared.image).all()


def test_a_background_remover_that_sees_nobody(models, tmp_path):
    """The parser takes anything greener than red for background: here the person as well."""
    path, _ = saved(tmp_path / "a.png", skin=(60, 150, 90))
    with pytest.raises(InputError, match=r"a\.png.*does not see the person.*--keep-background"):
        prepare(path, Options(), models)
    assert prepare(path, Options(background="keep"), models).image.shape == (512, 512, 3)


def test_a_detector_without_landmarks(folder, tmp_path):
    """SCRFD without key points has six outputs."""
    model = photo_models.onnx.load(folder / assets.DETECTOR.name)
    del model.graph.output[6:]
    photo_models.onnx.save(model, tmp_path / assets.DETECTOR.name)
    photo_models.save_landmarks(tmp_path / assets.LANDMARKS.name)
    image, _ = draw_photo()
    with pytest.raises(FaceError, match="without landmarks"):
        FaceFinder(tmp_path).find(np.asarray(image))
