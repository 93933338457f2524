"""v-prediction preconditioning with sigma_data = 1: D(x; s) = c_skip x + c_out F(c_in x; c_noise)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def c_skip(sigma: jax.Array) -> jax.Array:
    """1 / (sigma^2 + 1)."""
    return 1.0 / (sigma**2 + 1.0)


def c_out(sigma: jax.Array) -> jax.Array:
    """-sigma / sqrt(sigma^2 + 1)."""
    return -sigma / jnp.sqrt(sigma**2 + 1.0)


def c_in(sigma: jax.Array) -> jax.Array:
    """1 / sqrt(sigma^2 + 1)."""
    return 1.0 / jnp.sqrt(sigma**2 + 1.0)


def c_noise(sigma: jax.Array) -> jax.Array:
    """ln(sigma) / 4."""
    return 0.25 * jnp.log(sigma)


def loss_weight(sigma: jax.Array) -> jax.Array:
    """(sigma^2 + 1) / sigma^2 = 1 / c_out^2: the x0 error becomes the network's own (EDM, eq. 8)."""
    return (sigma**2 + 1.0) / sigma**2
