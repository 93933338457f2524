"""The benchmark of the loader measures images and latents, and leaves nothing behind."""

import json

import numpy as np
import pytest

from benchmarks import loader
from spinmeround_jax.data import latent_files
from spinmeround_jax.data.subjects import SubjectSource
from tests.support.synthetic_shards import SIZE, write_dataset


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "data", subjects=4, views=16, shards=2)
    return tmp_path


def test_images_and_latents_are_measured(folder):
    (folder / "temporary").mkdir()
    arguments = ["--data", str(folder / "data"), "--out", str(folder / "result.json")]
    arguments += ["--temporary", str(folder / "temporary"), "--random-latents"]
    arguments += ["--batches", "2", "--rounds", "1", "--step-seconds", "0.1"]
    assert loader.main(arguments) == 0
    results = json.loads((folder / "result.json").read_text())["results"]
    assert set(results) == {"images", "cached latents"}
    for found in results.values():
        needed = 10 / found["examples_per_core_second"]
        assert found["cores_per_accelerator"] == pytest.approx(needed)
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


def test_bad_input_is_one_error(tmp_path, capsys):
    assert loader.main(["--data", str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        loader.main(["--data", str(tmp_path), "--batches", "0"])
