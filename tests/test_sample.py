"""The command for users, end to end: what it writes, and what it says when something is wrong."""

import dataclasses
import html
import html.parser
import json
import os
import shutil

import av
import numpy as np
import pytest
from PIL import Image

from spinmeround_jax import cameras, checkpoints, files, sample
from spinmeround_jax.config import RELEASED
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import portraits
from spinmeround_jax.photo.likeness import Likeness
from spinmeround_jax.results import head_folder, layout, page, transforms
from spinmeround_jax.results.head_folder import Heads
from spinmeround_jax.video import mp4
from tests.support.tiny_model import CONFIG, random_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = CONFIG.image_size


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    sampling = dataclasses.replace(
        RELEASED, steps=3, sigma_max=5.0, normals_steps=2
    )  # as in test_pipeline, so that programs are compiled once
    provenance = {"command": "test", "sampling": dataclasses.asdict(sampling)}
    checkpoints.save_model(folder, random_model(), provenance)
    return folder


def identity(seed=0):
    return np.random.default_rng(seed).standard_normal(512).astype(np.float32)


def portrait(path, size=SIZE, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 4), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    np.save(path.with_suffix(".npy"), identity(seed))
    return path


@pytest.fixture
def command(checkpoint, tmp_path, capsys):
    """`command("--input", path, ...)` runs it with the tiny model: exit code, stdout, stderr."""

    def run(*arguments):
        argv = ["--checkpoint", checkpoint, "--out", tmp_path / "out", "--no-compilation-cache"]
        argv += ["--max-batch", "2"]
        try:
            code = sample.main([str(argument) for argument in [*argv, *arguments]])
        except SystemExit as stop:  # argparse
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------------------------------
# What it writes


def test_what_another_process_is_making_is_left_to_it(command, tmp_path):
    given = tmp_path / "portraits"
    given.mkdir()
    for name in ("alice", "bob"):
        portrait(given / f"{name}.png")
    out = tmp_path / "out"
    out.mkdir()
    with files.lock(out / "alice", suffix="sample.lock"):
        code, text, error = command("--input", given, "--yaw-pitch", "0,0")
    assert code == 1 and "1 written, 0 skipped, 1 failed" in text
    assert f"{out / 'alice'}: process {os.getpid()} on" in error
    assert sorted(path.name for path in out.iterdir()) == ["bob", "index.html"]


def test_what_another_process_made_meanwhile_is_not_made_again(command, tmp_path, monkeypatch):
    given, out = portrait(tmp_path / "alice.png"), tmp_path / "out"
    made, load = tmp_path / "made", sample.Pipeline.load
    assert command("--input", given, "--yaw-pitch", "0,0")[0] == 0
    out.rename(made)

    def load_slowly(*args, **options):
        made.rename(out)
        return load(*args, **options)

    monkeypatch.setattr(sample.Pipeline, "load", load_slowly)
    written = (made / "alice" / "settings.json").stat().st_mtime_ns
    assert command("--input", given, "--yaw-pitch", "0,0")[0] == 0
    assert (out / "alice" / "settings.json").stat().st_mtime_ns == written


def test_heads_of_other_weights_are_not_taken_for_finished(command, checkpoint, tmp_path):
    given, model = portrait(tmp_path / "alice.png"), tmp_path / "model"
    settings = tmp_path / "out" / "alice" / "settings.json"
    chosen = ["--input", given, "--yaw-pitch", "0,0"]
    shutil.copytree(checkpoint, model)
    assert command(*chosen, "--checkpoint", model)[0] == 0
    written = settings.read_bytes()
    other, provenance = random_model(1), checkpoints.read_provenance(checkpoint)
    checkpoints.save_model(model, other, provenance, overwrite=True)
    code, _, error = command(*chosen, "--checkpoint", model)
    assert code == 1 and "weights_sha256" in error
    # The same, guided, and without the guide again.
    code, _, error = command(*chosen, "--guide", model)
    assert code == 1 and "guide" in error
    assert command(*chosen, "--guide", model, "--overwrite")[0] == 0
    code, _, error = command(*chosen)
    assert code == 1 and "guide" in error
    # Heads of before either was recorded stay finished.
    kept = json.loads(written)
    del kept["weights_sha256"], kept["guide"], kept["sampling"]["guidance_sigma_max"]
    settings.write_text(json.dumps(kept))
    code, text, _ = command(*chosen, "--checkpoint", model)
    assert code == 0 and "1 skipped" in text
    code, _, error = command(*chosen, "--checkpoint", model, "--guidance-sigma-max", "5")
    assert code == 1 and "guidance_sigma_max" in error


def test_a_folder_of_portraits(command, tmp_path):
    inputs, out = tmp_path / "portraits", tmp_path / "out"
    inputs.mkdir()
    portrait(inputs / "alice.png", mode="RGBA")
    portrait(inputs / "bob.png", size=2 * SIZE, seed=1)
    (inputs / "bob.npy").unlink()
    angles = [{"yaw": 45, "pitch": 0}, {"yaw": 33, "pitch": 10}]
    about = {"id_embedding": identity(1).tolist(), "truth": angles}
    (inputs / "bob.json").write_text(json.dumps(about))
    Image.new("RGB", (2 * SIZE, 2 * SIZE)).save(inputs / "bob.truth.png")
    chosen = ["--yaw-pitch", "0,0 10,-20 45,0"]

    code, text, _ = command("--input", inputs, *chosen, "--seed", 3)
    assert code == 0
    assert "2 written, 0 skipped, 0 failed" in text
    assert str((out / "index.html").resolve()) in text
    names = [
        "view_000_yaw+000.0_pitch+00.0.png",
        "view_001_yaw+010.0_pitch-20.0.png",
        "view_002_yaw+045.0_pitch+00.0.png",
    ]
    found = files_in(out / "alice")
    for folder in ("views", "normals"):
        assert [file for file in found if file.startswith(folder)] == [
            f"{folder}/{n}" for n in names
        ]
    assert len([file for file in found if file.startswith("anchors/")]) == 7
    expected = {"input.png", "input_normals.png", "turntable.webp", "transforms.json"}
    assert expected | {"settings.json"} <= set(found)
    assert not [path for path in out.rglob(".*")]

    settings = json.loads((out / "alice" / "settings.json").read_text())
    assert settings["seed"] == 3
    assert settings["sampling"]["steps"] == 3
    assert settings["normals_space"] == "world"
    assert settings["provenance"]["command"] == "test"
    assert "--yaw-pitch" in settings["command"]
    with Image.open(out / "alice" / "normals" / names[0]) as normals:
        assert normals.text["normals_space"] == "world"
    with Image.open(out / "alice" / "turntable.webp") as turntable:
        assert (turntable.n_frames, turntable.size) == (3, (2 * SIZE, SIZE))
    document = (out / "index.html").read_text()
    assert document.count("<article>") == 2
    assert document.count("<h3>Truth") == 1
    # One true view was also sampled, the other was not.
    assert "sampled, +45°" in document
    assert "sampled, +33°" not in document

    # The same again is skipped, and made again on demand, with the same result; other settings or
    # another portrait are not the same.
    before = (out / "alice" / "views" / names[1]).read_bytes()
    code, text, _ = command("--input", inputs, *chosen, "--seed", 3)
    assert code == 0
    assert "0 written, 2 skipped" in text
    (out / "alice" / "views" / names[1]).write_bytes(b"touched")
    code, text, _ = command("--input", inputs / "alice.png", *chosen, "--seed", 3, "--overwrite")
    assert code == 0
    assert "1 written, 0 skipped" in text
    assert (out / "alice" / "views" / names[1]).read_bytes() == before
    assert (out / "index.html").read_text().count("<article>") == 2

    # Other settings, or another portrait, are refused before anything is made.
    before = {file: (out / file).read_bytes() for file in files_in(out)}
    for options, named in (
        ([*chosen, "--seed", 4], "request.seed: 3 -> 4"),
        ([*chosen, "--seed", 3, "--steps", 2], "sampling.steps: 3 -> 2"),
        (["--views", 4, "--seed", 3], "trajectory"),
        ([*chosen, "--seed", 3, "--normals", "camera"], "normals_space: 'world' -> 'camera'"),
    ):
        code, _, error = command("--input", inputs, *options)
        assert code == 1
        assert named in error and "--overwrite" in error and "Traceback" not in error
    portrait(inputs / "alice.png", seed=9)
    code, _, error = command("--input", inputs, *chosen, "--seed", 3)
    assert code == 1 and "alice: is finished" in error and "request.files" in error
    assert {file: (out / file).read_bytes() for file in files_in(out)} == before
    code, text, _ = command("--input", inputs / "alice.png", *chosen, "--seed", 3, "--overwrite")
    assert code == 0 and "1 written, 0 skipped" in text


@pytest.mark.parametrize("given", [".", "..", "inner/..", "{}/."])
def test_a_set_of_views_given_as_this_folder_has_its_name(command, tmp_path, monkeypatch, given):
    people = tmp_path / "anna"
    (people / "inner").mkdir(parents=True)
    portrait(people / "front.png")
    (people / "views.json").write_text('[{"file": "front.png", "yaw": 0}]')
    monkeypatch.chdir(people / "inner" if given == ".." else people)
    code, _, _ = command("--input", given.format(people), "--yaw-pitch", "20,0")
    assert code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"anna", "index.html"}


@pytest.mark.parametrize("name", ["..png", ".png", ".hidden.png"])
def test_names_that_are_none(command, tmp_path, name):
    path = portrait(tmp_path / "a.png").rename(tmp_path / name)
    code, _, error = command("--input", path, "--yaw-pitch", "20,0")
    assert code == 1 and "rename the input" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_head_that_a_kill_left_without_a_name(command, tmp_path):
    path = portrait(tmp_path / "a.png")
    assert command("--input", path, "--yaw-pitch", "20,0")[0] == 0
    (tmp_path / "out" / "a").rename(tmp_path / "out" / ".a.replaced")
    (tmp_path / "out" / ".a.77.unfinished").mkdir()
    code, text, _ = command("--input", path, "--yaw-pitch", "20,0")
    assert code == 0 and "0 written, 1 skipped" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "index.html"}


def test_the_input_is_among_the_views(command, tmp_path):
    path = portrait(tmp_path / "a.png")
    command("--input", path, "--yaw-pitch", "0,0")
    view = tmp_path / "out" / "a" / "views" / "view_000_yaw+000.0_pitch+00.0.png"
    np.testing.assert_array_equal(np.asarray(Image.open(view)), np.asarray(Image.open(path)))


def test_the_views_at_the_input_s_angle_are_made_on_request(command, tmp_path):
    path, chosen = portrait(tmp_path / "a.png"), ("--yaw-pitch", "0,0 30,0")
    view = tmp_path / "out" / "a" / "views" / "view_000_yaw+000.0_pitch+00.0.png"
    assert command("--input", path, *chosen, "--resample-observed")[0] == 0
    assert (np.asarray(Image.open(view)) != np.asarray(Image.open(path))).any()
    code, _, error = command("--input", path, *chosen)
    assert code == 1 and "resample_observed" in error
    assert command("--input", path, *chosen, "--overwrite")[0] == 0
    assert (np.asarray(Image.open(view)) == np.asarray(Image.open(path))).all()


def test_new_people_and_interpolation(command, tmp_path):
    code, _, _ = command("--unconditional", 2, "--seed", 5, "--yaw-pitch", "30,0")
    assert code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "new_0005", "new_0006", "index.html"
    }  # fmt: skip
    assert "input.png" not in files_in(tmp_path / "out" / "new_0005")
    np.save(tmp_path / "a.npy", identity(1))
    np.save(tmp_path / "b.npy", identity(2))
    code, _, _ = command(
        "--interpolate", tmp_path / "a.npy", tmp_path / "b.npy", "--steps-between", 1,
        "--yaw-pitch", "30,0",
    )  # fmt: skip
    assert code == 0
    assert (tmp_path / "out" / "a_to_b_02" / "views").is_dir()
    assert (tmp_path / "out" / "index.html").read_text().count("<article>") == 5


def test_video_of_finished_heads(command, tmp_path, monkeypatch):
    monkeypatch.setattr(mp4, "DEFAULT", mp4.Turn(height=SIZE, fps=4, seconds=1.0))
    arguments = ("--input", portrait(tmp_path / "alice.png"), "--yaw-pitch", "0,0 90,0")
    assert command(*arguments)[0] == 0
    code, text, _ = command(*arguments, "--video")
    assert code == 0 and "0 written, 1 skipped, 0 failed" in text
    with av.open(str(tmp_path / "out" / "alice" / mp4.NAME)) as video:
        (stream,) = video.streams
        assert (stream.frames, stream.width, stream.height) == (4, 2 * SIZE, SIZE)
    assert f'href="alice/{mp4.NAME}"' in (tmp_path / "out" / "index.html").read_text()


def test_three_views_of_one_person(command, tmp_path):
    paths = [portrait(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("abc")]
    items = [
        f"{path}:{angles}" for path, angles in zip(paths, ("0:0", "40:0", "-90:5"), strict=True)
    ]
    code, _, _ = command("--observed", *items, "--yaw-pitch", "20,0", "--normals", "camera")
    assert code == 0
    found = files_in(tmp_path / "out" / "a")
    assert {"input.png", "input_2.png", "input_3_normals.png"} <= set(found)
    assert len([file for file in found if file.startswith("anchors/")]) == 5
    assert json.loads((tmp_path / "out/a/transforms.json").read_text())["normals_space"] == "camera"


def test_a_folder_that_mixes_portraits_and_sets_of_views(command, tmp_path):
    inputs = tmp_path / "inputs"
    portrait_of = inputs / "alone.png"
    views = [("front.png", 0, 0), ("left.png", 40, 0), ("right.png", -90, 5)]
    for folder, count in (("one", 1), ("three", 3)):
        (inputs / folder).mkdir(parents=True)
        for i, (file, _, _) in enumerate(views[:count]):
            portrait(inputs / folder / file, seed=i)
        described = [dict(zip(("file", "yaw", "pitch"), view, strict=True)) for view in views]
        (inputs / folder / "views.json").write_text(json.dumps(described[:count]))
    portrait(portrait_of)
    (inputs / "notes").mkdir()

    code, text, _ = command("--input", inputs, "--yaw-pitch", "20,0")
    assert code == 0
    assert "3 written, 0 skipped, 0 failed" in text
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"alone", "one", "three", "index.html"}
    assert (out / "three" / "input_3_normals.png").is_file()
    # A set of one view is a portrait; and so is what came with other inputs.
    for folder in ("views", "normals"):
        (name,) = [path.name for path in (out / "one" / folder).iterdir()]
        assert (out / "one" / folder / name).read_bytes() == (
            out / "alone" / folder / name
        ).read_bytes()
    settings = json.loads((out / "three" / "settings.json").read_text())
    assert settings["observed_angles"] == [[0, 0], [40, 0], [-90, 5]]
    code, text, _ = command("--input", inputs / "three", "--yaw-pitch", "20,0")
    assert "0 written, 1 skipped" in text
    described[1]["yaw"] = 50
    (inputs / "three" / "views.json").write_text(json.dumps(described))
    code, _, error = command("--input", inputs / "three", "--yaw-pitch", "20,0")
    assert code == 1 and "request.observed_angles" in error


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("[", "expected"),
        ("{}", "1 or 3 views"),
        ("[]", "got 0"),
        ('[{"yaw": 0}]', "'file' missing"),
        ('[{"file": "a.png"}]', "'yaw' missing"),
        ('[{"file": "a.png", "yaw": 0}, {"file": "b.png", "yaw": 9}]', "got 2"),
        ('[{"file": "a.png", "yaw": 10}]', "first view is the reference"),
        ('[{"file": "../a.png", "yaw": 0}]', "in the same folder"),
        ('[{"file": 3, "yaw": 0}]', "expected"),
        ('[{"file": "a.png", "yaw": "x"}]', "expected"),
        ('[{"file": "missing.png", "yaw": 0}]', "missing.png: no such file"),
        ("[" * 100_000, "expected"),
    ],
)
def test_a_bad_set_of_views_does_not_stop_the_others(command, tmp_path, described, message):
    inputs = tmp_path / "inputs"
    (inputs / "set").mkdir(parents=True)
    portrait(inputs / "good.png")
    (inputs / "set" / "views.json").write_text(described)
    code, text, error = command("--input", inputs, "--yaw-pitch", "0,0")
    assert code == 1
    assert "1 written, 0 skipped, 1 failed" in text
    assert message in error and str(inputs / "set") in error
    assert "Traceback" not in error


# --------------------------------------------------------------------------------------------------
# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments"),
        (["--input", "nothing-there", "--unconditional", "1"], "not allowed with"),
        (["--unconditional", "0"], "expected a whole number, from 1"),
        (["--unconditional", "1", "--seed", "-1"], "at least 0"),
        (["--unconditional", "1", "--yaw-pitch", "30"], '"YAW,PITCH'),
        (["--unconditional", "1", "--yaw-pitch", "30,nan"], '"YAW,PITCH'),
        (["--unconditional", "1", "--yaw-pitch", "30,95"], '"YAW,PITCH'),
        (["--unconditional", "1", "--yaw-pitch", ""], '"YAW,PITCH'),
        (["--unconditional", "1", "--yaw-pitch", "3,0", "--views", "9"], "leave out"),
        (["--unconditional", "1", "--trajectory", "spiral"], "turntable, sweep or a .json"),
        (["--unconditional", "1", "--trajectory", "no.json"], "no.json"),
        (["--unconditional", "1", "--steps", "1"], "at least 2"),
        (["--unconditional", "1", "--guidance-scale", "nan"], "finite"),
        (
            ["--observed", "a.png:0:0", "b.png:1:1"],
            "1 or 3 views, the first at yaw 0, pitch 0: got 2",
        ),
        (["--observed", "a.png"], "FILE:YAW:PITCH"),
        (["--observed", "a.png:30:0"], "the first view is the reference"),
        (["--interpolate", "a.npy", "b.npy"], "a.npy: no such file"),
        (["--input", "demo", "alcie.png"], "alcie.png: no such file or folder"),
        (["--observed", "alcie.png:0:0"], "alcie.png: no such file or folder"),
    ],
)
def test_wrong_usage(command, tmp_path, arguments, message):
    code, _, error = command(*arguments)
    assert code in (1, 2)
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists() or not files_in(tmp_path / "out")


def test_a_checkpoint_that_is_none(command, tmp_path):
    code, _, error = command("--unconditional", "1", "--checkpoint", tmp_path / "nothing")
    assert code == 1
    assert "nothing" in error


def test_a_folder_without_portraits(command, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, error = command("--input", tmp_path / "empty")
    assert code == 1
    assert "no portraits in this folder" in error


def test_two_inputs_of_one_name(command, tmp_path):
    code, _, error = command("--input", portrait(tmp_path / "a.png"), portrait(tmp_path / "a.webp"))
    assert code == 1
    assert "same folder" in error


def test_bad_inputs_do_not_stop_the_good_one(command, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    portrait(inputs / "good.png")
    portrait(inputs / "small.png", size=SIZE - 1)
    Image.new("RGB", (SIZE, SIZE + 1)).save(portrait(inputs / "tall.png"))
    (inputs / "text.png").write_text("no image")
    (inputs / "list.txt").write_text("good.png")
    whole = portrait(inputs / "cut.png", size=64)
    whole.write_bytes(whole.read_bytes()[:500])
    Image.new("RGB", (64, 64)).save(inputs / "nobody.png")
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint16)).save(portrait(inputs / "deep.png"))
    code, text, error = command(
        "--input", inputs, inputs / "list.txt", "--yaw-pitch", "0,0",
        "--models", tmp_path / "no-models",
    )  # fmt: skip
    assert code == 1
    assert "3 written, 0 skipped, 5 failed" in text
    for name in ("good", "deep", "nobody"):  # 16 bits are scaled to 8; who has no identity has none
        assert (tmp_path / "out" / name / "settings.json").is_file()
    for name, message in {
        "small.png": "too few",
        "tall.png": "crop it to a square",
        "text.png": "not a readable image",
        "cut.png": "not a readable image",
        "list.txt": "not a readable image",
    }.items():
        assert any(name in line and message in line for line in error.splitlines()), name
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("json", b"{"),
        ("json", b"[1, 2]"),
        ("json", b'{"identity": [1]}'),
        ("json", b'{"id_embedding": [1, 2, 3]}'),
        ("json", b'{"id_embedding": ["a"]}'),
        ("json", b'{"id_embedding": [' + b"0, " * 511 + b"0]}"),
        ("json", b'{"id_embedding": [' + b"0, " * 511 + b"NaN]}"),
        ("json", b"\xff\xfe"),
        ("json", b"[" * 100_000),
        ("npy", b""),
        ("npy", b"not numpy"),
        ("npy", np.zeros(512, np.float32)),
        ("npy", np.ones(511, np.float32)),
        ("npy", np.ones((1, 512), np.float32)),
        ("npy", np.ones(512, np.int64)),
        ("npy", np.ones(512, np.complex64)),
        ("npy", np.array([{}] * 512, object)),  # would need unpickling
    ],
)
def test_bad_identities(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(InputError, match=rf"a\.{suffix}: expected an identity"):
        portraits.read_identity(tmp_path / "a.png")


def test_what_is_not_ours_stays(command, tmp_path):
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "letter.txt").write_text("dear")
    path = portrait(tmp_path / "a.png")
    code, _, error = command("--input", path, "--yaw-pitch", "0,0", "--overwrite")
    assert code == 2
    assert "not written by this program" in error
    assert (tmp_path / "out" / "a" / "letter.txt").read_text() == "dear"
    (tmp_path / "out" / "index.html").write_text("my home page")
    (tmp_path / "out" / "a").rename(tmp_path / "letters")
    code, _, error = command("--input", path, "--yaw-pitch", "0,0")
    assert "index.html: not written by this program" in error
    assert (tmp_path / "out" / "index.html").read_text() == "my home page"


# --------------------------------------------------------------------------------------------------
# Portraits, folders and the page by themselves


def test_portraits_are_composited_on_white_and_averaged(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)  # transparent black
    pixels[:2, :2] = (255, 0, 0, 255)
    pixels[2:, 2:] = (0, 0, 0, 255)
    pixels[2, 2] = (255, 255, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = portraits.read_image(tmp_path / "a.png", 2)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[0], [[1, -1, -1], [1, 1, 1]])
    np.testing.assert_allclose(image[1], [[1, 1, 1], [-0.5, -0.5, -0.5]], atol=1e-6)


def test_identities_become_unit_length(tmp_path):
    np.save(tmp_path / "a.npy", 20 * identity())
    found = portraits.read_identity(tmp_path / "a.png")
    np.testing.assert_allclose(found, identity() / np.linalg.norm(identity()), atol=1e-6)


def invented(trajectory):
    """A head whose normals all point to the frontal camera."""
    observed, anchors = np.zeros((1, 2), np.float32), cameras.anchors()

    def pictures(angles):
        facing = np.broadcast_to(np.float32([0, 0, 1]), (len(angles), SIZE, SIZE, 3))
        return np.zeros((len(angles), SIZE, SIZE, 3), np.float32), facing

    return Heads(
        observed,
        *pictures(observed),
        anchors,
        *pictures(anchors),
        trajectory,
        *pictures(trajectory),
    )


def test_transforms_are_our_cameras(tmp_path):
    trajectory = np.array([[0, 0], [90, 0], [-30, 20]], np.float32)
    head_folder.write_head(tmp_path / "a", invented(trajectory), {})
    written = json.loads((tmp_path / "a" / "transforms.json").read_text())
    assert written["camera_model"] == "OPENCV"
    assert written["fl_x"] == pytest.approx(4.2634 * SIZE, rel=1e-4)
    for frame, (yaw, pitch) in zip(written["frames"], trajectory, strict=True):
        pose = np.array(frame["transform_matrix"])
        np.testing.assert_allclose(pose @ cameras.orbit(yaw, pitch), np.eye(4), atol=1e-5)
        assert (tmp_path / "a" / frame["file_path"]).is_file()
        assert (tmp_path / "a" / frame["normals_file_path"]).is_file()
    # From the left side (+90) the camera stands at +x and looks along -x.
    left = np.array(written["frames"][1]["transform_matrix"])
    np.testing.assert_allclose(left[:3, 3], [cameras.RADIUS, 0, 0], atol=1e-5)
    np.testing.assert_allclose(-left[:3, 2], [-1, 0, 0], atol=1e-5)


def test_normals_in_camera_space(tmp_path):
    trajectory = np.array([[0, 0], [90, 0], [0, 90]], np.float32)
    head_folder.write_head(tmp_path / "a", invented(trajectory), {}, "camera")
    names = [layout.view_name(i, angles) for i, angles in enumerate(trajectory)]
    expected = [(128, 128, 255), (0, 128, 128), (128, 0, 128)]  # +z seen from front, left, above
    for name, colour in zip(names, expected, strict=True):
        with Image.open(tmp_path / "a" / "normals" / name) as image:
            assert image.text["normals_space"] == "camera"
            assert np.abs(np.asarray(image)[0, 0] - np.array(colour)).max() <= 1


def test_nothing_is_written_halfway(tmp_path, monkeypatch):
    trajectory = cameras.turntable(4)
    head_folder.write_head(tmp_path / "a", invented(trajectory), {"seed": 1})

    def fail(*arguments, **document):
        raise OSError("disk full")

    monkeypatch.setattr(transforms, "write", fail)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="disk full"):
            head_folder.write_head(tmp_path / name, invented(trajectory), {"seed": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert layout.read_settings(tmp_path / "a")["seed"] == 1


def test_heads_are_replaced_on_request_only(tmp_path):
    head = invented(cameras.turntable(4))
    shared = {"observed_angles", "anchor_angles", "trajectory"}
    values = {field.name: getattr(head, field.name) for field in dataclasses.fields(head)}
    heads = Heads(**{k: v if k in shared or not len(v) else v[None] for k, v in values.items()})
    heads = dataclasses.replace(heads, names=("a",))
    heads.save(tmp_path)
    written = (tmp_path / "a" / layout.SETTINGS).stat().st_mtime_ns
    with pytest.raises(InputError, match=r"a: exists.*overwrite=True"):
        heads.save(tmp_path)
    assert (tmp_path / "a" / layout.SETTINGS).stat().st_mtime_ns == written
    heads.save(tmp_path, overwrite=True)
    assert (tmp_path / "a" / layout.SETTINGS).stat().st_mtime_ns != written


def test_values_that_are_not_finite_are_refused(tmp_path):
    head = invented(cameras.turntable(4))
    broken = dataclasses.replace(head, images=np.full_like(head.images, np.nan))
    with pytest.raises(InputError, match="not finite"):
        head_folder.write_head(tmp_path / "a", broken, {})


class Collector(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.headings, self._in_heading = [], [], False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_heading = tag == "h2"

    def handle_data(self, data):
        if self._in_heading:
            self.headings.append(data)
            self._in_heading = False


def test_the_page_escapes_names_and_loads_nothing(tmp_path):
    hostile = ['<img src=x onerror=alert(1)>"&', "</style><script>alert(1)<|script>", "'>\"><b>"]
    for name in hostile:
        settings = {"source": {"input": f"<script>{name}</script>"}, "seed": 0}
        safe_name = name.replace("/", "|")
        head_folder.write_head(tmp_path / safe_name, invented(cameras.turntable(3)), settings)
    document = page.write_page(tmp_path).read_text()
    parsed = Collector()
    parsed.feed(document)
    assert sorted(parsed.headings) == sorted(name.replace("/", "|") for name in hostile)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "b" not in tags
    for _, attributes in parsed.tags:
        assert not {"src", "href", "onerror"} & set(attributes)
    assert "url(http" not in document


def test_truth_stands_above_what_was_sampled_there(tmp_path):
    angles = np.array([[20, 0], [90, 0], [10, 30]], np.float32)  # a view, an anchor, neither
    truth = portraits.Truth(angles, np.zeros((3, SIZE, SIZE, 3), np.uint8), None)
    path = np.array([[0, 0], [20, 0]], np.float32)
    head_folder.write_head(tmp_path / "a", invented(path), {"seed": 0}, truth=truth)
    parsed = Collector()
    parsed.feed(page.write_page(tmp_path).read_text())
    labels = [attributes.get("aria-label", "") for _, attributes in parsed.tags]
    assert sum(label.startswith("true,") for label in labels) == 3
    sampled = [label for label in labels if label.startswith("sampled,")]
    assert len(sampled) == 2 and "+20°" in sampled[0] and "+90°" in sampled[1]


def remove_a_view(folder):
    (folder / "views" / layout.view_name(1, np.array([120, 0]))).unlink()


def cut_a_picture(folder):
    path = folder / "input_normals.png"
    path.write_bytes(path.read_bytes()[:60])


def change_settings(folder, **changes):
    path = folder / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_a_view, "views/view_001_yaw+120.0_pitch+00.0.png is missing"),
        (cut_a_picture, "head/input_normals.png is damaged"),
        (lambda head: (head / "settings.json").write_text("["), "settings.json is damaged"),
        (lambda head: (head / "settings.json").write_text("[" * 100_000), "settings.json is dam"),
        (lambda head: change_settings(head, trajectory=[]), "do not fit"),
        (lambda head: change_settings(head, observed_angles=3), "do not fit"),
        (lambda head: change_settings(head, truth_angles=[[0, 0]]), "truth.png is missing"),
        (lambda head: change_settings(head, likeness={"mean": 1}), "KeyError('views')"),
    ],
)
def test_a_damaged_head_is_left_out_of_the_page(tmp_path, capsys, damage, reason):
    for name in ("head", "sound"):
        head_folder.write_head(tmp_path / name, invented(cameras.turntable(3)), {})
    damage(tmp_path / "head")
    document = page.write_page(tmp_path).read_text()
    assert document.count("<article>") == 1 and "<h2>sound</h2>" in document
    assert "1 head." in document
    (note,) = [line for line in document.splitlines() if "left out: head (" in line]
    assert reason in html.unescape(note)
    assert reason in capsys.readouterr().err


def test_what_the_page_cannot_encode_does_not_stop_it(tmp_path):
    head_folder.write_head(tmp_path / "a", invented(cameras.turntable(3)), {"command": "\udcff"})
    assert page.write_page(tmp_path).read_text().count("<article>") == 1


def test_no_head_takes_the_place_of_the_page(tmp_path):
    with pytest.raises(InputError, match="rename the input"):
        head_folder.write_head(tmp_path / "index.html", invented(cameras.turntable(3)), {})
    (tmp_path / "index.html").mkdir()
    with pytest.raises(InputError, match="not written by this program"):
        page.write_page(tmp_path)


def test_the_page_plots_the_likeness(tmp_path):
    views = np.array([0.9, np.nan, -0.2])
    measured = Likeness(views, recognition="0" * 64)
    head_folder.write_head(tmp_path / "a", invented(cameras.turntable(3)), {}, likeness=measured)
    document = page.write_page(tmp_path).read_text()
    assert "0.35 on average over the 2 of 3 views with a face" in document
    # 0 degrees is the middle of 720, -120 a sixth; 120 is at the bottom, where -0.2 stands too.
    assert (
        '<circle cx="360.0" cy="12.0"' in document and '<circle cx="120.0" cy="120.0"' in document
    )
    assert document.count("<circle") == 2 and "-120°: -0.20</title>" in document
    nobody = Likeness(np.full(3, np.nan), recognition="0" * 64)
    head_folder.write_head(tmp_path / "a", invented(cameras.turntable(3)), {}, likeness=nobody)
    assert "no face was found in any view" in page.write_page(tmp_path).read_text()


def test_the_page_is_quiet_for_screen_readers(tmp_path):
    head_folder.write_head(tmp_path / "a", invented(cameras.turntable(5)), {})
    parsed = Collector()
    parsed.feed(page.write_page(tmp_path).read_text())
    by_tag = {tag: attributes for tag, attributes in parsed.tags}
    assert by_tag["output"]["aria-live"] == "off"
    assert by_tag["input"]["aria-valuetext"] == "0°"
    assert by_tag["button"]["aria-label"] == "play"
    stage = next(i for i, (_, attrs) in enumerate(parsed.tags) if attrs.get("class") == "stage")
    assert all(
        attrs.get("aria-hidden") == "true" for _, attrs in parsed.tags[stage + 1 : stage + 3]
    )
    tags = [tag for tag, _ in parsed.tags]
    assert "style" not in tags[tags.index("body") :]


def test_the_page_shows_every_frame(tmp_path):
    trajectory = cameras.turntable(5)
    head_folder.write_head(tmp_path / "a", invented(trajectory), {})
    parsed = Collector()
    parsed.feed(page.write_page(tmp_path).read_text())
    (spin,) = [attrs for _, attrs in parsed.tags if attrs.get("class") == "spin"]
    labels = json.loads(spin["data-labels"])
    assert labels == ["0°", "+72°", "+144°", "-144°", "-72°"]
    assert int(spin["data-columns"]) * int(spin["data-rows"]) >= 5
