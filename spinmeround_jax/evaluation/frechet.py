"""FID of every row of a result: over all its images, against all true ones (see `fid`)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from spinmeround_jax.evaluation import fid
from spinmeround_jax.evaluation.measures import FID, Instruments, Score
from spinmeround_jax.evaluation.parts import Parts
from spinmeround_jax.evaluation.results import Strip


def added(
    scores: Sequence[Score],
    strips: Callable[[int], Sequence[Strip]],
    subjects: int,
    instruments: Instruments,
    kept: Parts,
) -> list[Score]:
    """`scores` with their FID, if its network is given and there are enough images.

    Otherwise `instruments.notes` says how many images there are.
    """
    if FID.name not in instruments.wanted or instruments.inception is None:
        return list(scores)
    rows = {"true", *(score.name for score in scores)}
    features: dict[str, list[np.ndarray]] = {}
    for subject in tqdm(range(subjects), desc="inception", unit="subject"):
        for name, pictures in strips(subject):
            if name in rows:
                features.setdefault(name, []).append(_features(pictures, instruments, kept))
    stacked = {name: np.concatenate(parts) for name, parts in features.items()}
    found = []
    for score in scores:
        if score.name in stacked:
            try:
                distance = fid.frechet_distance(stacked[score.name], stacked["true"])
            except ValueError as error:  # too few: the other measures stand
                instruments.notes.append(f"FID of {score.name}: {error}")
            else:
                values = {**score.values, FID.name: np.array([distance])}
                score = dataclasses.replace(score, values=values)
        found.append(score)
    return found


def _features(pictures: np.ndarray, instruments: Instruments, kept: Parts) -> np.ndarray:
    digest = hashlib.sha256(np.ascontiguousarray(pictures).tobytes()).hexdigest()
    decided = {"row": "inception", "file": instruments.files[FID.name], "pictures": digest}

    def make() -> dict[str, np.ndarray]:
        return {"features": instruments.inception(pictures / np.float32(127.5) - 1.0)}

    return kept.make(decided, make)["features"]
