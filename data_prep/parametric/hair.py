"""Scalp hair: for every style a direction field, lengths and layers for strands of the scalp.

Styles: bald, buzz, short, side_part, quiff, bob, long, bun, ponytail, curly, ringlets, afro.
Positions are decimetres; regions are defined by the neutral template position under a point.
"""

import dataclasses
import functools

import numpy as np
from scipy.spatial import cKDTree

from data_prep.parametric import clothes, skin, strands
from data_prep.parametric.head import Head
from data_prep.parametric.strands import Body, Roots, unit
from data_prep.rendering import render, shading

DOWN = np.array([0.0, -1.0, 0.0])
BACK = np.array([0.0, 0.0, -1.0])
UP = np.array([0.0, 1.0, 0.0])


def scalp_density(head: Head, rest: np.ndarray) -> np.ndarray:
    """(n,) in [0, 1] at template positions (n, 3): hairline, receding and thinning."""
    person = head.person
    density = skin.scalp_area(rest, 0.75 * person.hairline)
    thin = np.clip(person.hairline - 0.45, 0, 0.5) * 2
    crown = np.exp(-0.5 * (((rest - [0, 8.4, 0.35]) / [0.42, 0.5, 0.5]) ** 2).sum(axis=1))
    return density * (1 - thin * crown * 0.95)


def painted(head: Head, rest: np.ndarray) -> np.ndarray:
    """(n,) in [0, 1]: hair seen on the skin itself, under and between the strands."""
    style = head.person.hair_style
    density = scalp_density(head, rest)
    grain = 0.88 + 0.12 * np.clip(skin.noise(rest, 0.06, head.person.seed + 11), -1, 1)
    if style == "bald":
        return 0.22 * density * (1 - head.person.hairline) * grain
    return 0.93 * density * grain


def _tangential(direction: np.ndarray, normal: np.ndarray) -> np.ndarray:
    return direction - normal * np.einsum("ij,ij->i", direction, normal)[:, None]


def _whorl(person) -> np.ndarray:
    return np.array([0.12 * np.sign(person.parting), 8.25, -0.25])


def _short_field(head: Head):
    whorl = _whorl(head.person)

    def field(p, normal, rest, t):
        away = unit(rest - whorl)
        swirl = np.cross(normal, away) * 0.35
        down = np.clip((7.9 - rest[:, 1]) / 0.4, 0, 1)[:, None]
        return unit(_tangential(away + swirl + 1.2 * down * DOWN, normal)) + 0.25 * normal * (1 - t)

    return field


def _parted_field(head: Head):
    side = head.person.parting
    line = 0.32 * side
    whorl = _whorl(head.person)

    def field(p, normal, rest, t):
        # The heavy side sweeps across the top, the light side falls down straight.
        across = np.where(rest[:, :1] > line, 1.0, -1.0) * np.array([1.0, 0.0, 0.0])
        front = np.clip((rest[:, 2:] - 0.3) / 0.8, 0, 1)
        down = np.clip((8.05 - rest[:, 1:2]) / 0.4, 0, 1)
        across = across * front + (1 - front) * (unit(rest - whorl) + 0.6 * BACK)
        wish = across + 0.35 * BACK * front + 1.6 * down * DOWN + 0.3 * down * BACK
        return unit(_tangential(wish, normal)) + 0.12 * normal * (1 - t)

    return field


def _quiff_field(head: Head):
    def field(p, normal, rest, t):
        top = np.clip((rest[:, 1:2] - 7.85) / 0.25, 0, 1)
        front = np.clip((rest[:, 2:] - 0.2) / 0.8, 0, 1)
        rise = UP * (1.1 * front * (1 - t)) + BACK * (0.5 + 0.9 * t)
        wish = top * rise + (1 - top) * (1.2 * DOWN + 0.5 * BACK)
        return unit(wish) + 0.1 * normal

    return field


def _falling_field(head: Head, phase: np.ndarray, fringe: np.ndarray):
    """Long hair: off the parting, then down, waving; it keeps clear of the face."""
    person = head.person
    line = 0.2 * person.parting
    wave = 0.75 * person.hair_waviness
    sweep = 0.35 + 0.5 * person.hair_length

    def field(p, normal, rest, t):
        side = np.where(rest[:, :1] > line, 1.0, -1.0) * np.array([1.0, 0.0, 0.0])
        top = np.clip((rest[:, 1:2] - 7.75) / 0.35, 0, 1) * max(0.0, 1 - 1.6 * t)
        hang = side * top + DOWN * (1.3 - top) + BACK * sweep * np.clip(top + 0.2, 0, 1)
        hang = unit(hang - 0.8 * top * normal * np.sum(hang * normal, 1, keepdims=True))
        near_face = np.clip((p[:, 2:] - 0.75) / 0.3, 0, 1) * np.clip((7.9 - p[:, 1:2]) / 0.3, 0, 1)
        away = np.sign(p[:, :1]) * np.array([1.0, 0.0, 0.0]) * 0.8 + 1.2 * BACK
        hang = hang + near_face * away
        turn = 2 * np.pi * (2.6 * t + phase)
        sway = np.column_stack([np.cos(turn), 0 * turn, np.sin(turn)])
        hang = hang + wave * min(1.0, 2 * t) * sway
        forward = unit(np.array([0.0, -1.0, 0.15]) + 0.25 * rest * [1, 0, 0])
        return 1.4 * np.where(fringe[:, None], forward, hang)

    return field


def _tied_field(knot: np.ndarray):
    def field(p, normal, rest, t):
        return unit(_tangential(unit(knot - p), normal)) * 1.6

    return field


def _curly_field(head: Head, phase: np.ndarray, radial: float, gravity: float):
    centre = head.landmarks[:2].mean(axis=0) + np.array([0.0, 0.35, -1.0])
    turns = 2.5 + 2.5 * head.person.hair_waviness

    def field(p, normal, rest, t):
        out = unit(p - centre)
        turn = 2 * np.pi * (turns * t + phase)
        side = unit(np.cross(out, UP + 0.01))
        other = np.cross(out, side)
        curl = side * np.cos(turn)[:, None] + other * np.sin(turn)[:, None]
        face = np.clip((p[:, 2:] - 0.8) / 0.3, 0, 1) * np.clip((7.95 - p[:, 1:2]) / 0.25, 0, 1)
        return (
            radial * out
            + 1.25 * curl
            + gravity * DOWN
            + face * (1.4 * np.sign(p[:, :1]) * [1, 0, 0] + 1.2 * BACK)
        )

    return field


def _outward(head: Head, body: Body, paths: np.ndarray, smooth: float) -> np.ndarray:
    """(n, k, 3) directions off the hair's bulk: nearest skin normal blended with 'off the axis'."""
    centre = head.landmarks[:2].mean(axis=0) + np.array([0.0, 0.2, -1.05])
    _, near = body.tree.query(paths)
    off = paths - centre
    off[..., 1] = np.where(off[..., 1] < 0, 0.15 * off[..., 1], off[..., 1])
    return unit((1 - smooth) * body.normals[near] + smooth * unit(off))


def _draw(
    head: Head,
    body: Body,
    paths: np.ndarray,
    width: float,
    rng: np.random.Generator,
    smooth: float,
    gloss: float = 1.0,
    reach: float = 9.0,
) -> render.Mesh:
    """Ribbons of about `width` along paths (n, k, 3) in the hair colour.

    smooth: how much normals follow the bulk of the hair. reach: farthest from the skin.
    """
    distance, near = body.tree.query(paths)
    kept = distance.max(axis=1) < reach  # not single hairs that fly away
    paths, near = paths[kept], near[kept]
    if head.person.hat != "none":
        paths = _pressed(head, body, paths, near)
    colour = shading.to_linear(head.person.hair_colour)
    n, k, _ = paths.shape
    tint = strands.strand_colours(colour, n, k, 0.22, rng)
    widths = width * rng.uniform(0.6, 1.3, n)
    clump = 1 + 0.14 * skin.noise(paths[:, k // 2], 0.35, head.person.seed + 5)
    outward = _outward(head, body, paths, smooth)
    return strands.ribbons(paths, outward, widths, tint * clump[:, None, None], gloss, rng)


def _pressed(head: Head, body: Body, paths: np.ndarray, near: np.ndarray) -> np.ndarray:
    """What lies under the hat is pressed to the skin; near (n, k) is the skin's nearest point."""
    under = np.clip(clothes.under_hat(body.rest[near]) / 0.12 + 0.5, 0, 1)[..., None]
    normal = body.normals[near]
    depth = np.einsum("nkc,nkc->nk", paths - body.points[near], normal)[..., None]
    return paths - under * np.maximum(depth - 0.03, 0) * normal


def _roots(head: Head, body: Body, count: int, rng: np.random.Generator) -> Roots:
    return strands.scatter(body, scalp_density(head, body.rest), count, rng)


def hair_meshes(head: Head, body: Body) -> list[render.Mesh]:
    """Ribbon meshes of the scalp hair (empty for the bald)."""
    person = head.person
    rng = np.random.default_rng([31, person.seed])
    style = person.hair_style
    long, full, wavy = person.hair_length, person.hair_volume, person.hair_waviness
    if style == "bald":
        return []
    count = {
        "buzz": 9000, "short": 5500, "side_part": 5500, "quiff": 5500, "bob": 6000, "long": 6500,
        "curly": 4500, "ringlets": 6500, "afro": 6500, "bun": 4000, "ponytail": 4000,
    }[style]  # fmt: skip
    # Small images get fewer, wider locks: the same cover at a fraction of the triangles.
    sparse = 0.6 if head.level == 1 else 1.0
    count = int(count * sparse)
    roots = _roots(head, body, count, rng)
    x, y, z = roots.rest.T
    phase = rng.random(count)
    vary = rng.uniform(0.75, 1.1, count)
    layer = rng.random(count)
    width = sparse**-0.75
    top = np.clip((y - 7.7) / 0.4, 0, 1)
    grow = functools.partial(strands.grow, body, roots)
    if style == "buzz":
        paths = grow(_short_field(head), 0.05 + 0.06 * long * vary, 0.5, 0.012 + 0.01 * layer, 2)
        return [_draw(head, body, paths, 0.015 * width, rng, 0.1, gloss=0.4)]
    if style == "short":
        length = (0.16 + 0.16 * long + 0.22 * top * (0.4 + long)) * vary
        paths = grow(
            _short_field(head),
            length,
            0.5 + 0.5 * full,
            0.03 + (0.04 + 0.1 * full * top) * layer,
            5,
        )
        return [_draw(head, body, paths, 0.045 * width, rng, 0.3, reach=0.45)]
    if style == "side_part":
        length = (0.22 + 0.1 * long + (0.35 + 0.35 * long) * top) * vary
        paths = grow(
            _parted_field(head),
            length,
            0.3 + 0.4 * full * top,
            0.03 + (0.04 + 0.1 * top * (0.5 + full)) * layer,
            7,
        )
        return [_draw(head, body, paths, 0.05 * width, rng, 0.3, reach=0.5)]
    if style == "quiff":
        front = np.clip((z - 0.2) / 0.8, 0, 1)
        length = (0.17 + 0.08 * long + (0.3 + 0.4 * long) * top * (0.5 + 0.5 * front)) * vary
        paths = grow(
            _quiff_field(head), length, 0.4 + 0.8 * top, 0.03 + (0.03 + 0.12 * top) * layer, 7
        )
        return [_draw(head, body, paths, 0.045 * width, rng, 0.35, reach=0.7)]
    if style in ("bob", "long"):
        has_fringe = full > 0.6 and person.hairline < 0.25
        fringe = has_fringe & (z > 0.85) & (np.abs(x) < 0.42)
        reach = (1.35 + 0.35 * long) if style == "bob" else (2.1 + 1.3 * long)
        # Everything ends at about the same height: roots higher up are longer.
        length = (reach + 0.85 * (y - 7.4)) * np.where(
            style == "bob", rng.uniform(0.9, 1.02, count), vary
        )
        length = np.where(fringe, 0.75, length)
        brow = head.landmarks[:2, 1].mean() + 0.2

        def stop(p, rest):
            return fringe & (p[:, 1] < brow + 0.06 * np.sin(40 * phase))

        clearance = 0.05 + (0.1 + 0.16 * full + 0.1 * wavy) * layer
        paths = grow(
            _falling_field(head, phase, fringe),
            length,
            0.45,
            np.where(fringe, 0.05 + 0.05 * layer, clearance),
            16,
            1.0,
            stop,
        )
        return [_draw(head, body, paths, 0.06 * width, rng, 0.55)]
    if style == "ringlets":
        return [_ringlets(head, body, roots, layer, width, rng)]
    if style in ("bun", "ponytail"):
        return _tied(head, body, roots, layer, width, rng)
    if style == "curly":
        length = (0.55 + 0.95 * long) * vary
        paths = grow(
            _curly_field(head, phase, 0.45 + 0.3 * full, 0.45 + 0.45 * long),
            length,
            0.9,
            0.05 + (0.1 + 0.2 * full) * layer,
            16,
            0.9,
        )
        return [_draw(head, body, paths, 0.055 * width, rng, 0.6, gloss=0.8)]
    front = np.clip((z - 0.6) / 0.5, 0, 1) + np.clip((7.2 - y) / 0.5, 0, 1)
    length = (0.6 + 0.6 * full) * rng.uniform(0.55, 1.0, count) * (1 - 0.45 * np.minimum(front, 1))
    paths = grow(_curly_field(head, phase, 1.1, 0.0), length, 1.5, 0.03 + 0.1 * layer, 12, 0.7)
    return [_draw(head, body, paths, 0.06 * width, rng, 0.85, gloss=0.35)]


def _ringlets(head, body, roots, layer, width, rng) -> render.Mesh:
    """Falling hair in locks that wind around themselves like corkscrews."""
    person = head.person
    count = len(roots)
    straight = dataclasses.replace(person, hair_waviness=0.0)
    still = np.zeros(count)
    field = _falling_field(dataclasses.replace(head, person=straight), still, still > 0)
    length = 1.1 + 1.5 * person.hair_length + 0.85 * (roots.rest[:, 1] - 7.4)
    clearance = 0.12 + (0.1 + 0.2 * person.hair_volume) * layer
    steps = 28
    paths = strands.grow(body, roots, field, length, 0.6, clearance, steps)
    # Each strand follows the guide whose root is nearest, closer and closer to its tip.
    guides = rng.choice(count, 130 + int(90 * (1 - person.hair_waviness)), replace=False)
    lock = guides[cKDTree(roots.position[guides]).query(roots.position)[1]]
    t = np.linspace(0, 1, steps + 1)[None, :, None]
    gather = np.clip(2.5 * t, 0, 0.8)
    paths = paths + gather * (paths[lock] - paths)
    tangent = unit(np.gradient(paths[lock], axis=1))
    side = unit(np.cross(tangent, np.array([0.3, 0.1, 1.0])))
    turns = 2.2 + 2.0 * person.hair_waviness
    angle = (
        2
        * np.pi
        * (turns * t * length[lock, None, None] / 1.5 + rng.random(count)[lock, None, None])
    )
    angle = angle + rng.normal(0, 0.45, (count, 1, 1))
    radius = (0.07 + 0.09 * person.hair_volume) * np.clip(3 * t, 0, 1)
    curl = np.cos(angle) * side + np.sin(angle) * np.cross(tangent, side)
    return _draw(head, body, paths + radius * curl, 0.05 * width, rng, 0.55)


def _tied(head, body, roots, layer, width, rng) -> list[render.Mesh]:
    """Hair combed back into a knot, and the bun or tail that grows from it."""
    person = head.person
    low = person.hair_length < 0.4
    skull = body.points[(body.rest[:, 1] > 7.0) & (body.rest[:, 2] < 0.3)]
    height = head.landmarks[:2, 1].mean() + (-0.1 if low else 0.55)
    ring = skull[np.abs(skull[:, 1] - height) < 0.12]
    knot = np.array([0.0, height, ring[:, 2].min()])
    length = 1.25 * np.linalg.norm(roots.position - knot, axis=1) + 0.05

    def stop(p, rest):
        return np.linalg.norm(p - knot, axis=1) < 0.1

    clearance = 0.025 + (0.03 + 0.05 * person.hair_volume) * layer
    paths = strands.grow(body, roots, _tied_field(knot), length, 0.15, clearance, 10, 0.5, stop)
    meshes = [_draw(head, body, paths, 0.05 * width, rng, 0.2, reach=0.36)]
    if person.hair_style == "bun":
        meshes.append(_bun(head, knot, rng))
        return meshes
    n = 1400
    spread = unit(rng.standard_normal((n, 3))) * 0.1 * rng.random((n, 1)) ** 0.5
    back = unit(np.array([0.0, 0.1 if low else 0.55, -1.0]))
    own = rng.random(n)

    def field(p, normal, rest, t):
        turn = 2 * np.pi * (1.6 * t + own * 0.3)
        sway = np.column_stack([np.cos(turn), 0 * turn, np.sin(turn)]) * 0.5 * person.hair_waviness
        return back * max(0.0, 1 - 5 * t) * 1.5 + DOWN * min(1.0, 4 * t) + sway + spread * 2.5

    start = Roots(knot + spread + 0.06 * BACK, np.tile(back, (n, 1)), np.zeros((n, 3)))
    size = (1.3 + 1.1 * person.hair_volume) * rng.uniform(0.75, 1.05, n)
    tail = strands.grow(body, start, field, size, 1.0, 0.05 + 0.1 * own, 14)
    axis = tail.mean(axis=0, keepdims=True)
    colour = shading.to_linear(person.hair_colour)
    tint = strands.strand_colours(colour, n, tail.shape[1], 0.22, rng)
    meshes.append(
        strands.ribbons(
            tail, unit(tail - axis + 0.05 * BACK), rng.uniform(0.03, 0.07, n), tint, 1.0, rng
        )
    )
    return meshes


def _bun(head: Head, knot: np.ndarray, rng: np.random.Generator) -> render.Mesh:
    """A ball of hair wound around the knot's axis."""
    person = head.person
    radius = 0.26 + 0.14 * person.hair_volume
    axis = unit(knot - (head.landmarks[:2].mean(axis=0) + np.array([0.0, 0.3, -1.0])))
    centre = knot + axis * radius * 0.65
    side = unit(np.cross(axis, UP))
    other = np.cross(axis, side)
    n, k = 900, 12
    start = rng.uniform(0, 2 * np.pi, (n, 1))
    height = rng.uniform(-0.95, 0.95, (n, 1)) + rng.normal(0, 0.25, (n, 1)) * np.linspace(0, 1, k)
    height = np.clip(height, -0.98, 0.98)
    turn = start + np.linspace(0, 1.6, k)[None]
    r = np.sqrt(1 - height**2)
    out = (
        axis * (0.8 * height)[..., None]
        + side * (r * np.cos(turn))[..., None]
        + other * (r * np.sin(turn))[..., None]
    )
    paths = centre + out * (radius * rng.uniform(0.86, 1.0, (n, 1)))[..., None]
    tint = strands.strand_colours(shading.to_linear(person.hair_colour), n, k, 0.25, rng)
    return strands.ribbons(paths, unit(out), rng.uniform(0.04, 0.08, n), tint, 1.0, rng)
