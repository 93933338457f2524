"""The benchmark of the loader measures images and latents."""

import json

import pytest

from benchmarks import loader
from tests.support.random_latents import write_random_latents
from tests.support.synthetic_shards import SIZE, write_dataset


def test_images_and_latents_are_measured(tmp_path):
    write_dataset(tmp_path / "data", subjects=4, views=16, shards=2)
    write_random_latents(tmp_path / "data", "train", tmp_path / "latents", backgrounds=2)
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "result.json")]
    arguments += ["--latents", str(tmp_path / "latents")]
    arguments += ["--batches", "2", "--rounds", "1", "--step-seconds", "0.1"]
    assert loader.main(arguments) == 0
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert set(results) == {"images", "cached latents"}
    for found in results.values():
        needed = 10 / found["examples_per_core_second"]
        assert found["cores_per_accelerator"] == pytest.approx(needed)
    moments = 8 * 2 * (SIZE // 8) ** 2 * 8 * 2  # views, image and normals, float16
    assert results["cached latents"]["bytes_used_per_example"] == moments


def test_bad_input_is_one_error(tmp_path, capsys):
    assert loader.main(["--data", str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        loader.main(["--data", str(tmp_path), "--batches", "0"])
