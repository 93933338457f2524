"""Small scenes of Gaussians, and what a camera sees of them by the definition, one Gaussian at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spinmeround_jax import cameras
from spinmeround_jax.splats.gaussians import Gaussians


def random_gaussians(n: int = 20, degree: int = 1, seed: int = 0, size: float = 0.03) -> Gaussians:
    rng = np.random.default_rng(seed)
    values = (
        rng.uniform(-0.3, 0.3, (n, 3)),
        np.log(size) + rng.uniform(-0.7, 0.7, (n, 3)),
        rng.normal(size=(n, 4)),
        rng.uniform(-1.0, 3.0, n),
        rng.normal(size=(n, (degree + 1) ** 2, 3)) * 0.4,
    )
    return Gaussians(*(jnp.asarray(x, jnp.float32) for x in values))


def rotation(quaternion: np.ndarray) -> np.ndarray:
    """Rotation of vectors by q v q*, from the products of quaternions."""
    w, v = quaternion[0], quaternion[1:]
    columns = []
    for e in np.eye(3):
        t = 2.0 * np.cross(v, e)
        columns.append(e + w * t + np.cross(v, t))
    return np.stack(columns, -1)


def draw(
    g: Gaussians, pose: np.ndarray, focal: float, size: tuple[int, int], background: np.ndarray
) -> dict[str, np.ndarray]:
    """Kerbl et al. 2023, section 4, in float64: no tiles, no early stop; colours of degree 0 or 1."""
    g = jax.tree.map(lambda x: np.asarray(x, np.float64), g)
    pose = np.asarray(pose, np.float64)
    height, width = size
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    eye = cameras.camera_to_world(pose)[:3, 3].astype(np.float64)
    world_to_pixels = np.diag([1.0, -1.0, -1.0]) @ pose[:3, :3]
    seen = []
    for i in range(len(g.means)):
        x, y, z = world_to_pixels @ (g.means[i] - eye)
        if z <= 0.01:
            continue
        # Off the picture by more than 0.3 half widths, the linearisation stays where it is.
        sx = np.clip(x / z, -0.65 * width / focal, 0.65 * width / focal)
        sy = np.clip(y / z, -0.65 * height / focal, 0.65 * height / focal)
        jacobian = np.array([[focal, 0, -focal * sx], [0, focal, -focal * sy]]) / z
        turn = rotation(g.quaternions[i] / np.linalg.norm(g.quaternions[i]))
        world = turn @ np.diag(np.exp(2 * g.log_scales[i])) @ turn.T
        to_plane = jacobian @ world_to_pixels
        covariance = to_plane @ world @ to_plane.T + 0.3 * np.eye(2)
        d = np.stack([u - focal * x / z - width / 2, v - focal * y / z - height / 2], -1)
        power = -0.5 * np.einsum("hwi,ij,hwj->hw", d, np.linalg.inv(covariance), d)
        alpha = np.exp(power) / (1 + np.exp(-g.opacity_logits[i]))
        alpha = np.where(alpha < 1 / 255, 0.0, np.minimum(alpha, 0.99))
        direction = (g.means[i] - eye) / np.linalg.norm(g.means[i] - eye)
        colour = 0.5 + 0.5 / np.sqrt(np.pi) * g.sh[i, 0]
        if g.sh.shape[1] > 1:
            waves = np.sqrt(3 / (4 * np.pi)) * direction[[1, 2, 0]] * [-1, 1, -1]
            colour = colour + waves @ g.sh[i, 1:4]
        normal = turn[:, np.argmin(g.log_scales[i])]
        if normal @ (eye - g.means[i]) < 0:
            normal = -normal
        seen.append((z, alpha, np.maximum(colour, 0.0), normal))
    passed = np.ones(size)
    rgb, normals, depth = np.zeros((*size, 3)), np.zeros((*size, 3)), np.zeros(size)
    for z, alpha, colour, normal in sorted(seen, key=lambda one: one[0]):
        weight = (alpha * passed)[..., None]
        rgb, normals, depth = (
            rgb + weight * colour,
            normals + weight * normal,
            depth + weight[..., 0] * z,
        )
        passed = passed * (1 - alpha)
    total = 1 - passed
    return {
        "rgb": rgb + passed[..., None] * background,
        "alpha": total,
        "depth": np.where(total > 1 / 255, depth / np.maximum(total, 1e-9), 0.0),
        "normals": normals,
    }
