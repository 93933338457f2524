"""splax (MIT; Warp kernels for JAX) in place of our rasteriser, on NVIDIA GPUs where it is installed.

The same arguments and results as `rasterise.render`. splax bounds alpha by 0.999, stops at a
transmittance of 1e-4, and has no full tiles.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spinmeround_jax.splats import gaussians as gs
from spinmeround_jax.splats import rasterise
from spinmeround_jax.splats.gaussians import Gaussians

RASTERISERS = ("auto", "jax", "splax")
_logger = logging.getLogger(__name__)


def choose(name: str = "auto") -> Callable[..., dict[str, jax.Array]]:
    """The function that draws: splax where it can run, else `rasterise.render`.

    Raises:
        ValueError: splax is asked for where it cannot run, or another name.
    """
    if name not in RASTERISERS:
        raise ValueError(f"rasteriser must be one of {RASTERISERS}, got {name!r}")
    if name == "jax":
        return rasterise.render
    missing = _missing()
    if missing is None:
        return render
    if name == "splax":
        raise ValueError(f"splax cannot run: {missing}")
    _logger.info("drawing with the JAX rasteriser: %s", missing)
    return rasterise.render


def _missing() -> str | None:
    devices = {device.platform for device in jax.devices()}
    if devices != {"gpu"} or "NVIDIA" not in jax.devices()[0].device_kind.upper():
        return f"no NVIDIA GPU ({', '.join(sorted(devices))})"
    if importlib.util.find_spec("splax") is None:
        return "splax is not installed; pip install 'spinmeround_jax[splax]'"
    return None


def render(
    gaussians: Gaussians,
    world_to_camera: jax.Array,
    focal: float | tuple[float, float],
    size: int | tuple[int, int],
    background: jax.Array | float = 1.0,
    centre: tuple[float, float] | None = None,
    capacity: int = 0,
    tile: int | None = None,
) -> dict[str, jax.Array]:
    """As `rasterise.render`; focal and centre are plain numbers, capacity and tile are ignored."""
    import splax  # Warp compiles its kernels at the first call

    focal = (float(focal), float(focal)) if isinstance(focal, int | float) else focal
    camera = {
        "viewmat": jnp.diag(jnp.array([1.0, -1.0, -1.0, 1.0])) @ jnp.asarray(world_to_camera),
        "img_shape": (size, size) if isinstance(size, int) else size,
        "f": focal,
        "c": centre,
        "clip_thresh": rasterise.NEAR,
    }
    position = -world_to_camera[:3, :3].T @ world_to_camera[:3, 3]

    def draw(one: Gaussians, behind: jax.Array, depth: bool) -> tuple[jax.Array, jax.Array]:
        return splax.render(
            one.means, one.log_scales, one.quaternions, one.sh, one.opacity_logits,
            background=behind, render_depth=depth, **camera,
        )  # fmt: skip

    background = jnp.broadcast_to(jnp.asarray(background, jnp.float32), (3,))
    image, alpha = draw(gaussians, background, depth=True)
    # Colours cannot be negative: the normals are drawn as n / 2 + 1/2 on black.
    normals = gs.normals(gaussians, position)
    coloured = dataclasses.replace(gaussians, sh=(normals / (2.0 * gs.SH_C0))[:, None])
    encoded, _ = draw(coloured, jnp.zeros(3), depth=False)
    return {
        "rgb": image[..., :3],
        "alpha": alpha,
        "depth": image[..., 3],
        "normals": 2.0 * encoded - alpha[..., None],
        "overflow": jnp.int32(0),
    }
