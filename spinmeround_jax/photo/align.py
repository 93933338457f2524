"""The crop: what the canonical camera sees, cut out of a photo, and what is wrong with it.

Outside of the photo the crop repeats it mirrored and blurred, as FFHQ's and PanoHead's crops do.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image
from scipy import ndimage

from spinmeround_jax import cameras
from spinmeround_jax.photo import pose
from spinmeround_jax.photo.landmarks import FaceError, five_of
from spinmeround_jax.photo.pose import Correction, HeadPose, Square

SIZE = 512

# Which photos are refused, and which are only remarked upon.
MIN_HEAD = 60.0  # pixels from chin to crown
GOOD_HEAD = 250.0
MAX_YAW, MAX_PITCH = 75.0, 50.0  # degrees
GOOD_YAW, GOOD_PITCH = 45.0, 25.0
MAX_ERROR = 0.04  # of the square: detected landmarks stay below 0.015, see docs/photos.md
MAX_FACE_OUTSIDE, MAX_HEAD_OUTSIDE = 0.1, 0.4

# The head in the canonical image: an ellipse around chin, crown and ears, in fractions of it.
_HEAD_CENTRE, _HEAD_HALF = np.array([0.5, 0.52]), np.array([0.21, 0.29])
_BLUR = 0.015  # standard deviation, of the crop; about PanoHead's kernel


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Where the portrait is in the photo.

    start: FFHQ's square. head: the fit; its square, corrected, is what is cropped. framing: of
    pose.FRAMINGS.
    landmarks: (5 or 68, 2) photo pixels. head_pixels: chin to crown in the photo. padded: fraction
    of the crop outside of the photo. notes: what is not good, but can be used.
    """

    start: Square
    head: HeadPose
    framing: str
    landmarks: np.ndarray
    head_pixels: float
    padded: float
    notes: tuple[str, ...]


def align(
    landmarks: np.ndarray,
    photo_size: tuple[int, int],
    framing: str = "canonical",
    correction: Correction | None = None,
) -> Alignment:
    """Fits a head to (5 or 68, 2 or 3) landmarks, see `pose.fit`, and judges the photo.

    Args:
        photo_size: width and height, pixels.
        correction: of the fitted square.

    Raises:
        FaceError: not a face, cut by the border, tiny, or turned too far away.
    """
    try:
        head = pose.fit(landmarks, framing)
        landmarks = np.asarray(landmarks, np.float64)[:, :2]
        start = pose.ffhq_square(landmarks)
    except (FaceError, np.linalg.LinAlgError) as error:
        raise FaceError(f"no head fits the landmarks ({error})") from error
    if correction is not None:
        head = dataclasses.replace(head, square=head.square.corrected(correction))
    zoom = pose.FRAMINGS[framing][0]
    head_pixels = 2.0 * _HEAD_HALF[1] * zoom * head.square.side
    face_out = max(_outside(landmarks, photo_size), _outside(head.landmarks, photo_size))
    head_out = _outside(head.square.to_photo(_head_points(framing)), photo_size)
    padded = _outside(head.square.to_photo(_grid(64)), photo_size)
    _refuse(head, landmarks, head_pixels, face_out, head_out)
    notes = []
    if head_out > 0.03:
        notes.append(f"{100 * head_out:.0f} % of the head is outside of the photo and made up")
    if head_pixels < GOOD_HEAD:
        notes.append(f"the head is only {head_pixels:.0f} pixels tall; the portrait will be soft")
    if abs(head.yaw) > GOOD_YAW or abs(head.pitch) > GOOD_PITCH:
        notes.append(
            f"the head is turned by {head.yaw:+.0f} and tilted by {head.pitch:+.0f} degrees; "
            "a frontal photo works better"
        )
    return Alignment(start, head, framing, landmarks, head_pixels, padded, tuple(notes))


def _refuse(
    head: HeadPose, landmarks: np.ndarray, pixels: float, face_out: float, head_out: float
) -> None:
    _, _, _, mouth_left, mouth_right = five_of(landmarks)
    eye_left, eye_right = five_of(landmarks)[:2]
    upside_down = np.dot(eye_right - eye_left, mouth_right - mouth_left) <= 0
    if head.error > MAX_ERROR or upside_down or abs(head.yaw) > 100.0 or abs(head.pitch) > 70.0:
        raise FaceError(
            f"the landmarks are not those of a face (off by {100 * head.error:.1f} % of the crop); "
            "give the points in order: eye on the image's left, eye on its right, tip of the nose, "
            "corner of the mouth on the image's left, on its right"
        )
    if face_out > MAX_FACE_OUTSIDE or head_out > MAX_HEAD_OUTSIDE:
        raise FaceError(
            "the face is cut by the border of the photo; take one that shows the whole head"
        )
    if pixels < MIN_HEAD:
        raise FaceError(
            f"the head is only {pixels:.0f} pixels tall; at least {MIN_HEAD:.0f} are needed, "
            f"{GOOD_HEAD:.0f} are good: take a larger photo"
        )
    if abs(head.yaw) > MAX_YAW or abs(head.pitch) > MAX_PITCH:
        raise FaceError(
            f"the head is turned by {head.yaw:+.0f} and tilted by {head.pitch:+.0f} degrees; take a "
            f"photo within {MAX_YAW:.0f} and {MAX_PITCH:.0f}, best from the front"
        )


def crop(pixels: np.ndarray, square: Square, size: int = SIZE) -> np.ndarray:
    """The square as (size, size, 4) float32 in [0, 1], straight alpha.

    Shrinking averages, enlarging interpolates (cubic splines); outside of the photo it is mirrored
    and blurred over a soft border.

    Args:
        pixels: (h, w, 4) uint8.
    """
    scale = square.side / size
    factor, finer = max(1, int(scale)), 1 if scale <= 1.0 else 2
    points = square.to_photo(_grid(size * finer))
    outside = _is_outside(points, pixels.shape[1::-1]).astype(np.float32)
    part, corner = _around(pixels, points)
    values = _sample(_shrunk(part, factor), (points - corner) / factor)
    values, outside = (
        plane.reshape(size, finer, size, finer, -1).mean(axis=(1, 3)) for plane in (values, outside)
    )
    if outside.any():
        # From the border outward, so that nothing of the photo itself is blurred.
        weight = np.clip(2.0 * _blur(outside, _BLUR * size) - 1.0, 0.0, 1.0) * outside
        values = values + weight * (_blur(values, _BLUR * size) - values)
    values = np.clip(values, 0.0, 1.0)
    colour = values[..., :3] / np.maximum(values[..., 3:], 1e-4)
    return np.concatenate([np.clip(colour, 0.0, 1.0), values[..., 3:]], axis=-1)


def _grid(size: int) -> np.ndarray:
    """(size * size, 2) pixel centres of a unit square, row by row."""
    steps = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(steps, steps)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _head_points(framing: str) -> np.ndarray:
    """(n, 2) points all over the head, in fractions of the crop."""
    zoom, (right, up, _) = pose.FRAMINGS[framing]
    grid = _grid(64)
    inside = (((grid - _HEAD_CENTRE) / _HEAD_HALF) ** 2).sum(axis=1) < 1.0
    shift = np.array([right, -up]) * cameras.FOCAL / cameras.RADIUS
    return 0.5 + zoom * (grid[inside] - 0.5) + shift


def _is_outside(points: np.ndarray, photo_size: tuple[int, int]) -> np.ndarray:
    return ((points < 0.0) | (points > np.asarray(photo_size))).any(axis=1)


def _outside(points: np.ndarray, photo_size: tuple[int, int]) -> float:
    return float(_is_outside(points, photo_size).mean())


def _around(pixels: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of the photo that is needed for points and mirrored points, and its corner (2,)."""
    size = np.array(pixels.shape[1::-1])
    low, high = np.floor(points.min(axis=0)) - 4, np.ceil(points.max(axis=0)) + 4
    low, high = np.minimum(low, 2 * size - high), np.maximum(high, -low)
    low = np.clip(low, 0, size - 1).astype(int)
    high = np.clip(high, low + 1, size).astype(int)
    return pixels[low[1] : high[1], low[0] : high[0]], low


def _shrunk(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Premultiplied float32 in [0, 1], averaged over blocks of `factor` x `factor` pixels."""
    image = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGBa")
    return np.asarray(image.reduce(factor), np.float32) / 255.0


def _sample(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n, c) values of (h, w, c) at (n, 2) points by cubic splines, mirrored at the borders."""
    at = points.T[::-1] - 0.5
    planes = np.moveaxis(values, -1, 0)
    return np.stack([ndimage.map_coordinates(x, at, order=3, mode="reflect") for x in planes], -1)


def _blur(planes: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian blur of (h, w, c), the border repeated."""
    return ndimage.gaussian_filter(planes, (deviation, deviation, 0.0), mode="nearest", truncate=3)
