"""Similarity of faces by a recognition network: the paper's ArcFace and VGGFace measures.

Any ONNX model of aligned faces serves: (b, 3, s, s) RGB in [-1, 1], s a multiple of 112 (or 128), to one
vector a face; models that scale their input themselves are recognised by their first nodes (insightface).
`likeness` compares with the identity that a model was given; here two sets of images are compared.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib

import numpy as np

from spinmeround_jax import files
from spinmeround_jax.photo import assets, faces
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.faces import FaceFinder
from spinmeround_jax.photo.images import to_uint8
from spinmeround_jax.photo.landmarks import FaceError


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of (..., d) vectors, (...,); NaN where either is, that is where no face was found."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.sum(a * b, axis=-1) / np.where(length > 0, length, np.nan)


class _Network(faces.Recogniser):
    """As its parent, which checks that a file is antelopev2's, but for any recognition model."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.sha256 = files.sha256(path)
        self._model = faces._load(path, "recognition")
        side, shape = self._model.input_size[0], tuple(self._model.output_shape)
        if not isinstance(side, int) or (side % 112 and side % 128):
            raise AssetError(
                f"{path}: takes {self._model.input_shape}, expected aligned faces, (b, 3, 112, 112)"
            )
        if len(shape) != 2 or not isinstance(shape[1], int):
            raise AssetError(f"{path}: gives {shape}, expected one vector a face")
        self.size = shape[1]


class Recogniser:
    """Images to identity vectors of their largest faces.

    Args:
        path: an ONNX file, or a folder of models whose glintr100.onnx (ArcFace) it is.
        models: the folder with the face detector; None is `path` if that is a folder, else as
            `assets.models_folder`. It is opened when a face is looked for.

    Attributes:
        path: the ONNX file. sha256: of it. size: numbers of a vector.

    Raises:
        AssetError: a file is missing, or is no recognition model; or insightface is missing.
    """

    def __init__(self, path: pathlib.Path | str, models: pathlib.Path | None = None):
        given = pathlib.Path(path)
        if given.is_dir():
            self._models = assets.models_folder(models or given)
            given = assets.require(assets.RECOGNITION, given)
        elif given.is_file():
            self._models = assets.models_folder(models)
        else:
            raise AssetError(f"{given}: no such recognition model; check the path")
        self._network = _Network(given)
        self.path, self.sha256, self.size = given, self._network.sha256, self._network.size

    @functools.cached_property
    def _finder(self) -> FaceFinder:
        return FaceFinder(self._models)

    def find(self, images: np.ndarray) -> np.ndarray:
        """(..., 5, 2) landmarks, pixels from the corner, of the largest face of (..., h, w, 3) images.

        NaN where no face is found, as from behind. Images are in [-1, 1].

        Raises:
            AssetError: the detector is missing.
        """
        images = np.asarray(images)
        flat = images.reshape(-1, *images.shape[-3:])
        landmarks5 = np.full((len(flat), 5, 2), np.nan)
        for five, image in zip(landmarks5, flat, strict=True):
            found = self._finder.find(to_uint8(image))
            if found:
                five[:] = found[0].landmarks5
        return landmarks5.reshape(*images.shape[:-3], 5, 2)

    def embed(self, images: np.ndarray, landmarks5: np.ndarray | None = None) -> np.ndarray:
        """(..., size) unit float32 vectors of (..., h, w, 3) images in [-1, 1].

        Args:
            landmarks5: (..., 5, 2) from `find`. Views that are to show the same as true ones are judged best
                at the true ones' landmarks: then a face that is missing counts, and the detector runs
                once for all methods and models. None looks for the images' own faces.

        Returns:
            NaN where there are no landmarks, or the network's answer is no direction.

        Raises:
            AssetError: the detector is missing.
            ValueError: images and landmarks do not belong together.
        """
        images = np.asarray(images)
        landmarks5 = self.find(images) if landmarks5 is None else np.asarray(landmarks5, np.float64)
        if landmarks5.shape != (*images.shape[:-3], 5, 2):
            raise ValueError(f"images are {images.shape}, their landmarks {landmarks5.shape}")
        flat = images.reshape(-1, *images.shape[-3:])
        vectors = np.full((len(flat), self.size), np.nan, np.float32)
        for vector, image, five in zip(vectors, flat, landmarks5.reshape(-1, 5, 2), strict=True):
            if np.isfinite(five).all():
                # Landmarks count from pixel corners, recognition from pixel centres.
                with contextlib.suppress(FaceError):  # of this image: it stays NaN
                    vector[:] = self._network.embed(to_uint8(image), five - 0.5)
        return vectors.reshape(*images.shape[:-3], self.size)
