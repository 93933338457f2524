"""Faces, their landmarks and people in images: MediaPipe's models, run by LiteRT.

The three model files in models/ are Google's, Apache-2.0, unchanged (see models/NOTICE). What goes in
and how answers are read follows Bazarevsky et al. 2019 (BlazeFace), Kartynnik et al. 2019 (Face Mesh)
and MediaPipe's model cards. LiteRT is imported when the first model is loaded.
"""

from __future__ import annotations

import functools
import pathlib

import numpy as np
from PIL import Image

from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.faces import Face
from spinmeround_jax.photo.landmarks import five_of

NAME = "MediaPipe"
_FOLDER = pathlib.Path(__file__).parent / "models"

_DETECTOR_SIDE, _MESH_SIDE, _PERSON_SIDE = 128, 192, 256  # pixels that the models take
_DETECTION_SCORE, _MESH_SCORE, _OVERLAP = 0.5, 0.8, 0.3
_AROUND_FACE = 1.5  # the mesh sees this many sides of a face's box
_POINTS = 468
_EYES = (33, 263)  # outer corners in the mesh, from the image's left to its right
# A face must be about a tenth of what the detector sees: tiles of so many a longer side, where it sees none.
_TILES = (1, 2, 4)

# The 68 landmarks of the fit among the mesh's points. Jaw, brows and the ridge of the nose: the points
# that lie nearest, on average, to where rendered heads have those landmarks (data_prep/parametric/landmarks.py;
# 25 heads, 5 views each); eyes, mouth and the base of the nose: as commonly matched with iBUG's 300-W.
MESH_OF_68 = (
    127, 234, 93, 58, 172, 150, 149, 176, 152, 400, 378, 365, 397, 288, 361, 454, 356,
    70, 105, 66, 65, 55, 285, 295, 296, 334, 300, 168, 197, 5, 4, 98, 97, 2, 326, 327,
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,
)  # fmt: skip


class FaceFinder:
    """Detects faces and their landmarks.

    Raises:
        AssetError: LiteRT is missing.
    """

    def __init__(self) -> None:
        self._detector = _Model("face_detection_short_range.tflite")
        self._mesh = _Model("face_landmark.tflite")

    def find(self, photo: np.ndarray) -> list[Face]:
        """Faces of an (h, w, 3) uint8 RGB photo, the largest first."""
        for tiles in _TILES:
            boxes = []
            for centre, side in _views(photo, tiles):
                seen = self._detect(photo, centre, side)
                # What a tile cuts is whole in its neighbour.
                boxes += [
                    box for box in seen if tiles == 1 or abs(box[1] - centre).max() < side / 2
                ]
            found = [face for face in (self._face(photo, *box) for box in _distinct(boxes)) if face]
            if found:
                return sorted(found, key=lambda face: -face.area)
        return []

    def mesh(self, photo: np.ndarray, centre: np.ndarray, side: float, roll: float):
        """(468, 3) photo pixels of the face in a square turned by `roll` radians, and its score.

        Depth, the third column, is of the same unit, smaller towards the camera.
        """
        seen = warp(photo, centre, side, roll, _MESH_SIDE)
        score, points = sorted(self._mesh.run(seen / 255.0), key=np.size)
        points = points.reshape(_POINTS, 3) * (side / _MESH_SIDE)
        flat = (points[:, :2] - side / 2) @ _axes(roll) + centre
        return np.concatenate([flat, points[:, 2:]], axis=1), float(_sigmoid(score).item())

    def _face(
        self, photo: np.ndarray, score: float, box: np.ndarray, eyes: np.ndarray
    ) -> Face | None:
        side = _AROUND_FACE * (box[1] - box[0]).max()
        points, sure = self.mesh(photo, box.mean(axis=0), side, _angle(*eyes))
        if sure < _MESH_SCORE:  # the second look would talk itself into one
            return None
        # Once more, in the square around the points themselves, as MediaPipe does in videos.
        roll = _angle(*points[_EYES, :2])
        inside = points[:, :2] @ _axes(roll).T
        low, high = inside.min(axis=0), inside.max(axis=0)
        side = _AROUND_FACE * (high - low).max()
        points, sure = self.mesh(photo, (low + high) / 2 @ _axes(roll), side, roll)
        if sure < _MESH_SCORE:
            return None
        landmarks = points[list(MESH_OF_68)]
        return Face(box.ravel(), score, five_of(landmarks)[:, :2], landmarks)

    def _detect(self, photo: np.ndarray, centre: np.ndarray, side: float):
        """(score, (2, 2) corners, (2, 2) eyes) of each anchor that sees a face in this square."""
        seen = warp(photo, centre, side, 0.0, _DETECTOR_SIDE)
        scores, found = sorted(self._detector.run(seen / 127.5 - 1.0), key=np.size)
        scores = _sigmoid(scores.ravel())
        chosen = scores > _DETECTION_SCORE
        # Eight points from each anchor: centre and size of the box, then eyes and four we do not use.
        points = found.reshape(-1, 8, 2)[chosen] / _DETECTOR_SIDE
        middle, size = points[:, 0] + _anchors()[chosen], points[:, 1]
        eyes = points[:, 2:4] + _anchors()[chosen][:, None]
        corners = np.stack([middle - size / 2, middle + size / 2], axis=1)
        to_photo = [(values - 0.5) * side + centre for values in (corners, eyes)]
        return list(zip(scores[chosen].tolist(), *to_photo, strict=True))


class Segmenter:
    """Tells people from the background (MediaPipe's selfie segmentation).

    Raises:
        AssetError: LiteRT is missing.
    """

    name = "selfie segmentation"

    def __init__(self) -> None:
        self._model = _Model("selfie_segmentation.tflite")

    def person(self, image: np.ndarray) -> np.ndarray:
        """(h, w) float32 in [0, 1], 1 = person, of an (h, w, 3) uint8 RGB crop."""
        height, width = image.shape[:2]
        small = Image.fromarray(image).resize((_PERSON_SIDE,) * 2, Image.Resampling.BOX)
        (person,) = self._model.run(np.asarray(small, np.float32) / 255.0)
        mask = Image.fromarray(person.reshape(_PERSON_SIDE, _PERSON_SIDE).astype(np.float32))
        return np.clip(np.asarray(mask.resize((width, height), Image.Resampling.BILINEAR)), 0, 1)


class _Model:
    """One TFLite file: an image in, arrays out."""

    def __init__(self, name: str):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise AssetError(
                f"faces are found by LiteRT; pip install 'spinmeround_jax[photo]' ({error})"
            ) from error
        self._interpreter = Interpreter(model_path=str(_FOLDER / name))
        self._interpreter.allocate_tensors()

    def run(self, image: np.ndarray) -> list[np.ndarray]:
        interpreter = self._interpreter
        (given,) = interpreter.get_input_details()
        interpreter.set_tensor(given["index"], image[None].astype(np.float32))
        interpreter.invoke()
        return [interpreter.get_tensor(out["index"]) for out in interpreter.get_output_details()]


def warp(image: np.ndarray, centre: np.ndarray, side: float, roll: float, size: int) -> np.ndarray:
    """A square of an (h, w, 3) uint8 image as (size, size, 3) uint8; black outside of the image.

    Args:
        centre: (2,) and side: pixels of the image, from its corner. roll: radians, clockwise.
    """
    # Averaged first where it shrinks, so that nothing aliases.
    shrink = max(1, round(side / size))
    pixels = Image.fromarray(np.ascontiguousarray(image)).reduce(shrink)
    x, y = _axes(roll) * (side / size / shrink)
    corner = np.asarray(centre) / shrink - (x + y) * size / 2
    return np.asarray(
        pixels.transform(
            (size, size),
            Image.Transform.AFFINE,
            (x[0], y[0], corner[0], x[1], y[1], corner[1]),
            Image.Resampling.BILINEAR,
        )
    )


def _axes(roll: float) -> np.ndarray:
    """Rows: the x and y axes of a square turned clockwise by `roll` radians."""
    return np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])


def _angle(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.arctan2(*(right - left)[::-1]))


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(values.astype(np.float64), -80.0, 80.0)))


@functools.lru_cache(maxsize=1)
def _anchors() -> np.ndarray:
    """(896, 2) centres in [0, 1]: two a cell of the 16 x 16 grid, six a cell of the 8 x 8 grid."""
    grids = []
    for cells, each in ((16, 2), (8, 6)):
        steps = (np.arange(cells) + 0.5) / cells
        x, y = np.meshgrid(steps, steps)
        grids.append(np.repeat(np.stack([x.ravel(), y.ravel()], axis=1), each, axis=0))
    return np.concatenate(grids)


def _views(photo: np.ndarray, tiles: int) -> list[tuple[np.ndarray, float]]:
    """Centres and sides of the squares that cover the photo, `tiles` a longer side, half overlapping."""
    height, width = photo.shape[:2]
    side = max(height, width) / tiles
    rows, columns = (
        [length / 2]
        if length <= side
        else np.linspace(side / 2, length - side / 2, 2 * int(np.ceil(length / side)) - 1)
        for length in (height, width)
    )
    return [(np.array([x, y]), side) for y in rows for x in columns]


def _distinct(boxes: list[tuple[float, np.ndarray, np.ndarray]]):
    """Overlapping detections as one, averaged by their scores (BlazeFace's blending), best first."""
    left = sorted(boxes, key=lambda box: -box[0])
    distinct = []
    while left:
        same = [box for box in left if _shared(box[1], left[0][1]) > _OVERLAP]
        left = [box for box in left if _shared(box[1], left[0][1]) <= _OVERLAP]
        weights = [box[0] for box in same]
        corners, eyes = (
            np.average([box[i] for box in same], axis=0, weights=weights) for i in (1, 2)
        )
        distinct.append((weights[0], corners, eyes))
    return distinct


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two (2, 2) boxes."""
    inside = np.prod(np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0.0, None))
    return float(inside / (np.prod(a[1] - a[0]) + np.prod(b[1] - b[0]) - inside))
