"""A density grid becomes a clean mesh of one head: marching cubes, largest piece, closed below."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage
from skimage import measure

from data_prep.parametric.head import vertex_normals
from data_prep.rendering import render, shading
from spinmeround_jax.files import InputError


@dataclasses.dataclass(frozen=True)
class Surface:
    """A closed surface in world units, and what was left out of it.

    vertices (n, 3) float32; faces (m, 3) int32, counter-clockwise seen from outside; normals (n, 3)
    unit, outward. volume: of what it encloses. floaters: dense voxels that are not part of it, as a
    fraction of all dense ones.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    volume: float
    floaters: float


def grid(size: int, box: float) -> np.ndarray:
    """(size^3, 3) float32 points of the cube of side `box` around the origin, x slowest, z fastest."""
    axis = np.linspace(-box / 2, box / 2, size, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)


def extract(density: np.ndarray, box: float, level: float, margin: float = 0.0) -> Surface:
    """The surface of the largest piece in which the density exceeds `level`.

    Where that piece reaches the border of the cube, as the neck does below, it is closed there with
    a flat cap.

    Args:
        density: (n, n, n), axes x, y, z, at the points of `grid`.
        box: side of the cube, world units.
        margin: nothing is kept nearer than this to the cube's four upright sides.

    Raises:
        InputError: nothing exceeds the level, or the density is not finite.
    """
    size = len(density)
    if density.shape != (size,) * 3 or size < 4 or not np.isfinite(density).all():
        raise InputError(f"expected a finite (n, n, n) density, got {density.shape}")
    outside = min(float(density.min()), level) - 1.0
    field = np.full((size + 2,) * 3, outside, np.float32)  # a border of air closes the surface
    field[1:-1, 1:-1, 1:-1] = density
    step = box / (size - 1)
    thin = int(np.ceil(margin / step)) + 1
    for axis in (0, 2):
        sides = np.moveaxis(field, axis, 0)
        sides[:thin] = sides[-thin:] = outside
    pieces, count = ndimage.label(field > level)
    if count == 0:
        raise InputError(f"the density nowhere exceeds {level:g}")
    voxels = np.bincount(pieces.ravel())[1:]
    largest = 1 + int(voxels.argmax())
    # Air wherever another piece is, and in what is all around it, so that no crumb of it remains.
    others = ndimage.binary_dilation((pieces > 0) & (pieces != largest))
    field[others & (pieces != largest)] = outside
    # Cavities are never visible, but would cost triangles.
    filled = ndimage.binary_fill_holes(pieces == largest)
    inner = ndimage.binary_erosion(filled, iterations=2)
    field[inner] = np.maximum(field[inner], level + 1.0)
    # A flat field has no slope to place the surface by: keep it within a step of the level.
    vertices, faces, _, _ = measure.marching_cubes(field, level, gradient_direction="ascent")
    vertices = ((vertices - 1.0) * step - box / 2).astype(np.float32)
    volume = enclosed_volume(vertices, faces)
    if volume < 0:  # skimage's idea of the inner side; make it ours
        faces, volume = faces[:, ::-1], -volume
    faces = np.ascontiguousarray(faces, np.int32)
    return Surface(
        vertices,
        faces,
        vertex_normals(vertices, faces).astype(np.float32),
        float(volume),
        float(1.0 - voxels.max() / voxels.sum()),
    )


def enclosed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Signed volume; positive if the faces are counter-clockwise seen from outside."""
    a, b, c = np.moveaxis(vertices[faces].astype(np.float64), 1, 0)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6.0)


def scene(vertices: np.ndarray, faces: np.ndarray, normals: np.ndarray) -> render.Scene:
    """The surface, grey, for `render.render_view`: its normals and coverage are what is wanted."""
    grey = np.full((len(vertices), 3), 0.5, np.float32)
    mesh = render.Mesh(vertices, faces, normals, grey, np.zeros(len(vertices)), shading.SKIN)
    return render.Scene([mesh], shading.make_light(30.0, 35.0, 1.0, 0.0))
