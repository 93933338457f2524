"""Configuration of a model, and its presets."""

from __future__ import annotations

import dataclasses

from spinmeround_jax.models.autoencoder import AutoencoderConfig
from spinmeround_jax.models.identity import IdentityEncoderConfig
from spinmeround_jax.models.unet import UNetConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides which tensors exist and what they mean; saved with the weights."""

    image_size: int  # pixels; the latent size is image_size / autoencoder.downsampling
    views: int  # P = M + K of the paper, views denoised jointly
    rays: str  # "true" | "released", see cameras.raymap
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    identity: IdentityEncoderConfig
    latent_mean: tuple[float, ...]  # per channel of RGB and normal latents, see `standardise`;
    latent_std: tuple[float, ...]  # () leaves latents as the autoencoder gives them
    normals_frame: str  # "camera" | "world": frame of the normal maps, see cameras.Frame

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

    @classmethod
    def full_size(cls) -> ModelConfig:
        """The paper's and the release's model; its shapes are the defaults of the networks' configs."""
        return cls(
            image_size=512,
            views=8,
            rays="released",
            unet=UNetConfig(),
            autoencoder=AutoencoderConfig(),
            identity=IdentityEncoderConfig(),
            latent_mean=(),  # Stable Diffusion's latents, unchanged
            latent_std=(),
            normals_frame="world",
        )

    @classmethod
    def quickstart(cls) -> ModelConfig:
        """A model of 128 pixels, small enough to train on a CPU."""
        return cls(
            image_size=128,
            views=8,
            rays="true",
            unet=UNetConfig(
                in_channels=209,
                out_channels=64,
                model_channels=96,  # above the 64 latent channels, else it is a bottleneck
                channel_mult=(1, 1, 2),
                res_blocks=1,
                # without level 0: its attention would take as long as all else together
                attention_levels=(1, 2),
                joint_levels=(1, 2),
                heads=4,
                context_dim=512,
                norm_groups=16,
            ),
            autoencoder=AutoencoderConfig(
                channels=16,
                channel_mult=(1, 2, 6, 8),
                res_blocks=1,
                latent_channels=32,
                linear_path=True,
                scale_factor=1.0,  # the statistics are folded into the weights
                norm_groups=8,
            ),
            identity=IdentityEncoderConfig(
                vocab_size=7,
                width=512,
                layers=1,
                heads=8,
                mlp_width=512,
                context_length=8,
                prompt_ids=(0, 1, 2, 3, 4, 5, 6),
                empty_ids=(0, 6),
                id_token=4,
                pad_id=6,
            ),
            latent_mean=(),  # measured when the autoencoder is trained
            latent_std=(),
            normals_frame="camera",
        )
