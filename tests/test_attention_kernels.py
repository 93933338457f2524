"""The kernels of accelerators equal plain attention; splash runs here in Pallas' interpreter."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax.models import attention_kernels
from spinmeround_jax.models.attention import attention


def tokens(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize(
    ("s", "t", "heads", "d"),
    [(256, 256, 2, 40), (128, 77, 2, 80), (150, 150, 1, 160), (128, 768, 1, 40)],
)
def test_splash_equals_plain_attention_and_so_do_its_gradients(s, t, heads, d):
    q, k, v = tokens(1, s, heads, d), tokens(1, t, heads, d, seed=1), tokens(1, t, heads, d, seed=2)
    weight = tokens(1, s, heads, d, seed=3)
    splash = functools.partial(attention_kernels.splash, interpret=True)
    assert attention_kernels.fits("splash", q, k)
    np.testing.assert_allclose(splash(q, k, v), attention(q, k, v), atol=2e-5)
    ours, plain = (
        jax.grad(lambda *x, f=f: jnp.sum(weight * f(*x)), argnums=(0, 1, 2))(q, k, v)
        for f in (splash, attention)
    )
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_splash_in_half_precision():
    q, k, v = (tokens(2, 128, 2, 40, seed=i, dtype=jnp.bfloat16) for i in range(3))
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    found = attention_kernels.splash(q, k, v, interpret=True)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=2e-2)


def test_kernels_are_taken_where_they_fit():
    half, single = (tokens(1, 128, 2, 40, dtype=kind) for kind in (jnp.bfloat16, jnp.float32))
    assert attention_kernels.fits("splash", single, single)
    assert attention_kernels.fits("cudnn", half, half)
    assert not attention_kernels.fits("cudnn", single, single)
    assert not attention_kernels.fits("plain", half, half)
    few, wide = tokens(1, 64, 2, 40), tokens(1, 128, 1, 512)
    assert not attention_kernels.fits("splash", few, single)
    assert not attention_kernels.fits("splash", wide, wide)
    # Where it does not fit, asking for it is no error; nor is a mask, which it does not have.
    np.testing.assert_array_equal(
        attention(few, few, few, kernel="splash"), attention(few, few, few)
    )
    masked = attention(single, single, single, causal=True, kernel="splash")
    np.testing.assert_array_equal(masked, attention(single, single, single, causal=True))


def test_a_kernel_that_does_not_run_is_replaced_with_one_line(monkeypatch, caplog):
    assert attention_kernels.best_for(jax.devices()[0], jnp.dtype("bfloat16")) == "plain"

    class Gpu:
        platform = "gpu"

    device = Gpu()
    best_for = attention_kernels.best_for.__wrapped__
    assert best_for(device, jnp.dtype("bfloat16")) == "cudnn"  # compiled for, not here
    assert best_for(device, jnp.dtype("float32")) == "plain"
    here = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jnp, "zeros", lambda shape, dtype, device: np.zeros(shape, dtype))
    with caplog.at_level(logging.WARNING):
        assert best_for(device, jnp.dtype("bfloat16")) == "plain"  # cuDNN cannot run on a CPU
    assert len(caplog.records) == 1 and "cudnn attention does not run here" in caplog.text
    assert here.platform == "cpu"
