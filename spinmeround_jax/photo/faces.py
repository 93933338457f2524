"""Faces in a photo and who they are: insightface's antelopev2 models, run by insightface.

insightface is imported when the first model is loaded, so that photos with landmarks given by hand
need neither it nor its models.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax import ID_EMBEDDING_SIZE
from spinmeround_jax.photo import assets
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.landmarks import FaceError

INSTALL = "pip install 'spinmeround_jax[photo]'"

# Detection at two scales, as insightface 2 does it: the small one finds faces that fill the photo.
_DETECTION_SIZES = [(128, 128), (640, 640)]
_DETECTION_SCORE = 0.5
_OVERLAP = 0.4
# The models see at most 640 pixels; sampling them from many more would only alias.
_LONGEST = 1600


@dataclasses.dataclass(frozen=True)
class Face:
    """A detected face, photo pixels.

    box: (4,) left, top, right, bottom. score: 0 to 1. landmarks5: (5, 2). landmarks: (68, 3), the third
    being depth.
    """

    box: np.ndarray
    score: float
    landmarks5: np.ndarray
    landmarks: np.ndarray

    @property
    def area(self) -> float:
        return float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))


class FaceFinder:
    """Detects faces and their landmarks. `models` is the folder, see `assets`.

    Raises:
        AssetError: insightface or a model is missing, or a file is no such model.
    """

    def __init__(self, models: pathlib.Path):
        self.detector_path = assets.require(assets.DETECTOR, models)
        self.landmarks_path = assets.require(assets.LANDMARKS, models)
        self._detector = _load(self.detector_path, "detection")
        self._detector.prepare(
            0, input_size=_DETECTION_SIZES, det_thresh=_DETECTION_SCORE, nms_thresh=_OVERLAP
        )
        self._landmarks = _load(self.landmarks_path, "landmark_3d_68")

    def find(self, photo: np.ndarray) -> list[Face]:
        """Faces of an (h, w, 3) uint8 RGB photo, the largest first.

        Raises:
            FaceError: the detector gives no landmarks.
        """
        height, width = photo.shape[:2]
        scale = min(1.0, _LONGEST / max(height, width))
        if scale < 1.0:
            smaller = (max(1, round(width * scale)), max(1, round(height * scale)))
            photo = np.asarray(Image.fromarray(photo).resize(smaller, Image.Resampling.BOX))
        bgr = np.ascontiguousarray(photo[..., ::-1])
        boxes, landmarks5 = self._detector.detect(bgr)
        if landmarks5 is None:
            raise FaceError(f"{self.detector_path}: a detector without landmarks; use *_bnkps")
        faces = [self._face(bgr, box, five) for box, five in zip(boxes, landmarks5, strict=True)]
        faces = [_scaled(face, photo.shape, (height, width)) for face in faces]
        return sorted(faces, key=lambda face: -face.area)

    def _face(self, bgr: np.ndarray, box: np.ndarray, five: np.ndarray) -> Face:
        from insightface.app.common import Face as Detected

        detected = Detected(bbox=box[:4], kps=five, det_score=box[4])
        landmarks = np.array(self._landmarks.get(bgr, detected), np.float64)
        landmarks[:, :2] += 0.5  # insightface counts from the centre of the first pixel
        return Face(box[:4] + 0.5, float(box[4]), five.astype(np.float64) + 0.5, landmarks)


class Recogniser:
    """Faces to ArcFace vectors. `path` is an ONNX file; `sha256` identifies it.

    Raises:
        AssetError: insightface is missing, or the file is not the recognition model of the weights.
    """

    def __init__(self, path: pathlib.Path, allow_other: bool = False):
        self.path = path
        self.sha256 = assets.check_recognition(path, allow_other)
        self._model = _load(path, "recognition")
        shape = tuple(self._model.output_shape)
        if shape[-1] != ID_EMBEDDING_SIZE:
            raise AssetError(
                f"{path}: its vectors have {shape[-1]} numbers, the weights need {ID_EMBEDDING_SIZE}; "
                f"use {assets.RECOGNITION.name}"
            )

    def embed(self, image: np.ndarray, five: np.ndarray) -> np.ndarray:
        """(512,) unit float32 of the face at (5, 2) pixels of an (h, w, 3) uint8 RGB image.

        Raises:
            FaceError: the model's answer is not a direction.
        """
        from insightface.app.common import Face as Detected

        bgr = np.ascontiguousarray(image[..., ::-1])
        vector = self._model.get(bgr, Detected(kps=five.astype(np.float32)))
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if not np.isfinite(length) or length < 1e-6:
            raise FaceError(f"{self.path}: the recognition model gave no identity")
        return (vector / length).astype(np.float32)


def _load(path: pathlib.Path, task: str) -> Any:
    """insightface's wrapper of an ONNX file.

    Raises:
        AssetError: insightface is missing, the file is broken, or a model for another task.
    """
    try:
        from insightface import model_zoo
    except ImportError as error:
        raise AssetError(f"faces are found by insightface; {INSTALL} ({error})") from error
    try:
        model = model_zoo.get_model(str(path))
    except Exception as error:  # onnx and onnxruntime raise many kinds
        reason = " ".join(str(error).split())[:200]
        raise AssetError(
            f"{path}: not a readable ONNX model; get it again with {assets.FETCH_COMMAND} ({reason})"
        ) from error
    found = "unknown" if model is None else model.taskname
    if found != task:
        raise AssetError(f"{path}: a model for {found}, expected one for {task}")
    return model


def _scaled(face: Face, from_shape: tuple[int, ...], to_shape: tuple[int, int]) -> Face:
    x, y = to_shape[1] / from_shape[1], to_shape[0] / from_shape[0]
    return Face(
        face.box * [x, y, x, y],
        face.score,
        face.landmarks5 * [x, y],
        face.landmarks * [x, y, (x + y) / 2],
    )
