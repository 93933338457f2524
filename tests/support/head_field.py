"""A head of data_prep as a density field, as a generator such as PanoHead would give it."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from data_prep.generator import isosurface
from data_prep.parametric import template
from data_prep.parametric.head import build_head, vertex_normals
from data_prep.parametric.people import sample_person
from data_prep.rendering import render, shading
from tests.support import needs_heads  # noqa: F401

BAND = 0.03  # world units around the skin in which distances are known
SLOPE = 1000.0  # of the density there; PanoHead's rises by some tens within a voxel


def bald_head(seed: int = 3, level: int = 1):
    """(vertices, faces, normals) of the skin, world units, and its landmarks' head."""
    person = dataclasses.replace(
        sample_person(seed), hair_style="bald", beard_style="none", glasses="none", hat="none"
    )
    head = build_head(person, level)
    vertices = head.placement.to_world(head.skin)
    faces = template.part("skin", level).faces
    return vertices, faces, vertex_normals(vertices, faces)


def density_of(vertices, normals, size: int, box: float = 1.0, level: float = 10.0) -> np.ndarray:
    """(size, size, size): `level` on the surface, more inside, less outside."""
    points = isosurface.grid(size, box)
    distance, nearest = cKDTree(vertices).query(points, distance_upper_bound=BAND)
    near = np.isfinite(distance)
    inside = np.full(len(points), np.nan)
    nearest = nearest[near]
    # Distance to the tangent plane of the nearest vertex, which is smoother than that to the vertex.
    inside[near] = -((points[near] - vertices[nearest]) * normals[nearest]).sum(axis=1)
    inside = inside.reshape(size, size, size)
    # Beyond the band: what touches the top of the cube is air, the rest is flesh.
    pieces, _ = ndimage.label(np.isnan(inside))
    air = np.isin(pieces, np.unique(pieces[:, -1]))
    inside[np.isnan(inside)] = np.where(air, -BAND, BAND)[np.isnan(inside)]
    return (level + SLOPE * np.clip(inside, -BAND, BAND)).astype(np.float32)


def scene_of(vertices, faces, normals, light=(30.0, 35.0)) -> render.Scene:
    """The same head with the skin's own colour, unevenly, so that sides can be told apart."""
    tint = 0.35 + 0.5 * np.column_stack(
        [vertices[:, 1] + 0.3, vertices[:, 2] + 0.3, vertices[:, 0] + 0.4]
    )
    mesh = render.Mesh(
        vertices,
        faces,
        normals,
        np.clip(tint, 0.05, 0.95),
        np.full(len(vertices), 0.3),
        shading.SKIN,
    )
    return render.Scene([mesh], shading.make_light(*light, 1.0, 0.0))
