"""The identity of a head: a face recogniser's of its frontal views, averaged."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from data_prep.workers import SubjectRejected
from spinmeround_jax.photo import assets
from spinmeround_jax.photo.faces import Face
from spinmeround_jax.photo.prepare import FrontEnd, Models

MAX_YAW, MAX_PITCH = 15.0, 10.0  # degrees, of a view that is frontal enough


@functools.lru_cache(maxsize=1)
def models(folder: pathlib.Path | None, front_end: FrontEnd = "insightface") -> Models:
    """One set per process; `folder` is that of insightface's, see `assets.models_folder`."""
    return Models(folder, front_end=front_end)


def frontal(angles: np.ndarray) -> np.ndarray:
    """Numbers of the (n, 2) views (yaw, pitch) that count as frontal."""
    return np.flatnonzero((np.abs(angles) <= (MAX_YAW, MAX_PITCH)).all(axis=1))


def check_detector(models: Models) -> None:
    """Report a missing model before hours of work.

    Raises:
        AssetError: a model that finds faces is missing.
    """
    for asset in (assets.DETECTOR, assets.LANDMARKS):
        assets.require(asset, models.folder)


def check(models: Models) -> None:
    """As `check_detector`, and the recognition model: it must be the one that weights are trained with."""
    check_detector(models)
    _ = models.recogniser.sha256


def largest_face(models: Models, image: np.ndarray) -> Face | None:
    """Of an (h, w, 3) uint8 image."""
    faces = models.finder.find(image)
    return faces[0] if faces else None


def embed(models: Models, images: Sequence[np.ndarray]) -> np.ndarray:
    """(512,) unit float32: mean of the identities of (h, w, 3) uint8 views, on white.

    Raises:
        SubjectRejected: no view shows a face.
    """
    vectors = []
    for image in images:
        if (face := largest_face(models, image)) is not None:
            vectors.append(models.identify(image, face))
    if not vectors:
        raise SubjectRejected(f"no face is found in its {len(images)} frontal views")
    mean = np.mean(vectors, axis=0)
    length = float(np.linalg.norm(mean))
    if length < 1e-3:
        raise SubjectRejected("its frontal views have nothing in common")
    return (mean / length).astype(np.float32)
