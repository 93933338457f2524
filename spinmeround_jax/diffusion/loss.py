"""Losses on target views: EDM's (arXiv 2206.00364) eq. 2, weighted as v-prediction, and ECT's (2406.14548)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spinmeround_jax.diffusion import preconditioning as edm
from spinmeround_jax.diffusion.denoiser import Conditioning, Network, denoise


def diffusion_loss(
    network: Network,
    latents: jax.Array,
    sigma: jax.Array,
    noise: jax.Array,
    conditioning: Conditioning,
    targets: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted x0 error on the target views, on RGB and normal latents.

    Args:
        latents: (b, v, h, w, c) clean latents of all views.
        sigma: (b,) noise level of each example's targets.
        noise: (b, v, h, w, c) unit normal.
        targets: () number of target views of the whole batch, if these are only a part of it; None counts
            the target views here.

    Returns:
        The scalar loss (mean over target elements; 1 for a network that outputs 0 on unit-variance data at
        any sigma), and {"rgb": ..., "normals": ...} shares of it by half of the channels.
    """
    x = latents + _level(sigma) * noise
    error = denoise(network, x, sigma, conditioning) - latents
    return _mean(error, edm.loss_weight(sigma), conditioning, targets)


def consistency_loss(
    network: Network,
    latents: jax.Array,
    sigma: jax.Array,
    lower: jax.Array,
    noise: jax.Array,
    conditioning: Conditioning,
    targets: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted difference of the estimates at two levels of the same noise (ECT, arXiv 2406.14548).

    Without gradient through the lower one, whose estimate at level 0 is the clean latent. The squared
    difference has `diffusion_loss`'s weight times sigma / (sigma - lower): with lower = 0 it is that loss.

    Args:
        lower: (b,) noise levels below sigma, 0 or more.
        others, and the result: as `diffusion_loss`.
    """
    estimate = denoise(network, latents + _level(sigma) * noise, sigma, conditioning)
    level = jnp.maximum(lower, 1e-3)  # the network is not defined at 0
    goal = denoise(network, latents + _level(level) * noise, level, conditioning)
    goal = jax.lax.stop_gradient(jnp.where(_level(lower) > 0.0, goal, latents))
    weight = edm.loss_weight(sigma) * sigma / (sigma - lower)
    return _mean(estimate - goal, weight, conditioning, targets)


def _level(sigma: jax.Array) -> jax.Array:
    return sigma[:, None, None, None, None]


def _mean(
    error: jax.Array, weight: jax.Array, conditioning: Conditioning, targets: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    weight = weight[:, None] * jnp.where(conditioning.observed, 0.0, 1.0)
    per_channel = jnp.einsum("bvhwc,bv->c", error**2, weight, precision="highest")
    targets = jnp.sum(~conditioning.observed) if targets is None else targets
    per_channel /= error.shape[2] * error.shape[3] * targets
    rgb, normals = jnp.split(per_channel, 2)
    return jnp.mean(per_channel), {"rgb": rgb.mean(), "normals": normals.mean()}
