"""Folders of views, as `sample`, `data_prep.captures`, nerfstudio or another method leaves them.

A head is a folder with transforms.json (nerfstudio's convention: camera-to-world, OpenGL; optional per
frame normals_file_path and mask_path), or with pictures alone, in it or in its views/ or images/. Many
heads are a folder of such folders.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax import cameras
from spinmeround_jax.photo import images

SAME_CAMERA = 1.0  # degrees between two cameras that show the same view
TRANSFORMS = "transforms.json"


class FolderError(ValueError):
    """A folder cannot be used; the message names the file and says what to do."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A view on disk. name: its file's, without suffix. focal: in image widths.

    world_to_camera: (4, 4) OpenGL, or None where nobody says. normals_space: "world" or "camera".
    """

    name: str
    image: pathlib.Path
    normals: pathlib.Path | None = None
    mask: pathlib.Path | None = None
    world_to_camera: np.ndarray | None = None
    focal: float = cameras.FOCAL
    normals_space: str = "world"


def find_heads(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Folders of heads by name; one head has the name "".

    Raises:
        FolderError: there are none.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder; check the path")
    if (folder / TRANSFORMS).is_file() or _pictures(folder):
        return {"": folder}
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    heads = {p.name: p for p in inside if (p / TRANSFORMS).is_file() or _pictures(p)}
    if not heads:
        raise FolderError(f"{folder}: no views in it: neither {TRANSFORMS} nor pictures")
    return heads


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    for place in (folder, folder / "views", folder / "images"):
        found = sorted(place.glob("*")) if place.is_dir() else []
        found = [p for p in found if images.is_picture_name(p) and not p.name.startswith(".")]
        if found and place == folder and len(found) < 2:
            continue  # one picture beside a folder of views is an input
        if found:
            return found
    return []


def read_frames(folder: pathlib.Path) -> list[Frame]:
    """The views of one head.

    Raises:
        FolderError: naming what is wrong in transforms.json.
    """
    path = folder / TRANSFORMS
    if not path.is_file():
        return [Frame(p.stem, p) for p in _pictures(folder)]
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        frames = [_frame(folder, about, frame) for frame in about["frames"]]
        if not frames:
            raise ValueError("no frames")
        names = [frame.name for frame in frames]
        if len(set(names)) < len(names):
            raise ValueError("two frames have the same file name")
    except FolderError:
        raise
    except Exception as error:  # whatever stands there
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise FolderError(f"{path}: not nerfstudio's transforms ({reason})") from error
    return frames


def _frame(folder: pathlib.Path, about: dict[str, Any], frame: dict[str, Any]) -> Frame:
    def inside(key: str) -> pathlib.Path | None:
        if frame.get(key) is None:
            return None
        path = folder / frame[key]
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{frame[key]} is outside of the folder")
        return path

    pose = np.array(frame["transform_matrix"], np.float64)
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise ValueError("transform_matrix must be 4 x 4 finite numbers")
    rotation = pose[:3, :3]
    if abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3:
        raise ValueError("transform_matrix turns by no rotation")
    width = float(frame.get("w", about.get("w", 0.0)))
    focal = float(frame.get("fl_x", about.get("fl_x", cameras.FOCAL * width)))
    image = inside("file_path")
    if image is None:
        raise KeyError("file_path")
    space = about.get("normals_space", "world")
    if space not in ("world", "camera"):
        raise ValueError(f"normals_space must be world or camera, got {space!r}")
    return Frame(
        image.stem,
        image,
        inside("normals_file_path"),
        inside("mask_path"),
        np.linalg.inv(pose),
        focal / width if width > 0 else cameras.FOCAL,
        space,
    )


def matches(truth: list[Frame], made: list[Frame], by: str | None, where: str) -> list[int | None]:
    """For each true view the view that shows the same, or None.

    Args:
        by: "camera" or "name"; None takes cameras where both sides have them.
        where: the two folders, for messages.

    Raises:
        FolderError: not one belongs to another, or there are no cameras to go by.
    """
    known = all(frame.world_to_camera is not None for frame in [*truth, *made])
    if by == "camera" and not known:
        raise FolderError(f"{where}: no {TRANSFORMS} to match by; use --match name")
    if by == "name" or not known:
        names = {frame.name: i for i, frame in enumerate(made)}
        found = [names.get(frame.name) for frame in truth]
        hint = "no two files have the same name"
    else:
        turns = [np.stack([f.world_to_camera[:3, :3] for f in side]) for side in (truth, made)]
        cosine = (np.einsum("aij,bij->ab", *turns) - 1.0) / 2.0
        angle = np.rad2deg(np.arccos(np.clip(cosine, -1.0, 1.0)))
        found = [int(row.argmin()) if row.min() <= SAME_CAMERA else None for row in angle]
        hint = f"no two cameras are alike, the nearest {angle.min():.1f}° apart; try --match name"
    if all(i is None for i in found):
        raise FolderError(f"{where}: {hint}")
    return found


def load(frame: Frame, size: int | None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Image and normals (h, w, 3) float32 in [-1, 1], on white; and mask (h, w) bool.

    Normals are in the world's frame. The mask is the mask file's, the picture's transparency, or
    where there are normals; None if there is none of these.

    Args:
        size: to which height square pictures are brought; None leaves them.

    Raises:
        FolderError: a picture cannot be read, or is not square where a size is asked for.
    """
    rgba = _read(frame.image, size)
    alpha = rgba[..., 3:]
    image = 2.0 * (rgba[..., :3] * alpha + 1.0 - alpha) - 1.0
    normals = None
    if frame.normals is not None:
        normals = 2.0 * _read(frame.normals, size)[..., :3] - 1.0
        length = np.linalg.norm(normals, axis=-1, keepdims=True)
        normals = np.where(length < 0.5, 0.0, normals / np.maximum(length, 0.5))
        if frame.normals_space == "camera":
            normals = cameras.normals_to_world(normals, frame.world_to_camera)
    if frame.mask is not None:
        mask = _read(frame.mask, size)[..., :3].mean(-1) > 0.5
    elif alpha.min() < 1.0:
        mask = alpha[..., 0] > 0.5
    else:
        mask = None if normals is None else abs(normals).max(-1) > 0.0
    for other in (normals, mask):
        if other is not None and other.shape[:2] != image.shape[:2]:
            raise FolderError(f"{frame.image}: its normals or mask have another size")
    return image.astype(np.float32), normals, mask


def _read(path: pathlib.Path, size: int | None) -> np.ndarray:
    """(h, w, 4) float64 in [0, 1], straight alpha."""
    try:
        pixels = images.read(path).pixels
    except images.ImageError as error:
        raise FolderError(str(error)) from error
    if size is None or pixels.shape[:2] == (size, size):
        return pixels / 255.0
    if pixels.shape[0] != pixels.shape[1]:
        raise FolderError(
            f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels; --size wants squares"
        )
    # Premultiplied, so that what is transparent lends no colour.
    values = pixels / 255.0
    values[..., :3] *= values[..., 3:]
    shrinks = len(pixels) > size
    how = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    planes = [Image.fromarray(values[..., c].astype(np.float32)) for c in range(4)]
    values = np.stack([np.asarray(p.resize((size, size), how), np.float64) for p in planes], -1)
    values = np.clip(values, 0.0, 1.0)
    values[..., :3] /= np.maximum(values[..., 3:], 1e-6)
    return np.clip(values, 0.0, 1.0)
