"""The autoencoder's loss, and the latents' statistics folded into its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import random_autoencoder

from spinmeround_jax import autoencoder_training, data, parameters
from spinmeround_jax.config import AutoencoderTrainingConfig, OptimizerConfig
from spinmeround_jax.models import Autoencoder, AutoencoderConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPTIMIZER = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.0, beta1=0.9,
    beta2=0.99, max_gradient_norm=1.0, ema_decay=0.9, batch_size=1,
)  # fmt: skip
CONFIG = AutoencoderTrainingConfig(steps=1, lpips_weight=0.0, kl_weight=0.01, optimizer=OPTIMIZER)


def autoencoder(scale_factor=1.0) -> Autoencoder:
    """A random one, whose latents are far from zero mean and unit deviation."""
    config = AutoencoderConfig(
        channels=8, channel_mult=(1, 2), res_blocks=1, scale_factor=scale_factor, norm_groups=8
    )
    return random_autoencoder(config, spread=1.3)


def images(seed=0, n=6):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (n, 16, 16, 3)), jnp.float32)


@pytest.mark.parametrize("scale_factor", [1.0, 0.18215])
def test_folded_statistics_normalise_latents_and_change_nothing_else(scale_factor):
    before = autoencoder(scale_factor)
    batches = [images(0), images(1)]
    mean, std = autoencoder_training.latent_statistics(before, batches)
    latents = np.concatenate([before.encode(x) for x in batches])
    np.testing.assert_allclose(mean, latents.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(std, latents.std((0, 1, 2)), rtol=1e-4)
    assert abs(mean).max() > 0.05 and abs(std - 1).max() > 0.1  # there is something to fold

    after = autoencoder_training.fold_statistics(before, mean, std)
    latents = np.concatenate([after.encode(x) for x in batches])
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1.0, atol=1e-3)
    x = images(2)
    np.testing.assert_allclose(
        after.decode(after.encode(x)), before.decode(before.encode(x)), atol=1e-4
    )

    # A posterior draw decodes as before: the spread shrinks by the same factor as the latents.
    noise = jax.random.normal(jax.random.key(0), before.moments(x)[0].shape)

    def draw(network):
        mean, log_variance = network.moments(x)
        return network.decode_unscaled(mean + jnp.exp(0.5 * log_variance) * noise)

    np.testing.assert_allclose(draw(after), draw(before), atol=2e-4)


def test_loss_terms():
    network, x, key = autoencoder(), images(), jax.random.key(5)
    loss, terms = autoencoder_training.autoencoder_loss(network, x, key, CONFIG)
    mean, log_variance = (np.asarray(m, np.float64) for m in network.moments(x))
    # KL(N(m, s^2) || N(0, 1)), per element.
    variance = np.exp(log_variance)
    np.testing.assert_allclose(
        terms["kl"], np.mean((mean**2 + variance - 1 - np.log(variance)) / 2), rtol=1e-4
    )
    np.testing.assert_allclose(loss, terms["l1"] + 0.01 * terms["kl"], rtol=1e-6)
    other = autoencoder_training.autoencoder_loss(network, x, jax.random.key(6), CONFIG)[1]
    assert terms["l1"] != other["l1"] and terms["kl"] == other["kl"]  # it draws from the posterior


def test_perceptual_term_counts():
    config = dataclasses.replace(CONFIG, lpips_weight=2.0)
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)), jnp.float32)
    loss, terms = autoencoder_training.autoencoder_loss(autoencoder(), x, jax.random.key(0), config)
    np.testing.assert_allclose(
        loss, terms["l1"] + 0.01 * terms["kl"] + 2.0 * terms["lpips"], rtol=1e-6
    )
    assert terms["lpips"] > 0.01


@pytest.mark.filterwarnings("error")
def test_pictures_and_latents_of_a_batch_keep_their_order():
    rng = np.random.default_rng(0)
    batch = data.Batch(
        observed=np.zeros((2, 3), bool),
        dropped=np.zeros(2, bool),
        id_embedding=np.zeros((2, 512), np.float32),
        world_to_camera=np.zeros((2, 3, 4, 4), np.float32),
        images=rng.uniform(-1, 1, (2, 3, 16, 16, 3)).astype(np.float32),
        normals=rng.uniform(-1, 1, (2, 3, 16, 16, 3)).astype(np.float32),
    )
    network = autoencoder()
    latents = autoencoder_training.latents_of(batch, *parameters.split(network))
    assert latents.shape == (2, 3, 8, 8, 8)
    np.testing.assert_allclose(
        latents[1, 2, ..., :4], network.encode(batch.images[1, 2:])[0], atol=1e-5
    )
    np.testing.assert_allclose(
        latents[1, 2, ..., 4:], network.encode(batch.normals[1, 2:])[0], atol=1e-5
    )
