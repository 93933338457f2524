"""Colour of skin, lips and eyes, per vertex, as functions of the neutral template."""

import functools

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from data_prep.parametric import template
from data_prep.parametric.head import Head, vertex_normals
from data_prep.rendering import render, shading

_NOISE_SIDE = 48


@functools.lru_cache(maxsize=8)
def _noise_volume(seed: int) -> np.ndarray:
    """Periodic smooth noise, zero mean, unit variance."""
    volume = np.random.default_rng([77, seed]).standard_normal((_NOISE_SIDE,) * 3)
    volume = gaussian_filter(volume, 1.0, mode="wrap")
    return (volume / volume.std()).astype(np.float32)


def noise(points: np.ndarray, period: float, seed: int) -> np.ndarray:
    """Smooth noise (n,) of points (n, 3): zero mean, unit variance, details about `period` long."""
    volume = _noise_volume(seed % 8)
    shift = np.random.default_rng(seed).uniform(0, _NOISE_SIDE, 3)
    return map_coordinates(volume, (points / period * 3 + shift).T, order=1, mode="grid-wrap")


def bump(points: np.ndarray, centre, radius) -> np.ndarray:
    """Gaussian blob (n,), mirrored in x: exp(-|(|x|,y,z) - centre|^2 / radius^2 / 2)."""
    mirrored = np.abs(points * [1, 0, 0]) + points * [0, 1, 1]
    return np.exp(-0.5 * (((mirrored - np.asarray(centre)) / np.asarray(radius)) ** 2).sum(axis=1))


def beard_area(rest: np.ndarray) -> np.ndarray:
    """(n,) in [0, 1]: where a full beard grows (cheeks below a slanted line, lip, chin, throat)."""
    x, y, z = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]
    # Upper edge: from the sideburn before the ear down to the mouth corner and up to the nose.
    edge = np.interp(x, [0.0, 0.16, 0.3, 0.45, 0.62, 0.72], [6.83, 6.83, 6.72, 6.72, 6.86, 7.15])
    area = np.clip((edge - y) / 0.07, 0, 1) * np.clip((y - 5.93 - 0.16 * x) / 0.1, 0, 1)
    behind = np.clip((z - np.interp(y, [5.9, 6.4, 7.0], [0.75, 0.5, 0.42])) / 0.08, 0, 1)
    soul = 1 - 0.55 * bump(rest, (0.13, 6.47, 1.45), (0.06, 0.05, 0.15))
    return area * behind * soul


def scalp_area(rest: np.ndarray, recession: float) -> np.ndarray:
    """(n,) in [0, 1]: the hairy scalp. `recession` 0..1 moves front and temples back."""
    x, y, z = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]
    # Hairline height as a function of depth z: nape low at the back, over the ear, then steeply
    # up the temple to the forehead.
    line = np.interp(
        z,
        [-0.6, -0.3, 0.1, 0.32, 0.42, 0.6, 0.8, 0.95, 1.15, 1.4],
        [6.55, 6.5, 6.85, 7.18, 7.2, 7.15, 7.45, 7.72, 7.98, 8.05],
    )
    temple = np.clip((x - 0.25) / 0.3, 0, 1) * np.clip((z - 0.5) / 0.4, 0, 1)
    front = np.clip((z - 0.55) / 0.5, 0, 1)
    line = line + recession * (0.32 * temple + 0.3 * front)
    line = line + 0.03 * np.sin(9 * rest[:, 0] + 2.0) * front
    return np.clip((y - line) / 0.09 + 0.5, 0, 1)


def skin_mesh(
    head: Head, scalp_hair: np.ndarray, face_hair: np.ndarray, covered: np.ndarray
) -> render.Mesh:
    """The skin in decimetres. scalp_hair, face_hair: (m,) in [0, 1], hair and stubble on the skin.

    covered: (m,) bool, skin under clothes; it is left out so that it cannot poke through.
    """
    person = head.person
    part = template.part("skin", head.level)
    rest = part.rest
    base = shading.to_linear(person.skin_colour)
    blotch = 0.6 * noise(rest, 0.5, person.seed) + 0.4 * noise(rest, 0.16, person.seed + 1)
    pores = np.clip(noise(rest, 0.045, person.seed + 4), -2, 2)
    albedo = base * (1 + 0.05 * blotch[:, None] + 0.03 * pores[:, None])

    # Blood: cheeks, nose, ears, chin, knuckles of the brow; and pale under the brow and jaw.
    blood = 0.8 * bump(rest, (0.45, 6.95, 1.2), (0.17, 0.16, 0.3))
    blood += 0.9 * bump(rest, (0.0, 6.98, 1.7), (0.14, 0.12, 0.16))
    blood += 0.3 * bump(rest, (0.0, 6.3, 1.5), (0.2, 0.12, 0.2)) + 0.6 * part.masks["ears"]
    blood += 0.12 * blotch
    depth = np.clip(1.1 - 0.8 * person.skin_tone, 0.2, 1) * (0.35 + person.ruddiness)
    redden = 1 - np.clip(blood * depth, 0, 1.4)[:, None] * np.array([0.06, 0.24, 0.2])
    albedo = albedo * redden

    # Darker, bluish hollows under the eyes grow with age; lids are a little darker.
    age = np.clip((person.age - 25) / 50, 0, 1)
    hollow = bump(rest, (0.31, 7.1, 1.36), (0.12, 0.045, 0.2)) * (0.25 + 0.5 * age)
    hollow += 0.22 * part.masks["eyelids"]
    albedo = albedo * (1 - np.clip(hollow, 0, 1)[:, None] * np.array([0.3, 0.34, 0.26]))
    if person.freckles > 0:
        spots = np.clip(noise(rest, 0.07, person.seed + 2) - 1.0, 0, 1) * part.masks["face"]
        albedo = albedo * (1 - person.freckles * spots[:, None] * np.array([0.3, 0.5, 0.55]))
    age_spots = np.clip(noise(rest, 0.11, person.seed + 3) - 1.8, 0, 1) * np.clip(age - 0.4, 0, 0.5)
    albedo = albedo * (1 - age_spots[:, None] * np.array([0.4, 0.5, 0.55]))

    lips = part.masks["lips"][:, None]
    tint = base * np.array([0.84, 0.56, 0.56]) * (1.02 - 0.4 * person.lip_tint)
    tint = tint + np.array([0.03, 0.004, 0.008]) * (1 - person.skin_tone)
    stick = shading.to_linear(person.lipstick_colour) * (1.0 - 0.45 * person.skin_tone)
    tint = tint * (1 - person.lipstick) + stick * person.lipstick
    albedo = albedo * (1 - lips) + tint * lips
    inside = part.masks["inside-mouth"][:, None]
    albedo = albedo * (1 - inside) + np.array([0.09, 0.02, 0.02]) * inside
    for cover, colour in (
        (face_hair, person.natural_hair_colour),
        (scalp_hair, person.hair_colour),
    ):
        under = 0.6 * shading.to_linear(colour) + 0.04 * albedo
        albedo = albedo + (under - albedo) * cover[:, None]

    zone = bump(rest, (0.0, 7.6, 1.4), (0.35, 0.3, 0.4)) + bump(
        rest, (0.0, 7.0, 1.65), (0.14, 0.3, 0.2)
    )
    gloss = 0.55 + 0.5 * np.clip(zone, 0, 1) + 0.9 * lips[:, 0] * (0.5 + person.lipstick)
    gloss *= 1 - 0.6 * np.maximum(scalp_hair, face_hair)
    faces = part.faces[~covered[part.faces].all(axis=1)]
    return render.Mesh(head.skin, faces, head.normals, albedo, gloss, shading.SKIN)


def eye_meshes(head: Head) -> list[render.Mesh]:
    """Both eyeballs in decimetres: sclera, limbus, iris with radial fibres, pupil."""
    person = head.person
    meshes = []
    for name, vertices in zip(("left_eye", "right_eye"), head.eyes, strict=True):
        part = template.part(name, 2)
        centre = vertices.mean(axis=0)
        yaw, pitch = person.gaze
        # Eyes rest on the camera: a slight convergence.
        yaw += -1.5 if name == "left_eye" else 1.5
        gaze = shading.direction(yaw, pitch)
        outward = vertices - centre
        outward = outward / np.linalg.norm(outward, axis=1, keepdims=True)
        angle = np.degrees(np.arccos(np.clip(outward @ gaze, -1, 1)))
        around = np.arctan2(outward[:, 1] - gaze[1], outward[:, 0] - gaze[0])
        fibre = 0.8 + 0.25 * noise(
            np.stack([np.cos(around) * 2, np.sin(around) * 2, angle / 30], 1), 0.4, person.seed
        )
        iris = shading.to_linear(person.iris_colour) * np.clip(fibre, 0.4, 1.6)[:, None] * 1.5
        iris = iris * np.interp(angle, [10, 16, 24, 27], [0.9, 1.25, 1.0, 0.45])[:, None]
        sclera = np.array([0.66, 0.60, 0.56]) * np.array([1, 0.98 - 0.02 * person.age / 80, 0.95])
        sclera = sclera * (1 - np.clip((angle - 40) / 60, 0, 0.4)[:, None] * [0.3, 0.9, 0.9])
        ring = np.clip((angle - 26.0) / 4.0, 0, 1)[:, None]
        pupil = np.clip((angle - 9.0) / 2.5, 0, 1)[:, None]
        albedo = (iris * (1 - ring) + sclera * ring) * pupil + 0.004 * (1 - pupil)
        gloss = np.full(len(vertices), 1.0)
        normals = vertex_normals(vertices, part.faces)
        meshes.append(render.Mesh(vertices, part.faces, normals, albedo, gloss, shading.EYE))
    return meshes
