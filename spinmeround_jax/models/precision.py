"""Exact float32 products: by default JAX computes them in one bfloat16 pass on TPU, in TF32 on NVIDIA."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp


def of(dtype: jnp.dtype) -> jax.lax.Precision:
    """The precision of products of `dtype`: full for float32; other dtypes have only one.

    Not None, which stands for `jax_default_matmul_precision`: Pallas refuses some of its values.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def exact_float32(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """For products without a precision argument, as in `jax.nn.dot_product_attention`."""
    return (
        jax.default_matmul_precision("highest")
        if dtype == jnp.float32
        else contextlib.nullcontext()
    )
