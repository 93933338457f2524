"""ODE samplers: short functions of (denoise, x, sigmas), looped by `lax.scan`.

`denoise(x, sigma)` estimates the clean sample from x at the scalar noise level sigma. `x` starts as noise
of level sigmas[0]; the result is at sigmas[-1], which is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def initial_noise(noise: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Unit noise times sqrt(1 + sigma_0^2), as every sampler of the release starts."""
    return noise * jnp.sqrt(1.0 + sigmas[0] ** 2)


def euler(denoise: Denoise, x: jax.Array, sigmas: jax.Array) -> jax.Array:
    """First-order steps of dx/dsigma = (x - D(x; sigma)) / sigma (EDM, algorithm 1 without line 6)."""

    def step(x: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        sigma, next_sigma = pair
        slope = (x - denoise(x, sigma)) / sigma
        return x + (next_sigma - sigma) * slope, None

    return jax.lax.scan(step, x, _pairs(sigmas))[0]


def heun(denoise: Denoise, x: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Second-order steps: Euler, then the mean of both ends' slopes (EDM, algorithm 1).

    The last step, to sigma = 0, stays first-order. Costs 2 n - 1 evaluations for n steps.
    """

    def step(x: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        sigma, next_sigma = pair
        slope = (x - denoise(x, sigma)) / sigma
        guess = x + (next_sigma - sigma) * slope
        next_slope = (guess - denoise(guess, next_sigma)) / next_sigma
        return x + (next_sigma - sigma) * 0.5 * (slope + next_slope), None

    pairs = _pairs(sigmas)
    x = jax.lax.scan(step, x, pairs[:-1])[0]
    return euler(denoise, x, pairs[-1])


SAMPLERS: dict[str, Callable[[Denoise, jax.Array, jax.Array], jax.Array]] = {
    "euler": euler,
    "heun": heun,
}


def _pairs(sigmas: jax.Array) -> jax.Array:
    sigmas = jnp.asarray(sigmas)
    return jnp.stack([sigmas[:-1], sigmas[1:]], axis=-1)
