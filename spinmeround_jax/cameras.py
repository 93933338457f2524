"""Poses, rays, raymaps and trajectories: the one place for camera conventions.

World: the head is centred at the origin, x right, y up, the face looks along +z.
Camera: OpenGL, x right, y up, looks along -z; every camera orbits at `RADIUS` and looks at the origin.
`world_to_camera` is a (4, 4) matrix [R | t] with t = (0, 0, -RADIUS). Angles are in degrees.
Yaw is the azimuth (positive: the camera moves to +x, the side of the subject's left ear), pitch the
elevation (positive: the camera moves up).
"""

from __future__ import annotations

import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from spinmeround_jax import schema

RADIUS = 2.7
# EG3D's 18.837 degrees are the diagonal field of view; in image widths (3.14159 and 1.414 as released).
FOCAL = float(1.0 / (np.tan(18.837 * 3.14159 / 360.0) * 1.414))

ORIGIN_OCTAVES = 15
DIRECTION_OCTAVES = 8
RAYMAP_CHANNELS = 3 * (1 + 2 * ORIGIN_OCTAVES) + 3 * (1 + 2 * DIRECTION_OCTAVES)  # 93 + 51

SAME_VIEW = 0.05  # degrees; directions this close are one view
ANCHOR_YAWS = (45.0, 90.0, 135.0, 180.0, -135.0, -90.0, -45.0)

Rays = Literal["true", "released"]

Frame = Literal["camera", "world"]
"""Frame of a model's normal maps. "camera": each view's own camera, so that a map depends on its view only.
"world": the head's, as in the release."""


# ---------------------------------------------------------------------------------------------------
# Poses


def _world_to_camera(rotation: np.ndarray) -> np.ndarray:
    pose = np.zeros((*rotation.shape[:-2], 4, 4), np.float32)
    pose[..., :3, :3] = rotation
    pose[..., 2, 3] = -RADIUS
    pose[..., 3, 3] = 1.0
    return pose


def orbit(yaw: float | np.ndarray, pitch: float | np.ndarray = 0.0) -> np.ndarray:
    """Upright cameras at azimuth `yaw` and elevation `pitch` (degrees, broadcast together).

    The camera stands at RADIUS * (sin yaw cos pitch, sin pitch, cos yaw cos pitch). The release has the same
    rotations at pitch 0, but t = (0, 0, +RADIUS); only `raymap(rays="released")` uses that sign.

    Returns:
        (..., 4, 4) float32 world-to-camera matrices.
    """
    yaw, pitch = np.deg2rad(np.broadcast_arrays(np.float64(yaw), np.float64(pitch)))
    (cos_yaw, sin_yaw), (cos_pitch, sin_pitch) = ((np.cos(x), np.sin(x)) for x in (yaw, pitch))
    rows = (
        (cos_yaw, np.zeros_like(yaw), -sin_yaw),
        (-sin_pitch * sin_yaw, cos_pitch, -sin_pitch * cos_yaw),
        (cos_pitch * sin_yaw, sin_pitch, cos_pitch * cos_yaw),
    )
    rotation = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    return _world_to_camera(rotation + 0.0)  # + 0.0: no minus zero


def yaw_pitch(world_to_camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Azimuth and elevation in degrees of the position of each (..., 4, 4) camera."""
    towards_camera = np.asarray(world_to_camera, np.float64)[..., 2, :3]
    yaw = np.rad2deg(np.arctan2(towards_camera[..., 0], towards_camera[..., 2]))
    pitch = np.rad2deg(np.arcsin(np.clip(towards_camera[..., 1], -1.0, 1.0)))
    return yaw, pitch


def relative_to(reference: np.ndarray, world_to_camera: np.ndarray) -> np.ndarray:
    """Re-express orbit cameras in the frame where the (4, 4) `reference` camera is frontal."""
    rotation = world_to_camera[..., :3, :3] @ np.swapaxes(reference[..., :3, :3], -1, -2)
    return _world_to_camera(rotation)


def camera_to_world(world_to_camera: np.ndarray) -> np.ndarray:
    """Inverse of (..., 4, 4) rigid poses, float32."""
    rotation = np.swapaxes(np.asarray(world_to_camera, np.float32)[..., :3, :3], -1, -2)
    pose = np.zeros_like(world_to_camera, dtype=np.float32)
    pose[..., :3, :3] = rotation
    pose[..., :3, 3] = -(rotation @ world_to_camera[..., :3, 3:])[..., 0]
    pose[..., 3, 3] = 1.0
    return pose


def normals_to_camera(normals: np.ndarray, world_to_camera: np.ndarray) -> np.ndarray:
    """(..., h, w, 3) normals from the frame of the (..., 4, 4) poses to each pose's own camera.

    Lengths are kept: 0 on the background (mid-grey), below 1 at a soft silhouette.
    """
    rotation = np.asarray(world_to_camera, np.float32)[..., None, :3, :3]
    return normals @ np.swapaxes(rotation, -1, -2)


def normals_to_world(normals: np.ndarray, world_to_camera: np.ndarray) -> np.ndarray:
    """The inverse of `normals_to_camera`."""
    return normals @ np.asarray(world_to_camera, np.float32)[..., None, :3, :3]


# ---------------------------------------------------------------------------------------------------
# Rays


def camera_directions(size: int, rays: Rays = "true") -> np.ndarray:
    """(size, size, 3) float32 ray directions in camera space, z = -1, not normalised.

    "true" passes through pixel centres. "released" reproduces the released code: no half-pixel offset,
    and FOCAL (image widths) divides latent pixels, so the rays fan out far too wide.
    """
    if rays == "true":
        offsets = (np.arange(size) + 0.5 - size / 2) / (FOCAL * size)
    elif rays == "released":
        offsets = (np.arange(size) - size / 2) / FOCAL
    else:
        raise ValueError(f"rays must be 'true' or 'released', got {rays!r}")
    x, y = np.meshgrid(offsets, -offsets)
    return np.stack([x, y, -np.ones_like(x)], axis=-1).astype(np.float32)


def raymap(world_to_camera: jax.Array, size: int, rays: Rays = "true") -> jax.Array:
    """NeRF-encoded ray origins and directions of every latent pixel, in the released code's order.

    Args:
        world_to_camera: (..., 4, 4).
        size: latent height and width.
        rays: "true" geometry, or "released" as in the training of the released weights.

    Returns:
        (..., size, size, 144) float32: origin encoding (93), then direction encoding (51).
    """
    rotation = jnp.asarray(world_to_camera)[..., :3, :3]
    translation = jnp.asarray(world_to_camera)[..., :3, 3]
    if rays == "released":
        translation = -translation  # as released: the frontal origin is (0, 0, -RADIUS)
    # Float32 throughout: the 14th octave multiplies any rounding by 16384.
    precise = jax.lax.Precision.HIGHEST
    origins = -jnp.einsum("...ji,...j->...i", rotation, translation, precision=precise)
    directions = jnp.einsum(
        "...ji,hwj->...hwi", rotation, camera_directions(size, rays), precision=precise
    )
    origins = jnp.broadcast_to(origins[..., None, None, :], directions.shape)
    return jnp.concatenate(
        [nerf_encoding(origins, ORIGIN_OCTAVES), nerf_encoding(directions, DIRECTION_OCTAVES)], -1
    )


def nerf_encoding(x: jax.Array, octaves: int) -> jax.Array:
    """[x, sin(2^k x), sin(2^k x + pi/2)] for k < octaves; (..., 3) -> (..., 3 (1 + 2 octaves))."""
    scaled = (x[..., None, :] * 2.0 ** jnp.arange(octaves)[:, None]).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([x, jnp.sin(scaled), jnp.sin(scaled + jnp.pi / 2)], axis=-1)


# ---------------------------------------------------------------------------------------------------
# Trajectories: float32 arrays (n, 2) of (yaw, pitch) in degrees


def angular_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between the directions (..., 2), yaw and pitch, of two cameras."""
    towards = [orbit(x[..., 0], x[..., 1])[..., 2, :3].astype(np.float64) for x in (a, b)]
    chord = np.linalg.norm(towards[0] - towards[1], axis=-1)
    return np.rad2deg(2.0 * np.arcsin(np.clip(chord / 2.0, 0.0, 1.0)))


def turntable(views: int = 48) -> np.ndarray:
    """`views` evenly spaced yaws in (-180, 180], from 0 towards +x, at pitch 0."""
    yaws = np.arange(views) * 360.0 / views
    yaws = np.where(yaws > 180.0, yaws - 360.0, yaws)
    return np.stack([yaws, np.zeros(views)], -1).astype(np.float32)


def anchors() -> np.ndarray:
    """The seven anchor views of the paper's second step of sampling, in turntable order."""
    return np.stack([np.array(ANCHOR_YAWS), np.zeros(len(ANCHOR_YAWS))], -1).astype(np.float32)


def sweep(views: int = 24, yaw: float = 60.0, pitch: float = 15.0) -> np.ndarray:
    """A closed ellipse in front of the face, reaching +-`yaw` and +-`pitch`."""
    phase = np.arange(views) * 2.0 * np.pi / views
    return np.stack([yaw * np.sin(phase), pitch * np.cos(phase)], -1).astype(np.float32)


def load_trajectory(path: str | pathlib.Path) -> np.ndarray:
    """Read a JSON list of {"yaw": degrees, "pitch": degrees} (pitch optional).

    Raises:
        OSError: the file cannot be read.
        ValueError: naming the file, if it is not such a list or a value is out of range.
    """
    form = 'expected a JSON list such as [{"yaw": 30, "pitch": 10}]'
    try:
        entries = schema.read(path, _TRAJECTORY)
    except ValueError as error:
        raise ValueError(f"{path}: {form} ({error})") from error
    return np.array([(entry["yaw"], entry.get("pitch", 0.0)) for entry in entries], np.float32)


_TRAJECTORY = schema.array(
    schema.record({"yaw": schema.number(-1e6, 1e6)}, {"pitch": schema.number(-90, 90)}),
    shortest=1,
    longest=10_000,
)
