"""Rendering Gaussians from many cameras, and measuring the distance to given views."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from spinmeround_jax import cameras, metrics
from spinmeround_jax.splats.gaussians import Gaussians
from spinmeround_jax.splats.rasterise import LOW_PASS, render
from spinmeround_jax.splats.scene import Scene, camera_positions, middle_and_radius

CAPACITY = 512  # Gaussians per tile, of images to look at
_AT_ONCE = 8  # images in one LPIPS


@dataclasses.dataclass(frozen=True)
class Drawn:
    """v images of h x w pixels: images (v, h, w, 3) in [0, 1], alpha and depth (v, h, w), normals
    (v, h, w, 3) in the world; overflow, Gaussians left out by full tiles."""

    images: np.ndarray
    alpha: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    overflow: int


def draw_views(
    gaussians: Gaussians,
    scene: Scene,
    world_to_camera: np.ndarray | None = None,
    draw: Callable[..., dict[str, jax.Array]] = render,
    capacity: int = CAPACITY,
) -> Drawn:
    """Draw with the scene's intrinsics and background, at its own cameras or at (v, 4, 4) others."""
    poses = scene.world_to_camera if world_to_camera is None else world_to_camera
    focal, centre = (tuple(map(float, pair)) for pair in (scene.focal, scene.centre))

    drawn = [
        jax.device_get(
            draw(
                gaussians,
                jnp.asarray(pose, jnp.float32),
                focal,
                scene.size,
                jnp.asarray(scene.background, jnp.float32),
                centre,
                capacity,
            )
        )
        for pose in poses
    ]
    stacked = {name: np.stack([d[name] for d in drawn]) for name in drawn[0]}
    return Drawn(
        images=np.clip(stacked["rgb"], 0.0, 1.0),
        alpha=stacked["alpha"],
        depth=stacked["depth"],
        normals=stacked["normals"],
        overflow=int(stacked["overflow"].sum()),
    )


def orbit(scene: Scene, yaw: np.ndarray, pitch: float = 0.0) -> np.ndarray:
    """(v, 4, 4) cameras at (v,) azimuths around the middle of the scene, at its cameras' median distance."""
    middle, _ = middle_and_radius(scene)
    distance = np.median(np.linalg.norm(camera_positions(scene.world_to_camera) - middle, axis=-1))
    poses = cameras.orbit(yaw, pitch)
    poses[:, :3, 3] = np.array([0.0, 0.0, -distance]) - poses[:, :3, :3] @ middle
    return poses


def for_any_size(gaussians: Gaussians, scene: Scene) -> Gaussians:
    """The Gaussians as viewers should get them, who draw larger images than the views of the fit.

    In those views the rasteriser's low-pass filter hides what is thinner than a pixel, and a fit leaves needles
    there. The filter of a view at the cameras' median distance becomes part of the Gaussians (as in
    Mip-Splatting, Yu et al. 2024).
    """
    middle, _ = middle_and_radius(scene)
    distance = np.median(np.linalg.norm(camera_positions(scene.world_to_camera) - middle, axis=-1))
    blur = LOW_PASS * (distance / scene.focal.mean()) ** 2
    widened = 0.5 * jnp.log(jnp.exp(2.0 * gaussians.log_scales) + blur)
    return dataclasses.replace(gaussians, log_scales=widened)


def turn(
    gaussians: Gaussians,
    scene: Scene,
    yaw: np.ndarray,
    size: tuple[int, int],
    draw: Callable[..., dict[str, jax.Array]] = render,
) -> Iterator[Drawn]:
    """One view of (height, width) pixels at each azimuth as `orbit`, with the scene's vertical field of view.

    Args:
        gaussians: as `for_any_size` returns them.
    """
    scale = size[0] / scene.size[0]
    enlarged = dataclasses.replace(
        scene,
        images=np.empty((0, *size, 3)),
        focal=scale * scene.focal,
        centre=scale * scene.centre,
    )
    poses = orbit(scene, yaw)
    capacity = 64  # few Gaussians reach a small tile, and time is proportional to the room for them
    for pose in poses:
        drawn = draw_views(gaussians, enlarged, pose[None], draw, capacity)
        while drawn.overflow and capacity < CAPACITY:
            capacity *= 2
            drawn = draw_views(gaussians, enlarged, pose[None], draw, capacity)
        yield drawn


def measure(drawn: Drawn, scene: Scene) -> dict[str, np.ndarray]:
    """PSNR (dB), SSIM, LPIPS (AlexNet), and degrees between normals inside the masks, (v,) each.

    LPIPS is left out of images too small for it; normals are left out of a scene without, and NaN in views
    without.
    """
    images, truth = 2.0 * drawn.images - 1.0, 2.0 * scene.images.astype(np.float32) - 1.0
    values = {"psnr": metrics.psnr(images, truth), "ssim": metrics.ssim(images, truth)}
    if min(scene.size) >= metrics.LPIPS_SMALLEST:
        distance = jax.jit(metrics.lpips("alexnet"))
        parts = [
            np.asarray(distance(images[i : i + _AT_ONCE], truth[i : i + _AT_ONCE]))
            for i in range(0, len(images), _AT_ONCE)
        ]
        values["lpips"] = np.concatenate(parts)
    if scene.normals is not None:
        truth = scene.normals.astype(np.float32)
        angles = metrics.angular_error(drawn.normals, truth, scene.masks > 0.5)
        values["normals"] = np.where(scene.has_normals, angles, np.nan)
    return values
