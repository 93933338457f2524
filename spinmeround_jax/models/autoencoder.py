"""Stable Diffusion 1.5's image autoencoder; normal maps are encoded as RGB images."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from spinmeround_jax.models.attention import attention
from spinmeround_jax.models.layers import GroupNorm, Keys, ResidualBlock, conv, upsample_nearest

NORM_EPSILON = 1e-6
_block = functools.partial(ResidualBlock, time_width=None, norm_epsilon=NORM_EPSILON)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the autoencoder.

    Raises:
        ValueError: `norm_groups` does not divide the width of a level.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2  # per level of the encoder; one more in the decoder
    latent_channels: int = 4
    scale_factor: float = 0.18215  # 1 / standard deviation of the latents
    norm_groups: int = 32

    def __post_init__(self) -> None:
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups {self.norm_groups} does not divide width {width}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiple for multiple in self.channel_mult)

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.channel_mult) - 1)


class SpatialAttention(nnx.Module):
    """Single-head self-attention over the pixels of a feature map, added to its input."""

    def __init__(self, channels: int, norm_groups: int, *, dtype: jnp.dtype, rngs: Keys):
        common = {"dtype": dtype, "rngs": rngs}
        self.norm = GroupNorm(channels, norm_groups, NORM_EPSILON, **common)
        self.query = conv(channels, channels, 1, **common)
        self.key = conv(channels, channels, 1, **common)
        self.value = conv(channels, channels, 1, **common)
        self.out = conv(channels, channels, 1, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, h, w, c) -> (n, h, w, c)."""
        h = self.norm(x)
        q, k, v = (
            rearrange(project(h), "n h w c -> n (h w) 1 c")
            for project in (self.query, self.key, self.value)
        )
        return x + self.out(rearrange(attention(q, k, v), "n (h w) 1 c -> n h w c", h=x.shape[1]))


class Middle(nnx.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, width: int, norm_groups: int, *, dtype: jnp.dtype, rngs: Keys):
        common = {"dtype": dtype, "rngs": rngs}
        self.block_1 = _block(width, width, norm_groups=norm_groups, **common)
        self.attention = SpatialAttention(width, norm_groups, **common)
        self.block_2 = _block(width, width, norm_groups=norm_groups, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block_2(self.attention(self.block_1(x)))


class Encoder(nnx.Module):
    """Images -> features holding mean and log-variance, before `quantize_in`."""

    def __init__(self, config: AutoencoderConfig, *, dtype: jnp.dtype, rngs: Keys):
        common = {"dtype": dtype, "rngs": rngs}
        groups, widths = config.norm_groups, config.widths
        self.conv_in = conv(3, config.channels, 3, **common)
        self.levels, self.downsamples = nnx.List(), nnx.List()
        width = config.channels
        for level, level_width in enumerate(widths):
            blocks = nnx.List()
            for _ in range(config.res_blocks):
                blocks.append(_block(width, level_width, norm_groups=groups, **common))
                width = level_width
            self.levels.append(blocks)
            if level != len(widths) - 1:
                # The only asymmetric padding of the model: a pixel below and to the right.
                padding = ((0, 1), (0, 1))
                self.downsamples.append(conv(width, width, 3, strides=2, padding=padding, **common))
        self.middle = Middle(width, groups, **common)
        self.norm_out = GroupNorm(width, groups, NORM_EPSILON, **common)
        self.conv_out = conv(width, 2 * config.latent_channels, 3, **common)

    def __call__(self, images: jax.Array) -> jax.Array:
        """(n, h, w, 3) -> (n, h / downsampling, w / downsampling, 2 latent_channels)."""
        x = self.conv_in(images)
        for level, blocks in enumerate(self.levels):
            for block in blocks:
                x = block(x)
            if level < len(self.downsamples):
                x = self.downsamples[level](x)
        return self.conv_out(self.norm_out(self.middle(x), silu=True))


class Decoder(nnx.Module):
    """Latents after `quantize_out` -> images. Levels in order of execution, the coarsest first."""

    def __init__(self, config: AutoencoderConfig, *, dtype: jnp.dtype, rngs: Keys):
        common = {"dtype": dtype, "rngs": rngs}
        groups = config.norm_groups
        width = config.widths[-1]
        self.conv_in = conv(config.latent_channels, width, 3, **common)
        self.middle = Middle(width, groups, **common)
        self.levels, self.upsamples = nnx.List(), nnx.List()
        for level in reversed(range(len(config.widths))):
            blocks = nnx.List()
            for _ in range(config.res_blocks + 1):
                blocks.append(_block(width, config.widths[level], norm_groups=groups, **common))
                width = config.widths[level]
            self.levels.append(blocks)
            if level:
                self.upsamples.append(conv(width, width, 3, **common))
        self.norm_out = GroupNorm(width, groups, NORM_EPSILON, **common)
        self.conv_out = conv(width, 3, 3, **common)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """(n, h, w, latent_channels) -> (n, h downsampling, w downsampling, 3)."""
        x = self.middle(self.conv_in(latents))
        for step, blocks in enumerate(self.levels):
            for block in blocks:
                x = block(x)
            if step < len(self.upsamples):
                x = self.upsamples[step](upsample_nearest(x))
        return self.conv_out(self.norm_out(x, silu=True))


class Autoencoder(nnx.Module):
    """Images in [-1, 1] <-> latents, scaled to about unit variance except in `moments`."""

    def __init__(
        self, config: AutoencoderConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        common = {"dtype": dtype, "rngs": Keys(rngs)}
        z = config.latent_channels
        self.encoder = Encoder(config, **common)
        self.quantize_in = conv(2 * z, 2 * z, 1, **common)
        self.quantize_out = conv(z, z, 1, **common)
        self.decoder = Decoder(config, **common)

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Posterior of the unscaled latents.

        Args:
            images: (n, h, w, 3) in [-1, 1], h and w divisible by `downsampling`.

        Returns:
            mean and log-variance (clipped to [-30, 20]), each (n, h / f, w / f, latent_channels)
            float32.
        """
        moments = self.quantize_in(self.encoder(images)).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images (n, h, w, 3) in [-1, 1] -> scaled mean latents (n, h / f, w / f, z) float32."""
        return self.posterior(images)[0]

    def posterior(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `moments`: mean and standard deviation of the scaled latents."""
        mean, log_variance = self.moments(images)
        scale = self.config.scale_factor
        return mean * scale, jnp.exp(0.5 * log_variance) * scale

    def decode(self, latents: jax.Array) -> jax.Array:
        """Scaled latents (n, h, w, z) -> images (n, h f, w f, 3) float32, not clipped."""
        return self.decode_unscaled(latents / self.config.scale_factor)

    def decode_unscaled(self, latents: jax.Array) -> jax.Array:
        """As `decode`, for latents as `moments` returns them."""
        return self.decoder(self.quantize_out(latents)).astype(jnp.float32)
