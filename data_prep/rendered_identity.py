"""The identity of a rendered head, as it would be computed from a photograph of it."""

from __future__ import annotations

import functools

import numpy as np

from data_prep.rendering import render
from spinmeround_jax import ID_EMBEDDING_SIZE, cameras
from spinmeround_jax.photo import face_resnet, mediapipe

SIZE = 256  # pixels: enough for the recogniser, whatever the size of the data set
SAMPLES = 3
ANGLES = (
    ((0.0, 0.0),),
    ((15.0, 0.0), (-15.0, 0.0)),
)  # where no face is found at the first, the next


def about() -> dict[str, str]:
    """Which recogniser the vectors come from, for manifests."""
    return {"name": face_resnet.NAME, "sha256": face_resnet.sha256()}


@functools.lru_cache(maxsize=1)
def face_finder() -> mediapipe.FaceFinder:
    """One per process.

    Raises:
        AssetError: its runtime is missing.
    """
    return mediapipe.FaceFinder()


def embed(scene: render.Scene) -> np.ndarray:
    """(512,) float32 of unit length from frontal views, or 0 where no face is found in any of them."""
    for angles in ANGLES:
        vectors = []
        for yaw, pitch in angles:
            rgba = render.render_view(scene, cameras.orbit(yaw, pitch), SIZE, SAMPLES).rgba
            image = render.on_white(rgba)
            if faces := face_finder().find(image):
                vectors.append(face_resnet.embed(image, faces[0].landmarks))
        if vectors:
            mean = np.mean(vectors, axis=0)
            return (mean / np.linalg.norm(mean)).astype(np.float32)
    return np.zeros(ID_EMBEDDING_SIZE, np.float32)
