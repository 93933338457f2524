"""Reading portraits: square images on a plain background, each with an identity file beside it.

    alice.png          the portrait; transparent parts become white
    alice.npy          its identity, float (512,), by the recogniser that the weights were trained with; or
    alice.json         {"id_embedding": [512 numbers]}, or {"no_identity": "why there is none"}
    alice.truth.png    optional, for rendered heads: known views in a row, their normals in a second
                       row; alice.json then holds "truth": [{"yaw": 45, "pitch": 0}, ...]

Every problem is an `InputError` that names the file and says what to do.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax import ID_EMBEDDING_SIZE, files, schema
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import assets, face_resnet, images

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TRUTH_SUFFIX = ".truth.png"
VIEW_SET = "views.json"
MAX_IDENTITY_BYTES = 1 << 20

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Truth:
    """Known views of the head: angles (n, 2); images and normals (n, S, S, 3) uint8."""

    angles: np.ndarray
    images: np.ndarray
    normals: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Portrait:
    """One input: image (S, S, 3) float32 in [-1, 1] on white, id_embedding (512,) unit float32."""

    name: str
    path: pathlib.Path
    image: np.ndarray
    id_embedding: np.ndarray
    truth: Truth | None


def find(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """The portraits and view sets among files and folders, in order of name.

    Of subfolders only those that are view sets themselves are looked at.

    Raises:
        InputError: when a folder holds none, or two of them have the same name.
    """
    found: list[pathlib.Path] = []
    for path in paths:
        if not path.is_dir() or is_view_set(path):
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if _is_portrait(p) or is_view_set(p))
        if not inside:
            raise InputError(
                f"{path}: no portraits in this folder; put {', '.join(IMAGE_SUFFIXES)} files there, "
                f"or folders with a {VIEW_SET}"
            )
        found += inside
    found = list(dict.fromkeys(found))
    names: dict[str, pathlib.Path] = {}
    for path in found:
        other = names.setdefault(name_of(path), path)
        if other != path:
            raise InputError(
                f"{path}: would be written to the same folder as {other}; rename one of them"
            )
    return found


def name_of(path: pathlib.Path) -> str:
    """Of the folder that an input's result is written to; of "." the folder's own name."""
    path = pathlib.Path(os.path.abspath(path))
    return path.name if path.is_dir() else path.stem


def is_view_set(path: pathlib.Path) -> bool:
    """Whether this folder holds several views of one person, see `requests`."""
    return (path / VIEW_SET).is_file()


def _is_portrait(path: pathlib.Path) -> bool:
    return (
        images.is_picture_name(path)
        and not path.name.lower().endswith(TRUTH_SUFFIX)
        and not path.is_dir()  # a broken link is an error
    )


def read(path: pathlib.Path, size: int) -> Portrait:
    """Portrait, identity and known views, if any.

    Args:
        size: pixels the model wants; larger squares are averaged down to it.

    Raises:
        InputError: see the module.
    """
    image = read_image(path, size)
    return Portrait(path.stem, path, image, read_identity(path), read_truth(path, size))


def read_image(image: ImageLike, size: int) -> np.ndarray:
    """(size, size, 3) float32 in [-1, 1], composited on white, averaged over pixel areas.

    Args:
        image: a file, a PIL image, or an array: uint8 (H, H, 3 or 4), or float (H, H, 3) in [-1, 1].

    Raises:
        InputError: no such image, not a square, or smaller than `size`.
    """
    name, rgba = "image", image
    if isinstance(image, (str, os.PathLike)):
        name, rgba = str(image), _open(pathlib.Path(image))
    elif isinstance(image, Image.Image):
        rgba = np.asarray(image.convert("RGBA"), np.float32) / 255.0
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
        rgba = image.astype(np.float32) / 255.0
    elif isinstance(image, np.ndarray) and image.dtype.kind == "f":
        if not (np.abs(image) <= 1.001).all():
            raise InputError("image: floating-point values must be in [-1, 1]")
        rgba = 0.5 * (image + 1.0)
    if np.ndim(rgba) != 3 or rgba.shape[2] not in (3, 4):
        raise InputError(f"{name}: expected (H, H, 3) or (H, H, 4), got {np.shape(rgba)}")
    height, width = rgba.shape[:2]
    if height != width:
        raise InputError(f"{name}: {width} x {height} pixels; crop it to a square around the head")
    if height < size:
        raise InputError(
            f"{name}: {width} x {height} pixels are too few; this model needs {size} x {size}"
        )
    rgb = rgba[..., :3]
    if rgba.shape[2] == 4:
        rgb = rgb * rgba[..., 3:] + 1.0 - rgba[..., 3:]
    return resized(2.0 * rgb - 1.0, size)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """(H, H, 3) float averaged over pixel areas to (size, size, 3) float32."""
    if len(image) == size:
        return image.astype(np.float32)
    planes = [Image.fromarray(np.ascontiguousarray(image[..., c], np.float32)) for c in range(3)]
    planes = [plane.resize((size, size), Image.Resampling.BOX) for plane in planes]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def read_identity(path: pathlib.Path) -> np.ndarray:
    """(512,) unit float32 of a portrait (its .npy, else its .json), or of such a file itself."""
    for candidate in (path.with_suffix(".npy"), path.with_suffix(".json")):
        if candidate.is_file() and (path.suffix.lower() in IMAGE_SUFFIXES or candidate == path):
            return _read_identity_file(candidate)
    if not path.exists():
        raise InputError(f"{path}: no such file; check the path")
    raise InputError(
        f"{path}: no identity beside it; put its vector (512 numbers) in "
        f'{path.stem}.npy, or in {path.stem}.json as {{"id_embedding": [...]}}'
    )


def identity_for(path: pathlib.Path, recogniser: str | None) -> np.ndarray:
    """`read_identity` for weights that were trained with a recogniser, given by its SHA-256.

    Args:
        recogniser: None where it is not known; then any identity is accepted that does not name another.

    Raises:
        InputError: there is none, or it is by another recogniser.
    """
    identity, by = read_identity(path), read_recognition(path)
    if by not in (None, recogniser):
        raise InputError(
            f"{path}: its identity is by another recogniser ({by[:12]}...) than the weights were trained "
            "with. Prepare the photo again with the right --front-end, or add --no-identity"
        )
    check_identity(identity, recogniser, str(path))
    return identity


def check_identity(identity: np.ndarray, recogniser: str | None, where: str) -> None:
    """Raises InputError if a (512,) vector cannot be by this recogniser; None knows nothing."""
    ours = recogniser == face_resnet.sha256()
    if recogniser and face_resnet.is_one(identity) != ours:
        reason = "with which these weights were trained"
        if not ours:
            reason = "but these weights were trained with another recogniser"
        raise InputError(
            f"{where}: its identity is {'not ' if ours else ''}a vector of {face_resnet.NAME} (128 "
            f"numbers, then zeros), {reason}. Delete it to compute it from the image, or add --no-identity"
        )


def recogniser_of(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Name and SHA-256 of the recogniser that weights were trained with; empty if it is not known."""
    if provenance.get("kind") == "released weights":
        return {"name": "ArcFace", "sha256": assets.RECOGNITION.sha256}
    known = provenance.get("recogniser")
    return known if isinstance(known, dict) else {}


def files_of(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """A portrait and what may be beside it."""
    return path, *(path.with_suffix(suffix) for suffix in (".npy", ".json", TRUTH_SUFFIX))


def has_identity(path: pathlib.Path) -> bool:
    """Whether there is an identity beside a portrait (perhaps a bad one); if not, it is a photo."""
    return any(path.with_suffix(suffix).is_file() for suffix in (".npy", ".json"))


def no_identity(path: pathlib.Path) -> str | None:
    """Why a portrait has no identity, if `photo` recorded that instead of one."""
    if path.with_suffix(".npy").is_file():
        return None
    try:
        about = schema.read(
            path.with_suffix(".json"), schema.record({"no_identity": schema.text()})
        )
    except (OSError, ValueError):  # no JSON, or none of ours
        return None
    return about["no_identity"] or None


def read_recognition(path: pathlib.Path) -> str | None:
    """SHA-256 of the recogniser of a portrait's identity, if `photo` recorded it."""
    if path.with_suffix(".npy").is_file():
        return None  # the identity is read from there, and it does not say
    try:
        about = schema.read(path.with_suffix(".json"), _RECOGNITION)
    except (OSError, ValueError):  # no JSON, or none of ours
        return None
    return about["recognition"]["sha256"]


_RECOGNITION = schema.record({"recognition": schema.record({"sha256": schema.text()})})


def _read_identity_file(path: pathlib.Path) -> np.ndarray:
    wanted = f"expected an identity of {ID_EMBEDDING_SIZE} finite numbers, not all zero"
    try:
        if path.suffix == ".npy":
            content = io.BytesIO(files.read_bytes(path, MAX_IDENTITY_BYTES))
            if not content.getvalue().startswith(b"\x93NUMPY"):  # numpy would advise to unpickle it
                raise ValueError("not a .npy file")
            values = np.load(content, allow_pickle=False)
        else:
            about = schema.read(
                path, schema.record({}, {"no_identity": schema.nullable(schema.text())})
            )
            if about.get("no_identity"):  # by spinmeround_jax.photo
                raise InputError(f"{path}: no identity in it: {about['no_identity']}")
            values = np.array(_IDENTITY(about, "")["id_embedding"], np.float64)
        if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
            raise ValueError("not an array of floating-point numbers")
        if values.shape != (ID_EMBEDDING_SIZE,):
            raise ValueError(f"its shape is {values.shape}")
        norm = float(np.linalg.norm(values.astype(np.float64)))
        if not np.isfinite(norm) or norm < 1e-6:
            raise ValueError(f"its length is {norm:g}")
    except InputError:
        raise
    except Exception as error:  # numpy, zip and JSON each have their own
        raise InputError(
            f"{path}: {wanted} ({_reason(error).removeprefix(f'{path}: ')})"
        ) from error
    return (values / norm).astype(np.float32)


_IDENTITY = schema.record(
    {"id_embedding": schema.array(schema.number(), ID_EMBEDDING_SIZE, ID_EMBEDDING_SIZE)}
)


def read_truth(path: pathlib.Path, size: int) -> Truth | None:
    """Known views of a rendered head, if they are beside its portrait.

    Raises:
        InputError: see the module.
    """
    sheet_path, json_path = path.with_suffix(TRUTH_SUFFIX), path.with_suffix(".json")
    if not sheet_path.is_file():
        return None
    wanted = f'{sheet_path}: the angles of its views belong in {json_path.name} as "truth": [...]'
    try:
        views = schema.read(json_path, _TRUTH)["truth"]
    except (OSError, ValueError) as error:
        raise InputError(f"{wanted} ({_reason(error)})") from error
    angles = np.array([(view["yaw"], view.get("pitch", 0.0)) for view in views], np.float32)
    sheet = np.rint(255.0 * _open(sheet_path)[..., :3]).astype(np.uint8)
    tile, rest = divmod(sheet.shape[1], len(angles))
    if rest or sheet.shape[0] not in (tile, 2 * tile):
        raise InputError(
            f"{sheet_path}: {sheet.shape[1]} x {sheet.shape[0]} pixels are not one or two rows of "
            f"{len(angles)} square views"
        )
    tiles = sheet.reshape(-1, tile, len(angles), tile, 3).swapaxes(1, 2)
    return Truth(angles, tiles[0], tiles[1] if len(tiles) == 2 else None)


_ANGLE = schema.number(-1e6, 1e6)  # degrees
_TRUTH = schema.record(
    {"truth": schema.array(schema.record({"yaw": _ANGLE}, {"pitch": _ANGLE}), 1, 1000)}
)


def _open(path: pathlib.Path) -> np.ndarray:
    """(h, w, 4) float32 in [0, 1], straight alpha."""
    if path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"{path}: not one of {', '.join(IMAGE_SUFFIXES)}; convert it")
    return images.read(path).pixels.astype(np.float32) / 255.0


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error} in it"
    return " ".join(str(error).split()) or type(error).__name__
