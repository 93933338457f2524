"""`sample` on photos: prepared on the way, and how much the views look like them."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from spinmeround_jax import checkpoints, sample
from spinmeround_jax.config import RELEASED
from spinmeround_jax.photo import assets, likeness
from spinmeround_jax.photo.prepare import Models
from tests.support import photo_models
from tests.support.tiny_model import random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_models.save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def models(folder, monkeypatch):
    """The small models, as if they were the real ones."""
    path = folder / assets.RECOGNITION.name
    real = dataclasses.replace(assets.RECOGNITION, sha256=assets.sha256_of(path))
    monkeypatch.setattr(assets, "RECOGNITION", real)
    return folder


def test_likeness_is_one_for_the_photo_itself_and_unknown_without_a_face(models):
    photo, _ = photo_models.draw_photo()
    other, _ = photo_models.draw_photo(skin=(90, 60, 200))
    wall = np.full((640, 640, 3), photo_models.WALL)
    views = np.stack([np.asarray(photo), np.asarray(other), wall]) / 127.5 - 1.0
    loaded = Models(models)
    face = loaded.finder.find(np.asarray(photo))[0]
    identity = loaded.recogniser.embed(np.asarray(photo), face.five - 0.5)
    found = likeness.measure(views, identity, loaded)
    assert found.similarity[0] == pytest.approx(1.0, abs=1e-3)
    assert found.similarity[1] < 0.99
    assert np.isnan(found.similarity[2])
    assert found.faces == 2 and found.mean == pytest.approx(found.similarity[:2].mean())
    assert likeness.measure(views[2:], identity, loaded).mean is None


def test_a_folder_of_photos(models, tmp_path, capsys, monkeypatch):
    checkpoints.save_model(
        tmp_path / "model",
        random_model(),
        {"sampling": dataclasses.asdict(dataclasses.replace(RELEASED, steps=2, normals_steps=2))},
    )
    photos = tmp_path / "photos"
    photos.mkdir()
    photo_models.draw_photo()[0].save(photos / "ann.png")
    photo_models.draw_photo(noses=())[0].save(photos / "wall.png")
    # The view that was given does not count; one has a face, one has none.
    measured = likeness.Likeness(np.array([1.0, 0.5, np.nan]), assets.RECOGNITION.sha256)
    monkeypatch.setattr(likeness, "measure", lambda *_: measured)

    def run(*more):
        argv = ["--checkpoint", tmp_path / "model", "--input", photos, "--out", tmp_path / "out"]
        argv += [
            "--models",
            models,
            "--yaw-pitch",
            "0,0 30,0 180,0",
            "--no-compilation-cache",
            *more,
        ]
        code = sample.main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, text, error = run()
    assert code == 1 and "1 written, 0 skipped, 1 failed" in text
    assert "wall.png" in error and "no face" in error
    out = tmp_path / "out" / "ann"
    with (out / "likeness.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["yaw"], row["arcface_similarity"]) for row in rows]
    assert found == [("0", ""), ("30", "0.5"), ("180", "")]
    assert (out / rows[0]["file"]).is_file()
    settings = json.loads((out / "settings.json").read_text())
    assert settings["likeness"]["mean"] == 0.5 and settings["likeness"]["faces"] == 1
    assert settings["source"]["photo"]["alignment"]["framing"] == "canonical"
    assert "id_embedding" not in json.dumps(settings["source"])
    assert "Likeness" in (tmp_path / "out" / "index.html").read_text()
    assert "1 skipped" in run()[1]
