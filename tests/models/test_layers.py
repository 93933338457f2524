"""Layers with a backward pass of their own, against JAX's of the same formula."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spinmeround_jax.models import layers
from spinmeround_jax.models.unet import MultiViewUNet
from tests.support import tiny_model

# Of bfloat16's 8 bits; gradients are sums of products of rounded numbers.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def values_and_gradients(f, dtype, *inputs):
    """The first input is of `dtype`, so is the output; float32 is compared."""

    def loss(first, *rest):
        return jnp.sum(weight * f(first.astype(dtype), *rest).astype(jnp.float32))

    weight = numbers(*inputs[0].shape, seed=9)
    gradients = jax.jit(jax.grad(loss, tuple(range(len(inputs)))))(*inputs)
    return [f(inputs[0].astype(dtype), *inputs[1:]).astype(jnp.float32), *gradients]


def plain_norm(axes, groups, silu, x, scale, bias):
    n, h, w, c = x.shape
    x = x.astype(jnp.float32).reshape(n, h, w, groups, c // groups)
    mean, variance = (f(x, axis=axes, keepdims=True) for f in (jnp.mean, jnp.var))
    out = ((x - mean) / jnp.sqrt(variance + 1e-5)).reshape(n, h, w, c) * scale + bias
    return nnx.silu(out) if silu else out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["group", "group and SiLU", "layer"])
def test_norms(kind, dtype):
    x, scale, bias = (
        3 * numbers(2, 4, 4, 16) + 1,
        1 + 0.1 * numbers(16, seed=1),
        numbers(16, seed=2),
    )
    silu = kind == "group and SiLU"
    if kind == "layer":
        average, plain = layers._channel_mean, functools.partial(plain_norm, (4,), 1, silu)
    else:
        average = functools.partial(layers._group_mean, 4)
        plain = functools.partial(plain_norm, (1, 2, 4), 4, silu)
    ours = functools.partial(layers.normalise, average, 1e-5, silu)
    assert ours(x.astype(dtype), scale, bias).dtype == dtype
    compare(ours, plain, dtype, x, scale, bias)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gated(dtype):
    def plain(hidden, gate):
        return hidden * nnx.gelu(gate, approximate=False)

    hidden, gate = numbers(3, 50), 3 * numbers(3, 50, seed=1)
    assert layers.gated(hidden.astype(dtype), gate.astype(dtype)).dtype == dtype
    compare(lambda h, g: layers.gated(h, g.astype(h.dtype)), plain, dtype, hidden, gate)


def compare(ours, plain, dtype, *inputs):
    exact = values_and_gradients(
        plain, jnp.float32, inputs[0].astype(dtype).astype(jnp.float32), *inputs[1:]
    )
    for a, b in zip(values_and_gradients(ours, dtype, *inputs), exact, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * abs(b).max())


def test_the_layout_of_tokens_changes_no_number():
    x = numbers(2, 3, 4, 5)
    found = jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(layers.row_major(x) ** 2))))(x)
    np.testing.assert_array_equal(found, 2 * x)


def test_products_of_float32_are_exact_on_every_device():
    """By default they are one pass of bfloat16 on TPU, and TF32 on NVIDIA; backward passes, too."""
    config = tiny_model.CONFIG.unet
    network = nnx.eval_shape(lambda: MultiViewUNet(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(network)
    inputs = (
        numbers(1, 2, 8, 8, config.in_channels),
        numbers(1),
        numbers(1, 7, config.context_dim),
    )

    def loss(params):
        return jnp.sum(nnx.merge(graphdef, params)(*inputs).astype(jnp.float32))

    found = list(products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert len(found) > 40
    for kinds, precision in found:
        assert kinds == {jnp.dtype("float32")}
        assert set(precision or ()) == {jax.lax.Precision.HIGHEST}


def products(jaxpr):
    """(dtypes of the operands, precision) of every product and convolution, but those of the CPU alone."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield {v.aval.dtype for v in equation.invars}, equation.params["precision"]
        inner = list(jax.extend.core.jaxprs_in_params(equation.params))
        if (
            equation.primitive.name == "cond" and len(inner) == 2
        ):  # platform_dependent: CPU, then others
            inner = inner[1:]
        for each in inner:
            yield from products(each)
