"""Portraits taken out of a rendered set are what `sample` reads."""

import json

import numpy as np
import pytest

from data_prep import export_portraits
from spinmeround_jax import evaluate
from spinmeround_jax.data.subjects import HeldOut
from spinmeround_jax.evaluation import parts
from spinmeround_jax.files import as_path, is_local
from spinmeround_jax.photo import portraits
from tests.support import synthetic_shards


def test_exported_portrait_is_read_with_identity_and_truth(tmp_path):
    data = synthetic_shards.write_rings(tmp_path / "heads")
    arguments = ["--data", str(data), "--subjects", "1", "--out", str(tmp_path / "out")]
    export_portraits.main(arguments)
    subject = HeldOut(data).load(1)
    (path,) = portraits.find([tmp_path / "out"])
    portrait = portraits.read(path, synthetic_shards.SIZE)
    np.testing.assert_allclose(portrait.image, subject.images[0], atol=1e-2)
    np.testing.assert_allclose(portrait.id_embedding, subject.id_embedding, atol=1e-5)
    yaws = [0, 45, 90, 135, 180, -135, -90, -45]
    np.testing.assert_array_equal(portrait.truth.angles[:, 0], yaws)
    np.testing.assert_allclose(portrait.truth.images[2] / 127.5 - 1, subject.images[12], atol=1e-2)


def test_the_recogniser_of_the_identities_is_told(tmp_path):
    data, out = synthetic_shards.write_rings(tmp_path / "heads"), tmp_path / "out"
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["identity"] = {"name": "a recogniser", "sha256": "7" * 64}
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert export_portraits.main(["--data", str(data), "--subjects", "1", "--out", str(out)]) == 0
    (path,) = portraits.find([out])
    assert portraits.read_recognition(path) == "7" * 64


def test_another_picture_of_that_name_stays(tmp_path, capsys):
    data, out = synthetic_shards.write_rings(tmp_path / "heads"), tmp_path / "out"
    arguments = ["--data", str(data), "--subjects", "1", "--out", str(out)]
    assert export_portraits.main(arguments) == export_portraits.main(arguments) == 0
    (path,) = portraits.find([out])
    path.write_bytes(b"mine")
    assert export_portraits.main(arguments) == 1
    assert f"{path}: another image" in capsys.readouterr().err and path.read_bytes() == b"mine"


@pytest.mark.parametrize("split, number", [("held_out", "2"), ("nobody", "0")])
def test_what_is_not_there_is_named(tmp_path, capsys, split, number):
    data = synthetic_shards.write_rings(tmp_path / "heads")
    arguments = ["--data", str(data), "--split", split, "--subjects", number]
    assert export_portraits.main([*arguments, "--out", str(tmp_path / "out")]) in (1, 2)
    assert split in capsys.readouterr().err


def test_data_in_a_bucket_is_read_from_there(tmp_path):
    pytest.importorskip("upath")
    data = synthetic_shards.write_rings(tmp_path / "heads")
    bucket = as_path("memory://portraits/heads")
    for file in data.iterdir():
        (bucket / file.name).write_bytes(file.read_bytes())
    for folder in (data, bucket):
        out = tmp_path / f"out-{is_local(folder)}"
        arguments = ["--data", str(folder), "--subjects", "0", "--out", str(out)]
        export_portraits.main(arguments)
    local, remote = (sorted((tmp_path / f"out-{kind}").iterdir()) for kind in (True, False))
    assert [file.read_bytes() for file in local] == [file.read_bytes() for file in remote]
    assert len(local) == 3

    # Evaluation tells whether what it kept was made of the same data.
    args = evaluate.parse_arguments(["--checkpoint", "model", "--data", str(bucket)])
    assert json.loads(json.dumps(evaluate.as_json(args)))["data"] == str(bucket)
    stamp = parts.stamp_of(args.data)
    assert stamp == parts.stamp_of(bucket)
    (bucket / "manifest.json").write_bytes((data / "manifest.json").read_bytes())
    assert stamp != parts.stamp_of(bucket)
