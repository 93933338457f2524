"""Strands: roots scattered on the skin, grown through a direction field, drawn as thin ribbons."""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.spatial import cKDTree

from data_prep.parametric import template
from data_prep.parametric.head import Head, vertex_normals
from data_prep.rendering import render, shading


@dataclasses.dataclass(frozen=True)
class Body:
    """What strands collide with and find their place on. Decimetres.

    points (m, 3) and normals (m, 3) of the skin, `rest` (m, 3) their neutral template positions.
    """

    points: np.ndarray
    normals: np.ndarray
    rest: np.ndarray
    tree: cKDTree

    @classmethod
    def of(cls, head: Head) -> "Body":
        # The level-1 skin is fine enough to collide with at any image size.
        part = template.part("skin", 1)
        points = part.stencil @ head.vertices
        normals = vertex_normals(points, part.faces)
        return cls(points, normals, part.rest, cKDTree(points))


@dataclasses.dataclass(frozen=True)
class Roots:
    """n starting points: position (n, 3), normal (n, 3), rest (n, 3) template position."""

    position: np.ndarray
    normal: np.ndarray
    rest: np.ndarray

    def __len__(self) -> int:
        return len(self.position)

    def take(self, index: np.ndarray) -> "Roots":
        return Roots(self.position[index], self.normal[index], self.rest[index])


def scatter(body: Body, density: np.ndarray, count: int, rng: np.random.Generator) -> Roots:
    """`count` roots on the skin, with probability proportional to area times `density` (m,)."""
    faces = template.part("skin", 1).faces
    weight = density[faces].mean(axis=1)
    faces = faces[weight > 1e-3]
    weight = weight[weight > 1e-3]
    a, b, c = (body.points[faces[:, i]] for i in range(3))
    weight = weight * np.linalg.norm(np.cross(b - a, c - a), axis=1)
    chosen = faces[rng.choice(len(faces), count, p=weight / weight.sum())]
    uv = rng.random((count, 2))
    uv = np.where(uv.sum(axis=1, keepdims=True) > 1, 1 - uv, uv)
    bary = np.column_stack([1 - uv.sum(axis=1), uv])

    def mix(values: np.ndarray) -> np.ndarray:
        return np.einsum("nk,nkc->nc", bary, values[chosen])

    return Roots(mix(body.points), unit(mix(body.normals)), mix(body.rest))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Normalises the last axis."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


Field = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]


def grow(
    body: Body,
    roots: Roots,
    field: Field,
    length: np.ndarray,
    lift: np.ndarray | float,
    clearance: np.ndarray | float,
    steps: int,
    inertia: float = 1.0,
    stop: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Paths (n, steps + 1, 3) of strands.

    field(p, normal, rest, t) -> (n, 3) wanted direction at points p near skin with `normal` and
    `rest` position, after a fraction t of the growth. length (n,) decimetres. lift: how much the
    root stands up. clearance (n,): distance kept from the skin, reached gradually, so that strands
    lie in layers. stop(p, rest) -> (n,) bool ends strands early.
    """
    p = roots.position.copy()
    d = unit(roots.normal * np.reshape(lift, (-1, 1)) + field(p, roots.normal, roots.rest, 0.0))
    step = length / steps
    alive = np.ones(len(p), bool)
    path = [p]
    for i in range(steps):
        t = (i + 1) / steps
        q = p + d * (step * alive)[:, None]
        _, near = body.tree.query(q)
        normal = body.normals[near]
        depth = np.einsum("ij,ij->i", q - body.points[near], normal)
        wanted = np.reshape(clearance, -1) * min(1.0, 2.5 * t)
        lack = np.clip(wanted - depth, 0, 0.3) * (alive & (depth < 0.6))
        q = q + normal * lack[:, None]
        if stop is not None:
            alive = alive & ~stop(q, body.rest[near])
        # Nothing grows into the skin it touches.
        d = unit(inertia * d + field(q, normal, body.rest[near], t))
        into = np.minimum(np.einsum("ij,ij->i", d, normal), 0) * (lack > 0)
        d = unit(d - normal * into[:, None])
        p = q
        path.append(p)
    return np.stack(path, axis=1)


def ribbons(
    paths: np.ndarray,
    outward: np.ndarray,
    width: np.ndarray,
    albedo: np.ndarray,
    gloss: float,
    rng: np.random.Generator,
    roundness: float = 0.55,
    taper: float = 0.85,
) -> render.Mesh:
    """Flat tapered ribbons along paths (n, k, 3); their wide side faces `outward` (n, k, 3).

    width (n,) decimetres at the root; albedo (n, k, 3) linear. Normals lean to the two edges, so
    that a ribbon shades like a lock of hair; every lock is rolled a little at random.
    """
    n, k, _ = paths.shape
    tangent = unit(np.gradient(paths, axis=1))
    across = unit(np.cross(tangent, outward))
    roll = rng.normal(0, 0.35, (n, 1, 1))
    facing = unit(np.cross(across, tangent))
    across = across * np.cos(roll) + facing * np.sin(roll)
    t = np.linspace(0, 1, k)
    profile = width[:, None] * (1 - taper * t**3)[None] * np.clip(0.55 + 2 * t, 0, 1)[None]
    moving = np.linalg.norm(np.diff(paths, axis=1, prepend=paths[:, :1] - 1e-3), axis=2) > 1e-5
    half = 0.5 * (profile * moving)[..., None] * across
    vertices = np.stack([paths - half, paths + half], axis=2).reshape(-1, 3)
    facing = unit(unit(outward) + 0.6 * facing + 0.5 * np.sin(roll) * across)
    normals = np.stack([facing - roundness * across, facing + roundness * across], axis=2)
    edge = 1 + rng.normal(0, 0.12, (n, 1, 2, 1))  # the two edges differ: fine streaks
    colours = np.clip(albedo[:, :, None, :] * edge, 0.002, 0.95).reshape(-1, 3)
    start = (np.arange(n)[:, None] * k + np.arange(k - 1)[None]).reshape(-1) * 2
    faces = np.concatenate(
        [np.stack([start, start + 1, start + 2], 1), np.stack([start + 1, start + 3, start + 2], 1)]
    )
    return render.Mesh(
        vertices=vertices,
        faces=faces,
        normals=unit(normals).reshape(-1, 3),
        albedo=colours,
        gloss=np.full(len(vertices), gloss),
        material=shading.HAIR,
        tangent=np.repeat(tangent, 2, axis=1).reshape(-1, 3),
    )


def strand_colours(
    colour: np.ndarray, n: int, k: int, variation: float, rng: np.random.Generator
) -> np.ndarray:
    """(n, k, 3) linear albedo around linear `colour` (3,): darker roots, strand-wise variation."""
    own = np.exp(rng.normal(0, variation, (n, 1, 1)))
    warm = 1 + rng.normal(0, 0.05, (n, 1, 1)) * np.array([1.0, 0.0, -1.0])
    along = np.linspace(0.72, 1.12, k)[None, :, None]
    return colour * own * warm * along
