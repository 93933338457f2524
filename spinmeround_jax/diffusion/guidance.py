"""Modifications of the prediction: guidance and channel-wise in-painting.

Each takes and returns a function `denoise(x, sigma)`, so they compose and are tested without a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free(
    denoise: Callable[[jax.Array, jax.Array, Any], jax.Array],
    conditional: Any,
    unconditional: Any,
    guidance_scale: float | jax.Array,
) -> Denoise:
    """uncond + s (cond - uncond), both branches in one batch (Ho & Salimans, arXiv 2207.12598).

    Args:
        denoise: D(x, sigma, conditioning), batched on the first axis.
        conditional, unconditional: pytrees of equal structure and shapes.
        guidance_scale: s; 1 means no guidance (both branches are still computed).
    """
    both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), unconditional, conditional)

    def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
        without, with_ = jnp.split(denoise(jnp.concatenate([x, x]), sigma, both), 2)
        return without + guidance_scale * (with_ - without)

    return guided


def autoguidance(denoise: Denoise, weaker: Denoise, guidance_scale: float | jax.Array) -> Denoise:
    """weaker + s (denoise - weaker): away from a smaller or less trained model's errors (arXiv 2406.02507)."""

    def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
        base = weaker(x, sigma)
        return base + guidance_scale * (denoise(x, sigma) - base)

    return guided


def on_interval(guided: Denoise, plain: Denoise, interval: jax.Array) -> Denoise:
    """`guided` where interval[0] <= sigma <= interval[1], elsewhere `plain` (arXiv 2404.07724).

    Only one of them is computed.
    """

    def chosen(x: jax.Array, sigma: jax.Array) -> jax.Array:
        inside = (interval[0] <= sigma) & (sigma <= interval[1])
        return jax.lax.cond(inside, guided, plain, x, sigma)

    return chosen


def inpaint_channels(
    denoise: Denoise, known: jax.Array, visible: jax.Array, strength: float | jax.Array
) -> Denoise:
    """Move the predicted x0 towards its known channels (Relightify's channel-wise in-painting).

    x0 <- x0 - strength * visible * (x0 - known). The released code writes a gradient step of weight w on
    a mean over all n elements, which is strength = 2 w / n (6.1 for w = 100,000 at 8x64x64).

    Args:
        known: clean latents; ignored where not visible.
        visible: 0 or 1, broadcastable to `known`.
    """

    def inpainted(x: jax.Array, sigma: jax.Array) -> jax.Array:
        x0 = denoise(x, sigma)
        return x0 - strength * visible * (x0 - known)

    return inpainted
