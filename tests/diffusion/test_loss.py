"""Losses on data whose best network is known: independent standard normal numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.diffusion import preconditioning, schedules
from spinmeround_jax.diffusion.denoiser import condition
from spinmeround_jax.diffusion.loss import consistency_loss, diffusion_loss

SHAPE = (256, 1, 8, 8, 2)


def network(power):
    """D(x; sigma) = x (1 + sigma^2)^-power: the denoiser with power 1, the ODE's end with 1/2."""

    def output(inputs, c_noise, context):
        sigma = jnp.exp(4.0 * c_noise)[:, None, None, None, None]
        x = inputs[..., : SHAPE[-1]] / preconditioning.c_in(sigma)
        estimate = x * (1.0 + sigma**2) ** -power
        return (estimate - preconditioning.c_skip(sigma) * x) / preconditioning.c_out(sigma)

    return output


def examples(sigma):
    latents, noise = (jax.random.normal(jax.random.key(seed), SHAPE) for seed in range(2))
    conditioning = condition(
        jnp.zeros((len(latents), 2, 3)),
        jnp.zeros(SHAPE[:2], bool),
        latents,
        cameras.orbit(np.zeros(SHAPE[:2])),
        "true",
    )
    return latents, jnp.full(len(latents), sigma), noise, conditioning


def test_consistency_with_the_clean_latent_is_diffusion():
    latents, sigma, noise, conditioning = examples(2.0)
    found = consistency_loss(network(0.7), latents, sigma, 0.0 * sigma, noise, conditioning)
    expected = diffusion_loss(network(0.7), latents, sigma, noise, conditioning)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


@pytest.mark.parametrize(("share", "best"), [(0.0, 1.0), (0.95, 0.5)])
def test_near_levels_move_the_best_network_from_the_denoiser_to_the_end_of_the_path(share, best):
    latents, sigma, noise, conditioning = examples(2.0)

    def loss(power):
        lower = share * sigma
        return consistency_loss(network(power), latents, sigma, lower, noise, conditioning)[0]

    slopes = [float(jax.grad(loss)(best + step)) for step in (-0.1, 0.0, 0.1)]
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 0.2 * min(-slopes[0], slopes[2])


def test_levels_near_each_other_as_training_goes_on():
    sigma = jnp.array([0.01, 1.0, 100.0])
    ratios = [
        np.asarray(schedules.consistency_pairs(sigma, jnp.asarray(share), 8) / sigma)
        for share in (0.0, 0.5, 0.99)
    ]
    np.testing.assert_allclose(ratios[0], [0.0, 0.0, 0.5], atol=1e-6)
    assert (ratios[1] > ratios[0]).all() and (ratios[2] > ratios[1]).all()
    np.testing.assert_allclose(1.0 - ratios[2][2], 2.0**-8, rtol=1e-4)
