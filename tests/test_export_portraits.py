"""Portraits taken out of a rendered set are what `sample` reads."""

import numpy as np
import pytest
import synthetic_shards

from data_prep import export_portraits
from spinmeround_jax import portraits
from spinmeround_jax.data import HeldOut


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


@pytest.mark.parametrize("split, number", [("held_out", "2"), ("nobody", "0")])
def test_what_is_not_there_is_named(tmp_path, split, number):
    data = synthetic_shards.write_rings(tmp_path / "heads")
    with pytest.raises(SystemExit, match=split):
        export_portraits.main(
            ["--data", str(data), "--split", split, "--subjects", number]
            + ["--out", str(tmp_path / "out")]
        )
