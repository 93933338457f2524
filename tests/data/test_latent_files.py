"""Latents in a bucket are those of the local files; what is cut is named."""

import dataclasses

import numpy as np
import pytest

from spinmeround_jax.data import latent_files, shards
from spinmeround_jax.data.subjects import SubjectSource
from spinmeround_jax.files import InputError, as_path
from tests.support.full_disk import full_disk
from tests.support.random_latents import write_random_latents
from tests.support.synthetic_shards import write_dataset


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "data", subjects=4, views=8, shards=2)
    write_random_latents(tmp_path / "data", "train", tmp_path / "latents", backgrounds=1)
    return tmp_path


def read(directory, indexes, background=1):
    source = latent_files.LatentSource(directory, indexes)
    moments = np.full((3, 2, *source.description.moments_shape[2:]), np.nan, np.float32)
    identity = source.read(indexes[1], 1, [6, 0, 3], background, moments)
    return moments, identity


def test_blocks_are_those_of_the_array(folder):
    indexes = SubjectSource(folder / "data", "train").indexes
    for background in (0, 1):
        moments, _ = read(folder / "latents", indexes, background)
        stored = np.load(latent_files.paths(folder / "latents", indexes[1].path)[0])
        np.testing.assert_array_equal(moments[:, 0], stored[1, [6, 0, 3], 1 + background])
        np.testing.assert_array_equal(moments[:, 1], stored[1, [6, 0, 3], latent_files.NORMALS])


def test_a_bucket_gives_the_same(folder):
    pytest.importorskip("upath")
    import fsspec

    indexes = SubjectSource(folder / "data", "train").indexes
    remote = as_path("memory://latents/of")
    try:
        write_random_latents(folder / "data", "train", remote, backgrounds=1)
        for want, got in zip(read(folder / "latents", indexes), read(remote, indexes), strict=True):
            np.testing.assert_array_equal(got, want)
        for index in indexes:
            assert latent_files.is_complete(remote, index.path)
    finally:
        fsspec.filesystem("memory").rm("/latents", recursive=True)


def test_a_file_cut_after_it_was_opened_is_named(folder):
    indexes = SubjectSource(folder / "data", "train").indexes
    source = latent_files.LatentSource(folder / "latents", indexes)
    path = latent_files.paths(folder / "latents", indexes[1].path)[0]
    path.write_bytes(path.read_bytes()[:500])
    moments = np.empty((1, 2, *source.description.moments_shape[2:]), np.float32)
    with pytest.raises(InputError, match=rf"{path.name}: became shorter"):
        source.read(indexes[1], 1, [6], 1, moments)


def test_latents_of_a_shard_that_was_written_again_are_refused(folder):
    """Same names, subjects, views and cameras, other pixels."""
    before = read(folder / "latents", SubjectSource(folder / "data", "train").indexes)
    write_dataset(folder / "data", subjects=4, views=8, shards=2)
    again = read(folder / "latents", SubjectSource(folder / "data", "train").indexes)
    np.testing.assert_array_equal(again[0], before[0])  # the same bytes: still these latents
    indexes = SubjectSource(folder / "data", "train").indexes
    with shards.ShardWriter(indexes[1].path) as writer:
        for row in range(len(indexes[1].subjects)):
            views = indexes[1].read_views(row, range(8))
            views = [dataclasses.replace(view, image=views[0].image) for view in views]
            writer.write_subject(views)
    with pytest.raises(InputError, match="encoded from another shard"):
        read(folder / "latents", SubjectSource(folder / "data", "train").indexes)


def test_no_flipped_bit_is_used(folder):
    indexes = SubjectSource(folder / "data", "train").indexes
    sound = read(folder / "latents", indexes)
    rng = np.random.default_rng(0)
    for path in latent_files.paths(folder / "latents", indexes[1].path):
        before = path.read_bytes()
        for _ in range(20):
            damaged = bytearray(before)
            damaged[rng.integers(len(before))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            try:
                found = read(folder / "latents", indexes)
            except InputError as error:
                assert path.name in str(error) or "moments.npy" in str(error)
            else:  # of another subject, or in what nobody reads
                for want, got in zip(sound, found, strict=True):
                    np.testing.assert_array_equal(got, want)
        path.write_bytes(before)


def test_a_flipped_bit_of_a_view_is_named(folder):
    indexes = SubjectSource(folder / "data", "train").indexes
    path = latent_files.paths(folder / "latents", indexes[1].path)[0]
    stored = np.load(path, mmap_mode="r+")
    stored[1, 3, latent_files.NORMALS, 0, 0, 0] += 1
    stored.flush()
    with pytest.raises(InputError, match=r"moments.npy: wrong checksum at \[1, 3, 0\]; delete"):
        read(folder / "latents", indexes)


def test_latents_without_checksums_still_open(folder):
    indexes = SubjectSource(folder / "data", "train").indexes
    sound = read(folder / "latents", indexes)
    for index in indexes:
        path = latent_files.paths(folder / "latents", index.path)[1]
        arrays = dict(np.load(path))
        del arrays["crc32"]
        np.savez(path, **arrays)
    for want, got in zip(sound, read(folder / "latents", indexes), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_full_disk_is_an_error_and_no_bus_error(folder):
    with pytest.raises(OSError, match=r"moments\.npy"), full_disk(600):
        write_random_latents(folder / "data", "train", folder / "more", backgrounds=1)
    assert {path.name for path in (folder / "more").iterdir()} == {"latents.json"}
