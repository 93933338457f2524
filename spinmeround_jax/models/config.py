"""What decides which tensors a model has and what they mean."""

from __future__ import annotations

import dataclasses

from spinmeround_jax.models.autoencoder import AutoencoderConfig
from spinmeround_jax.models.identity import IdentityEncoderConfig
from spinmeround_jax.models.unet import UNetConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides which tensors exist and what they mean; saved beside the weights."""

    image_size: int  # pixels; the latent size is image_size / autoencoder.downsampling
    views: int  # P = M + K of the paper, views denoised jointly
    rays: str  # "true" | "released", see cameras.raymap
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    identity: IdentityEncoderConfig
    latent_mean: tuple[float, ...]  # of RGB and normal latents' channels, see `latents`;
    latent_std: tuple[float, ...]  # () takes them as the autoencoder gives them
    normals_frame: str  # "camera" | "world": what the normal latents show, see cameras.Frame

    @property
    def latent_size(self) -> int:
        return self.image_size // self.autoencoder.downsampling

    @property
    def latent_channels(self) -> int:
        return 2 * self.autoencoder.latent_channels  # RGB and normals

    @property
    def attention_shapes(self) -> tuple[tuple[int, int], ...]:
        """(tokens, channels of a head) of self-attention in the UNet: for each width the most tokens."""
        unet, most = self.unet, {}
        middle = (len(unet.channel_mult) - 1, True)
        for level, joint in (*((n, n in unet.joint_levels) for n in unet.attention_levels), middle):
            tokens = (self.latent_size >> level) ** 2 * (self.views if joint else 1)
            channels = unet.widths[level] // unet.heads
            most[channels] = max(tokens, most.get(channels, 0))
        return tuple((tokens, channels) for channels, tokens in most.items())


# The paper's model, which the released weights fit; the networks' own defaults are its shapes.
FULL_SIZE = ModelConfig(
    image_size=512,
    views=8,
    rays="released",
    unet=UNetConfig(),
    autoencoder=AutoencoderConfig(),
    identity=IdentityEncoderConfig(),
    latent_mean=(),
    latent_std=(),
    normals_frame="world",
)
