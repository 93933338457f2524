"""Where a scanned head belongs in the canonical frame: from landmarks, given or found."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from data_prep.identity import largest_face
from data_prep.rendering.render import on_white
from data_prep.scans import textured
from data_prep.scans.parts import Part, Scan
from spinmeround_jax import cameras, schema
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import landmarks
from spinmeround_jax.photo.prepare import Models

AXES = {
    f"{sign}{axis}": s * np.eye(3)[i]
    for s, sign in ((1, ""), (-1, "-"))
    for i, axis in enumerate("xyz")
}
_SIZE = 512  # pixels of the views in which faces are looked for
_INNER = slice(
    17, None
)  # of the 68 landmarks: those of the jaw are where the outline is, not a point
# Root mean square of what a similarity leaves, by that of the landmarks about their middle. Of 100
# parametric heads the worst has 0.17 with 5 points and 0.10 with 68; left and right exchanged give
# 0.42 or more.
_MAX_RESIDUAL = 0.3
_ZOOMS = (0.9, 1.5, 2.5, 4.0)  # of a scan that fills the frame, down to that of a whole person


def similarity(points: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(scale, rotation, offset) with targets ~ scale * rotation points + offset, least squares.

    Umeyama, "Least-squares estimation of transformation parameters", PAMI 1991, eqs. 40 to 42.

    Raises:
        InputError: points that are all in one place or on one line.
    """
    centre, middle = points.mean(axis=0), targets.mean(axis=0)
    from_centre, from_middle = points - centre, targets - middle
    left, strengths, right = np.linalg.svd(from_middle.T @ from_centre)
    if strengths[1] < 1e-9 * max(strengths[0], 1e-30):
        raise InputError("its landmarks are all in one place, or on one line")
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    rotation = left @ np.diag(signs) @ right
    scale = float((strengths * signs).sum() / (from_centre**2).sum())
    return scale, rotation, middle - scale * rotation @ centre


def read_landmarks(path: pathlib.Path, scan: Scan) -> np.ndarray:
    """(5 or 68, 3) points from a JSON list of as many points [x, y, z], or numbers of vertices.

    Raises:
        InputError: naming the file.
    """
    wanted = (
        f"{path}: expected a JSON list of 5 or 68 points [x, y, z] in the mesh's coordinates, or of "
        "as many numbers of vertices, in the order of the mesh's file, counted from 0"
    )
    try:
        values = np.array(schema.read(path, _LANDMARKS), np.float64)
    except Exception as error:  # the file can hold anything
        raise InputError(f"{wanted} ({error})") from error
    if values.shape in ((5,), (68,)):
        if scan.numbered is None:
            raise InputError(
                f"{path}: numbers of vertices, but the mesh has {len(scan.parts)} pieces that are each "
                "counted from 0; give points [x, y, z]"
            )
        count = len(scan.numbered)
        if (values != values.round()).any() or values.min() < 0 or values.max() >= count:
            raise InputError(f"{wanted}; the mesh has {count} vertices")
        return scan.numbered[values.astype(int)]
    if values.shape not in ((5, 3), (68, 3)) or not np.isfinite(values).all():
        raise InputError(wanted)
    return values


def _point_or_vertex(value: Any, where: str) -> Any:
    kind = schema.array(schema.number(), 3, 3) if isinstance(value, list) else schema.integer(0)
    return kind(value, where)


_LANDMARKS = schema.array(_point_or_vertex, 5, 68)


def from_landmarks(points: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The similarity that takes (5 or 68, 3) landmarks of a mesh to those of the mean head.

    Raises:
        InputError: they do not lie as on a head.
    """
    model = landmarks.load_model()
    model = model if len(points) == len(model.mean) else model.of_five()
    return _to_head(points, model.mean)


def _to_head(points: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    scale, rotation, offset = similarity(points, targets)
    left = scale * points @ rotation.T + offset - targets
    residual = np.sqrt((left**2).sum() / ((targets - targets.mean(axis=0)) ** 2).sum())
    if residual > _MAX_RESIDUAL:
        raise InputError(
            f"its landmarks do not lie as on a head (off by {residual:.0%} of their own size, "
            f"{_MAX_RESIDUAL:.0%} is the most); check their order, image left before right, and that "
            "they belong to this mesh"
        )
    return scale, rotation, offset


def find(
    parts: list[Part], models: Models, up: str, front: str
) -> tuple[float, np.ndarray, np.ndarray]:
    """The similarity of a head without landmarks: a face detector looks at it from the front, twice.

    Args:
        up, front: of AXES: where the top of the head and the face look in the mesh's coordinates.

    Raises:
        InputError: no face is seen.
    """
    vertical, forward = AXES[up], AXES[front]
    if abs(vertical @ forward) > 0.5:
        raise InputError(f"--up {up} and --front {front} are the same axis")
    upright = np.stack([np.cross(vertical, forward), vertical, forward])
    vertices = np.concatenate([part.vertices for part in parts]) @ upright.T
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    frame = cameras.RADIUS / cameras.FOCAL
    for zoom in _ZOOMS:
        scale = zoom * frame / max(high[0] - low[0], high[1] - low[1])
        # The head is at the top: its middle, if it fills half of the frame.
        middle = (low + high) / 2
        middle[1] = max(middle[1], high[1] - 0.3 * frame / scale)
        guess = (scale, upright, -scale * middle)
        if (found := _seen(parts, models, guess)) is not None:
            better = from_points(found)
            again = _seen(parts, models, better)
            return better if again is None else from_points(again)
    raise InputError(
        f"no face is seen along {front} with {up} upward; give --up and --front as they are in this "
        "mesh, or its landmarks"
    )


def from_points(points: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """As from_landmarks, of (68, 3) points but those of the jaw and those that are NaN.

    A ray through a hole, such as the open mouth, meets what lies behind: points further off than three
    times the median are left out.
    """
    known = np.isfinite(points).all(axis=1)
    known[: _INNER.start] = False
    if known.sum() < 10:
        raise InputError("most landmarks of its face are in holes")
    points, targets = points[known], landmarks.load_model().mean[known]
    scale, rotation, offset = similarity(points, targets)
    errors = np.linalg.norm(scale * points @ rotation.T + offset - targets, axis=1)
    near = errors <= 3.0 * np.median(errors)
    return _to_head(points[near], targets[near])


def _seen(
    parts: list[Part], models: Models, place: tuple[float, np.ndarray, np.ndarray]
) -> np.ndarray | None:
    """(68, 3) landmarks on the mesh, in its own coordinates, NaN where there is none."""
    moved = [part.moved(*place) for part in parts]
    view = textured.draw(textured.scene(moved), moved, cameras.orbit(0.0), _SIZE, 1)
    face = largest_face(models, on_white(view.rgba))
    if face is None:
        return None
    columns, rows = np.clip(face.landmarks[:, :2], 0, _SIZE - 1).astype(int).T
    scale, rotation, offset = place
    return (view.positions[rows, columns] - offset) @ rotation / scale
