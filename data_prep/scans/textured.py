"""Textured meshes from files (obj, ply, glb, ...), drawn as they are, without light.

A scan's texture is a photograph: it holds its light already.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import re

import numpy as np
import trimesh

from data_prep.rendering import render, shading
from data_prep.scans import companions, gltf, obj
from data_prep.scans.parts import Look, Part, Scan, Surface, assemble, read_texture
from spinmeround_jax.files import InputError

_LINEAR = shading.to_linear(np.arange(256) / 255.0).astype(np.float32)
SUFFIXES = (".obj", ".ply", ".glb", ".gltf", ".off", ".stl")


def read(path: pathlib.Path) -> Scan:
    """A mesh file with its normals and colours.

    Raises:
        InputError: unreadable, without faces, not finite, without colours, or a file that it names is
            not there.
    """
    readers = {".obj": obj.read, ".ply": _read_ply, ".glb": gltf.read, ".gltf": gltf.read}
    try:
        if not path.is_file():
            raise InputError(f"{path}: not a file")
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise InputError(
                f"{path}: {path.suffix} files have neither a texture nor colours that are read; export "
                "it as OBJ, PLY or GLB"
            )
        return reader(path)
    except InputError:
        raise
    except Exception as error:  # readers raise many kinds, and the file can hold anything
        raise InputError(
            f"{path}: not a readable mesh ({type(error).__name__}: {error})"
        ) from error


def _read_ply(path: pathlib.Path) -> Scan:
    """PLY: a texture (`comment TextureFile`) counts before colours of vertices, these before faces'."""
    content = path.read_bytes()
    header = content.partition(b"end_header")[0].decode("latin-1")
    names = set(re.findall(r"(?im)^(?:comment|obj_info)\s+TextureFile\s+(.*\S)", header))
    mesh = trimesh.load_mesh(
        io.BytesIO(content), file_type="ply", process=False, skip_materials=True
    )
    raw = mesh.metadata["_ply_raw"]["vertex"]["data"]
    numbered = np.stack([np.asarray(raw[axis], np.float64).reshape(-1) for axis in "xyz"], axis=-1)
    vertices, uv = np.asarray(mesh.vertices, np.float64), getattr(mesh.visual, "uv", None)
    if names and uv is not None:
        if len(names) > 1:
            raise InputError(
                f"{path}: has {len(names)} textures; bake them into one, or export as OBJ"
            )
        (name,) = names
        image = read_texture(path, companions.find(path, name)).convert("RGB")
        look = Look(np.ones((len(vertices), 3), np.float32), np.asarray(image), np.asarray(uv))
    elif (colours := _ply_colours(raw)) is not None and len(colours) == len(vertices):
        look = Look(colours)
    elif mesh.visual.kind == "face":
        look = Look(_linear(mesh.visual.vertex_colors[:, :3]))
    else:
        hint = "; its header names no TextureFile" if uv is not None else ""
        raise InputError(f"{path}: has neither a texture nor colours of its vertices{hint}")
    return assemble(path, [Surface(vertices, np.asarray(mesh.faces, np.int64), look)], numbered)


def _ply_colours(raw) -> np.ndarray | None:
    """(n, 3) linear float32 from `red` or `diffuse_red`, bytes, 16 bits or numbers up to 1."""
    present = raw.dtype.names if isinstance(raw, np.ndarray) else raw.keys()
    for prefix in ("", "diffuse_"):
        names = [prefix + name for name in ("red", "green", "blue")]
        if all(name in present for name in names):
            values = np.stack([np.asarray(raw[name]).reshape(-1) for name in names], axis=-1)
            return _linear(values)
    return None


def _linear(values: np.ndarray) -> np.ndarray:
    """sRGB integers of any width, or numbers up to 1 (some write 0 to 255), as linear float32."""
    top = 255.0 if values.max(initial=0.0) > 1.0 else 1.0
    if values.dtype.kind in "iu":
        top = np.iinfo(values.dtype).max
    return shading.to_linear(values / top).astype(np.float32)


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
    look = part.look
    colours = np.einsum("kc,kcd->kd", weights, look.colours[corners])
    if look.texture is None or look.uv is None:
        return colours
    u, v = np.einsum("kc,kcd->dk", weights, look.uv[corners])
    height, width = look.texture.shape[:2]
    x, y = u * width - 0.5, (1.0 - v) * height - 0.5
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = (x - left)[:, None].astype(np.float32), (y - top)[:, None].astype(np.float32)
    columns = [_wrapped(left + step, width, look.wrap[0]) for step in (0, 1)]
    rows = [_wrapped(top + step, height, look.wrap[1]) for step in (0, 1)]

    def at(dy: int, dx: int) -> np.ndarray:
        return _LINEAR[look.texture[rows[dy], columns[dx]]]

    upper = at(0, 0) * (1 - fx) + at(0, 1) * fx
    lower = at(1, 0) * (1 - fx) + at(1, 1) * fx
    return colours * (upper * (1 - fy) + lower * fy)


def _wrapped(index: np.ndarray, size: int, wrap: str) -> np.ndarray:
    if wrap == "clamp":
        return index.clip(0, size - 1)
    if wrap == "mirror":
        index = index % (2 * size)
        return np.minimum(index, 2 * size - 1 - index)
    return index % size
