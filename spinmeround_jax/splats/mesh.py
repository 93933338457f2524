"""Depth and normals of many views -> one closed, coloured surface, as PLY and GLB.

Every pixel that shows the head is a point with a normal. The surface is where the indicator function whose
gradient those normals are takes its middle value: Poisson reconstruction on a regular grid, solved by FFT
(Kazhdan, "Reconstruction of Solid Models from Oriented Point Sets", SGP 2005). Libraries with an octree solver
are hundreds of megabytes (open3d), under the GPL (pymeshlab) or compiled at install (pypoisson2); one head
needs no octree. Marching cubes is scikit-image's, files are trimesh's.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import scipy.fft
import trimesh
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage import measure

from spinmeround_jax.files import InputError, write_atomically

METRES_PER_UNIT = 0.6  # a head is 0.37 units from chin to crown, 22.5 cm on average
RESOLUTION = 128  # cells along the longest side
MAX_RESOLUTION = 256  # 2.3 GB of memory at most
MAX_POINTS = 500_000  # pixels used, equally many of every view; a cell still holds several
MIN_POINTS = 200
MARGIN = 0.15  # of the longest side, on either side: the FFT's grid repeats
OPAQUE = 0.9  # alpha from which a pixel's depth is the surface's and not the edge's
FACING = 0.15  # cosine of the angle from which a pixel is used
LEVEL = 0.5  # sine of the elevation up to which an image's lower edge shows where the neck is cut
OUTVOTED = 0.1  # share of the views that may show background where a point is


@dataclasses.dataclass(frozen=True)
class Points:
    """p points of a surface: positions and outward unit normals (p, 3), colours (p, 3) in [0, 1], and
    weights (p,), how squarely each was seen. floor: height at which the images end below, or None."""

    positions: np.ndarray
    normals: np.ndarray
    colours: np.ndarray
    weights: np.ndarray
    floor: float | None = None


@dataclasses.dataclass(frozen=True)
class Mesh:
    """A closed surface in world units: vertices and outward unit normals (n, 3) float32, faces (m, 3)
    int32, counter-clockwise seen from outside, colours (n, 3) in [0, 1]."""

    vertices: np.ndarray
    normals: np.ndarray
    faces: np.ndarray
    colours: np.ndarray


def extract(
    images: np.ndarray,
    alpha: np.ndarray,
    depth: np.ndarray,
    normals: np.ndarray,
    world_to_camera: np.ndarray,
    focal: np.ndarray,
    centre: np.ndarray,
    resolution: int = RESOLUTION,
) -> Mesh:
    """The surface that v views of h x w pixels show.

    Args:
        images: (v, h, w, 3) in [0, 1].
        alpha: (v, h, w) in [0, 1].
        depth: (v, h, w) distance along the optical axis, 0 where there is nothing.
        normals: (v, h, w, 3) in the world, shorter than 1/2 where there is nothing; drawn or predicted.
        world_to_camera: (v, 4, 4), OpenGL cameras (`cameras.py`).
        focal, centre: (2,) pixels, x and y.
        resolution: cells along the longest side of the surface's box.

    Raises:
        InputError: the arrays do not fit together, are not finite, or show too little.
    """
    points = oriented_points(images, alpha, depth, normals, world_to_camera, focal, centre)
    return poisson(points, resolution)


# --------------------------------------------------------------------------------------------------
# Views -> points


def oriented_points(
    images: np.ndarray,
    alpha: np.ndarray,
    depth: np.ndarray,
    normals: np.ndarray,
    world_to_camera: np.ndarray,
    focal: np.ndarray,
    centre: np.ndarray,
) -> Points:
    """The points that views show; arguments and errors as `extract`."""
    given = (images, alpha, depth, normals, world_to_camera)
    images, alpha, depth, normals, poses = (np.asarray(x, np.float32) for x in given)
    focal, centre = np.asarray(focal, np.float64), np.asarray(centre, np.float64)
    pixels = depth.shape
    if (
        len(pixels) != 3
        or images.shape != (*pixels, 3)
        or alpha.shape != pixels
        or normals.shape != (*pixels, 3)
        or poses.shape != (pixels[0], 4, 4)
    ):
        raise InputError(
            "images, alpha, depth, normals and cameras do not fit together: "
            f"{images.shape}, {alpha.shape}, {depth.shape}, {normals.shape}, {poses.shape}"
        )
    if not all(np.isfinite(x).all() for x in (images, alpha, depth, normals, poses)):
        raise InputError("the views hold values that are not finite; fit the Gaussians again")
    if not (alpha > OPAQUE).any() or not (depth > 0).any():
        raise InputError("the views show nothing: depth or alpha is empty in all of them")

    height, width = pixels[1:]
    x = (np.arange(width) + 0.5 - centre[0]) / focal[0]
    y = (np.arange(height) + 0.5 - centre[1]) / focal[1]
    x, y = np.meshgrid(x, -y)
    rays = np.stack([x, y, -np.ones_like(x)], -1)
    parts: dict[str, list[np.ndarray]] = {
        "positions": [],
        "normals": [],
        "colours": [],
        "weights": [],
    }
    lowest: list[np.ndarray] = [np.zeros(0)]
    rng = np.random.default_rng(0)
    for image, opacity, far, normal, pose in zip(images, alpha, depth, normals, poses, strict=True):
        rotation, translation = pose[:3, :3].astype(np.float64), pose[:3, 3].astype(np.float64)
        positions = (far[..., None] * rays - translation) @ rotation
        towards = -rays @ rotation
        towards /= np.linalg.norm(towards, axis=-1, keepdims=True)
        length = np.linalg.norm(normal, axis=-1)
        unit = normal / np.maximum(length, 1e-6)[..., None]
        cosine = np.sum(unit * towards, -1)
        solid = (opacity > OPAQUE) & (far > 0)
        use = np.flatnonzero(solid & (length > 0.5) & (cosine > FACING))
        if len(use) > MAX_POINTS // len(poses):
            use = np.sort(rng.choice(use, MAX_POINTS // len(poses), replace=False))
        parts["positions"].append(positions.reshape(-1, 3)[use])
        parts["normals"].append(unit.reshape(-1, 3)[use])
        parts["colours"].append(image.reshape(-1, 3)[use])
        parts["weights"].append(cosine.reshape(-1)[use])
        if abs(rotation[2, 1]) < LEVEL:
            lowest.append(positions[-1][solid[-1], 1])
    points = Points(**{name: np.concatenate(part) for name, part in parts.items()})
    points = _inside_silhouettes(points, alpha, poses, focal, centre)
    if len(points.positions) < MIN_POINTS:
        raise InputError(
            f"the views show {len(points.positions)} points of a surface, a mesh needs {MIN_POINTS}: "
            "alpha, depth and normals overlap in too few pixels"
        )
    cut = np.concatenate(lowest)
    floor = float(np.median(cut)) if len(cut) >= 2 * len(lowest) else None
    return dataclasses.replace(points, floor=floor)


def _inside_silhouettes(
    points: Points, alpha: np.ndarray, poses: np.ndarray, focal: np.ndarray, centre: np.ndarray
) -> Points:
    """Without those that many views contradict: depth at an edge is that of nothing."""
    height, width = alpha.shape[1:]
    asked = np.zeros(len(points.positions))
    empty = np.zeros(len(points.positions))
    for opacity, pose in zip(alpha, poses, strict=True):
        seen = points.positions @ pose[:3, :3].T + pose[:3, 3]
        depth = np.maximum(-seen[:, 2], 1e-6)
        column = np.floor(centre[0] + focal[0] * seen[:, 0] / depth).astype(int)
        row = np.floor(centre[1] - focal[1] * seen[:, 1] / depth).astype(int)
        shown = (seen[:, 2] < 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        asked += shown
        empty[shown] += opacity[row[shown], column[shown]] < 0.5
    keep = empty <= OUTVOTED * asked
    return _take(points, np.flatnonzero(keep))


def _take(points: Points, which: np.ndarray) -> Points:
    names = ("positions", "normals", "colours", "weights")
    return Points(*(getattr(points, name)[which] for name in names), floor=points.floor)


# --------------------------------------------------------------------------------------------------
# Points -> surface


def poisson(points: Points, resolution: int = RESOLUTION) -> Mesh:
    """The closed surface through the points.

    Where the images end below (`points.floor`), the neck or the shoulders get a flat cap. Of several
    pieces the largest is kept, so that nothing floats.

    Raises:
        InputError: too few points, or they enclose nothing.
    """
    if not 16 <= resolution <= MAX_RESOLUTION:
        raise InputError(f"resolution {resolution}; expected 16 to {MAX_RESOLUTION}")
    if len(points.positions) < MIN_POINTS:
        raise InputError(f"{len(points.positions)} points; a mesh needs {MIN_POINTS}")
    low, high = points.positions.min(0), points.positions.max(0)
    step = float((high - low).max()) / resolution
    if not np.isfinite(step) or step <= 0:
        raise InputError("all points are in one place; the views hold no surface")
    pad = int(np.ceil(MARGIN * resolution)) + 4
    shape = [
        scipy.fft.next_fast_len(int(np.ceil(n / step)) + 2 * pad, real=True) for n in high - low
    ]
    origin = (low + high) / 2 - step * (np.array(shape) - 1) / 2
    at = (points.positions - origin) / step

    field = _indicator(at, points.normals, points.weights, shape)
    level = float(np.average(_sample(field, at), weights=points.weights))
    field -= level
    if points.floor is not None:
        heights = origin[1] + step * np.arange(shape[1]) - points.floor
        slope = np.abs(np.gradient(field, axis=1)).max() / step
        field = np.minimum(field, slope * heights[None, :, None])
    field[[0, -1]] = field[:, [0, -1]] = field[:, :, [0, -1]] = field.min()
    if field.max() <= 0:
        raise InputError("the points enclose nothing; are the normals those of a closed surface?")
    # This direction gives faces that are counter-clockwise from where the field is smaller: outside.
    vertices, faces, _, _ = measure.marching_cubes(field, 0.0, gradient_direction="ascent")
    surface = _largest(trimesh.Trimesh(origin + step * vertices, faces))
    return Mesh(
        vertices=np.asarray(surface.vertices, np.float32),
        normals=np.asarray(surface.vertex_normals, np.float32),
        faces=np.asarray(surface.faces, np.int32),
        colours=_colours(np.asarray(surface.vertices), points, step),
    )


def _corners(at: np.ndarray, shape: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Flat indices and trilinear weights of the eight grid points around each point."""
    base = np.floor(at).astype(np.int64)
    share = at - base
    corners = []
    for offset in np.ndindex(2, 2, 2):
        index = np.ravel_multi_index(tuple((base + offset).T), shape)
        weight = np.prod(np.where(offset, share, 1.0 - share), axis=-1)
        corners.append((index, weight))
    return corners


def _sample(field: np.ndarray, at: np.ndarray) -> np.ndarray:
    return ndimage.map_coordinates(field, at.T, order=1, mode="nearest")


def _indicator(
    at: np.ndarray, normals: np.ndarray, weights: np.ndarray, shape: list[int]
) -> np.ndarray:
    """Indicator function, up to a constant and a scale, larger inside; points `at` are in grid cells.

    Its gradient is the closest to the field of inward normals: laplace f = div v (Kazhdan 2005, section 4).
    """
    cells = int(np.prod(shape))
    corners = _corners(at, shape)

    def splat(values: np.ndarray) -> np.ndarray:
        total = np.zeros(cells)
        for index, weight in corners:
            total += np.bincount(index, weight * values, cells)
        return total.reshape(shape)

    # Many views see the same place: a point counts by the area that it stands for.
    density = ndimage.gaussian_filter(splat(weights), 1.5)
    area = weights / np.maximum(_sample(density, at), 1e-12)
    waves = np.meshgrid(
        *(2 * np.pi * scipy.fft.fftfreq(n) for n in shape[:2]),
        2 * np.pi * scipy.fft.rfftfreq(shape[2]),
        indexing="ij",
    )
    squared = sum(w * w for w in waves)
    squared[0, 0, 0] = 1.0
    smooth = np.exp(-0.5 * squared)  # a Gaussian of one cell: the grid cannot hold more detail
    divergence = np.zeros(squared.shape, np.complex128)
    for axis, wave in enumerate(waves):
        divergence += 1j * wave * scipy.fft.rfftn(splat(-area * normals[:, axis]))
    return scipy.fft.irfftn(-smooth * divergence / squared, shape)


def _largest(surface: trimesh.Trimesh) -> trimesh.Trimesh:
    """The piece with the most faces."""
    pieces = trimesh.graph.connected_component_labels(
        surface.face_adjacency, node_count=len(surface.faces)
    )
    surface.update_faces(pieces == np.bincount(pieces).argmax())
    surface.remove_unreferenced_vertices()
    return surface


def _colours(vertices: np.ndarray, points: Points, step: float) -> np.ndarray:
    """(n, 3) means of the nearest points' colours, those seen squarely first."""
    distance, nearest = cKDTree(points.positions).query(vertices, k=min(12, len(points.positions)))
    weight = points.weights[nearest] ** 2 / (distance + 0.25 * step)
    weight /= weight.sum(-1, keepdims=True)
    return (
        np.einsum("nk,nkc->nc", weight, points.colours[nearest]).clip(0.0, 1.0).astype(np.float32)
    )


# --------------------------------------------------------------------------------------------------
# Files


def write_ply(path: str | pathlib.Path, mesh: Mesh) -> None:
    """Binary PLY in the world of `cameras.py`, y up, with normals and 8-bit sRGB colours.

    Raises:
        OSError: the file cannot be written; there is then none, or the old one.
    """
    surface = _as_trimesh(mesh, 1.0)
    surface.visual.vertex_colors = np.round(255.0 * mesh.colours).astype(np.uint8)
    content = surface.export(file_type="ply", vertex_normal=True)
    write_atomically(pathlib.Path(path), content)


def write_glb(
    path: str | pathlib.Path, mesh: Mesh, metres_per_unit: float = METRES_PER_UNIT
) -> None:
    """glTF 2.0 in one file: metres, y up, the face along +z, linear colours that need no lamps.

    Raises:
        OSError: the file cannot be written; there is then none, or the old one.
    """
    surface = _as_trimesh(mesh, metres_per_unit)
    # Floats: 8 bits of linear light are too coarse for hair. trimesh would write colours as 8 bits, so
    # they go as an attribute of our own, which then gets glTF's name.
    surface.vertex_attributes["LINEAR"] = to_linear(mesh.colours).astype(np.float32)
    export_glb(pathlib.Path(path), surface)


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] -> linear light, float64."""
    srgb = np.asarray(srgb, np.float64)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _as_trimesh(mesh: Mesh, scale: float) -> trimesh.Trimesh:
    return trimesh.Trimesh(
        scale * mesh.vertices, mesh.faces, vertex_normals=mesh.normals, process=False
    )


def export_glb(path: pathlib.Path, surface: trimesh.Trimesh) -> None:
    """Write a surface that has a material, or else the attribute LINEAR; it is shown unlit."""
    content = trimesh.Scene(surface).export(
        file_type="glb", include_normals=True, tree_postprocessor=_finish_gltf
    )
    write_atomically(path, content)


def _finish_gltf(tree: dict) -> None:
    tree["asset"]["generator"] = "spinmeround_jax"
    tree["extensionsUsed"] = ["KHR_materials_unlit"]
    plain = {"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}
    (material,) = tree.setdefault("materials", [plain])
    material["extensions"] = {"KHR_materials_unlit": {}}
    for primitive in (p for mesh in tree["meshes"] for p in mesh["primitives"]):
        primitive["material"] = 0
        if "_LINEAR" in (attributes := primitive["attributes"]):
            attributes["COLOR_0"] = attributes.pop("_LINEAR")
