"""Softmax attention for TPU as two Pallas kernels (FlashAttention-2, arXiv 2307.08691), in powers of two.

Queries, keys, values, output and gradients are (heads, channels, tokens): with the 40, 80 or 160 channels of
the UNet's heads last, arrays would be padded to 128 lanes and transposed around the projections. The backward
pass stores one number per query. docs/scale.md compares with splash, the kernels of JAX.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spinmeround_jax.models import precision
from spinmeround_jax.models.tiles import LANES, tile

# Bytes of vector memory that a kernel takes at most: a core of a v4 has no more, and no shape of the model
# gains by more than the second, a quarter to a half of what later chips have.
_SMALLEST, _ENOUGH = 16 * 2**20, 32 * 2**20
_MASKED = -1e30  # logit; not -inf, because -inf - -inf is NaN
_LOG2E = math.log2(math.e)


def flash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: Any = False) -> jax.Array:
    """Softmax attention, q (n, s, heads, d), k and v (n, t, heads, d) -> (n, s, heads, d).

    Args:
        interpret: of `pallas_call`, to run without a TPU, slowly, for tests.
    """
    n, s, heads, _ = q.shape
    tokens_last = [rearrange(x, "n s heads d -> (n heads) d s") for x in (q, k, v)]
    padded = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % LANES))) for x in tokens_last)
    out = _attend(k.shape[1], interpret, *padded)[:, :, :s]
    return rearrange(out, "(n heads) d s -> n s heads d", n=n, heads=heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(keys: int, interpret: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q (m, d, s), k and v (m, d, t) -> (m, d, s); keys from index `keys` on are padding."""
    return _forward(keys, interpret, q, k, v)[0]


def _forward(keys, interpret, q, k, v):
    """The output, and the residuals of the backward pass."""
    (m, d, s), t = q.shape, k.shape[-1]
    across, along = _blocks(s, t, d, q.dtype, backward=False)
    queries = pl.BlockSpec((None, d, across), lambda head, i, j: (head, 0, i))
    others = pl.BlockSpec((None, d, along), lambda head, i, j: (head, 0, j))
    numbers = pl.BlockSpec((None, 1, across), lambda head, i, j: (head, 0, i))
    out, log_sums = pl.pallas_call(
        functools.partial(_forward_kernel, keys=keys),
        name="flash_forward",
        grid=(m, s // across, t // along),
        in_specs=[queries, others, others],
        out_specs=[queries, numbers],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((m, 1, s), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((1, across), jnp.float32),
            pltpu.VMEM((1, across), jnp.float32),
            pltpu.VMEM((d, across), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_memory(),
        ),
        interpret=interpret,
    )(q, k, v)
    return out, (q, k, v, out, log_sums)


def _backward(keys, interpret, residuals, g):
    q, k, v, out, log_sums = residuals
    (m, d, s), t = q.shape, k.shape[-1]
    across, along = _blocks(s, t, d, q.dtype, backward=True)
    queries = pl.BlockSpec((None, d, across), lambda head, j, i: (head, 0, i))
    others = pl.BlockSpec((None, d, along), lambda head, j, i: (head, 0, j))
    numbers = pl.BlockSpec((None, 1, across), lambda head, j, i: (head, 0, i))
    # A gradient of the queries for each block of keys; they are summed afterwards.
    parts = pl.BlockSpec((None, None, d, across), lambda head, j, i: (j, head, 0, i))
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, keys=keys),
        name="flash_backward",
        grid=(m, t // along, s // across),
        in_specs=[queries, others, others, queries, queries, numbers],
        out_specs=[parts, others, others],
        out_shape=[
            jax.ShapeDtypeStruct((t // along, *q.shape), q.dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        scratch_shapes=[pltpu.VMEM((along, d), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_memory(),
        ),
        interpret=interpret,
    )(q, k, v, out, g, log_sums)
    return jnp.sum(dq, axis=0, dtype=jnp.float32).astype(q.dtype), dk, dv


_attend.defvjp(_forward, _backward)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, log_sum_ref, largest, total, weighted, *, keys):
    """Some queries of a head and one block of its keys, after the blocks before it.

    Queries are along the lanes, so that the softmax reduces over sublanes and its sums need no padding.
    largest, total: (1, queries). weighted: (d, queries).
    """
    block, blocks = pl.program_id(2), pl.num_programs(2)
    along = k_ref.shape[1]
    q = q_ref[...]
    size = tile(along)

    @pl.when(block == 0)
    def start():
        largest[...] = jnp.full_like(largest, _MASKED)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def step(i, _):
        here = pl.ds(i * size, size)
        logits = _logits(k_ref[:, here].T, q)
        if keys < blocks * along:
            logits = _mask(logits, keys - block * along - i * size, _MASKED)
        before = largest[...]
        after = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
        p = jnp.exp2(logits - after)
        fade = jnp.exp2(before - after)
        largest[...] = after
        total[...] = total[...] * fade + jnp.sum(p, axis=0, keepdims=True)
        values = v_ref[:, here]
        weighted[...] = weighted[...] * fade + _dot(values, p.astype(values.dtype))

    jax.lax.fori_loop(0, along // size, step, None, unroll=True)

    @pl.when(block == blocks - 1)
    def finish():
        out_ref[...] = (weighted[...] / total[...]).astype(out_ref.dtype)
        log_sum_ref[...] = largest[...] + jnp.log2(total[...])


def _backward_kernel(
    q_ref, k_ref, v_ref, out_ref, g_ref, log_sum_ref, dq_ref, dk_ref, dv_ref, dk, dv, *, keys
):
    """One block of keys and some queries, after the queries before them.

    dk, dv: (keys, d), sums over the queries so far.
    """
    block, blocks = pl.program_id(1), pl.num_programs(1)
    d, along = k_ref.shape
    q, g = q_ref[...], g_ref[...]
    q_rows, g_rows = q.T, g.T
    log_sum = log_sum_ref[...]
    own = jnp.sum(out_ref[...].astype(jnp.float32) * g.astype(jnp.float32), axis=0, keepdims=True)
    size = tile(along)

    @pl.when(pl.program_id(2) == 0)
    def start():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def step(i, dq):
        here = pl.ds(i * size, size)
        k = k_ref[:, here]
        logits = _logits(k.T, q)
        p = jnp.exp2(logits - log_sum)
        if keys < blocks * along:
            p = _mask(p, keys - block * along - i * size, 0.0)
        dv[here, :] += _dot(p.astype(g.dtype), g_rows)
        dp = _dot(v_ref[:, here].T, g)
        ds = (p * (dp - own)).astype(q.dtype)
        dk[here, :] += _dot(ds, q_rows)
        return dq + _dot(k, ds)

    dq = jnp.zeros(q.shape, jnp.float32)
    dq = jax.lax.fori_loop(0, along // size, step, dq, unroll=True)
    dq_ref[...] = (dq * d**-0.5).astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def finish():
        dk_ref[...] = (dk[...] * d**-0.5).T.astype(dk_ref.dtype)
        dv_ref[...] = dv[...].T.astype(dv_ref.dtype)


def _logits(a: jax.Array, b: jax.Array) -> jax.Array:
    """a (rows, d) and b (d, columns): their product as powers of two.

    Scaled after the product: rounding a scaled query to half precision would more than double the error of
    large logits.
    """
    return _dot(a, b) * (b.shape[0] ** -0.5 * _LOG2E)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=precision.of(a.dtype), preferred_element_type=jnp.float32)


def _mask(x: jax.Array, count: jax.Array, value: float) -> jax.Array:
    """x (keys, queries), with `value` for all but the first `count` keys."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < count, x, value)


def _memory() -> int:
    """Bytes of vector memory for a kernel, of the chip that is compiled for; those of a v4 if it is unknown."""
    found = pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else _SMALLEST
    return min(found, _ENOUGH)


def _blocks(s: int, t: int, d: int, dtype: jnp.dtype, *, backward: bool) -> tuple[int, int]:
    """Queries and keys of a block: with few keys more queries, and then as many keys as the memory holds.

    Each step of the grid costs some hundred cycles whatever its size, and other blocks of keys have the
    queries, or for other queries the keys, loaded again.
    """
    size = tile(t)
    across = [n for n in (2048, 1024) if s % n == 0 and n * size <= 512 * 512]
    along = [n for n in range(t, 0, -size) if t % n == 0]
    pairs = [(a, b) for a in (*across, tile(s)) for b in along]
    fitting = (pair for pair in pairs if _bytes(*pair, d, dtype, backward=backward) <= _memory())
    return next(fitting, pairs[-1])


def _bytes(across: int, along: int, d: int, dtype: jnp.dtype, *, backward: bool) -> int:
    """Vector memory of a kernel with such blocks.

    Blocks count twice, because the next ones are loaded ahead; channels of the backward sums are padded to
    whole lanes. How many float32 tiles of logits and the like are held at once is the compiler's choice, here
    bounded by what compiled for a v4 and its messages about what did not: the forward pass starts on later
    tiles early, and exact float32 products are sums of several.
    """
    width, lanes, size = jnp.dtype(dtype).itemsize, pl.cdiv(d, LANES) * LANES, tile(along)
    if backward:
        arrays, sums, tiles = 4, 2 * along * lanes, 3 if width == 2 else 9
    else:
        arrays, sums = 2, across * d
        tiles = 1 + along // size // 2 if width == 2 else 2 * (along // size)
    return 2 * arrays * d * width * (across + along) + 4 * (sums + tiles * across * size)
