"""The kernels of accelerators equal plain attention; those of TPUs run here in Pallas' interpreter."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from spinmeround_jax.models import ModelConfig, attention_kernels, flash_attention
from spinmeround_jax.models.attention import attention, attention_on_cpu
from spinmeround_jax.models.unet import REMAT


def tokens(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# A simulated TPU, whose memory is full of NaN before something is written to it.
SIMULATED = pltpu.InterpretParams(uninitialized_memory="nan")
TPU = {
    "flash": functools.partial(flash_attention.flash, interpret=SIMULATED),
    "splash": functools.partial(attention_kernels.splash, interpret=True),
}


@pytest.mark.parametrize("name", TPU)
@pytest.mark.parametrize(
    ("s", "t", "heads", "d"),
    [(256, 256, 2, 40), (128, 77, 2, 80), (150, 150, 1, 160), (128, 768, 1, 40)],
)
def test_kernels_equal_plain_attention_and_so_do_their_gradients(name, s, t, heads, d):
    q, k, v = tokens(1, s, heads, d), tokens(1, t, heads, d, seed=1), tokens(1, t, heads, d, seed=2)
    weight = tokens(1, s, heads, d, seed=3)
    kernel = TPU[name]
    np.testing.assert_allclose(kernel(q, k, v), attention(q, k, v), atol=2e-5)
    for a, b in zip(*(gradients(f, weight, q, k, v) for f in (kernel, attention)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def gradients(attend, weight, *inputs):
    return jax.grad(lambda *x: jnp.sum(weight * attend(*x)), argnums=(0, 1, 2))(*inputs)


@pytest.mark.parametrize("memory", [1, 2**40])  # nothing fits: the smallest blocks; everything
def test_blocks_of_any_size_give_the_same(memory, monkeypatch):
    q, k, v = (tokens(2, n, 1, 48, seed=n) for n in (200, 900, 901))
    v, weight = v[:, :900], tokens(2, 200, 1, 48, seed=1)
    monkeypatch.setattr(flash_attention, "_SMALLEST", memory)
    flash = TPU["flash"]
    np.testing.assert_allclose(flash(q, k, v), attention(q, k, v), atol=2e-5)
    for a, b in zip(*(gradients(f, weight, q, k, v) for f in (flash, attention)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_flash_takes_large_logits():
    q, k, v = (30 * tokens(1, 128, 1, 40, seed=i) for i in range(3))
    found = TPU["flash"](q, k, v)
    np.testing.assert_allclose(found, attention(q, k, v), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", TPU)
def test_kernels_in_half_precision(name):
    q, k, v = (tokens(2, 128, 2, 40, seed=i, dtype=jnp.bfloat16) for i in range(3))
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    found = TPU[name](q, k, v)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=2e-2)


@pytest.mark.parametrize("setting", ["highest", "tensorfloat32"])
def test_a_global_precision_is_not_asked_of_half_precision_products(setting):
    """Pallas' compiler for TPUs refuses them; its interpreter does not."""
    q = tokens(1, 128, 1, 40, dtype=jnp.bfloat16)
    with jax.default_matmul_precision(setting):
        program = jax.make_jaxpr(functools.partial(gradients, flash_attention.flash, q))(q, q, q)
    assert "flash_backward" in str(program) and "Precision.HIGH" not in str(program)


@pytest.mark.parametrize(("remat", "times"), [("nothing", 1), ("elementwise", 1), ("blocks", 2)])
def test_how_often_a_training_step_runs_the_forward_kernel(remat, times):
    q = tokens(1, 128, 1, 40)
    block = REMAT[remat](lambda q: jnp.sin(attention(q, q, q, kernel="flash")))
    program = jax.make_jaxpr(jax.grad(lambda q: jnp.sum(block(q))))(q)
    assert str(program).count("name=flash_forward") == times


@pytest.mark.parametrize("d", [40, 160])
def test_large_logits_are_rounded_no_more_than_by_plain_attention(d):
    """Logits of deviation 36, where rounding a scaled query alone is worth six times plain's error."""
    q, k = (6 * tokens(1, 256, 1, d, seed=i) for i in range(2))
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, tokens(1, 256, 1, d, seed=2)))
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)))

    def error(found):
        return jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)

    plain = error(jax.nn.dot_product_attention(q, k, v))
    assert error(TPU["flash"](q, k, v)) < 1.5 * plain
    assert error(attention_on_cpu(q, k, v, causal=False)) < 1.5 * plain


def test_kernels_are_taken_where_they_fit():
    half, single = (tokens(1, 128, 2, 40, dtype=kind) for kind in (jnp.bfloat16, jnp.float32))
    assert attention_kernels.fits("flash", single, single)
    assert attention_kernels.fits("splash", half, half)
    assert not attention_kernels.fits("splash", single, single)  # would round them to bfloat16
    assert attention_kernels.fits("cudnn", half, half)
    assert not attention_kernels.fits("cudnn", single, single)
    assert not attention_kernels.fits("plain", half, half)
    few, wide, odd = tokens(1, 64, 2, 40), tokens(1, 128, 1, 512), tokens(1, 128, 1, 42)
    for q in (few, wide, odd):
        assert not attention_kernels.fits("flash", q, q)
        q = q.astype(jnp.bfloat16)
        assert not attention_kernels.fits("splash", q, q)
    # Where it does not fit, asking for it is no error; nor is a mask, which it does not have.
    np.testing.assert_array_equal(
        attention(few, few, few, kernel="flash"), attention(few, few, few)
    )
    masked = attention(single, single, single, causal=True, kernel="flash")
    np.testing.assert_array_equal(masked, attention(single, single, single, causal=True))


def test_cudnn_is_given_an_even_number_of_keys(monkeypatch):
    """JAX refuses the gradient of others; the one that is added has no part in the softmax."""
    xla = jax.nn.dot_product_attention

    def instead(q, k, v, *, implementation, **options):
        assert implementation == "cudnn" and k.shape[1] % 2 == v.shape[1] % 2 == 0
        return xla(q, k, v, **options)

    q, k, v = tokens(2, 128, 2, 40), tokens(2, 77, 2, 40, seed=1), tokens(2, 77, 2, 40, seed=2)
    expected = attention(q, k, v), attention(q, k[:, :76], v[:, :76])
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    np.testing.assert_allclose(attention_kernels.cudnn(q, k, v), expected[0], atol=2e-6)
    even = attention_kernels.cudnn(q, k[:, :76], v[:, :76])
    np.testing.assert_allclose(even, expected[1], atol=2e-6)


class Device:
    def __init__(self, platform):
        self.platform = platform


@pytest.fixture
def there(monkeypatch):
    """Kernels are asked for as if this process had such devices; it has a CPU."""

    def pretend(*devices):
        here = jax.local_devices()[0]
        monkeypatch.setattr(jax, "devices", lambda: devices)
        monkeypatch.setattr(jax, "local_devices", lambda: [here])
        return attention_kernels.best_for.__wrapped__

    return pretend


def test_kernels_by_platform():
    best_for = attention_kernels.best_for.__wrapped__
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert best_for(jax.devices()[0], half) == "plain"
    # What is compiled for, and is not here.
    assert best_for(Device("tpu"), half) == "flash"
    assert best_for(Device("gpu"), half) == "cudnn"
    assert best_for(Device("gpu"), single) == "plain"


def test_a_kernel_that_does_not_run_is_passed_over_with_one_line(there, caplog, monkeypatch):
    gpu, tpu, half = Device("gpu"), Device("tpu"), jnp.dtype("bfloat16")
    best_for = there(gpu, tpu)
    with caplog.at_level(logging.WARNING):
        assert best_for(gpu, half) == "plain"  # cuDNN cannot run on a CPU
    assert len(caplog.records) == 1 and "cudnn attention does not run here" in caplog.text
    caplog.clear()
    kernels = dict(TPU)
    monkeypatch.setattr(attention_kernels, "KERNELS", kernels)
    with caplog.at_level(logging.WARNING):
        assert best_for(tpu, half) == "flash"
        assert not caplog.records
        kernels["flash"] = lambda q, k, v: 1.1 * attention(q, k, v)
        assert best_for(tpu, half) == "splash"
    assert len(caplog.records) == 1 and "flash attention does not run here" in caplog.text
    assert "off by 0.2" in caplog.text


def test_a_kernel_is_tried_on_the_shapes_that_it_is_for(there, caplog, monkeypatch):
    """As where a chip's memory holds the keys of a small example and not those of the model."""
    tpu = Device("tpu")
    best_for = there(tpu)

    def small(q, k, v):
        if k.shape[1] > 200:
            raise MemoryError("Ran out of memory in memory space vmem")
        return TPU["flash"](q, k, v)

    monkeypatch.setattr(attention_kernels, "KERNELS", TPU | {"flash": small})
    half = jnp.dtype("bfloat16")
    assert best_for(tpu, half) == "flash"
    assert best_for(tpu, half, ((128, 40), (64, 40))) == "flash"  # 64 are too few for kernels
    with caplog.at_level(logging.WARNING):
        assert best_for(tpu, half, ((128, 40), (256, 48))) == "splash"
    assert "memory space vmem (256 tokens, 48 channels)" in caplog.text


def test_shapes_of_the_models_attention():
    assert set(ModelConfig.full_size().attention_shapes) == {(4096, 40), (8192, 80), (2048, 160)}
