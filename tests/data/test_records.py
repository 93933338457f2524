import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
import zlib

import grain
import numpy as np
import pytest
from PIL import Image

from data_prep import validate
from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards, tfrecord
from spinmeround_jax.data.manifest import read_manifest, write_manifest
from spinmeround_jax.data.subjects import HeldOut, SubjectSource
from spinmeround_jax.files import InputError, as_path
from tests.support.synthetic_shards import (
    SIZE,
    ball,
    make_records,
    pixels,
    unit_normals,
    write_dataset,
)

# What TensorFlow's own tutorial prints for {feature0: False, feature1: 4, feature2: b"goat",
# feature3: 0.9876}, https://www.tensorflow.org/tutorials/load_data/tfrecord (keys sorted).
GOAT = (
    b"\nR\n\x11\n\x08feature0\x12\x05\x1a\x03\n\x01\x00\n\x11\n\x08feature1\x12\x05\x1a\x03\n\x01\x04"
    b"\n\x14\n\x08feature2\x12\x08\n\x06\n\x04goat\n\x14\n\x08feature3\x12\x08\x12\x06\n\x04[\xd3|?"
)
# Every TensorBoard event file starts so: a record of 24 bytes, then its checksum of the length.
EVENT_FILE_START = bytes.fromhex("18 00 00 00 00 00 00 00 a3 7f 4b 22")


def crc32c(data: bytes) -> int:
    """Bit by bit from the Castagnoli polynomial (RFC 3720), sharing nothing with the library."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) & 0xFFFFFFFF


def framed(data: bytes, length: int | None = None) -> bytes:
    header = struct.pack("<Q", len(data) if length is None else length)
    return (
        header
        + struct.pack("<I", masked(crc32c(header)))
        + data
        + struct.pack("<I", masked(crc32c(data)))
    )


def example_with(**changes) -> bytes:
    """A valid record's Example, with fields removed (None) or replaced (("kind", values))."""
    record = make_records(0, 1)[0]
    example = tfrecord.example_class().FromString(records.serialize(record))
    for name, change in changes.items():
        del example.features.feature[name]
        if change is not None:
            kind, values = change
            getattr(example.features.feature[name], kind).value.extend(values)
    return example.SerializeToString()


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "train-00000-of-00001.tfrecord"
    with shards.ShardWriter(path) as writer:
        for subject in (3, 4):
            writer.write_subject(make_records(subject, 5))
    return path


# --------------------------------------------------------------------------------------------------
# The format is TensorFlow's


def test_framing_matches_an_independent_crc_and_known_bytes():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert EVENT_FILE_START == framed(b"\0" * 24)[:12]
    for content in (b"", b"x", bytes(range(256)) * 3):
        assert tfrecord.frame(content) == framed(content)


def test_example_message_is_that_of_tensorflow():
    example = tfrecord.example_class().FromString(GOAT)
    feature = example.features.feature
    assert feature["feature0"].int64_list.value == [0]
    assert feature["feature1"].int64_list.value == [4]
    assert feature["feature2"].bytes_list.value == [b"goat"]
    assert feature["feature3"].float_list.value[0] == np.float32(0.9876)
    assert example.SerializeToString(deterministic=True) == GOAT


def test_grain_reads_our_shards(shard):
    read = list(grain.experimental.TFRecordIterDataset(str(shard)))
    assert len(read) == 10
    features = tfrecord.example_class().FromString(read[7]).features.feature
    assert features["subject"].bytes_list.value == [b"person-4"]
    assert features["view"].int64_list.value == [2]
    assert features["schema_version"].int64_list.value == [1]


# --------------------------------------------------------------------------------------------------
# Round trip


def test_records_come_back_as_written(shard):
    index = shards.read_index(shard)
    assert index.subjects.tolist() == ["person-3", "person-4"]
    assert index.offsets.shape == index.lengths.shape == (2, 5)
    for row, subject in enumerate((3, 4)):
        whole = index.read_views(row, range(5))
        for view, (written, read) in enumerate(zip(make_records(subject, 5), whole, strict=True)):
            for field in dataclasses.fields(records.ViewRecord):
                want, got = getattr(written, field.name), getattr(read, field.name)
                assert type(want) is type(got), field.name
                np.testing.assert_array_equal(want, got, err_msg=field.name)
            np.testing.assert_array_equal(index.world_to_camera[row, view], read.world_to_camera)
    views = [record.view for record in index.read_views(1, [4, 0, 2])]
    assert views == [4, 0, 2]


def test_writing_is_reproducible(shard, tmp_path):
    again = tmp_path / "again.tfrecord"
    with shards.ShardWriter(again) as writer:
        for subject in (3, 4):
            writer.write_subject(make_records(subject, 5))
    assert again.read_bytes() == shard.read_bytes()


def test_pixels_survive_encoding():
    image = pixels(2, 3)
    np.testing.assert_array_equal(
        records.decode_image(records.encode_image(image), SIZE, "here"), image
    )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, exact=True)
    np.testing.assert_array_equal(records.decode_image(buffer.getvalue(), SIZE, "here"), image)


def test_normals_keep_background_and_length():
    normals = unit_normals(1)
    encoded = records.encode_normals(normals)
    stored = np.array(Image.open(io.BytesIO(encoded)))
    assert (stored[:, 0] == 128).all()  # mid-grey, as the format promises
    assert abs(stored / 255.0 - (normals + 1) / 2).max() < 1.5 / 255  # close to the paper's
    decoded = records.decode_normals(encoded, SIZE, "here")
    assert decoded.dtype == np.float32 and (decoded[:, 0] == 0.0).all()
    assert np.linalg.norm(decoded, axis=-1).max() <= 1 + 1e-6
    assert abs(decoded - normals).max() < 0.6 / 127 + 0.01
    axes = np.eye(3)[None].repeat(3, 0)
    np.testing.assert_array_equal(
        records.decode_normals(records.encode_normals(-axes), 3, "here"), -axes
    )


@pytest.mark.parametrize(
    "bad", [np.full((4, 4, 3), np.nan), np.full((4, 4, 3), 1.5), np.zeros((4, 4))]
)
def test_bad_normals_are_refused(bad):
    with pytest.raises(ValueError, match="normals"):
        records.encode_normals(bad)


# --------------------------------------------------------------------------------------------------
# Compact pictures


def stored_as(pictures: dict[str, bytes], pose: np.ndarray) -> records.ViewRecord:
    return dataclasses.replace(make_records(0, 1)[0], **pictures, world_to_camera=pose)


def degrees_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@pytest.mark.parametrize("angles", [(0, 0), (140, 30), (-95, -20)])
def test_compact_pictures_are_small_and_close(angles):
    pose = cameras.orbit(*angles)
    rgba, normals = ball(256, pose)
    encoded = records.encode_view(rgba, normals, pose)
    lossless = len(records.encode_image(rgba)) + len(records.encode_normals(normals))
    assert len(encoded["image"]) + len(encoded["normals"]) < lossless / 2
    found, decoded = records.decode_view(stored_as(encoded, pose), 256, "here")

    alpha = rgba[..., 3]
    np.testing.assert_array_equal(found[..., 3], alpha)  # edges are exact
    weight = alpha[..., None] / 255.0
    for background in (0.0, 255.0):
        on_it = [p[..., :3] * weight + background * (1 - weight) for p in (rgba, found)]
        assert 10 * np.log10(255**2 / np.mean((on_it[0] - on_it[1]) ** 2)) > 40

    assert decoded.dtype == np.float32 and (decoded[alpha == 0] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=-1), alpha / 255.0, atol=1e-6)
    error = degrees_between(decoded[alpha > 0], normals[alpha > 0])
    assert error.mean() < 1.0 and error.max() < 2.5


def test_no_direction_is_off_by_more_than_the_steps_allow():
    rng = np.random.default_rng(0)
    normals = rng.standard_normal((256, 256, 3))
    pose = cameras.orbit(33.0, -12.0)
    facing = normals @ pose[:3, :3].T
    normals[facing[..., 2] < -0.5 * np.linalg.norm(facing, axis=-1)] *= -1  # up to 120 degrees away
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    rgba = np.full((256, 256, 4), 255, np.uint8)
    rgba[0, 0] = normals[0, 0] = 0
    encoded = records.encode_view(rgba, normals, pose)
    _, decoded = records.decode_view(stored_as(encoded, pose), 256, "here")
    error = degrees_between(decoded[1:], normals[1:])
    # Half a step each way is 1.74 degrees, stretched by 1 / cos(angle / 2) away from the viewer.
    assert error.mean() < 1.02 and error.max() < 1.74 / 0.5
    assert (decoded[0, 0] == 0).all()


def test_normals_that_are_not_known_stay_unknown():
    pose = cameras.orbit(0, 0)
    rgba, normals = ball(256, pose)
    normals[:, :128] = 0.0
    encoded = records.encode_view(rgba, normals, pose)
    _, decoded = records.decode_view(stored_as(encoded, pose), 256, "here")
    assert (decoded[:, :128] == 0).all() and (decoded[128, 129:200] != 0).any(-1).all()


def test_small_or_opaque_pictures_are_stored_without_loss():
    pose = cameras.orbit(0, 0)
    rgba, normals = ball(64, pose)
    assert records.encode_view(rgba, normals, pose) == {
        "image": records.encode_image(rgba),
        "normals": records.encode_normals(normals),
    }
    rgba = np.random.default_rng(0).integers(0, 256, (256, 256, 4), np.uint8)
    rgba[..., 3] = 255
    record = stored_as(records.encode_view(rgba, np.zeros((256, 256, 3)), pose), pose)
    found, normals = records.decode_view(record, 256, "here")
    np.testing.assert_array_equal(found, rgba)
    assert (normals == 0).all()


def test_filling_changes_only_what_is_transparent_and_leaves_no_step():
    rgba, _ = ball(96, cameras.orbit(0, 0))
    filled = records.fill_transparent(rgba)
    shown = rgba[..., 3] > 0
    np.testing.assert_array_equal(filled[shown], rgba[shown])
    np.testing.assert_array_equal(filled[..., 3], rgba[..., 3])
    step = [abs(np.diff(p[..., :3].astype(int), axis=1)).max() for p in (rgba, filled)]
    assert step[0] > 100 > 60 > step[1]
    assert records.fill_transparent(np.zeros((5, 3, 4), np.uint8)).max() == 0


def test_pictures_that_cannot_be_compact_are_refused():
    pose = cameras.orbit(0, 0)
    rgba, normals = ball(256, pose)
    for bad in (normals / 2, np.where(normals == 0, 0.5, normals)):
        with pytest.raises(ValueError, match="length of the image's alpha"):
            records.encode_view(rgba, bad, pose)
    with pytest.raises(ValueError, match="differ in size"):
        records.encode_view(rgba, normals[:128], pose)
    with pytest.raises(ValueError, match="uint8"):
        records.encode_view(rgba / 255, normals, pose)


def test_compact_records_go_through_a_shard_and_older_readers_refuse_them(tmp_path):
    path = tmp_path / "train-00000-of-00001.tfrecord"
    record = make_records(0, 1)[0]
    rgba, normals = ball(256, record.world_to_camera)
    encoded = records.encode_view(rgba, normals, record.world_to_camera)
    with shards.ShardWriter(path) as writer:
        writer.write_subject([dataclasses.replace(record, **encoded)])
    (read,) = shards.read_index(path).read_views(0, [0])
    assert (read.image, read.normals) == (encoded["image"], encoded["normals"])
    with pytest.raises(InputError, match="RGBA image of 256x256, expected RGB 256x256"):
        records.decode_normals(read.normals, 256, "here")  # what version 1 did from the start


# --------------------------------------------------------------------------------------------------
# Buckets


@pytest.fixture
def bucket():
    pytest.importorskip("upath")
    import fsspec

    yield "memory://bucket/data"
    memory = fsspec.filesystem("memory")
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


def test_a_bucket_is_written_and_read_like_a_folder(bucket, tmp_path):
    local = write_dataset(tmp_path, subjects=3)
    folder = as_path(bucket)
    for path in local:
        with shards.ShardWriter(folder / path.name) as writer:
            index = shards.read_index(path)
            for row in range(len(index.subjects)):
                writer.write_subject(index.read_views(row, range(8)))
    write_manifest(bucket, read_manifest(tmp_path))
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        p.name for p in tmp_path.iterdir() if not p.name.startswith(".")
    )
    assert read_manifest(bucket) == read_manifest(tmp_path)
    for path in local:
        assert (folder / path.name).read_bytes() == path.read_bytes()
        assert shards.is_complete(folder / path.name)
        remote = pickle.loads(pickle.dumps(shards.read_index(folder / path.name)))
        for want, got in zip(
            shards.read_index(path).read_views(0, [5, 0]), remote.read_views(0, [5, 0]), strict=True
        ):
            assert records.serialize(got) == records.serialize(want)
    subject = HeldOut(bucket, "train").load(2)
    np.testing.assert_array_equal(subject.images, HeldOut(tmp_path, "train").load(2).images)


def test_damage_in_a_bucket_is_named(bucket, tmp_path):
    (path,) = write_dataset(tmp_path, subjects=1, shards=1)
    remote = as_path(bucket) / path.name
    shards.index_path(remote).write_bytes(shards.index_path(path).read_bytes())
    content = bytearray(path.read_bytes())
    index = shards.read_index(path)
    content[index.offsets[0, 3] + 100] ^= 1
    remote.write_bytes(bytes(content))
    found = shards.read_index(remote)
    with pytest.raises(InputError, match=rf"memory://.*{path.name}: record 3 at .*checksum"):
        found.read_views(0, [2, 3])
    remote.unlink()
    with pytest.raises(InputError, match=rf"{path.name}: cannot be read"):
        found.read_views(0, [2])
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        read_manifest(bucket)


def test_a_failed_upload_leaves_nothing(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = as_path(bucket) / "train-00000-of-00001.tfrecord"
    with pytest.raises(KeyboardInterrupt), shards.ShardWriter(path) as writer:
        writer.write_subject(make_records(0, 2))
        raise KeyboardInterrupt
    assert not path.exists() and not list(tmp_path.iterdir())


def test_an_unknown_protocol_is_one_clear_error():
    pytest.importorskip("upath")
    with pytest.raises(OSError, match="nobody://bucket: cannot be reached"):
        as_path("nobody://bucket")


def test_commands_tell_of_an_unknown_protocol_as_of_wrong_usage(capsys):
    pytest.importorskip("upath")
    with pytest.raises(SystemExit, match="2"):
        validate.main(["nobody://bucket"])
    assert "argument directory: nobody://bucket: cannot be reached" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Writing: all or nothing


def test_nothing_is_left_of_a_failed_shard(tmp_path):
    path = tmp_path / "train-00000-of-00001.tfrecord"
    with pytest.raises(KeyboardInterrupt), shards.ShardWriter(path) as writer:
        writer.write_subject(make_records(0, 2))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_kill_between_index_and_shard_leaves_it_incomplete(tmp_path, monkeypatch):
    path = tmp_path / "train-00000-of-00001.tfrecord"
    replace = os.replace
    renamed = []

    def killed(source, target):
        if str(target) == str(path):
            raise OSError("killed")
        renamed.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="killed"), shards.ShardWriter(path) as writer:
        writer.write_subject(make_records(0, 2))
    assert renamed == [path.name + ".index.npz"]  # the index was there first
    assert not shards.is_complete(path)
    monkeypatch.undo()
    with shards.ShardWriter(path) as writer:  # and a resumed writer completes it
        writer.write_subject(make_records(0, 2))
    assert shards.is_complete(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, path.name + ".index.npz"]


def test_a_shard_without_its_index_is_incomplete_and_rebuilt(shard, caplog):
    want = shards.read_index(shard)
    shards.index_path(shard).unlink()
    assert not shards.is_complete(shard)
    scanned = shards.read_index(shard)
    assert "scanning" in caplog.text
    rebuilt = shards.rebuild_index(shard)
    assert shards.is_complete(shard)
    for index in (scanned, rebuilt, shards.read_index(shard)):
        for name in ("subjects", "offsets", "lengths", "world_to_camera"):
            np.testing.assert_array_equal(getattr(index, name), getattr(want, name))


def test_an_index_of_another_file_is_not_trusted(shard):
    shard.write_bytes(shard.read_bytes() + tfrecord.frame(b""))
    assert not shards.is_complete(shard)


def npz_of(member: bytes) -> bytes:
    """An index all of whose arrays are these bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("schema_version", "shard_bytes", "subjects", "offsets", "lengths",
                     "world_to_camera"):  # fmt: skip
            file.writestr(f"{name}.npy", member)
    return buffer.getvalue()


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 not a zip",
        b"\x93NUMPY",
        npz_of(b"no array"),
        npz_of(npy(b"((((")),
        npz_of(npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 30 + b",)}")),
        npz_of(npy(b"(" * 5000)),
        npz_of(b"")[:-30],
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}") + bytes(4),  # no archive
    ],
)
def test_a_damaged_index_is_rebuilt(shard, content):
    shards.index_path(shard).write_bytes(content)
    assert not shards.is_complete(shard)
    assert shards.read_index(shard).subjects.tolist() == ["person-3", "person-4"]


def broken(**changes):
    return lambda views: [dataclasses.replace(views[0], **changes), *views[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda views: [], "at least one view"),
        (lambda views: views[::-1], "expected view 0"),
        (lambda views: views[:1], "has 1 views"),
        (broken(subject="other"), "expected view 1"),
        (broken(subject=""), "empty"),
        (broken(image=b"GIF89a"), "not a PNG"),
        (broken(image=records.encode_image(pixels(0, 0, 8))), "8 pixels"),
        (broken(image=records.encode_normals(np.zeros((SIZE, SIZE, 3)))), "square RGBA"),
        (broken(world_to_camera=np.ones((4, 4), np.float32)), "rigid"),
        (broken(yaw=33.0), "yaw 33"),
        (broken(id_embedding=np.ones(512, np.float32)), "unit vector"),
        (broken(id_embedding=-make_records(1, 2)[0].id_embedding), "differs between"),
    ],
)
def test_the_writer_refuses_what_breaks_the_schema(tmp_path, change, message):
    path = tmp_path / "train.tfrecord"
    with pytest.raises(ValueError, match=message), shards.ShardWriter(path) as writer:
        writer.write_subject(make_records(0, 2))
        writer.write_subject(change(make_records(1, 2)))
    assert not list(tmp_path.iterdir())


def test_the_writer_refuses_a_subject_twice_and_an_empty_shard(tmp_path):
    with pytest.raises(ValueError, match="already"), shards.ShardWriter(tmp_path / "a") as writer:
        writer.write_subject(make_records(0, 1))
        writer.write_subject(make_records(0, 1))
    with pytest.raises(ValueError, match="no subject"), shards.ShardWriter(tmp_path / "a"):
        pass
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Damage


def test_any_changed_byte_is_found_and_named(shard):
    index = shards.read_index(shard)
    sound = shard.read_bytes()
    start = int(index.offsets[1, 2])
    end = start + int(index.lengths[1, 2]) + tfrecord.FRAME_OVERHEAD
    positions = np.random.default_rng(0).choice(np.arange(start, end), 60, replace=False)
    for position in [*positions, *range(start, start + 12), *range(end - 4, end)]:
        damaged = bytearray(sound)
        damaged[position] ^= 0x10
        shard.write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            index.read_views(1, [2])
        assert f"{shard}: record 7 at byte {start}" in str(caught.value)
        assert index.read_views(1, [3])[0].view == 3  # the neighbours are still readable


@pytest.mark.parametrize("keep", [-1, -100, -2500])
def test_a_truncated_shard_is_named(shard, keep):
    index = shards.read_index(shard)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"record [89] at byte \d+: .*truncated"):
        index.read_views(1, [3, 4])
    with pytest.raises(InputError, match=r"record [89] at byte \d+: .*truncated"):
        shards.read_index(shard)  # the sidecar no longer fits, so it scans


@pytest.mark.parametrize(
    ("kind", "compress"),
    [
        ("GZIP", gzip.compress),
        ("ZLIB", zlib.compress),
        ("ZLIB", functools.partial(zlib.compress, level=1)),
        ("ZLIB", functools.partial(zlib.compress, level=9)),
    ],
)
def test_a_compressed_shard_is_told_to_be_one(shard, kind, compress):
    shard.write_bytes(compress(shard.read_bytes()))
    with pytest.raises(InputError, match=f"{shard.name}: compressed with {kind}"):
        shards.read_index(shard)


def test_a_shard_cut_between_records_is_refused(shard):
    index = shards.read_index(shard)
    shard.write_bytes(shard.read_bytes()[: index.offsets[1, 4]])
    with pytest.raises(InputError, match="different numbers of views"):
        shards.read_index(shard)


def test_an_absurd_length_is_not_allocated(tmp_path):
    for length in (2**63, 2**64 - 1, 2**40):
        path = tmp_path / "hostile.tfrecord"
        path.write_bytes(framed(b"x" * 100, length=length))  # with a valid checksum
        with pytest.raises(InputError, match=f"record 0 at byte 0: .*claims {length} bytes"):
            shards.read_index(path)


@pytest.mark.parametrize("offset", [-1, 2**62, 2**63 - 1])
def test_an_absurd_offset_is_named(shard, offset):
    index = shards.read_index(shard)
    absurd = dataclasses.replace(index, offsets=np.full_like(index.offsets, offset))
    with pytest.raises(InputError, match=r"truncated|cannot be read"):
        absurd.read_views(0, [0])


def test_empty_and_missing_shards(tmp_path):
    path = tmp_path / "train.tfrecord"
    with pytest.raises(InputError, match=r"train\.tfrecord: cannot be opened"):
        shards.read_index(path)
    path.touch()
    with pytest.raises(InputError, match=r"train\.tfrecord: the shard is empty"):
        shards.read_index(path)
    assert not shards.is_complete(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xff not protobuf", "not a tf.train.Example"),
        (GOAT, "'schema_version' is missing"),
        (example_with(schema_version=("int64_list", [2])), "schema version 2, .* reads version 1"),
        *((example_with(**{field.name: None}), f"{field.name!r} is missing")
          for field in dataclasses.fields(records.ViewRecord)),
        (example_with(yaw=("int64_list", [3])), "'yaw' holds 0 values of int64_list"),
        (example_with(id_embedding=("float_list", [1.0] * 511)), "511 values .* expected 512"),
        (example_with(id_embedding=("float_list", [1.0] * 512)), "neither of unit length nor 0"),
        (example_with(world_to_camera=("float_list", [np.nan] * 16)), "not finite"),
        (example_with(subject=("bytes_list", [b"\xff"])), "not UTF-8"),
        (example_with(view=("int64_list", [-1])), "out of order"),
        (example_with(view=("int64_list", [3])), "out of order"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(tmp_path, data, message):
    path = tmp_path / "train.tfrecord"
    path.write_bytes(framed(data))
    with pytest.raises(InputError, match=rf"train\.tfrecord: record 0 at byte 0: .*{message}"):
        shards.read_index(path)


def test_an_index_that_mixes_up_records_is_found(shard):
    index = shards.read_index(shard)
    swapped = dataclasses.replace(index, offsets=index.offsets[::-1], lengths=index.lengths[::-1])
    with pytest.raises(InputError, match=r"index.npz, it will be rebuilt"):
        swapped.read_views(0, [1])
    lengths = dataclasses.replace(index, lengths=index.lengths + 1)
    with pytest.raises(InputError, match="the index says"):
        lengths.read_views(0, [1])
    posed = dataclasses.replace(index, world_to_camera=index.world_to_camera + 1)
    with pytest.raises(InputError, match="camera"):
        posed.read_views(0, [1])


def claiming(width: int, height: int) -> bytes:
    """A 16x16 PNG whose header, with a valid checksum, claims another size."""
    png = bytearray(records.encode_image(pixels(0, 0, 16)))
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "undecodable"),
        (b"\x89PNG\r\n\x1a\n", "undecodable"),
        (records.encode_image(pixels(0, 0))[:-40], "undecodable"),
        (claiming(12000, 12000), "12000x12000, expected RGBA 16x16"),
        (claiming(2**31 - 1, 2**31 - 1), "undecodable"),
        (records.encode_image(pixels(0, 0, 8)), "8x8, expected RGBA 16x16"),
        (records.encode_normals(np.zeros((16, 16, 3))), "RGB image"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named(encoded, message):
    with pytest.raises(InputError, match=f"shard: record 5: .*{message}"):
        records.decode_image(encoded, 16, "shard: record 5")


def test_record_errors_cross_process_boundaries():
    error = pickle.loads(pickle.dumps(InputError("file: record 3")))
    assert type(error) is InputError and str(error) == "file: record 3"


# --------------------------------------------------------------------------------------------------
# Manifest


def test_manifest_round_trip(tmp_path):
    write_dataset(tmp_path, subjects=3)
    manifest = read_manifest(tmp_path)
    assert manifest["schema_version"] == records.SCHEMA_VERSION
    assert (manifest["image_size"], manifest["views"], manifest["seed"]) == (SIZE, 8, 0)
    assert [shard["subjects"] for shard in manifest["splits"]["train"]] == [2, 1]
    assert not list(tmp_path.glob(".*.unfinished"))
    for shard in manifest["splits"]["train"]:
        content = (tmp_path / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
    total = sum(shard["bytes"] for shard in manifest["splits"]["train"])
    assert manifest["counts"] == {"train": {"shards": 2, "subjects": 3, "bytes": total}}
    assert manifest["cameras"] == {"yaw": [-180.0, 135.0], "pitch": [-10.0, 15.0]}


def test_manifests_of_before_are_read(tmp_path):
    """Those without hashes, beside shards whose indexes have none."""
    (path,) = write_dataset(tmp_path, subjects=2, shards=1)
    with np.load(shards.index_path(path)) as arrays:
        older = {name: arrays[name] for name in arrays if name != "sha256"}
    np.savez(shards.index_path(path), **older)
    manifest = read_manifest(tmp_path)
    write_manifest(
        tmp_path, {**manifest, "splits": {"train": [{"file": path.name, "subjects": 2}]}}
    )
    assert set(read_manifest(tmp_path)["splits"]["train"][0]) == {"file", "subjects", "bytes"}
    (tmp_path / "manifest.json").write_text(
        json.dumps({k: v for k, v in manifest.items() if k not in ("counts", "cameras")})
    )
    assert len(SubjectSource(tmp_path, "train")) == 2
    shards.rebuild_index(path)
    assert shards.metadata(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"schema_version": None}, "schema version None"),
        ({"image_size": "64"}, "image_size: expected an integer"),
        ({"views": True}, "views: expected an integer"),
        ({"views": 0}, "views: expected an integer from 1"),
        ({"views": 10**30}, "views: expected|too large a number"),
        ({"source": "a\ud800"}, "source: expected a string"),
        ({"license": None}, "license: expected a string"),
        ({"split_views": [8]}, "split_views: expected"),
        ({"split_views": {"train": "8"}}, "split_views.train: expected"),
        ({"split_views": {"train": 0}}, "split_views.train: expected"),
        ({"splits": []}, "splits: expected an object"),
        ({"splits": {"train": "a.tfrecord"}}, "splits.train: expected a list"),
        ({"splits": {"train": ["a.tfrecord"]}}, "expected"),
        ({"splits": {"train": [{"file": "../a.tfrecord", "subjects": 1}]}}, "file: expected"),
        ({"splits": {"train": [{"file": "..", "subjects": 1}]}}, "file: expected"),
        ({"splits": {"train": [{"file": "/etc/passwd", "subjects": 1}]}}, "file: expected"),
        ({"splits": {"train": [{"file": "a", "subjects": 1, "sha256": "x"}]}}, "sha256"),
        ({"splits": {"train": [{"file": "a", "subjects": 1, "bytes": "9"}]}}, "bytes"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, change, message):
    write_dataset(tmp_path, subjects=1, shards=1)
    path = tmp_path / "manifest.json"
    manifest = {**json.loads(path.read_text()), **change}
    with pytest.raises(InputError, match=message):
        write_manifest(tmp_path, manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"manifest.json.*{message}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_unreadable_manifests_are_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(InputError, match=r"no such file; .* data_prep"):
        read_manifest(tmp_path)
