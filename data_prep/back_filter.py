"""Scores of known faults in heads of 3-D generators: a second face, or debris, at the back.

Trained on images that mostly show faces, such generators sometimes put another face on the back of
a head (An et al., CVPR 2023, fig. 3). The paper's authors threw out three of ten heads by hand; these
scores find the clear cases; `panohead` shows the others to a person.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from spinmeround_jax.photo import pose
from spinmeround_jax.photo.landmarks import load_model
from spinmeround_jax.photo.prepare import Models

BACK_YAWS = (180.0, 150.0, -150.0, 120.0, -120.0)  # degrees: no face should be seen from there
_FEATURES = slice(17, None)  # of the 68 landmarks: all but the jaw
_BLUR = 0.04  # of the image: the shape of the whole head is coarser, features are finer
_SHIFTS = (-0.04, -0.02, 0.0, 0.02, 0.04)  # of the image: a face at the back sits where it likes


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of one head; higher is worse, but for the volume, which should be like that of others.

    back_face: the highest score with which a face was detected from behind (0 if none), None if
    there was no detector. mirror: how much the back has the relief of a face, see `mirror_similarity`.
    floaters: share of the density that is not one piece with the head. volume: world units cubed.
    """

    back_face: float | None
    mirror: float
    floaters: float
    volume: float


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Above which a head is rejected. volume: in robust standard deviations of its logarithm."""

    back_face: float = 0.5
    mirror: float = 0.45
    floaters: float = 0.05
    volume: float = 4.0


def back_face_score(models: Models, views: Sequence[np.ndarray]) -> float:
    """The highest detection score among (h, w, 3) uint8 views from behind, 0 without a face."""
    faces = [face for view in views for face in models.finder.find(view)]
    return max((face.score for face in faces), default=0.0)


def face_window(framing: str) -> tuple[slice, slice]:
    """Fractions of the frontal image, rows and columns, in which brows, eyes, nose and mouth are."""
    model = load_model().moved(*pose.FRAMINGS[framing])
    seen = pose.project(model.mean[_FEATURES], 0.0, 0.0)
    (left, top), (right, bottom) = seen.min(axis=0), seen.max(axis=0)
    return slice(float(top), float(bottom)), slice(float(left), float(right))


def mirror_similarity(front: np.ndarray, back: np.ndarray, framing: str = "canonical") -> float:
    """How much the relief of the back, seen from behind, is that of a face: -1 to 1.

    The highest correlation between the fine structure (a high-pass) of the normals of the face and
    of those of the same region behind, as it is or mirrored, shifted a little. Faces are alike, so
    that the face of another person behind is found too.

    Args:
        front, back: (h, h, 3) normals, each in the space of its own camera, 0 on the background.
    """
    size = len(front)
    rows, columns = (
        slice(math.floor(span.start * size), math.ceil(span.stop * size))
        for span in face_window(framing)
    )
    face, behind = _fine(front), _fine(back)
    face, best = face[rows, columns], -1.0
    for turned in (behind, behind[:, ::-1] * np.array([-1.0, 1.0], np.float32)):
        for down in _SHIFTS:
            for right in _SHIFTS:
                moved = np.roll(turned, (round(down * size), round(right * size)), (0, 1))
                best = max(best, _cosine(face, moved[rows, columns]))
    return best


def _fine(normals: np.ndarray) -> np.ndarray:
    """(h, h, 2): of the components across the line of sight."""
    flat = normals[..., :2].astype(np.float32)
    blur = _BLUR * len(flat)
    return flat - ndimage.gaussian_filter(flat, (blur, blur, 0.0))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    length = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / length if length > 1e-6 else 0.0


def faults(scores: Mapping[str, Scores], thresholds: Thresholds) -> dict[str, list[str]]:
    """Name -> reasons to reject that head, for heads with any."""
    logs = {name: math.log(max(score.volume, 1e-9)) for name, score in scores.items()}
    middle = float(np.median(list(logs.values()))) if logs else 0.0
    # 1.4826 times the median deviation is the standard deviation of normally distributed values;
    # at least one per cent, for very few or very similar heads.
    spread = 1.4826 * float(np.median([abs(x - middle) for x in logs.values()])) if logs else 0.0
    spread = max(spread, 0.01)
    found: dict[str, list[str]] = {}
    for name, score in scores.items():
        off = abs(logs[name] - middle) / spread
        checks = (
            ("a face at the back", score.back_face or 0.0, thresholds.back_face),
            ("the relief of a face at the back", score.mirror, thresholds.mirror),
            ("loose pieces", score.floaters, thresholds.floaters),
            ("an unusual volume", off, thresholds.volume),
        )
        against = [f"{what} ({value:.2f})" for what, value, limit in checks if value > limit]
        if against:
            found[name] = against
    return found
