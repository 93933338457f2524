"""Storage schema: TFRecord shards of `tf.train.Example`, one view each, without TensorFlow.

A folder holds `manifest.json` and for each split shards `<split>-00000-of-00008.tfrecord`, with an
index beside each (`<shard>.index.npz`). A shard holds whole subjects, one after another, each with
its views 0..V-1. `docs/data_format.md` documents every field; `SCHEMA_VERSION` changes with it.

Everything read is checked (checksums, fields, image sizes) and every fault is a `RecordError` that
names the file and the record: a bad disk costs a message, never a hang or a wrong picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from google.protobuf import message
from PIL import Image

from spinmeround_jax import cameras, tfrecord
from spinmeround_jax.tfrecord import REPAIR, RecordError

SCHEMA_VERSION = 1
ID_EMBEDDING_SIZE = 512

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ViewRecord:
    """One rendered view of one subject.

    image: PNG or lossless WebP, (size, size, 4) RGBA, 8 bits, straight alpha.
    normals: PNG or lossless WebP, (size, size, 3), see `encode_normals`.
    world_to_camera: (4, 4) float32, see `cameras`; yaw and pitch are its angles in degrees.
    id_embedding: (512,) float32 ArcFace vector of unit length, the same in all views of a subject.
    """

    subject: str
    view: int
    image: bytes
    normals: bytes
    world_to_camera: np.ndarray
    yaw: float
    pitch: float
    id_embedding: np.ndarray
    source: str
    license: str


# --------------------------------------------------------------------------------------------------
# Pixels


def encode_image(rgba: np.ndarray) -> bytes:
    """(size, size, 4) uint8 RGBA with straight alpha -> PNG bytes."""
    if rgba.dtype != np.uint8 or rgba.ndim != 3 or rgba.shape[2] != 4:
        raise ValueError(f"expected (size, size, 4) uint8, got {rgba.shape} {rgba.dtype}")
    return _png(rgba)


def encode_normals(normals: np.ndarray) -> bytes:
    """(size, size, 3) float world-space normals, 0 on the background -> PNG bytes.

    byte = round(127 n) + 128: the paper's 255 (n + 1) / 2 to within 1.5 levels, but with the
    background at exactly 128; the paper's formula puts zero between two levels.
    """
    if normals.ndim != 3 or normals.shape[2] != 3 or not np.isfinite(normals).all():
        raise ValueError(f"expected finite (size, size, 3) normals, got shape {normals.shape}")
    if abs(normals).max(initial=0.0) > 1.001:
        raise ValueError(f"normals exceed 1 in magnitude: {abs(normals).max()}")
    return _png((np.rint(np.clip(normals, -1.0, 1.0) * 127.0) + 128.0).astype(np.uint8))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def decode_image(encoded: bytes, size: int, where: str) -> np.ndarray:
    """(size, size, 4) uint8 RGBA of `ViewRecord.image`; RecordError naming `where` if it is not."""
    return _decode(encoded, size, "RGBA", where)


def decode_normals(encoded: bytes, size: int, where: str) -> np.ndarray:
    """(size, size, 3) float32 normals, (byte - 128) / 127: 0 on the background, length <= 1."""
    planes = np.moveaxis(_decode(encoded, size, "RGB", where), -1, 0).astype(np.float32, order="C")
    planes -= 128.0
    planes /= 127.0
    # Rounding can lengthen a unit vector by a per cent; shorter ones (soft edges) stay as they are.
    planes /= np.maximum(np.sqrt((planes * planes).sum(0)), 1.0)
    return np.moveaxis(planes, 0, -1)


def _decode(encoded: bytes, size: int, mode: str, where: str) -> np.ndarray:
    try:
        # The size is in the header, so that a picture of 60000 x 60000 is refused before decoding.
        with Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")) as image:
            if image.size != (size, size) or image.mode != mode:
                raise RecordError(
                    f"{where}: {image.mode} image of {image.size[0]}x{image.size[1]}, "
                    f"expected {mode} {size}x{size}; {REPAIR}"
                )
            return np.array(image)
    except RecordError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, ...
        raise RecordError(f"{where}: undecodable image ({error}); {REPAIR}") from error


def _image_size(encoded: bytes, mode: str, where: str) -> int:
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")) as image:
            width, height = image.size
            found = image.mode
    except Exception as error:
        raise ValueError(f"{where}: not a PNG or WebP image ({error})") from error
    if width != height or found != mode:
        raise ValueError(f"{where}: {found} {width}x{height}, expected a square {mode} image")
    return width


# --------------------------------------------------------------------------------------------------
# tf.train.Example


def _serialize(record: ViewRecord) -> bytes:
    example = tfrecord.example_class()()
    feature = example.features.feature
    feature["schema_version"].int64_list.value.append(SCHEMA_VERSION)
    feature["subject"].bytes_list.value.append(record.subject.encode())
    feature["view"].int64_list.value.append(record.view)
    feature["image"].bytes_list.value.append(record.image)
    feature["normals"].bytes_list.value.append(record.normals)
    feature["world_to_camera"].float_list.value.extend(np.ravel(record.world_to_camera).tolist())
    feature["yaw"].float_list.value.append(record.yaw)
    feature["pitch"].float_list.value.append(record.pitch)
    feature["id_embedding"].float_list.value.extend(np.ravel(record.id_embedding).tolist())
    feature["source"].bytes_list.value.append(record.source.encode())
    feature["license"].bytes_list.value.append(record.license.encode())
    return example.SerializeToString(deterministic=True)  # the same renders give the same bytes


def _parse(data: bytes, where: str) -> ViewRecord:
    try:
        feature = tfrecord.example_class().FromString(data).features.feature
    except message.DecodeError as error:
        raise RecordError(f"{where}: not a tf.train.Example ({error}); {REPAIR}") from error

    def values(name: str, kind: str, count: int) -> Sequence[Any]:
        if name not in feature:
            raise RecordError(f"{where}: field {name!r} is missing; {REPAIR}")
        found = feature[name].WhichOneof("kind")
        items = getattr(feature[name], kind).value
        if found != kind or len(items) != count:
            raise RecordError(
                f"{where}: field {name!r} holds {len(items)} values of {found}, "
                f"expected {count} of {kind}; {REPAIR}"
            )
        return items

    def floats(name: str, count: int) -> np.ndarray:
        array = np.array(values(name, "float_list", count), np.float32)
        if not np.isfinite(array).all():
            raise RecordError(f"{where}: field {name!r} is not finite; {REPAIR}")
        return array

    def text(name: str) -> str:
        try:
            return values(name, "bytes_list", 1)[0].decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"{where}: field {name!r} is not UTF-8; {REPAIR}") from error

    version = values("schema_version", "int64_list", 1)[0]
    if version != SCHEMA_VERSION:
        raise RecordError(_version_message(where, version))
    id_embedding = floats("id_embedding", ID_EMBEDDING_SIZE)
    if abs(np.linalg.norm(id_embedding) - 1.0) > 1e-3:
        raise RecordError(f"{where}: id_embedding is not of unit length; {REPAIR}")
    return ViewRecord(
        subject=text("subject"),
        view=values("view", "int64_list", 1)[0],
        image=values("image", "bytes_list", 1)[0],
        normals=values("normals", "bytes_list", 1)[0],
        world_to_camera=floats("world_to_camera", 16).reshape(4, 4),
        yaw=float(floats("yaw", 1)[0]),
        pitch=float(floats("pitch", 1)[0]),
        id_embedding=id_embedding,
        source=text("source"),
        license=text("license"),
    )


def _version_message(where: str, version: Any) -> str:
    return (
        f"{where}: schema version {version!r}, this code reads version {SCHEMA_VERSION}; "
        "write the data again with this version's data_prep, or use the code that wrote it"
    )


# --------------------------------------------------------------------------------------------------
# Reading


def _where(path: pathlib.Path, offset: int, number: int | None) -> str:
    return f"{path}: record {'?' if number is None else number} at byte {offset}"


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
            yield offset, len(data), _parse(data, where)
            offset += len(data) + tfrecord.FRAME_OVERHEAD
            number += 1


def read_view(
    path: str | os.PathLike[str], offset: int, length: int, number: int | None = None
) -> ViewRecord:
    """The record at `offset` whose data has `length` bytes (both from the index).

    `number` is the record's position in the shard, for messages only.

    Raises:
        RecordError: wrong checksums, another length, missing or malformed fields, another version.
    """
    with _open(pathlib.Path(path)) as file:
        return _read_view(file, pathlib.Path(path), int(offset), int(length), number)


def _read_view(
    file: BinaryIO, path: pathlib.Path, offset: int, length: int, number: int | None
) -> ViewRecord:
    where = _where(path, offset, number)
    data = tfrecord.read_frame(file, os.fstat(file.fileno()).st_size, offset, where)
    if len(data) != length:
        raise RecordError(
            f"{where}: holds {len(data)} bytes, the index says {length}; "
            f"delete {index_path(path).name}, it will be rebuilt"
        )
    return _parse(data, where)


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
        """The records of some views of the subject in `row`; opens the shard once."""
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
            if arrays["schema_version"] != SCHEMA_VERSION:
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
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile):
        return None
    shape = index.offsets.shape
    sound = (
        len(shape) == 2
        and min(shape) > 0
        and index.subjects.shape == shape[:1]
        and index.subjects.dtype.kind == "U"
        and index.lengths.shape == shape
        and index.world_to_camera.shape == (*shape, 4, 4)
        and index.offsets.dtype == index.lengths.dtype == np.int64
        and index.world_to_camera.dtype == np.float32
    )
    return index if sound else None


def _write_sidecar(index: ShardIndex, shard_bytes: int) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        schema_version=np.int64(SCHEMA_VERSION),
        shard_bytes=np.int64(shard_bytes),
        subjects=index.subjects,
        offsets=index.offsets,
        lengths=index.lengths,
        world_to_camera=index.world_to_camera,
    )
    _write_atomically(index_path(index.path), buffer.getvalue())


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

    def write_subject(self, records: Sequence[ViewRecord]) -> None:
        """Append all records of one subject, views 0..V-1 in order, V the same for all subjects.

        Raises:
            ValueError: records that break the schema, naming subject, view and field.
        """
        if self._file is None:
            raise RuntimeError("use ShardWriter as a context manager")
        if not records:
            raise ValueError(f"{self.path}: a subject needs at least one view")
        subject = records[0].subject
        if not subject or subject in self._subjects:
            raise ValueError(f"{self.path}: subject {subject!r} is empty or already in the shard")
        if self._rows and len(records) != len(self._rows[0][1]):
            raise ValueError(
                f"{self.path}: subject {subject!r} has {len(records)} views, "
                f"earlier ones {len(self._rows[0][1])}"
            )
        for view, record in enumerate(records):
            self._check(record, records[0], view)
        row = []
        for record in records:
            data = _serialize(record)
            row.append((self._file.tell(), len(data), np.asarray(record.world_to_camera)))
            self._file.write(tfrecord.frame(data))
        self._rows.append((subject, row))
        self._subjects.add(subject)

    def _check(self, record: ViewRecord, first: ViewRecord, view: int) -> None:
        where = f"{self.path}: subject {record.subject!r} view {record.view}"
        if record.subject != first.subject or record.view != view:
            raise ValueError(f"{where}: expected view {view} of {first.subject!r}")
        for mode, encoded in (("RGBA", record.image), ("RGB", record.normals)):
            size = _image_size(encoded, mode, where)
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
        if embedding.shape != (ID_EMBEDDING_SIZE,) or not abs(np.linalg.norm(embedding) - 1) < 1e-3:
            raise ValueError(f"{where}: id_embedding is not a unit vector of {ID_EMBEDDING_SIZE}")
        if not np.array_equal(embedding, first.id_embedding):
            raise ValueError(f"{where}: id_embedding differs between views of one subject")

    def _commit(self) -> None:
        if not self._rows:
            raise ValueError(f"{self.path}: no subject was written, a shard holds at least one")
        self._file.flush()
        os.fsync(self._file.fileno())
        _write_sidecar(_make_index(self.path, self._rows), self._file.tell())
        os.replace(self._temporary, self.path)
        _sync_directory(self.path.parent)


def _write_atomically(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(directory: pathlib.Path) -> None:
    """Make renames survive a power cut; some network file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --------------------------------------------------------------------------------------------------
# Manifest


def shard_name(split: str, shard: int, count: int) -> str:
    """E.g. train-00000-of-00008.tfrecord."""
    return f"{split}-{shard:05d}-of-{count:05d}.tfrecord"


def write_manifest(directory: str | os.PathLike[str], mapping: Mapping[str, Any]) -> None:
    """Write manifest.json atomically; `schema_version` is added.

    `mapping` needs image_size, views and seed (int), source and license (str), and
    splits = {split: [{"file": name of a shard in this folder, "subjects": count}, ...]}. Further
    entries are kept.

    Raises:
        RecordError: naming the entry that is missing or malformed.
    """
    path = pathlib.Path(directory) / "manifest.json"
    manifest = {"schema_version": SCHEMA_VERSION, **mapping}
    _check_manifest(manifest, path)
    _write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked content of manifest.json.

    Raises:
        RecordError: no manifest, not JSON, a missing or malformed entry, another schema version.
    """
    path = pathlib.Path(directory) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(
            f"{path}: no such file; {directory} is no finished data set, write one with data_prep"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: unreadable ({error}); write it again") from error
    _check_manifest(manifest, path)
    return manifest


def _check_manifest(manifest: Any, path: pathlib.Path) -> None:
    if not isinstance(manifest, dict):
        raise RecordError(f"{path}: expected a JSON object")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(_version_message(str(path), manifest.get("schema_version")))
    for name, kind in (
        ("image_size", int),
        ("views", int),
        ("seed", int),
        ("source", str),
        ("license", str),
        ("splits", dict),
    ):
        value = manifest.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise RecordError(f"{path}: {name!r} must be {kind.__name__}, got {value!r}")
    if min(manifest["image_size"], manifest["views"]) < 1:
        raise RecordError(f"{path}: image_size and views must be positive")
    for split, shards in manifest["splits"].items():
        if not isinstance(shards, list):
            raise RecordError(f"{path}: split {split!r} must be a list of shards")
        for shard in shards:
            if (
                not isinstance(shard, dict)
                or not isinstance(shard.get("file"), str)
                or not isinstance(shard.get("subjects"), int)
                or pathlib.PurePath(shard["file"]).name != shard["file"]  # stays in this folder
            ):
                raise RecordError(
                    f"{path}: split {split!r} lists {shard!r}, "
                    'expected {"file": name in this folder, "subjects": count}'
                )
