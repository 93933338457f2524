"""Gaussians as binary glTF 2.0 with KHR_gaussian_splatting: metres, y up, the face along +z, as mesh.glb.

After Khronos's text of July 2026 (release candidate). Readers without the extension show coloured points.
"""

from __future__ import annotations

import json
import pathlib
import struct
from typing import Any

import jax
import numpy as np

from spinmeround_jax.files import InputError, write_atomically
from spinmeround_jax.splats.gaussians import SH_C0, Gaussians
from spinmeround_jax.splats.mesh import METRES_PER_UNIT, to_linear

EXTENSION = "KHR_gaussian_splatting"
_FLOAT, _POINTS, _VERTICES = 5126, 0, 34962


def write_glb(
    path: str | pathlib.Path, gaussians: Gaussians, metres_per_unit: float = METRES_PER_UNIT
) -> None:
    """Write n Gaussians; the file is whole or not there.

    Raises:
        InputError: a value is not finite; nothing is written.
        OSError: the file cannot be written.
    """
    with np.errstate(all="ignore"):  # what comes of it is checked
        attributes = _attributes(gaussians, metres_per_unit)
    if not all(np.isfinite(values).all() for values in attributes.values()):
        raise InputError(f"{path}: Gaussians hold values that are not finite; fit them again")
    views, accessors, start = [], [], 0
    for values in attributes.values():
        views.append(
            {"buffer": 0, "byteOffset": start, "byteLength": values.nbytes, "target": _VERTICES}
        )
        kind = "SCALAR" if values.ndim == 1 else f"VEC{values.shape[1]}"
        accessors.append(
            {
                "bufferView": len(accessors),
                "componentType": _FLOAT,
                "count": len(values),
                "type": kind,
            }
        )
        start += values.nbytes
    positions = attributes["POSITION"]
    accessors[0] |= {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    primitive: dict[str, Any] = {
        "attributes": {name: i for i, name in enumerate(attributes)},
        "mode": _POINTS,
        "extensions": {EXTENSION: {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}},
    }
    tree = {
        "asset": {"version": "2.0", "generator": "spinmeround_jax"},
        "extensionsUsed": [EXTENSION],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": start}],
    }
    head = json.dumps(tree, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 4)
    data = b"".join(values.tobytes() for values in attributes.values())
    content = [
        struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(head) + 8 + len(data)),
        struct.pack("<I4s", len(head), b"JSON") + head,
        struct.pack("<I4s", len(data), b"BIN\0") + data,
    ]
    write_atomically(pathlib.Path(path), b"".join(content))


def _attributes(gaussians: Gaussians, scale: float) -> dict[str, np.ndarray]:
    """Name of an attribute -> (n,) or (n, k) float32, with the activations that the file format leaves out."""
    means, logs, quaternions, logits, sh = (
        np.asarray(values, np.float64) for values in jax.tree.leaves(gaussians)
    )
    quaternions = quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True)
    opacity = 1.0 / (1.0 + np.exp(-logits))
    diffuse = to_linear(np.clip(0.5 + SH_C0 * sh[:, 0], 0.0, 1.0))
    attributes = {
        "POSITION": scale * means,
        "COLOR_0": np.concatenate([diffuse, opacity[:, None]], axis=1),  # for other readers
        f"{EXTENSION}:ROTATION": quaternions[:, [1, 2, 3, 0]],  # x, y, z, w
        f"{EXTENSION}:SCALE": scale * np.exp(logs),
        f"{EXTENSION}:OPACITY": opacity,
    }
    for degree in range(gaussians.degree + 1):
        for n in range(2 * degree + 1):  # from order -degree to degree, as in `Gaussians`
            attributes[f"{EXTENSION}:SH_DEGREE_{degree}_COEF_{n}"] = sh[:, degree**2 + n]
    return {name: np.ascontiguousarray(v, "<f4") for name, v in attributes.items()}
