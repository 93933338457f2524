"""The input of one training step; without Grain, so that compiling a step needs no loader."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """b examples of v views of one subject each, numpy arrays, channels last.

    Holds images and normals, or the moments of both if latents were computed before training.

    observed: (b, v) bool, True first; if any view is observed, view 0 is and shows the face.
    dropped: (b,) bool, guidance dropout: train without identity and observed images.
    identity_dropped: (b,) bool, train without identity.
    id_embedding: (b, 512) float32, unit length, or 0 if unknown.
    world_to_camera: (b, v, 4, 4) float32; relative to view 0 if configured and view 0 is observed.
    images: (b, v, h, w, 3) float32 in [-1, 1], composited on the example's background.
    normals: (b, v, h, w, 3) float32 in [-1, 1], in the configured frame; 0 on the background.
    moments: (b, v, 2, h, w, 2z) float32 posterior of images, then normals: scaled mean and deviation.
    """

    observed: np.ndarray
    dropped: np.ndarray
    identity_dropped: np.ndarray
    id_embedding: np.ndarray
    world_to_camera: np.ndarray
    images: np.ndarray | None = None
    normals: np.ndarray | None = None
    moments: np.ndarray | None = None
