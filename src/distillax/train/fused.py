"""The loss from hidden states and head, without ever holding [tokens, vocabulary].

Tokens are taken in chunks, and only those that bear loss: prompt and padding positions need no
product with the vocabulary. Gradients are computed in the forward pass, where the probabilities
are at hand, so no product is computed twice.

Shapes: N tokens, C tokens of a chunk, E model width, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillax.models.backend import loss_chunk_tokens, product
from distillax.models.transformer import softcap


def cross_entropy(
    hidden_NE: jax.Array,
    head_VE: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    cap: float | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """sum_n weights[n] * -log softmax(head @ hidden[n])[targets[n]], in nats, float32.

    Products in the dtype of `hidden`, accumulated in float32; softmax in float32. `cap` is the
    logits' soft-cap. Gradients flow to `hidden` and to `head` (in its own dtype). `chunk` tokens
    are held at once; the default is the backend's.
    """
    return _cross_entropy(hidden_NE, head_VE, targets_N, weights_N, cap, chunk or loss_chunk_tokens())


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, cap: float | None, chunk: int
) -> jax.Array:
    order, chunks = _loss_first(weights, chunk)

    def add(i: jax.Array, loss: jax.Array) -> jax.Array:
        h, target, weight = _chunk(i, chunk, order, hidden, targets, weights)
        return loss + _rows(_logits(head.astype(h.dtype), h, cap), target, weight)[0]

    return jax.lax.fori_loop(0, chunks, add, jnp.zeros((), jnp.float32))


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, cap: float | None, chunk: int
) -> tuple[jax.Array, Any]:
    dtype = hidden.dtype
    head_VE = head.astype(dtype)
    # The gradients' products want this operand the other way round, and a compiler left alone
    # would transpose it once a chunk.
    head_EV = jax.lax.optimization_barrier(head_VE.T)
    order, chunks = _loss_first(weights, chunk)

    def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        loss, dhidden, dhead = carry
        h_CE, target, weight = _chunk(i, chunk, order, hidden, targets, weights)
        logits_VC = _logits(head_VE, h_CE, cap)
        part, lse_C = _rows(logits_VC, target, weight)
        hit_VC = jnp.arange(head.shape[0])[:, None] == target[None]
        g_VC = (jnp.exp(logits_VC - lse_C[None]) - hit_VC.astype(jnp.float32)) * weight[None]
        if cap is not None:
            g_VC = g_VC * (1 - (logits_VC / np.float32(cap)) ** 2)
        g_VC = g_VC.astype(dtype)  # both products in the compute dtype, accumulated in float32
        dh_EC = product("ev,vc->ec", head_EV, g_VC)
        dhead = dhead + product("vc,ce->ve", g_VC, h_CE)
        dhidden = jax.lax.dynamic_update_slice(dhidden, dh_EC.T.astype(dtype), (i * chunk, 0))
        return loss + part, dhidden, dhead

    padded = -(-hidden.shape[0] // chunk) * chunk
    zeros = (
        jnp.zeros((), jnp.float32),
        jnp.zeros((padded, hidden.shape[1]), dtype),
        jnp.zeros(head.shape, jnp.float32),
    )
    loss, dsorted, dhead = jax.lax.fori_loop(0, chunks, add, zeros)
    dhidden = jnp.zeros_like(hidden).at[order].set(dsorted[: hidden.shape[0]])
    return loss, (dhidden, dhead, jnp.zeros((), head.dtype), targets)


def _backward(cap: float | None, chunk: int, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    dhidden, dhead, like, targets = saved
    no_targets = np.zeros(targets.shape, jax.dtypes.float0)
    dhidden = (dhidden.astype(jnp.float32) * cotangent).astype(dhidden.dtype)
    return dhidden, (dhead * cotangent).astype(like.dtype), no_targets, None


_cross_entropy.defvjp(_forward, _backward)


def _loss_first(weights_N: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """An order of the tokens with those that bear loss first, and how many chunks these take."""
    bears = weights_N != 0
    return jnp.argsort(~bears, stable=True), -(-bears.sum() // chunk)


def _chunk(
    i: jax.Array, chunk: int, order: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, targets and weights of chunk i; what lies beyond the end weighs nothing."""
    at = i * chunk + jnp.arange(chunk)
    rows = order[jnp.minimum(at, order.shape[0] - 1)]
    return hidden[rows], targets[rows], jnp.where(at < order.shape[0], weights[rows], 0)


def _logits(head_VE: jax.Array, h_CE: jax.Array, cap: float | None) -> jax.Array:
    """float32[V, C]: vocabulary first, so that the products after it are plain ones."""
    return softcap(product("ve,ce->vc", head_VE, h_CE), cap)


def _rows(logits_VC: jax.Array, target_C: jax.Array, weight_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chunk's weighted loss, and the log-sum-exp of each token."""
    top_C = logits_VC.max(0)
    lse_C = jnp.log(jnp.exp(logits_VC - top_C[None]).sum(0)) + top_C
    chosen_C = jnp.take_along_axis(logits_VC, target_C[None], 0)[0]
    return (weight_C * (lse_C - chosen_C)).sum(), lse_C
