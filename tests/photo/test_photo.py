"""The command that prepares photos: what it writes, and what bad input gets."""

import itertools
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax.files import InputError, write_atomically
from spinmeround_jax.photo import landmarks, portraits, pose
from spinmeround_jax.photo.__main__ import main
from spinmeround_jax.photo.pose import Square
from tests.support.bad_images import BAD_FILES, HEIC

SIZE = (400, 360)


def five(centre=(200, 180), side=380.0, yaw=0.0, roll=4.0):
    seen = pose.project(landmarks.load_model().mean, yaw, 0.0)
    points = landmarks.FIVE_OF_68 @ Square(np.array(centre, float), side, roll).to_photo(seen)
    return np.round(points, 2).tolist()


def photo(path, size=SIZE, mode="RGB"):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


@pytest.fixture
def command(tmp_path, capsys):
    """`command({"a.png": points}, "--input", ...)`: exit code, stdout, stderr; no models there."""

    def run(points, *arguments):
        argv = ["--out", tmp_path / "out", "--models", tmp_path / "models"]
        argv += ["--front-end", "insightface"]
        if points is not None:
            file = tmp_path / "landmarks.json"
            file.write_text(points if isinstance(points, str) else json.dumps(points))
            argv += ["--landmarks", file]
        try:
            code = main([str(argument) for argument in [*argv, *arguments]])
        except SystemExit as stop:  # argparse
            code = stop.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_photos_with_landmarks_by_hand(command, tmp_path):
    inputs, out = tmp_path / "photos", tmp_path / "out"
    inputs.mkdir()
    photo(inputs / "a.png")
    photo(inputs / "b.jpg")
    (inputs / "readme.txt").write_text("not a picture, not looked at")
    points = {"a.png": five(), "b.jpg": five(yaw=30.0), "c.jpg": five()}
    options = ["--input", inputs, "--keep-background", "--preview"]
    code, text, error = command(points, *options)
    assert code == 0
    assert "2 written, 0 skipped, 0 failed" in text
    assert "c.jpg is not among the photos" in error
    assert files(out) == ["a.json", "a.png", "b.json", "b.png", "previews/a.jpg", "previews/b.jpg"]
    with Image.open(out / "a.png") as image:
        assert (image.size, image.mode) == ((512, 512), "RGB")
    with Image.open(out / "previews" / "b.jpg") as image:
        assert image.width > 3 * image.height
    record = json.loads((out / "b.json").read_text())
    assert abs(record["pose"]["yaw"] - 30) < 6
    assert record["source"]["size"] == list(SIZE)
    assert record["background"] == "kept"
    assert "id_embedding" not in record
    assert "recognition model" in record["no_identity"]
    # Portraits find the images, not the previews, and say what is missing.
    assert [p.name for p in portraits.find([out])] == ["a.png", "b.png"]
    assert portraits.read_image(out / "a.png", 128).shape == (128, 128, 3)
    with pytest.raises(InputError, match=r"a\.json.*no identity.*photo\.fetch"):
        portraits.read_identity(out / "a.png")

    # The same again is skipped; made again on demand, or when a half is missing.
    (out / "b.png").unlink()
    code, text, _ = command(points, *options)
    assert "1 written, 1 skipped, 0 failed" in text
    code, text, _ = command(points, *options, "--overwrite")
    assert "2 written, 0 skipped, 0 failed" in text


def test_a_portrait_whose_writing_was_stopped_is_made_again(command, tmp_path, monkeypatch):
    path, out = photo(tmp_path / "a.png"), tmp_path / "out"
    options = ["--input", path, "--keep-background", "--preview"]
    assert command({"a.png": five()}, *options)[0] == 0
    whole = {name: (out / name).read_bytes() for name in files(out)}
    write = write_atomically
    for stop, folder in itertools.product(range(4), (out, tmp_path / "new")):
        calls = itertools.count()

        def stopped(path, content, stop=stop, calls=calls):
            if next(calls) == stop:
                raise KeyboardInterrupt
            write(path, content)

        monkeypatch.setattr("spinmeround_jax.files.write_atomically", stopped)
        assert command({"a.png": five()}, *options, "--overwrite", "--out", folder)[0] == 130
        monkeypatch.setattr("spinmeround_jax.files.write_atomically", write)
        if stop:  # `sample` does not take it for finished
            assert "stopped while" in portraits.no_identity(folder / "a.png")
        assert command({"a.png": five()}, *options, "--out", folder)[0] == 0
        assert {name: (folder / name).read_bytes() for name in files(folder)} == whole


def test_finished_portraits_are_not_taken_for_those_of_other_options(command, tmp_path):
    path, out = photo(tmp_path / "a.png"), tmp_path / "out"
    points, other = {"a.png": five()}, tmp_path / "other"
    other.mkdir()
    photo(other / "a.png", (SIZE[0] + 8, SIZE[1]))
    options = ["--keep-background"]
    assert command(points, "--input", path, *options)[0] == 0
    before = {name: (out / name).read_bytes() for name in files(out)}
    for given, more, named in (
        (path, ["--framing", "panohead"], "framing: 'canonical' -> 'panohead'"),
        (path, ["--face", "2"], "face: 1 -> 2"),
        (path, ["--front-end", "mediapipe"], "front_end: 'insightface' -> 'mediapipe'"),
        (other / "a.png", [], "photo_sha256"),
    ):
        code, _, error = command(points, "--input", given, *options, *more)
        assert code == 1 and named in error and "--overwrite" in error
    code, _, error = command({"a.png": five(yaw=20.0)}, "--input", path, *options)
    assert code == 1 and "landmarks" in error
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    # A preview is not part of the portrait: it is added.
    assert "1 written" in command(points, "--input", path, *options, "--preview")[1]
    assert files(out) == ["a.json", "a.png", "previews/a.jpg"]
    assert "1 skipped" in command(points, "--input", path, *options, "--preview")[1]
    code, _, _ = command(points, "--input", path, *options, "--framing", "panohead", "--overwrite")
    assert code == 0 and (out / "a.png").read_bytes() != before["a.png"]


@pytest.mark.parametrize("on_disk, written", [("NFC", "NFD"), ("NFD", "NFC")])
def test_landmarks_of_names_with_accents(command, tmp_path, on_disk, written):
    path = photo(tmp_path / unicodedata.normalize(on_disk, "Zoë.png"))
    points = {unicodedata.normalize(written, "Zoë.png"): five()}
    code, text, error = command(points, "--input", path, "--keep-background")
    assert code == 0 and "1 written" in text and "not among" not in error


def test_portraits_read_the_identity(tmp_path):
    vector = np.random.default_rng(0).standard_normal(512)
    (tmp_path / "a.json").write_text(json.dumps({"id_embedding": vector.tolist()}))
    photo(tmp_path / "a.png", (64, 64))
    found = portraits.read_identity(tmp_path / "a.png")
    np.testing.assert_allclose(found, vector / np.linalg.norm(vector), rtol=1e-5)


def test_framings(command, tmp_path):
    path = photo(tmp_path / "a.png")
    sides = {}
    for framing in pose.FRAMINGS:
        command({"a.png": five()}, "--input", path, "--keep-background", "--framing", framing,
                "--overwrite")  # fmt: skip
        sides[framing] = json.loads((tmp_path / "out/a.json").read_text())["alignment"]["side"]
    assert sides["canonical"] == pytest.approx(380, rel=0.05)
    assert 1.4 < sides["canonical"] / sides["panohead"] < 1.6


# --------------------------------------------------------------------------------------------------
# Bad input

BAD_PHOTOS = {
    "at the border": (photo, five(centre=(10, 180)), "cut by the border of the photo; take one"),
    "tiny": (photo, five(side=80.0), "only 46 pixels tall; at least 60 are needed"),
    "extreme pose": (photo, five(yaw=85.0), "take a photo within 75 and 50"),
    "not a face": (photo, [[150, 100], [250, 100], [330, 300], [170, 200], [230, 200]], "not those of a face"),
    "one point": (photo, [[50, 50]] * 5, "no head fits the landmarks"),
    "few pixels": (lambda path: photo(path, (30, 20)), five(), "30 x 20 pixels are too few"),
    "heic": (lambda path: path.write_bytes(HEIC), five(), "pillow-heif|not a readable image"),
    "missing": (lambda path: None, five(), "no such file; check the path"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BAD_PHOTOS, *BAD_FILES])
def test_a_bad_photo_gets_one_message_and_stops_no_other(command, tmp_path, case):
    good = photo(tmp_path / "good.png")
    if case in BAD_PHOTOS:
        make, points, message = BAD_PHOTOS[case]
        bad = tmp_path / "bad.jpg"
        make(bad)
    else:
        content, message = BAD_FILES[case]
        bad, points = tmp_path / f"bad_{case}", five()
        bad.write_bytes(content)
    code, text, error = command(
        {"good.png": five(), bad.name: points}, "--input", bad, good, "--keep-background"
    )
    assert code == 1
    assert "1 written, 0 skipped, 1 failed" in text
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    assert str(bad) in line
    assert any(part in line for part in message.split("|"))
    assert files(tmp_path / "out") == ["good.json", "good.png"]


@pytest.mark.parametrize(
    ("points", "arguments", "message"),
    [
        (None, [], "--input"),
        (None, ["--input", "{photo}"], "missing; it finds faces and five landmarks. Get it with"),
        (None, ["--input", "{photo}", "--face", "0"], "at least 1"),
        (None, ["--input", "{empty}"], "no images in this folder"),
        (None, ["--input", "{photo}", "{twin}"], "same portrait"),
        ({"a.png": five()}, ["--input", "{photo}", "--recognition", "none.onnx"], "no such recog"),
        ({"a.png": five()}, ["--input", "{photo}", "--recognition", "{photo}"], "not the recognition"),
        ({"a.png": five()}, ["--input", "{photo}", "--framing", "wide"], "invalid choice"),
        ({"a.png": five()[:4]}, ["--input", "{photo}"], "with 5 or 68 points"),
        ({"a.png": [["x", "y"]] * 5}, ["--input", "{photo}"], "with 5 or 68 points"),
        ({"a.png": {"x": 1}}, ["--input", "{photo}"], "with 5 or 68 points"),
        ("[1, 2]", ["--input", "{photo}"], "expected an object"),
        ("{", ["--input", "{photo}"], "expected {"),
        ("[" * 100_000, ["--input", "{photo}"], "expected {"),
    ],
)  # fmt: skip
def test_wrong_usage(command, tmp_path, points, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    names = {
        "photo": photo(tmp_path / "a.png"),
        "twin": photo(tmp_path / "a.jpg"),
        "empty": tmp_path / "empty",
    }
    code, _, error = command(points, *(argument.format(**names) for argument in arguments))
    assert code in (1, 2)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_no_background_model(command, tmp_path):
    path = photo(tmp_path / "a.png")
    code, _, error = command({"a.png": five()}, "--input", path)
    assert code == 1
    assert "it separates the person from the background" in error
    assert "photo.fetch" in error
    assert not (tmp_path / "out").exists()


def test_files_in_the_way_are_left_alone(command, tmp_path):
    path = photo(tmp_path / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    photo(out / "a.png", (64, 64))
    before = (out / "a.png").read_bytes()
    code, _, error = command({"a.png": five()}, "--input", path, "--keep-background", "--overwrite")
    assert code == 1
    assert "in the way" in error
    assert (out / "a.png").read_bytes() == before
    assert files(out) == ["a.png"]
    (tmp_path / "file").write_text("")
    code = main(["--input", str(path), "--out", str(tmp_path / "file")])
    assert code == 1


def test_a_failed_write_leaves_nothing(command, tmp_path, monkeypatch):
    path = photo(tmp_path / "a.png")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    code, _, error = command({"a.png": five()}, "--input", path, "--keep-background")
    assert code == 1 and "a.png: disk full" in error
    assert files(tmp_path / "out") == []
