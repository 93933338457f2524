"""How a head is turned, and where in a photo it is, from its landmarks.

PanoHead crops by an FFHQ square around five landmarks and then moves and scales it by the pose of a
3-D face fitted to the photo (An et al., CVPR 2023, sec. 4.1). Here the 3-D face is a statistical
model of landmarks in the canonical frame (`landmarks`), so one least-squares fit gives the turn of
the head and the square at once: the square's pixels are where the canonical camera of
`cameras.orbit(yaw, pitch)` would see the same head.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import OptimizeResult, least_squares

from spinmeround_jax import cameras
from spinmeround_jax.photo.landmarks import FaceError, LandmarkModel, five_of, load_model

# Where models expect the head: how data_prep places it (head.placement) is "canonical"; others are
# that, enlarged and moved in the world. "close" is that of rendered heads: hair and hats still fit,
# and eyes have a quarter more pixels. The released weights were trained on heads as PanoHead crops them,
# much larger; measured on the crops that its repository shows, see docs/photos.md.
FRAMINGS = {
    "canonical": (1.0, (0.0, 0.0, 0.0)),
    "close": (1.25, (0.0, 0.0, 0.0)),
    "panohead": (1.485, (0.0, 0.033, -0.025)),
}

# Heads in photographs are rarely turned further; keeps fits of few landmarks from running away.
_YAW_SPREAD, _PITCH_SPREAD = 45.0, 12.0  # degrees
_STARTS = (-45.0, 0.0, 45.0)  # degrees of yaw: the fit is not convex
_EVALUATIONS, _ROUNDS = 60, 6
# Of a landmark along an axis, fractions of the square: at first 10 pixels of 512, at last 0.4.
_FIRST_NOISE, _SMALLEST_NOISE = 0.02, 0.0008
_FIRST_DEPTH_NOISE = 0.1
_WIDTHS = cameras.FOCAL / cameras.RADIUS  # world units to image widths, at the head's centre


@dataclasses.dataclass(frozen=True)
class Correction:
    """Of a square by hand: moved along its own axes by fractions of its side, enlarged by a factor, and
    turned clockwise by degrees."""

    right: float = 0.0
    down: float = 0.0
    size: float = 1.0
    roll: float = 0.0

    def centred(self, x: float, y: float) -> Correction:
        """Moved to where (x, y) is in the corrected square, [0, 1] from its upper left."""
        square = Square(np.zeros(2), 1.0, 0.0).corrected(self)
        right, down = square.to_photo(np.array([x, y]))
        return dataclasses.replace(self, right=float(right), down=float(down))


@dataclasses.dataclass(frozen=True)
class Square:
    """A square in a photo, pixels (x right, y down, pixel centres at +0.5).

    centre: (2,). side: its length. roll: degrees by which its upper side is turned clockwise.
    """

    centre: np.ndarray
    side: float
    roll: float

    def to_photo(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) positions in the square, [0, 1] from its upper left, to photo pixels."""
        return self.centre + self.side * (np.asarray(points) - 0.5) @ self._axes

    def from_photo(self, points: np.ndarray) -> np.ndarray:
        """Inverse of `to_photo`."""
        return (np.asarray(points) - self.centre) @ self._axes.T / self.side + 0.5

    @property
    def corners(self) -> np.ndarray:
        """(4, 2) photo pixels: upper left, upper right, lower right, lower left."""
        return self.to_photo(np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float64))

    def corrected(self, by: Correction) -> Square:
        middle = self.to_photo(np.array([0.5 + by.right, 0.5 + by.down]))
        return Square(middle, self.side * by.size, self.roll + by.roll)

    @property
    def _axes(self) -> np.ndarray:
        cosine, sine = np.cos(np.deg2rad(self.roll)), np.sin(np.deg2rad(self.roll))
        return np.array([[cosine, sine], [-sine, cosine]])


@dataclasses.dataclass(frozen=True)
class HeadPose:
    """A fitted head.

    square: what the canonical camera sees. yaw, pitch: of that camera, degrees, as in `cameras`
    (positive yaw: the photo was taken from the person's left). error: root mean square distance
    of landmarks and model, as a fraction of the square. landmarks: all (68, 2) of the fitted model,
    in the photo.
    """

    square: Square
    yaw: float
    pitch: float
    error: float
    landmarks: np.ndarray


def ffhq_square(landmarks: np.ndarray) -> Square:
    """FFHQ's oriented square (Karras et al., CVPR 2019, app. A) around (5 or 68, 2) landmarks.

    Its half side is the larger of 2.0 eye distances and 1.8 eye-to-mouth distances.
    """
    eye_left, eye_right, _, mouth_left, mouth_right = five_of(landmarks)[:, :2]
    eyes, mouth = (eye_left + eye_right) / 2, (mouth_left + mouth_right) / 2
    across, down = eye_right - eye_left, mouth - eyes
    # "Down" turned by a quarter also points across: the mean of both is steadier than the eyes.
    x = across + np.array([down[1], -down[0]])
    half = max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down))
    return Square(eyes + 0.1 * down, 2.0 * half, float(np.rad2deg(np.arctan2(x[1], x[0]))))


def project(points: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """(..., 3) world points -> (..., 2) in the canonical image, [0, 1] from the upper left."""
    return _see(points, yaw, pitch)[..., :2]


def _see(points: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """(..., 3): as `project`, and how near to the camera, in image widths at the head's centre."""
    camera = cameras.orbit(yaw, pitch).astype(np.float64)
    seen = points @ camera[:3, :3].T + camera[:3, 3]
    flat = 0.5 + cameras.FOCAL * seen[..., :2] * [1, -1] / -seen[..., 2:]
    return np.concatenate([flat, _WIDTHS * (seen[..., 2:] + cameras.RADIUS)], axis=-1)


def fit(landmarks: np.ndarray, framing: str = "canonical") -> HeadPose:
    """Finds yaw, pitch and the square in which the canonical camera sees the head.

    Minimises the squared distances, in the square, of the landmarks and the projected model, over
    yaw, pitch, the square and the model's coefficients, each weighed by its spread. How far the
    landmarks are from any head of the model is estimated along the way (MacKay's evidence
    framework): the worse they fit, the more the mean head counts.

    Args:
        landmarks: (5 or 68, 2 or 3) photo pixels. The third column is depth, of any scale and
            either sign, as `1k3d68` guesses it; its noise is estimated on its own.
        framing: one of FRAMINGS.

    Raises:
        FaceError: not so many landmarks, not finite, or all in one place.
    """
    landmarks = np.asarray(landmarks, np.float64)
    if landmarks.ndim != 2 or landmarks.shape[0] not in (5, 68) or landmarks.shape[1] not in (2, 3):
        raise FaceError(f"expected 5 or 68 landmarks (x, y), got an array {landmarks.shape}")
    flat = landmarks[:, :2]
    spread = np.linalg.norm(flat - flat.mean(axis=0), axis=1).max()
    if not np.isfinite(landmarks).all() or spread < 1.0:
        raise FaceError("landmarks that are not finite, or all in one place")
    model = load_model().moved(*FRAMINGS[framing])
    problem = _Problem(landmarks, model)
    best = min((problem.solve(problem.start(yaw)) for yaw in _STARTS), key=lambda found: found.cost)
    for _ in range(_ROUNDS):
        problem.estimate_noise(best)
        best = problem.solve(best.x)
    return problem.pose(best.x)


class _Problem:
    """The least-squares problem of one face.

    Parameters: yaw, pitch (degrees); a, b, c, d with (a + bi)(x + yi) + (c + di) taking normalised
    landmarks to canonical image coordinates (linear, so no scale can collapse), and, where there is
    depth, e, f taking it to `_see`'s; the model's coefficients. Residuals stand in three blocks, of
    x, of y and of depth.
    """

    def __init__(self, landmarks: np.ndarray, model: LandmarkModel):
        self.whole = model
        self.model = model if len(landmarks) == len(model.mean) else model.of_five()
        self.middle = landmarks.mean(axis=0)
        self.unit = np.sqrt(((landmarks - self.middle)[:, :2] ** 2).sum(axis=1).mean())
        x, y, *depth = ((landmarks - self.middle) / self.unit).T
        one, zero = np.ones_like(x), np.zeros_like(x)
        rows = [[x, -y, one, zero], [y, x, zero, one]]
        if depth:
            rows = [[*row, zero, zero] for row in rows] + [[zero] * 4 + [depth[0], one]]
        # (2 n or 3 n, 4 or 6): derivative of the mapped landmarks by a, b, c, d (, e, f).
        self.linear = np.concatenate([np.stack(row, axis=1) for row in rows])
        self.blocks = len(rows)
        self.shape = slice(2 + self.linear.shape[1], None)
        self.left_out = self.model.noise * _WIDTHS
        self._set_noise(_FIRST_NOISE, _FIRST_DEPTH_NOISE)

    def start(self, yaw: float) -> np.ndarray:
        """Parameters of the mean head at this yaw, in the square that fits it best."""
        parameters = np.zeros(self.shape.start + len(self.model.modes))
        parameters[0] = yaw
        seen = self._stacked(_see(self.model.mean, yaw, 0.0))
        parameters[2 : self.shape.start] = np.linalg.lstsq(self.linear, seen, rcond=None)[0]
        return parameters

    def solve(self, start: np.ndarray) -> OptimizeResult:
        """The nearest minimum by Levenberg and Marquardt's method: x, cost, jac and fun at x."""
        return least_squares(
            lambda x: self._linearised(x)[0],
            start,
            jac=lambda x: self._linearised(x)[1],
            method="lm",
            x_scale="jac",
            ftol=1e-6,
            max_nfev=_EVALUATIONS,
        )

    def estimate_noise(self, found: OptimizeResult) -> None:
        """Set the noise to what the fit leaves over, given how much freedom it had."""
        residuals, slopes = found.fun, found.jac
        inverse = np.linalg.inv(slopes.T @ slopes)
        count = len(self.model.mean)

        def beyond(block: slice) -> float:
            data, noise = slopes[block], self.noise[block]
            used = np.einsum("ij,jk,ik->", data, inverse, data)
            left = ((residuals[block] * noise) ** 2).sum() / max(len(noise) - used, 1.0)
            return float(np.sqrt(max(left - (self.left_out**2).mean(), _SMALLEST_NOISE**2)))

        depth = beyond(slice(2 * count, 3 * count)) if self.blocks == 3 else 0.0
        self._set_noise(beyond(slice(0, 2 * count)), depth)

    def pose(self, parameters: np.ndarray) -> HeadPose:
        a, b, c, d = parameters[2:6]
        factor = complex(a, b) / self.unit  # photo to canonical image
        centre = complex(*self.middle[:2]) + (complex(0.5, 0.5) - complex(c, d)) / factor
        square = Square(
            np.array([centre.real, centre.imag]),
            1.0 / abs(factor),
            float(np.rad2deg(-np.angle(factor))),
        )
        seen = _see(self._points(parameters, self.model), *parameters[:2])
        distances = self.linear @ parameters[2 : self.shape.start] - self._stacked(seen)
        return HeadPose(
            square,
            float(parameters[0]),
            float(parameters[1]),
            float(np.sqrt(2.0 * (distances[: 2 * len(seen)] ** 2).mean())),
            square.to_photo(project(self._points(parameters, self.whole), *parameters[:2])),
        )

    def _set_noise(self, flat: float, depth: float) -> None:
        blocks = [flat, flat, depth][: self.blocks]
        self.noise = np.concatenate([np.hypot(self.left_out, beyond) for beyond in blocks])

    def _stacked(self, seen: np.ndarray) -> np.ndarray:
        """(..., n, 3) of `_see` -> (..., 2 n or 3 n), in blocks."""
        blocks = np.moveaxis(seen, -1, -2)[..., : self.blocks, :]
        return blocks.reshape(*seen.shape[:-2], -1)

    def _points(self, parameters: np.ndarray, model: LandmarkModel) -> np.ndarray:
        return model.mean + np.tensordot(parameters[self.shape], model.modes, axes=1)

    def _linearised(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weighed residuals (2 n or 3 n, + 2 + k) and their derivatives by the parameters."""
        yaw, pitch = parameters[:2]
        points = self._points(parameters, self.model)
        seen = _see(points, yaw, pitch)
        turned = np.stack([_see(points, yaw + 0.01, pitch), _see(points, yaw, pitch + 0.01)])
        turns = self._stacked((turned - seen) / 0.01)
        shapes = self._stacked((_see(points + 1e-4 * self.model.modes, yaw, pitch) - seen) / 1e-4)
        slopes = np.concatenate([-turns.T, self.linear, -shapes.T], axis=1)
        residuals = self.linear @ parameters[2 : self.shape.start] - self._stacked(seen)
        prior = np.zeros((2 + len(self.model.modes), len(parameters)))
        prior[0, 0], prior[1, 1] = 1 / _YAW_SPREAD, 1 / _PITCH_SPREAD
        prior[2:, self.shape] = np.eye(len(self.model.modes))
        return (
            np.concatenate([residuals / self.noise, prior @ parameters]),
            np.concatenate([slopes / self.noise[:, None], prior]),
        )
