"""A surface with a texture, which viewers and engines show that ignore the colours of vertices.

Charts are connected faces that look along one axis, projected along it: a head needs some tens of them. xatlas
(0.0.11) made 1,751 of the same surface in 16 s and has no wheel for Python 3.14.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import trimesh
from PIL import Image
from scipy import ndimage

from spinmeround_jax.files import InputError
from spinmeround_jax.splats.mesh import FACING, METRES_PER_UNIT, OPAQUE, Mesh, export_glb

SIZES = (512, 4096)  # px, of the square image
PER_PIXEL = 4  # sides of the image per height of a view: a head is seen from all around
PADDING = 2  # px around a chart
SMOOTHING = 10  # times that normals are averaged with their neighbours before charts are chosen
SMALL = 300  # faces; smaller charts join a neighbour
STEEP = 0.1  # cosine of the angle from which a face may be projected
SAME = 0.02  # of the surface's size: depths that differ by less are of one place
UNSEEN = 1e-3  # weight of the vertices' colours, which is all that unseen texels get
AXES = np.concatenate([np.eye(3), -np.eye(3)])
# Looking against an axis: what is to the right, and what is down.
RIGHT = np.array([[0, 0, -1], [1, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0], [-1, 0, 0]])
DOWN = np.array([[0, -1, 0], [0, 0, 1], [0, -1, 0], [0, -1, 0], [0, 0, -1], [0, -1, 0]])


@dataclasses.dataclass(frozen=True)
class Textured:
    """As `Mesh`, cut along the borders of charts: uv (n, 2) in [0, 1] from the upper left corner of the image,
    (s, s, 3) uint8 sRGB."""

    vertices: np.ndarray
    normals: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    image: np.ndarray


def bake(
    surface: Mesh,
    images: np.ndarray,
    alpha: np.ndarray,
    depth: np.ndarray,
    world_to_camera: np.ndarray,
    focal: np.ndarray,
    centre: np.ndarray,
) -> Textured:
    """Texture of a surface that `mesh.extract` made; the other arguments are the same.

    A texel's colour is the mean over the views in whose drawn depth it lies, those that face it first.
    """
    height, width = depth.shape[1:]
    size = int(np.clip(2 ** np.ceil(np.log2(PER_PIXEL * height)), *SIZES))
    given, faces, uv = unwrap(surface, size)
    vertices, normals = surface.vertices[given], surface.normals[given]
    row, column, face, shares = _texels(uv[faces], size)

    def at(values: np.ndarray) -> np.ndarray:
        return np.einsum("tk,tkc->tc", shares, values[faces[face]])

    positions, directions = at(vertices), at(normals)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True).clip(1e-9)
    colours, weights = UNSEEN * at(surface.colours[given]), np.full(len(positions), UNSEEN)
    tolerance = SAME * np.ptp(vertices, axis=0).max()
    for image, opacity, far, pose in zip(images, alpha, depth, world_to_camera, strict=True):
        rotation, translation = pose[:3, :3], pose[:3, 3]
        towards = -rotation.T @ translation - positions
        cosine = np.einsum("tc,tc->t", directions, towards) / np.linalg.norm(towards, axis=-1)
        use = np.flatnonzero(cosine > FACING)
        seen = positions[use] @ rotation.T + translation
        x = centre[0] - focal[0] * seen[:, 0] / seen[:, 2] - 0.5
        y = centre[1] + focal[1] * seen[:, 1] / seen[:, 2] - 0.5
        inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        layers = [*np.moveaxis(image, -1, 0), opacity, far]
        layers = [ndimage.map_coordinates(np.float32(c), [y, x], order=1) for c in layers]
        same = (layers[3] > OPAQUE) & (abs(layers[4] + seen[:, 2]) < tolerance)
        weight = np.where(inside & same, cosine[use] ** 4, 0.0)
        colours[use] += weight[:, None] * np.stack(layers[:3], axis=-1)
        weights[use] += weight
    texture = np.zeros((size, size, 3))
    empty = np.ones((size, size), bool)
    texture[row, column] = colours / weights[:, None]
    empty[row, column] = False
    # Filtering near the borders of charts reaches beyond them: everything takes the nearest colour.
    nearest = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
    texture = np.rint(255.0 * texture[tuple(nearest)].clip(0.0, 1.0)).astype(np.uint8)
    return Textured(vertices, normals, faces, uv, texture)


# --------------------------------------------------------------------------------------------------
# Charts


def unwrap(surface: Mesh, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Charts in a square image of `size` pixels.

    Returns:
        (n,) vertex of the surface that each vertex is, (m, 3) int32 faces, (n, 2) uv as `Textured`.
    """
    axis, chart = _charts(surface)
    count = len(surface.vertices)
    keys, faces = np.unique(chart[:, None] * count + surface.faces, return_inverse=True)
    faces, given = faces.reshape(-1, 3).astype(np.int32), keys % count
    chart = keys // count
    axis_of = np.zeros(len(keys), int)
    axis_of[faces] = axis[:, None]
    points = surface.vertices[given].astype(np.float64)
    flat = np.stack([(points * side[axis_of]).sum(-1) for side in (RIGHT, DOWN)], axis=-1)
    low = np.full((chart.max() + 1, 2), np.inf)
    high = -low
    np.minimum.at(low, chart, flat)
    np.maximum.at(high, chart, flat)
    corners, scale = _pack(high - low, size)
    uv = (corners[chart] + PADDING + 0.5 + scale * (flat - low[chart])) / size
    return given, faces, uv


def _charts(surface: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """(m,) axis along which each face is projected, and (m,) its chart."""
    shape = trimesh.Trimesh(surface.vertices, surface.faces, process=False)
    smooth = surface.normals.astype(np.float64)
    for _ in range(SMOOTHING):  # the surface is closed: edges run both ways
        smooth = shape.edges_sparse @ smooth
        smooth /= np.linalg.norm(smooth, axis=-1, keepdims=True).clip(1e-12)
    cosine = shape.face_normals @ AXES.T
    cosine[~cosine.any(-1)] = 1.0  # without area they go anywhere
    axis = (smooth[surface.faces].mean(1) @ AXES.T).argmax(-1)
    steep = np.take_along_axis(cosine, axis[:, None], axis=1)[:, 0] <= STEEP
    axis[steep] = cosine[steep].argmax(-1)
    neighbours = shape.face_adjacency
    while True:
        joined = neighbours[axis[neighbours[:, 0]] == axis[neighbours[:, 1]]]
        chart = trimesh.graph.connected_component_labels(joined, node_count=len(axis))
        sizes = np.bincount(chart)
        axis_of = np.zeros(len(sizes), int)
        axis_of[chart] = axis
        worst = np.ones((len(sizes), len(AXES)))
        np.minimum.at(worst, chart, cosine)
        pairs = chart[np.concatenate([neighbours, neighbours[:, ::-1]])]
        small, large = pairs[np.argsort(sizes[pairs[:, 1]], kind="stable")].T
        fits = (sizes[small] < SMALL) & (sizes[small] < sizes[large])
        fits &= worst[small, axis_of[large]] > STEEP
        if not fits.any():
            return axis, chart
        axis_of[small[fits]] = axis_of[large[fits]]  # the largest comes last
        axis = axis_of[chart]


def _pack(extents: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """(c, 2) corners in pixels, in rows from the highest chart to the lowest, and pixels per unit."""
    order = np.argsort(-extents[:, 1])

    def place(scale: float) -> np.ndarray | None:
        boxes = np.ceil(scale * extents).astype(int) + 1 + 2 * PADDING
        corners = np.zeros((len(boxes), 2))
        x = y = below = 0
        for i in order:
            if x + boxes[i, 0] > size:
                x, y = 0, below
            corners[i] = x, y
            x, below = x + boxes[i, 0], max(below, y + boxes[i, 1])
            if x > size or below > size:
                return None
        return corners

    low, high = 0.0, 2.0 * size / extents.max()
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if place(middle) is None else (middle, high)
    if (corners := place(low)) is None:
        raise InputError(f"the surface has {len(extents)} charts, too many for a texture")
    return corners, low


def _texels(uv: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row, column, face and (t, 3) barycentric coordinates of texels with their centres in (m, 3, 2) faces."""
    corners = np.asarray(uv, np.float64) * size - 0.5
    low = np.ceil(corners.min(1)).astype(int)
    extent = (np.floor(corners.max(1)).astype(int) - low + 1).clip(0)
    counts = extent.prod(-1)
    face = np.repeat(np.arange(len(uv)), counts)
    within = np.arange(len(face)) - np.repeat(counts.cumsum() - counts, counts)
    column = low[face, 0] + within % extent[face, 0]
    row = low[face, 1] + within // extent[face, 0]
    origin = corners[face, 0]
    (ax, ay), (bx, by) = (corners[face, 1] - origin).T, (corners[face, 2] - origin).T
    x, y = column - origin[:, 0], row - origin[:, 1]
    area = ax * by - ay * bx
    area = np.where(area == 0, np.inf, area)
    second, third = (x * by - y * bx) / area, (ax * y - ay * x) / area
    shares = np.stack([1.0 - second - third, second, third], axis=-1)
    keep = (shares >= -1e-6).all(-1)
    return row[keep], column[keep], face[keep], shares[keep]


# --------------------------------------------------------------------------------------------------
# File


def write_glb(
    path: str | pathlib.Path, textured: Textured, metres_per_unit: float = METRES_PER_UNIT
) -> None:
    """glTF 2.0 in one file with the image in it, otherwise as `mesh.write_glb`.

    Raises:
        OSError: the file cannot be written; there is then none, or the old one.
    """
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.fromarray(textured.image), metallicFactor=0.0, roughnessFactor=1.0
    )
    uv = textured.uv * [1.0, -1.0] + [0.0, 1.0]  # trimesh counts from below
    surface = trimesh.Trimesh(
        metres_per_unit * textured.vertices,
        textured.faces,
        vertex_normals=textured.normals,
        visual=trimesh.visual.TextureVisuals(uv=uv, material=material),
        process=False,
    )
    export_glb(pathlib.Path(path), surface)
