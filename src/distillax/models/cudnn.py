"""Attention on NVIDIA GPUs: cuDNN's flash kernel, which keeps no scores, but is told by a bias [B, 1, T, T]
which tokens are of one document.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head width.
"""

import jax
import jax.numpy as jnp

from distillax.models.backend import nvidia_is_ampere

_WIDEST_HEAD = 128
_LONGEST = 16_384  # beyond, the bias and its gradient take more room than scores in blocks


def can_attend(q_BTHD: jax.Array, window: int | jax.Array) -> bool:
    """Whether the kernel takes these on this GPU: bfloat16, and a window that is known beforehand."""
    T, _, D = q_BTHD.shape[1:]
    if q_BTHD.dtype != jnp.bfloat16 or not isinstance(window, int) or T % 2 or D % 8:
        return False
    if T > _LONGEST or D > _WIDEST_HEAD:
        return False
    return nvidia_is_ampere()


def attend(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    scale: float,
    window: int,
    segment_ids_BT: jax.Array,
) -> jax.Array:
    """As `attention.causal_attention`."""
    same_B1TT = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which it counts on
        return jax.nn.dot_product_attention(
            q_BTHD,
            k_BTKD,
            v_BTKD,
            mask=same_B1TT,
            scale=scale,
            is_causal=True,
            local_window_size=(window - 1, 0) if window else None,
            implementation="cudnn",
        )
