"""Renders triangle meshes with embree: straight-alpha colour, world normals, positions.

A `Scene` holds world-space triangles with per-vertex attributes; `render_view` casts k x k primary
rays per pixel and shades the hits with plain numpy (data_prep.rendering.shading). Shadows and ambient
occlusion are baked into the vertices once per subject (data_prep.parametric.occlusion), so a view is one ray
per sample and all views agree.
"""

import dataclasses
import itertools

import numpy as np
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from PIL import Image

from data_prep.rendering import shading
from spinmeround_jax import cameras


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Triangles with attributes. n vertices, f faces, all floats float32 or wider.

    vertices (n, 3); faces (f, 3) int; normals (n, 3) unit, outward; albedo (n, 3) linear RGB;
    gloss (n,) strength of the highlight; tangent (n, 3) strand direction (hair only, else zero);
    material: one of shading.SKIN, EYE, HAIR, CLOTH, PLASTIC.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    albedo: np.ndarray
    gloss: np.ndarray
    material: int
    tangent: np.ndarray | None = None


class Scene:
    """World-space triangles ready for ray casting, their attributes, and the light."""

    def __init__(self, meshes: list[Mesh], light: shading.Light):
        starts = np.cumsum([0] + [len(m.vertices) for m in meshes])
        self.faces = np.concatenate([m.faces + s for m, s in zip(meshes, starts, strict=False)])
        self.vertices = np.concatenate([m.vertices for m in meshes]).astype(np.float32)
        self.light = light
        self.spans = [slice(a, b) for a, b in itertools.pairwise(starts)]
        self.material = np.concatenate([np.full(len(m.faces), m.material) for m in meshes])
        tangents = [np.zeros_like(m.vertices) if m.tangent is None else m.tangent for m in meshes]
        # Columns: normal 0:3, albedo 3:6, tangent 6:9, gloss 9, key visibility 10, ambient 11.
        self.attributes = np.concatenate(
            [
                np.column_stack([m.normals, m.albedo, t, m.gloss, np.ones((len(t), 2))])
                for m, t in zip(meshes, tangents, strict=True)
            ]
        ).astype(np.float32)
        self._embree = rtcore_scene.EmbreeScene()
        self._geometry = TriangleMesh(
            self._embree, self.vertices, np.ascontiguousarray(self.faces, np.int32)
        )

    def set_visibility(self, key: np.ndarray, ambient: np.ndarray) -> None:
        """Per-vertex (n,) shares of the key light and of the surroundings that are not blocked."""
        self.attributes[:, 10], self.attributes[:, 11] = key, ambient

    def cast(self, origins: np.ndarray, directions: np.ndarray) -> dict[str, np.ndarray]:
        """First hits of rays (n, 3): 'primID' (-1 = none), 'tfar', 'u', 'v', each (n,)."""
        return self._embree.run(
            np.ascontiguousarray(origins, np.float32),
            np.ascontiguousarray(directions, np.float32),
            output=True,
            query="INTERSECT",
        )

    def blocked(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """(n,) bool: whether rays (n, 3) hit anything; a third quicker than `cast`."""
        return 0 == self._embree.run(
            np.ascontiguousarray(origins, np.float32),
            np.ascontiguousarray(directions, np.float32),
            query="OCCLUDED",
        )


@dataclasses.dataclass(frozen=True)
class RenderedView:
    """rgba (h, w, 4) uint8, straight alpha = coverage, white where alpha is 0.

    normals (h, w, 3) float32 unit, world space, mean over the pixel's hits (zero where none).
    positions (h, w, 3) float32 world point of the hit nearest to the pixel centre (NaN if none).
    """

    rgba: np.ndarray
    normals: np.ndarray
    positions: np.ndarray

    @property
    def soft_normals(self) -> np.ndarray:
        """(h, w, 3) normals times coverage: 0 on the background, blended at the silhouette.

        It is what a normal map stores (records.encode_normals), edges as soft as the colour's.
        """
        return self.normals * (self.rgba[..., 3:].astype(np.float32) / 255)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Straight-alpha (h, w, 4) uint8 -> (h, w, 3) uint8."""
    picture = Image.fromarray(rgba)
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def pixel_rays(world_to_camera: np.ndarray, size: int, samples: int):
    """Camera position (3,) and ray directions (size * samples)^2 x 3, not normalised, world space.

    Samples lie on a regular grid inside each pixel; the camera model is cameras.FOCAL's.
    """
    side = size * samples
    step = ((np.arange(side) + 0.5) / side - 0.5) / cameras.FOCAL
    x, y = np.meshgrid(step, -step)
    directions = np.stack([x, y, -np.ones_like(x)], axis=-1).reshape(-1, 3)
    rotation, translation = world_to_camera[:3, :3], world_to_camera[:3, 3]
    return -rotation.T @ translation, directions @ rotation


def render_view(
    scene: Scene, world_to_camera: np.ndarray, size: int, samples: int = 4
) -> RenderedView:
    """Renders `size` x `size` pixels with `samples`^2 rays each (odd: one is the pixel centre).

    Rays of one pixel that hit the same triangle are shaded once, at their mean point.
    """
    world_to_camera = np.asarray(world_to_camera, np.float64)
    origin, directions = pixel_rays(world_to_camera, size, samples)
    rays = samples**2
    # All rays of a pixel next to each other: coherent for embree, and a pixel is a row below.
    directions = _by_pixel(directions, size, samples)
    hits = scene.cast(np.broadcast_to(origin, directions.shape), directions)
    first = hits["primID"].reshape(-1, rays)
    seen = np.flatnonzero((first >= 0).any(axis=1))  # pixels
    # Sorted by triangle within each pixel; the lowest digits keep the ray's number.
    keys = np.sort(first[seen].astype(np.int64) * rays + np.arange(rays), axis=1)
    hit = keys >= 0  # -1 * rays + number is negative
    triangle = keys // rays
    new = hit.copy()
    new[:, 1:] &= triangle[:, 1:] != triangle[:, :-1]
    starts = np.flatnonzero(new[hit])  # of the groups, among the hits
    ray = (seen[:, None] * rays + keys % rays)[hit]
    count = np.diff(starts, append=len(ray)).astype(np.float32)[:, None]
    sampled = np.column_stack([directions[ray].astype(np.float32), hits["u"][ray], hits["v"][ray]])
    mean = np.add.reduceat(sampled, starts, axis=0) / count
    view, u, v = -_unit(mean[:, :3]), mean[:, 3:4], mean[:, 4:5]
    face = triangle[new]
    a, b, c = scene.faces[face].T
    table = scene.attributes
    values = (1 - u - v) * table[a] + u * table[b] + v * table[c]
    material = scene.material[face]
    normals = _face_the_viewer(_unit(values[:, :3]), view, material)
    colour = shading.shade(material, normals, view, values, scene.light)

    # Sums over each pixel's groups; every seen pixel has at least one.
    sums = np.zeros((size * size, 7), np.float32)
    groups = np.flatnonzero(np.diff(np.nonzero(new)[0], prepend=-1))
    sums[seen] = np.add.reduceat(
        count * np.concatenate([np.ones_like(count), colour, normals], axis=1), groups, axis=0
    )
    sums = sums.reshape(size, size, 7)
    total = sums[..., :1]
    rgba = np.full((size, size, 4), 255, np.uint8)
    encoded = np.rint(255 * shading.to_srgb(sums[..., 1:4] / np.maximum(total, 1)))
    rgba[..., :3] = np.where(total > 0, encoded, 255).astype(np.uint8)
    rgba[..., 3] = np.rint(255 * total[..., 0] / rays)
    length = np.linalg.norm(sums[..., 4:7], axis=-1, keepdims=True)
    mean_normals = np.where(length > 1e-6, sums[..., 4:7] / np.maximum(length, 1e-6), 0)
    middle = samples // 2 * (samples + 1)
    distance = np.where(first[:, middle] >= 0, hits["tfar"].reshape(-1, rays)[:, middle], np.nan)
    positions = origin + distance[:, None] * directions.reshape(-1, rays, 3)[:, middle]
    return RenderedView(
        rgba, mean_normals.astype(np.float32), positions.reshape(size, size, 3).astype(np.float32)
    )


def _by_pixel(rays: np.ndarray, size: int, samples: int) -> np.ndarray:
    """Rows of a (size * samples)^2 grid, row by row, to the order pixel by pixel."""
    grid = rays.reshape(size, samples, size, samples, -1)
    return grid.swapaxes(1, 2).reshape(len(rays), -1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """(n, 3) normalised."""
    length = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return vectors / np.maximum(length, 1e-6)[:, None]


def _face_the_viewer(normals: np.ndarray, view: np.ndarray, material: np.ndarray) -> np.ndarray:
    """Turns normals of thin two-sided things (hair, cloth) toward the side that is looked at."""
    away = np.einsum("ij,ij->i", normals, view) < -0.35
    flip = away & np.isin(material, (shading.HAIR, shading.CLOTH))
    return np.where(flip[:, None], -normals, normals)
