"""A garment and glasses, both fitted to the head."""

import numpy as np

from data_prep.parametric import skin, template
from data_prep.parametric.head import Head, vertex_normals
from data_prep.parametric.strands import unit
from data_prep.rendering import render, shading


def _neckline(rest: np.ndarray, kind: str) -> np.ndarray:
    """(n,) height of the garment's edge over template positions, decimetres."""
    x, z = np.abs(rest[:, 0]), rest[:, 2]
    front = np.clip((z - 0.2) / 0.7, 0, 1)
    shoulder = 0.8 * np.clip(x - 0.55, 0, 2)  # the shoulders rise again: all of them is covered
    if kind == "vee":
        return shoulder + 5.86 - front * np.clip(1.0 - 1.7 * x, 0, 1)
    if kind == "wide":
        return shoulder + 5.8 - 0.36 * front
    if kind == "high":
        return shoulder + 6.12 - 0.12 * front
    return shoulder + 5.9 - 0.3 * front


def covered(head: Head, rest: np.ndarray) -> np.ndarray:
    """(n,) bool: well under the garment, never seen."""
    return _neckline(rest, head.person.neckline) - rest[:, 1] > 0.16


def garment(head: Head) -> render.Mesh:
    """A shell around neck and shoulders that dives into the skin along the neckline."""
    person = head.person
    # The neckline needs finer triangles than the skin under it.
    part = template.part("skin", 2)
    below = _neckline(part.rest, person.neckline) - part.rest[:, 1]
    near = below > -0.12
    faces = part.faces[near[part.faces].all(axis=1)]
    used, faces = np.unique(faces, return_inverse=True)
    faces = faces.reshape(-1, 3)
    rest, below = part.rest[used], below[used]
    collar = 0.022 * np.exp(-(((below - 0.06) / 0.05) ** 2))
    folds = (
        0.008 * np.clip(skin.noise(rest, 0.8, person.seed + 31), -2, 2) * np.clip(below / 0.4, 0, 1)
    )
    offset = np.clip(1.6 * below, -0.05, 0.065) + collar + folds
    bare = part.stencil[used] @ head.vertices
    vertices = bare + vertex_normals(bare, faces) * offset[:, None]
    colour = shading.to_linear(person.cloth_colour)
    weave = 1 + 0.05 * skin.noise(rest, 0.05, person.seed + 32)
    band = 1 - 0.2 * (np.abs(below - 0.13) < 0.015)
    albedo = colour * (weave * band)[:, None]
    normals = vertex_normals(vertices, faces)
    return render.Mesh(vertices, faces, normals, albedo, np.full(len(used), 0.3), shading.CLOTH)


def _tube(path: np.ndarray, radius: float, closed: bool, colour, sides: int = 6) -> render.Mesh:
    """A round tube along path (k, 3); closed joins the ends."""
    k = len(path)
    if closed:
        tangent = unit(np.roll(path, -1, axis=0) - np.roll(path, 1, axis=0))
    else:
        tangent = unit(np.gradient(path, axis=0))
    helper = np.where(np.abs(tangent[:, 1:2]) > 0.9, [[0, 0, 1.0]], [[0, 1.0, 0]])
    a = unit(np.cross(tangent, helper))
    b = np.cross(tangent, a)
    angle = np.arange(sides) * 2 * np.pi / sides
    normals = a[:, None] * np.cos(angle)[None, :, None] + b[:, None] * np.sin(angle)[None, :, None]
    vertices = path[:, None] + radius * normals
    rows = np.arange(k if closed else k - 1)
    i, j = np.meshgrid(rows, np.arange(sides), indexing="ij")
    after, beside = (i + 1) % k, (j + 1) % sides
    p, q, r, s = i * sides + j, i * sides + beside, after * sides + beside, after * sides + j
    faces = np.concatenate(
        [np.stack([p, s, r], -1).reshape(-1, 3), np.stack([p, r, q], -1).reshape(-1, 3)]
    )
    count = k * sides
    albedo = np.tile(shading.to_linear(colour), (count, 1))
    return render.Mesh(
        vertices.reshape(-1, 3),
        faces,
        normals.reshape(-1, 3),
        albedo,
        np.ones(count),
        shading.PLASTIC,
    )


def glasses(head: Head) -> list[render.Mesh]:
    """Two rims, a bridge and two temples to the ears; no lenses."""
    person = head.person
    if person.glasses == "none":
        return []
    right, left = head.landmarks[0], head.landmarks[1]  # the person's right is at -x
    nose = head.skin[:, 2][np.abs(head.skin[:, 0]) < 0.1].max()
    part = template.part("skin", head.level)
    brow = head.skin[(np.abs(part.rest[:, 1] - 7.4) < 0.12) & (np.abs(part.rest[:, 0]) < 0.5)]
    plane = min(brow[:, 2].max() + 0.05, nose)
    ears = head.skin[part.masks["ears"] > 0.5]
    half = 0.47 * (left[0] - right[0])
    power = 1.0 if person.glasses == "round" else 0.45
    radius = 0.016 if person.glasses == "round" else 0.024
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    outline = np.stack(
        [
            np.sign(cos) * np.abs(cos) ** power * half * 0.92,
            np.sign(sin) * np.abs(sin) ** power * half * 0.74,
        ],
        1,
    )
    meshes = []
    colour = person.glasses_colour
    for eye, side in ((right, -1), (left, 1)):
        centre = np.array([eye[0] + side * 0.015, eye[1] - 0.03, plane])
        wrap = -0.12 * np.clip(side * outline[:, 0], 0, None)  # frames curve around the face
        rim = centre + np.column_stack([outline, wrap])
        meshes.append(_tube(rim, radius, True, colour))
        own = ears[np.sign(ears[:, 0]) == side]
        hinge = centre + np.array([side * half * 0.92, 0.1, -0.1])
        hook = np.array([own[:, 0].mean() - side * 0.08, own[:, 1].max() - 0.12, own[:, 2].mean()])
        middle = 0.5 * (hinge + hook) + np.array([side * 0.1, 0, 0])
        t = np.linspace(0, 1, 12)[:, None]
        temple = (1 - t) ** 2 * hinge + 2 * t * (1 - t) * middle + t**2 * hook
        meshes.append(_tube(temple, radius * 0.8, False, colour))
    inner = half * 0.92
    t = np.linspace(0, 1, 8)[:, None]
    a = np.array([right[0] - 0.015 + inner, right[1] + 0.03, plane])
    b = np.array([left[0] + 0.015 - inner, left[1] + 0.03, plane])
    arch = a + (b - a) * t + np.array([0, 0.04, 0.03]) * np.sin(np.pi * t)
    meshes.append(_tube(arch, radius * 0.8, False, colour))
    return meshes
