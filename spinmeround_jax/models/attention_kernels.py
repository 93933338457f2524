"""Attention kernels of accelerators, which never write the logits to memory, and their selection.

plain    products and a softmax, everywhere (`attention`)
flash    this package's Pallas kernels for TPU (`flash_attention`)
splash   the ones of JAX, if `flash` does not run
cudnn    NVIDIA's, on GPU, for half precision and heads of at most 128 channels
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from spinmeround_jax.models.precision import exact_float32
from spinmeround_jax.models.tiles import LANES, tile

_logger = logging.getLogger(__name__)

_TPU_HEAD, _CUDNN_HEAD = 256, 128  # channels of a head at most
_FOR = {"tpu": ("flash", "splash"), "gpu": ("cudnn",), "cuda": ("cudnn",)}  # best first
_TOLERANCE = 0.05  # of gradients from the plain ones, relative to the largest


def fits(kernel: str, q: jax.Array, k: jax.Array) -> bool:
    """Whether the kernel supports, and is faster for, q (n, s, heads, d) and k (n, t, heads, d)."""
    if kernel == "splash" and q.dtype == jnp.float32:
        return False  # its products have no precision argument and would be rounded to bfloat16
    if kernel in ("flash", "splash"):
        return q.shape[1] >= LANES and q.shape[-1] <= _TPU_HEAD and q.shape[-1] % 8 == 0
    if kernel != "cudnn" or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    return q.shape[1] % 2 == 0 and q.shape[-1] % 8 == 0 and q.shape[-1] <= _CUDNN_HEAD


def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """See `flash_attention.flash`."""
    from spinmeround_jax.models import flash_attention  # importing Pallas takes 0.25 s

    return flash_attention.flash(q, k, v)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Softmax attention, q (n, s, heads, d), k and v (n, t, heads, d) -> (n, s, heads, d).

    Tokens are padded to multiples of 128; padded keys are in another segment than the queries. The kernel has
    no scale of its own: queries are scaled, and rounded to their dtype, before the product.

    Args:
        interpret: run without a TPU, slowly, for tests.
    """
    s, t, heads = q.shape[1], k.shape[1], q.shape[2]
    padded_s, padded_t = s + -s % LANES, t + -t % LANES
    kernel = _splash_kernel(heads, padded_s, padded_t, q.shape[-1], interpret)
    q, k, v = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % LANES), (0, 0)))
        for x in (q * q.shape[-1] ** -0.5, k, v)
    )
    segments = None
    if padded_t != t:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

        segments = splash_attention_kernel.SegmentIds(
            q=jnp.zeros(padded_s, jnp.int32), kv=jnp.asarray(np.arange(padded_t) >= t, jnp.int32)
        )
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q, k, v)
    return jnp.swapaxes(out[:, :, :s], 1, 2)


def _splash_kernel(heads: int, s: int, t: int, channels: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    across, along = tile(s), tile(t)
    # One kernel for the backward pass: 5 products where two kernels need 7. It writes a gradient of q for
    # each block of keys, so these blocks are as long as the vector memory allows.
    longest = 4 if channels <= LANES else 2
    long = next(n * along for n in (longest, 2, 1) if t % (n * along) == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=across, block_kv=along, block_q_dkv=across,
        block_kv_dkv=long, block_kv_dkv_compute=along, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((s, t))] * heads)
    return splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """As `splash`, by NVIDIA's cuDNN."""
    n, t = k.shape[:2]
    lengths = None
    if t % 2:  # such as the 77 tokens of an identity: JAX has no gradient for them
        k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))
        lengths = jnp.full(n, t, jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )


KERNELS = {"flash": flash, "splash": splash, "cudnn": cudnn}


@functools.cache
def best_for(device: jax.Device, dtype: jnp.dtype, shapes: tuple[tuple[int, int], ...] = ()) -> str:
    """The first kernel that runs on a device with correct gradients, else "plain"; logs the others.

    Args:
        shapes: (tokens, channels of a head) of the self-attentions, which decide the memory that a kernel
            needs on the chip. `ModelConfig.attention_shapes`.
    """
    candidates = _FOR.get(device.platform, ())
    if not candidates or (candidates == ("cudnn",) and dtype == jnp.float32):
        return "plain"
    if device not in jax.devices():
        return candidates[0]  # ahead-of-time compilation
    here = jax.local_devices()[0]  # `device` may belong to another process
    found = next((kernel for kernel in candidates if _runs(kernel, here, dtype, shapes)), "plain")
    if jax.process_count() > 1:  # all must run the same program
        numbers = [*candidates, "plain"]
        found = numbers[multihost_utils.process_allgather(np.array(numbers.index(found))).max()]
    return found


def _runs(
    kernel: str, device: jax.Device, dtype: jnp.dtype, shapes: tuple[tuple[int, int], ...]
) -> bool:
    """Whether the kernel runs with the gradients of plain attention.

    It is tried on a small example with keys that need padding, and on one head of each of `shapes`.
    """

    def gradients(attend: Callable[..., jax.Array], inputs: list[jax.Array]) -> list[np.ndarray]:
        loss = jax.jit(jax.grad(lambda *x: jnp.sum(attend(*x).astype(jnp.float32) ** 2), (0, 1, 2)))
        return [np.asarray(x, np.float32) for x in loss(*inputs)]

    reason = ""
    for queries, keys, heads, channels in (
        (LANES, 77, 2, 40),
        *((tokens, tokens, 1, channels) for tokens, channels in shapes),
    ):
        rng = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(rng.standard_normal((1, tokens, heads, channels)), dtype, device=device)
            for tokens in (queries, keys, keys)
        )
        if not fits(kernel, q, k):
            continue
        try:
            found, exact = (gradients(f, [q, k, v]) for f in (KERNELS[kernel], _plain))
            off = max(
                float(abs(a - b).max() / abs(b).max()) for a, b in zip(found, exact, strict=True)
            )
            reason = f"its gradients are off by {off:.2g}" if not off < _TOLERANCE else ""
        except Exception as error:  # each compiler has its own
            reason = (str(error).strip() or repr(error)).splitlines()[0]
        if reason:
            _logger.warning(
                "%s attention does not run here and is not used: %s (%d tokens, %d channels)",
                kernel, reason, queries, channels,
            )  # fmt: skip
            break
    return not reason


def _plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    with exact_float32(q.dtype):
        return jax.nn.dot_product_attention(q, k, v)
