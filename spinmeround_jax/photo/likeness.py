"""Likeness: similarity of the faces in views to the identity that was given."""

from __future__ import annotations

import dataclasses

import numpy as np

from spinmeround_jax.photo.images import to_uint8
from spinmeround_jax.photo.landmarks import FaceError
from spinmeround_jax.photo.prepare import Models


@dataclasses.dataclass(frozen=True)
class Likeness:
    """similarity: (n,) cosine of each view, NaN where no face is found, as from behind.

    recognition: SHA-256 of the recognition model.
    """

    similarity: np.ndarray
    recognition: str

    @property
    def faces(self) -> int:
        """Number of views in which a face was found."""
        return int(np.isfinite(self.similarity).sum())

    @property
    def mean(self) -> float | None:
        """Over the views with a face."""
        return float(np.nanmean(self.similarity)) if self.faces else None


def measure(images: np.ndarray, id_embedding: np.ndarray, models: Models) -> Likeness:
    """Compare the largest face of each (n, H, W, 3) view in [-1, 1] with a (512,) unit identity.

    Raises:
        AssetError: a model is missing.
    """
    cosines = []
    for view in to_uint8(images):
        try:
            faces = models.finder.find(view)
            vector = models.identify(view, faces[0]) if faces else None
        except FaceError:  # of this view; the head itself is fine
            vector = None
        cosines.append(np.nan if vector is None else float(vector @ id_embedding))
    return Likeness(np.array(cosines, np.float64), models.recognition["sha256"])
