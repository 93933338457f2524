"""The autoencoder's loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax.config import AutoencoderTrainingConfig, OptimizerConfig
from spinmeround_jax.models import Autoencoder, AutoencoderConfig
from spinmeround_jax.training import autoencoder as autoencoder_training
from tests.support.tiny_model import random_autoencoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPTIMIZER = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.0, beta1=0.9,
    beta2=0.99, max_gradient_norm=1.0, ema_decay=0.9, batch_size=1,
)  # fmt: skip
CONFIG = AutoencoderTrainingConfig(
    steps=1, directory="", crop=16, lpips_weight=0.0, kl_weight=0.01, optimizer=OPTIMIZER
)


def autoencoder() -> Autoencoder:
    config = AutoencoderConfig(
        channels=8, channel_mult=(1, 2), res_blocks=1, scale_factor=1.0, norm_groups=8
    )
    return random_autoencoder(config, spread=1.3)


def images(seed=0, n=6):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (n, 16, 16, 3)), jnp.float32)


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


def test_crops_are_parts_of_their_images_from_places_of_their_own():
    x = np.asarray(images(n=40))
    crops = np.asarray(autoencoder_training.random_crops(jnp.asarray(x), 8, jax.random.key(0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (8, 8), axis=(1, 2))
    same = (windows == np.moveaxis(crops, -1, 1)[:, None, None]).all((-3, -2, -1))  # (n, 9, 9)
    assert (same.sum((1, 2)) == 1).all()
    rows, columns = same.any(2).argmax(1), same.any(1).argmax(1)
    assert {0, 8} <= set(rows) and {0, 8} <= set(columns)  # up to the edges
    assert len(set(zip(rows, columns, strict=True))) > 20
    whole = autoencoder_training.random_crops(jnp.asarray(x), 16, jax.random.key(0))
    np.testing.assert_array_equal(whole, x)
