"""Keys and values of rows that are being generated, in pages; attention to them.

A page holds the same 128 slots of every row. Pages are arrays of their own, so that a step reads as many as
the longest row needs, and the products of a page have one shape whatever the length of the cache: a page
that a row does not reach adds exact zeros. So a row's bits cannot depend on its neighbours' lengths.

Shapes: B rows of the cache, N rows of one call, T tokens of each, K key/value heads, G query heads a
key/value head, D head width, M = G * T queries, S slots of a page.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from distillax.models import transformer
from distillax.models.attention import MASKED
from distillax.models.backend import product, unpacked
from distillax.models.families import ModelConfig
from distillax.models.layout import active_mesh
from distillax.models.spec import Tree

PAGE = 128

Page = list[tuple[jax.Array, jax.Array]]  # a layer's keys and values, each [B, K, S, D]
Cache = list[Page]


def empty_page(config: ModelConfig, batch: int, dtype: Any) -> Page:
    zeros = as_bits(jnp.zeros((batch, config.kv_heads, PAGE, config.head_dim), dtype))
    return [(jnp.copy(zeros), jnp.copy(zeros)) for _ in range(config.layers)]


def as_bits(x: jax.Array) -> jax.Array:
    """bfloat16 as its bits (`backend.unpacked` undoes it), for what is read or written in places: XLA's CPU
    backend widens a whole bfloat16 array to float32 in order to gather or scatter."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens: few numbers, so few compilations. 1, 2, 3, 4, 6, 8, 12, ..."""
    needed, size = -(-tokens // PAGE), 1
    while size < needed:
        size = size * 3 // 2 if size > 1 and size & (size - 1) == 0 else -(-size * 4 // 3)
    return size


def copy_rows(cache: Cache, source_N: jax.Array, target_N: jax.Array) -> Cache:
    """The rows `source_N` as they were, also in the rows `target_N`; targets out of range are dropped."""
    return jax.tree.map(lambda x: x.at[target_N].set(x[source_N], mode="drop"), cache)


def extend(
    weights: Tree,
    cache: Cache,
    tokens_NT: jax.Array,
    start_N: jax.Array,
    count_N: jax.Array,
    row_N: jax.Array | None,
    config: ModelConfig,
) -> tuple[jax.Array, Cache]:
    """Runs tokens at positions `start_N` and on, of the cache's rows `row_N` (None: of every row, in order).

    The keys and values of the first `count_N` tokens of each are written. Returns the last layer's
    output, float32[N, T, E], and the cache. A row may stand in several places, with other positions.
    """
    N, T = tokens_NT.shape
    step_1T = jnp.arange(T, dtype=jnp.int32)[None]
    position_NT = start_N[:, None] + step_1T
    write_NT = jnp.where(step_1T < count_N[:, None], position_NT, len(cache) * PAGE)
    rope = transformer.rope_tables(position_NT, config)
    dtype = weights["head"].dtype
    at_N = jnp.arange(N) if row_N is None else row_N
    found = unpacked(weights["lookup"][tokens_NT.reshape(-1)])
    index_NT = jnp.arange(N * T, dtype=jnp.int32).reshape(N, T)
    if active_mesh() is not None:  # else the tokens' width would stay split, and be gathered for each product
        found = jax.lax.with_sharding_constraint(found, PartitionSpec())
    x = transformer.embed({"embed": found}, index_NT, config, dtype)
    written: Cache = [[] for _ in cache]
    for i, (layer, window) in enumerate(zip(weights["layers"], config.windows, strict=True)):

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, i: int = i, window: int = window) -> Any:
            cos, sin = transformer.select_rope(rope, window)
            q, k = transformer.rotate(q, cos, sin), transformer.rotate(k, cos, sin)
            pages = []
            for number, page in enumerate(cache):
                slot_NT = write_NT - number * PAGE
                keys, values = _write(page[i][0], k, at_N, slot_NT), _write(page[i][1], v, at_N, slot_NT)
                written[number].append((keys, values))
                pages.append((keys, values) if row_N is None else (keys[row_N], values[row_N]))
            return _attention(q, pages, position_NT, transformer.attention_scale(config), window), None

        x, _ = transformer.block(x, layer, config, attend, dtype, linear)
    return x, written


def linear(x: jax.Array, layer: Tree, name: str) -> jax.Array:
    """x @ w.T + bias as (w @ x.T).T. With a few rows a product costs what its weights take to read, and the
    CPU's kernel repacks the right operand, but not the left one."""
    y_ON = product("oi,ni->on", layer[name], x.reshape(-1, x.shape[-1]))
    return transformer.add_bias(y_ON.T.reshape(*x.shape[:-1], -1), layer.get(f"{name}_bias"))


def _write(page_BKSD: jax.Array, x_NTKD: jax.Array, row_N: jax.Array, slot_NT: jax.Array) -> jax.Array:
    """Slots outside of the page are dropped."""
    x_NTKD = as_bits(x_NTKD)
    slot_NT = jnp.where((slot_NT >= 0) & (slot_NT < PAGE), slot_NT, PAGE)
    if x_NTKD.shape[1] == 1:
        return page_BKSD.at[row_N, :, slot_NT[:, 0]].set(x_NTKD[:, 0], mode="drop")
    return page_BKSD.at[row_N[:, None], :, slot_NT].set(x_NTKD, mode="drop")


def _attention(
    q_NTHD: jax.Array, pages: list[Any], position_NT: jax.Array, scale: float, window: int
) -> jax.Array:
    """Each query sees the slots at or before its position, fewer than `window` back if that is positive.
    Softmax in float32 over all pages. [N, T, H, D]."""
    N, T, H, D = q_NTHD.shape
    K = pages[0][0].shape[1]
    q_NKMD = jnp.moveaxis(q_NTHD.reshape(N, T, K, H // K, D), 1, 3).reshape(N, K, -1, D)
    position_NM = jnp.tile(position_NT, (1, H // K))
    scores, values = [], []
    for number, page in enumerate(pages):
        k_NKSD, v_NKSD = map(unpacked, page)
        slot_S = jnp.arange(number * PAGE, (number + 1) * PAGE, dtype=jnp.int32)
        back_NMS = position_NM[:, :, None] - slot_S[None, None]
        visible = (back_NMS >= 0) & (back_NMS < window) if window else back_NMS >= 0
        z = product("nkmd,nksd->nkms", q_NKMD, k_NKSD) * np.float32(scale)
        scores.append(jnp.where(visible[:, None], z, np.float32(MASKED)))
        values.append(v_NKSD)
    # Starting from a bound keeps XLA from fusing the maximum of a single page with the exponential,
    # which it would round in another way than that of several.
    top = jnp.full((N, K, q_NKMD.shape[2], 1), MASKED, jnp.float32)
    for z in scores:
        top = jnp.maximum(top, z.max(-1, keepdims=True))
    total, out = jnp.zeros_like(top), jnp.zeros(q_NKMD.shape, jnp.float32)
    for z, v_NKSD in zip(scores, values, strict=True):
        p = jnp.exp(z - top)
        total = total + p.sum(-1, keepdims=True)
        out = out + product("nkms,nksd->nkmd", p.astype(q_NTHD.dtype), v_NKSD)
    out = (out / total).reshape(N, K, H // K, T, D)
    return jnp.moveaxis(out, 3, 1).reshape(N, T, H, D)
