"""A model of every part, small enough for tests: 16 px, 8x8 latents, 8 views, random weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spinmeround_jax import models
from spinmeround_jax.config import RELEASED
from spinmeround_jax.models import (
    Autoencoder,
    AutoencoderConfig,
    IdentityEncoderConfig,
    Model,
    ModelConfig,
    UNetConfig,
    parameters,
)

NETWORKS = ("unet", "autoencoder", "identity")
CONFIG = ModelConfig(
    image_size=16,
    views=8,
    latent_mean=(),
    latent_std=(),
    normals_frame="world",
    rays="true",
    unet=UNetConfig(
        model_channels=16, channel_mult=(1,), res_blocks=1, attention_levels=(0,),
        joint_levels=(0,), heads=2, context_dim=512, norm_groups=8,
    ),
    autoencoder=AutoencoderConfig(channels=8, channel_mult=(1, 2), res_blocks=1, norm_groups=8),
    identity=IdentityEncoderConfig(
        vocab_size=7, width=512, layers=1, heads=4, mlp_width=16, context_length=7,
        prompt_ids=(0, 1, 2, 3, 4, 5, 6), empty_ids=(0, 6), id_token=4, pad_id=6,
    ),
)  # fmt: skip


def randomised(network, rng, spread=1.0):
    """An abstract network with random values for every parameter, so that no output is zero.

    Not the initialisers': to run them one by one takes longer than the tests.
    """
    graphdef, expected = parameters.split(network)
    values = {}
    for name, shape in expected.items():
        noise = spread / np.sqrt(np.prod(shape.shape[:-1])) * rng.standard_normal(shape.shape)
        values[name] = jnp.asarray(noise + name.endswith("scale"), jnp.float32)
    return parameters.merge(graphdef, values)


def random_model(seed=0) -> Model:
    rng = np.random.default_rng(seed)

    def build():
        model = models.build(CONFIG, rngs=nnx.Rngs(0))
        return [getattr(model, name) for name in NETWORKS]

    return Model(CONFIG, *(randomised(network, rng) for network in nnx.eval_shape(build)))


def random_autoencoder(config: AutoencoderConfig, seed=0, spread=1.0) -> Autoencoder:
    network = nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    return randomised(network, np.random.default_rng(seed), spread)


# Few steps and little noise: a random network has no reason to behave at sigma 700.
SAMPLING = dataclasses.replace(
    RELEASED, steps=3, sigma_max=5.0, sigma_min=0.05, normals_steps=2, normals_guidance=0.5
)


def inputs(heads, observed=1, size=16):
    rng = np.random.default_rng(3)
    images = rng.uniform(-1, 1, (heads, observed, size, size, 3)).astype(np.float32)
    identities = rng.standard_normal((heads, 512)).astype(np.float32)
    return images, identities / np.linalg.norm(identities, axis=1, keepdims=True)


TRAJECTORY = np.array([[0, 0], [10, 0], [20, 5], [45, 0], [-70, 0]], np.float32)
