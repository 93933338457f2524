"""Attention inside views, over all views of an example, and to the identity context."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from spinmeround_jax.models import attention_kernels
from spinmeround_jax.models.layers import (
    ZEROS,
    GroupNorm,
    Keys,
    LayerNorm,
    conv,
    gated,
    in_parts,
    linear,
    row_major,
)
from spinmeround_jax.models.precision import exact_float32

# Bytes of all logits above which the CPU path computes one example at a time, so that logits stay in the
# cache: 5 times faster for 8 examples of 4 heads and 512 tokens.
_CPU_LOGITS_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Execution:
    """Execution options of a network; results are equal up to rounding.

    Attributes:
        view_axis: mesh axis over which the views of an example are split, inside `shard_map`.
        remat: what the backward pass recomputes instead of storing it, a key of `unet.REMAT`.
        kernel: of attention, see `attention_kernels`; kernels of accelerators cannot be partitioned and need
            `shard_map` with several devices.
    """

    view_axis: str | None = None
    remat: str = "nothing"
    kernel: str = "plain"


PLAIN = Execution()


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False, kernel: str = "plain"
) -> jax.Array:
    """Softmax attention, q (n, s, heads, d), k and v (n, t, heads, d) -> (n, s, heads, d).

    All attention of this package uses it. The softmax is float32 for every input dtype, and the backward
    pass recomputes the (s, t) probabilities instead of storing them.

    Args:
        kernel: used if it supports these shapes and there is no mask.
    """
    if not causal and attention_kernels.fits(kernel, q, k):
        return attention_kernels.KERNELS[kernel](q, k, v)

    @jax.checkpoint
    def platform_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(
            q,
            k,
            v,
            cpu=functools.partial(attention_on_cpu, causal=causal),
            default=functools.partial(jax.nn.dot_product_attention, is_causal=causal),
        )

    with exact_float32(q.dtype):
        return platform_attention(q, k, v)


def attention_on_cpu(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    """As `attention`, as plain matrix products: XLA's CPU backend is slow for other einsums."""

    scale = q.shape[-1] ** -0.5

    def one(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """(..., heads, s, d), (..., heads, t, d) twice -> (..., heads, s, d)."""
        # In 16 bits scaled after the product, which is exact; in float32 before it, where there is less.
        before, after = (1.0, scale) if q.dtype.itemsize < 4 else (scale, 1.0)
        logits = after * jnp.matmul(
            before * q, jnp.swapaxes(k, -1, -2), preferred_element_type=jnp.float32
        )
        if causal:
            logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, -jnp.inf)
        return nnx.softmax(logits, axis=-1).astype(v.dtype) @ v

    q, k, v = (jnp.swapaxes(tokens, 1, 2) for tokens in (q, k, v))
    if 4 * math.prod(q.shape[:3]) * k.shape[2] > _CPU_LOGITS_BYTES and q.shape[0] > 1:
        out = jax.lax.map(jax.checkpoint(lambda example: one(*example)), (q, k, v))
    else:
        out = one(q, k, v)
    return jnp.swapaxes(out, 1, 2)


class MultiHeadAttention(nnx.Module):
    """Queries from `x`, keys and values from `context`; no mask."""

    def __init__(self, width: int, context_width: int, heads: int, *, dtype: jnp.dtype, rngs: Keys):
        self.heads = heads
        self.query = linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.key = linear(context_width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.value = linear(context_width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array,
        kernel: str = "plain",
        context_axis: str | None = None,
    ) -> jax.Array:
        """x (n, s, width), context (n, t, context_width) -> (n, s, width).

        Args:
            context_axis: mesh axis over which the t tokens are split; they are gathered.
        """
        q, k, v = (
            rearrange(tokens, "n s (heads d) -> n s heads d", heads=self.heads)
            for tokens in (self.query(x), self.key(context), self.value(context))
        )
        if context_axis:
            k, v = (jax.lax.all_gather(x, context_axis, axis=1, tiled=True) for x in (k, v))
        return self.out(
            rearrange(attention(q, k, v, kernel=kernel), "n s heads d -> n s (heads d)")
        )


class GatedFeedForward(nnx.Module):
    """GEGLU (Shazeer, arXiv 2002.05202), hidden width 4x; `project`'s second half is the gate."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: Keys):
        self.project = linear(width, 8 * width, dtype=dtype, rngs=rngs)
        self.out = linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, gate = in_parts(self.project, x, 2)
        return self.out(gated(hidden, gate))


class TransformerBlock(nnx.Module):
    """Self-attention (inside each view or jointly over all), cross-attention, feed-forward."""

    def __init__(
        self,
        width: int,
        context_dim: int,
        heads: int,
        *,
        joint: bool,
        dtype: jnp.dtype,
        rngs: Keys,
    ):
        self.joint = joint
        common = {"dtype": dtype, "rngs": rngs}
        self.norm_1 = LayerNorm(width, **common)
        self.self_attention = MultiHeadAttention(width, width, heads, **common)
        self.norm_2 = LayerNorm(width, **common)
        self.cross_attention = MultiHeadAttention(width, context_dim, heads, **common)
        self.norm_3 = LayerNorm(width, **common)
        self.feed_forward = GatedFeedForward(width, **common)

    def __call__(self, x: jax.Array, context: jax.Array, execution: Execution = PLAIN) -> jax.Array:
        """x (b, v, n, width), context (b, t, d) or (b, v, t, d) -> (b, v, n, width)."""
        x = x + self._self_attention(self.norm_1(x), execution)
        x = x + self._cross_attention(self.norm_2(x), context, execution)
        return x + self.feed_forward(self.norm_3(x))

    def _self_attention(self, x: jax.Array, execution: Execution) -> jax.Array:
        views = x.shape[1]
        if self.joint:
            x = rearrange(x, "b v n c -> b (v n) c")
            out = self.self_attention(x, x, execution.kernel, execution.view_axis)
            return rearrange(out, "b (v n) c -> b v n c", v=views)
        x = rearrange(x, "b v n c -> (b v) n c")
        return rearrange(
            self.self_attention(x, x, execution.kernel), "(b v) n c -> b v n c", v=views
        )

    def _cross_attention(self, x: jax.Array, context: jax.Array, execution: Execution) -> jax.Array:
        views = x.shape[1]
        if context.ndim == 3:
            # One context per example: its keys and values are shared by all views.
            x = rearrange(x, "b v n c -> b (v n) c")
            out = self.cross_attention(x, context, execution.kernel)
            return rearrange(out, "b (v n) c -> b v n c", v=views)
        x = rearrange(x, "b v n c -> (b v) n c")
        context = rearrange(context, "b v t d -> (b v) t d")
        out = self.cross_attention(x, context, execution.kernel)
        return rearrange(out, "(b v) n c -> b v n c", v=views)


class ViewTransformer(nnx.Module):
    """Transformer blocks on the feature maps of all views, added to their input.

    The output projection starts at zero, so that a new transformer is the identity.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int,
        heads: int,
        depth: int,
        *,
        joint: bool,
        norm_groups: int,
        dtype: jnp.dtype,
        rngs: Keys,
    ):
        common = {"dtype": dtype, "rngs": rngs}
        self.norm = GroupNorm(channels, norm_groups, 1e-6, **common)
        self.project_in = conv(channels, channels, 1, **common)
        self.blocks = nnx.List(
            TransformerBlock(channels, context_dim, heads, joint=joint, **common)
            for _ in range(depth)
        )
        self.project_out = conv(channels, channels, 1, kernel_init=ZEROS, **common)

    def __call__(
        self, x: jax.Array, context: jax.Array, views: int, execution: Execution = PLAIN
    ) -> jax.Array:
        """x (b v, h, w, channels), context (b, t, d) or (b, v, t, d) -> (b v, h, w, channels)."""
        height = x.shape[1]
        tokens = rearrange(self.project_in(self.norm(x)), "(b v) h w c -> b v (h w) c", v=views)
        tokens = row_major(tokens)
        for block in self.blocks:
            tokens = block(tokens, context, execution)
        tokens = rearrange(row_major(tokens), "b v (h w) c -> (b v) h w c", h=height)
        return x + self.project_out(tokens)
