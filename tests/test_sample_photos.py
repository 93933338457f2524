"""`sample` on photos: prepared on the way, and how much the views look like them."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax import checkpoints, files, requests, sample
from spinmeround_jax.config import RELEASED
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import assets, face_resnet, likeness
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
    real = dataclasses.replace(assets.RECOGNITION, sha256=files.sha256(path))
    monkeypatch.setattr(assets, "RECOGNITION", real)
    return folder


def test_likeness_is_one_for_the_photo_itself_and_unknown_without_a_face(models):
    photo, _ = photo_models.draw_photo()
    other, _ = photo_models.draw_photo(skin=(90, 60, 200))
    wall = np.full((640, 640, 3), photo_models.WALL)
    views = np.stack([np.asarray(photo), np.asarray(other), wall]) / 127.5 - 1.0
    loaded = Models(models, front_end="insightface")
    face = loaded.finder.find(np.asarray(photo))[0]
    identity = loaded.recogniser.embed(np.asarray(photo), face.landmarks5 - 0.5)
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
        {
            "sampling": dataclasses.asdict(dataclasses.replace(RELEASED, steps=2, normals_steps=2)),
            "recogniser": {"name": "ArcFace", "sha256": assets.RECOGNITION.sha256},
        },
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
    # Nobody is seen on the wall, but it is square: it may be a portrait.
    assert code == 0 and "2 written, 0 skipped, 0 failed" in text
    assert "wall.png: no face found" in error
    out = tmp_path / "out" / "ann"
    with (out / "likeness.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["yaw"], row["identity_similarity"]) for row in rows]
    assert found == [("0", ""), ("30", "0.5"), ("180", "")]
    assert (out / rows[0]["file"]).is_file()
    settings = json.loads((out / "settings.json").read_text())
    assert settings["likeness"]["mean"] == 0.5 and settings["likeness"]["faces"] == 1
    assert settings["source"]["photo"]["alignment"]["framing"] == "canonical"
    assert "id_embedding" not in json.dumps(settings["source"])
    assert "Likeness" in (tmp_path / "out" / "index.html").read_text()
    assert "2 skipped" in run()[1]


# --------------------------------------------------------------------------------------------------
# The free front end


@pytest.fixture
def sampled(tmp_path, capsys):
    """`sampled(recogniser, files..., options)`: exit code, stderr, settings of every head."""
    data = pytest.importorskip("skimage.data")
    Image.fromarray(data.astronaut()).save(tmp_path / "astronaut.png")
    sampling = dataclasses.asdict(dataclasses.replace(RELEASED, steps=2, normals_steps=2))

    def run(recogniser, *arguments):
        model, out = tmp_path / "model", tmp_path / "out"
        if not model.exists():
            provenance = {"sampling": sampling, "recogniser": recogniser}
            checkpoints.save_model(model, random_model(), provenance)
        argv = ["--checkpoint", model, "--out", out, "--yaw-pitch", "0,0", "--no-compilation-cache"]
        code = sample.main([str(argument) for argument in (*argv, "--input", *arguments)])
        found = {
            path.parent.name: json.loads(path.read_text()) for path in out.glob("*/settings.json")
        }
        return code, capsys.readouterr().err, found

    return run


OURS = {"name": face_resnet.NAME, "sha256": face_resnet.sha256()}


@pytest.mark.parametrize(
    ("recogniser", "options", "identity", "note"),
    [
        (OURS, (), f"vector of recogniser {OURS['sha256'][:12]}", ""),
        (OURS, ("--no-identity",), "none: the empty identity", ""),
        (None, (), "none: the empty identity", "do not record the recogniser"),
        ({**OURS, "sha256": "0" * 64}, (), "none: the empty identity", "another recogniser"),
    ],
)
def test_the_identity_of_a_photo_is_what_the_weights_know(
    sampled, tmp_path, recogniser, options, identity, note
):
    code, error, found = sampled(recogniser, tmp_path / "astronaut.png", *options)
    assert code == 0 and note in error
    assert found["astronaut"]["identity"] == identity
    assert (tmp_path / "out" / "astronaut" / "photo.jpg").is_file()
    assert "identity: " + identity in (tmp_path / "out" / "index.html").read_text()


def test_identities_of_others_are_refused(sampled, tmp_path):
    portrait = Image.new("RGB", (64, 64), (200, 150, 120))
    vector = np.random.default_rng(0).standard_normal(512)
    vectors = {
        "arcface": {"id_embedding": vector.tolist(), "recognition": {"sha256": "1" * 64}},
        "random": {"id_embedding": vector.tolist()},
        "ours": {"id_embedding": [*vector[:128], *[0.0] * 384], "recognition": OURS},
        "none": {"no_identity": "nobody is seen"},
    }
    for name, record in vectors.items():
        portrait.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    portrait.save(tmp_path / "plain.png")  # nobody is found in it, but it may be a portrait
    Image.new("RGB", (64, 40)).save(tmp_path / "wall.png")
    inputs = [tmp_path / f"{name}.png" for name in (*vectors, "plain", "wall")]
    code, error, found = sampled(OURS, *inputs)
    assert code == 1 and found.keys() == {"ours", "none", "plain"}
    assert "arcface.png: its identity is by another recogniser" in error
    assert "random.png: its identity is not a vector of" in error
    assert "none.png: sampled without an identity: nobody is seen" in error
    assert "plain.png: no face found" in error and "wall.png: no face found" in error
    assert found["plain"]["identity"] == found["none"]["identity"] == "none: the empty identity"
    code, error, found = sampled(OURS, tmp_path / "arcface.png", "--no-identity")
    assert code == 0 and found["arcface"]["identity"] == "none: the empty identity"


def test_identities_without_a_portrait_are_of_the_right_recogniser(tmp_path):
    vector = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    np.save(tmp_path / "dense.npy", vector)
    np.save(tmp_path / "short.npy", np.where(np.arange(512) < 128, vector, 0))
    np.save(tmp_path / "other.npy", np.where(np.arange(512) < 128, -vector[::-1], 0))
    dense, short, other = (tmp_path / f"{name}.npy" for name in ("dense", "short", "other"))
    ours, arcface, unknown = (
        sample.photo_settings({"recogniser": recogniser})
        for recogniser in (OURS, {"name": "ArcFace", "sha256": "1" * 64}, None)
    )
    assert len(requests.interpolated(short, other, 1, 0, 16, ours)) == 3
    assert len(requests.interpolated(dense, other, 1, 0, 16, unknown)) == 3
    with pytest.raises(InputError, match=r"dense.npy: its identity is not a vector of dlib-resnet"):
        requests.interpolated(short, dense, 1, 0, 16, ours)
    with pytest.raises(InputError, match=r"short.npy.*with another recogniser"):
        requests.interpolated(dense, short, 1, 0, 16, arcface)
    # From Python, too, as file or array.
    pipeline = Pipeline(random_model(), settings={"provenance": {"recogniser": OURS}})
    for identity in (dense, vector):
        with pytest.raises(InputError, match="not a vector of dlib-resnet"):
            pipeline(identity=identity)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("data_prep.render_heads: parametric people", True),
        ("data_prep.panohead: PanoHead, network x", False),
        (None, False),
    ],
)
def test_weights_of_rendered_heads_say_so_of_photographs_only(sampled, tmp_path, source, told):
    sampling = dataclasses.asdict(dataclasses.replace(RELEASED, steps=2, normals_steps=2))
    provenance = {"sampling": sampling, "data": source and {"source": source}}
    checkpoints.save_model(tmp_path / "model", random_model(), provenance)
    Image.new("RGB", (64, 64)).save(tmp_path / "rendered.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "prepared.png")
    vector = {"id_embedding": [1.0] * 512}
    (tmp_path / "rendered.json").write_text(json.dumps(vector))
    made_by = {"generator": "spinmeround_jax.photo"}
    (tmp_path / "prepared.json").write_text(json.dumps({**vector, **made_by}))
    for name, photograph in (("rendered", False), ("astronaut", True), ("prepared", True)):
        code, error, _ = sampled(None, tmp_path / f"{name}.png")
        assert code == 0
        assert error.count("rendered heads of 16 pixels only") == (told and photograph)


@pytest.mark.parametrize(
    ("provenance", "framing"),
    [
        ({}, "canonical"),
        ({"framing": "close"}, "close"),
        ({"kind": "released weights"}, "panohead"),
    ],
)
def test_photos_are_framed_as_the_data_of_the_weights(provenance, framing):
    assert sample.photo_settings(provenance).options.framing == framing


@pytest.mark.parametrize("framing", ["wide", [], None])
def test_an_unknown_framing_is_refused(framing):
    with pytest.raises(InputError, match="framed as"):
        sample.photo_settings({"framing": framing})
