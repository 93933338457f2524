"""D(x; sigma, conditioning): the multi-view network with its preconditioning.

Latents are (b, v, h, w, c) with c = RGB latent then normal latent. Observed views enter as their clean
latent at every noise level, as in the released code; `mask` marks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from spinmeround_jax import cameras
from spinmeround_jax.diffusion import preconditioning as edm
from spinmeround_jax.models import ModelConfig

Array = TypeVar("Array", np.ndarray, jax.Array)
Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Conditioning inputs of the denoiser.

    Attributes:
        context: (b, t, d) identity tokens, shared by the views.
        observed: (b, v) bool, True for observed views.
        observed_latents: (b, v, h, w, c) clean latents; ignored where not observed.
        raymap: (b, v, h, w, 144).
        mask: (b, v, h, w, 1), 0 in observed views and 1 in targets.
    """

    context: jax.Array
    observed: jax.Array
    observed_latents: jax.Array
    raymap: jax.Array
    mask: jax.Array


def standardise(latents: Array, config: ModelConfig) -> Array:
    """(..., 2 z) latents of the autoencoder, RGB half first -> zero mean and unit deviation per channel.

    The preconditioning assumes sigma_data = 1, and images and normal maps have different statistics.
    """
    if not config.latent_std:
        return latents
    return (latents - np.float32(config.latent_mean)) / np.float32(config.latent_std)


def restore(latents: Array, config: ModelConfig) -> Array:
    """The inverse of `standardise`."""
    if not config.latent_std:
        return latents
    return latents * np.float32(config.latent_std) + np.float32(config.latent_mean)


def deny_normals(latents: jax.Array) -> jax.Array:
    """The ablation without normals: their half of the latents is zero."""
    z = latents.shape[-1] // 2
    return jnp.where(jnp.arange(2 * z) < z, latents, 0.0)


def condition(
    context: jax.Array,
    observed: jax.Array,
    observed_latents: jax.Array,
    world_to_camera: jax.Array,
    rays: cameras.Rays,
) -> Conditioning:
    """Conditioning from poses: (b, v, 4, 4) `world_to_camera`; other shapes as in `Conditioning`."""
    size = observed_latents.shape[2]
    return Conditioning(
        context=context,
        observed=observed,
        observed_latents=observed_latents,
        raymap=cameras.raymap(world_to_camera, size, rays),
        mask=jnp.broadcast_to(
            jnp.where(observed, 0.0, 1.0)[:, :, None, None, None],
            (*observed.shape, size, size, 1),
        ),
    )


def unconditional(
    conditioning: Conditioning, empty_context: jax.Array, empty_latent: jax.Array
) -> Conditioning:
    """The unconditional branch of guidance, as in the released code.

    It has the empty prompt's context; observed views hold the latent of a zero (mid-grey) image, and their
    raymap and mask are zero.

    Args:
        empty_context: (1, t, d).
        empty_latent: (h, w, c).
    """
    seen = conditioning.observed[:, :, None, None, None]
    return Conditioning(
        context=jnp.broadcast_to(empty_context, conditioning.context.shape),
        observed=conditioning.observed,
        observed_latents=jnp.broadcast_to(empty_latent, conditioning.observed_latents.shape),
        raymap=jnp.where(seen, 0.0, conditioning.raymap),
        mask=jnp.where(seen, 0.0, conditioning.mask),
    )


def drop(
    conditioning: Conditioning,
    dropped: jax.Array,
    empty_context: jax.Array,
    empty_latent: jax.Array,
) -> Conditioning:
    """Replace the examples with (b,) bool `dropped` by their unconditional branch."""
    return jax.tree.map(
        lambda with_, without: jnp.where(
            dropped.reshape(-1, *[1] * (with_.ndim - 1)), without, with_
        ),
        conditioning,
        unconditional(conditioning, empty_context, empty_latent),
    )


def place_observed(latents: jax.Array, conditioning: Conditioning) -> jax.Array:
    """Write the clean latents of the observed views into (b, v, h, w, c) `latents`."""
    seen = conditioning.observed[:, :, None, None, None]
    return jnp.where(seen, conditioning.observed_latents, latents)


def denoise(
    network: Network, x: jax.Array, sigma: jax.Array, conditioning: Conditioning
) -> jax.Array:
    """D(x; sigma) = c_skip x + c_out F(c_in x, raymap, mask; c_noise, context).

    Args:
        network: F, taking (b, v, h, w, in), c_noise (b,) and context.
        x: (b, v, h, w, c) noisy latents; observed views are overwritten by their clean latents.
        sigma: (b,) or scalar, > 0.

    Returns:
        (b, v, h, w, c) float32 estimate of the clean latents.
    """
    x = place_observed(x, conditioning)
    sigma = jnp.broadcast_to(sigma, x.shape[:1])
    level = sigma[:, None, None, None, None]
    inputs = jnp.concatenate([edm.c_in(level) * x, conditioning.raymap, conditioning.mask], axis=-1)
    output = network(inputs, edm.c_noise(sigma), conditioning.context)
    return edm.c_skip(level) * x + edm.c_out(level) * output.astype(jnp.float32)
