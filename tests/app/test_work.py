"""Jobs of the page without the page: progress, stopping, words, and who may come in."""

import dataclasses
import functools
import json
import pathlib
import re
import sys
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax import checkpoints, files, requests
from spinmeround_jax.app import __main__ as command
from spinmeround_jax.app import work
from spinmeround_jax.app.work import ANGLES, PageSettings, Stopped, Studio, Upload, Weights, follow
from spinmeround_jax.splats.fit import FitSettings
from spinmeround_jax.video import mp4
from tests.support import splat_views
from tests.support.tiny_model import SAMPLING, random_model

SETTINGS = PageSettings(next(iter(ANGLES)), 3, SAMPLING.steps, 1.0, False, False)


@pytest.fixture(autouse=True)
def small_videos(monkeypatch):
    monkeypatch.setattr(mp4, "DEFAULT", mp4.Turn(height=32, fps=4, seconds=1.0))


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    checkpoints.save_model(folder, random_model(), {"sampling": dataclasses.asdict(SAMPLING)})
    root = tmp_path_factory.mktemp("jobs")
    return Studio([Weights(folder, None)], root)


def finish(steps):
    """What was told, and what a generator returned."""
    told = []
    while True:
        try:
            told.append(next(steps))
        except StopIteration as end:
            return told, end.value


def test_a_job_tells_how_far_it_is_and_how_long_it_takes():
    told_so_far = threading.Event()

    def job(report):
        report("begin", 0.0)
        report("halfway", 0.5)
        told_so_far.wait()
        return "result"

    steps = follow(job)
    for told in steps:
        if told.fraction:
            break
    assert told.text == "halfway" and told.fraction == 0.5 and told.left > 0
    told_so_far.set()
    assert finish(steps)[1] == "result"


def test_a_job_whose_reader_has_gone_ends_with_its_next_report():
    running, closed, ended = threading.Event(), threading.Event(), []

    def job(report):
        running.set()
        closed.wait()
        try:
            report("more", 0.1)
        except Stopped:
            ended.append("stopped")
            raise
        finally:
            running.clear()
            over.set()

    over = threading.Event()
    steps = follow(job)
    next(steps)
    running.wait()
    steps.close()
    closed.set()
    assert over.wait(60) and ended == ["stopped"]


def test_an_error_of_a_job_arrives_where_it_is_followed():
    def job(report):
        raise files.InputError("no such thing")

    with pytest.raises(files.InputError, match="no such thing"):
        finish(follow(job))


def test_a_new_person_is_a_folder_an_archive_and_a_page(studio):
    told, head = finish(follow(lambda report: studio.spin("tiny", [], SETTINGS, report)))
    with zipfile.ZipFile(head.archive) as archive:
        names = archive.namelist()
        settings = json.loads(archive.read(f"{head.folder.name}/settings.json"))
        assert str(studio.root) not in archive.read(f"{head.folder.name}/settings.json").decode()
    assert f"{head.folder.name}/transforms.json" in names
    assert sum("/views/view_" in name for name in names) == 48
    assert f"{head.folder.name}/{mp4.NAME}" in names
    assert settings["seed"] == SETTINGS.seed and "<article>" in head.page
    assert all(0.0 <= now.fraction <= 1.0 for now in told)
    studio.remove(head)
    assert list(studio.root.iterdir()) == []


def test_heads_are_spun_without_an_encoder_of_videos(studio, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    head = studio.spin("tiny", [], SETTINGS, lambda *_: None)
    assert head.archive.is_file() and not (head.folder / mp4.NAME).exists()
    studio.remove(head)


def test_a_head_is_made_3d_and_filmed(studio, monkeypatch):
    monkeypatch.setattr(work, "FitSettings", functools.partial(FitSettings, steps=20, lpips=0.0))
    head = studio.spin("tiny", [], SETTINGS, lambda *_: None)
    splat_views.write(head.folder, splat_views.ellipsoid(splat_views.ring(12), 32))
    solid = studio.reconstruct(head, lambda *_: None)
    assert solid.left_out == {}
    assert {path.name for path in solid.folder.iterdir()} > {
        "splats.ply", "splats.glb", "mesh.glb", "mesh_textured.glb", "viewer.html",
    }  # fmt: skip

    def stop(text, fraction):
        if fraction > 0.0:
            raise Stopped

    with pytest.raises(Stopped):
        studio.film(head, stop)
    assert not list(solid.folder.glob(f"*{mp4.NAME}*"))
    fractions = []
    film = studio.film(head, lambda _, done: fractions.append(done))
    assert film.parent == solid.folder and film.is_file()
    assert fractions == sorted(fractions) and fractions[0] == 0.0 and max(fractions) <= 1.0
    studio.remove(head)
    assert list(studio.root.iterdir()) == []


def test_progress_never_goes_back_and_reaches_the_end(studio):
    fractions = []
    path = studio.root / "portrait.png"
    Image.new("RGB", (64, 64), "white").save(path)
    head = studio.spin("tiny", [Upload(path)], SETTINGS, lambda _, done: fractions.append(done))
    studio.remove(head)
    path.unlink()
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and len(set(fractions)) > 4


def test_a_stopped_job_leaves_nothing_and_frees_the_device(studio):
    def stop(text, fraction):
        if fraction > 0.0:
            raise Stopped

    with pytest.raises(Stopped):
        studio.spin("tiny", [], SETTINGS, stop)
    assert list(studio.root.iterdir()) == []
    studio.remove(studio.spin("tiny", [], SETTINGS, lambda *_: None))


def test_errors_name_the_file_and_no_folder_of_this_machine(studio):
    path = studio.root / "uploads" / "ab12" / "my photo.jpg"
    path.parent.mkdir(parents=True)
    path.write_text("not a picture")
    with pytest.raises(files.InputError) as error:
        studio.look("tiny", [Upload(path)], SETTINGS)
    sentence = studio.sentence(error.value)
    assert sentence.startswith("my photo.jpg: ") and str(studio.root) not in sentence
    path.unlink()
    path.parent.rmdir()
    path.parent.parent.rmdir()


def test_angles_of_three_photos_are_those_between_them(studio):
    class Taken:
        def __init__(self, yaw, pitch):
            self.yaw_pitch = (yaw, pitch)

    image = np.zeros((1, 16, 16, 3), np.float32)
    jobs = [
        requests.Job(f"photo{i}", image + 0.1 * i, None, 0, {}, prepared=Taken(*pose))
        for i, pose in enumerate([(10.0, 0.0), (55.0, 0.0), (-30.0, 20.0)])
    ]
    job, angles = requests.joined(jobs)
    assert job.images.shape == (3, 16, 16, 3)
    np.testing.assert_allclose(angles, [(0, 0), (45, 0), (-40, 20)], atol=1e-4)
    with pytest.raises(files.InputError, match="three"):
        requests.joined(jobs[:2])
    lost = dataclasses.replace(jobs[2], prepared=None)
    with pytest.raises(files.InputError, match="photo2"):
        requests.joined([*jobs[:2], lost])


def test_other_hosts_need_names_and_passwords(tmp_path, capsys):
    assert command.main(["--host", "0.0.0.0"]) == 2
    assert "--auth" in capsys.readouterr().err
    for content in ("", "ann", "ann:", ":secret"):
        (tmp_path / "people.txt").write_text(content)
        assert command.main(["--auth", str(tmp_path / "people.txt")]) == 2
    assert command.main(["--auth", str(tmp_path / "nobody.txt")]) == 2
    (tmp_path / "people.txt").write_text("ann:a:b\n\nbob:c\n")
    assert command.read_auth(tmp_path / "people.txt") == [("ann", "a:b"), ("bob", "c")]


@pytest.mark.parametrize("words", [command for command, _ in work.WORDS])
def test_words_that_the_page_replaces_are_still_in_messages(words):
    """Else a message was reworded, and the page would show an option of the command line."""
    package = pathlib.Path(work.__file__).parents[1]
    sources = (path.read_text() for path in package.rglob("*.py") if path.name != "work.py")
    joined = (re.sub(r'"\s*\n\s*f?"', "", source) for source in sources)
    assert any(words in source for source in joined)
