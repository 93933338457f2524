"""Attention of the accelerators, which never writes the logits to memory, and which one to take.

plain    products and a softmax, everywhere (`attention`)
splash   a Pallas kernel that comes with JAX, on TPU
cudnn    NVIDIA's, on GPU, for half precision and heads of at most 128 channels
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

_logger = logging.getLogger(__name__)

LANES = 128  # of a TPU: splash takes whole multiples of tokens
_BLOCK = 512  # tokens of a tile; 2048 do not fit a chip's vector memory
_SPLASH_HEAD, _CUDNN_HEAD = 256, 128  # channels of a head at most


def fits(kernel: str, q: jax.Array, k: jax.Array) -> bool:
    """Whether the kernel takes q (n, s, heads, d) and k (n, t, heads, d), and is worth it."""
    if kernel == "splash":
        return q.shape[1] >= LANES and q.shape[-1] <= _SPLASH_HEAD
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return kernel == "cudnn" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= _CUDNN_HEAD


def splash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Softmax attention, q (n, s, heads, d), k and v (n, t, heads, d) -> (n, s, heads, d).

    Tokens are padded to multiples of 128; padded keys belong to another segment than the queries.

    Args:
        interpret: run it without a TPU, slowly, for tests.
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

    across, along = _block(s), _block(t)
    # One kernel for the whole backward pass: 5 products where two kernels need 7. It writes a gradient of
    # q for each block of keys, so these are as long as the vector memory allows, unlike what is computed
    # at once.
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


def _block(tokens: int) -> int:
    return next(size for size in (_BLOCK, 384, 256, LANES) if tokens % size == 0)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """As `splash`, by NVIDIA's cuDNN."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


@functools.cache
def best_for(device: jax.Device, dtype: jnp.dtype) -> str:
    """The kernel for a device, "plain" with one line of log where a better one does not run."""
    kernel = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(device.platform, "plain")
    if kernel == "cudnn" and dtype == jnp.float32:
        return "plain"
    if kernel == "plain" or device not in jax.devices():
        return kernel  # it may be one that is only compiled for
    attend = {"splash": splash, "cudnn": cudnn}[kernel]
    here = jax.local_devices()[0]  # `device` may be another process's
    q, k = (jnp.zeros((1, tokens, 1, 40), dtype, device=here) for tokens in (LANES, 77))
    try:
        probe = jax.jit(jax.grad(lambda *x: jnp.sum(attend(*x).astype(jnp.float32))))
        jax.block_until_ready(probe(q, k, k))
    except Exception as error:  # each compiler has its own
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        _logger.warning("%s attention does not run here, taking the plain one: %s", kernel, reason)
        kernel = "plain"
    if jax.process_count() > 1:  # all must run one program
        runs = multihost_utils.process_allgather(np.array(kernel != "plain"))
        kernel = kernel if runs.all() else "plain"
    return kernel
