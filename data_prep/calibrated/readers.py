"""Folders of calibrated photographs of one person, in four layouts, become `Photo`s.

    cameras.json                              ours, see docs/data_factory.md
    transforms.json                           nerfstudio's (and Blender's)
    sparse/0/ or the folder itself            COLMAP's cameras, images, points3D; .bin or .txt
    calibration/camera_params.json or camera_params.json, sequences/...     NeRSemble's

Which one it is is seen from the files. Every fault is a `CaptureError` that names the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax.photo import images

_DISTORTION = ("k1", "k2", "p1", "p2")
_NERSEMBLE_WIDTH = 2200  # pixels, of the images that NeRSemble's intrinsics belong to
_GL_TO_CV = np.diag([1.0, -1.0, -1.0, 1.0])


class CaptureError(ValueError):
    """A capture cannot be used; the message names the file and says what to do."""


@dataclasses.dataclass(frozen=True)
class Photo:
    """A calibrated photograph.

    mask: a picture, bright where the person is; None: the photo's own transparency, if any.
    world_to_camera: (4, 4) float64, OpenCV's camera (x right, y down, looking along +z), any world.
    focal, centre: (2,) pixels, x and y; pixel centres at +0.5. distortion: (4,) k1, k2, p1, p2.
    """

    path: pathlib.Path
    mask: pathlib.Path | None
    world_to_camera: np.ndarray
    focal: np.ndarray
    centre: np.ndarray
    distortion: np.ndarray

    @property
    def position(self) -> np.ndarray:
        """(3,) of the camera in the world."""
        return -self.world_to_camera[:3, :3].T @ self.world_to_camera[:3, 3]

    def project(self, points: np.ndarray) -> np.ndarray:
        """(n, 3) world points -> (n, 2) pixels; NaN behind the camera."""
        seen = points @ self.world_to_camera[:3, :3].T + self.world_to_camera[:3, 3]
        return self.pixels(seen)

    def pixels(self, seen: np.ndarray) -> np.ndarray:
        """(..., 3) points in the camera's space -> (..., 2) pixels, by OpenCV's distortion."""
        depth = np.where(seen[..., 2:] > 1e-9, seen[..., 2:], np.nan)
        x, y = np.moveaxis(seen[..., :2] / depth, -1, 0)
        k1, k2, p1, p2 = self.distortion
        square = x * x + y * y
        radial = 1.0 + k1 * square + k2 * square * square
        bent = (
            x * radial + 2.0 * p1 * x * y + p2 * (square + 2.0 * x * x),
            y * radial + p1 * (square + 2.0 * y * y) + 2.0 * p2 * x * y,
        )
        return np.stack(bent, axis=-1) * self.focal + self.centre

    def directions(self, pixels: np.ndarray) -> np.ndarray:
        """(n, 2) pixels -> (n, 3) directions in the camera's space, z = 1, without distortion."""
        bent = (pixels - self.centre) / self.focal
        flat = bent.copy()
        for _ in range(20):  # the distortion is small: a fixed point
            one = np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
            flat = flat + bent - (self.pixels(one) - self.centre) / self.focal
        return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def kind_of(folder: pathlib.Path) -> str | None:
    """'ours', 'nerfstudio', 'colmap' or 'nersemble'; None if it is no capture."""
    if (folder / "cameras.json").is_file():
        return "ours"
    if (folder / "transforms.json").is_file():
        return "nerfstudio"
    if _calibration(folder).is_file():
        return "nersemble"
    return "colmap" if _colmap_model(folder) else None


def read(
    folder: pathlib.Path, sequence: str | None = None, frame: int | None = None
) -> list[Photo]:
    """The photos of a capture, at least two.

    Args:
        sequence, frame: which of a NeRSemble participant's (the first of those there).

    Raises:
        CaptureError: see the module.
    """
    kind = kind_of(folder)
    if kind is None:
        raise CaptureError(
            f"{folder}: no capture: none of cameras.json, transforms.json, camera_params.json and "
            "COLMAP's cameras.bin or .txt is there"
        )
    if kind == "nersemble":
        photos = _read_nersemble(folder, sequence, frame)
    elif kind == "colmap":
        photos = _read_colmap(folder)
    else:
        photos = _read_ours(folder) if kind == "ours" else _read_nerfstudio(folder)
    if len(photos) < 2:
        raise CaptureError(f"{folder}: {len(photos)} photos; at least two are needed")
    for photo in photos:
        _check(photo)
    return photos


def _check(photo: Photo) -> None:
    for path in (photo.path, photo.mask):
        if path is not None and not path.is_file():
            raise CaptureError(f"{path}: missing")
    pose, numbers = photo.world_to_camera, (photo.focal, photo.centre, photo.distortion)
    finite = np.isfinite(pose).all() and all(np.isfinite(values).all() for values in numbers)
    if not finite or photo.focal.min() <= 0:
        raise CaptureError(
            f"{photo.path}: its camera has numbers that are not finite, or no focal length"
        )
    rotation = pose[:3, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise CaptureError(f"{photo.path}: its camera's pose is no rotation and translation")


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CaptureError(f"{path}: unreadable ({error})") from error


def _matrix(values: Any, path: pathlib.Path, what: str, rows: int = 4) -> np.ndarray:
    try:
        matrix = np.array(values, np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape != (rows, rows):
        raise CaptureError(f"{path}: {what} must be {rows} x {rows} numbers")
    return matrix


def _inside(folder: pathlib.Path, name: Any, path: pathlib.Path) -> pathlib.Path:
    """A file named in a JSON file; it must stay in the capture's folder."""
    if not isinstance(name, str) or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise CaptureError(f"{path}: {name!r} is not the name of a file in {folder}")
    return folder / name


def _number(about: Mapping[str, Any], name: str, path: pathlib.Path, default: float | None = None):
    value = about.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CaptureError(f"{path}: {name} must be a number, got {value!r}")
    return float(value)


def _photo(
    about: Mapping[str, Any],
    names: tuple[str, str],
    file: pathlib.Path,
    pose: np.ndarray,
    path: pathlib.Path,
) -> Photo:
    """From the entries fl_x, fl_y, cx, cy and the distortion's; `names` are those of file and mask."""
    folder = path.parent
    mask = about.get(names[1])
    focal = _number(about, "fl_x", path)
    return Photo(
        file,
        None if mask is None else _inside(folder, mask, path),
        pose,
        np.array([focal, _number(about, "fl_y", path, focal)]),
        np.array([_number(about, "cx", path), _number(about, "cy", path)]),
        np.array([_number(about, name, path, 0.0) for name in _DISTORTION]),
    )


def _frames(value: Any, path: pathlib.Path) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(frame, dict) for frame in value):
        raise CaptureError(f"{path}: expected a list of cameras, see docs/data_factory.md")
    return value


def _read_ours(folder: pathlib.Path) -> list[Photo]:
    path, photos = folder / "cameras.json", []
    for about in _frames(_json(path), path):
        file = _inside(folder, about.get("file"), path)
        pose = _matrix(about.get("world_to_camera"), path, "world_to_camera")
        photos.append(_photo(about, ("file", "mask"), file, pose, path))
    return photos


def _read_nerfstudio(folder: pathlib.Path) -> list[Photo]:
    path = folder / "transforms.json"
    shared = _json(path)
    if not isinstance(shared, dict):
        raise CaptureError(f"{path}: expected a JSON object")
    photos = []
    for frame in _frames(shared.get("frames"), path):
        about = {**shared, **frame}
        model = about.get("camera_model", "OPENCV")
        extra = [name for name in ("k3", "k4") if about.get(name)]
        if model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE") or extra:
            raise CaptureError(
                f"{path}: camera model {model} {extra or ''} is not supported; undistort"
            )
        file = _inside(folder, about.get("file_path"), path)
        if not file.suffix:
            file = file.with_suffix(".png")  # as Blender's scenes leave it out
        if "fl_x" not in about and "camera_angle_x" in about:
            width, height = _size(file)
            angle = _number(about, "camera_angle_x", path)
            focal = 0.5 * width / math.tan(0.5 * angle)
            about |= {"fl_x": focal, "cx": width / 2, "cy": height / 2}
        to_world = _matrix(about.get("transform_matrix"), path, "transform_matrix")
        if abs(np.linalg.det(to_world)) < 1e-9:
            raise CaptureError(f"{path}: {file.name}: transform_matrix cannot be inverted")
        pose = _GL_TO_CV @ np.linalg.inv(to_world)
        photos.append(_photo(about, ("file_path", "mask_path"), file, pose, path))
    return photos


def _size(path: pathlib.Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # Pillow raises many kinds
        raise CaptureError(f"{path}: no readable picture ({error})") from error


def _colmap_model(folder: pathlib.Path) -> pathlib.Path | None:
    for place in (folder / "sparse" / "0", folder / "sparse", folder):
        if any((place / f"cameras.{suffix}").is_file() for suffix in ("bin", "txt")):
            return place
    return None


def _read_colmap(folder: pathlib.Path) -> list[Photo]:
    try:
        import pycolmap
    except ImportError as error:
        raise CaptureError(
            f"{folder}: COLMAP's files need pycolmap: pip install '.[captures]'"
        ) from error
    place = _colmap_model(folder)
    try:
        model = pycolmap.Reconstruction(str(place))
        found = [
            (image.name, image.cam_from_world().matrix(), model.cameras[image.camera_id])
            for image in model.images.values()
            if image.has_pose
        ]
    except Exception as error:  # pycolmap's readers raise many kinds
        raise CaptureError(f"{place}: not a readable COLMAP model ({error})") from error
    photos = []
    for name, pose, camera in sorted(found, key=lambda entry: entry[0]):
        known = {"SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV"}
        if camera.model_name not in known:
            raise CaptureError(
                f"{place}: camera model {camera.model_name} is not supported; run colmap "
                "image_undistorter, or choose OPENCV"
            )
        distortion = np.zeros(4)
        bent = np.asarray(camera.params)[list(camera.extra_params_idxs())]
        distortion[: len(bent)] = bent
        pictures = folder / "images" if (folder / "images").is_dir() else folder
        path = _inside(pictures, name, place)
        mask = folder / "masks" / f"{name}.png"  # as COLMAP's own masks are named
        photos.append(
            Photo(
                path,
                mask if mask.is_file() else None,
                np.concatenate([pose, [[0.0, 0.0, 0.0, 1.0]]]),
                np.array([camera.focal_length_x, camera.focal_length_y]),
                np.array([camera.principal_point_x, camera.principal_point_y]),
                distortion,
            )
        )
    return photos


def _calibration(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "calibration" / "camera_params.json"
    return path if path.is_file() else folder / "camera_params.json"


def _read_nersemble(folder: pathlib.Path, sequence: str | None, frame: int | None) -> list[Photo]:
    path = _calibration(folder)
    about = _json(path)
    if not isinstance(about, dict) or not isinstance(about.get("world_2_cam"), dict):
        raise CaptureError(f"{path}: expected world_2_cam and intrinsics")
    intrinsics = _matrix(about.get("intrinsics"), path, "intrinsics", 3)
    place = _nersemble_frame(folder, sequence, frame)
    pictures = next((p for p in sorted(place.glob("images*")) if p.is_dir()), None)
    masks = next((p for p in sorted(place.glob("alpha_map*")) if p.is_dir()), None)
    if pictures is None:
        raise CaptureError(f"{place}: no images folder in it")
    photos = []
    for serial, pose in sorted(about["world_2_cam"].items()):
        named = sorted(p for p in pictures.glob(f"cam_{serial}.*") if images.is_picture_name(p))
        if not named:
            continue  # one that was not downloaded
        scale = _size(named[0])[0] / _NERSEMBLE_WIDTH
        mask = None if masks is None else masks / f"cam_{serial}.png"
        photos.append(
            Photo(
                named[0],
                mask if mask is not None and mask.is_file() else None,
                _matrix(pose, path, f"world_2_cam of {serial}"),
                scale * intrinsics[[0, 1], [0, 1]],
                scale * (intrinsics[:2, 2] + 0.5),  # OpenCV counts from the first pixel's centre
                np.zeros(4),
            )
        )
    return photos


def _nersemble_frame(folder: pathlib.Path, sequence: str | None, frame: int | None) -> pathlib.Path:
    sequences = folder / "sequences"
    names = sorted(p.name for p in sequences.iterdir() if p.is_dir()) if sequences.is_dir() else []
    if not names or (sequence is not None and sequence not in names):
        raise CaptureError(f"{sequences}: no sequence {sequence or ''} in it; there are {names}")
    chosen = sequences / (sequence or names[0])
    frames = {
        int(p.name.rpartition("_")[2]): p
        for pattern in ("frame_*", "timesteps/frame_*")
        for p in chosen.glob(pattern)
        if p.name.rpartition("_")[2].isdecimal()
    }
    if not frames or (frame is not None and frame not in frames):
        raise CaptureError(
            f"{chosen}: no pictures of frame {'' if frame is None else frame}; docs/data_factory.md "
            "tells how to take them out of the videos"
        )
    return frames[min(frames) if frame is None else frame]
