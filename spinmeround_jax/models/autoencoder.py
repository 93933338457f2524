"""Stable Diffusion 1.5's image autoencoder; normal maps are encoded as RGB images."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from spinmeround_jax.models.attention import attention
from spinmeround_jax.models.layers import (
    GroupNorm,
    Keys,
    ResidualBlock,
    conv,
    linear,
    upsample_nearest,
)

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
    linear_path: bool = False  # see `LinearPath`; Stable Diffusion's has none

    def __post_init__(self) -> None:
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups {self.norm_groups} does not divide width {width}")
        if self.linear_path and self.latent_channels > 3 * self.downsampling**2:
            raise ValueError(
                f"linear_path: more latent_channels, {self.latent_channels}, than numbers in a block"
            )

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


class LinearPath(nnx.Module):
    """A linear autoencoder of blocks of f x f pixels, to which encoder and decoder add.

    It starts as the lowest frequencies of the blocks' cosine transform in luma and chroma, and is trained
    with the rest, which starts at 0. So latents are ordered like images (few large, coarse numbers,
    many small, fine ones), and training starts at the quality of that transform: docs/results.md.
    """

    def __init__(self, block: int, channels: int, *, dtype: jnp.dtype, rngs: Keys):
        basis = jnp.asarray(cosine_basis(block, channels))
        common = {"dtype": dtype, "rngs": rngs}
        self.block = block
        self.encode = linear(*basis.shape, use_bias=False, kernel_init=lambda *_: basis, **common)
        self.decode = linear(*basis.T.shape, kernel_init=lambda *_: basis.T, **common)

    def latents(self, images: jax.Array) -> jax.Array:
        """(n, h, w, 3) -> (n, h / f, w / f, z)."""
        f = self.block
        return self.encode(rearrange(images, "n (h i) (w j) c -> n h w (i j c)", i=f, j=f))

    def images(self, latents: jax.Array) -> jax.Array:
        """(n, h, w, z) -> (n, h f, w f, 3)."""
        f = self.block
        return rearrange(self.decode(latents), "n h w (i j c) -> n (h i) (w j) c", i=f, j=f)


def cosine_basis(block: int, count: int) -> np.ndarray:
    """(3 block^2, count) float32, orthonormal: cosine transform (DCT-II) of RGB blocks, coarsest first.

    Chroma comes after luma of a frequency higher by 2: images have less of it.
    """
    i = np.arange(block)
    waves = np.cos(np.pi * (i + 0.5) * i[:, None] / block) * np.sqrt(2.0 / block)
    waves[0] /= np.sqrt(2.0)
    opponents = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    basis = np.einsum("uy,vx,kc->yxcuvk", waves, waves, opponents).reshape(3 * block**2, -1)
    u, v, k = np.meshgrid(i, i, np.arange(3), indexing="ij")
    order = np.argsort((np.hypot(u, v) + 2.0 * (k > 0)).ravel(), kind="stable")
    return basis[:, order[:count]].astype(np.float32)


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
        self.linear_path = (
            LinearPath(config.downsampling, z, **common) if config.linear_path else None
        )
        if config.linear_path:
            # What the networks add starts at 0, the posterior with a standard deviation of 0.14.
            for last, bias in (
                (self.quantize_in, [0.0] * z + [-4.0] * z),
                (self.decoder.conv_out, 0.0),
            ):
                last.kernel[...] = jnp.zeros_like(last.kernel[...])
                last.bias[...] = jnp.zeros_like(last.bias[...]) + jnp.asarray(bias)

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
        if self.linear_path:
            mean += self.linear_path.latents(images)
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
        images = self.decoder(self.quantize_out(latents)).astype(jnp.float32)
        return images + self.linear_path.images(latents) if self.linear_path else images
