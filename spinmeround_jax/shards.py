"""TFRecord shards of whole subjects, each with an index beside it, written whole or not at all.

A folder holds `manifest.json` and for each split shards `<split>-00000-of-00008.tfrecord`, with an
index beside each (`<shard>.index.npz`). A shard holds whole subjects, one after another, each with
its views 0..V-1. `docs/data_format.md` tells more.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from spinmeround_jax import cameras, records, tfrecord
from spinmeround_jax.files import sync_directory, write_atomically
from spinmeround_jax.records import RecordError, ViewRecord
from spinmeround_jax.tfrecord import REPAIR

_logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------
# Reading


def _where(path: pathlib.Path, offset: int, number: int) -> str:
    return f"{path}: record {number} at byte {offset}"


def scan(path: str | os.PathLike[str]) -> Iterator[tuple[int, int, ViewRecord]]:
    """Yield (offset, length of the data, record) of every record of a shard, checking each."""
    path = pathlib.Path(path)
    offset, number = 0, 0
    with _open(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        if file_size == 0:
            raise RecordError(f"{path}: the shard is empty (0 bytes); {REPAIR}")
        while offset < file_size:
            where = _where(path, offset, number)
            data = tfrecord.read_frame(file, file_size, offset, where)
            yield offset, len(data), records.parse(data, where)
            offset += len(data) + tfrecord.FRAME_OVERHEAD
            number += 1


def _read_view(
    file: BinaryIO, path: pathlib.Path, offset: int, length: int, number: int
) -> ViewRecord:
    where = _where(path, offset, number)
    data = tfrecord.read_frame(file, os.fstat(file.fileno()).st_size, offset, where)
    if len(data) != length:
        raise RecordError(
            f"{where}: holds {len(data)} bytes, the index says {length}; "
            f"delete {index_path(path).name}, it will be rebuilt"
        )
    return records.parse(data, where)


def _open(path: pathlib.Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise RecordError(f"{path}: cannot be opened ({error.strerror}); {REPAIR}") from error


# --------------------------------------------------------------------------------------------------
# Index sidecar


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Where each view of a shard is, and its camera: S subjects with V views each."""

    path: pathlib.Path  # of the shard
    subjects: np.ndarray  # (S,) str
    offsets: np.ndarray  # (S, V) int64, byte where the record's frame starts
    lengths: np.ndarray  # (S, V) int64, bytes of the record's data, frame not counted
    world_to_camera: np.ndarray  # (S, V, 4, 4) float32

    def read_views(self, row: int, views: Sequence[int]) -> list[ViewRecord]:
        """The records of some views of the subject in `row`; opens the shard once.

        Raises:
            RecordError: wrong checksums, missing or malformed fields, another version, or records
                that are not those the index tells of.
        """
        found = []
        with _open(self.path) as file:
            for view in views:
                number = row * self.offsets.shape[1] + int(view)
                offset = int(self.offsets[row, view])
                record = _read_view(file, self.path, offset, int(self.lengths[row, view]), number)
                self._check(record, row, int(view), number)
                found.append(record)
        return found

    def _check(self, record: ViewRecord, row: int, view: int, number: int) -> None:
        if (
            record.subject != self.subjects[row]
            or record.view != view
            or not np.array_equal(record.world_to_camera, self.world_to_camera[row, view])
        ):
            raise RecordError(
                f"{_where(self.path, int(self.offsets[row, view]), number)}: is view {record.view} "
                f"of {record.subject!r}, the index tells of view {view} of "
                f"{str(self.subjects[row])!r} or of another camera; "
                f"delete {index_path(self.path).name}, it will be rebuilt"
            )

    def where(self, row: int, view: int) -> str:
        """File and record, for messages."""
        number = row * self.offsets.shape[1] + int(view)
        return _where(self.path, int(self.offsets[row, view]), number)


def index_path(path: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(path)
    return path.with_name(path.name + ".index.npz")


def read_index(path: str | os.PathLike[str]) -> ShardIndex:
    """Index of the shard at `path`; scans the whole shard where the sidecar is missing or stale.

    Raises:
        RecordError: the shard is missing, empty, truncated or damaged (when scanned).
    """
    path = pathlib.Path(path)
    with _open(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise RecordError(f"{path}: the shard is empty (0 bytes); {REPAIR}")
    if (index := _load_sidecar(path)) is not None:
        return index
    _logger.warning("%s: no usable index beside it, scanning the shard", path)
    return _scan_index(path)


def rebuild_index(path: str | os.PathLike[str]) -> ShardIndex:
    """Scan the shard, checking every record, and write its sidecar anew."""
    index = _scan_index(pathlib.Path(path))
    _write_sidecar(index, index.path.stat().st_size)
    return index


def is_complete(path: str | os.PathLike[str]) -> bool:
    """Whether a writer finished this shard: it and its index exist. Records are not read."""
    path = pathlib.Path(path)
    return path.is_file() and _load_sidecar(path) is not None


def _load_sidecar(path: pathlib.Path) -> ShardIndex | None:
    """The sidecar, or None where it is missing, unreadable or was made for another file."""
    try:
        with np.load(index_path(path), allow_pickle=False) as arrays:
            if arrays["schema_version"] != records.SCHEMA_VERSION:
                return None
            if arrays["shard_bytes"] != path.stat().st_size:
                return None
            index = ShardIndex(
                path,
                arrays["subjects"],
                arrays["offsets"],
                arrays["lengths"],
                arrays["world_to_camera"],
            )
        return index if _is_sound(index) else None
    except Exception:  # the file can hold anything, and the shard tells the same
        return None


def _is_sound(index: ShardIndex) -> bool:
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
    )


def _write_sidecar(index: ShardIndex, shard_bytes: int) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        schema_version=np.int64(records.SCHEMA_VERSION),
        shard_bytes=np.int64(shard_bytes),
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
            raise RecordError(
                f"{_where(path, offset, number)}: view {record.view} of {record.subject!r} is out "
                f"of order, a shard holds views 0..V-1 of each subject; {REPAIR}"
            )
        rows[-1][1].append((offset, length, record.world_to_camera))
    if len({len(views) for _, views in rows}) != 1:
        raise RecordError(
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
    """Writes one shard and its index; both appear under their names only on a clean exit.

        with ShardWriter(directory / shard_name("train", 0, 8)) as writer:
            writer.write_subject(records)

    The shard grows under a temporary name in the same folder, removed if the block raises. On exit
    the index is renamed into place first, the shard second: a kill in between leaves no shard, so
    that `is_complete` is false and a resuming writer does this shard again.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._rows: list[tuple[str, list[tuple[int, int, np.ndarray]]]] = []
        self._subjects: set[str] = set()
        self._image_size: int | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        self._file = self._temporary.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._file is not None
        try:
            if kind is None:
                self._commit()
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def write_subject(self, views: Sequence[ViewRecord]) -> None:
        """Append all records of one subject, views 0..V-1 in order, V the same for all subjects.

        Raises:
            ValueError: records that break the schema, naming subject, view and field.
        """
        if self._file is None:
            raise RuntimeError("use ShardWriter as a context manager")
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
            self._file.write(tfrecord.frame(data))
        self._rows.append((subject, row))
        self._subjects.add(subject)

    def _check(self, record: ViewRecord, first: ViewRecord, view: int) -> None:
        where = f"{self.path}: subject {record.subject!r} view {record.view}"
        if record.subject != first.subject or record.view != view:
            raise ValueError(f"{where}: expected view {view} of {first.subject!r}")
        for mode, encoded in (("RGBA", record.image), ("RGB", record.normals)):
            size = records.image_size_of(encoded, mode, where)
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
        if (
            embedding.shape != (records.ID_EMBEDDING_SIZE,)
            or not abs(np.linalg.norm(embedding) - 1) < 1e-3
        ):
            raise ValueError(
                f"{where}: id_embedding is not a unit vector of {records.ID_EMBEDDING_SIZE}"
            )
        if not np.array_equal(embedding, first.id_embedding):
            raise ValueError(f"{where}: id_embedding differs between views of one subject")

    def _commit(self) -> None:
        if not self._rows:
            raise ValueError(f"{self.path}: no subject was written, a shard holds at least one")
        self._file.flush()
        os.fsync(self._file.fileno())
        _write_sidecar(_make_index(self.path, self._rows), self._file.tell())
        os.replace(self._temporary, self.path)
        sync_directory(self.path.parent)
