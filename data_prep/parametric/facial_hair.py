"""Brows, lashes and beards, and the shadow they paint on the skin."""

import numpy as np
from scipy.spatial import cKDTree

from data_prep.parametric import skin, strands, template
from data_prep.parametric.head import Head
from data_prep.parametric.strands import Body, unit
from data_prep.rendering import render, shading


def _brow_area(rest: np.ndarray, thickness: float) -> np.ndarray:
    """(n,) in [0, 1]: both brows on the template, thinning to the outside."""
    x, y, z = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]
    centre = np.interp(x, [0.1, 0.22, 0.42, 0.6], [7.43, 7.47, 7.51, 7.42])
    half = (0.009 + 0.019 * thickness) * np.interp(
        x, [0.08, 0.16, 0.4, 0.62], [0.8, 1.1, 0.9, 0.25]
    )
    inside = np.clip(1.5 - np.abs(y - centre) / half, 0, 1)
    ends = np.clip((x - 0.09) / 0.05, 0, 1) * np.clip((0.6 - x) / 0.06, 0, 1)
    return inside * ends * (z > 0.9)


def _moustache_area(rest: np.ndarray) -> np.ndarray:
    x, y, z = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]
    low = np.interp(x, [0, 0.2, 0.34], [6.73, 6.7, 6.6])
    return (
        np.clip((y - low) / 0.04, 0, 1)
        * np.clip((6.84 - 0.3 * x - y) / 0.05, 0, 1)
        * (np.clip((0.36 - x) / 0.06, 0, 1) * (z > 1.15))
    )


def beard_density(head: Head, rest: np.ndarray) -> np.ndarray:
    """(n,) in [0, 1] at template positions: where this person's beard grows."""
    style = head.person.beard_style
    if style == "none":
        return np.zeros(len(rest))
    if style == "moustache":
        return _moustache_area(rest)
    area = skin.beard_area(rest)
    if style == "goatee":
        chin = np.clip((0.27 - np.abs(rest[:, 0])) / 0.07, 0, 1) * (rest[:, 1] > 6.1)
        return np.maximum(area * chin * (rest[:, 1] < 6.62), _moustache_area(rest))
    return area


def painted(head: Head, rest: np.ndarray) -> np.ndarray:
    """(n,) in [0, 1]: stubble and brow shadow on the skin, before the strands are drawn."""
    person = head.person
    brows = 0.32 * _brow_area(rest, person.brow_thickness)
    area = beard_density(head, rest)
    grain = np.clip(0.75 + 0.35 * skin.noise(rest, 0.035, person.seed + 21), 0, 1)
    strength = {"none": 0.0, "stubble": 0.4 + 0.25 * person.beard_length}.get(
        person.beard_style, 0.75
    )
    beard = strength * area * grain
    if person.male > 0.6 and person.beard_style in ("none", "moustache", "goatee"):
        # A shaven beard still shows, bluish, on light skin with dark hair.
        darkness = 1 - np.mean(person.natural_hair_colour)
        beard = np.maximum(beard, 0.12 * darkness * skin.beard_area(rest))
    return np.maximum(brows, beard)


def lash_points(head: Head) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per lash card (4): roots (n, 3) on the lid's edge and tips (n, 3), from the helper cards."""
    out = []
    for side, eye in zip("lr", head.eyes, strict=True):
        centre = eye.mean(axis=0)
        for card in (1, 2):
            index = np.unique(template.local_quads(f"helper-{side}-eyelashes-{card}"))
            points = head.vertices[index]
            radius = np.linalg.norm(points - centre, axis=1)
            roots = points[radius < np.quantile(radius, 0.4)]
            tips = points[radius > np.quantile(radius, 0.6)]
            near = cKDTree(tips[:, :1]).query(roots[:, :1])[1]
            out.append((roots, tips[near]))
    return out


def lash_shadow(head: Head) -> np.ndarray:
    """(m,) in [0, 1] on the skin: the dark line where lashes meet the lid."""
    roots = np.concatenate([r for r, _ in lash_points(head)])
    distance = cKDTree(roots).query(head.skin, distance_upper_bound=0.1)[0]
    return 0.75 * np.clip(1.6 - distance / 0.022, 0, 1)


def facial_meshes(head: Head, body: Body) -> list[render.Mesh]:
    """Ribbons of brows, lashes and, for some men, a beard."""
    person = head.person
    rng = np.random.default_rng([53, person.seed])
    dark = np.minimum(np.array(person.natural_hair_colour), 0.42)
    # Brow hairs are thin: some skin shows through each.
    colour = 0.8 * shading.to_linear(dark) + 0.16 * shading.to_linear(person.skin_colour)
    fine = 1.0 if head.level == 1 else 2.0
    meshes = []

    roots = strands.scatter(
        body, _brow_area(body.rest, person.brow_thickness), int(330 * fine), rng
    )
    side = np.sign(roots.position[:, :1])

    def sweep(p, normal, rest, t):
        rise = np.interp(np.abs(rest[:, 0]), [0.1, 0.25, 0.45, 0.6], [1.1, 0.35, -0.1, -0.45])
        wish = side * np.array([1.0, 0, 0]) + rise[:, None] * np.array([0, 1.0, 0])
        return unit(wish - normal * np.sum(wish * normal, 1, keepdims=True))

    length = rng.uniform(0.05, 0.1, len(roots))
    paths = strands.grow(body, roots, sweep, length, 0.25, 0.012, 3)
    tint = strands.strand_colours(colour, len(roots), 4, 0.2, rng)
    meshes.append(
        strands.ribbons(
            paths,
            np.repeat(roots.normal[:, None], 4, 1),
            np.full(len(roots), 0.011 / fine**0.7),
            tint,
            0.3,
            rng,
        )
    )

    for card, (lash_roots, tips) in enumerate(lash_points(head)):
        spread = np.repeat(lash_roots, 3, axis=0), np.repeat(tips, 3, axis=0)
        jitter = rng.normal(0, 0.012, (len(spread[0]), 1)) * np.array([1.0, 0, 0])
        reach = (0.75 if card % 2 else 0.45) * rng.uniform(0.7, 1.0, (len(jitter), 1))
        start = spread[0] + jitter
        end = start + (spread[1] - spread[0]) * reach + jitter
        path = np.stack([start, (start + end) / 2, end], axis=1)
        facing = np.broadcast_to(np.array([0.0, 0.4, 0.9]), path.shape)
        lash = np.broadcast_to(np.array([0.012, 0.01, 0.009]), path.shape)
        meshes.append(strands.ribbons(path, facing, np.full(len(path), 0.009), lash, 0.2, rng))

    if person.beard_style in ("full", "moustache", "goatee"):
        meshes.append(_beard(head, body, rng))
    return meshes


def _beard(head: Head, body: Body, rng: np.random.Generator) -> render.Mesh:
    person = head.person
    count = {"full": 6500, "goatee": 2400, "moustache": 1100}[person.beard_style]
    roots = strands.scatter(body, beard_density(head, body.rest), count, rng)
    x, y, _ = roots.rest.T
    chin = np.exp(-0.5 * ((x / 0.25) ** 2 + ((y - 6.2) / 0.25) ** 2))
    length = 0.06 + 0.1 * person.beard_length + (0.05 + 0.4 * person.beard_length**2) * chin
    length = length * rng.uniform(0.6, 1.1, count) * np.where(y > 6.6, 0.45, 1.0)
    lip = (y > 6.64)[:, None]

    def field(p, normal, rest, t):
        aside = np.sign(p[:, :1]) * np.array([1.0, 0, 0]) * np.where(lip, 1.3, 0.1)
        return unit(aside + np.array([0, -1.0, 0.0])) * 0.8 + normal * (0.7 * (1 - t))

    paths = strands.grow(body, roots, field, length, 0.8, 0.02 + 0.05 * rng.random(count), 4)
    colour = shading.to_linear(np.array(person.natural_hair_colour) * 0.92)
    tint = strands.strand_colours(colour, count, 5, 0.25, rng)
    outward = np.repeat(roots.normal[:, None], 5, axis=1)
    return strands.ribbons(paths, outward, rng.uniform(0.011, 0.024, count), tint, 0.45, rng)
