"""A scan in memory: its pieces with their looks, its vertices as its file counts them."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import warnings

import numpy as np
from PIL import Image

from data_prep.parametric.head import vertex_normals
from spinmeround_jax.files import InputError

_FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "TIFF",
    "BMP",
    "TGA",
    "WEBP",
    "GIF",
)  # Pillow also runs PostScript


@dataclasses.dataclass(frozen=True)
class Look:
    """Colours of a piece of n vertices: `colours` times the texture, if there is one.

    colours: (n, 3) linear float32. texture: (h, w, 3) uint8 sRGB, at uv (n, 2), v upward. wrap: what
    lies outside [0, 1], one of "repeat", "mirror", "clamp", for u and v.
    """

    colours: np.ndarray
    texture: np.ndarray | None = None
    uv: np.ndarray | None = None
    wrap: tuple[str, str] = ("repeat", "repeat")


@dataclasses.dataclass(frozen=True)
class Surface:
    """What a reader finds: vertices (n, 3) float64, faces (m, 3) int, their look."""

    vertices: np.ndarray
    faces: np.ndarray
    look: Look


@dataclasses.dataclass(frozen=True)
class Part:
    """One piece of a mesh: vertices (n, 3) float64, faces (m, 3) int, normals (n, 3) unit."""

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    look: Look

    def moved(self, scale: float, rotation: np.ndarray, offset: np.ndarray) -> Part:
        """x -> scale * rotation x + offset."""
        return dataclasses.replace(
            self,
            vertices=scale * self.vertices @ rotation.T + offset,
            normals=self.normals @ rotation.T,
        )


@dataclasses.dataclass(frozen=True)
class Scan:
    """A mesh file. numbered: (n, 3) vertices in the file's own order, None where it has several counts."""

    parts: list[Part]
    numbered: np.ndarray | None


def assemble(
    path: pathlib.Path, surfaces: list[Surface], numbered: np.ndarray | None = None
) -> Scan:
    """The surfaces of one file with normals.

    Normals are computed over vertices at the same place, also of different pieces, so that neither
    seams of the texture nor borders of materials show.

    Raises:
        InputError: no faces, values that are not finite, or numbers of vertices that do not exist.
    """
    surfaces = [surface for surface in surfaces if len(surface.faces)]
    if not surfaces:
        raise InputError(f"{path}: has no faces; a cloud of points cannot be drawn")
    for surface in surfaces:
        look = surface.look
        if not np.isfinite(surface.vertices).all():
            raise InputError(f"{path}: has vertices that are not finite")
        if surface.faces.min() < 0 or surface.faces.max() >= len(surface.vertices):
            raise InputError(f"{path}: its faces have vertices that are not in the file")
        if not np.isfinite(look.colours).all():
            raise InputError(f"{path}: has colours that are not finite")
        if look.uv is not None and (
            look.uv.shape != (len(surface.vertices), 2) or not np.isfinite(look.uv).all()
        ):
            raise InputError(f"{path}: its texture coordinates are not finite, or not one a vertex")
    starts = np.cumsum([0, *(len(surface.vertices) for surface in surfaces)])
    places, same = np.unique(
        np.concatenate([surface.vertices for surface in surfaces]), axis=0, return_inverse=True
    )
    same = same.reshape(-1)
    corners = np.concatenate([s.faces + start for s, start in zip(surfaces, starts, strict=False)])
    normals = vertex_normals(places, same[corners])[same]
    parts = [
        Part(surface.vertices, surface.faces, normals[start : start + len(surface.vertices)], surface.look)
        for surface, start in zip(surfaces, starts, strict=False)
    ]  # fmt: skip
    return Scan(parts, numbered)


def read_texture(path: pathlib.Path, source: pathlib.Path | bytes) -> Image.Image:
    """A texture of the mesh at `path`, decoded; turned by no EXIF tag, as texture coordinates expect it.

    Raises:
        InputError: no image, too large, or grey of more than 8 bits, which Pillow would clip.
    """
    name = source if isinstance(source, pathlib.Path) else "the image inside"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow refuses twice what it warns of, 13,000 squared
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            image = Image.open(file, formats=_FORMATS)
            if image.mode.startswith(("I", "F")):
                raise InputError(
                    f"{path}: {name} has more than 8 bits a channel; convert it to 8 bits"
                )
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds, and the file can hold anything
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: its texture {name} cannot be read ({reason})") from error
