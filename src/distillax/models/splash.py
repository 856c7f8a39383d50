"""Attention on TPUs: JAX's splash kernel, which keeps no scores and skips the blocks that nobody sees.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head width.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

_BLOCKS = (512, 256, 128)  # tokens of a block; the largest that divides the row


def can_attend(q_BTHD: jax.Array, window: int | jax.Array) -> bool:
    """Whether the kernel takes these: bfloat16, whole blocks, and a window that is known beforehand."""
    whole = q_BTHD.shape[1] % _BLOCKS[-1] == 0
    return q_BTHD.dtype == jax.numpy.bfloat16 and whole and isinstance(window, int)


def attend(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    scale: float,
    window: int,
    segment_ids_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.causal_attention`. `interpret` runs the kernel anywhere, slowly."""
    T, H = q_BTHD.shape[1:3]
    # The kernel has no scale of its own.
    q_BTHD = (q_BTHD.astype(np.float32) * np.float32(scale)).astype(q_BTHD.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which it counts on
        kernel = _kernel(T, H, window, interpret)
        out: Any = jax.vmap(kernel)(q, k, v, SegmentIds(segment_ids_BT, segment_ids_BT))
    return out.swapaxes(1, 2)


def _kernel(T: int, H: int, window: int, interpret: bool) -> Any:
    block = next(size for size in _BLOCKS if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = BlockSizes(**dict.fromkeys((f"block_{name}" for name in names), block))  # type: ignore[arg-type]
    mask: Any = LocalMask((T, T), (window - 1, 0), 0) if window else CausalMask((T, T))
    make = partial(make_splash_mha, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret)
    return make(MultiHeadMask([mask] * H))
