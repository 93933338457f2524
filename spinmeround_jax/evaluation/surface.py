"""The surface that a set of views shows: pixels to points and back, and depth where it is unknown.

Depth is derived in two steps. The visual hull of the silhouettes (Laurentini 1994) is right where a head
bulges and too near where it does not: between hair and cheek, under the brow and the chin. Behind it the
normals decide: they are the world's, so all views that see a point of the surface must show the same one
there, and each pixel takes the depth at which the views around it agree best (plane-sweep stereo,
Collins 1996, on normals instead of colours, as colours are what is to be judged). Integrating each
view's normals instead was measured to be worse than the hull alone: hair over a face, a chin over a neck
are steps that normals do not tell.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

from spinmeround_jax import cameras

HULL_CELLS = 96  # per axis
OUTVOTED = 0.05  # share of the views whose silhouettes may be wrong about a point
FINEST = 128  # pixels per side at which depth is derived; it is smooth enough to be interpolated
# The search behind the hull. Lengths are shares of the camera's distance, 2.7 for our orbit.
OFFSETS = np.linspace(-0.0045, 0.045, 22)
PULL = 0.135  # disagreement (1 - cosine) that a length of 1 behind the hull is worth
WITNESSES = 8  # views that are asked, at these angles in degrees
WITNESS_ANGLES = (5.0, 50.0)
DISAGREEMENT = 0.3  # at most; also that of a view which shows background


def mask_of(normals: np.ndarray) -> np.ndarray:
    """(...,) bool of (..., 3) normals: where there is a surface; the background's are zero."""
    return np.linalg.norm(normals, axis=-1) > 0.5


def _rays(size: tuple[int, int], focal: float) -> np.ndarray:
    """(h, w, 3) camera-space directions through pixel centres, z = -1."""
    h, w = size
    x = (np.arange(w) + 0.5 - w / 2) / (focal * w)
    y = (np.arange(h) + 0.5 - h / 2) / (focal * w)
    x, y = np.meshgrid(x, -y)
    return np.stack([x, y, -np.ones_like(x)], axis=-1)


def unproject(
    depth: np.ndarray, world_to_camera: np.ndarray, focal: float = cameras.FOCAL
) -> np.ndarray:
    """(h, w, 3) world points of the centres of pixels at (h, w) depth, seen by a (4, 4) camera."""
    seen = depth[..., None] * _rays(depth.shape, focal)
    return (seen - world_to_camera[:3, 3]) @ world_to_camera[:3, :3]


def project(
    points: np.ndarray,
    world_to_camera: np.ndarray,
    size: tuple[int, int],
    focal: float = cameras.FOCAL,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns, rows (whole numbers at pixel centres) and depths of (..., 3) points in an (h, w) view."""
    h, w = size
    seen = points @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
    depth = -seen[..., 2]
    scale = focal * w / np.where(abs(depth) > 1e-9, depth, 1e-9)
    return seen[..., 0] * scale + (w - 1) / 2, -seen[..., 1] * scale + (h - 1) / 2, depth


def depth_from_views(
    normals: np.ndarray, mask: np.ndarray, world_to_camera: np.ndarray, focal: float = cameras.FOCAL
) -> np.ndarray:
    """Depth of each view from the silhouettes and the normals of all.

    Args:
        normals: (n, h, w, 3) in the world's frame, of any length.
        mask: (n, h, w) bool silhouettes.
        world_to_camera: (n, 4, 4) cameras around the head, which is at the origin.
        focal: in image widths.

    Returns:
        (n, h, w) float32 along the viewing axis, world units; NaN outside the mask, and where the
        other views' silhouettes leave no room for what this one shows.

    Raises:
        ValueError: the views do not surround the head.
    """
    world_to_camera = np.asarray(world_to_camera, np.float64)
    towards = world_to_camera[:, 2, :3]
    if len(towards) < 4 or np.linalg.norm(towards.mean(0)) > 0.6:
        raise ValueError(
            f"depth is derived from silhouettes all around the head, and these {len(towards)} views "
            "do not surround it: give their depth"
        )
    n, h, w = mask.shape
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    unit = np.where(mask[..., None] & (length > 1e-6), normals / np.maximum(length, 1e-6), 0.0)
    distance = np.linalg.norm(world_to_camera[:, :3, 3], axis=-1).mean()
    half = 0.6 * distance / focal  # a little more than the frame shows at the origin
    hull = _hull(mask, world_to_camera, focal, half)
    step = max(1, round(max(h, w) / FINEST))
    lattice = np.mgrid[step // 2 : h : step, step // 2 : w : step]
    result = np.full(mask.shape, np.nan, np.float32)
    for i in range(n):
        asked = mask[i][tuple(lattice)]
        rays = _rays((h, w), focal)[tuple(lattice)][asked]
        depth = np.full(asked.shape, np.nan)
        depth[asked] = _hull_depth(hull, half, rays, world_to_camera[i])
        depth = _agreed(depth, lattice, unit, world_to_camera, focal, i, distance)
        result[i] = np.where(mask[i], _enlarged(depth, step, (h, w)), np.nan)
    return result


def _hull(mask: np.ndarray, world_to_camera: np.ndarray, focal: float, half: float) -> np.ndarray:
    """(HULL_CELLS,) * 3 float32: roughly the distance to the hull's surface, positive inside.

    Of each point the views' signed distances to the silhouette (world units) are ranked and the
    smallest taken, after those that may be outvoted. A view that does not see the point says nothing.
    """
    n, h, w = mask.shape
    axis = np.linspace(-half, half, HULL_CELLS)
    rank = int(OUTVOTED * n)
    signed = []
    for one in mask:
        distance = distance_transform_edt(one) if one.any() else np.zeros((h, w))
        signed.append(distance - distance_transform_edt(~one) + np.where(one, -0.5, 0.5))
    hull = np.empty((HULL_CELLS,) * 3, np.float32)
    for k, x in enumerate(axis):  # by slabs, for memory
        points = np.stack(np.meshgrid([x], axis, axis, indexing="ij"), -1)[0]
        seen = np.full((n, HULL_CELLS, HULL_CELLS), np.inf, np.float32)
        for i in range(n):
            column, row, z = project(points, world_to_camera[i], (h, w), focal)
            inside = (column > -0.5) & (row > -0.5) & (column < w - 0.5) & (row < h - 0.5) & (z > 0)
            at = np.stack([row[inside], column[inside]])
            pixels = map_coordinates(signed[i], at, order=1, mode="nearest")
            seen[i][inside] = pixels * z[inside] / (focal * w)
        ranked = np.partition(seen, rank, axis=0)[rank]
        hull[k] = np.where(np.isfinite(ranked), ranked, -half)  # no view sees it: not the head
    return hull


def _hull_depth(
    hull: np.ndarray, half: float, rays: np.ndarray, world_to_camera: np.ndarray
) -> np.ndarray:
    """(m,) depth where (m, 3) camera-space rays enter the hull; NaN where they miss it."""
    # Through the cube of the hull, a cell at a time: its field is smooth.
    steps = np.linspace(-1.3, 1.3, int(1.3 * HULL_CELLS)) * half - world_to_camera[2, 3]
    origin = -world_to_camera[:3, :3].T @ world_to_camera[:3, 3]
    directions = rays @ world_to_camera[:3, :3]
    inside = np.empty((len(steps), len(rays)), np.float32)
    for k, depth in enumerate(steps):
        at = (origin + depth * directions + half) / (2 * half) * (HULL_CELLS - 1)
        inside[k] = map_coordinates(hull, at.T, order=1, mode="constant", cval=-half)
    first = np.argmax(inside > 0, axis=0)
    hit = (inside > 0).any(0) & (first > 0)
    before = np.maximum(first - 1, 0)
    columns = np.arange(len(rays))
    outer, inner = inside[before, columns], inside[first, columns]
    depth = steps[before] + outer / np.minimum(outer - inner, -1e-9) * (steps[1] - steps[0])
    return np.where(hit, depth, np.nan)


def _agreed(
    start: np.ndarray,
    lattice: np.ndarray,
    unit: np.ndarray,
    world_to_camera: np.ndarray,
    focal: float,
    view: int,
    distance: float,
) -> np.ndarray:
    """(a, b) depth near `start` at which the other views show the pixels' normals best.

    start: (a, b) depth, NaN where there is none. lattice: (2, a, b) rows and columns of the pixels.
    unit: (n, h, w, 3) normals of length 1, zero on the background.
    """
    towards = world_to_camera[:, 2, :3]
    angle = np.rad2deg(np.arccos(np.clip(towards @ towards[view], -1.0, 1.0)))
    nearby = [
        j
        for j in np.argsort(angle, kind="stable")
        if WITNESS_ANGLES[0] < angle[j] < WITNESS_ANGLES[1]
    ]
    known = np.isfinite(start)
    if not nearby or not known.any():
        return start
    chosen = np.unique(np.linspace(0, len(nearby) - 1, WITNESSES).round().astype(int))
    size = unit.shape[1:3]
    rows, columns = lattice[:, known]
    rotation, translation = world_to_camera[view, :3, :3], world_to_camera[view, :3, 3]
    directions = _rays(size, focal)[rows, columns] @ rotation
    candidates = start[known] + OFFSETS[:, None] * distance  # (offsets, pixels)
    points = candidates[..., None] * directions - translation @ rotation
    costs = []
    for j in (nearby[k] for k in chosen):
        column, row, _ = project(points, world_to_camera[j], size, focal)
        cosine = sum(
            map_coordinates(unit[j, ..., axis], [row, column], order=1, mode="constant")
            * unit[view, rows, columns, axis]
            for axis in range(3)
        )
        costs.append(np.minimum(1.0 - cosine, DISAGREEMENT))
    # Half of them may have their view of the point blocked.
    cost = np.sort(costs, axis=0)[: max(1, len(costs) // 2)].mean(0)
    smooth = np.zeros((len(OFFSETS), *start.shape))
    smooth[:, known] = cost
    share = gaussian_filter(known.astype(np.float64), 1.0)
    smooth = gaussian_filter(smooth, (0.0, 1.0, 1.0))[:, known] / share[known]
    best = np.argmin(smooth + PULL * abs(OFFSETS[:, None]), axis=0)
    depth = start.copy()
    depth[known] = candidates[best, np.arange(len(best))]
    return depth


def _enlarged(depth: np.ndarray, step: int, size: tuple[int, int]) -> np.ndarray:
    """(h, w) from every `step`-th pixel, bilinear; NaN where the nearest of them is."""
    known = np.isfinite(depth)
    if step == 1 or not known.any():
        return depth if step == 1 else np.full(size, np.nan)
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    at = [(np.arange(m) - step // 2) / step for m in size]
    at = np.stack(np.meshgrid(*at, indexing="ij"))
    smooth = map_coordinates(depth[tuple(nearest)], at, order=1, mode="nearest")
    there = map_coordinates(known.astype(np.float64), at, order=1, mode="nearest") > 0.5
    return np.where(there, smooth, np.nan)
