"""The evaluation command on a small rendered set whose views can be told apart."""

import dataclasses
import json

import numpy as np
import pytest
import synthetic_shards
from tiny_model import random_model

from spinmeround_jax import cameras, checkpoints, data, evaluate
from spinmeround_jax.pipeline import RELEASED

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    return synthetic_shards.write_rings(tmp_path_factory.mktemp("data") / "heads")


def test_views_are_found_by_angle_also_across_180(heads):
    source = data.HeldOut(heads)
    found = evaluate.find_views(source, 0, np.array([[180, 0], [-180, 0], [-7.5, 0]]))
    assert found == [24, 24, 47]
    with pytest.raises(ValueError, match="no view at yaw 10, pitch 0"):
        evaluate.find_views(source, 0, np.array([[10, 0]]))


def test_baselines_are_the_mean_and_the_nearest_training_head(heads):
    train = data.HeldOut(heads, "train")
    angles = cameras.anchors()
    portrait = train.load(1, [0]).images  # its own nearest neighbour
    mean, nearest, chosen = evaluate.baselines(train, portrait, angles)
    assert chosen.tolist() == [1]
    views = evaluate.find_views(train, 0, angles)
    np.testing.assert_array_equal(nearest.images[0], train.load(1, views).images)
    everyone = np.mean([train.load(i, views).images for i in range(3)], axis=0)
    np.testing.assert_allclose(mean.images[0], everyone, atol=1e-6)


def test_neighbour_difference_of_a_closed_ring():
    ring = np.zeros((1, 4, 2, 2, 3))
    ring[:, 1] = 1.0  # two of the four steps change by 1
    np.testing.assert_allclose(evaluate.neighbour_difference(ring), [0.5])


def test_command_writes_table_scores_and_pictures(heads, tmp_path, monkeypatch, capsys):
    # LPIPS needs larger pictures than this test's; it has its own test.
    monkeypatch.setattr(evaluate, "perceptual", lambda a, b: np.mean(abs(a - b), axis=(2, 3, 4)))
    sampling = dataclasses.replace(RELEASED, steps=2, sigma_max=5.0, normals_steps=1)
    checkpoints.save_model(
        tmp_path / "model", random_model(), {"sampling": dataclasses.asdict(sampling)}
    )
    out = tmp_path / "out"
    code = evaluate.main(
        ["--checkpoint", f"tiny={tmp_path / 'model'}", "--data", str(heads), "--out", str(out)]
        + ["--subjects", "2"]
    )
    assert code == 0
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| tiny |" in table and "| tiny: its autoencoder |" in table
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert len(scores["tiny"]["psnr"]) == 2 and len(scores["tiny"]["consistency"]) == 2
    assert np.isfinite(scores["tiny"]["psnr"]).all()
    assert {path.name for path in out.glob("*.png")} == {"worst.png", "median.png", "best.png"}


@pytest.mark.parametrize(
    "items", [["runs/a/model", "runs/b/model"], ["x=a", "x=b"], ["a", "a: its autoencoder=b"],
              ["mean training head=a"]],
)  # fmt: skip
def test_rows_of_one_name_are_refused(heads, capsys, items):
    checkpoints = [part for item in items for part in ("--checkpoint", item)]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*checkpoints, "--data", str(heads)])
    assert stopped.value.code == 2
    assert "name each model: NAME=DIR" in capsys.readouterr().err


def test_errors_name_the_folder(heads, tmp_path, capsys):
    arguments = ["--checkpoint", str(tmp_path / "none"), "--data", str(heads)]
    assert evaluate.main([*arguments, "--subjects", "3"]) == 1
    assert "2 held-out subjects" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--subjects", "2", "--out", str(tmp_path / "o")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
