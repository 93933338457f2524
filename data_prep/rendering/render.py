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
    scene: Scene, world_to_camera: np.ndarray, size: int, samples: int = 3
) -> RenderedView:
    """Renders `size` x `size` pixels with `samples`^2 rays each (odd: one is the pixel centre)."""
    world_to_camera = np.asarray(world_to_camera, np.float64)
    origin, directions = pixel_rays(world_to_camera, size, samples)
    hits = scene.cast(np.broadcast_to(origin, directions.shape), directions)
    index = np.flatnonzero(hits["primID"] >= 0)
    face = hits["primID"][index]
    u, v = hits["u"][index, None], hits["v"][index, None]
    a, b, c = scene.faces[face].T
    table = scene.attributes
    values = (1 - u - v) * table[a] + u * table[b] + v * table[c]
    rays = directions[index].astype(np.float32)
    points = origin.astype(np.float32) + hits["tfar"][index, None] * rays
    normals = values[:, :3] / np.maximum(np.linalg.norm(values[:, :3], axis=1, keepdims=True), 1e-6)
    material = scene.material[face]
    normals = _face_the_viewer(normals, rays, hits["Ng"][index], material)
    colour = shading.shade(
        material, normals, -rays / np.linalg.norm(rays, axis=1, keepdims=True), values, scene.light
    )

    def gather(hit_values: np.ndarray) -> np.ndarray:  # sums a pixel's samples
        side = size * samples
        grid = np.zeros((side * side, hit_values.shape[1]), np.float32)
        grid[index] = hit_values
        return grid.reshape(size, samples, size, samples, -1).sum(axis=(1, 3))

    sums = gather(np.concatenate([np.ones((len(index), 1), np.float32), colour, normals], axis=1))
    count = sums[..., :1]
    mean_colour = sums[..., 1:4] / np.maximum(count, 1)
    rgba = np.full((size, size, 4), 255, np.uint8)
    encoded = np.rint(255 * shading.to_srgb(mean_colour)).astype(np.uint8)
    rgba[..., :3] = np.where(count > 0, encoded, 255)
    rgba[..., 3] = np.rint(255 * count[..., 0] / samples**2)
    length = np.linalg.norm(sums[..., 4:7], axis=-1, keepdims=True)
    mean_normals = np.where(length > 1e-6, sums[..., 4:7] / np.maximum(length, 1e-6), 0)
    positions = np.full(((size * samples) ** 2, 3), np.nan, np.float32)
    positions[index] = points
    positions = positions.reshape(size, samples, size, samples, 3)[:, samples // 2, :, samples // 2]
    return RenderedView(rgba, mean_normals.astype(np.float32), positions)


def _face_the_viewer(normals, rays, geometric, material):
    """Turns normals of thin two-sided things (hair, cloth) toward the side that is looked at."""
    side = np.einsum("ij,ij->i", normals, rays)
    flip = (side > 0.35 * np.linalg.norm(rays, axis=1)) & np.isin(
        material, (shading.HAIR, shading.CLOTH)
    )
    return np.where(flip[:, None], -normals, normals)
