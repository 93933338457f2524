"""Names of the files in the folder of a head, and its settings."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

SETTINGS = "settings.json"
PHOTO = "photo.jpg"
PAGE = "index.html"  # stands among the heads, so none can have its name
GENERATOR = "spinmeround_jax.sample"


def is_finished(folder: pathlib.Path, wanted: Mapping[str, Any] | None = None) -> bool:
    """Whether `folder` is a complete result of ours, and with these settings if any are given."""
    found = read_settings(folder)
    if found is None or wanted is None:
        return found is not None
    wanted = json.loads(json.dumps(wanted))
    return all(found.get(name) == value for name, value in wanted.items())


def read_settings(folder: pathlib.Path) -> dict[str, Any] | None:
    """`settings.json` of a folder written here, None where there is none."""
    try:
        settings = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(settings, dict) and settings.get("generator") == GENERATOR
    return settings if ours else None


def view_name(index: int, angles: np.ndarray) -> str:
    """view_007_yaw+052.5_pitch+00.0.png"""
    yaw, pitch = (float(angle) + 0.0 for angle in np.round(angles, 1))  # + 0.0: no minus zero
    return f"view_{index:03d}_yaw{yaw:+06.1f}_pitch{pitch:+05.1f}.png"


def observed_name(index: int) -> str:
    return f"input_{index + 1}" if index else "input"
