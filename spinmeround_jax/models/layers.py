"""Parts shared by the networks. Images and feature maps are (n, h, w, c) everywhere.

Networks compute in the `dtype` given at construction; parameters and the statistics of every norm are float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from spinmeround_jax.models import precision

ZEROS = nnx.initializers.zeros_init()


class Keys:
    """Source of initialisation keys inside a network, instead of nnx.Rngs.

    nnx.Rngs counts in an array, which `eval_shape` and `jit` trace once per parameter: 8 s for a UNet, less
    than 1 s with a Python counter.
    """

    def __init__(self, rngs: nnx.Rngs):
        self._key = rngs.params()
        self._count = 0

    def params(self) -> jax.Array:
        """A new key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def normalise(
    average: Callable[[jax.Array], jax.Array],
    epsilon: float,
    silu: bool,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    """(x - mean) / deviation * scale + bias, then SiLU if asked for, all in float32.

    The backward pass stores `x` in its own dtype and the statistics; JAX's would store three or four arrays of
    its size, some in float32.

    Args:
        average: mean over the elements normalised together, in a shape that broadcasts to x's.
        x: (..., c), of any dtype, which the output has, too.
        scale, bias: (c,).
    """
    return _normalise_forward(average, epsilon, silu, x, scale, bias)[0]


def _normalise_forward(average, epsilon, silu, x, scale, bias):
    mean = average(x.astype(jnp.float32))
    centred = x.astype(jnp.float32) - mean
    # Two passes, as E[x^2] - E[x]^2 cancels on large means.
    inverse = jax.lax.rsqrt(average(centred**2) + epsilon)
    out = centred * (inverse * scale) + bias
    return (nnx.silu(out) if silu else out).astype(x.dtype), (x, scale, bias, mean, inverse)


def _normalise_backward(average, epsilon, silu, residuals, g):
    del epsilon
    x, scale, bias, mean, inverse = residuals

    def before_scale(g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The gradient before SiLU, and the normalised x."""
        g, unit = g.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
        if silu:
            out = unit * scale + bias
            half = jax.nn.sigmoid(out)
            g = g * half * (1 + out * (1 - half))
        return g, unit

    inner, unit = before_scale(g)
    leading = tuple(range(x.ndim - 1))
    dscale, dbias = jnp.sum(inner * unit, axis=leading), jnp.sum(inner, axis=leading)
    means = average(inner * scale), average(inner * scale * unit)
    if g.dtype != jnp.float32:
        # Else XLA makes the layer above write g in float32, for both uses.
        g, *means = jax.lax.optimization_barrier((g, *means))
        inner, unit = before_scale(g)
    dx = inverse * (inner * scale - means[0] - unit * means[1])
    return dx.astype(x.dtype), dscale, dbias


normalise.defvjp(_normalise_forward, _normalise_backward)


@jax.custom_vjp
def gated(hidden: jax.Array, gate: jax.Array) -> jax.Array:
    """hidden * GELU(gate), GELU with the error function (arXiv 1606.08415).

    The backward pass stores these two arrays; JAX's would store three. JAX computes GELU by erfc, which is
    slower and more exact only where GELU is almost 0.
    """
    return _gated_forward(hidden, gate)[0]


def _gated_forward(hidden, gate):
    x = gate.astype(jnp.float32)
    return (hidden * x * _normal_distribution(x)).astype(hidden.dtype), (hidden, gate)


def _gated_backward(residuals, g):
    hidden, gate = residuals
    x, below = gate.astype(jnp.float32), _normal_distribution(gate.astype(jnp.float32))
    density = jnp.exp(-0.5 * x**2) * (2 * math.pi) ** -0.5
    return (g * x * below).astype(g.dtype), (g * hidden * (below + x * density)).astype(g.dtype)


gated.defvjp(_gated_forward, _gated_backward)


def _normal_distribution(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * 2**-0.5)


class LayerNorm(nnx.Module):
    """Normalisation over the channels of (..., c) (arXiv 1607.06450)."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: Keys):
        del rngs  # an argument of all layers; nothing here is random
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        return normalise(_channel_mean, 1e-5, False, x, self.scale[...], self.bias[...])


class GroupNorm(nnx.Module):
    """Normalisation over space and a group of channels of (n, h, w, c) (arXiv 1803.08494)."""

    def __init__(self, channels: int, groups: int, epsilon: float, *, dtype: jnp.dtype, rngs: Keys):
        del rngs
        self.groups = groups
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array, silu: bool = False) -> jax.Array:
        x, average = x.astype(self.dtype), functools.partial(_group_mean, self.groups)
        return normalise(average, self.epsilon, silu, x, self.scale[...], self.bias[...])


def _channel_mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=-1, keepdims=True)


def _group_mean(groups: int, x: jax.Array) -> jax.Array:
    """(n, 1, 1, c), equal within each group.

    Space is reduced before channels: both at once are 4 to 7 times slower on a CPU.
    """
    per_channel = jnp.mean(x, axis=(1, 2))
    per_group = jnp.mean(rearrange(per_channel, "n (g c) -> n g c", g=groups), axis=-1)
    return jnp.repeat(per_group, x.shape[-1] // groups, axis=-1)[:, None, None]


def conv(
    channels_in: int, channels_out: int, size: int, *, dtype: jnp.dtype, rngs: Keys, **options
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
    """lax.conv_general_dilated; on a CPU a matrix product over patches if that is faster.

    XLA's CPU backend runs a scalar loop on maps smaller than the kernel (30 to 60 times slower), and uses
    threads badly with fewer positions than channels (1.7 to 2.7 times slower).
    """
    options["precision"] = precision.of(x.dtype)
    rows, columns = (
        (x.shape[axis + 1] + sum(padding[axis]) - kernel.shape[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )

    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        patches = [
            x[:, i : i + rows * strides[0] : strides[0], j : j + columns * strides[1] : strides[1]]
            for i in range(kernel.shape[0])
            for j in range(kernel.shape[1])
        ]
        kernel = kernel.reshape(-1, kernel.shape[-1])
        return jnp.matmul(
            jnp.concatenate(patches, axis=-1), kernel, precision=precision.of(x.dtype)
        )

    enough = len(x) * rows * columns >= kernel.shape[-1]
    if enough and rows >= kernel.shape[0] and columns >= kernel.shape[1]:
        return convolution(x, kernel)
    # With the checkpoint the backward pass does not store the patches, on any platform.
    by_platform = functools.partial(jax.lax.platform_dependent, cpu=product, default=convolution)
    return jax.checkpoint(by_platform)(x, kernel)


def linear(
    channels_in: int, channels_out: int, *, dtype: jnp.dtype, rngs: Keys, **options
) -> nnx.Linear:
    """Linear layer on the last axis."""
    return nnx.Linear(
        channels_in, channels_out, dot_general=_product, dtype=dtype, rngs=rngs, **options
    )


def row_major(x: jax.Array) -> jax.Array:
    """`x` in row-major memory layout.

    Convolutions and matrix products prefer different layouts on a TPU. Without this constraint XLA changes the
    layout at every second operation of a transformer.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def in_parts(layer: nnx.Linear, x: jax.Array, parts: int) -> list[jax.Array]:
    """The output of a linear layer in equal parts, each computed by its own product.

    Splitting one wide output would write and read it once more.
    """
    x, kernel, bias = layer.promote_dtype(
        (x, layer.kernel[...], layer.bias[...]), dtype=layer.dtype
    )
    halves = zip(jnp.split(kernel, parts, axis=-1), jnp.split(bias, parts), strict=True)
    return [_matmul(x, kernel) + bias for kernel, bias in halves]


def _product(x: jax.Array, kernel: jax.Array, dimension_numbers, **options) -> jax.Array:
    return _matmul(x, kernel)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel, whose kernel gradient is x^T g and not JAX's (g^T x)^T.

    For the latter XLA's CPU backend copies a transposed g if there are several leading axes.
    """
    return jnp.matmul(x, kernel, precision=precision.of(x.dtype))


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return jnp.matmul(x, kernel, precision=precision.of(x.dtype)), (x, kernel)


def _matmul_backward(residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    leading = tuple(range(x.ndim - 1))
    how = precision.of(x.dtype)
    return (
        jnp.matmul(g, kernel.T, precision=how),
        jnp.tensordot(x, g, axes=(leading, leading), precision=how),
    )


_matmul.defvjp(_matmul_forward, _matmul_backward)


def timestep_embedding(c_noise: jax.Array, channels: int, max_period: float = 10000.0) -> jax.Array:
    """Sinusoidal features of (n,) noise labels: (n, channels) float32, cosines first, as released."""
    half = channels // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    phases = c_noise.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(phases), jnp.sin(phases)], axis=-1)


class TimeEmbedding(nnx.Module):
    """c_noise -> the vector that every residual block of the UNet adds to its features."""

    def __init__(self, channels: int, width: int, *, dtype: jnp.dtype, rngs: Keys):
        self.channels = channels
        self.linear_1 = linear(channels, width, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, c_noise: jax.Array) -> jax.Array:
        """(n,) -> (n, width)."""
        return self.linear_2(nnx.silu(self.linear_1(timestep_embedding(c_noise, self.channels))))


class ResidualBlock(nnx.Module):
    """norm, SiLU, conv (+ time), twice, plus a shortcut, which is a 1x1 conv if the width changes.

    The second convolution starts at zero: a new block is its shortcut.
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
        rngs: Keys,
    ):
        norm = {"groups": norm_groups, "epsilon": norm_epsilon, "dtype": dtype, "rngs": rngs}
        common = {"dtype": dtype, "rngs": rngs}
        self.norm_1 = GroupNorm(channels_in, **norm)
        self.conv_1 = conv(channels_in, channels_out, 3, **common)
        self.time = linear(time_width, channels_out, **common) if time_width else None
        self.norm_2 = GroupNorm(channels_out, **norm)
        self.conv_2 = conv(channels_out, channels_out, 3, kernel_init=ZEROS, **common)
        changes_width = channels_in != channels_out
        self.shortcut = conv(channels_in, channels_out, 1, **common) if changes_width else None

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """x (n, h, w, channels_in), time (n, time_width) -> (n, h, w, channels_out)."""
        h = self.conv_1(self.norm_1(x, silu=True))
        if self.time is not None:
            h = h + self.time(nnx.silu(time))[:, None, None, :]
        h = self.conv_2(self.norm_2(h, silu=True))
        return h + (x if self.shortcut is None else self.shortcut(x))


def upsample_nearest(x: jax.Array) -> jax.Array:
    """(n, h, w, c) -> (n, 2h, 2w, c)."""
    return repeat(x, "n h w c -> n (h y) (w x) c", y=2, x=2)
