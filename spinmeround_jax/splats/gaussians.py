"""3D Gaussians with spherical-harmonic colours: parameters, activations, initialisation.

Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering" (SIGGRAPH 2023). World and
cameras are those of `cameras.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

MAX_DEGREE = 3
# Constants of the real spherical harmonics, with the signs of the 3DGS file format.
SH_C0 = 0.28209479177387814
SH_C1 = 0.4886025119029199
SH_C2 = (
    1.0925484305920792,
    -1.0925484305920792,
    0.31539156525252005,
    -1.0925484305920792,
    0.5462742152960396,
)
SH_C3 = (
    -0.5900435899266435,
    2.890611442640554,
    -0.4570457994644658,
    0.3731763325901154,
    -0.4570457994644658,
    1.445305721320277,
    -0.5900435899266435,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussians:
    """n Gaussians, as optimised and as stored in a .ply: without activations. Arrays are float32.

    means: (n, 3) centres in the world.
    log_scales: (n, 3) logarithms of the standard deviations along the own axes.
    quaternions: (n, 4) rotations of these axes, (w, x, y, z), of any length but 0.
    opacity_logits: (n,) logits of the opacities.
    sh: (n, k, 3) spherical harmonics of the colour, k = (degree + 1)^2 of 1, 4, 9 or 16;
        colour = max(0, 1/2 + harmonics), 0 black, 1 white.
    """

    means: jax.Array
    log_scales: jax.Array
    quaternions: jax.Array
    opacity_logits: jax.Array
    sh: jax.Array

    def __len__(self) -> int:
        return len(self.means)

    @property
    def degree(self) -> int:
        """Degree of the spherical harmonics, 0 to 3."""
        return degree_of(self.sh.shape[-2])


def degree_of(coefficients: int) -> int:
    """Degree of so many spherical harmonics; ValueError unless 1, 4, 9 or 16."""
    for degree in range(MAX_DEGREE + 1):
        if (degree + 1) ** 2 == coefficients:
            return degree
    raise ValueError(f"{coefficients} spherical harmonics per colour; expected 1, 4, 9 or 16")


def rotations(quaternions: jax.Array) -> jax.Array:
    """(n, 4) quaternions (w, x, y, z) of any length -> (n, 3, 3) rotations; columns are the own axes."""
    # The small term keeps the gradient of a zero vector finite.
    length = jnp.sqrt(jnp.sum(quaternions**2, -1, keepdims=True) + 1e-24)
    w, x, y, z = jnp.moveaxis(quaternions / length, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def covariances(gaussians: Gaussians) -> jax.Array:
    """(n, 3, 3) world covariances R S S^T R^T (Kerbl et al., eq. 6)."""
    factor = rotations(gaussians.quaternions) * jnp.exp(gaussians.log_scales)[:, None, :]
    return jnp.einsum("nij,nkj->nik", factor, factor, precision=jax.lax.Precision.HIGHEST)


def normals(gaussians: Gaussians, camera: jax.Array) -> jax.Array:
    """(n, 3) unit vectors along the shortest axes, turned towards the camera at (3,) `camera`."""
    axes = rotations(gaussians.quaternions)
    shortest = jnp.argmin(gaussians.log_scales, -1)
    axis = jnp.take_along_axis(axes, shortest[:, None, None], axis=2)[..., 0]
    towards = jnp.sum(axis * (camera - gaussians.means), -1, keepdims=True)
    return jnp.where(towards < 0, -axis, axis)


def basis(directions: jax.Array, degree: int) -> jax.Array:
    """Real spherical harmonics up to `degree` of (n, 3) unit vectors, (n, (degree + 1)^2)."""
    x, y, z = jnp.moveaxis(directions, -1, 0)
    terms = [jnp.full_like(x, SH_C0)]
    if degree >= 1:
        terms += [-SH_C1 * y, SH_C1 * z, -SH_C1 * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        terms += [
            SH_C2[0] * x * y,
            SH_C2[1] * y * z,
            SH_C2[2] * (2 * zz - xx - yy),
            SH_C2[3] * x * z,
            SH_C2[4] * (xx - yy),
        ]
    if degree >= 3:
        terms += [
            SH_C3[0] * y * (3 * xx - yy),
            SH_C3[1] * x * y * z,
            SH_C3[2] * y * (4 * zz - xx - yy),
            SH_C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            SH_C3[4] * x * (4 * zz - xx - yy),
            SH_C3[5] * z * (xx - yy),
            SH_C3[6] * x * (xx - 3 * yy),
        ]
    return jnp.stack(terms, -1)


def colours(gaussians: Gaussians, camera: jax.Array) -> jax.Array:
    """(n, 3) colours as seen from (3,) `camera`, at least 0."""
    offset = gaussians.means - camera
    directions = offset / jnp.sqrt(jnp.sum(offset**2, -1, keepdims=True) + 1e-24)
    harmonics = basis(directions, gaussians.degree)
    return jnp.maximum(jnp.sum(harmonics[..., None] * gaussians.sh, -2) + 0.5, 0.0)


def from_surface(
    points: np.ndarray,
    normals: np.ndarray,
    rgb: np.ndarray,
    spacing: float,
    degree: int,
    opacity: float = 0.5,
) -> Gaussians:
    """Flat discs on a surface: where a fit begins.

    Args:
        points: (n, 3) on the surface.
        normals: (n, 3) of unit length.
        rgb: (n, 3) colours in [0, 1].
        spacing: distance of neighbouring points, the standard deviation along the surface; a third
            of it across.
        degree: of the spherical harmonics; those above 0 start at 0.

    Raises:
        ValueError: no points, or a degree out of range.
    """
    if not len(points):
        raise ValueError("no points to begin with")
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(
            f"degree of the spherical harmonics must be 0 to {MAX_DEGREE}, got {degree}"
        )
    sh = np.zeros((len(points), (degree + 1) ** 2, 3), np.float32)
    sh[:, 0] = (rgb - 0.5) / SH_C0
    scales = np.array([spacing, spacing, spacing / 3.0])
    return Gaussians(
        means=jnp.asarray(points, jnp.float32),
        log_scales=jnp.asarray(np.tile(np.log(scales), (len(points), 1)), jnp.float32),
        quaternions=jnp.asarray(_turn_z_to(normals), jnp.float32),
        opacity_logits=jnp.full(len(points), np.log(opacity / (1.0 - opacity)), jnp.float32),
        sh=jnp.asarray(sh),
    )


def _turn_z_to(directions: np.ndarray) -> np.ndarray:
    """(n, 4) quaternions that turn +z to (n, 3) unit vectors by the shortest way."""
    x, y, z = np.asarray(directions, np.float64).T
    quaternions = np.stack([1.0 + z, -y, x, np.zeros_like(x)], -1)
    opposite = z < -1.0 + 1e-6
    quaternions[opposite] = (0.0, 1.0, 0.0, 0.0)
    return quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True)
