"""An overview picture: one row per subject, a few views, and their normals."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_prep import render
from data_prep.people import Person
from data_prep.subjects import build_scene
from spinmeround_jax import cameras

DEFAULT_VIEWS = ((0, 0), (45, 0), (-45, 0), (90, 0), (180, 0), (30, 30))


def composite(rgba: np.ndarray, background: float = 1.0) -> np.ndarray:
    """Straight-alpha (..., 4) uint8 over a flat background in [0, 1] -> (..., 3) uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * background * (1 - alpha)).astype(np.uint8)


def contact_sheet(
    people: Sequence[Person],
    size: int = 128,
    views: Sequence[tuple[float, float]] = DEFAULT_VIEWS,
    normals: Sequence[tuple[float, float]] = ((0, 0), (180, 0)),
) -> Image.Image:
    """RGB image: a row per subject; columns are `views` (yaw, pitch), then `normals` as maps."""
    rows = []
    for person in people:
        scene, _ = build_scene(person, size)
        row = []
        for yaw, pitch in views:
            row.append(composite(render.render_view(scene, cameras.orbit(yaw, pitch), size).rgba))
        for yaw, pitch in normals:
            view = render.render_view(scene, cameras.orbit(yaw, pitch), size)
            row.append((np.rint(view.soft_normals * 127) + 128).astype(np.uint8))
        rows.append(np.concatenate(row, axis=1))
    return Image.fromarray(np.concatenate(rows, axis=0))
