"""Textured meshes from files (obj, ply, glb, ...): read by trimesh, drawn as they are, without light.

A scan's texture is a photograph: it holds its light already.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import trimesh

from data_prep.parametric.head import vertex_normals
from data_prep.rendering import render, shading

SUFFIXES = (".obj", ".ply", ".glb", ".gltf", ".off", ".stl")


class MeshError(ValueError):
    """A mesh file cannot be used; the message names it and says why."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One piece of a mesh: n vertices, m faces.

    vertices (n, 3) float64; faces (m, 3) int; normals (n, 3) unit. Either uv (n, 2), v upward, with
    texture (h, w, 3) linear float32, or colours (n, 3) linear float32.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    uv: np.ndarray | None
    texture: np.ndarray | None
    colours: np.ndarray | None

    def moved(self, scale: float, rotation: np.ndarray, offset: np.ndarray) -> Part:
        """x -> scale * rotation x + offset."""
        return dataclasses.replace(
            self,
            vertices=scale * self.vertices @ rotation.T + offset,
            normals=self.normals @ rotation.T,
        )


def read(path: pathlib.Path) -> list[Part]:
    """The pieces of a mesh, vertices in the order of the file where it has one piece.

    Normals are computed over vertices at the same place, so that seams of the texture do not show.

    Raises:
        MeshError: unreadable, without faces, not finite, or without colours.
    """
    try:
        loaded = trimesh.load_scene(path, process=False)
        pieces = [
            (loaded.graph.get(node)[0], loaded.geometry[loaded.graph.get(node)[1]])
            for node in loaded.graph.nodes_geometry
        ]
        parts = [_part(np.asarray(pose), mesh, path) for pose, mesh in pieces if _has_faces(mesh)]
    except MeshError:
        raise
    except Exception as error:  # trimesh's readers raise many kinds, and the file can hold anything
        raise MeshError(f"{path}: not a readable mesh ({type(error).__name__}: {error})") from error
    if not parts:
        raise MeshError(f"{path}: has no faces; a cloud of points cannot be drawn")
    return parts


def _has_faces(mesh: object) -> bool:
    return isinstance(mesh, trimesh.Trimesh) and len(mesh.faces) > 0


def _part(pose: np.ndarray, mesh: trimesh.Trimesh, path: pathlib.Path) -> Part:
    vertices = np.asarray(mesh.vertices, np.float64) @ pose[:3, :3].T + pose[:3, 3]
    faces = np.asarray(mesh.faces, np.int64)
    if not np.isfinite(vertices).all():
        raise MeshError(f"{path}: has vertices that are not finite")
    places, same = np.unique(vertices, axis=0, return_inverse=True)
    normals = vertex_normals(places, same.reshape(-1)[faces])[same.reshape(-1)]
    uv, texture, colours = None, None, None
    visual = mesh.visual
    if visual.kind == "texture" and visual.uv is not None:
        texture = _texture(visual.material, path)
        uv = np.asarray(visual.uv, np.float64)[:, :2]
        if uv.shape != (len(vertices), 2) or not np.isfinite(uv).all():
            raise MeshError(f"{path}: its texture coordinates are not finite, or not one a vertex")
    elif visual.kind in ("vertex", "face"):
        colours = shading.to_linear(visual.vertex_colors[:, :3] / 255.0).astype(np.float32)
    else:
        raise MeshError(f"{path}: has neither a texture nor colours of its vertices")
    return Part(vertices, faces, normals, uv, texture, colours)


def _texture(material: object, path: pathlib.Path) -> np.ndarray:
    """(h, w, 3) linear float32."""
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    factor = getattr(material, "baseColorFactor", None)
    if image is None:
        factor = factor if factor is not None else getattr(material, "diffuse", None)
        if factor is None:
            raise MeshError(f"{path}: its material has no texture; is the image beside it?")
        pixels = np.ones((1, 1, 3), np.float32)
    else:
        pixels = shading.to_linear(np.asarray(image.convert("RGB")) / np.float32(255))
    if factor is not None and (
        image is None or getattr(material, "baseColorTexture", None) is not None
    ):
        factor = np.asarray(factor, np.float64)[:3]
        pixels = pixels * (factor / 255.0 if factor.max() > 1.0 else factor)
    return pixels.astype(np.float32)


def scene(parts: list[Part]) -> render.Scene:
    """For casting rays; `draw` takes the colours from the parts."""
    meshes = [
        render.Mesh(
            p.vertices, p.faces, p.normals,
            np.zeros((len(p.vertices), 3)), np.zeros(len(p.vertices)), shading.CLOTH,
        )
        for p in parts
    ]  # fmt: skip
    return render.Scene(meshes, shading.make_light(0.0, 0.0, 1.0, 0.0))


def draw(
    scene: render.Scene, parts: list[Part], world_to_camera: np.ndarray, size: int, samples: int = 3
) -> render.RenderedView:
    """As render.render_view, with the parts' own colours; `scene` is made of them.

    Normals of surfaces seen from behind, as in an open scan, are turned to the viewer.
    """
    view = render.render_view(scene, world_to_camera, size, samples)
    origin, directions = render.pixel_rays(np.asarray(world_to_camera, np.float64), size, samples)
    hits = scene.cast(np.broadcast_to(origin, directions.shape), directions)
    index = np.flatnonzero(hits["primID"] >= 0)
    face = hits["primID"][index].astype(np.int64)
    weights = np.stack([1 - hits["u"] - hits["v"], hits["u"], hits["v"]], axis=1)[index]
    colours = np.zeros((len(index), 3), np.float32)
    start = 0
    for part in parts:
        chosen = (face >= start) & (face < start + len(part.faces))
        corners = part.faces[face[chosen] - start]
        colours[chosen] = _colours(part, corners, weights[chosen].astype(np.float32))
        start += len(part.faces)
    sums = np.zeros(((size * samples) ** 2, 4), np.float32)
    sums[index, :3], sums[index, 3] = colours, 1.0
    sums = sums.reshape(size, samples, size, samples, 4).sum(axis=(1, 3))
    mean = sums[..., :3] / np.maximum(sums[..., 3:], 1.0)
    rgba = view.rgba.copy()
    # Not shading.to_srgb, whose soft shoulder is for light that is computed.
    rgba[..., :3] = np.where(sums[..., 3:] > 0, np.rint(255.0 * _srgb(mean)), 255)
    return dataclasses.replace(view, rgba=rgba)


def _srgb(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0.0, 1.0)
    curved = 1.055 * np.maximum(linear, 1e-8) ** (1 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, curved)


def _colours(part: Part, corners: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(k, 3) linear colours at barycentric (k, 3) `weights` of the vertices (k, 3) `corners`."""
    if part.colours is not None:
        return np.einsum("kc,kcd->kd", weights, part.colours[corners])
    assert part.uv is not None and part.texture is not None
    uv = np.einsum("kc,kcd->kd", weights, part.uv[corners])
    height, width = part.texture.shape[:2]
    x, y = uv[:, 0] * width - 0.5, (1.0 - uv[:, 1]) * height - 0.5
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = (x - left)[:, None].astype(np.float32), (y - top)[:, None].astype(np.float32)

    def at(dy: int, dx: int) -> np.ndarray:  # textures repeat
        return part.texture[(top + dy) % height, (left + dx) % width]

    upper = at(0, 0) * (1 - fx) + at(0, 1) * fx
    lower = at(1, 0) * (1 - fx) + at(1, 1) * fx
    return upper * (1 - fy) + lower * fy
