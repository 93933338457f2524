"""Names of the files in the folder of a head, and its settings."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from spinmeround_jax import schema
from spinmeround_jax.files import InputError, recover

PHOTO = "photo.jpg"
SETTINGS = "settings.json"
PHOTO = "photo.jpg"
PAGE = "index.html"  # stands among the heads, so none can have its name
GENERATOR = "spinmeround_jax.sample"


def is_finished(folder: pathlib.Path, wanted: Mapping[str, Any]) -> bool:
    """Whether `folder` is a complete result of ours, made with these settings.

    Raises:
        InputError: it is one with others, naming them, or not ours.
    """
    recover(folder)
    if not folder.exists():
        return False
    check_ours(folder)
    found = read_settings(folder) or {}
    if changes := schema.differences({k: v for k, v in found.items() if k in wanted}, wanted):
        raise InputError(
            f"{folder}: is finished, made with other settings (there -> here: "
            f"{'; '.join(changes[:5])}{'; ...' if len(changes) > 5 else ''}); --overwrite replaces "
            "it, or choose another --out"
        )
    return True


def check_ours(folder: pathlib.Path) -> None:
    """Raises InputError where `folder` is there and not a result of ours to replace."""
    if folder.name == PAGE:
        raise InputError(f"{folder}: is the name of the page; rename the input")
    if (folder.exists() or folder.is_symlink()) and read_settings(folder) is None:
        raise InputError(
            f"{folder}: in the way, not written by this program; move it, or choose another --out"
        )


def read_settings(folder: pathlib.Path) -> dict[str, Any] | None:
    """`settings.json` of a folder written here, None where there is none."""
    try:
        return schema.read(folder / SETTINGS, _SETTINGS)
    except (OSError, ValueError):
        return None


_SETTINGS = schema.record({"generator": schema.one_of(GENERATOR)})


def view_name(index: int, angles: np.ndarray) -> str:
    """view_007_yaw+052.5_pitch+00.0.png"""
    yaw, pitch = (float(angle) + 0.0 for angle in np.round(angles, 1))  # + 0.0: no minus zero
    return f"view_{index:03d}_yaw{yaw:+06.1f}_pitch{pitch:+05.1f}.png"


def observed_name(index: int) -> str:
    return f"input_{index + 1}" if index else "input"
