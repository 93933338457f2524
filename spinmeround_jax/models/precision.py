"""float32 means float32: by default JAX rounds its products to one bfloat16 pass on TPU, to TF32 on NVIDIA."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp


def of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """The precision of products of `dtype`: full for float32; others have one only."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def exact_float32(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """Where products cannot be told their precision, such as in `jax.nn.dot_product_attention`."""
    return (
        jax.default_matmul_precision("highest")
        if dtype == jnp.float32
        else contextlib.nullcontext()
    )
