"""Calibrated photos -> where the head is, and each photo as the canonical camera would take it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from data_prep import identity
from data_prep.calibrated.readers import Photo
from data_prep.rendering.render import on_white
from data_prep.scans import alignment
from spinmeround_jax import cameras
from spinmeround_jax.files import InputError, composed
from spinmeround_jax.photo import images, landmarks
from spinmeround_jax.photo.prepare import Models
from spinmeround_jax.results import transforms

LANDMARKS = "landmarks.json"
# Median distance of a photo's landmarks from where all photos say they are, of the photo's size.
_GOOD_FIT, _WORST_FIT = 0.01, 0.03


@dataclasses.dataclass(frozen=True)
class Options:
    """size: pixels of the images made. sequence, frame: of NeRSemble."""

    size: int
    keep_background: bool
    sequence: str | None
    frame: int | None


@dataclasses.dataclass(frozen=True)
class View:
    """A photo seen by the canonical camera.

    name: of the file to write, without suffix. rgba: (s, s, 4) uint8. yaw, pitch: degrees. distance: of the
    camera from the head's centre, in the canonical frame's units. focal: in image widths.
    """

    name: str
    rgba: np.ndarray
    yaw: float
    pitch: float
    distance: float
    focal: float


# --------------------------------------------------------------------------------------------------
# Where the head is


def triangulate(photos: Sequence[Photo], seen: Sequence[np.ndarray]) -> np.ndarray:
    """(n, 3) world points nearest to the rays through (n, 2) pixels of each photo.

    A photo whose points are far from what the others say is left out. At least half must agree: any two
    photos of many agree on something.

    Raises:
        InputError: fewer than two photos, or they do not agree.
    """
    if len(photos) < 2:
        raise InputError(f"a face is found in {len(photos)} of its photos; two are needed")
    points, errors = _meeting(photos, seen)
    fewest = max(2, (len(photos) + 1) // 2)
    while len(photos) > fewest and max(errors) > _GOOD_FIT:
        # The blunder is in the photo without which the others agree best.
        trials = []
        for left_out in range(len(photos)):
            chosen = [i for i in range(len(photos)) if i != left_out]
            some = [photos[i] for i in chosen], [seen[i] for i in chosen]
            trials.append((*some, *_meeting(*some)))
        photos, seen, points, errors = min(trials, key=lambda trial: sum(trial[-1]))
    if not np.isfinite(points).all() or max(errors) > _WORST_FIT:
        raise InputError(
            "the landmarks of its photos do not meet: are the cameras right, and the landmarks in pixels "
            "of the stored photos, which is before any EXIF rotation?"
        )
    return points


def _meeting(photos: Sequence[Photo], seen: Sequence[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """The points nearest to all rays, and how far off each photo is, see _WORST_FIT."""
    left = np.zeros((len(seen[0]), 3, 3))
    right = np.zeros((len(seen[0]), 3))
    for photo, pixels in zip(photos, seen, strict=True):
        rays = photo.directions(pixels) @ photo.world_to_camera[:3, :3]
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        across = np.eye(3) - rays[:, :, None] * rays[:, None, :]
        left += across
        right += across @ photo.position
    if np.linalg.cond(left).max() > 1e8:
        raise InputError("its photos are taken from one place")
    points = np.linalg.solve(left, right[..., None])[..., 0]
    errors = [
        float(np.median(np.linalg.norm(photo.project(points) - pixels, axis=1)))
        / float(2.0 * photo.centre.max())  # about the size of the photo
        for photo, pixels in zip(photos, seen, strict=True)
    ]
    return points, errors


def place(
    folder: pathlib.Path, photos: Sequence[Photo], models: Models
) -> tuple[float, np.ndarray, np.ndarray]:
    """(scale, rotation, offset) from the capture's world to the canonical frame.

    Raises:
        InputError: no face is found, or the landmarks do not fit together.
    """
    if (folder / LANDMARKS).exists():
        given = landmarks_of(folder, photos)
        chosen = [photo for photo in photos if photo.path in given]
        seen = [given[photo.path] for photo in chosen]
        if len({len(points) for points in seen}) > 1:
            raise InputError(f"{folder / LANDMARKS}: 5 points of some photos, 68 of others")
        points = triangulate(chosen, seen)
        return alignment.from_landmarks(points)
    chosen, seen = [], []
    for photo in photos:
        # Detectors want faces upright; cameras describe the stored pixels.
        face = identity.largest_face(models, on_white(images.read(photo.path).pixels))
        if face is not None:
            points = face.landmarks[:, :2]
            if photo.orientation != 1:
                points = images.to_stored(points, images.read_header(photo.path))
            chosen.append(photo)
            seen.append(points)
    return alignment.from_points(triangulate(chosen, seen))


def landmarks_of(folder: pathlib.Path, photos: Sequence[Photo]) -> dict[pathlib.Path, np.ndarray]:
    """Landmarks of landmarks.json by photo; names are base names or end in folders as far as needed.

    Raises:
        InputError: not such a file, or a name that two photos have.
    """
    found = {}
    spelled = {photo.path: pathlib.PurePath(composed(str(photo.path))) for photo in photos}
    for name, points in landmarks.read_landmarks(folder / LANDMARKS).items():
        parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
        meant = [path for path in spelled if spelled[path].parts[-len(parts) :] == parts]
        if len(meant) > 1:
            raise InputError(
                f"{folder / LANDMARKS}: {name!r} names {len(meant)} photos; put their folders before it, "
                f"as in {meant[0].relative_to(folder).as_posix()!r}"
            )
        found.update(dict.fromkeys(meant, points))
    return found


# --------------------------------------------------------------------------------------------------
# Photos by canonical cameras


def canonical_position(photo: Photo, where: tuple[float, np.ndarray, np.ndarray]) -> np.ndarray:
    """(3,) of the photo's camera in the canonical frame."""
    scale, rotation, offset = where
    return scale * rotation @ photo.position + offset


def canonical_view(
    photo: Photo,
    where: tuple[float, np.ndarray, np.ndarray],
    options: Options,
    focal: float | None = None,
) -> View:
    """The photo as a camera at its place sees it that looks at the head's centre, upright.

    Turning a camera about its own place is exact, whatever is in the photo.

    Args:
        focal: in image widths; None: cameras.FOCAL times distance / cameras.RADIUS, so that the head is as
            large as in other data.

    Raises:
        InputError: the photo has no mask or is unreadable, or its camera stands in the head.
    """
    _, rotation, _ = where
    position = canonical_position(photo, where)
    distance = float(np.linalg.norm(position))
    if distance < 0.5:
        raise InputError(f"{photo.path}: its camera stands inside the head")
    yaw = float(np.rad2deg(np.arctan2(position[0], position[2])))
    pitch = float(np.rad2deg(np.arcsin(position[1] / distance)))
    picture = _cut_out(photo, options.keep_background)
    # Rays of our camera, carried to the photo's camera; about one sample to each of its pixels.
    if focal is None:
        focal = cameras.FOCAL * distance / cameras.RADIUS
    finer = float(photo.focal.mean()) / (focal * options.size)
    samples = int(np.clip(np.ceil(finer), 1, 6))
    side = options.size * samples
    steps = ((np.arange(side) + 0.5) / side - 0.5) / focal
    x, y = np.meshgrid(steps, -steps)
    rays = np.stack([x, y, -np.ones_like(x)], axis=-1) @ cameras.orbit(yaw, pitch)[:3, :3]
    rays = rays @ rotation @ photo.world_to_camera[:3, :3].T
    at = photo.pixels(rays)
    coordinates = np.nan_to_num(np.moveaxis(at[..., ::-1], -1, 0), nan=-1e6) - 0.5
    sampled = np.stack(
        [
            ndimage.map_coordinates(picture[..., channel], coordinates, order=1, mode="constant")
            for channel in range(4)
        ],
        axis=-1,
    )
    mean = sampled.reshape(options.size, samples, options.size, samples, 4).mean(axis=(1, 3))
    alpha = mean[..., 3:]
    colours = np.where(alpha > 1e-3, mean[..., :3] / np.maximum(alpha, 1e-3), 1.0)
    rgba = np.rint(255.0 * np.clip(np.concatenate([colours, alpha], axis=-1), 0, 1))
    return View(photo.path.stem, rgba.astype(np.uint8), yaw, pitch, distance, focal)


def _cut_out(photo: Photo, keep_background: bool) -> np.ndarray:
    """(h, w, 4) float32 in [0, 1], colours times alpha."""
    picture = transforms.read_image(photo.path, photo.orientation)
    mask = transforms.read_mask(picture, photo.mask, photo.orientation)
    if mask is None and not keep_background:
        raise InputError(
            f"{photo.path}: no mask of the person, and no transparency; give masks, or "
            "--keep-background"
        )
    pixels = picture.pixels.astype(np.float32) / 255.0
    if mask is not None:
        pixels[..., 3] = mask
    pixels[..., :3] *= pixels[..., 3:]
    return pixels


def transforms_views(views: Sequence[View], size: int) -> list[transforms.View]:
    """The views under images/ with their true cameras, in the canonical frame."""
    written = []
    for view in views:
        pose = cameras.orbit(view.yaw, view.pitch)
        pose[2, 3] = -view.distance
        focal = view.focal * size
        camera = transforms.Intrinsics((focal, focal), (size / 2, size / 2), (size, size))
        angles = {"yaw": view.yaw, "pitch": view.pitch}
        written.append(transforms.View(f"images/{view.name}.png", pose, camera, details=angles))
    return written
