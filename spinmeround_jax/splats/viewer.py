"""Gaussians -> one HTML page that a person opens from disk and spins: no server, no network.

The page holds the Gaussians, the code in `viewer_files/page.js` and the renderer, PlayCanvas
(`viewer_files/NOTICE`). Its content security policy allows these scripts by their hashes and forbids
every connection. Centres are kept as float32, all else as float16, to halve the page; Gaussians too faint
to be drawn are left out.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError, write_atomically
from spinmeround_jax.splats.gaussians import Gaussians
from spinmeround_jax.splats.ply import read_ply

MAX_PAGE = 64 * 2**20  # bytes; browsers and laptops take their time with more
MAX_TITLE = 200  # characters
FAINTEST = 1.0 / 255.0  # opacity below which 3DGS draws nothing
FIELD_OF_VIEW = math.degrees(2.0 * math.atan(0.5 / cameras.FOCAL))  # degrees, of the smaller side


def write_page(
    path: str | pathlib.Path,
    gaussians: Gaussians | str | pathlib.Path,
    title: str,
    middle: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0),
    distance: float = cameras.RADIUS,
    field_of_view: float = FIELD_OF_VIEW,
    background: Sequence[float] | np.ndarray = (1.0, 1.0, 1.0),
) -> None:
    """Write the page; it is whole or not there. It opens frontally, y up.

    Args:
        gaussians: n of them, or a 3DGS .ply file.
        title: any text.
        middle: (3,) point in the world that the camera turns around.
        distance: of the camera from it.
        field_of_view: degrees that the smaller side of the window shows.
        background: (3,) in [0, 1].

    Raises:
        InputError: nothing to draw, values that are not finite, or the page would exceed MAX_PAGE.
        InputError: the .ply file is not one.
        OSError: a file cannot be read or written.
    """
    path = pathlib.Path(path)
    if not isinstance(gaussians, Gaussians):
        gaussians = read_ply(gaussians)
    view = np.array([*middle, distance, field_of_view, *background], np.float64)
    if view.shape != (8,) or not np.isfinite(view).all():
        raise InputError(f"{path}: middle, distance, field of view, background: {view.tolist()}")
    if distance <= 0 or not 0 < field_of_view < 180 or (abs(view[5:] - 0.5) > 0.5).any():
        raise InputError(
            f"{path}: distance {distance}, field of view {field_of_view}, background "
            f"{view[5:].tolist()}; expected more than 0, 0 to 180 degrees, 0 to 1"
        )
    columns = _columns(gaussians, path)
    count = len(columns["x"])
    packed = b"".join(column.tobytes() for column in columns.values())
    light = float(view[5:] @ (0.2126, 0.7152, 0.0722)) > 0.5
    colour = "#" + "".join(f"{round(255 * c):02x}" for c in view[5:])
    settings = {
        "count": count,
        "properties": list(columns),
        "middle": view[:3].tolist(),
        "distance": float(distance),
        "fieldOfView": float(field_of_view),
        "background": colour,
    }
    renderer, script = _read("playcanvas.js"), _read("page.js")
    slots = {
        "title": html.escape(title[:MAX_TITLE]),
        "background": colour,
        "ink": "#222222" if light else "#eeeeee",
        "hashes": " ".join(_hash(text) for text in (renderer, script)),
        "settings": json.dumps(settings),
        "splats": base64.b64encode(packed).decode("ascii"),
        "licence": _read("playcanvas.LICENSE").strip(),
        "renderer": renderer,
        "script": script,
    }
    # One pass: what is put into a slot is never read as a slot.
    page = re.sub(r"\[\[(\w+)\]\]", lambda match: slots[match[1]], _read("page.html"))
    content = page.encode("utf-8", "replace")
    if len(content) > MAX_PAGE:
        raise InputError(
            f"{path}: {count} Gaussians with harmonics of degree {gaussians.degree} make a page of "
            f"{len(content) / 2**20:.0f} MiB, more than {MAX_PAGE // 2**20}; fit fewer or a lower degree"
        )
    write_atomically(path, content)


def _columns(gaussians: Gaussians, path: pathlib.Path) -> dict[str, np.ndarray]:
    """Property of the .ply format -> (n,) values of the Gaussians that can be seen."""
    sh = np.asarray(gaussians.sh, np.float32)
    rest = sh[:, 1:].transpose(0, 2, 1).reshape(len(sh), 3 * (sh.shape[1] - 1))  # by channel
    quaternions = np.asarray(gaussians.quaternions, np.float32)
    parts = {
        "opacity": np.asarray(gaussians.opacity_logits, np.float32)[:, None],
        "scale_": np.asarray(gaussians.log_scales, np.float32),
        "rot_": quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True).clip(1e-12),
        "f_dc_": sh[:, 0],
        "f_rest_": rest,
    }
    means = np.asarray(gaussians.means, np.float32)
    if not all(np.isfinite(values).all() for values in (means, *parts.values())):
        raise InputError(f"{path}: the Gaussians hold values that are not finite; fit them again")
    seen = parts["opacity"][:, 0] > math.log(FAINTEST / (1.0 - FAINTEST))
    if not seen.any():
        raise InputError(f"{path}: no Gaussian is opaque enough to be drawn; fit them again")
    columns = {name: means[seen, i] for i, name in enumerate("xyz")}
    largest = float(np.finfo(np.float16).max)
    for prefix, values in parts.items():
        halves = values[seen].clip(-largest, largest).astype("<f2")
        for i in range(values.shape[1]):
            columns[prefix if prefix == "opacity" else f"{prefix}{i}"] = halves[:, i]
    return columns


def _read(name: str) -> str:
    file = importlib.resources.files("spinmeround_jax.splats") / "viewer_files" / name
    return file.read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """A script, as a content security policy names it."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
