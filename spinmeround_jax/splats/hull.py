"""The visual hull of the masks, where a fit begins: everything that all views see as inside."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from spinmeround_jax.files import InputError
from spinmeround_jax.splats.scene import Scene, camera_positions, middle_and_radius

RESOLUTION = 80  # voxels along the cube's edge
AGREEMENT = (
    0.9  # share of the views that see a voxel with it in their mask: generated ones disagree
)
SEEN = 0.5  # of all views must see it


def surface(
    scene: Scene, count: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Points on the hull, drawn at random.

    Returns:
        (count, 3) points; (count, 3) outward unit normals, the scene's where it has any; (count, 3) colours in
        [0, 1], the mean of the views that face the point; distance of neighbouring points.

    Raises:
        InputError: the masks have no hull.
    """
    middle, radius = middle_and_radius(scene)
    inside, edge = _carve(scene, middle, radius)
    # The outside of the outermost layer, and how the occupancy falls across it.
    shell = np.argwhere(inside & ~ndimage.binary_erosion(inside))
    if len(shell) < 8:
        raise InputError(
            "the masks have no common inside; are the cameras those of the images, is the background plain?"
        )
    normals = _outward(inside)[tuple(shell.T)]
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(shell), count, replace=len(shell) < count)
    points = middle + (shell[chosen] + rng.random((count, 3)) - 0.5 * RESOLUTION) * edge
    hull_normals = normals[chosen]
    colours, given = _look_up(scene, points, hull_normals)
    length = np.linalg.norm(given, axis=-1, keepdims=True)
    agrees = (length > 0.3) & (np.sum(given * hull_normals, -1, keepdims=True) > 0.0)
    oriented = np.where(agrees, given / np.maximum(length, 1e-6), hull_normals)
    area = len(shell) * edge**2
    return points, oriented, colours, float(np.sqrt(area / count))


def _carve(scene: Scene, middle: np.ndarray, radius: float) -> tuple[np.ndarray, float]:
    """(n, n, n) bool occupancy of the cube around `middle`, and a voxel's edge."""
    edge = 2.0 * radius / RESOLUTION
    steps = (np.arange(RESOLUTION) + 0.5 - 0.5 * RESOLUTION) * edge
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3) + middle
    seen = np.zeros(len(grid), np.int32)
    agreed = np.zeros(len(grid), np.int32)
    for view in range(len(scene)):
        pixels, ahead = _pixels(scene, view, grid)
        rows, columns, within = _nearest(scene, pixels, ahead)
        seen += within
        agreed += within & (scene.masks[view][rows, columns] > 0.5)
    inside = (seen >= SEEN * len(scene)) & (agreed >= AGREEMENT * seen)
    return inside.reshape((RESOLUTION,) * 3), edge


def _pixels(scene: Scene, view: int, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2) pixels of (n, 3) points, and whether they are before the camera."""
    pose = scene.world_to_camera[view].astype(np.float64)
    local = points @ pose[:3, :3].T + pose[:3, 3]
    depth = -local[:, 2]
    ahead = depth > 1e-6
    plane = local[:, :2] * np.array([1.0, -1.0]) / np.where(ahead, depth, 1.0)[:, None]
    return plane * scene.focal + scene.centre, ahead


def _nearest(
    scene: Scene, pixels: np.ndarray, ahead: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column (0 where outside) of the pixel at each position, and whether it is in the image."""
    height, width = scene.size
    within = ahead & (pixels >= 0).all(-1) & (pixels < (width, height)).all(-1)
    columns, rows = np.where(within[:, None], pixels, 0.0).astype(np.int64).T
    return rows, columns, within


def _outward(inside: np.ndarray) -> np.ndarray:
    """(n, n, n, 3) unit normals: the smoothed occupancy falls outward."""
    smooth = ndimage.uniform_filter(inside.astype(np.float32), 5, mode="constant")
    gradient = -np.stack(np.gradient(smooth), -1)
    length = np.linalg.norm(gradient, axis=-1, keepdims=True)
    return np.where(length > 1e-6, gradient / np.maximum(length, 1e-6), (0.0, 1.0, 0.0))


def _look_up(
    scene: Scene, points: np.ndarray, normals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) colours and (n, 3) given normals of points, averaged over the views that face them."""
    colours = np.full((len(points), 3), 1e-3 * 0.5)
    given = np.zeros((len(points), 3))
    total = np.full((len(points), 1), 1e-3)
    positions = camera_positions(scene.world_to_camera)
    for view, position in enumerate(positions):
        pixels, ahead = _pixels(scene, view, points)
        rows, columns, within = _nearest(scene, pixels, ahead)
        towards = position - points
        towards /= np.linalg.norm(towards, axis=-1, keepdims=True)
        facing = np.maximum(np.sum(towards * normals, -1), 0.0) ** 2
        weight = (facing * within * scene.masks[view][rows, columns])[:, None]
        colours += weight * scene.images[view][rows, columns]
        if scene.normals is not None:
            given += weight * scene.normals[view][rows, columns]
        total += weight
    return np.clip(colours / total, 0.0, 1.0), given / total
