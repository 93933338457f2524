"""Do neighbouring views show one head? Reprojection of one view into the next through its geometry.

Every pixel of a view is lifted to the surface, seen by the neighbour's camera and compared with what
the neighbour shows there, in both directions. What the neighbour cannot see (behind an edge, outside
its image) or sees at a grazing angle is left out, and counted: the share that was compared is part of
the result. This is the classic check of multi-view depth (e.g. COLMAP's, Schoenberger et al. 2016,
section 4.4) with the geometry given, so that it judges images and normals.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from spinmeround_jax import cameras
from spinmeround_jax.evaluation import surface

TOLERANCE = (
    0.015  # world units (a head is about 0.5 wide) by which two depths of one point may differ
)
GRAZING = 75.0  # degrees between the surface and the line of sight, from which nothing is compared
FEWEST = 16  # pixels: a mean over fewer is no measurement


def ring_pairs(views: int) -> np.ndarray:
    """(views, 2) neighbours i, i + 1 of a closed ring; for two views the one pair there is."""
    first = np.arange(views if views > 2 else 1)
    return np.stack([first, (first + 1) % views], axis=-1)


def reprojection(
    images: np.ndarray,
    normals: np.ndarray,
    world_to_camera: np.ndarray,
    depth: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    pairs: np.ndarray | None = None,
    focal: float = cameras.FOCAL,
    tolerance: float = TOLERANCE,
) -> dict[str, np.ndarray]:
    """Compare views with their neighbours through the surface that they show.

    Bilinear sampling leaves a rest even for perfect renders, the larger the sharper the texture: give
    the same measure of true renders beside it. Derived depth is chosen where normals agree, so that
    their angle is then a kind one; colours have no part in it.

    Args:
        images: (n, h, w, 3) in [-1, 1].
        normals: (n, h, w, 3) in the world's frame, of any length; zero on the background.
        world_to_camera: (n, 4, 4), see `cameras`.
        depth: (n, h, w) distance along the viewing axis in world units, such as renders know it; not
            finite or not positive where there is no surface. None derives it from the views' normals
            and silhouettes (`surface.depth_from_views`), which asks for views all around.
        mask: (n, h, w), True where the head is; None takes where there are normals (and depth).
        pairs: (p, 2) indices of views to compare; None takes the neighbours of a closed ring.
        focal: in image widths.
        tolerance: world units by which the depth may differ for two pixels to show the same point.

    Returns:
        Arrays of (p,): "l1", mean absolute difference of colour in [0, 1]; "psnr" in dB of the same
        pixels; "normals", mean angle in degrees; "valid", share of both views' mask that was compared.
        The first three are NaN where fewer than 16 pixels could be. And "pairs", (p, 2).

    Raises:
        ValueError: shapes do not fit together, or the views say too little to derive depth.
    """
    images, normals = np.asarray(images, np.float32), np.asarray(normals, np.float32)
    world_to_camera = np.asarray(world_to_camera, np.float64)
    n, h, w = images.shape[:3] if images.ndim == 4 else (0, 0, 0)
    if n < 2 or images.shape[3] != 3 or normals.shape != images.shape:
        raise ValueError(
            f"expected images and normals (n, h, w, 3) of at least two views, got {images.shape} "
            f"and {normals.shape}"
        )
    if world_to_camera.shape != (n, 4, 4):
        raise ValueError(f"expected {n} cameras (n, 4, 4), got {world_to_camera.shape}")
    mask = surface.mask_of(normals) if mask is None else np.asarray(mask).astype(bool)
    if depth is None:
        depth = surface.depth_from_views(normals, mask, world_to_camera, focal)
    depth = np.asarray(depth, np.float32)
    if mask.shape != (n, h, w) or depth.shape != (n, h, w):
        raise ValueError(f"expected mask and depth {(n, h, w)}, got {mask.shape}, {depth.shape}")
    known = mask & np.isfinite(depth) & (np.nan_to_num(depth) > 0)
    depth = np.where(known, depth, 0.0)
    # The outermost pixels are mixed with the background.
    inner = ndimage.binary_erosion(known, np.ones((1, 3, 3)))
    pairs = ring_pairs(n) if pairs is None else np.asarray(pairs)

    def warp(i: int, j: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per compared pixel of view i: mean |colour|, mean colour^2, angle, against view j."""
        rows, columns = np.nonzero(inner[i])
        points = surface.unproject(depth[i], world_to_camera[i], focal)[rows, columns]
        column, row, z = surface.project(points, world_to_camera[j], (h, w), focal)
        inside = (column >= 0) & (row >= 0) & (column <= w - 1) & (row <= h - 1) & (z > 0)
        rows, columns, column, row, z = (x[inside] for x in (rows, columns, column, row, z))
        left, top = (np.minimum(np.floor(x).astype(int), m - 2) for x, m in ((column, w), (row, h)))
        corners = [(top + a, left + b) for a in (0, 1) for b in (0, 1)]
        x, y = column - left, row - top
        weights = np.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x])[..., None]
        depths = np.stack([depth[j][corner] for corner in corners])
        nearest, farthest = depths.min(0), depths.max(0)
        # Neighbouring pixels differ by more than a slope allows: an edge, or seen from the side.
        limit = np.sqrt(2.0) * np.tan(np.deg2rad(GRAZING)) * z / (focal * w)
        visible = (
            np.all([inner[j][corner] for corner in corners], axis=0)
            & (farthest - nearest < limit)
            & (z < farthest + tolerance)
            & (z > nearest - tolerance)
        )

        def sampled(values: np.ndarray) -> np.ndarray:
            four = np.stack([values[corner] for corner in corners]).astype(np.float64)
            return (weights * four).sum(0)[visible]

        here = rows[visible], columns[visible]
        difference = (sampled(images[j]) - images[i][here]) / 2.0  # of colours in [0, 1]
        angle = _angle(sampled(normals[j]), normals[i][here].astype(np.float64))
        return np.mean(abs(difference), axis=-1), np.mean(difference**2, axis=-1), angle

    results: dict[str, list[float]] = {"l1": [], "psnr": [], "normals": [], "valid": []}
    for i, j in pairs:
        both = zip(warp(i, j), warp(j, i), strict=True)
        l1, square, angle = (np.concatenate(directions) for directions in both)
        enough = len(l1) >= FEWEST
        results["l1"].append(l1.mean() if enough else np.nan)
        results["psnr"].append(-10 * np.log10(max(square.mean(), 1e-12)) if enough else np.nan)
        results["normals"].append(angle.mean() if enough else np.nan)
        results["valid"].append(len(l1) / max(1, mask[i].sum() + mask[j].sum()))
    return {name: np.array(values) for name, values in results.items()} | {"pairs": pairs}


def _angle(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Degrees between (m, 3) vectors; exact also where it is small. 90 for a zero vector."""
    cross = np.linalg.norm(np.cross(one, other), axis=-1)
    dot = np.sum(one * other, axis=-1)
    zero = (cross < 1e-12) & (abs(dot) < 1e-12)
    return np.where(zero, 90.0, np.rad2deg(np.arctan2(cross, dot)))
