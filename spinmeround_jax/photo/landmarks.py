"""The landmarks of a face, and a statistical model of where they lie on heads.

The 68 points are numbered as in iBUG's 300-W and as insightface's `1k3d68` gives them, from the
image's left to its right: jaw 0-16, brows 17-26, ridge of the nose 27-30, its base 31-35, eyes
36-41 and 42-47, outer lips 48-59, inner lips 60-67. The five are, as detectors give them: eye on
the image's left, eye on its right, tip of the nose, corner of the mouth on the image's left, on its
right.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np

from spinmeround_jax import files, schema
from spinmeround_jax.files import InputError

MODEL_FILE = pathlib.Path(__file__).parent / "landmark_model.npz"
CHAINS = (
    range(0, 17), range(17, 22), range(22, 27), range(27, 31), range(31, 36),
    (*range(36, 42), 36), (*range(42, 48), 42), (*range(48, 60), 48), (*range(60, 68), 60),
)  # fmt: skip

# (5, 68): each of the five as a mean of some of the 68.
FIVE_OF_68 = np.zeros((5, 68))
for _row, _points in enumerate((range(36, 42), range(42, 48), (30,), (48,), (54,))):
    FIVE_OF_68[_row, list(_points)] = 1.0 / len(_points)


class FaceError(InputError):
    """The image shows no face or head that can be used; the message says why."""


def five_of(landmarks: np.ndarray) -> np.ndarray:
    """(5, d) of (68, d) landmarks; (5, d) are returned as they are."""
    return landmarks if len(landmarks) == 5 else FIVE_OF_68 @ landmarks


@dataclasses.dataclass(frozen=True)
class LandmarkModel:
    """Landmarks of a random head: mean + coefficients @ modes + noise, world units (see cameras).

    mean: (n, 3). modes: (k, n, 3), for coefficients of unit variance. noise: (n,) standard
    deviation per axis of what the modes leave out.
    """

    mean: np.ndarray
    modes: np.ndarray
    noise: np.ndarray

    def of_five(self) -> LandmarkModel:
        """The model of the five landmarks that a model of 68 implies."""
        return LandmarkModel(
            FIVE_OF_68 @ self.mean,
            np.einsum("fn,knd->kfd", FIVE_OF_68, self.modes),
            np.sqrt(FIVE_OF_68**2 @ self.noise**2),
        )

    def moved(self, zoom: float, offset: tuple[float, float, float]) -> LandmarkModel:
        """The heads enlarged by `zoom` about the origin, then shifted by `offset`."""
        return LandmarkModel(
            zoom * self.mean + np.asarray(offset), zoom * self.modes, zoom * self.noise
        )


@functools.lru_cache(maxsize=1)
def load_model() -> LandmarkModel:
    """The model of the 68 landmarks over the parametric people of data_prep.

    `python -m data_prep.parametric.landmarks` made it; the file names the people and the command.
    """
    with np.load(MODEL_FILE, allow_pickle=False) as stored:
        return LandmarkModel(
            *(stored[name].astype(np.float64) for name in ("mean", "modes", "noise"))
        )


def build_model(heads: np.ndarray, modes: int) -> LandmarkModel:
    """Principal components of (people, n, 3) landmarks in the canonical frame."""
    people, points, _ = heads.shape
    mean = heads.mean(axis=0)
    deviations = (heads - mean).reshape(people, -1)
    left, lengths, right = np.linalg.svd(deviations, full_matrices=False)
    scaled = right[:modes] * lengths[:modes, None] / np.sqrt(people - 1)
    left_out = deviations - (left[:, :modes] * lengths[:modes]) @ right[:modes]
    noise = np.sqrt((left_out**2).reshape(people, points, 3).mean(axis=(0, 2)))
    return LandmarkModel(mean, scaled.reshape(modes, points, 3), noise)


def read_landmarks(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Landmarks by hand: {"photo.jpg": [[x, y], ... 5 or 68 points]} -> (5 or 68, 2) by `composed` file name.

    Raises:
        InputError: no such file, or not of that form.
    """
    form = '{"photo.jpg": [[x, y], ...]} with 5 or 68 points'
    try:
        entries = schema.read(path, schema.mapping(schema.array(_POINT, 5, 68)))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected {form} ({error})") from error
    if not entries or any(len(points) not in (5, 68) for points in entries.values()):
        raise InputError(f"{path}: expected {form}")
    return {files.composed(name): np.array(points, np.float64) for name, points in entries.items()}


_POINT = schema.array(schema.number(-1e6, 1e6), 2, 2)  # pixels
