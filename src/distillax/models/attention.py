"""Causal attention in blocks of queries, with packing and windows.

Shapes: B batch, T tokens, S keys, H query heads, K key/value heads, G = H / K, D head width,
N = B * K groups, Q queries of one block.
"""

import math
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distillax.models import cudnn, splash
from distillax.models.backend import packed, platform, product, unpacked
from distillax.models.layout import RULES, Mesh, active_mesh, named, split, tokens_spec

MASKED = -1e30  # finite, so that a row without any key gives no NaN
_BLOCK = 128  # rows of queries computed together: the score tile stays in cache
_UNROLLED = 16  # blocks that follow each other without a loop; each costs a fifth of a second of compilation


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
    accumulated in float32. `scale` multiplies the scores. Memory grows with T * 128, not with T * T; on GPUs,
    whose kernel wants to be told who sees whom, with five bytes of T * T a row.

    Where a mesh splits the sequence, each device keeps its queries and gathers the keys and values. Where it
    splits the heads into more parts than there are key/value heads, these are repeated, so that each device
    has those of its queries.
    """
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros(q_BTHD.shape[:2], jnp.int32)
    mesh = active_mesh()
    if mesh is None:
        return _on_one(q_BTHD, k_BTKD, v_BTKD, scale, window, segment_ids_BT)
    tokens = tokens_spec(mesh, q_BTHD.shape)
    heads = PartitionSpec(*tokens, split(mesh, RULES["heads"], q_BTHD.shape[2]))
    repeats = _repeats(mesh, heads, k_BTKD.shape[2])
    if repeats > 1:
        k_BTKD, v_BTKD = (jnp.repeat(x, repeats, 2) for x in (k_BTKD, v_BTKD))
    known = window if isinstance(window, int) else None
    shards = math.prod(mesh.shape[axis] for axis in named(tokens[1]))
    kernel, kernel_spec = None, None
    if shards > 1 and platform() == "tpu" and splash.can_attend(q_BTHD, window, shards):
        kernel = splash.make_kernel(q_BTHD.shape[1], q_BTHD.shape[2], int(window), shards)
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, tokens[1])))

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array, segments: jax.Array):
        for axis in named(tokens[1]):
            first = jax.lax.axis_index(axis) * q.shape[1]
            k, v, all_segments = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v, segments))
            if kernel is not None:
                return splash.attend(kernel, q, k, v, scale, segments, all_segments)
            return _attend(q, k, v, window, segments, all_segments, first, scale)
        return _on_one(q, k, v, scale, window if known is None else known, segments)

    specs = (kernel_spec, heads, heads, heads, PartitionSpec(), tokens)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
        kernel, q_BTHD, k_BTKD, v_BTKD, jnp.asarray(window), segment_ids_BT
    )


def _repeats(mesh: Mesh, heads: PartitionSpec, kv_heads: int) -> int:
    """How many of each key/value head there must be, so that devices that split the query heads have equal
    parts of those, too. Both numbers divide that of the query heads, so their least common multiple does."""
    return math.lcm(math.prod(mesh.shape[axis] for axis in named(heads[2])), kv_heads) // kv_heads


def _on_one(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    scale: float,
    window: int | jax.Array,
    segments_BT: jax.Array,
) -> jax.Array:
    """Attention of whole sequences, by the kernel of the backend."""
    if platform() == "tpu" and splash.can_attend(q_BTHD, window):
        kernel = splash.make_kernel(q_BTHD.shape[1], q_BTHD.shape[2], int(window))
        return splash.attend(kernel, q_BTHD, k_BTKD, v_BTKD, scale, segments_BT, segments_BT)
    if platform() == "gpu" and cudnn.can_attend(q_BTHD, window):
        return cudnn.attend(q_BTHD, k_BTKD, v_BTKD, scale, int(window), segments_BT)
    return _attend(q_BTHD, k_BTKD, v_BTKD, jnp.asarray(window), segments_BT, segments_BT, None, scale)


def _attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    window: jax.Array,
    segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    first: jax.Array | None,
    scale: float,
) -> jax.Array:
    """`first` is the position of the first query among the keys; None says zero, and is known to be."""
    q_BHTD, k_BKSD, v_BKSD = (jnp.swapaxes(x, 1, 2) for x in (q_BTHD, k_BSKD, v_BSKD))
    B, H, T, D = q_BHTD.shape
    K = k_BKSD.shape[1]
    q_NGTD = q_BHTD.reshape(B * K, H // K, T, D)
    k_NSD, v_NSD = (x.reshape(B * K, -1, D) for x in (k_BKSD, v_BKSD))
    segments_NT, key_segments_NS = (jnp.repeat(x, K, 0) for x in (segments_BT, key_segments_BS))
    out_NGTD: Any = _groups(q_NGTD, k_NSD, v_NSD, segments_NT, key_segments_NS, window, first, scale)
    return jnp.swapaxes(out_NGTD.reshape(B, H, T, D), 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _groups(q, k, v, segments, key_segments, window, first, scale):
    """Attention of N = B * K groups of query heads, each with its own keys and values: [N, G, T, D]."""
    return _forward(q, k, v, segments, key_segments, window, first, scale)[0]


def _forward(q, k, v, segments, key_segments, window, first, scale):
    def one(group):
        q, k, v, segments, key_segments = group
        return _forward_one(q, k, v, _Visible(segments, key_segments, window, first), scale)

    group = (q, k, v, segments, key_segments)
    out, lse = jax.vmap(one)(group)
    return out, (jax.tree.map(packed, group), window, first, packed(out), lse)


def _backward(scale, saved, dout):
    group, window, first, out, lse = saved
    q, k, v, segments, key_segments = jax.tree.map(unpacked, group)

    def one(group):
        q, k, v, segments, key_segments, out, lse, dout = group
        visible = _Visible(segments, key_segments, window, first)
        return _backward_one(q, k, v, visible, out, lse, dout, scale)

    gradients = jax.vmap(one)((q, k, v, segments, key_segments, unpacked(out), lse, dout))
    rest = (segments, key_segments, window, first)
    return *gradients, *jax.tree.map(lambda x: np.zeros(np.shape(x), jax.dtypes.float0), rest)


_groups.defvjp(_forward, _backward)


class _Visible(NamedTuple):
    """What says which keys a query sees; see `causal_attention` and `_attend`."""

    segments_T: jax.Array
    key_segments_S: jax.Array
    window: jax.Array
    first: jax.Array | None

    def runs(self) -> list[tuple[int, int, int, int]]:
        """(first query, number of blocks, queries of each, keys that they may see) of blocks that follow each
        other in one loop. In rows of up to _UNROLLED blocks each is a run of its own, and computes no more
        than it must. Longer rows have as many runs, so that the program stays small; the last keys of a run,
        which most of its blocks do not see, are 6% of what is computed."""
        queries, keys = self.segments_T.shape[0], self.key_segments_S.shape[0]
        blocks, rest = divmod(queries, _BLOCK)
        parts = min(blocks, _UNROLLED)
        firsts = [blocks * i // parts * _BLOCK for i in range(parts + 1)] if parts else [0]
        runs = [(a, (b - a) // _BLOCK, _BLOCK, b) for a, b in pairwise(firsts)]
        runs += [(queries - rest, 1, rest, queries)] if rest else []
        return runs if self.first is None else [(*run[:3], keys) for run in runs]

    def mask(self, start: int | jax.Array, size: int, keys: int) -> jax.Array:
        """bool[1, Q, S]."""
        query = jnp.arange(size) + start + (0 if self.first is None else self.first)
        back_QS = query[:, None] - jnp.arange(keys)[None, :]
        near_QS = (back_QS >= 0) & ((self.window <= 0) | (back_QS < self.window))
        segments_Q = _cut(self.segments_T, start, size, 0)
        return (near_QS & (segments_Q[:, None] == self.key_segments_S[None, :keys]))[None]


def _cut(x: jax.Array, start: int | jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _loop(block, carry, run, q_GTD):
    """(the last carry, the results of all blocks of a run one after the other [G, Q, ...])."""
    start, blocks, size, _ = run
    if blocks == 1:
        return block(carry, start)
    # Were they known without the queries, JAX would keep the masks of all blocks for the backward pass.
    starts, _ = jax.lax.optimization_barrier((start + size * jnp.arange(blocks), q_GTD))
    carry, parts = jax.lax.scan(block, carry, starts)
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1]), parts)


def _forward_one(q_GTD, k_SD, v_SD, visible, scale):
    """(output [G, T, D], log-sum-exp of the scores [G, T, 1])."""
    parts = []
    for run in visible.runs():
        _, _, size, keys = run
        k, v = k_SD[:keys], v_SD[:keys]

        def block(carry, start, size=size, keys=keys, k=k, v=v):
            scores = _scores(_cut(q_GTD, start, size, 1), k, scale)
            scores = jnp.where(visible.mask(start, size, keys), scores, np.float32(MASKED))
            top = scores.max(-1, keepdims=True)
            p = jnp.exp(scores - top)
            total = p.sum(-1, keepdims=True)
            out = product("gqs,sd->gqd", p.astype(v.dtype), v) / total
            return carry, (out.astype(q_GTD.dtype), jnp.log(total) + top)

        parts.append(_loop(block, None, run, q_GTD)[1])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *parts)


def _backward_one(q_GTD, k_SD, v_SD, visible, out_GTD, lse_GT1, dout_GTD, scale):
    """Gradients of q, k and v. The probabilities of each block are recomputed from the log-sum-exp."""
    dtype = q_GTD.dtype
    delta_GT1 = (dout_GTD.astype(jnp.float32) * out_GTD.astype(jnp.float32)).sum(-1, keepdims=True)
    dout_GTD = dout_GTD.astype(dtype)
    dq = []
    sums = jnp.zeros(k_SD.shape, jnp.float32), jnp.zeros(v_SD.shape, jnp.float32)
    for run in visible.runs():
        _, _, size, keys = run
        k, v = k_SD[:keys], v_SD[:keys]

        def block(sums, start, size=size, keys=keys, k=k, v=v):
            q, do, lse, delta = (_cut(x, start, size, 1) for x in (q_GTD, dout_GTD, lse_GT1, delta_GT1))
            p = jnp.exp(_scores(q, k, scale) - lse)
            p = jnp.where(visible.mask(start, size, keys), p, np.float32(0))
            dscores = p * (product("gqd,sd->gqs", do, v) - delta)
            dscores = (dscores * np.float32(scale)).astype(dtype)
            dk = sums[0].at[:keys].add(product("gqs,gqd->sd", dscores, q))
            dv = sums[1].at[:keys].add(product("gqs,gqd->sd", p.astype(dtype), do))
            return (dk, dv), product("gqs,sd->gqd", dscores, k).astype(dtype)

        sums, part = _loop(block, sums, run, q_GTD)
        dq.append(part)
    return jnp.concatenate(dq, 1), sums[0].astype(k_SD.dtype), sums[1].astype(v_SD.dtype)


def _scores(q_GQD: jax.Array, k_SD: jax.Array, scale: float) -> jax.Array:
    return product("gqd,sd->gqs", q_GQD, k_SD) * np.float32(scale)
