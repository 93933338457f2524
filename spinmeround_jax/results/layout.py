"""Folders of results: the names of a head's files, and which folders are finished or may be replaced."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from spinmeround_jax import schema
from spinmeround_jax.cli import UsageError
from spinmeround_jax.files import InputError, recover

PHOTO = "photo.jpg"
SETTINGS = "settings.json"
PAGE = "index.html"  # lies among the heads, so no head can have its name
GENERATOR = "spinmeround_jax.sample"


def is_finished(
    folder: pathlib.Path,
    wanted: Mapping[str, Any],
    file: str = SETTINGS,
    generator: str = GENERATOR,
) -> bool:
    """Whether `folder` is a complete result with these settings; `file` in it records them.

    Raises:
        InputError: it is a result with others, naming them, or see `check_ours`.
    """
    recover(folder)
    check_ours(folder, file, generator)
    if not folder.exists():
        return False
    found = _restricted(read_settings(folder, file, generator) or {}, wanted)
    if changes := schema.differences(found, wanted):
        raise InputError(
            f"{folder}: is finished, with other settings or inputs (there -> here: "
            f"{'; '.join(changes[:5])}{'; ...' if len(changes) > 5 else ''}); --overwrite replaces "
            "it, or choose another --out"
        )
    return True


def _restricted(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `found`, nested ones too, that `wanted` has."""
    both = {name: found[name] for name in wanted if name in found}
    return {
        name: _restricted(value, wanted[name])
        if isinstance(value, dict) and isinstance(wanted[name], dict)
        else value
        for name, value in both.items()
    }


def check_ours(folder: pathlib.Path, file: str = SETTINGS, generator: str = GENERATOR) -> None:
    """Raises UsageError if `folder` exists and is not a result of `generator`, or has the page's name."""
    if folder.name == PAGE:
        raise UsageError(f"{folder}: is the name of the page; rename the input")
    if folder.exists() or folder.is_symlink():
        if read_settings(folder, file, generator) is None:
            raise UsageError(
                f"{folder}: in the way, not written by this program; move it, or choose another --out"
            )


def read_settings(
    folder: pathlib.Path, file: str = SETTINGS, generator: str = GENERATOR
) -> dict[str, Any] | None:
    """The settings that `generator` recorded in its folder; None if they are missing or damaged."""
    try:
        return schema.read(folder / file, schema.record({"generator": schema.one_of(generator)}))
    except (OSError, ValueError):
        return None


def view_name(index: int, angles: np.ndarray) -> str:
    """view_007_yaw+052.5_pitch+00.0.png"""
    yaw, pitch = (float(angle) + 0.0 for angle in np.round(angles, 1))  # + 0.0: no minus zero
    return f"view_{index:03d}_yaw{yaw:+06.1f}_pitch{pitch:+05.1f}.png"


def observed_name(index: int) -> str:
    """input, input_2, input_3"""
    return f"input_{index + 1}" if index else "input"
