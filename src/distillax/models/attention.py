"""Causal attention in blocks of queries, with packing and windows.

Shapes: B batch, T tokens, H query heads, K key/value heads, G = H / K, D head width,
Q queries of one block, S keys that a block can see.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillax.models.backend import product

MASKED = -1e30  # finite, so that a row without any key gives no NaN
_BLOCK = 128  # rows of queries computed together: the score tile stays in cache


def causal_attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    scale: float,
    window: int | jax.Array = 0,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """Self-attention of a sequence, or of several packed ones, to its own past. [B, T, H, D].

    A query sees the keys at or before it, of its own segment, and, if `window` is positive,
    fewer than `window` tokens back. Softmax in float32; products in the dtype of the operands,
    accumulated in float32. `scale` multiplies the scores. Memory grows with T * 128, not with T * T.
    """
    q_BHTD, k_BKTD, v_BKTD = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros(q_BTHD.shape[:2], jnp.int32)
    out_BHTD: Any = _blocks(q_BHTD, k_BKTD, v_BKTD, jnp.asarray(window), segment_ids_BT, scale)
    return jnp.swapaxes(out_BHTD, 1, 2)


def _starts(tokens: int) -> range:
    return range(0, tokens, _BLOCK)


def _mask(start: int, end: int, window: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """bool[B, 1, 1, Q, S]: which keys [0, end) the queries [start, end) see."""
    back_QS = jnp.arange(start, end)[:, None] - jnp.arange(end)[None, :]
    near_QS = (back_QS >= 0) & ((window <= 0) | (back_QS < window))
    same_BQS = segments_BT[:, start:end, None] == segments_BT[:, None, :end]
    return (near_QS[None] & same_BQS)[:, None, None]


def _scores(q_BKGQD: jax.Array, k_BKSD: jax.Array, scale: float) -> jax.Array:
    return product("bkgqd,bksd->bkgqs", q_BKGQD, k_BKSD) * np.float32(scale)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocks(q, k, v, window, segments, scale):
    return _blocks_forward(q, k, v, window, segments, scale)[0]


def _blocks_forward(q_BHTD, k_BKTD, v_BKTD, window, segments_BT, scale):
    B, H, T, D = q_BHTD.shape
    K = k_BKTD.shape[1]
    q_BKGTD = q_BHTD.reshape(B, K, H // K, T, D)
    outs, lses = [], []
    for start in _starts(T):
        end = min(start + _BLOCK, T)
        scores = _scores(q_BKGTD[:, :, :, start:end], k_BKTD[:, :, :end], scale)
        scores = jnp.where(_mask(start, end, window, segments_BT), scores, np.float32(MASKED))
        top = scores.max(-1, keepdims=True)
        p = jnp.exp(scores - top)
        total = p.sum(-1, keepdims=True)
        out = product("bkgqs,bksd->bkgqd", p.astype(v_BKTD.dtype), v_BKTD[:, :, :end]) / total
        outs.append(out.astype(q_BHTD.dtype))
        lses.append(jnp.log(total) + top)
    out = jnp.concatenate(outs, 3)
    return out.reshape(B, H, T, D), (q_BKGTD, k_BKTD, v_BKTD, window, segments_BT, out, lses)


def _blocks_backward(scale, saved, dout_BHTD):
    """Recomputes the probabilities of each block from the saved log-sum-exp."""
    q_BKGTD, k_BKTD, v_BKTD, window, segments_BT, out, lses = saved
    B, K, G, T, D = q_BKGTD.shape
    dtype = q_BKGTD.dtype
    dout = dout_BHTD.reshape(B, K, G, T, D)
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    dout = dout.astype(dtype)
    dq = []
    dk = jnp.zeros(k_BKTD.shape, jnp.float32)
    dv = jnp.zeros(v_BKTD.shape, jnp.float32)
    for start, lse in zip(_starts(T), lses, strict=True):
        end = min(start + _BLOCK, T)
        q, k, v = q_BKGTD[:, :, :, start:end], k_BKTD[:, :, :end], v_BKTD[:, :, :end]
        scores = _scores(q, k, scale)
        visible = _mask(start, end, window, segments_BT)
        p = jnp.where(visible, jnp.exp(scores - lse), np.float32(0))
        do = dout[:, :, :, start:end]
        dscores = p * (product("bkgqd,bksd->bkgqs", do, v) - delta[:, :, :, start:end])
        dscores = (dscores * np.float32(scale)).astype(dtype)
        dq.append(product("bkgqs,bksd->bkgqd", dscores, k).astype(dtype))
        dk = dk.at[:, :, :end].add(product("bkgqs,bkgqd->bksd", dscores, q))
        dv = dv.at[:, :, :end].add(product("bkgqs,bkgqd->bksd", p.astype(dtype), do))
    dq = jnp.concatenate(dq, 3).reshape(dout_BHTD.shape)
    no_window, no_segments = np.zeros((), jax.dtypes.float0), np.zeros(segments_BT.shape, jax.dtypes.float0)
    return dq, dk.astype(k_BKTD.dtype), dv.astype(v_BKTD.dtype), no_window, no_segments


_blocks.defvjp(_blocks_forward, _blocks_backward)
