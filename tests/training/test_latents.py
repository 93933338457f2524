"""What the denoiser sees: two standardised halves, from pictures, in their order."""

import dataclasses

import numpy as np
import pytest

from spinmeround_jax.data.batch import Batch
from spinmeround_jax.diffusion.denoiser import deny_normals, restore, standardise
from spinmeround_jax.models import parameters
from spinmeround_jax.training import latents
from tests.support.tiny_model import CONFIG, random_autoencoder

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def autoencoder():
    """A random one, whose latents are far from zero mean and unit deviation."""
    return random_autoencoder(CONFIG.autoencoder, spread=1.3)


def batch(seed=0) -> Batch:
    """Bright images and dark normals, so that the halves differ."""
    rng = np.random.default_rng(seed)
    return Batch(
        observed=np.zeros((2, 3), bool),
        dropped=np.zeros(2, bool),
        identity_dropped=np.zeros(2, bool),
        id_embedding=np.zeros((2, 512), np.float32),
        world_to_camera=np.zeros((2, 3, 4, 4), np.float32),
        images=rng.uniform(0.5, 1, (2, 3, 16, 16, 3)).astype(np.float32),
        normals=rng.uniform(-1, 0, (2, 3, 16, 16, 3)).astype(np.float32),
    )


@pytest.mark.filterwarnings("error")
def test_pictures_and_latents_of_a_batch_keep_their_order(autoencoder):
    made = batch()
    found = latents.of_batch(made, CONFIG, *parameters.split(autoencoder))
    assert found.shape == (2, 3, 8, 8, 8)
    for half, pictures in ((slice(4), made.images), (slice(4, 8), made.normals)):
        np.testing.assert_allclose(
            found[1, 2, ..., half], autoencoder.encode(pictures[1, 2:])[0], atol=1e-5
        )


def test_statistics_standardise_both_halves(autoencoder):
    batches = [batch(0), batch(1)]
    mean, std = latents.statistics(autoencoder, batches)
    assert abs(np.subtract(mean[:4], mean[4:])).max() > 0.05  # the halves differ
    model = dataclasses.replace(CONFIG, latent_mean=mean, latent_std=std)
    network = parameters.split(autoencoder)
    found = np.concatenate([latents.of_batch(b, model, *network) for b in batches])
    np.testing.assert_allclose(found.mean((0, 1, 2, 3)), 0.0, atol=1e-4)
    power = (found**2).mean((0, 1, 2, 3)).reshape(2, -1)
    np.testing.assert_allclose(power.mean(axis=1), 1.0, atol=1e-3)
    spread = np.var(
        np.concatenate([latents.of_batch(b, CONFIG, *network) for b in batches]), (0, 1, 2, 3)
    )
    np.testing.assert_allclose(
        power[0] / power[0, 0], spread[:4] / spread[0], rtol=1e-3
    )  # as it was
    raw = latents.of_batch(batches[1], CONFIG, *network)
    np.testing.assert_allclose(restore(found[2:], model), raw, atol=1e-5)
    np.testing.assert_allclose(standardise(np.asarray(raw), model), found[2:], atol=1e-4)
    assert standardise(raw, CONFIG) is raw and restore(raw, CONFIG) is raw


def test_a_draw_is_standardised_with_its_spread(autoencoder):
    mean, std = latents.statistics(autoencoder, [batch()])
    model = dataclasses.replace(CONFIG, latent_mean=mean, latent_std=std)
    network = parameters.split(autoencoder)
    noise = np.random.default_rng(1).standard_normal((2, 3, 8, 8, 8), np.float32)
    drawn = latents.of_batch(batch(), CONFIG, *network, noise)
    assert abs(drawn - latents.of_batch(batch(), CONFIG, *network)).max() > 0.01
    np.testing.assert_allclose(
        latents.of_batch(batch(), model, *network, noise), standardise(drawn, model), atol=1e-5
    )


def test_denied_normals_are_zero_and_images_are_kept():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 8)).astype(np.float32)
    found = np.asarray(deny_normals(x))
    np.testing.assert_array_equal(found[..., :4], x[..., :4])
    np.testing.assert_array_equal(found[..., 4:], 0.0)
