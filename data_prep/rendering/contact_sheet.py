"""An overview image: one row per subject, a few views, and their normals."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_prep.parametric.people import Person
from data_prep.parametric.subjects import build_scene
from data_prep.rendering import render
from spinmeround_jax import cameras

DEFAULT_VIEWS = ((0, 0), (45, 0), (-45, 0), (90, 0), (180, 0), (30, 30))


def contact_sheet(
    people: Sequence[Person],
    size: int = 128,
    framing: str = "canonical",
    views: Sequence[tuple[float, float]] = DEFAULT_VIEWS,
    normals: Sequence[tuple[float, float]] = ((0, 0), (180, 0)),
) -> Image.Image:
    """RGB image: a row per subject; columns are `views` (yaw, pitch), then `normals` as maps."""
    rows = []
    for person in people:
        scene, _ = build_scene(person, size, framing)
        row = []
        for yaw, pitch in views:
            row.append(
                render.on_white(render.render_view(scene, cameras.orbit(yaw, pitch), size).rgba)
            )
        for yaw, pitch in normals:
            view = render.render_view(scene, cameras.orbit(yaw, pitch), size)
            row.append((np.rint(view.soft_normals * 127) + 128).astype(np.uint8))
        rows.append(np.concatenate(row, axis=1))
    return Image.fromarray(np.concatenate(rows, axis=0))
