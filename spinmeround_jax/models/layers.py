"""Parts shared by the UNet and the autoencoder. Images and feature maps are (n, h, w, c) everywhere.

Compute runs in the `dtype` given at construction; parameters are float32, and the statistics of every
norm are float32 whatever `dtype` is.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx

ZEROS = nnx.initializers.zeros_init()


def group_norm(
    channels: int, groups: int, epsilon: float, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.GroupNorm:
    """GroupNorm over `groups` groups; two-pass variance, as E[x^2] - E[x]^2 cancels on large means."""
    return nnx.GroupNorm(
        channels, groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs
    )


def conv(
    channels_in: int, channels_out: int, size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, **options
) -> nnx.Conv:
    """`size` x `size` convolution, zero-padded symmetrically so that stride 1 keeps the shape."""
    margin = size // 2
    options = {"padding": ((margin, margin), (margin, margin)), **options}
    return nnx.Conv(
        channels_in,
        channels_out,
        (size, size),
        conv_general_dilated=_convolve,
        dtype=dtype,
        rngs=rngs,
        **options,
    )


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    **options,
) -> jax.Array:
    """lax.conv_general_dilated; maps smaller than the kernel become one matrix product over patches.

    XLA's CPU backend runs a scalar loop there (2 x 2 maps, 3 x 3 kernel: 30 to 60 times slower), and the
    deepest level of a small model is such a map.
    """
    rows, columns = (
        (x.shape[axis + 1] + sum(padding[axis]) - kernel.shape[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )
    if rows >= kernel.shape[0] and columns >= kernel.shape[1]:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    patches = [
        x[:, i : i + rows * strides[0] : strides[0], j : j + columns * strides[1] : strides[1]]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def linear(
    channels_in: int, channels_out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, **options
) -> nnx.Linear:
    """Linear layer on the last axis."""
    return nnx.Linear(
        channels_in, channels_out, dot_general=_product, dtype=dtype, rngs=rngs, **options
    )


def _product(x: jax.Array, kernel: jax.Array, dimension_numbers, **options) -> jax.Array:
    return _matmul(x, kernel)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel, whose kernel gradient is x^T g and not JAX's (g^T x)^T.

    With several leading axes XLA's CPU backend copies a transposed g for the latter (3 times slower).
    """
    return x @ kernel


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return x @ kernel, (x, kernel)


def _matmul_backward(residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    leading = tuple(range(x.ndim - 1))
    return g @ kernel.T, jnp.tensordot(x, g, axes=(leading, leading))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def timestep_embedding(c_noise: jax.Array, channels: int, max_period: float = 10000.0) -> jax.Array:
    """Sinusoidal features of (n,) noise labels: (n, channels) float32, the cosines first (SPEC section 2)."""
    half = channels // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    phases = c_noise.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1)


class TimeEmbedding(nnx.Module):
    """c_noise -> the vector every residual block of the UNet adds to its features."""

    def __init__(self, channels: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.channels = channels
        self.linear_1 = linear(channels, width, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, c_noise: jax.Array) -> jax.Array:
        """(n,) -> (n, width)."""
        return self.linear_2(nnx.silu(self.linear_1(timestep_embedding(c_noise, self.channels))))


class ResidualBlock(nnx.Module):
    """norm, SiLU, conv (+ time) twice, beside a 1x1 shortcut where the width changes.

    The second convolution starts at zero, so that a new block is its own shortcut.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        time_width: int | None,
        norm_groups: int,
        norm_epsilon: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        norm = {"groups": norm_groups, "epsilon": norm_epsilon, "dtype": dtype, "rngs": rngs}
        common = {"dtype": dtype, "rngs": rngs}
        self.norm_1 = group_norm(channels_in, **norm)
        self.conv_1 = conv(channels_in, channels_out, 3, **common)
        self.time = linear(time_width, channels_out, **common) if time_width else None
        self.norm_2 = group_norm(channels_out, **norm)
        self.conv_2 = conv(channels_out, channels_out, 3, kernel_init=ZEROS, **common)
        changes_width = channels_in != channels_out
        self.shortcut = conv(channels_in, channels_out, 1, **common) if changes_width else None

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """x (n, h, w, channels_in), time (n, time_width) -> (n, h, w, channels_out)."""
        h = self.conv_1(nnx.silu(self.norm_1(x)))
        if self.time is not None:
            h = h + self.time(nnx.silu(time))[:, None, None, :]
        h = self.conv_2(nnx.silu(self.norm_2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


def upsample_nearest(x: jax.Array) -> jax.Array:
    """(n, h, w, c) -> (n, 2h, 2w, c)."""
    return repeat(x, "n h w c -> n (h y) (w x) c", y=2, x=2)
