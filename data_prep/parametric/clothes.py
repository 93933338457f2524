"""A garment, a hat and glasses, all fitted to the head."""

import numpy as np
from scipy.ndimage import gaussian_filter1d

from data_prep.parametric import skin, template
from data_prep.parametric.head import Head, vertex_normals
from data_prep.parametric.strands import unit
from data_prep.rendering import render, shading

_STRIPES = 16.0  # radians per decimetre
_HAT_EDGE = ([-0.5, 0.0, 0.45, 0.7, 1.1, 1.4], [7.25, 7.4, 7.6, 7.72, 7.82, 7.84])  # depth, height


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
    stripes = (np.sin(rest[:, 1] * _STRIPES) > 0.3)[:, None]
    colour = np.where(stripes, shading.to_linear(person.second_cloth_colour), colour)
    band = 1 - 0.2 * (np.abs(below - 0.13) < 0.015)
    albedo = colour * (weave * band)[:, None]
    normals = vertex_normals(vertices, faces)
    return render.Mesh(vertices, faces, normals, albedo, np.full(len(used), 0.3), shading.CLOTH)


def under_hat(rest: np.ndarray) -> np.ndarray:
    """(...) how far above a hat's edge template positions (..., 3) lie, decimetres."""
    return rest[..., 1] - np.interp(rest[..., 2], *_HAT_EDGE)


def hat(head: Head) -> list[render.Mesh]:
    """A knitted beanie with a cuff, or a cap with a visor."""
    person = head.person
    if person.hat == "none":
        return []
    part = template.part("skin", 2)
    above = under_hat(part.rest)
    faces = part.faces[
        (above > -0.03)[part.faces].all(axis=1) & (part.masks["ears"] < 0.5)[part.faces].all(axis=1)
    ]
    used, faces = np.unique(faces, return_inverse=True)
    faces = faces.reshape(-1, 3)
    rest, above = part.rest[used], above[used]
    bare = part.stencil[used] @ head.vertices
    normals = vertex_normals(bare, faces)
    beanie = person.hat == "beanie"
    cuff = beanie * np.clip((0.3 - above) / 0.02, 0, 1) * np.clip((above + 0.02) / 0.03, 0, 1)
    rib = 0.006 * np.sin(60 * np.arctan2(rest[:, 0], rest[:, 2] - 0.3)) * beanie
    offset = np.clip(0.06 + 2.0 * above, 0.04, 0.09) + 0.035 * cuff + rib
    offset = offset + (0.12 if beanie else 0.05) * np.clip((rest[:, 1] - 7.9) / 0.5, 0, 1)
    vertices = bare + normals * offset[:, None]
    colour = shading.to_linear(person.hat_colour)
    albedo = colour * (1 + 0.05 * skin.noise(rest, 0.05, person.seed + 33))[:, None]
    albedo = albedo * (1 - 0.2 * (np.abs(above - 0.3) < 0.02) * beanie)[:, None]
    normals = vertex_normals(vertices, faces)
    meshes = [render.Mesh(vertices, faces, normals, albedo, np.full(len(used), 0.2), shading.CLOTH)]
    if not beanie:
        meshes.append(_visor(vertices, above, rest, colour))
    return meshes


def _visor(vertices: np.ndarray, above: np.ndarray, rest: np.ndarray, colour) -> render.Mesh:
    """A curved shield in front of the cap's edge."""
    front = (np.abs(above - 0.03) < 0.05) & (rest[:, 2] > 0.75)
    edge = vertices[front]
    edge = edge[np.argsort(edge[:, 0])]
    x = np.linspace(edge[0, 0], edge[-1, 0], 33)
    y, z = (gaussian_filter1d(np.interp(x, edge[:, 0], edge[:, c]), 3.0) for c in (1, 2))
    across = np.linspace(-1, 1, 33)
    out = np.linspace(-0.12, 1, 9)[:, None]
    depth = 0.75 * np.sqrt(np.clip(1 - across**2, 0, 1))
    grid = np.stack(
        [
            np.broadcast_to(x, (9, 33)),
            y - 0.16 * out * depth - 0.10 * across**2 * out,
            z + out * depth,
        ],
        axis=-1,
    )
    # Two sides, so that each has normals of its own.
    top = grid.reshape(-1, 3)
    i, j = (a.ravel() for a in np.meshgrid(np.arange(8), np.arange(32), indexing="ij"))
    corner = i * 33 + j
    faces = np.concatenate(
        [
            np.stack([corner, corner + 33, corner + 34], 1),
            np.stack([corner, corner + 34, corner + 1], 1),
        ]
    )
    normals = vertex_normals(top, faces)
    vertices = np.concatenate([top, top - 0.02 * normals])
    faces = np.concatenate([faces, faces[:, ::-1] + len(top)])
    albedo = np.tile(colour, (len(vertices), 1))
    return render.Mesh(
        vertices,
        faces,
        np.concatenate([normals, -normals]),
        albedo,
        np.full(len(vertices), 0.2),
        shading.CLOTH,
    )


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


def _lens(rim: np.ndarray) -> render.Mesh:
    """A dark, slightly bulging fan inside rim (k, 3), seen from both sides."""
    k = len(rim)
    vertices = np.concatenate([rim, rim.mean(axis=0, keepdims=True) + [[0, 0, 0.03]]])
    i = np.arange(k)
    faces = np.stack([i, (i + 1) % k, np.full(k, k)], axis=1)
    normals = vertex_normals(vertices, faces)
    normals = normals * np.sign(normals[:, 2:])
    albedo = np.full((k + 1, 3), 0.006)
    return render.Mesh(vertices, faces, normals, albedo, np.ones(k + 1), shading.PLASTIC)


def glasses(head: Head) -> list[render.Mesh]:
    """Two rims, a bridge and two temples to the ears; only those against the sun have lenses."""
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
        if person.glasses == "sun":
            meshes.append(_lens(rim))
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
