"""The loader's benchmark runs, counts what it says it counts, and leaves nothing behind."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import loader
from spinmeround_jax.data import latent_files, records
from spinmeround_jax.data import loader as data_loader
from spinmeround_jax.data.subjects import SubjectSource
from tests.support.synthetic_shards import SIZE, write_dataset


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "decode_view", records.decode_view)  # wrapped to be timed
    monkeypatch.setattr(data_loader, "composite_into", data_loader.composite_into)
    write_dataset(tmp_path / "data", subjects=4, views=16, shards=2)
    return tmp_path


def test_the_table_has_a_row_for_each_case(folder, capsys):
    (folder / "temporary").mkdir()
    arguments = ["--data", str(folder / "data"), "--out", str(folder / "result.json")]
    arguments += ["--temporary", str(folder / "temporary"), "--random-latents"]
    arguments += ["--batches", "2", "--rounds", "1", "--small-shards", "2", "--step-seconds", "0.1"]
    assert loader.main(arguments) == 0
    results = json.loads((folder / "result.json").read_text())["results"]
    ours = ["pictures", "pictures, one subject per shard", "cached latents"]
    assert set(ours) <= set(results)
    assert len(results) == 3 + bool(importlib.util.find_spec("tensorflow"))
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in results)
    for told in results.values():
        assert told["examples_per_core_second"] > 0
        needed = 10 / told["examples_per_core_second"]
        assert told["cores_per_accelerator"] == pytest.approx(needed, rel=0.05)
    assert 0 < results["pictures"]["decoding_share"] < 1
    assert results["cached latents"]["decoding_share"] is None
    moments = 8 * 2 * (SIZE // 8) ** 2 * 8 * 2  # views, image and normals, float16
    assert results["cached latents"]["bytes_used_per_example"] == moments
    assert not list((folder / "temporary").iterdir())


def test_random_latents_are_latents_of_the_data(folder):
    out = folder / "latents"
    loader.write_random_latents(folder / "data", "train", out, backgrounds=2)
    source = SubjectSource(folder / "data", "train")
    latents = latent_files.LatentSource(out, source.indexes)
    moments = np.zeros((3, 2, SIZE // 8, SIZE // 8, 8), np.float32)
    latents.read(source.indexes[1], 1, [4, 0, 7], 2, moments)
    assert (moments != 0).any(axis=(2, 3, 4)).all()


def test_what_cannot_be_measured_is_one_error(tmp_path, capsys):
    assert loader.main(["--data", str(tmp_path)]) == 1
    assert "manifest.json: no such file" in capsys.readouterr().err
    assert loader.main(["--data", str(tmp_path), "--batches", "0"]) == 2
