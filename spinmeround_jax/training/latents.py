"""Latents of batches: (b, v, h, w, 2 z), the image's half first, then the normals'.

They come from images through the autoencoder, or from stored moments (`latent_files`).
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
    """`latent_mean` and `latent_std`, 2 z numbers each, over batches with images.

    One standard deviation for all channels of the images and one for those of the normals, the root of
    their mean variance: fine detail keeps a small part in the latents, as it has in images, and in the loss.
    Every process computes them itself: give all the same batches.
    """
    graphdef, params = parameters.split(autoencoder)
    params = jax.device_get(params)  # they may be on the devices of all processes

    @jax.jit
    def sums(params: parameters.Parameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
        latents = _raw(batch, graphdef, params)
        return jnp.mean(latents, (0, 1, 2, 3)), jnp.mean(latents**2, (0, 1, 2, 3))

    moments = [[np.asarray(x, np.float64) for x in sums(params, batch)] for batch in batches]
    mean, square = np.mean(moments, axis=0)
    variance = (square - mean**2).reshape(2, -1)
    std = np.sqrt(np.broadcast_to(variance.mean(axis=1, keepdims=True), variance.shape))
    return tuple(mean.tolist()), tuple(std.ravel().tolist())


def images_and_normals(batch: Batch) -> jax.Array:
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
        graphdef, params: of the autoencoder; not used if the batch holds moments.
        noise: (b, v, h, w, 2 z) unit normal, to draw from the posterior; None takes its mean.
    """
    return jax.lax.stop_gradient(standardise(_raw(batch, graphdef, params, noise), config))


def _raw(batch, graphdef, params, noise=None) -> jax.Array:
    v = batch.observed.shape[1]
    if batch.moments is not None:
        mean, std = jnp.split(batch.moments, 2, axis=-1)  # (b, v, 2, h, w, z)
    else:
        moments = parameters.merge(graphdef, params).posterior(images_and_normals(batch))
        mean, std = (rearrange(x, "(b two v) h w z -> b v two h w z", two=2, v=v) for x in moments)
    mean, std = (rearrange(x, "b v two h w z -> b v h w (two z)") for x in (mean, std))
    return mean if noise is None else mean + std * noise
