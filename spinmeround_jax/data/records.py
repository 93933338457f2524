"""One view of one subject as a `tf.train.Example`, without TensorFlow.

`docs/data_format.md` documents every field; `SCHEMA_VERSION` changes with them. All input is checked,
and every fault is an `InputError` that names the file and the record.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf import message
from PIL import Image

from spinmeround_jax import ID_EMBEDDING_SIZE, cameras
from spinmeround_jax.data import tfrecord
from spinmeround_jax.data.tfrecord import REPAIR
from spinmeround_jax.files import InputError
from spinmeround_jax.photo.images import encoded

SCHEMA_VERSION = 1

# How `encode_view` stores images; docs/data_format.md has the measurements behind these values.
COMPACT_FROM = 256  # pixels; smaller images are stored without loss
COLOUR_QUALITY = 90  # of lossy WebP: 42 to 44 dB
DISC_LEVELS = 42  # steps from the centre of the disc of normals to its rim: 0.95 degrees mean error
_DISC_RADIUS = 1.8  # 2 sin(angle / 2) of normals turned away from the viewer by up to 128 degrees


@dataclasses.dataclass(frozen=True)
class ViewRecord:
    """One rendered view of one subject.

    image: PNG or WebP, (size, size, 4) RGBA, 8 bits, straight alpha.
    normals: PNG or lossless WebP, RGB as of `encode_normals` or RGBA as of `encode_view`.
    world_to_camera: (4, 4) float32, see `cameras`; yaw and pitch are its angles in degrees.
    id_embedding: (512,) float32 face-recognition vector, unit length, the same in all views of a
        subject; 0 if unknown.
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


def encode_view(
    rgba: np.ndarray, normals: np.ndarray, world_to_camera: np.ndarray
) -> dict[str, bytes]:
    """`image` and `normals` of a ViewRecord: lossless below COMPACT_FROM pixels, else compact.

    Compact images are lossy WebP with exact alpha. Compact normals are lossless WebP of the direction in
    the camera's frame on a disc (Lambert's azimuthal projection: equal areas, so the same error
    everywhere): R = x and G = y around 128, or 0 where there is no normal; their length is the image's
    alpha. A is 255 or 0 accordingly: only this encoding has an alpha channel.

    Args:
        rgba: (size, size, 4) uint8, straight alpha.
        normals: (size, size, 3) float, world space, unit length times alpha, or 0 where unknown.
        world_to_camera: (4, 4).

    Raises:
        ValueError: malformed images, or normals of another length.
    """
    _check_pixels(rgba)
    _check_normals(normals)
    if rgba.shape[:2] != normals.shape[:2]:
        raise ValueError(f"image {rgba.shape} and normals {normals.shape} differ in size")
    alpha = rgba[..., 3]
    # WebP drops an alpha channel without transparent pixels, and readers need it (see above).
    if rgba.shape[0] < COMPACT_FROM or alpha.min() > 0:
        return {"image": encode_image(rgba), "normals": encode_normals(normals)}
    length = np.linalg.norm(normals, axis=-1)
    known = (length > 0) & (alpha > 0)
    wrong = known & (abs(length - alpha / 255.0) > 0.02)
    if wrong.any() or (length > 0.02)[alpha == 0].any():
        raise ValueError("normals must have the length of the image's alpha; or be 0, if unknown")
    pixels = np.zeros((*alpha.shape, 4), np.uint8)
    rotation = np.asarray(world_to_camera, np.float64)[:3, :3]
    pixels[known, :2] = _to_disc((normals[known] / length[known, None]) @ rotation.T)
    pixels[known, 3] = 255
    lossy = {"quality": COLOUR_QUALITY, "method": 4, "exact": True}
    return {
        "image": encoded(fill_transparent(rgba), "WEBP", **lossy),
        "normals": encoded(pixels, "WEBP", lossless=True, exact=True, quality=50),
    }


def encode_image(rgba: np.ndarray) -> bytes:
    """(size, size, 4) uint8 RGBA with straight alpha -> PNG bytes."""
    _check_pixels(rgba)
    return encoded(rgba, "PNG")


def encode_normals(normals: np.ndarray) -> bytes:
    """(size, size, 3) float world-space normals, 0 on the background -> PNG bytes.

    byte = round(127 n) + 128: the paper's 255 (n + 1) / 2 to within 1.5 levels, but with the
    background at exactly 128; the paper's formula puts zero between two levels.
    """
    _check_normals(normals)
    return encoded((np.rint(np.clip(normals, -1, 1) * 127.0) + 128.0).astype(np.uint8), "PNG")


def fill_transparent(rgba: np.ndarray) -> np.ndarray:
    """(s, s, 4) uint8 whose colours under alpha 0 continue the nearest opaque ones smoothly.

    A step at the silhouette would cost bits and ring into the soft edge. Transparent pixels take the
    average of the smallest square around them that has opaque ones (an image pyramid).
    """
    weight = (rgba[..., 3:] / np.float32(255.0)).astype(np.float32)
    levels = [(rgba[..., :3] * weight, weight)]
    while min(levels[-1][1].shape[:2]) > 1:
        sums = [_halve(array) for array in levels[-1]]
        levels.append(tuple(array / np.maximum(sums[1], 1.0) for array in sums))
    filled = np.zeros((1, 1, 3), np.float32)
    for colour, weight in reversed(levels):
        height, width = weight.shape[:2]
        filled = filled.repeat(2, 0).repeat(2, 1)[:height, :width]
        filled = np.where(weight > 0, colour / np.maximum(weight, 1e-6), filled)
    result = rgba.copy()
    hidden = rgba[..., 3] == 0
    result[hidden, :3] = np.rint(filled[hidden])
    return result


def _halve(array: np.ndarray) -> np.ndarray:
    """(h, w, c) -> sums over squares of 2 x 2; odd sides are continued with zeros."""
    height, width, channels = array.shape
    array = np.pad(array, ((0, height % 2), (0, width % 2), (0, 0)))
    return array.reshape(-(-height // 2), 2, -(-width // 2), 2, channels).sum((1, 3))


def _to_disc(directions: np.ndarray) -> np.ndarray:
    """(n, 3) unit vectors in the camera's frame -> (n, 2) uint8, see `encode_view`."""
    point = directions[:, :2] * np.sqrt(2.0 / np.maximum(1.0 + directions[:, 2:], 1e-6))
    point *= np.minimum(1.0, _DISC_RADIUS / np.maximum(np.linalg.norm(point, axis=1), 1e-6))[
        :, None
    ]
    return (np.rint(point * (DISC_LEVELS / _DISC_RADIUS)) + 128.0).astype(np.uint8)


@functools.cache
def disc() -> np.ndarray:
    """(65536, 3) float32 unit vectors in the camera's frame; row R + 256 G."""
    green, red = np.mgrid[:256, :256].reshape(2, -1) - 128.0
    point = np.stack([red, green], axis=1) * (_DISC_RADIUS / DISC_LEVELS)
    square = (point**2).sum(1, keepdims=True)
    point *= np.minimum(1.0, 2.0 / np.sqrt(np.maximum(square, 1e-12)))  # values outside the disc
    square = np.minimum(square, 4.0)
    vectors = np.concatenate([point * np.sqrt(1.0 - square / 4.0), 1.0 - square / 2.0], axis=1)
    return vectors.astype(np.float32)


def _check_pixels(rgba: np.ndarray) -> None:
    if rgba.dtype != np.uint8 or rgba.ndim != 3 or rgba.shape[2] != 4:
        raise ValueError(f"expected (size, size, 4) uint8, got {rgba.shape} {rgba.dtype}")


def _check_normals(normals: np.ndarray) -> None:
    if normals.ndim != 3 or normals.shape[2] != 3 or not np.isfinite(normals).all():
        raise ValueError(f"expected finite (size, size, 3) normals, got shape {normals.shape}")
    if abs(normals).max(initial=0.0) > 1.001:
        raise ValueError(f"normals exceed 1 in magnitude: {abs(normals).max()}")


def decode_view(
    record: ViewRecord,
    size: int,
    where: str,
    normals: np.ndarray | None = None,
    frame: cameras.Frame = "world",
) -> tuple[np.ndarray, np.ndarray]:
    """Image and normals of a record in either encoding.

    Args:
        normals: (size, size, 3) float32 contiguous array to fill and return.
        frame: of the normals returned: the head's, in which they are stored, or the view's camera.

    Returns:
        (size, size, 4) uint8 RGBA with straight alpha, and (size, size, 3) float32 normals of at most
        unit length, 0 on the background.

    Raises:
        InputError: naming `where`, if an image cannot be decoded or has another size.
    """
    rgba = decode_image(record.image, size, where)
    stored = _decode(record.normals, size, ("RGB", "RGBA"), where)
    if normals is None:
        normals = np.empty((size, size, 3), np.float32)
    if stored.shape[2] == 3:
        found = _components(stored)
        if frame == "camera":
            found = cameras.normals_to_camera(found, record.world_to_camera)
        normals[...] = found
        return rgba, normals
    # One look-up per pixel by R + 256 G, in a table of the vectors in `frame`.
    turn = np.eye(3) if frame == "camera" else np.asarray(record.world_to_camera)[:3, :3]
    table = disc() @ turn.astype(np.float32)
    table[0] = 0.0  # no normal
    codes = stored.reshape(-1, 4).view("<u2")[:, 0].astype(np.intp)
    vectors = normals.reshape(-1, 3)
    np.take(table, codes, axis=0, out=vectors, mode="clip")
    alpha = rgba[..., 3].ravel()
    soft = np.flatnonzero((alpha < 255) & (codes > 0))  # the silhouette
    vectors[soft] *= alpha[soft, None] * np.float32(1.0 / 255.0)
    return rgba, normals


def decode_image(encoded: bytes, size: int, where: str) -> np.ndarray:
    """(size, size, 4) uint8 RGBA of `ViewRecord.image`; InputError naming `where` if it is not."""
    return _decode(encoded, size, ("RGBA",), where)


def decode_normals(encoded: bytes, size: int, where: str) -> np.ndarray:
    """(size, size, 3) float32 normals as `encode_normals` stores them: 0 on the background."""
    return _components(_decode(encoded, size, ("RGB",), where))


def _components(stored: np.ndarray) -> np.ndarray:
    planes = np.moveaxis(stored, -1, 0).astype(np.float32, order="C")
    planes -= 128.0
    planes /= 127.0
    # Rounding can lengthen a unit vector by 1 %; shorter vectors (soft edges) are kept.
    planes /= np.maximum(np.sqrt((planes * planes).sum(0)), 1.0)
    return np.moveaxis(planes, 0, -1)


def _decode(encoded: bytes, size: int, modes: tuple[str, ...], where: str) -> np.ndarray:
    try:
        # The size is in the header, so that an image of 60000 x 60000 is refused before decoding.
        with Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")) as image:
            if image.size != (size, size) or image.mode not in modes:
                raise InputError(
                    f"{where}: {image.mode} image of {image.size[0]}x{image.size[1]}, "
                    f"expected {' or '.join(modes)} {size}x{size}; {REPAIR}"
                )
            return np.array(image)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, ...
        raise InputError(f"{where}: undecodable image ({error}); {REPAIR}") from error


def header_of(encoded: bytes, where: str) -> tuple[int, int, str]:
    """Width, height and Pillow's mode of a PNG or WebP image; ValueError naming `where` if it is not."""
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")) as image:
            return *image.size, image.mode
    except Exception as error:
        raise ValueError(f"{where}: not a PNG or WebP image ({error})") from error


def image_size_of(encoded: bytes, modes: tuple[str, ...], where: str) -> int:
    """Pixels of a square PNG or WebP image of one of Pillow's `modes`, from its header.

    Raises:
        ValueError: naming `where`, if it is something else.
    """
    width, height, mode = header_of(encoded, where)
    if width != height or mode not in modes:
        raise ValueError(
            f"{where}: {mode} {width}x{height}, expected a square {' or '.join(modes)} image"
        )
    return width


# --------------------------------------------------------------------------------------------------
# tf.train.Example


def serialize(record: ViewRecord) -> bytes:
    """The bytes of a tf.train.Example; equal records give equal bytes."""
    example = tfrecord.example_class()()
    feature = example.features.feature
    for name, kind, values in (
        ("schema_version", "int64_list", [SCHEMA_VERSION]),
        ("subject", "bytes_list", [record.subject.encode()]),
        ("view", "int64_list", [record.view]),
        ("image", "bytes_list", [record.image]),
        ("normals", "bytes_list", [record.normals]),
        ("world_to_camera", "float_list", np.ravel(record.world_to_camera).tolist()),
        ("yaw", "float_list", [record.yaw]),
        ("pitch", "float_list", [record.pitch]),
        ("id_embedding", "float_list", np.ravel(record.id_embedding).tolist()),
        ("source", "bytes_list", [record.source.encode()]),
        ("license", "bytes_list", [record.license.encode()]),
    ):
        getattr(feature[name], kind).value.extend(values)
    return example.SerializeToString(deterministic=True)


def parse(data: bytes, where: str) -> ViewRecord:
    """The record in `data`; InputError naming `where` if it is not one of this version."""
    try:
        feature = tfrecord.example_class().FromString(data).features.feature
    except message.DecodeError as error:
        raise InputError(f"{where}: not a tf.train.Example ({error}); {REPAIR}") from error

    def values(name: str, kind: str, count: int) -> Sequence[Any]:
        if name not in feature:
            raise InputError(f"{where}: field {name!r} is missing; {REPAIR}")
        found = feature[name].WhichOneof("kind")
        items = getattr(feature[name], kind).value
        if found != kind or len(items) != count:
            raise InputError(
                f"{where}: field {name!r} holds {len(items)} values of {found}, "
                f"expected {count} of {kind}; {REPAIR}"
            )
        return items

    def floats(name: str, count: int) -> np.ndarray:
        array = np.array(values(name, "float_list", count), np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"{where}: field {name!r} is not finite; {REPAIR}")
        return array

    def text(name: str) -> str:
        try:
            return values(name, "bytes_list", 1)[0].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: field {name!r} is not UTF-8; {REPAIR}") from error

    version = values("schema_version", "int64_list", 1)[0]
    if version != SCHEMA_VERSION:
        raise InputError(version_message(where, version))
    id_embedding = floats("id_embedding", ID_EMBEDDING_SIZE)
    if not is_identity(id_embedding):
        raise InputError(f"{where}: id_embedding is neither of unit length nor 0; {REPAIR}")
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


def is_identity(id_embedding: np.ndarray) -> bool:
    """Whether it is (ID_EMBEDDING_SIZE,) of unit length, or 0: no identity."""
    if id_embedding.shape != (ID_EMBEDDING_SIZE,):
        return False
    return not id_embedding.any() or bool(abs(np.linalg.norm(id_embedding) - 1.0) < 1e-3)


def version_message(where: str, version: Any) -> str:
    """The message about data with another schema version."""
    return (
        f"{where}: schema version {version!r}, this code reads version {SCHEMA_VERSION}; "
        "write the data again with this version's data_prep, or use the code that wrote it"
    )
