"""Views on disk, judged against true ones on disk: what belongs to what, and the protocols."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax import checkpoints, evaluate
from spinmeround_jax.config import RELEASED
from spinmeround_jax.evaluation import nersemble, published, view_folders
from spinmeround_jax.files import InputError
from tests.support.tiny_model import random_model
from tests.support.view_folders import RING, SIZE, write_head

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(tmp_path, *arguments):
    out = tmp_path / "evaluation"
    command = ["--protocol", "folders", "--out", str(out), *map(str, arguments)]
    assert evaluate.main(command) == 0
    return json.loads((out / "scores.json").read_text()), out


def test_views_are_matched_by_camera_whatever_their_names_and_order(tmp_path):
    for name in ("a", "b"):
        write_head(tmp_path / "truth" / name, RING, normals=True)
        write_head(
            tmp_path / "made" / name, RING[::-1], names=[f"{i:03d}" for i in range(8)], normals=True
        )
        write_head(tmp_path / "worse" / name, RING[2:], change=20)
    (tmp_path / "worse" / "extra").mkdir()
    made = ["--method", tmp_path / "made", "--method", f"worse one={tmp_path / 'worse'}"]
    result, out = run(tmp_path, "--truth", tmp_path / "truth", *made)
    assert len(result["views"]) == 6  # those that all have
    scores = result["scores"]
    np.testing.assert_allclose(scores["made"]["l2"], 0.0, atol=1e-12)
    assert max(scores["made"]["normals"]) < 0.1
    assert "normals" not in scores["worse one"]
    # Half of each picture is 20 / 255 too red, one channel of three: far from the clipping.
    expected = 0.5 * (20 / 255) ** 2 / 3
    np.testing.assert_allclose(scores["worse one"]["l2"], [expected] * 2, rtol=1e-3)
    assert any("2 of 8 views are not in all" in note for note in result["notes"])
    page = (out / "report.html").read_text()
    assert "worse one" in page and "published numbers" in page
    assert "src=" not in page.replace('src="data:', "") and "http" not in page


Z_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # from y up, the front becomes -y


@pytest.mark.parametrize("world", [None, Z_UP])
def test_views_are_matched_by_name_where_there_are_no_cameras(tmp_path, world):
    write_head(tmp_path / "truth", RING, world=world)
    write_head(tmp_path / "made", RING[:3], transforms=False)
    result, _ = run(tmp_path, "--truth", tmp_path / "truth", "--method", tmp_path / "made")
    assert result["views"] == ["view0", "view1", "view2"]
    assert result["subjects"] == ["truth"]
    result, _ = run(
        tmp_path, "--truth", tmp_path / "truth", "--method", tmp_path / "made",
        "--leave-out", "front", "--leave-out", "view2",
    )  # fmt: skip
    assert result["views"] == ["view1"]


def test_sizes_are_brought_to_one_only_when_asked(tmp_path, capsys):
    write_head(tmp_path / "truth", RING, size=32)
    write_head(tmp_path / "made", RING)
    paths = ["--protocol", "folders", "--truth", str(tmp_path / "truth")]
    paths += ["--method", str(tmp_path / "made"), "--out", str(tmp_path / "out")]
    assert evaluate.main(paths) == 1
    assert "view0.png: 16 x 16 pixels" in capsys.readouterr().err
    assert evaluate.main([*paths, "--size", "16"]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert scores["made"]["psnr"][0] > 35.0  # the gradient is sampled elsewhere by a quarter pixel


def test_outside_of_the_true_mask_is_white_when_asked(tmp_path):
    write_head(tmp_path / "truth", RING)
    write_head(tmp_path / "made", RING)
    for path in (tmp_path / "made" / "views").iterdir():
        pixels = np.asarray(Image.open(path)).copy()
        pixels[..., 3] = 255  # a background of its own
        Image.fromarray(pixels).save(path)
    paths = ["--truth", tmp_path / "truth", "--method", tmp_path / "made"]
    assert run(tmp_path, *paths)[0]["scores"]["made"]["l2"][0] > 0.01
    assert run(tmp_path, *paths, "--masked")[0]["scores"]["made"]["l2"][0] < 1e-12


def test_normals_of_a_camera_are_turned_into_the_world(tmp_path):
    folder = write_head(tmp_path / "made", [(90.0, 0.0)])
    pixels = np.tile(np.array([128, 128, 255], np.uint8), (SIZE, SIZE, 1))
    Image.fromarray(pixels).save(folder / "normals.png")  # towards the camera
    about = json.loads((folder / "transforms.json").read_text())
    about["normals_space"] = "camera"
    about["frames"][0]["normals_file_path"] = "normals.png"
    (folder / "transforms.json").write_text(json.dumps(about))
    (frame,) = view_folders.read_frames(folder)
    _, normals, _ = view_folders.load(frame, None)
    np.testing.assert_allclose(normals[0, 0], [1.0, 0.0, 0.0], atol=0.01)


def test_masks_names_and_sizes_follow_the_files(tmp_path):
    """Two cameras' files of one name, a mask file, half-size images of a full-size camera."""
    folder = write_head(tmp_path / "head", RING[:2], names=["cam3_0", "cam4_0"])
    for camera in ("cam3", "cam4"):
        (folder / camera).mkdir()
        (folder / "views" / f"{camera}_0.png").rename(folder / camera / "0001.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[: SIZE // 2] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    about = json.loads((folder / "transforms.json").read_text())
    about |= {"w": 2 * SIZE, "h": 2 * SIZE, "fl_x": 8 * SIZE, "mask_path": "mask.png"}
    for frame, camera in zip(about["frames"], ("cam3", "cam4"), strict=True):
        frame["file_path"] = f"{camera}/0001"
    (folder / "transforms.json").write_text(json.dumps(about))
    frames = view_folders.read_frames(folder)
    assert [frame.name for frame in frames] == ["cam3_0001", "cam4_0001"]
    assert frames[0].focal == 4.0
    _, _, found = view_folders.load(frames[0], None)
    alpha = np.arange(SIZE) >= SIZE // 2
    np.testing.assert_array_equal(found, (mask > 0) & alpha)


def test_bad_transforms_are_refused_by_name(tmp_path):
    folder = write_head(tmp_path / "head", RING)
    about = json.loads((folder / "transforms.json").read_text())
    for change, told in (
        ({"file_path": "../secret.png"}, "outside of"),
        ({"k1": 0.1}, "undistort"),
    ):
        changed = {**about, "frames": [about["frames"][0] | change, *about["frames"][1:]]}
        (folder / "transforms.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=told) as caught:
            view_folders.read_frames(folder)
        assert str(folder / "transforms.json") in str(caught.value)


def test_what_does_not_belong_together_is_told(tmp_path, capsys):
    write_head(tmp_path / "truth", RING)
    write_head(tmp_path / "made", [(20.0, 0.0)])
    paths = ["--protocol", "folders", "--truth", str(tmp_path / "truth")]
    paths += ["--method", str(tmp_path / "made"), "--out", str(tmp_path / "out")]
    assert evaluate.main(paths) == 1
    assert "the nearest 20.0° apart" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert evaluate.main([*paths, "--method", str(tmp_path / "empty")]) == 1
    assert "no views in it" in capsys.readouterr().err
    assert evaluate.main([*paths, "--checkpoint", "x"]) == 2
    assert "--checkpoint is not for --protocol folders" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# The paper's protocol


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    """As data_prep.captures leaves them: two people before 16 cameras."""
    root = tmp_path_factory.mktemp("nersemble")
    serials = nersemble.read_protocol()["cameras"]
    angles = [(6.0 * i - 45.0, 4.0 * (i % 3) - 4.0) for i in range(16)]
    for number, name in enumerate(("017", "018")):
        write_head(
            root / "views" / name, angles, names=[f"cam_{serial}" for serial in serials],
            change=10 * number,
        )  # fmt: skip
        (root / "portraits").mkdir(exist_ok=True)
        identity = np.random.default_rng(number).standard_normal(512)
        identity = {"id_embedding": identity.tolist()}
        (root / "portraits" / f"{name}.png").touch()
        (root / "portraits" / f"{name}.json").write_text(json.dumps(identity))
    return root


def test_nersemble_samples_models_at_the_other_cameras(captures, tmp_path, monkeypatch):
    sampling = dataclasses.replace(RELEASED, steps=2, sigma_max=5.0, normals_steps=1)
    provenance = {"sampling": dataclasses.asdict(sampling)}
    checkpoints.save_model(tmp_path / "tiny", random_model(), provenance)
    out = tmp_path / "out"
    arguments = ["--protocol", "nersemble", "--truth", str(captures), "--out", str(out)]
    arguments += ["--checkpoint", str(tmp_path / "tiny"), "--method", f"true={captures / 'views'}"]
    assert evaluate.main(arguments) == 0
    result = json.loads((out / "scores.json").read_text())
    assert len(result["views"]) == 15 and "cam_222200037" not in result["views"]
    assert len(result["scores"]["tiny"]["psnr"]) == 2
    assert result["scores"]["true"]["l2"] == [0.0, 0.0]
    assert any("the paper has 222" in note for note in result["notes"])
    given = np.asarray(Image.open(out / "sampled" / "tiny" / "017" / "views" / "cam_222200037.png"))
    white = view_folders.load(view_folders.read_frames(captures / "views" / "017")[3], None)[0]
    np.testing.assert_allclose(given, 127.5 * (white + 1.0), atol=1.0)  # the input, as given

    # Nothing is sampled again; the list chooses.
    monkeypatch.setattr(nersemble.Candidate, "pipeline", None)
    chosen = tmp_path / "list.txt"
    chosen.write_text("018  # the second\n")
    assert evaluate.main([*arguments, "--subject-list", str(chosen)]) == 0
    again = json.loads((out / "scores.json").read_text())
    assert again["subjects"] == ["018"]
    assert again["scores"]["tiny"]["psnr"] == result["scores"]["tiny"]["psnr"][1:]


def test_relative_angles_start_at_the_input(captures):
    frames = view_folders.read_frames(captures / "views" / "017")
    serial = nersemble.read_protocol()["input_camera"]
    angles = nersemble.relative_angles(frames, serial)
    own = frames.index(nersemble.serial_of(frames, serial))
    np.testing.assert_allclose(angles[own], 0.0, atol=1e-4)
    level = [i for i in range(16) if i % 3 == own % 3]  # cameras as high as the input's
    absolute = np.array([6.0 * (i - own) for i in level])
    np.testing.assert_allclose(angles[level, 0], absolute, atol=0.3)


def test_a_camera_that_is_missing_is_named(captures, tmp_path, capsys):
    write_head(tmp_path / "views" / "017", RING)
    arguments = ["--protocol", "nersemble", "--truth", str(tmp_path), "--method", str(tmp_path)]
    assert evaluate.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "cameras, such as 220700191" in capsys.readouterr().err


def test_published_numbers_are_marked():
    text = published.text("heads")
    assert "not measured by this program" in text and "not to be compared" in text
    rows = published.read()["tables"][0]["rows"]
    assert rows["SpinMeRound"] == [0.033, 0.30, 0.73, 0.61, 0.911] and len(rows) == 7
    assert "| PanoHead | 0.012 | 0.32 | 0.65 | 0.27 | 0.88 |" in text
