"""One view of one subject as a `tf.train.Example`, without TensorFlow: the storage schema.

`shards` puts records into files, `docs/data_format.md` documents every field; `SCHEMA_VERSION`
changes with it. Everything read is checked and every fault is a `RecordError` that names file and
record: a bad disk costs a message, never a hang or a wrong picture.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf import message
from PIL import Image

from spinmeround_jax import tfrecord
from spinmeround_jax.tfrecord import REPAIR, RecordError

SCHEMA_VERSION = 1
ID_EMBEDDING_SIZE = 512


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


def image_size_of(encoded: bytes, mode: str, where: str) -> int:
    """Pixels of a square PNG or WebP image of Pillow's `mode`, from its header; else ValueError."""
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


def serialize(record: ViewRecord) -> bytes:
    """The bytes of a tf.train.Example, the same for the same record."""
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
    return example.SerializeToString(deterministic=True)


def parse(data: bytes, where: str) -> ViewRecord:
    """The record in `data`; RecordError naming `where` if it is not one of this version."""
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
        raise RecordError(version_message(where, version))
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


def version_message(where: str, version: Any) -> str:
    """What to tell of data with another schema version."""
    return (
        f"{where}: schema version {version!r}, this code reads version {SCHEMA_VERSION}; "
        "write the data again with this version's data_prep, or use the code that wrote it"
    )
