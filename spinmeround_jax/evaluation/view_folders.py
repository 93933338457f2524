"""Folders of views, as `sample`, `data_prep.captures`, nerfstudio or another method leaves them.

A head is a folder with nerfstudio's transforms.json (see `results.transforms`), or with images alone, in it
or in its views/ or images/. Many heads are a folder of such folders.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
from PIL import Image

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import images
from spinmeround_jax.results import transforms
from spinmeround_jax.splats import scene

SAME_CAMERA = 1.0  # degrees between two cameras that show the same view


@dataclasses.dataclass(frozen=True)
class Frame:
    """A view on disk.

    name: its file's, without suffix. known: its cameras and other files, or None. to_y: (3, 3) rotation that
    brings the up of its world to y.
    """

    name: str
    image: pathlib.Path
    known: transforms.Frame | None = None
    to_y: np.ndarray = dataclasses.field(default_factory=lambda: np.eye(3))

    @property
    def world_to_camera(self) -> np.ndarray | None:
        """(4, 4) OpenGL, None where unknown."""
        return None if self.known is None else self.known.world_to_camera

    @property
    def yaw_pitch(self) -> tuple[float, float] | None:
        """In degrees as in `cameras.orbit`, in a world with y up; None if unknown."""
        if self.known is None:
            return None
        pose = np.array(self.world_to_camera, np.float64)
        pose[:3, :3] = pose[:3, :3] @ self.to_y.T
        yaw, pitch = cameras.yaw_pitch(pose)
        return float(yaw), float(pitch)

    @property
    def focal(self) -> float:
        """In image widths."""
        if self.known is None:
            return cameras.FOCAL
        return self.known.intrinsics.focal[0] / self.known.intrinsics.size[0]

    @property
    def has_normals(self) -> bool:
        return self.known is not None and self.known.normals is not None


def find_heads(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Folders of heads by name; one head has the name "".

    Raises:
        InputError: there are none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; check the path")
    if (folder / transforms.NAME).is_file() or _pictures(folder):
        return {"": folder}
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    heads = {p.name: p for p in inside if (p / transforms.NAME).is_file() or _pictures(p)}
    if not heads:
        raise InputError(f"{folder}: no views in it: neither {transforms.NAME} nor images")
    return heads


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    for place in (folder, folder / "views", folder / "images"):
        found = sorted(place.glob("*")) if place.is_dir() else []
        found = [p for p in found if images.is_picture_name(p) and not p.name.startswith(".")]
        if found and place == folder and len(found) < 2:
            continue  # one image beside a folder of views is an input
        if found:
            return found
    return []


def read_frames(folder: pathlib.Path) -> list[Frame]:
    """The views of one head.

    Raises:
        InputError: naming what is wrong in transforms.json.
    """
    if not (folder / transforms.NAME).is_file():
        pictures = _pictures(folder)
        names = transforms.unique_names(pictures)
        return [Frame(name, path) for name, path in zip(names, pictures, strict=True)]
    read = transforms.read(folder)
    read.refuse_distortion()
    names = transforms.unique_names([frame.image for frame in read.frames])
    to_y = _to_y(read)
    return [
        Frame(name, known.image, known, to_y)
        for name, known in zip(names, read.frames, strict=True)
    ]


def _to_y(read: transforms.Transforms) -> np.ndarray:
    """Rotation of the world to y up; none where up is neither said nor, by the cameras, one of the axes."""
    try:
        rotation, _ = scene.up_rotation(read, "auto")
    except InputError:
        return np.eye(3)
    is_axis = np.isclose(abs(rotation).max(axis=1), 1.0, atol=1e-6).all()
    return rotation if read.up is not None or is_axis else np.eye(3)


def matches(truth: list[Frame], made: list[Frame], by: str | None, where: str) -> list[int | None]:
    """For each true view the view that shows the same, or None.

    Args:
        by: "camera" or "name"; None takes cameras where both sides have them.
        where: the two folders, for messages.

    Raises:
        InputError: not one belongs to another, or there are no cameras to go by.
    """
    known = all(frame.world_to_camera is not None for frame in [*truth, *made])
    if by == "camera" and not known:
        raise InputError(f"{where}: no {transforms.NAME} to match by; use --match name")
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
        raise InputError(f"{where}: {hint}")
    return found


def load(frame: Frame, size: int | None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Image and normals (h, w, 3) float32 in [-1, 1], on white; and mask (h, w) bool.

    Normals are unit vectors in the world's frame. The mask is that of `transforms.read_mask`, else where
    there are normals; None if there is none of these.

    Args:
        size: to which height square images are brought; None leaves them.

    Raises:
        InputError: an image cannot be read, or is not square where a size is asked for.
    """
    orientation = frame.known.orientation if frame.known else 1
    picture = transforms.read_image(frame.image, orientation)
    mask = transforms.read_mask(picture, frame.known and frame.known.mask, orientation)
    rgba = _resized(frame.image, picture.pixels / 255.0, size)
    alpha = rgba[..., 3:]
    image = 2.0 * (rgba[..., :3] * alpha + 1.0 - alpha) - 1.0
    normals = transforms.read_normals(frame.known) if frame.known else None
    if normals is not None:
        normals = 2.0 * _plain_resized(frame.image, 0.5 * normals + 0.5, size) - 1.0
        length = np.linalg.norm(normals, axis=-1, keepdims=True)
        normals = np.where(length < 0.5, 0.0, normals / np.maximum(length, 0.5))
    if mask is not None:
        mask = _plain_resized(frame.image, mask[..., None], size)[..., 0] > 0.5
    elif normals is not None:
        mask = abs(normals).max(-1) > 0.0
    return image.astype(np.float32), normals, mask


def _resized(path: pathlib.Path, rgba: np.ndarray, size: int | None) -> np.ndarray:
    """(h, w, 4) in [0, 1] with straight alpha, brought to (size, size, 4)."""
    # Premultiplied, so that what is transparent lends no colour.
    alpha = _plain_resized(path, rgba[..., 3:], size)
    if alpha.shape[:2] == rgba.shape[:2]:
        return rgba
    colour = _plain_resized(path, rgba[..., :3] * rgba[..., 3:], size)
    return np.concatenate([np.clip(colour / np.maximum(alpha, 1e-6), 0.0, 1.0), alpha], -1)


def _plain_resized(path: pathlib.Path, values: np.ndarray, size: int | None) -> np.ndarray:
    """(h, w, c) in [0, 1], brought to (size, size, c) float64.

    Raises:
        InputError: not square, naming `path`.
    """
    if size is None or values.shape[:2] == (size, size):
        return values
    if values.shape[0] != values.shape[1]:
        raise InputError(
            f"{path}: {values.shape[1]} x {values.shape[0]} pixels; --size wants squares"
        )
    shrinks = len(values) > size
    how = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    planes = [Image.fromarray(plane) for plane in np.moveaxis(values, -1, 0).astype(np.float32)]
    resized = [np.asarray(plane.resize((size, size), how), np.float64) for plane in planes]
    return np.clip(np.stack(resized, -1), 0.0, 1.0)
