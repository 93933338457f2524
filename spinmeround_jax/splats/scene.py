"""Views with cameras to fit: transforms.json (nerfstudio's convention) and the pictures it names."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax import cameras

MIN_VIEWS = 8
MAX_VIEWS = 2000
MAX_SIZE = 2048  # px; a bomb is refused before it is decoded
MIN_SIZE = 16
MAX_GAP = 180.0  # degrees without a camera beyond which half of the head is unseen
WHITE_TOLERANCE = 8.0 / 255.0
MASK_SOURCES = ("alpha", "normals", "background")


class SceneError(ValueError):
    """The views cannot be used; the message names the file and says what to do."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """v views of one thing, h x w pixels.

    images: (v, h, w, 3) float32 in [0, 1], on `background`.
    masks: (v, h, w) float32 in [0, 1], what is not background.
    normals: (v, h, w, 3) float32 in the world, length 1 or shorter at edges, 0 on the background; or None.
    world_to_camera: (v, 4, 4) float32, OpenGL cameras (`cameras.py`).
    focal, centre: (2,) pixels, x and y, of all views.
    background: (3,) in [0, 1].
    names: of the pictures.
    masks_from: "alpha", "normals" or "background", where the masks come from.
    """

    images: np.ndarray
    masks: np.ndarray
    normals: np.ndarray | None
    world_to_camera: np.ndarray
    focal: np.ndarray
    centre: np.ndarray
    background: np.ndarray
    names: tuple[str, ...]
    masks_from: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.images.shape[1:3]

    def take(self, views: np.ndarray) -> Scene:
        """The views with these numbers."""
        return dataclasses.replace(
            self,
            images=self.images[views],
            masks=self.masks[views],
            normals=None if self.normals is None else self.normals[views],
            world_to_camera=self.world_to_camera[views],
            names=tuple(self.names[i] for i in views),
        )


def middle_and_radius(scene: Scene) -> tuple[np.ndarray, float]:
    """(3,) point nearest to all optical axes, and the radius around it that the pictures show.

    Raises:
        SceneError: the cameras do not look at one place.
    """
    rotation = scene.world_to_camera[:, :3, :3].astype(np.float64)
    positions = camera_positions(scene.world_to_camera)
    forward = -rotation[:, 2]
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    middle, _, rank, _ = np.linalg.lstsq(
        across.sum(0), np.einsum("vij,vj->i", across, positions), rcond=1e-6
    )
    depth = np.einsum("vj,vj->v", forward, middle - positions)
    if rank < 3 or (depth <= 0).any():
        raise SceneError(
            "the cameras do not look at one place from around it; reconstruction needs views of one thing"
        )
    height, width = scene.size
    half = np.array([width, height]) / (2 * scene.focal)
    return middle, float(np.median(depth) * np.linalg.norm(half))


def camera_positions(world_to_camera: np.ndarray) -> np.ndarray:
    """(v, 3) float64 positions of (v, 4, 4) cameras."""
    pose = np.asarray(world_to_camera, np.float64)
    return -np.einsum("vji,vj->vi", pose[:, :3, :3], pose[:, :3, 3])


def check(scene: Scene, where: str, one_sided: bool = False) -> None:
    """Whether there is enough to reconstruct from.

    Args:
        where: the file to name.
        one_sided: accept cameras on one side only.

    Raises:
        SceneError: too few views, cameras on one side, empty masks.
    """
    if len(scene) < MIN_VIEWS:
        raise SceneError(f"{where}: {len(scene)} views; reconstruction needs at least {MIN_VIEWS}")
    empty = [
        name for name, mask in zip(scene.names, scene.masks, strict=True) if mask.mean() < 1e-3
    ]
    if empty:
        raise SceneError(f"{where}: nothing but background in {empty[0]}; take the view out")
    try:
        middle, _ = middle_and_radius(scene)
    except SceneError as error:
        raise SceneError(f"{where}: {error}") from error
    offset = camera_positions(scene.world_to_camera) - middle
    yaw = np.sort(np.rad2deg(np.arctan2(offset[:, 0], offset[:, 2])))
    gap = np.max(np.diff(np.concatenate([yaw, yaw[:1] + 360.0])))
    if gap >= MAX_GAP and not one_sided:
        raise SceneError(
            f"{where}: no camera within {gap:.0f} degrees of azimuth, so one side is never seen; add "
            "views from there, or allow it with --one-sided"
        )


def load(path: str | pathlib.Path, background: np.ndarray | None = None) -> Scene:
    """Read transforms.json, or the folder that holds it, and the pictures.

    Masks come from the pictures' alpha, else from the normals (0 on the background), else from the
    pixels that differ from the background.

    Args:
        background: (3,) in [0, 1], of pictures without alpha, and on which those with are laid; white.

    Raises:
        SceneError: naming the file, for anything that does not fit.
        OSError: a file cannot be read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "transforms.json"
    about = _read_json(path)
    background = np.ones(3) if background is None else np.asarray(background, np.float64)
    frames = about.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(f, dict) for f in frames):
        raise SceneError(f"{path}: no list of frames; expected nerfstudio's transforms.json")
    if len(frames) > MAX_VIEWS:
        raise SceneError(f"{path}: {len(frames)} frames; this takes at most {MAX_VIEWS}")
    frames = [{**about, **frame} for frame in frames]
    files = [_inside(path, frame.get("file_path")) for frame in frames]
    if len(set(files)) != len(files):
        raise SceneError(f"{path}: names a picture twice")
    pictures = [_read_picture(file) for file in files]
    for file, picture in zip(files, pictures, strict=True):
        if picture.shape[:2] != pictures[0].shape[:2]:
            raise SceneError(
                f"{file}: {_size(picture)} pixels, {files[0].name} {_size(pictures[0])}; "
                "all views must be of one size"
            )
    height, width = pictures[0].shape[:2]
    intrinsics = np.array([_intrinsics(frame, height, width, path) for frame in frames])
    if np.ptp(intrinsics, axis=0).max() > 1e-3 * width:
        raise SceneError(f"{path}: cameras of different intrinsics; this takes views of one camera")
    poses = np.stack([_pose(frame, path) for frame in frames])
    normals = _read_normals(path, frames, poses, (height, width))

    rgba = np.stack(pictures).astype(np.float32) / 255.0
    opaque = rgba[..., 3].min() >= 1.0
    images = rgba[..., :3] * rgba[..., 3:] + background * (1.0 - rgba[..., 3:])
    if not opaque:
        masks, source = rgba[..., 3], "alpha"
    elif normals is not None:
        masks, source = (np.linalg.norm(normals, axis=-1) > 0.5), "normals"
    else:
        masks, source = (abs(images - background) > WHITE_TOLERANCE).any(-1), "background"
    return Scene(
        images=images.astype(np.float32),
        masks=masks.astype(np.float32),
        normals=normals,
        world_to_camera=poses,
        focal=intrinsics[0, :2],
        centre=intrinsics[0, 2:],
        background=background.astype(np.float32),
        names=tuple(str(frame["file_path"]) for frame in frames),
        masks_from=source,
    )


def without_grey(normals: np.ndarray) -> np.ndarray:
    """(..., 3) normals, at most 1 long, and 0 where they are shorter than 1/2: the background.

    What is decoded from latents is grey there within a few levels, but never exactly.
    """
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.where(length > 0.5, normals / np.maximum(length, 1.0), 0.0)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
    except OSError:
        raise
    except Exception as error:  # the file can hold anything
        raise SceneError(f"{path}: not JSON ({error})") from error
    if not isinstance(about, dict):
        raise SceneError(f"{path}: expected an object; see nerfstudio's transforms.json")
    return about


def _inside(path: pathlib.Path, name: Any) -> pathlib.Path:
    """The file `name` beside `path`; SceneError if it lies elsewhere."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise SceneError(f"{path}: a frame without file_path")
    folder = path.parent.resolve()
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):
        raise SceneError(
            f"{path}: {name!r} is outside of {folder}; pictures must lie beside the file"
        )
    return file


def _read_picture(file: pathlib.Path) -> np.ndarray:
    """(h, w, 4) uint8."""
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            if not MIN_SIZE <= min(image.size) or max(image.size) > MAX_SIZE:
                raise SceneError(
                    f"{file}: {image.width}x{image.height} pixels; this takes {MIN_SIZE} to {MAX_SIZE}"
                )
            return np.array(image.convert("RGBA"))
    except (SceneError, FileNotFoundError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, ...
        raise SceneError(f"{file}: not a PNG, JPEG or WebP picture ({error})") from error


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"


def _number(frame: dict[str, Any], name: str, path: pathlib.Path) -> float:
    value = frame.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SceneError(f"{path}: {name} is {value!r}; expected a number")
    return float(value)


def _intrinsics(
    frame: dict[str, Any], height: int, width: int, path: pathlib.Path
) -> tuple[float, float, float, float]:
    """Focal lengths and principal point in pixels of the picture as stored."""
    lens = frame.get("camera_model", "OPENCV")
    bent = [k for k in ("k1", "k2", "k3", "k4", "p1", "p2") if frame.get(k) not in (None, 0, 0.0)]
    if lens not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE") or bent:
        raise SceneError(
            f"{path}: a lens with distortion ({', '.join([str(lens), *bent])}); undistort the pictures"
        )
    if "fl_x" in frame:
        focal_x = _number(frame, "fl_x", path)
    elif "camera_angle_x" in frame:
        focal_x = 0.5 * width / math.tan(0.5 * _number(frame, "camera_angle_x", path))
    else:
        raise SceneError(f"{path}: neither fl_x nor camera_angle_x; the focal length is needed")
    focal_y = _number(frame, "fl_y", path) if "fl_y" in frame else focal_x
    stored = (
        _number(frame, "w", path) if "w" in frame else width,
        _number(frame, "h", path) if "h" in frame else height,
    )
    if stored != (width, height):
        raise SceneError(
            f"{path}: says {stored[0]:g}x{stored[1]:g} pixels, the pictures have {width}x{height}"
        )
    if not (width / 100 < focal_x < 100 * width and width / 100 < focal_y < 100 * width):
        raise SceneError(f"{path}: focal length {focal_x:g}, {focal_y:g} pixels cannot be right")
    centre_x = _number(frame, "cx", path) if "cx" in frame else width / 2
    centre_y = _number(frame, "cy", path) if "cy" in frame else height / 2
    return focal_x, focal_y, centre_x, centre_y


def _pose(frame: dict[str, Any], path: pathlib.Path) -> np.ndarray:
    """(4, 4) float32 world to camera of a frame's camera-to-world matrix."""
    where = f"{path}: transform_matrix of {frame['file_path']!r}"
    try:
        matrix = np.array(frame["transform_matrix"], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise SceneError(f"{where} is missing or not numbers") from error
    if matrix.shape not in ((4, 4), (3, 4)) or not np.isfinite(matrix).all():
        raise SceneError(f"{where} is not 4 x 4 finite numbers")
    rotation = matrix[:3, :3]
    if abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise SceneError(f"{where} is not a rotation and a translation")
    rigid = np.eye(4)
    rigid[:3] = matrix[:3]
    return cameras.camera_to_world(rigid.astype(np.float32))  # the inverse of either is the other


def _read_normals(
    path: pathlib.Path, frames: list[dict[str, Any]], poses: np.ndarray, size: tuple[int, int]
) -> np.ndarray | None:
    """(v, h, w, 3) in the world, None unless all frames name a normal map."""
    names = [frame.get("normals_file_path") for frame in frames]
    if all(name is None for name in names):
        return None
    space = frames[0].get("normals_space", "world")
    if space not in ("world", "camera"):
        raise SceneError(f"{path}: normals_space {space!r}; expected world or camera")
    maps = []
    for name in names:
        file = _inside(path, name)
        pixels = _read_picture(file)[..., :3]
        if pixels.shape[:2] != size:
            raise SceneError(f"{file}: {_size(pixels)} pixels, the views {size[1]}x{size[0]}")
        normals = (pixels.astype(np.float32) - 128.0) / 127.0
        maps.append(without_grey(normals))
    normals = np.stack(maps).astype(np.float32)
    if space == "camera":
        normals = np.einsum("vji,vhwj->vhwi", poses[:, :3, :3], normals)
    return normals
