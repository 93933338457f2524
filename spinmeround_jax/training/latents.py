"""What the denoiser sees of pictures: (b, v, h, w, 2 z) latents, the RGB half first, then the normals'.

From pictures through the autoencoder, or from moments computed ahead (`latent_files`).
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from spinmeround_jax.data.batch import Batch
from spinmeround_jax.diffusion.denoiser import standardise
from spinmeround_jax.models import Autoencoder, ModelConfig, parameters


def statistics(
    autoencoder: Autoencoder, batches: Iterable[Batch]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`latent_mean` and `latent_std`, 2 z numbers each, over batches with pictures.

    One deviation for all channels of the images and one for those of the normals, the root of their
    mean variance: fine detail stays small beside coarse shape, so that the loss weighs it as pictures do.
    Every process of several computes them for itself, so give all the same batches.
    """
    graphdef, params = parameters.split(autoencoder)
    params = jax.device_get(params)  # they may lie on the devices of all processes

    @jax.jit
    def sums(params: parameters.Parameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
        latents = _raw(batch, graphdef, params)
        return jnp.mean(latents, (0, 1, 2, 3)), jnp.mean(latents**2, (0, 1, 2, 3))

    moments = [[np.asarray(x, np.float64) for x in sums(params, batch)] for batch in batches]
    mean, square = np.mean(moments, axis=0)
    variance = (square - mean**2).reshape(2, -1)
    std = np.sqrt(np.broadcast_to(variance.mean(axis=1, keepdims=True), variance.shape))
    return tuple(mean.tolist()), tuple(std.ravel().tolist())


def pictures(batch: Batch) -> jax.Array:
    """Images, then normal maps, of all views of each example: (b 2 v, h, w, 3) in [-1, 1]."""
    both = jnp.stack([jnp.asarray(batch.images), jnp.asarray(batch.normals)], axis=1)
    return both.reshape(-1, *both.shape[3:])


def of_batch(
    batch: Batch,
    config: ModelConfig,
    graphdef: nnx.GraphDef,
    params: parameters.Parameters,
    noise: jax.Array | None = None,
) -> jax.Array:
    """Standardised latents (b, v, h, w, 2 z) of a batch; no gradient.

    Args:
        graphdef, params: of the autoencoder, which a batch that holds moments does not need.
        noise: (b, v, h, w, 2 z) unit normal, to draw from the posterior; None takes its mean.
    """
    return jax.lax.stop_gradient(standardise(_raw(batch, graphdef, params, noise), config))


def _raw(batch, graphdef, params, noise=None) -> jax.Array:
    v = batch.observed.shape[1]
    if batch.moments is not None:
        mean, std = jnp.split(batch.moments, 2, axis=-1)  # (b, v, 2, h, w, z)
    else:
        moments = parameters.merge(graphdef, params).posterior(pictures(batch))
        mean, std = (rearrange(x, "(b two v) h w z -> b v two h w z", two=2, v=v) for x in moments)
    mean, std = (rearrange(x, "b v two h w z -> b v h w (two z)") for x in (mean, std))
    return mean if noise is None else mean + std * noise
