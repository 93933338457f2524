"""ODE samplers: short functions of (denoise, x, sigmas), looped by `lax.scan`.

`denoise(x, sigma)` estimates the clean sample from x at the scalar noise level sigma. `x` starts as noise
of level sigmas[0]; the result is at sigmas[-1], which is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Denoise = Callable[[jax.Array, jax.Array], jax.Array]

_MOVED = 4099  # elements; a prime, so that places, channels and views all change


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


def dpm_solver(denoise: Denoise, x: jax.Array, sigmas: jax.Array) -> jax.Array:
    """DPM-Solver++(2M): second-order steps in log sigma, from this estimate and the one before.

    Algorithm 2 of Lu et al., arXiv 2211.01095, with alpha = 1: noise is added and nothing shrinks. One
    evaluation per step. The first step is first-order, and so is the last, to sigma = 0.
    """
    return _multistep(denoise, x, sigmas, correct=False)


def unipc(denoise: Denoise, x: jax.Array, sigmas: jax.Array) -> jax.Array:
    """UniPC of order 2, B2(h): `dpm_solver`'s steps, each corrected by the estimate at its end.

    Zhao et al., arXiv 2302.04867, for estimates of the clean sample, with alpha = 1. One evaluation per
    step, since that estimate serves the next step, too. The step to sigma = 0 is not corrected.
    """
    return _multistep(denoise, x, sigmas, correct=True)


def consistency(denoise: Denoise, x: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1), for weights tuned to it.

    x is (b, ...). Each estimate gets new noise of the next level: the noise of the start, moved along inside
    each example so that it is independent of the estimate at the same place.
    """
    noise = (x / jnp.sqrt(1.0 + sigmas[0] ** 2)).reshape(len(x), -1)

    def step(x: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        (sigma, next_sigma), moved = given
        other = jnp.roll(noise, moved, axis=1).reshape(x.shape)
        return denoise(x, sigma) + next_sigma * other, None

    pairs = _pairs(sigmas)
    return jax.lax.scan(step, x, (pairs, _MOVED * jnp.arange(1, 1 + len(pairs))))[0]


def _multistep(denoise: Denoise, x: jax.Array, sigmas: jax.Array, correct: bool) -> jax.Array:
    """In lambda = -log sigma. Of each step: h its length, d that of the step before, infinite if none."""

    def step(carry: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        x, last_x, last, slope, last_sigma, d = carry
        sigma, next_sigma = pair
        clean = denoise(x, sigma)
        h = jnp.log(last_sigma / sigma)
        if correct:
            shrunk = -jnp.expm1(-h)
            b1 = 1.0 / shrunk - 1.0 / h
            b2 = 1.0 / shrunk - 2.0 / h * b1
            older = jnp.where(jnp.isinf(d), 0.0, (b1 - b2) / (1.0 + d / h))
            ahead = last + older * h * slope + (b1 - older) * (clean - last)
            corrected = sigma / last_sigma * last_x + shrunk * ahead
            x = jnp.where(jnp.isinf(last_sigma), x, corrected)
        slope = (clean - last) / h  # of the estimates over lambda; 0 at first, where h is infinite
        ratio = next_sigma / sigma
        length = jnp.where(next_sigma > 0.0, jnp.log(sigma / next_sigma), 0.0)
        next_x = ratio * x + (1.0 - ratio) * (clean + 0.5 * length * slope)
        return (next_x, x, clean, slope, sigma, h), None

    nothing, infinite = jnp.zeros_like(x), jnp.full_like(jnp.asarray(sigmas)[0], jnp.inf)
    carry = (x, x, nothing, nothing, infinite, infinite)
    return jax.lax.scan(step, carry, _pairs(sigmas))[0][0]


SAMPLERS: dict[str, Callable[[Denoise, jax.Array, jax.Array], jax.Array]] = {
    "euler": euler,
    "heun": heun,
    "dpm_solver": dpm_solver,
    "unipc": unipc,
    "consistency": consistency,
}


def _pairs(sigmas: jax.Array) -> jax.Array:
    sigmas = jnp.asarray(sigmas)
    return jnp.stack([sigmas[:-1], sigmas[1:]], axis=-1)
