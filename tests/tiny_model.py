"""A model of every part, small enough for tests: 16 px, 8x8 latents, 8 views, random weights."""

import jax
import numpy as np
from flax import nnx

from spinmeround_jax import models
from spinmeround_jax.config import ModelConfig
from spinmeround_jax.models import AutoencoderConfig, IdentityEncoderConfig, Model, UNetConfig

CONFIG = ModelConfig(
    image_size=16,
    views=8,
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


def random_model() -> Model:
    """New networks with noise on every parameter, so that none is zero."""
    model = models.build(CONFIG, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    for network in (model.unet, model.autoencoder, model.identity):
        state = nnx.state(network)
        noisy = jax.tree.map(
            lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), state
        )
        nnx.update(network, noisy)
    return model
