"""nerfstudio's transforms.json and its images: the one reader and writer.

Poses are camera-to-world matrices of OpenGL cameras (`cameras.py`); intrinsics are in pixels of the stored
image, before its EXIF orientation is applied. Reading checks everything that the images' headers allow.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from spinmeround_jax import schema
from spinmeround_jax.files import InputError, explain, named
from spinmeround_jax.photo import images

NAME = "transforms.json"
UP = (0.0, 1.0, 0.0)  # of the worlds that `write` writes
_SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG", ".JPEG", ".WEBP")
_LENSES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
_DISTORTION = ("k1", "k2", "p1", "p2")
_HIGHER_DISTORTION = ("k3", "k4", "k5", "k6")
_FARTHEST = 1e9  # distance of a camera; beyond, float64 cannot resolve pixels
_MATRIX = schema.array(schema.array(schema.number(), 4, 4), 3, 4)
_DOCUMENT = schema.record(
    {
        "frames": schema.array(
            schema.record({"file_path": schema.text(), "transform_matrix": _MATRIX}), 1
        )
    },
    {
        "up": schema.nullable(schema.array(schema.number(), 3, 3)),
        "applied_transform": schema.nullable(_MATRIX),
    },
)
_NEAR_ONE = 1e-3  # tolerance of the singular values of rounded rotations


@dataclasses.dataclass(frozen=True)
class Intrinsics:
    """Pinhole camera with OpenCV's distortion; pixel centres are at +0.5.

    focal, centre: x and y in pixels. size: width and height. distortion: k1, k2, p1, p2.
    """

    focal: tuple[float, float]
    centre: tuple[float, float]
    size: tuple[int, int]
    distortion: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Frame:
    """A view on disk.

    file_path: as in transforms.json. mask: bright on the subject. world_to_camera: (4, 4) float64.
    orientation: EXIF orientation of the image if its camera describes the stored pixels, else 1; image, mask
        and normals are read accordingly, see `read_image`.
    """

    file_path: str
    image: pathlib.Path
    mask: pathlib.Path | None
    normals: pathlib.Path | None
    normals_space: Literal["world", "camera"]
    world_to_camera: np.ndarray
    intrinsics: Intrinsics
    orientation: int


@dataclasses.dataclass(frozen=True)
class Transforms:
    """Content of a file.

    up: unit vector in the world, None if unknown. applied_transform: (4, 4) from the coordinates of the
    original data to the file's world, as nerfstudio records it.
    """

    path: pathlib.Path
    frames: tuple[Frame, ...]
    up: np.ndarray | None
    applied_transform: np.ndarray

    def refuse_distortion(self) -> None:
        """Raise InputError if a lens has distortion."""
        for frame in self.frames:
            if any(frame.intrinsics.distortion):
                named = dict(zip(_DISTORTION, frame.intrinsics.distortion, strict=True))
                terms = ", ".join(f"{name} {value:g}" for name, value in named.items() if value)
                raise InputError(
                    f"{self.path}: {frame.file_path} has a lens with distortion ({terms}); undistort the "
                    "images, for example with colmap image_undistorter"
                )


# --------------------------------------------------------------------------------------------------
# Reading the file


def read(path: pathlib.Path) -> Transforms:
    """Read transforms.json, or that of a folder.

    Names without suffix mean the PNG, JPEG or WebP image of that name. Missing principal points are in the
    middle. `fit_to_image` handles a width and height that differ from the image's.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    if path.is_dir():
        path = path / NAME
    document = read_json(path, _DOCUMENT)
    entries = [{**document, **entry} for entry in document["frames"]]
    files = [find_file(path, entry["file_path"], _SUFFIXES) for entry in entries]
    times = collections.Counter(file.resolve() for file in files)
    if twice := [file for file, n in times.items() if n > 1]:
        raise InputError(
            f"{path}: names {twice[0].name} twice; every frame needs an image of its own"
        )
    frames = tuple(_frame(path, *both) for both in zip(entries, files, strict=True))
    up, applied = document.get("up"), np.eye(4)
    if up is not None:
        if np.linalg.norm(up) < 1e-6:
            raise InputError(f"{path}: up is {up}; expected a direction")
        up = np.array(up) / np.linalg.norm(up)
    if document.get("applied_transform") is not None:
        applied = _square(document["applied_transform"])
    return Transforms(path, frames, up, applied)


def read_json(path: pathlib.Path, kind: schema.Kind) -> Any:
    """As `schema.read`, raising InputError."""
    try:
        return schema.read(path, kind)
    except OSError as error:
        raise InputError(explain(error)) from error
    except ValueError as error:
        raise InputError(str(error)) from error


def checked(kind: schema.Kind, value: Any, where: str) -> Any:
    """The value, if it is of this kind; else InputError that begins with `where`."""
    try:
        return kind(value, where)
    except ValueError as error:
        raise InputError(str(error)) from error


def find_file(path: pathlib.Path, name: Any, suffixes: Sequence[str] = ("",)) -> pathlib.Path:
    """The file that the JSON file `path` names; it must be in the same folder or below.

    Backslashes separate folders unless a file has them in its name.

    Args:
        suffixes: tried after the name, in this order.

    Raises:
        InputError: not a name, outside of the folder (also through links), or no such file.
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: {name!r} is not a file name; a frame needs file_path")
    try:
        folder = path.parent.resolve()
        for written in dict.fromkeys((name, name.replace("\\", "/"))):
            if not (folder / written).resolve().is_relative_to(folder):
                raise InputError(
                    f"{path}: {name!r} is outside of {folder}; images must be in the same folder or below"
                )
            for suffix in suffixes:
                found = named(path.parent, written + suffix)
                if found.is_file() and found.resolve().is_relative_to(folder):
                    return found
        raise InputError(f"{path.parent / name}: no such file, but {path} names it")
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # NUL, surrogates, length, link loops
        raise InputError(f"{path}: {name!r} is not a file name ({error})") from error


def _frame(path: pathlib.Path, entry: Mapping[str, Any], file: pathlib.Path) -> Frame:
    where = f"{path}: {entry['file_path']}"
    space = entry.get("normals_space", "world")
    if space not in ("world", "camera"):
        raise InputError(f"{where}: normals_space {space!r}; expected world or camera")
    others = [
        None if entry.get(key) is None else find_file(path, entry[key], _SUFFIXES)
        for key in ("mask_path", "normals_file_path")
    ]
    intrinsics, orientation = read_intrinsics(entry, file, where)
    return Frame(
        entry["file_path"],
        file,
        *others,
        space,
        invert_pose(_square(entry["transform_matrix"]), where),
        intrinsics,
        orientation,
    )


def read_intrinsics(
    entry: Mapping[str, Any], file: pathlib.Path, where: str
) -> tuple[Intrinsics, int]:
    """Intrinsics in pixels of the image `file`, and `Frame.orientation`.

    Args:
        entry: nerfstudio's keys: fl_x or camera_angle_x; optionally fl_y or camera_angle_y, cx, cy, w, h,
            camera_model, k1, k2, p1, p2.
        where: file and frame, for messages.

    Raises:
        InputError: an impossible number, an unsupported lens, an image of another shape.
    """
    header = images.read_header(file)
    stored = header.size
    given = [_number(entry, key, where, 16, 1e6) for key in ("w", "h")]
    width, height = (n if n is not None else size for n, size in zip(given, stored, strict=True))
    focal_x = _focal(entry, "x", width, where)
    if focal_x is None:
        raise InputError(f"{where}: neither fl_x nor camera_angle_x; the focal length is needed")
    focal_y = _focal(entry, "y", height, where) or focal_x
    centre = []
    for key, side, known in zip(("cx", "cy"), (width, height), given, strict=True):
        value = _number(entry, key, where, -side, 2 * side)
        if value is not None and known is None and not 0.25 * side < value < 0.75 * side:
            raise InputError(
                f"{where}: {key} {value:g} is far from the middle of {stored[0]} x {stored[1]} pixels; if "
                "the camera is that of larger or smaller images, give their size as w and h"
            )
        centre.append(side / 2 if value is None else value)
    intrinsics = Intrinsics(
        (focal_x, focal_y), tuple(centre), (width, height), _distortion(entry, where)
    )
    return fit_to_image(intrinsics, header, str(file))


def fit_to_image(
    intrinsics: Intrinsics, header: images.Header, where: str
) -> tuple[Intrinsics, int]:
    """Intrinsics of an image of `intrinsics.size` -> those of this image's pixels, and `Frame.orientation`.

    COLMAP and nerfstudio calibrate the stored pixels; a camera whose shape is that of the upright image only
    describes the upright image. Intrinsics are scaled if the image has another size of the same shape.

    Raises:
        InputError: the image has another shape.
    """
    width, height = intrinsics.size

    def difference(size: tuple[int, int]) -> float:
        return abs(size[0] / width - size[1] / height)

    ways = (header.size, header.orientation), (header.upright_size, 1)
    size, orientation = min(ways, key=lambda way: difference(way[0]))  # the stored one if equal
    if difference(size) >= 1 / width + 1 / height:  # sides are rounded to whole pixels
        raise InputError(
            f"{where}: {header.size[0]} x {header.size[1]} pixels, but its camera describes an image of "
            f"{width:g} x {height:g}; give the calibrated images, not cropped"
        )
    scale = size[0] / width, size[1] / height
    focal, centre = (
        tuple(s * x for s, x in zip(scale, pair, strict=True))
        for pair in (intrinsics.focal, intrinsics.centre)
    )
    return Intrinsics(focal, centre, size, intrinsics.distortion), orientation


def invert_pose(pose: np.ndarray, where: str) -> np.ndarray:
    """Inverse of a (4, 4) rigid pose, its rotation made orthonormal.

    Raises:
        InputError: not a rotation and a translation, or too far from the origin.
    """
    left, stretch, right = np.linalg.svd(pose[:3, :3])
    rotation = left @ right
    rigid = abs(stretch - 1.0).max() < _NEAR_ONE and np.linalg.det(rotation) > 0
    if not rigid or abs(pose[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise InputError(f"{where}: its pose is not a rotation and a translation")
    if abs(pose[:3, 3]).max() > _FARTHEST:
        raise InputError(f"{where}: a camera at {pose[:3, 3].tolist()} is too far from the origin")
    inverse = np.eye(4)
    inverse[:3, :3] = rotation.T
    inverse[:3, 3] = -rotation.T @ pose[:3, 3]
    return inverse


def _square(rows: list[list[float]]) -> np.ndarray:
    """(4, 4) from a matrix whose last row may be missing."""
    return np.array([*rows, [0.0, 0.0, 0.0, 1.0]][:4])


def _number(
    entry: Mapping[str, Any], key: str, where: str, low: float = -1e6, high: float = 1e6
) -> float | None:
    """A number from `low` to `high`, or None if missing."""
    kind = schema.nullable(schema.number(low, high))
    return checked(kind, entry.get(key), f"{where}: {key}")


def _focal(entry: Mapping[str, Any], axis: str, side: float, where: str) -> float | None:
    focal = _number(entry, f"fl_{axis}", where, side / 100, side * 100)
    if focal is None:
        angle = _number(entry, f"camera_angle_{axis}", where, 0.01, math.pi - 0.01)
        focal = None if angle is None else 0.5 * side / math.tan(0.5 * angle)
    return focal


def _distortion(entry: Mapping[str, Any], where: str) -> tuple[float, float, float, float]:
    """k1, k2, p1, p2; InputError for lenses with other terms."""
    if entry.get("distortion_params") is not None:  # nerfstudio's other notation
        six = schema.array(schema.number(), 6, 6)
        values = checked(six, entry["distortion_params"], f"{where}: distortion_params")
        entry = {**entry, **dict(zip(("k1", "k2", "k3", "k4", "p1", "p2"), values, strict=True))}
    lens = entry.get("camera_model", "OPENCV")
    more = [key for key in _HIGHER_DISTORTION if _number(entry, key, where)]
    if lens not in _LENSES or more or entry.get("is_fisheye"):
        kind = " with ".join([str(lens)[:40], *more])
        raise InputError(
            f"{where}: a lens of kind {kind} is not supported; undistort the images, or calibrate as OPENCV"
        )
    return tuple(_number(entry, key, where) or 0.0 for key in _DISTORTION)


# --------------------------------------------------------------------------------------------------
# Reading the images


def read_image(file: pathlib.Path, orientation: int = 1) -> images.Picture:
    """The pixels that the camera describes: upright, or as stored if it has an `orientation`.

    Raises:
        InputError: see `photo.images`.
    """
    return images.read(file, upright=orientation == 1)


def read_mask(
    picture: images.Picture, file: pathlib.Path | None, orientation: int = 1
) -> np.ndarray | None:
    """(h, w) float32 in [0, 1], 1 on the subject: the mask file times the image's alpha; None without both.

    Alpha is used if more than stray pixels are transparent (`Picture.has_alpha`). A mask of another size but
    the same shape is resized.

    Raises:
        InputError: the mask is unreadable or has another shape.
    """
    alpha = picture.pixels[..., 3].astype(np.float32) / 255.0 if picture.has_alpha else None
    if file is None:
        return alpha
    pixels = read_image(file, orientation).pixels.astype(np.float32)
    mask = pixels[..., :3].mean(-1) * pixels[..., 3] / 255.0
    if mask.max() > 1.0:  # else labels 0 and 1, which nerfstudio and COLMAP also read
        mask /= 255.0
    height, width = picture.pixels.shape[:2]
    if mask.shape != (height, width):
        scale = width / mask.shape[1], height / mask.shape[0]
        if abs(scale[0] - scale[1]) >= 1 / mask.shape[1] + 1 / mask.shape[0]:
            raise InputError(
                f"{file}: {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}; make "
                "the mask from the same image"
            )
        shrinks = mask.shape[1] > width
        how = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
        mask = np.asarray(Image.fromarray(mask).resize((width, height), how))
    return mask if alpha is None else mask * alpha


def read_normals(frame: Frame) -> np.ndarray | None:
    """(h, w, 3) float32 in the world, length at most 1, 0 on the background; None without a map.

    Raises:
        InputError: the map is unreadable, or has another size than the image.
    """
    if frame.normals is None:
        return None
    pixels = read_image(frame.normals, frame.orientation).pixels[..., :3]
    if pixels.shape[1::-1] != frame.intrinsics.size:
        width, height = frame.intrinsics.size
        raise InputError(
            f"{frame.normals}: {pixels.shape[1]} x {pixels.shape[0]} pixels, its image {width} x {height}"
        )
    normals = without_grey(pixels.astype(np.float32) / np.float32(127.5) - 1.0)
    if frame.normals_space == "camera":
        normals = normals @ frame.world_to_camera[:3, :3].astype(np.float32)
    return normals


def without_grey(normals: np.ndarray) -> np.ndarray:
    """(..., 3) normals of length at most 1, and 0 where shorter than 1/2: the background.

    Normal maps decoded from latents are never exactly grey there.
    """
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.where(length > 0.5, normals / np.maximum(length, 1.0), 0.0)


def unique_names(paths: Sequence[pathlib.PurePath]) -> list[str]:
    """Names without suffix, made unique, also where file names ignore case.

    Files of one name in several folders (`cam3/0001.png`, `cam4/0001.png`) are prefixed by the parts of
    their folders that differ: `cam3_0001`, `cam4_0001`.
    """

    def ambiguous(names: list[str]) -> set[str]:
        return {name for name, n in collections.Counter(n.lower() for n in names).items() if n > 1}

    names = [path.stem for path in paths]
    clash = ambiguous(names)
    same = [path.parent.parts for path in paths if path.stem.lower() in clash]
    shared = 0
    while same and all(len(p) > shared and p[shared] == same[0][shared] for p in same):
        shared += 1
    names = [
        "_".join((*path.parent.parts[shared:], name)) if name.lower() in clash else name
        for path, name in zip(paths, names, strict=True)
    ]
    clash = ambiguous(names)
    return [f"{i:03d}_{n}" if n.lower() in clash else n for i, n in enumerate(names)]


# --------------------------------------------------------------------------------------------------
# Writing


@dataclasses.dataclass(frozen=True)
class View:
    """A view to write: file paths relative to transforms.json, camera, and more entries of the frame."""

    file_path: str
    world_to_camera: np.ndarray
    intrinsics: Intrinsics
    normals_file_path: str | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write(path: pathlib.Path, views: Sequence[View], **document: Any) -> None:
    """Write transforms.json of views without distortion in a world with y up.

    Intrinsics shared by all views are written once, others in each frame.

    Args:
        document: further entries of the file, such as normals_space.
    """
    cameras = []
    for view in views:
        (focal_x, focal_y), (x, y) = view.intrinsics.focal, view.intrinsics.centre
        width, height = view.intrinsics.size
        cameras.append(
            {"fl_x": focal_x, "fl_y": focal_y, "cx": x, "cy": y, "w": int(width), "h": int(height)}
        )
    shared = {
        key: value for key, value in cameras[0].items() if all(c[key] == value for c in cameras)
    }
    frames = []
    for view, camera in zip(views, cameras, strict=True):
        pose = invert_pose(np.asarray(view.world_to_camera, np.float64), view.file_path)
        normals = {"normals_file_path": view.normals_file_path} if view.normals_file_path else {}
        own = {key: value for key, value in camera.items() if key not in shared}
        frames.append(
            {
                "file_path": view.file_path,
                **normals,
                "transform_matrix": (pose + 0.0).tolist(),  # + 0.0: no minus zero
                **own,
                **view.details,
            }
        )
    about = {"camera_model": "OPENCV", **shared, "up": list(UP), **document, "frames": frames}
    path.write_text(json.dumps(about, indent=1, ensure_ascii=True) + "\n")
