"""The loss from hidden states and head, without ever holding [tokens, vocabulary].

Tokens are taken in chunks, and only those that bear loss: prompt and padding positions need no
product with the vocabulary. Gradients are computed in the forward pass, where the probabilities
are at hand, so no product is computed twice. What a token's loss is, `train.rows` says.

Shapes: N tokens, C tokens of a chunk, E model width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from distillax.models.backend import (
    SCATTERED_ROWS,
    copies_transposed,
    loss_chunk_tokens,
    product,
    transposed,
)
from distillax.models.layout import Mesh, active_mesh, axes_of, named, scatter_sum, tokens_spec, weight_spec
from distillax.models.transformer import softcap

_HEAD_AXES = ("vocab", "embed")
_HELPERS = ("tensor",)  # these devices hold the same hidden states: here they share the tokens
_VOCABULARY_BLOCK = 16_384  # rows of the head whose gradient is added at once

Terms = dict[str, jax.Array]
# rows(logits float32[V, C], tokens of the chunk, constants) -> (loss [C], further terms {name: [C]},
# d loss / d logits [V, C]). Hashable: it is static.
Rows = Callable[[jax.Array, Any, Any], tuple[jax.Array, Terms, jax.Array]]


def chunked(
    rows: Rows,
    hidden: jax.Array,
    head_VE: jax.Array,
    weights: jax.Array,
    tokens: Any,
    constants: Any = None,
    *,
    cap: float | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, Terms]:
    """(sum_n weights[n] * loss[n], {name: sum_n weights[n] * term[n]}), float32, of the tokens n.

    `weights` is [B, T] or [N], `hidden` [B, T, E] or [N, E]. The logits head @ hidden[n] are multiplied
    in the dtype of `hidden`, accumulated in float32, and soft-capped by `cap`. `tokens` is a tree of
    arrays shaped like `weights` and then as they like, of which `rows` gets the chunk's; `constants` is a
    tree that it gets whole. Gradients of the loss, and of nothing else, flow to `hidden` and `head` (in
    its own dtype), and to nothing else. `chunk` tokens are held at once; the default is the backend's.

    On a mesh (models.layout), every device takes the tokens that lie with it: the head is gathered
    before the first chunk, its gradient is summed and scattered after the last, and nothing moves between.
    """
    mesh = active_mesh() if weights.ndim == 2 else None
    chunk = chunk or loss_chunk_tokens(head_VE.shape[0])
    return _chunked(rows, cap, chunk, mesh, hidden, head_VE, weights, tokens, constants)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _chunked(
    rows: Rows,
    cap: float | None,
    chunk: int,
    mesh: Mesh | None,
    hidden: jax.Array,
    head: jax.Array,
    weights: jax.Array,
    tokens: Any,
    constants: Any,
) -> tuple[jax.Array, Terms]:
    def local(*arrays: Any) -> tuple[jax.Array, Terms]:
        return _sums(rows, cap, chunk, *arrays)

    head = head.astype(hidden.dtype)
    if mesh is None:
        return local(hidden, head, weights, tokens, constants)
    spec = tokens_spec(mesh, weights.shape, more=_HELPERS)

    def add_up(*arrays: Any) -> tuple[jax.Array, Terms]:
        return jax.lax.psum(local(*arrays), axes_of(spec))

    split = _on_each(mesh, spec, add_up, P())
    return split(hidden, head, weights, tokens, constants)


def _forward(
    rows: Rows,
    cap: float | None,
    chunk: int,
    mesh: Mesh | None,
    hidden: jax.Array,
    head: jax.Array,
    weights: jax.Array,
    tokens: Any,
    constants: Any,
) -> tuple[tuple[jax.Array, Terms], Any]:
    head_VE = head.astype(hidden.dtype)
    if mesh is None:
        arrays = hidden, head_VE, weights, tokens, constants
        total, dhidden, dhead = _sums_and_gradients(rows, cap, chunk, 1, *arrays)
    else:
        spec = tokens_spec(mesh, weights.shape, more=_HELPERS)
        head_spec = _head_spec(mesh, axes_of(spec), head.shape)
        multiple = 1 if head_spec[0] else SCATTERED_ROWS

        def add_up(*arrays: Any) -> tuple[tuple[jax.Array, Terms], jax.Array, jax.Array]:
            total, dhidden, dhead = _sums_and_gradients(rows, cap, chunk, multiple, *arrays)
            dhead = scatter_sum(dhead, axes_of(spec), head_spec)
            return jax.lax.psum(total, axes_of(spec)), dhidden, dhead[: head.shape[0]]

        split = _on_each(mesh, spec, add_up, (P(), spec, head_spec))
        total, dhidden, dhead = split(hidden, head_VE, weights, tokens, constants)
        # Scattered now: XLA may do so after the layers' backward pass, and hold all of it until then.
        dhidden, dhead = jax.lax.optimization_barrier((dhidden, dhead))
    return total, (dhidden, dhead, jnp.zeros((), head.dtype))


def _backward(
    rows: Rows, cap: float | None, chunk: int, mesh: Mesh | None, saved: Any, cotangents: Any
) -> tuple[Any, ...]:
    dhidden, dhead, like = saved
    cotangent = cotangents[0]
    dhidden = (dhidden.astype(jnp.float32) * cotangent).astype(dhidden.dtype)
    return dhidden, (dhead * cotangent).astype(like.dtype), None, None, None


_chunked.defvjp(_forward, _backward)


def _on_each(mesh: Mesh, spec: P, local: Callable[..., Any], out: Any) -> Callable[..., Any]:
    """`local` on every device's own tokens, with the head and the constants whole there."""
    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, P(), spec, spec, P()), out_specs=out, check_vma=False
    )


def _head_spec(mesh: Mesh, summed: tuple[str, ...], shape: tuple[int, ...]) -> P:
    """How the head's gradient leaves: as the head lies, but for axes whose devices have all of it."""
    spec = weight_spec(mesh, _HEAD_AXES, shape)
    return P(*(part if set(named(part)) <= set(summed) else None for part in spec))


def _sums(
    rows: Rows,
    cap: float | None,
    chunk: int,
    hidden: jax.Array,
    head_VE: jax.Array,
    weights: jax.Array,
    tokens: Any,
    constants: Any,
) -> tuple[jax.Array, Terms]:
    hidden, weights, tokens = _flat(hidden, weights, tokens)
    order, chunks = _loss_first(weights, chunk)

    def sums(i: jax.Array) -> tuple[jax.Array, Terms]:
        h_CE, weight_C, some = _take(i, chunk, order, hidden, weights, tokens)
        loss_C, terms, _ = rows(_logits(head_VE, h_CE, cap), some, constants)
        return _weigh((loss_C, terms), weight_C)

    def add(i: jax.Array, total: tuple[jax.Array, Terms]) -> tuple[jax.Array, Terms]:
        return jax.tree.map(jnp.add, total, sums(i))

    return jax.lax.fori_loop(0, chunks, add, _zeros_like(sums))


def _sums_and_gradients(
    rows: Rows,
    cap: float | None,
    chunk: int,
    multiple: int,
    hidden: jax.Array,
    head_VE: jax.Array,
    weights: jax.Array,
    tokens: Any,
    constants: Any,
) -> tuple[tuple[jax.Array, Terms], jax.Array, jax.Array]:
    """(sums, gradient of the loss with respect to `hidden`, and to the head in float32, with rows of zeros at
    its end that make their number a multiple of `multiple`)."""
    shape, dtype = hidden.shape, hidden.dtype
    hidden, weights, tokens = _flat(hidden, weights, tokens)
    # Turned once, not once a chunk; where that is no copy, it would only be a second head.
    head_EV = transposed(head_VE) if copies_transposed() else None
    order, chunks = _loss_first(weights, chunk)

    def one(i: jax.Array) -> tuple[tuple[jax.Array, Terms], jax.Array, Any]:
        h_CE, weight_C, some = _take(i, chunk, order, hidden, weights, tokens)
        logits_VC = _logits(head_VE, h_CE, cap)
        loss_C, terms, g_VC = rows(logits_VC, some, constants)
        g_VC = jnp.where(weight_C[None] != 0, g_VC * weight_C[None], 0)
        if cap is not None:
            g_VC = g_VC * (1 - (logits_VC / np.float32(cap)) ** 2)
        g_VC = g_VC.astype(dtype)  # both products in the compute dtype, accumulated in float32
        if head_EV is None:
            dh_CE = product("vc,ve->ce", g_VC, head_VE)
        else:
            dh_CE = product("ev,vc->ec", head_EV, g_VC).T
        return _weigh((loss_C, terms), weight_C), dh_CE.astype(dtype), (g_VC, h_CE)

    def add(i: jax.Array, carry: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
        total, dhidden, dhead = carry
        part, dh_CE, pair = one(i)
        dhidden = jax.lax.dynamic_update_slice(dhidden, dh_CE, (i * chunk, 0))
        return jax.tree.map(jnp.add, total, part), dhidden, _add_product(dhead, *pair)

    padded = -(-hidden.shape[0] // chunk) * chunk
    vocabulary = -(-head_VE.shape[0] // multiple) * multiple
    zeros = (
        _zeros_like(lambda i: one(i)[0]),
        jnp.zeros((padded, hidden.shape[1]), dtype),
        jnp.zeros((vocabulary, head_VE.shape[1]), jnp.float32),
    )
    total, dsorted, dhead = jax.lax.fori_loop(0, chunks, add, zeros)
    dhidden = jnp.zeros_like(hidden).at[order].set(dsorted[: hidden.shape[0]])
    return total, dhidden.reshape(shape), dhead


def _flat(hidden: jax.Array, weights: jax.Array, tokens: Any) -> tuple[jax.Array, jax.Array, Any]:
    """[B, T, ...] -> [N, ...]."""
    leading = weights.ndim
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[leading:]), (hidden, weights, tokens))


def _add_product(dhead_VE: jax.Array, g_VC: jax.Array, h_CE: jax.Array) -> jax.Array:
    """dhead + g @ h, a block of the vocabulary at a time: the whole product would be a second dhead."""
    for start in range(0, dhead_VE.shape[0], _VOCABULARY_BLOCK):
        part = product("vc,ce->ve", g_VC[start : start + _VOCABULARY_BLOCK], h_CE)
        old = jax.lax.dynamic_slice(dhead_VE, (start, 0), part.shape)
        dhead_VE = jax.lax.dynamic_update_slice(dhead_VE, old + part, (start, 0))
    return dhead_VE


def _loss_first(weights_N: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """An order of the tokens with those that bear loss first, and how many chunks these take."""
    bears = weights_N != 0
    return jnp.argsort(~bears, stable=True), -(-bears.sum() // chunk)


def _take(
    i: jax.Array, chunk: int, order: jax.Array, hidden: jax.Array, weights: jax.Array, tokens: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """Hidden states, weights and the rest of chunk i; what lies beyond the end weighs nothing. Hidden states
    that bear no loss are zero: the head's gradient is a product with them, and 0 times infinity is none."""
    at = i * chunk + jnp.arange(chunk)
    rows = order[jnp.minimum(at, order.shape[0] - 1)]
    weight = jnp.where(at < order.shape[0], weights[rows], 0)
    some = jnp.where(weight[:, None] != 0, hidden[rows], 0)
    return some, weight, jax.tree.map(lambda x: x[rows], tokens)


def _logits(head_VE: jax.Array, h_CE: jax.Array, cap: float | None) -> jax.Array:
    """float32[V, C]: vocabulary first, so that the products after it are plain ones."""
    return softcap(product("ve,ce->vc", head_VE, h_CE), cap)


def _weigh(values: Any, weight_C: jax.Array) -> Any:
    """Weighted sums. A token that weighs nothing adds nothing, whatever its value."""
    return jax.tree.map(lambda x: jnp.where(weight_C != 0, weight_C * x, 0).sum(), values)


def _zeros_like(make: Callable[[jax.Array], Any]) -> Any:
    shapes = jax.eval_shape(make, jnp.zeros((), jnp.int32))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
