"""The TFDS builder and the TensorFlow reader see what our own reader sees; skipped without TensorFlow."""

import dataclasses

import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.manifest import read_manifest, write_manifest
from tests.support.synthetic_shards import SIZE, ball, make_records, write_dataset

tfds = pytest.importorskip("tensorflow_datasets")
from data_prep import tf_records, tfds_heads  # noqa: E402
from spinmeround_jax.files import InputError  # noqa: E402


def load(folder, **options):
    return tfds.load("spinmeround_heads", data_dir=str(folder), **options)


def assert_same_pictures(example, record, size):
    """Decoded by TensorFlow, and by us."""
    rgba, normals = records.decode_view(record, size, "here")
    np.testing.assert_array_equal(example["image"], rgba)
    decode = tf_records.normals_decoder(example["normals"].shape[2])
    got = decode(example["normals"], rgba[..., 3], example["world_to_camera"]).numpy()
    np.testing.assert_allclose(got, normals, atol=1e-6)


def test_every_view_comes_as_it_was_written(tmp_path):
    paths = write_dataset(tmp_path, subjects=3, views=4)
    before = sorted(tmp_path.iterdir())
    builder = tfds.builder("spinmeround_heads", data_dir=str(tmp_path))
    assert builder.info.splits["train"].num_examples == 12
    assert builder.info.splits["train"].num_shards == 2
    assert "CC0-1.0" in builder.info.description
    examples = {
        (example["subject"].decode(), int(example["view"])): example
        for example in tfds.as_numpy(load(tmp_path, split="train"))
    }
    assert len(examples) == 12
    for path in paths:
        index = shards.read_index(path)
        for row, subject in enumerate(index.subjects):
            for record in index.read_views(row, range(4)):
                example = examples[subject, record.view]
                assert_same_pictures(example, record, SIZE)
                np.testing.assert_array_equal(example["world_to_camera"], record.world_to_camera)
                np.testing.assert_array_equal(example["id_embedding"], record.id_embedding)
                assert (example["yaw"], example["pitch"]) == (record.yaw, record.pitch)
                assert example["license"] == b"CC0-1.0"
    assert sorted(tmp_path.iterdir()) == before  # nothing was written


def test_slices_and_shuffling_are_those_of_tfds(tmp_path):
    write_dataset(tmp_path, subjects=4, views=2)
    some = load(tmp_path, split="train[25%:75%]")
    assert len(list(some)) == 4
    shuffled = load(tmp_path, split="train", shuffle_files=True)
    assert len(list(shuffled)) == 8


def test_compact_pictures(tmp_path):
    record = make_records(0, 1)[0]
    pose = cameras.orbit(record.yaw, record.pitch)
    encoded = records.encode_view(*ball(256, pose), pose)
    with shards.ShardWriter(tmp_path / "train-00000-of-00001.tfrecord") as writer:
        writer.write_subject([dataclasses.replace(record, **encoded)])
    write_manifest(
        tmp_path,
        {
            "image_size": 256,
            "views": 1,
            "seed": 0,
            "source": "test",
            "license": "CC0-1.0",
            "splits": {
                "train": [{"file": "train-00000-of-00001.tfrecord", "subjects": 1}],
                "held_out": [],
            },
        },
    )
    (example,) = tfds.as_numpy(load(tmp_path, split="train"))
    assert example["normals"].shape == (256, 256, 4)
    (stored,) = shards.read_index(tmp_path / "train-00000-of-00001.tfrecord").read_views(0, [0])
    assert_same_pictures(example, stored, 256)


def test_folders_that_are_no_data_set_are_one_clear_error(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        load(tmp_path, split="train")
    write_dataset(tmp_path, subjects=4)
    manifest = read_manifest(tmp_path)
    splits = {"train": manifest["splits"]["train"][1:]}
    write_manifest(tmp_path, {**manifest, "splits": splits})
    with pytest.raises(InputError, match="where TFDS expects"):
        tfds_heads.SpinmeroundHeads(data_dir=tmp_path)
