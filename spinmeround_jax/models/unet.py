"""The multi-view denoising UNet: Stable Diffusion 1.5's, with attention across views."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from spinmeround_jax.models.attention import PLAIN, Execution, ViewTransformer
from spinmeround_jax.models.layers import (
    ZEROS,
    GroupNorm,
    Keys,
    ResidualBlock,
    TimeEmbedding,
    conv,
    upsample_nearest,
)

NORM_EPSILON = 1e-5  # of residual blocks and the output; the transformers' norm has 1e-6


def _is_product_or_kernel(primitive: jax.extend.core.Primitive, *args: Any, **kw: Any) -> bool:
    """Products with weights, and attention by `flash_attention`: as much to keep as its queries."""
    return primitive.name in ("conv_general_dilated", "pallas_call") or (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **kw)
    )


# What the backward pass recomputes of a residual block and its transformer.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "nothing": lambda block: block,
    "elementwise": functools.partial(jax.checkpoint, policy=_is_product_or_kernel),
    "blocks": jax.checkpoint,  # stores block inputs only: least memory, a third more arithmetic
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Shape of the UNet. Level l works at 1 / 2^l of the latent resolution.

    Raises:
        ValueError: widths, groups, heads and levels do not fit together.
    """

    in_channels: int = 153  # noisy latents 8 + raymap 144 + mask 1
    out_channels: int = 8
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2  # per level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (0, 1, 2)  # levels with transformers; the middle has one
    joint_levels: tuple[int, ...] = (1, 2)  # of these, self-attention over all views
    heads: int = 8
    transformer_depth: int = 1
    context_dim: int = 768
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if self.model_channels % 2:
            raise ValueError(f"model_channels must be even, got {self.model_channels}")
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups {self.norm_groups} does not divide width {width}")
        for level in {*self.attention_levels, len(self.channel_mult) - 1}:
            if not 0 <= level < len(self.channel_mult):
                raise ValueError(f"attention_levels: no level {level} in {self.channel_mult}")
            if self.widths[level] % self.heads:
                raise ValueError(f"heads {self.heads} does not divide width {self.widths[level]}")
        if extra := set(self.joint_levels) - set(self.attention_levels):
            raise ValueError(f"joint_levels {sorted(extra)} are not among attention_levels")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.model_channels * multiple for multiple in self.channel_mult)

    @property
    def time_width(self) -> int:
        return 4 * self.model_channels


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by a transformer if the level has any."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        widths_in: list[int],
        *,
        dtype: jnp.dtype,
        rngs: Keys,
    ):
        width = config.widths[level]
        block, transformer = _parts(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(block(width_in, width) for width_in in widths_in)
        self.transformers = nnx.List(
            transformer(width, joint=level in config.joint_levels)
            for _ in widths_in
            if level in config.attention_levels
        )

    def apply(
        self,
        index: int,
        x: jax.Array,
        time: jax.Array,
        context: jax.Array,
        views: int,
        execution: Execution,
    ) -> jax.Array:
        """Residual block `index` and its transformer, if any."""
        x = self.blocks[index](x, time)
        if self.transformers:
            x = self.transformers[index](x, context, views, execution)
        return x


class MultiViewUNet(nnx.Module):
    """F(x; c_noise, context) for all views of an example together."""

    def __init__(self, config: UNetConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        common = {"dtype": dtype, "rngs": Keys(rngs)}
        widths = config.widths
        last = len(widths) - 1

        self.time_embedding = TimeEmbedding(config.model_channels, config.time_width, **common)
        self.conv_in = conv(config.in_channels, config.model_channels, 3, **common)

        # `skips` are the widths of the activations that the way down leaves for the way up.
        width, skips = config.model_channels, [config.model_channels]
        self.down, self.downsamples = nnx.List(), nnx.List()
        for level, level_width in enumerate(widths):
            widths_in = [width] + [level_width] * (config.res_blocks - 1)
            self.down.append(Level(config, level, widths_in, **common))
            width = level_width
            skips += [width] * config.res_blocks
            if level != last:
                self.downsamples.append(conv(width, width, 3, strides=2, **common))
                skips.append(width)

        block, transformer = _parts(config, **common)
        self.middle_1 = block(width, width)
        self.middle_transformer = transformer(width, joint=True)
        self.middle_2 = block(width, width)

        # In order of execution: the coarsest level first.
        self.up, self.upsamples = nnx.List(), nnx.List()
        for level in reversed(range(len(widths))):
            widths_in = []
            for _ in range(config.res_blocks + 1):
                widths_in.append(width + skips.pop())
                width = widths[level]
            self.up.append(Level(config, level, widths_in, **common))
            if level:
                self.upsamples.append(conv(width, width, 3, **common))

        self.norm_out = GroupNorm(width, config.norm_groups, NORM_EPSILON, **common)
        self.conv_out = conv(width, config.out_channels, 3, kernel_init=ZEROS, **common)

    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        context: jax.Array,
        execution: Execution = PLAIN,
    ) -> jax.Array:
        """Network output before preconditioning.

        Args:
            x: (b, v, h, w, in_channels); h and w divisible by 2^(levels - 1).
            c_noise: (b,), or (b, v) for a noise level per view.
            context: (b, t, context_dim) shared by the views, or (b, v, t, context_dim).
            execution: changes time and memory only. If it splits the views, v counts those of this device.

        Returns:
            (b, v, h, w, out_channels) float32.
        """
        batch, views = x.shape[:2]
        rematerialised = REMAT[execution.remat]

        def apply(stage: Level, index: int, x: jax.Array) -> jax.Array:
            block = functools.partial(stage.apply, index, views=views, execution=execution)
            return rematerialised(block)(x, time, context)

        c_noise = jnp.broadcast_to(c_noise.reshape(batch, -1), (batch, views))
        time = self.time_embedding(rearrange(c_noise, "b v -> (b v)"))

        x = self.conv_in(rearrange(x, "b v h w c -> (b v) h w c"))
        skips = [x]
        for level, stage in enumerate(self.down):
            for index in range(len(stage.blocks)):
                x = apply(stage, index, x)
                skips.append(x)
            if level < len(self.downsamples):
                x = self.downsamples[level](x)
                skips.append(x)

        x = self.middle_1(x, time)
        x = self.middle_transformer(x, context, views, execution)
        x = self.middle_2(x, time)

        for step, stage in enumerate(self.up):
            for index in range(len(stage.blocks)):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = apply(stage, index, x)
            if step < len(self.upsamples):
                x = self.upsamples[step](upsample_nearest(x))

        x = self.conv_out(self.norm_out(x, silu=True))
        return rearrange(x, "(b v) h w c -> b v h w c", v=views).astype(jnp.float32)


def _parts(
    config: UNetConfig, *, dtype: jnp.dtype, rngs: Keys
) -> tuple[Callable[..., ResidualBlock], Callable[..., ViewTransformer]]:
    """Constructors of blocks (width in, width out) and of transformers (width, joint=...)."""
    common = {"norm_groups": config.norm_groups, "dtype": dtype, "rngs": rngs}
    block = functools.partial(
        ResidualBlock, time_width=config.time_width, norm_epsilon=NORM_EPSILON, **common
    )
    shape = {"heads": config.heads, "depth": config.transformer_depth}
    transformer = functools.partial(
        ViewTransformer, context_dim=config.context_dim, **shape, **common
    )
    return block, transformer
