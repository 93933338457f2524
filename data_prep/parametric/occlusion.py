"""Bakes soft shadows and ambient occlusion into vertices: once per subject, for all views."""

import numpy as np

from data_prep.rendering import shading

DIRECTIONS = 112
_KEY_SHARPNESS = 10.0  # exp(k (cos - 1)): a window-sized key light, about 25 degrees wide


def sphere_directions(count: int) -> np.ndarray:
    """(count, 3) unit vectors on a Fibonacci lattice."""
    i = np.arange(count) + 0.5
    y = 1 - 2 * i / count
    turn = np.pi * (3 - np.sqrt(5)) * i
    r = np.sqrt(1 - y * y)
    return np.stack([r * np.cos(turn), y, r * np.sin(turn)], axis=1)


def bake(scene, points, normals, offset: float, light: shading.Light, count: int = DIRECTIONS):
    """Unblocked shares (key, ambient), each (n,) float32 in [0, 1], at points (n, 3).

    Rays leave from point + offset * normal. Key weighs directions around the key light, ambient
    all of the hemisphere by cosine and by how bright the surroundings are there.
    """
    directions = sphere_directions(count)
    cosine = normals @ directions.T
    point_id, direction_id = np.nonzero(cosine > 0.02)
    starts = points[point_id] + offset * normals[point_id]
    hit = scene.blocked(starts, directions[direction_id])
    weight = cosine[point_id, direction_id]
    sky = weight * light.ambient(directions).mean(axis=1)[direction_id]
    key = weight * np.exp(_KEY_SHARPNESS * (directions @ light.key - 1))[direction_id]

    def share(weights: np.ndarray) -> np.ndarray:
        total = np.bincount(point_id, weights, len(points))
        free = np.bincount(point_id, weights * ~hit, len(points))
        return (free / np.maximum(total, 1e-9)).astype(np.float32)

    return share(key), share(sky)
