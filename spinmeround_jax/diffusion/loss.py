"""The diffusion loss, on target views as in the paper: EDM (arXiv 2206.00364) eq. 2, v-prediction weighting."""

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
    x = latents + sigma[:, None, None, None, None] * noise
    error = (denoise(network, x, sigma, conditioning) - latents) ** 2
    weight = edm.loss_weight(sigma)[:, None] * jnp.where(conditioning.observed, 0.0, 1.0)
    per_channel = jnp.einsum("bvhwc,bv->c", error, weight, precision="highest")
    targets = jnp.sum(~conditioning.observed) if targets is None else targets
    per_channel /= latents.shape[2] * latents.shape[3] * targets
    rgb, normals = jnp.split(per_channel, 2)
    return jnp.mean(per_channel), {"rgb": rgb.mean(), "normals": normals.mean()}
