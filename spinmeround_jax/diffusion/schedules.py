"""Noise levels: sigmas for sampling, and their distribution in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def karras_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0
) -> np.ndarray:
    """(steps + 1,) float32 decreasing sigmas, then 0 (EDM, arXiv 2206.00364, eq. 5)."""
    ramp = np.linspace(0.0, 1.0, steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + ramp * (low - high)) ** rho, 0.0).astype(np.float32)


def consistency_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0
) -> np.ndarray:
    """(steps + 1,) as `karras_sigmas`, but the last step leads from well above sigma_min to 0."""
    return np.append(karras_sigmas(steps + 1, sigma_min, sigma_max, rho)[:steps], np.float32(0.0))


def consistency_pairs(sigma: jax.Array, share: jax.Array, halvings: int) -> jax.Array:
    """The lower noise level r < sigma of consistency tuning (ECT, arXiv 2406.14548, section 3).

    r / sigma = 1 - 2^-a (1 + 8 / (1 + e^sigma)), at least 0, with a = 1 in the first part of the run, 2 in the
    second, and so on: low levels begin at r = 0, where the loss is that of diffusion, high ones at sigma / 2.

    Args:
        share: () part of the run that lies behind, in [0, 1).
    """
    a = 1.0 + jnp.minimum(jnp.floor(share * halvings), halvings - 1)
    return sigma * jnp.maximum(0.0, 1.0 - 0.5**a * (1.0 + 8.0 * jax.nn.sigmoid(-sigma)))


def ddpm_sigmas(
    steps: int, beta_start: float = 0.00085, beta_end: float = 0.012, train_steps: int = 1000
) -> np.ndarray:
    """(steps + 1,) float32 sigmas of Stable Diffusion's discretisation, then 0.

    beta is linear in its square root; sigma = sqrt((1 - a) / a) with a the cumulative product of
    1 - beta, read at `steps` timesteps from noisy to clean.
    """
    betas = np.linspace(beta_start**0.5, beta_end**0.5, train_steps) ** 2
    alphas = np.cumprod(1.0 - betas)
    timesteps = np.linspace(train_steps - 1, 0, steps, endpoint=False).astype(int)
    sigmas = np.sqrt((1.0 - alphas[timesteps]) / alphas[timesteps])
    return np.append(sigmas, 0.0).astype(np.float32)


def lognormal_sigmas(
    key: jax.Array, shape: tuple[int, ...], mean: float, std: float, targets: jax.Array
) -> jax.Array:
    """Training noise levels: ln sigma ~ N(mean + ln(targets) / 2, std^2).

    EDM's log-normal with the log-SNR lowered by ln(N) for N jointly denoised targets (CAT3D; the paper's
    section on training): log-SNR = -2 ln sigma, so the mean of ln sigma moves by ln(N) / 2.

    Args:
        targets: number of target views per example, broadcastable to `shape`.
    """
    shift = 0.5 * jnp.log(jnp.maximum(targets, 1).astype(jnp.float32))
    return jnp.exp(mean + shift + std * jax.random.normal(key, shape))
