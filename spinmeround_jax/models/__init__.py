"""The three networks of SpinMeRound: UNet, autoencoder, identity encoder."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from spinmeround_jax.cameras import RAYMAP_CHANNELS
from spinmeround_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from spinmeround_jax.models.config import ModelConfig
from spinmeround_jax.models.identity import IdentityEncoder, IdentityEncoderConfig
from spinmeround_jax.models.unet import MultiViewUNet, UNetConfig

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "IdentityEncoder",
    "IdentityEncoderConfig",
    "Model",
    "ModelConfig",
    "MultiViewUNet",
    "UNetConfig",
    "build",
]


@dataclasses.dataclass
class Model:
    """Networks and the configuration they were built from."""

    config: ModelConfig
    unet: MultiViewUNet
    autoencoder: Autoencoder
    identity: IdentityEncoder

    @property
    def networks(self) -> dict[str, nnx.Module]:
        """By name, as they are saved."""
        return {"unet": self.unet, "autoencoder": self.autoencoder, "identity": self.identity}


def build(config: ModelConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs) -> Model:
    """New networks computing in `dtype`, with float32 parameters.

    Raises:
        ValueError: channels or image size of the networks do not fit together.
    """
    latents = 2 * config.autoencoder.latent_channels  # RGB and normals
    expected = {
        "unet.in_channels": (config.unet.in_channels, latents + RAYMAP_CHANNELS + 1),
        "unet.out_channels": (config.unet.out_channels, latents),
        "unet.context_dim": (config.unet.context_dim, config.identity.width),
    }
    for name, (value, needed) in expected.items():
        if value != needed:
            raise ValueError(f"{name} is {value}, the other networks need {needed}")
    coarsest = config.autoencoder.downsampling * 2 ** (len(config.unet.channel_mult) - 1)
    if config.image_size % coarsest:
        raise ValueError(f"image_size {config.image_size} is not a multiple of {coarsest}")
    return Model(
        config=config,
        unet=MultiViewUNet(config.unet, dtype=dtype, rngs=rngs),
        autoencoder=Autoencoder(config.autoencoder, dtype=dtype, rngs=rngs),
        identity=IdentityEncoder(config.identity, dtype=dtype, rngs=rngs),
    )
