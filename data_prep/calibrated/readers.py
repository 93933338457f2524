"""Folders of calibrated photographs of one person, in four layouts, become `Photo`s.

    cameras.json                              ours, see docs/data_factory.md
    transforms.json                           nerfstudio's (and Blender's)
    sparse/0/ or the folder itself            COLMAP's cameras, images, points3D; .bin or .txt
    calibration/camera_params.json or camera_params.json, sequences/...     NeRSemble's

The files decide which layout it is. Every fault is an `InputError` that names the file.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib

import numpy as np

from spinmeround_jax import schema
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import images
from spinmeround_jax.results import transforms
from spinmeround_jax.results.transforms import Intrinsics

_NERSEMBLE_SIZE = (2200, 3208)  # width and height of the images of NeRSemble's intrinsics
_GL_TO_CV = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclasses.dataclass(frozen=True)
class Photo:
    """A calibrated photograph.

    mask: an image, bright where the person is; None: the photo's own transparency, if any.
    world_to_camera: (4, 4) float64, OpenCV's camera (x right, y down, looking along +z), any world.
    focal, centre: (2,) pixels, x and y; pixel centres at +0.5. distortion: (4,) k1, k2, p1, p2.
    orientation: EXIF orientation that the camera leaves out, see `transforms.Frame`.
    """

    path: pathlib.Path
    mask: pathlib.Path | None
    world_to_camera: np.ndarray
    focal: np.ndarray
    centre: np.ndarray
    distortion: np.ndarray
    orientation: int = 1

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
        InputError: see the module.
    """
    kind = kind_of(folder)
    if kind is None:
        raise InputError(
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
        raise InputError(f"{folder}: {len(photos)} photos; at least two are needed")
    times = collections.Counter(photo.path.resolve() for photo in photos)
    if twice := [path for path, n in times.items() if n > 1]:
        raise InputError(f"{folder}: names {twice[0].name} twice; a photo has one camera")
    for photo in photos:
        _check(photo)
    return photos


def _check(photo: Photo) -> None:
    numbers = (photo.world_to_camera, photo.focal, photo.centre, photo.distortion)
    if not all(np.isfinite(values).all() for values in numbers) or photo.focal.min() <= 0:
        raise InputError(
            f"{photo.path}: its camera has numbers that are not finite, or no focal length"
        )
    rotation = photo.world_to_camera[:3, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise InputError(f"{photo.path}: its camera's pose is no rotation and translation")


def _photo(
    path: pathlib.Path,
    mask: pathlib.Path | None,
    world_to_camera: np.ndarray,
    intrinsics: Intrinsics,
    orientation: int,
) -> Photo:
    return Photo(
        path,
        mask,
        world_to_camera,
        np.array(intrinsics.focal),
        np.array(intrinsics.centre),
        np.array(intrinsics.distortion),
        orientation,
    )


def _read_ours(folder: pathlib.Path) -> list[Photo]:
    path, photos = folder / "cameras.json", []
    kind = schema.record({"world_to_camera": schema.matrix(4, 4)})
    for entry in transforms.read_json(path, schema.array(kind)):
        file = transforms.find_file(path, entry.get("file"))
        mask = None if entry.get("mask") is None else transforms.find_file(path, entry["mask"])
        pose = np.array(entry["world_to_camera"])
        camera = transforms.read_intrinsics(entry, file, f"{path}: {entry['file']}")
        photos.append(_photo(file, mask, pose, *camera))
    return photos


def _read_nerfstudio(folder: pathlib.Path) -> list[Photo]:
    return [
        _photo(
            frame.image,
            frame.mask,
            _GL_TO_CV @ frame.world_to_camera,
            frame.intrinsics,
            frame.orientation,
        )
        for frame in transforms.read(folder).frames
    ]


def _colmap_model(folder: pathlib.Path) -> pathlib.Path | None:
    for place in (*_colmap_models(folder), folder / "sparse", folder):
        if any((place / f"cameras.{suffix}").is_file() for suffix in ("bin", "txt")):
            return place
    return None


def _colmap_models(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((folder / "sparse").glob("[0-9]*/"))


def _read_colmap(folder: pathlib.Path) -> list[Photo]:
    place = _colmap_model(folder)
    if len(models := _colmap_models(folder)) > 1:
        raise InputError(
            f"{folder / 'sparse'}: holds {len(models)} models, as where COLMAP cannot join all photos; keep "
            "the folder of the best one (colmap model_analyzer tells), or take more photos and match again"
        )
    try:
        import pycolmap
    except ImportError as error:
        raise InputError(
            f"{folder}: COLMAP's files need pycolmap: pip install '.[captures]'"
        ) from error
    try:
        model = pycolmap.Reconstruction(str(place))
        found = [
            (image.name, image.cam_from_world().matrix(), model.cameras[image.camera_id])
            for image in model.images.values()
            if image.has_pose
        ]
    except Exception as error:  # pycolmap's readers raise many kinds
        raise InputError(f"{place}: not a readable COLMAP model ({error})") from error
    photos = []
    for name, pose, camera in sorted(found, key=lambda entry: entry[0]):
        distortion = np.asarray(camera.params, np.float64)[list(camera.extra_params_idxs())]
        known = {"SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV"}
        if camera.model_name not in known or distortion[4:].any():
            raise InputError(
                f"{place}: camera model {camera.model_name} is not supported; run colmap "
                "image_undistorter, or choose OPENCV"
            )
        photos_folder = folder / "images" if (folder / "images").is_dir() else folder
        path = transforms.find_file(photos_folder / "of COLMAP's model", name)
        calibrated = Intrinsics(
            (camera.focal_length_x, camera.focal_length_y),
            (camera.principal_point_x, camera.principal_point_y),
            (camera.width, camera.height),
            tuple(np.pad(distortion[:4], (0, 4 - len(distortion[:4]))).tolist()),
        )
        camera = transforms.fit_to_image(calibrated, images.read_header(path), str(path))
        pose = np.concatenate([pose, [[0.0, 0.0, 0.0, 1.0]]])
        photos.append(_photo(path, _colmap_mask(folder / "masks", name), pose, *camera))
    return photos


def _colmap_mask(masks: pathlib.Path, name: str) -> pathlib.Path | None:
    """The mask of an image: COLMAP's NAME.png, also with other case, or NAME with .png as its suffix."""
    for mask in (f"{name}.png", f"{name}.PNG", str(pathlib.PurePath(name).with_suffix(".png"))):
        if (masks / mask).is_file():
            return masks / mask
    return None


def _calibration(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "calibration" / "camera_params.json"
    return path if path.is_file() else folder / "camera_params.json"


def _read_nersemble(folder: pathlib.Path, sequence: str | None, frame: int | None) -> list[Photo]:
    path = _calibration(folder)
    matrices = {
        "world_2_cam": schema.mapping(schema.matrix(4, 4)),
        "intrinsics": schema.matrix(3, 3),
    }
    about = transforms.read_json(path, schema.record(matrices))
    matrix = np.array(about["intrinsics"])
    # OpenCV counts from the first pixel's centre.
    calibrated = Intrinsics(
        tuple(matrix[[0, 1], [0, 1]]), tuple(matrix[:2, 2] + 0.5), _NERSEMBLE_SIZE
    )
    place = _nersemble_frame(folder, sequence, frame)
    pictures = next((p for p in sorted(place.glob("images*")) if p.is_dir()), None)
    masks = next((p for p in sorted(place.glob("alpha_map*")) if p.is_dir()), None)
    if pictures is None:
        raise InputError(f"{place}: no images folder in it")
    photos = []
    for serial, pose in sorted(about["world_2_cam"].items()):
        named = sorted(p for p in pictures.glob(f"cam_{serial}.*") if images.is_picture_name(p))
        if not named:
            continue  # one that was not downloaded
        mask = None if masks is None else masks / f"cam_{serial}.png"
        mask = mask if mask is not None and mask.is_file() else None
        camera = transforms.fit_to_image(calibrated, images.read_header(named[0]), str(named[0]))
        photos.append(_photo(named[0], mask, np.array(pose), *camera))
    return photos


def _nersemble_frame(folder: pathlib.Path, sequence: str | None, frame: int | None) -> pathlib.Path:
    sequences = folder / "sequences"
    names = sorted(p.name for p in sequences.iterdir() if p.is_dir()) if sequences.is_dir() else []
    if not names or (sequence is not None and sequence not in names):
        raise InputError(f"{sequences}: no sequence {sequence or ''} in it; there are {names}")
    chosen = sequences / (sequence or names[0])
    frames = {
        int(p.name.rpartition("_")[2]): p
        for pattern in ("frame_*", "timesteps/frame_*")
        for p in chosen.glob(pattern)
        if p.name.rpartition("_")[2].isdecimal()
    }
    if not frames or (frame is not None and frame not in frames):
        raise InputError(
            f"{chosen}: no images of frame {'' if frame is None else frame}; docs/data_factory.md "
            "says how to take them out of the videos"
        )
    return frames[min(frames) if frame is None else frame]
