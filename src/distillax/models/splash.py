"""Attention on TPUs: JAX's splash kernel, which keeps no scores and skips the blocks that nobody sees.

Shapes: B batch, T tokens, S keys, H query heads, K key/value heads, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np

from distillax.models.backend import from_jax

_KERNELS = "jax.experimental.pallas.ops.tpu.splash_attention"
_BLOCKS = (512, 256, 128)  # tokens of a block; the largest that divides the row


def can_attend(q_BTHD: jax.Array, window: int | jax.Array, shards: int = 1) -> bool:
    """Whether the kernel takes these, the tokens split in so many parts: bfloat16, whole blocks, and a window
    that is known beforehand."""
    whole = q_BTHD.shape[1] % (_BLOCKS[-1] * shards) == 0
    return q_BTHD.dtype == jax.numpy.bfloat16 and whole and isinstance(window, int)


def make_kernel(T: int, H: int, window: int, shards: int = 1, interpret: bool = False) -> Any:
    """The kernel for sequences of T tokens, whose queries are split in so many parts: a tree of arrays, of
    which each device takes its own by `kernel.manual_sharding_spec`. `interpret` runs it anywhere, slowly."""
    block = next(size for size in _BLOCKS if T // shards % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = from_jax(_KERNELS, "BlockSizes")(**dict.fromkeys((f"block_{name}" for name in names), block))
    if window:
        mask = from_jax(_KERNELS, "LocalMask")((T, T), (window - 1, 0), 0)
    else:
        mask = from_jax(_KERNELS, "CausalMask")((T, T))
    make = partial(
        from_jax(_KERNELS, "make_splash_mha"), head_shards=1, block_sizes=sizes, interpret=interpret
    )
    with _promotion():
        return make(from_jax(_KERNELS, "MultiHeadMask")([mask] * H), q_seq_shards=shards)


def attend(
    kernel: Any,
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    scale: float,
    segments_BT: jax.Array,
    key_segments_BS: jax.Array,
) -> jax.Array:
    """As `attention.causal_attention`, of a device's queries to all keys."""
    # The kernel has no scale of its own.
    q_BTHD = (q_BTHD.astype(np.float32) * np.float32(scale)).astype(q_BTHD.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHD, k_BSKD, v_BSKD))
    segments = from_jax(_KERNELS, "SegmentIds")(segments_BT, key_segments_BS)
    with _promotion():
        out: Any = jax.vmap(kernel)(q, k, v, segments)
    return out.swapaxes(1, 2)


@contextmanager
def _promotion() -> Iterator[None]:
    """Of dtypes and ranks, which the kernel counts on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
