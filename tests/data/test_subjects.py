"""Subjects come out of the shards as they went in, and are laid on the right colours."""

import dataclasses

import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.data.manifest import provenance_of, read_manifest, write_manifest
from spinmeround_jax.data.shards import ShardWriter, read_index
from spinmeround_jax.data.subjects import HeldOut, composite
from spinmeround_jax.files import InputError
from tests.support.synthetic_shards import (
    SIZE,
    angles,
    make_records,
    pixels,
    write_dataset,
    write_two_splits,
)

SUBJECTS, VIEWS = 6, 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_dataset(folder, SUBJECTS, VIEWS)
    return folder


def test_compositing_is_exact_where_it_can_be():
    rgba = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 4), np.uint8)
    rgba[0, ..., 3], rgba[1, ..., 3] = 0, 255
    colour = np.array([0.2, 0.5, 1.0])
    images, alpha = composite(rgba, colour)
    assert images.dtype == alpha.dtype == np.float32
    assert abs(images).max() <= 1.0
    np.testing.assert_array_equal(
        images[0], np.broadcast_to(colour * 2 - 1, (4, 4, 3)).astype("f4")
    )
    np.testing.assert_allclose(images[1], rgba[1, ..., :3] / 127.5 - 1, atol=3e-7, rtol=0)
    a = rgba[..., 3:] / 255
    want = 2 * (rgba[..., :3] / 255 * a + colour * (1 - a)) - 1
    np.testing.assert_allclose(images, want, atol=5e-7, rtol=0)
    white, _ = composite(rgba[:1], np.ones(3))
    assert (white == 1.0).all()


def test_splits_may_have_different_numbers_of_views(tmp_path):
    write_two_splits(tmp_path, 4, 8)
    for split, views in (("train", 4), ("held_out", 8)):
        subjects = HeldOut(tmp_path, split)
        assert subjects.source.views == views and subjects.load(2).images.shape[0] == views
    manifest = read_manifest(tmp_path)
    write_manifest(tmp_path, {**manifest, "split_views": {"held_out": 4}})
    with pytest.raises(InputError, match=r"holds .* \(3, 8\), manifest.json says \(3, 4\)"):
        HeldOut(tmp_path, "held_out")


def test_an_unknown_identity_is_zero(tmp_path):
    nobody = [
        dataclasses.replace(record, id_embedding=np.zeros(512, np.float32))
        for record in make_records(0, 2)
    ]
    path = tmp_path / "train-00000-of-00001.tfrecord"
    with ShardWriter(path) as writer:
        writer.write_subject(nobody)
    (record,) = read_index(path).read_views(0, [1])
    assert not record.id_embedding.any()


def test_held_out_subjects_come_whole(directory):
    held_out = HeldOut(directory, "train")
    assert len(held_out) == SUBJECTS
    yaw, pitch = angles(VIEWS)
    for i in (0, 4, -1):
        subject = held_out.load(i)
        number = i % SUBJECTS
        assert subject.subject == f"person-{number}"
        assert subject.images.shape == subject.normals.shape == (VIEWS, SIZE, SIZE, 3)
        np.testing.assert_allclose(subject.yaw, yaw)
        apart = (held_out.angles(i) - np.stack([yaw, pitch], -1) + 180) % 360 - 180
        np.testing.assert_allclose(apart, 0, atol=1e-4)
        np.testing.assert_allclose(subject.pitch, pitch)
        np.testing.assert_array_equal(subject.world_to_camera, cameras.orbit(yaw, pitch))
        for view in range(VIEWS):
            alpha = pixels(number, view)[..., 3] / 255.0
            np.testing.assert_allclose(subject.alpha[view], alpha, atol=1e-6)
            white = pixels(number, view)[..., :3] / 255.0 * alpha[..., None] + 1 - alpha[..., None]
            np.testing.assert_allclose(subject.images[view], white * 2 - 1, atol=2e-6, rtol=0)
    with pytest.raises(IndexError):
        held_out.load(SUBJECTS)


def test_held_out_views_can_be_chosen(directory):
    held_out = HeldOut(directory, "train")
    whole, some = held_out.load(2), held_out.load(2, [5, 0])
    np.testing.assert_array_equal(some.images, whole.images[[5, 0]])
    np.testing.assert_array_equal(some.normals, whole.normals[[5, 0]])
    np.testing.assert_array_equal(some.yaw, whole.yaw[[5, 0]])
    with pytest.raises(IndexError):
        held_out.load(2, [8])


def test_weights_record_what_photos_need():
    """Recogniser and framing of the data, under the names by which `sample` looks for them."""
    recogniser = {"name": "dlib-resnet", "sha256": "0" * 64}
    told = provenance_of({"seed": 3, "identity": recogniser, "framing": "close"})
    assert told == {"data": {"seed": 3}, "recogniser": recogniser, "framing": "close"}
    assert provenance_of({})["framing"] == "canonical"
