"""TFRecord shards of whole subjects with an index file each, written completely or not at all.

A folder holds `manifest.json` and for each split shards `<split>-00000-of-00008.tfrecord`, each with
`<shard>.index.npz`. A shard holds whole subjects, one after another, each with its views 0..V-1. See
`docs/data_format.md`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from spinmeround_jax import ID_EMBEDDING_SIZE, cameras
from spinmeround_jax.data import records, tfrecord
from spinmeround_jax.data.records import ViewRecord
from spinmeround_jax.data.tfrecord import REPAIR
from spinmeround_jax.files import (
    InputError,
    as_path,
    begun,
    publish,
    read_bytes,
    read_ranges,
    sha256,
    write_atomically,
)

_MAX_INDEX_BYTES = 1 << 30
_logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------
# Reading


def _where(path: pathlib.Path, offset: int, number: int) -> str:
    return f"{path}: record {number} at byte {offset}"


def scan(path: str | os.PathLike[str]) -> Iterator[tuple[int, int, ViewRecord]]:
    """Yield (offset, length of the data, record) of every record of a shard, checking each."""
    path = as_path(path)
    offset, number = 0, 0
    with _open(path) as file:
        file_size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if kind := tfrecord.compression(file.read(12)):
            raise InputError(
                f"{path}: compressed with {kind}, which allows no random access; write it again without "
                "compression (the default of TFRecordWriter)"
            )
        while offset < file_size:
            where = _where(path, offset, number)
            data = tfrecord.read_frame(file, file_size, offset, where)
            yield offset, len(data), records.parse(data, where)
            offset += len(data) + tfrecord.FRAME_OVERHEAD
            number += 1


def _open(path: pathlib.Path) -> BinaryIO:
    """The shard, opened for reading; InputError if it cannot be or is empty."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); {REPAIR}") from error
    if file.seek(0, os.SEEK_END) == 0:
        file.close()
        raise InputError(f"{path}: the shard is empty (0 bytes); {REPAIR}")
    return file


# --------------------------------------------------------------------------------------------------
# Index file


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Offset, length and camera of each view of a shard: S subjects with V views each."""

    path: pathlib.Path  # of the shard
    subjects: np.ndarray  # (S,) str
    offsets: np.ndarray  # (S, V) int64, byte where the record's frame starts
    lengths: np.ndarray  # (S, V) int64, bytes of the record's data, frame not counted
    world_to_camera: np.ndarray  # (S, V, 4, 4) float32
    shard_bytes: int = 0  # recorded by the writer, like `sha256`; 0 and "" of a scanned shard
    sha256: str = ""

    def read_views(self, row: int, views: Sequence[int]) -> list[ViewRecord]:
        """The records of some views of the subject in `row`; opens the shard once.

        Raises:
            InputError: wrong checksums, missing or malformed fields, another version, or records
                that are not those of the index.
        """
        starts = [int(self.offsets[row, view]) for view in views]
        lengths = [int(self.lengths[row, view]) for view in views]
        ends = [s + n + tfrecord.FRAME_OVERHEAD for s, n in zip(starts, lengths, strict=True)]
        try:
            frames = read_ranges(self.path, list(zip(starts, ends, strict=True)))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error}); {REPAIR}") from error
        remedy = f"delete {index_path(self.path).name}, it will be rebuilt"
        found = []
        for view, frame, length in zip(views, frames, lengths, strict=True):
            where = self.where(row, view)
            data = tfrecord.read_frame(io.BytesIO(frame), len(frame), 0, where)
            if len(data) != length:
                raise InputError(
                    f"{where}: holds {len(data)} bytes, the index says {length}; {remedy}"
                )
            record = records.parse(data, where)
            if (record.subject, record.view) != (self.subjects[row], view) or not np.array_equal(
                record.world_to_camera, self.world_to_camera[row, view]
            ):
                raise InputError(
                    f"{where}: is view {record.view} of {record.subject!r}, the index says view "
                    f"{view} of {str(self.subjects[row])!r} or another camera; {remedy}"
                )
            found.append(record)
        return found

    def where(self, row: int, view: int) -> str:
        """File and record, for messages."""
        number = row * self.offsets.shape[1] + int(view)
        return _where(self.path, int(self.offsets[row, view]), number)


def index_path(path: str | os.PathLike[str]) -> pathlib.Path:
    path = as_path(path)
    return path.with_name(path.name + ".index.npz")


def read_index(path: str | os.PathLike[str]) -> ShardIndex:
    """Index of the shard at `path`; scans the whole shard if the index file is missing or stale.

    Raises:
        InputError: the shard is missing, empty, truncated or damaged (when scanned).
    """
    path = as_path(path)
    _open(path).close()
    if (index := _load_index(path)) is not None:
        return index
    _logger.warning("%s: has no usable index file, scanning the shard", path)
    return _scan_index(path)


def rebuild_index(path: str | os.PathLike[str]) -> ShardIndex:
    """Scan the shard, checking every record, and write its index file."""
    index = _scan_index(as_path(path))
    _write_index(index, index.path.stat().st_size, sha256_of(index.path))
    return index


def sha256_of(path: pathlib.Path) -> str:
    """SHA-256 of a shard's bytes, in hexadecimal."""
    _open(path).close()
    return sha256(path)


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`bytes` and `sha256`, as recorded by the writer, of a complete shard; {} of any other.

    Older shards have no `sha256`.
    """
    index = _load_index(as_path(path))
    if index is None:
        return {}
    return {"bytes": index.shard_bytes} | ({"sha256": index.sha256} if index.sha256 else {})


def is_complete(path: str | os.PathLike[str]) -> bool:
    """Whether this shard and its index exist; no records are read."""
    path = as_path(path)
    return path.is_file() and _load_index(path) is not None


def _load_index(path: pathlib.Path) -> ShardIndex | None:
    """The index file, or None if it is missing, unreadable or of another shard."""
    try:
        content = io.BytesIO(read_bytes(index_path(path), _MAX_INDEX_BYTES))
        with np.load(content, allow_pickle=False) as arrays:
            size = path.stat().st_size
            if (arrays["schema_version"], arrays["shard_bytes"]) != (records.SCHEMA_VERSION, size):
                return None
            index = ShardIndex(
                path,
                arrays["subjects"],
                arrays["offsets"],
                arrays["lengths"],
                arrays["world_to_camera"],
                size,
                str(arrays["sha256"]) if "sha256" in arrays else "",
            )
        return index if _is_valid(index) else None
    except Exception:  # the file can hold anything, and the shard can be scanned
        return None


def _is_valid(index: ShardIndex) -> bool:
    shape = index.offsets.shape
    return (
        len(shape) == 2
        and min(shape) > 0
        and index.subjects.shape == shape[:1]
        and index.subjects.dtype.kind == "U"
        and index.lengths.shape == shape
        and index.world_to_camera.shape == (*shape, 4, 4)
        and index.offsets.dtype == index.lengths.dtype == np.int64
        and index.world_to_camera.dtype == np.float32
        and re.fullmatch("[0-9a-f]{64}|", index.sha256) is not None
    )


def _write_index(index: ShardIndex, shard_bytes: int, digest: str) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        schema_version=np.int64(records.SCHEMA_VERSION),
        shard_bytes=np.int64(shard_bytes),
        sha256=np.str_(digest),
        subjects=index.subjects,
        offsets=index.offsets,
        lengths=index.lengths,
        world_to_camera=index.world_to_camera,
    )
    write_atomically(index_path(index.path), buffer.getvalue())


def _scan_index(path: pathlib.Path) -> ShardIndex:
    rows: list[tuple[str, list[tuple[int, int, np.ndarray]]]] = []
    for number, (offset, length, record) in enumerate(scan(path)):
        if record.view == 0:
            rows.append((record.subject, []))
        if not rows or rows[-1][0] != record.subject or len(rows[-1][1]) != record.view:
            raise InputError(
                f"{_where(path, offset, number)}: view {record.view} of {record.subject!r} is out "
                f"of order, a shard holds views 0..V-1 of each subject; {REPAIR}"
            )
        rows[-1][1].append((offset, length, record.world_to_camera))
    if len({len(views) for _, views in rows}) != 1:
        raise InputError(
            f"{path}: subjects have different numbers of views, the shard is cut; {REPAIR}"
        )
    return _make_index(path, rows)


def _make_index(
    path: pathlib.Path, rows: Sequence[tuple[str, Sequence[tuple[int, int, np.ndarray]]]]
) -> ShardIndex:
    return ShardIndex(
        path=path,
        subjects=np.array([subject for subject, _ in rows], dtype=np.str_),
        offsets=np.array([[view[0] for view in views] for _, views in rows], np.int64),
        lengths=np.array([[view[1] for view in views] for _, views in rows], np.int64),
        world_to_camera=np.array([[view[2] for view in views] for _, views in rows], np.float32),
    )


# --------------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes one shard and its index; both get their names only on a clean exit.

        with ShardWriter(directory / shard_name("train", 0, 8)) as writer:
            writer.write_subject(records)

    The shard grows under a temporary name in the same folder (for a bucket: on the local disk), which
    is removed if the block raises. On exit the index is renamed first, the shard second: a kill in
    between leaves no shard, `is_complete` is false, and a resuming writer writes this shard again.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = as_path(path)
        self._stack = contextlib.ExitStack()
        self._sha256 = hashlib.sha256()
        self._rows: list[tuple[str, list[tuple[int, int, np.ndarray]]]] = []
        self._subjects: set[str] = set()
        self._image_size: int | None = None

    def __enter__(self) -> ShardWriter:
        with contextlib.ExitStack() as stack:
            self._temporary = stack.enter_context(begun(self.path))
            self._file = stack.enter_context(self._temporary.open("wb"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None:
                self._commit()

    def write_subject(self, views: Sequence[ViewRecord]) -> None:
        """Append all records of one subject, views 0..V-1 in order, V the same for all subjects.

        Raises:
            ValueError: records that break the schema, naming subject, view and field.
        """
        if not views:
            raise ValueError(f"{self.path}: a subject needs at least one view")
        subject = views[0].subject
        if not subject or subject in self._subjects:
            raise ValueError(f"{self.path}: subject {subject!r} is empty or already in the shard")
        if self._rows and len(views) != len(self._rows[0][1]):
            raise ValueError(
                f"{self.path}: subject {subject!r} has {len(views)} views, "
                f"earlier ones {len(self._rows[0][1])}"
            )
        for view, record in enumerate(views):
            self._check(record, views[0], view)
        row = []
        for record in views:
            data = records.serialize(record)
            row.append((self._file.tell(), len(data), np.asarray(record.world_to_camera)))
            frame = tfrecord.frame(data)
            self._file.write(frame)
            self._sha256.update(frame)
        self._rows.append((subject, row))
        self._subjects.add(subject)

    def _check(self, record: ViewRecord, first: ViewRecord, view: int) -> None:
        where = f"{self.path}: subject {record.subject!r} view {record.view}"
        if record.subject != first.subject or record.view != view:
            raise ValueError(f"{where}: expected view {view} of {first.subject!r}")
        encoded_images = ((record.image, ("RGBA",)), (record.normals, ("RGB", "RGBA")))
        for encoded, modes in encoded_images:
            size = records.image_size_of(encoded, modes, where)
            self._image_size = self._image_size or size
            if size != self._image_size:
                raise ValueError(f"{where}: {size} pixels, earlier images {self._image_size}")
        pose = np.asarray(record.world_to_camera)
        rotation = pose[:3, :3]
        if pose.shape != (4, 4) or not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-4):
            raise ValueError(f"{where}: world_to_camera is not a (4, 4) rigid pose")
        if not np.allclose(cameras.orbit(record.yaw, record.pitch)[2, :3], pose[2, :3], atol=2e-3):
            raise ValueError(
                f"{where}: yaw {record.yaw} and pitch {record.pitch} are not those of "
                f"world_to_camera, {cameras.yaw_pitch(pose)}"
            )
        embedding = np.asarray(record.id_embedding)
        if not records.is_identity(embedding):
            raise ValueError(
                f"{where}: id_embedding is neither a unit vector of {ID_EMBEDDING_SIZE} nor 0"
            )
        if not np.array_equal(embedding, first.id_embedding):
            raise ValueError(f"{where}: id_embedding differs between views of one subject")

    def _commit(self) -> None:
        if not self._rows:
            raise ValueError(f"{self.path}: no subject was written, a shard holds at least one")
        self._file.flush()
        os.fsync(self._file.fileno())
        index = _make_index(self.path, self._rows)
        _write_index(index, self._file.tell(), self._sha256.hexdigest())
        publish(self._temporary, self.path)
