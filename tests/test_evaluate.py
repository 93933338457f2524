"""The evaluation command on a small rendered set whose views can be told apart."""

import csv
import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest

from data_prep import validate
from spinmeround_jax import cameras, checkpoints, evaluate
from spinmeround_jax.config import RELEASED
from spinmeround_jax.data import shards
from spinmeround_jax.data.subjects import HeldOut
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.evaluation import heads as protocol
from spinmeround_jax.evaluation import measures, models, parts, results
from tests.support import synthetic_shards
from tests.support.synthetic_shards import write_dataset
from tests.support.tiny_model import random_model

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    return synthetic_shards.write_rings(tmp_path_factory.mktemp("data") / "heads")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    sampling = dataclasses.replace(RELEASED, steps=2, sigma_max=5.0, normals_steps=1)
    checkpoints.save_model(folder, random_model(), {"sampling": dataclasses.asdict(sampling)})
    return folder


@pytest.fixture(scope="module")
def finished(heads, model, tmp_path_factory):
    """A run's folder, and its arguments."""
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--checkpoint", str(model), "--data", str(heads), "--out", str(out)]
    arguments += ["--subjects", "2", "--sweep", "anchors=false", "--max-batch", "1"]
    assert evaluate.main(arguments) == 0
    return out, arguments


def test_views_are_found_by_angle_also_across_180(heads):
    source = HeldOut(heads)
    found = protocol.find_views(source, 0, np.array([[180, 0], [-180, 0], [-7.5, 0]]))
    assert found == [24, 24, 47]
    with pytest.raises(ValueError, match="no view at yaw 10, pitch 0"):
        protocol.find_views(source, 0, np.array([[10, 0]]))


def test_baselines_are_the_mean_and_the_nearest_training_head(heads):
    train = HeldOut(heads, "train")
    angles = cameras.anchors()
    portrait = train.load(1, [0]).images  # its own nearest neighbour
    found = protocol.mean_and_nearest(train, portrait, angles)
    assert found["nearest"].tolist() == [1]
    views = protocol.find_views(train, 0, angles)
    everyone = np.mean([train.load(i, views).images for i in range(3)], axis=0)
    np.testing.assert_allclose(found["images"], everyone, atol=1e-6)


def test_neighbour_difference_of_a_closed_ring():
    ring = np.zeros((1, 4, 2, 2, 3))
    ring[:, 1] = 1.0  # two of the four steps change by 1
    np.testing.assert_allclose(measures.neighbour_difference(ring), [0.5])


def test_command_writes_tables_scores_and_pictures(finished):
    out, _ = finished
    table = (out / "table.md").read_text()
    turned = "tiny, input at yaw ±30"
    for row in (
        "mean training head",
        "tiny",
        turned,
        "tiny, anchors false",
        "tiny: its autoencoder",
    ):
        assert f"| {row} |" in table
    result = json.loads((out / "scores.json").read_text())
    scores = result["scores"]
    assert len(scores["tiny"]["psnr"]) == 2 and len(scores["tiny"]["consistency"]) == 2
    assert np.shape(result["per_view"]["tiny"]["psnr"]) == (2, 7)
    assert np.shape(result["per_view"][turned]["normals"]) == (2, 7)
    # Losses are of the model, not of how it is sampled; two heads swap their identities.
    assert len(scores["tiny"]["held_out_gap"]) == len(scores["tiny"]["swapped_identity"]) == 2
    assert "held_out_gap" not in scores["tiny, anchors false"]
    assert all(len(scores[row]["hair"]) == 2 for row in ("tiny", "nearest training head"))
    assert any("LPIPS needs 32 pixels" in note for note in result["notes"])
    summary = result["summary"]["tiny"]["psnr"]
    assert summary["low"] <= summary["mean"] <= summary["high"] and summary["subjects"] == 2
    with (out / "scores.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["row"] == "tiny"]
    found = [float(row["value"]) for row in rows if row["measure"] == "psnr"]
    np.testing.assert_allclose(found, scores["tiny"]["psnr"], rtol=1e-6)
    assert {row["subject"] for row in rows} == {"person-1", "person-5"}
    assert {path.name for path in out.glob("*.png")} == {"worst.png", "median.png", "best.png"}


def test_the_turntable_is_sampled_only_for_what_is_measured_of_it(finished, tmp_path, monkeypatch):
    out, arguments = finished
    skip = [f"--skip={name}" for name in ("consistency", "reprojection", "reprojection_normals")]
    views = []
    spin = Pipeline.spin
    monkeypatch.setattr(
        Pipeline, "spin", lambda self, *a: views.append(len(a[2])) or spin(self, *a)
    )
    assert evaluate.main([*arguments, *skip, f"--out={tmp_path}"]) == 0
    # The frontal view and the anchors, of two heads; then the anchors from two inputs that are turned.
    assert views == [8, 8, 7, 7, 7, 7]
    found, expected = (json.loads((x / "scores.json").read_text()) for x in (tmp_path, out))
    np.testing.assert_allclose(
        found["scores"]["tiny"]["psnr"], expected["scores"]["tiny"]["psnr"], rtol=1e-5
    )


def test_data_unlike_what_the_weights_learnt_is_told(tmp_path):
    args = evaluate.parse_arguments(["--checkpoint", "x", "--data", "y"])
    known = {"name": "ours", "sha256": "1" * 64}
    learnt = {"framing": "closer", "recogniser": known}
    checkpoints.save_model(tmp_path / "new", random_model(), learnt)
    checkpoints.save_model(tmp_path / "old", random_model(), {})
    new, old = (models.Candidate(str(tmp_path / name), args) for name in ("new", "old"))
    same = {"framing": "closer", "identity": known}
    assert new.unlike(same) == old.unlike(same) == old.unlike({}) == []
    assert new.unlike({}) == [
        "new learnt heads framed 'closer', these are framed 'canonical'",
        "new learnt identities by ours, these are by no one known",
    ]
    assert len(new.unlike({**same, "identity": {"name": "ours", "sha256": "2" * 64}})) == 1


def test_what_is_kept_is_not_sampled_again(finished, heads, monkeypatch):
    out, arguments = finished
    before = {name: (out / name).read_bytes() for name in ("table.md", "scores.json")}
    count = len(list((out / "parts").iterdir()))
    monkeypatch.setattr(Pipeline, "__init__", None)  # nothing is to be sampled
    assert evaluate.main(arguments) == 0
    assert before == {name: (out / name).read_bytes() for name in before}

    monkeypatch.undo()
    calls = []
    init = Pipeline.__init__
    monkeypatch.setattr(
        Pipeline, "__init__", lambda self, *a, **named: calls.append(1) or init(self, *a, **named)
    )
    largest = max((out / "parts").iterdir(), key=os.path.getsize)
    largest.write_bytes(largest.read_bytes()[:-30])  # as a full disk would leave it
    kept = (out / "parts").iterdir()
    assert evaluate.main(arguments) == 0
    assert len(calls) == 1 and len(list(kept)) == count
    assert before == {name: (out / name).read_bytes() for name in before}

    # Another seed, and touched data, are other parts.
    assert evaluate.main([*arguments, "--seed", "1"]) == 0
    assert len(list((out / "parts").iterdir())) == count + 6
    assert (out / "scores.json").read_bytes() != before["scores.json"]


def test_a_part_is_for_what_made_it_alone(tmp_path):
    kept = parts.Parts(tmp_path, {"data": 1})
    made = kept.make({"row": "a"}, lambda: {"x": np.arange(3)})
    np.testing.assert_array_equal(kept.get({"row": "a"})["x"], made["x"])
    assert kept.get({"row": "b"}) is None
    assert parts.Parts(tmp_path, {"data": 2}).get({"row": "a"}) is None


def test_damaged_parts_are_made_again(tmp_path, capsys):
    kept = parts.Parts(tmp_path, {"data": 1})

    def make():
        return {"x": np.arange(300.0)}

    kept.make({"row": "a"}, make)
    (path,) = tmp_path.iterdir()
    sound, rng = path.read_bytes(), np.random.default_rng(0)
    damages = [b"", b"PK", sound[:-1], sound[: len(sound) // 2], sound + b"x"]
    for _ in range(200):
        damaged = bytearray(sound)
        damaged[rng.integers(len(sound))] ^= 1 << rng.integers(8)
        damages.append(bytes(damaged))
    for content in damages:
        path.write_bytes(content)
        assert kept.get({"row": "a"}) is None
        assert "damaged, computed again" in capsys.readouterr().err
    np.testing.assert_array_equal(kept.make({"row": "a"}, make)["x"], make()["x"])
    assert path.read_bytes() == sound


def test_what_others_write_into_a_data_set_changes_no_stamp(tmp_path):
    (shard,) = write_dataset(tmp_path, subjects=1, shards=1)
    before = parts.stamp_of(tmp_path)
    validate.validate(tmp_path, tmp_path / "validation", workers=1, pictures=0)
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "latents.json").write_text("{}")
    shards.rebuild_index(shard)
    assert parts.stamp_of(tmp_path) == before
    os.utime(shard, ns=(1, 1))
    assert parts.stamp_of(tmp_path) != before


def test_names_are_no_markup(tmp_path):
    name = "<img src=x onerror=alert(1)>|[a](b)"
    score = measures.Score(name, "model", {"psnr": np.ones((2, 1))})
    result = results.Result(
        "heads", "", ["a", "b"], ["45°"], None, [score], lambda s: [], lambda s: [], {}, ()
    )
    (row,) = results.table(result).splitlines()[2:]
    assert not re.search(r"(?<!\\)[<>\[]", row) and row.count("|") - row.count("\\|") == 3


def test_changed_weights_have_another_hash(model, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "a").write_bytes(b"1")
    first = parts.hash_of(copy)
    (copy / "a").write_bytes(b"2")
    assert len({first, parts.hash_of(copy), parts.hash_of(model)}) == 3


def test_an_edited_card_changes_no_hash(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / checkpoints.CARD).write_text("license: mit")
    assert parts.hash_of(copy) == parts.hash_of(model)
    (copy / checkpoints.CARD).unlink()
    assert parts.hash_of(copy) == parts.hash_of(model)


@pytest.mark.parametrize(
    "items", [["runs/a/model", "runs/b/model"], ["x=a", "x=b"], ["a", "a: its autoencoder=b"],
              ["mean training head=a"]],
)  # fmt: skip
def test_rows_of_one_name_are_refused(heads, capsys, items):
    checkpoints = [part for item in items for part in ("--checkpoint", item)]
    assert evaluate.main([*checkpoints, "--data", str(heads)]) == 2
    assert "name each model: NAME=DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sweep", "message"),
    [("steps=1.5", "'1.5' is not a int"), ("anchors=no", "'no' is not a bool"),
     ("step=1", "settings are steps"), ("sampler=ddim", "sampler must be one of")],
)  # fmt: skip
def test_bad_sweeps_are_named(heads, model, tmp_path, capsys, sweep, message):
    arguments = ["--checkpoint", str(model), "--data", str(heads), "--subjects", "1"]
    assert evaluate.main([*arguments, "--sweep", sweep, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_errors_name_the_folder(heads, tmp_path, capsys):
    arguments = ["--checkpoint", str(tmp_path / "none"), "--data", str(heads)]
    assert evaluate.main([*arguments, "--subjects", "3"]) == 1
    assert "2 held-out subjects" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--subjects", "2", "--out", str(tmp_path / "o")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


class Turned:
    """In place of sampling: what is true of the first held-out head when its input stands at `yaw`."""

    def __init__(self, heads, monkeypatch):
        self.source, self.yaws = HeldOut(heads), iter(protocol.TURNED)
        monkeypatch.setattr(protocol.sampling, "spin", self.spin)

    def spin(self, pipeline, variant, images, id_embeddings, trajectory, seeds):
        yaw = next(self.yaws)
        views = protocol.load_views(self.source, [0], trajectory + [yaw, 0.0])
        # The whole head was turned before the camera, instead of the camera around the head.
        turn = cameras.orbit(yaw)[:3, :3]
        return measures.Views(
            views.images, np.einsum("ij,snhwj->snhwi", turn, views.normals), views.mask
        )


def test_inputs_that_are_turned_are_judged_in_their_own_frame(heads, model, tmp_path, monkeypatch):
    arguments = ["--checkpoint", str(model), "--data", str(heads), "--out", str(tmp_path)]
    skip = [f"--skip={name}" for name in sorted(measures.AROUND)]
    run = protocol._Heads(evaluate.parse_arguments([*arguments, "--subjects", "1", *skip]))
    Turned(heads, monkeypatch)
    score = run.turned(run.candidates[0])
    assert score.values["psnr"].min() > 100.0 and score.values["normals"].max() < 0.1


def test_hair_behind_is_its_mean_colour():
    true = np.full((2, 1, 64, 64, 3), -1.0)
    true[:, :, 20:32, 26:38] = [0.2, -0.4, -0.6]
    made = np.roll(true, 1, axis=3)
    made[1, :, 20:32, 27:39] = [-0.6, -0.4, 0.2]
    mask = np.ones((2, 1, 64, 64), bool)
    same, other = measures.hair_difference(
        measures.Views(made, None, mask), measures.Views(true, None, mask)
    )
    assert same < 1.0 < 10.0 < other
    none = measures.Views(true, None, ~mask)
    assert np.isnan(measures.hair_difference(measures.Views(made, None, mask), none)).all()
