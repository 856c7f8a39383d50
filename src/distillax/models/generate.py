"""Batched generation: prefill, decode and sampling over a key/value cache.

A fixed number of rows decode together; a finished row is refilled with the next prompt at once.
What a row computes does not depend on its neighbours: batch shapes are fixed, a prompt's padding
depends on its own length, and its random numbers on its own key.

Shapes: B rows, R rows of one prefill, P padded prompt tokens, S cache slots, N new tokens at most,
K key/value heads, G query heads a key/value head, D head width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distillax.models import transformer
from distillax.models.attention import MASKED, causal_attention
from distillax.models.backend import product
from distillax.models.families import ModelConfig
from distillax.models.sampling import Sampler, sample
from distillax.models.spec import Tree

_CHUNK = 16  # decode steps between two looks at which rows have finished


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue by at most `max_new_tokens`, with 64 bits of randomness of its own."""

    tokens: Sequence[int]
    max_new_tokens: int
    key: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Answer:
    """The continuation of prompt number `index`, without the stop token. `stopped`: it ended by
    itself. `logprobs` in nats, of the model's own distribution (temperature 1, nothing cut)."""

    index: int
    tokens: list[int]
    stopped: bool
    logprobs: list[float] | None


class _Rows(NamedTuple):
    """The state of the decoding rows."""

    cache: list[tuple[jax.Array, jax.Array]]  # a layer's keys [B, K, D, S] and values [B, K, S, D]
    length_B: jax.Array  # tokens in the cache
    token_B: jax.Array  # sampled, not yet in the cache
    count_B: jax.Array  # tokens of the answer so far
    limit_B: jax.Array  # tokens of the answer at most
    done_B: jax.Array
    stopped_B: jax.Array
    key_B2: jax.Array
    out_BN: jax.Array
    logprob_BN: jax.Array


class Engine:
    """Generates with one set of weights. Compiles once a prompt bucket and once a cache span."""

    def __init__(self, params: Tree, config: ModelConfig, *, batch_size: int, max_length: int, dtype: Any):
        """`max_length`: prompt and answer together, at most, in tokens."""
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.batch_size, self.max_length = batch_size, _span(max_length)
        self._prefill_rows = max(1, min(4, batch_size // 4))
        self._weights = _unstack(params, config, self.dtype)

    def run(self, prompts: Sequence[Prompt], sampler: Sampler) -> Iterator[Answer]:
        """Yields answers as they finish. Short prompts go first, so that prefills share a bucket."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].tokens), i))
        waiting = [i for i in order if prompts[i].max_new_tokens > 0]
        nothing = [i for i in order if prompts[i].max_new_tokens <= 0]
        yield from (Answer(i, [], False, [] if sampler.logprobs else None) for i in nothing)
        waiting.reverse()
        new_tokens = max((p.max_new_tokens for p in prompts), default=0)
        span = _span(0)
        rows = _empty(self.config, self.batch_size, span, new_tokens, self.dtype)
        owner: list[int | None] = [None] * self.batch_size
        length = np.zeros(self.batch_size, np.int64)
        while waiting or any(o is not None for o in owner):
            next_up = (len(prompts[i].tokens) for i in waiting[-self.batch_size :])
            needed = _span(min(max(int(length.max()), *next_up, 0) + _CHUNK, self.max_length))
            if needed > span:
                span, rows = needed, _grow(rows, needed)
            rows = self._refill(rows, waiting, owner, length, prompts, sampler)
            quorum = max(1, self._prefill_rows) if waiting else self.batch_size
            rows = _decode(self._weights, rows, self.config, sampler, quorum)
            done, stopped, count = (np.asarray(x) for x in (rows.done_B, rows.stopped_B, rows.count_B))
            length = np.asarray(rows.length_B).astype(np.int64)
            finished = [row for row in range(self.batch_size) if owner[row] is not None and done[row]]
            if finished:
                out, logprob = np.asarray(rows.out_BN), np.asarray(rows.logprob_BN)
            for row in finished:
                index, owner[row], length[row] = owner[row], None, 0
                tokens = out[row, : count[row]].tolist()
                scores = logprob[row, : count[row]].tolist() if sampler.logprobs else None
                yield Answer(index, tokens, bool(stopped[row]), scores)  # type: ignore[arg-type]

    def _refill(
        self,
        rows: _Rows,
        waiting: list[int],
        owner: list[int | None],
        length: np.ndarray,
        prompts: Sequence[Prompt],
        sampler: Sampler,
    ) -> _Rows:
        """Prefills waiting prompts into free rows, as many groups of one bucket as fit."""
        R = self._prefill_rows
        free = [row for row in range(self.batch_size) if owner[row] is None]
        idle = len(free) == self.batch_size
        while waiting and free and (len(free) >= R or idle):
            padded = _bucket(len(prompts[waiting[-1]].tokens))
            group: list[int] = []
            while waiting and len(group) < min(R, len(free)):
                if _bucket(len(prompts[waiting[-1]].tokens)) != padded:
                    break
                group.append(waiting.pop())
            tokens = np.zeros((R, padded), np.int32)
            lengths, limits = np.ones(R, np.int32), np.zeros(R, np.int32)
            keys = np.zeros((R, 2), np.uint32)
            slots = np.full(R, self.batch_size, np.int32)  # out of range: dropped
            for i, index in enumerate(group):
                prompt, slots[i] = prompts[index], free.pop(0)
                owner[slots[i]], length[slots[i]] = index, len(prompt.tokens)
                tokens[i, : len(prompt.tokens)] = prompt.tokens
                lengths[i], limits[i], keys[i] = len(prompt.tokens), prompt.max_new_tokens, prompt.key
            rows = _prefill(self._weights, rows, tokens, lengths, limits, keys, slots, self.config, sampler)
        return rows


def _bucket(tokens: int) -> int:
    """The padded length of a prompt, from its own length alone: 32, 48, 64, 96, 128, 192, ..."""
    size = 32
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _span(tokens: int) -> int:
    """Cache slots for so many tokens: few sizes, so few compilations. The cache grows through them,
    since a part of it would be copied at every step. Not below 256: there the CPU backend takes
    other kernels, and a row would be rounded in another way than in a longer cache."""
    size = 256
    while size < tokens:
        size *= 2
    return size


def _unstack(params: Tree, config: ModelConfig, dtype: Any) -> Tree:
    """Weights in the compute dtype, a dictionary a layer: decoding runs through unrolled layers,
    and a slice of a stacked weight would be copied at every step. Matrices are turned to [O, I]:
    see `_linear`."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        is_matrix = x.ndim == 3 or path[0].key in ("embed", "head")
        return jnp.asarray(x, dtype if is_matrix else jnp.float32)

    params = jax.tree_util.tree_map_with_path(cast, params)
    layers = [jax.tree.map(lambda x, i=i: x[i].T, params["layers"]) for i in range(config.layers)]
    return {**params, "layers": layers}


def _linear(x: jax.Array, w_OI: jax.Array, bias_O: jax.Array | None) -> jax.Array:
    """x @ w.T as (w @ x.T).T. With a few rows a product costs what its weights take to read, and the
    CPU's kernel repacks the right operand, but not the left one: 1.4 times as fast."""
    y_ON = product("oi,ni->on", w_OI, x.reshape(-1, x.shape[-1]))
    return transformer.add_bias(y_ON.T.reshape(*x.shape[:-1], -1), bias_O)


def _empty(config: ModelConfig, batch: int, slots: int, new_tokens: int, dtype: Any) -> _Rows:
    def zeros(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros(shape, dtype)

    K, D = config.kv_heads, config.head_dim
    stored = jnp.uint16 if dtype == jnp.bfloat16 else dtype
    cache = [
        (zeros(batch, K, D, slots, dtype=stored), zeros(batch, K, slots, D, dtype=stored))
        for _ in range(config.layers)
    ]
    return _Rows(
        cache=cache,
        length_B=zeros(batch),
        token_B=zeros(batch),
        count_B=zeros(batch),
        limit_B=zeros(batch),
        done_B=jnp.ones((batch,), bool),
        stopped_B=jnp.zeros((batch,), bool),
        key_B2=zeros(batch, 2, dtype=jnp.uint32),
        out_BN=zeros(batch, new_tokens),
        logprob_BN=zeros(batch, new_tokens, dtype=jnp.float32),
    )


@jax.jit(static_argnums=1)
def _grow(rows: _Rows, slots: int) -> _Rows:
    """The same rows with room for more tokens."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, slots - n if i == axis else 0) for i, n in enumerate(x.shape)])

    return rows._replace(cache=[(pad(keys, 3), pad(values, 2)) for keys, values in rows.cache])


def _pack(x: jax.Array) -> jax.Array:
    """bfloat16 goes into the cache as its bits: XLA's CPU backend widens a whole bfloat16 array to
    float32 and back in order to write one element."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _unpack(x: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


@jax.jit(static_argnums=(7, 8), donate_argnums=1)
def _prefill(
    weights: Tree,
    rows: _Rows,
    tokens_RP: jax.Array,
    length_R: jax.Array,
    limit_R: jax.Array,
    key_R2: jax.Array,
    slot_R: jax.Array,
    config: ModelConfig,
    sampler: Sampler,
) -> _Rows:
    """Runs prompts, writes their keys and values into their rows, and samples the first token."""
    R, P = tokens_RP.shape
    rope = transformer.rope_tables(jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (R, P)), config)
    scale, dtype = transformer.attention_scale(config), weights["embed"].dtype
    x = transformer.embed(weights, tokens_RP, config, dtype)
    cache = []
    for layer, window, (keys, values) in zip(weights["layers"], config.windows, rows.cache, strict=True):

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, window: int = window) -> tuple[jax.Array, Any]:
            cos, sin = transformer.select_rope(rope, window)
            q, k = transformer.rotate(q, cos, sin), transformer.rotate(k, cos, sin)
            return causal_attention(q, k, v, scale, window), (k, v)

        x, (k, v) = transformer.block(x, layer, config, attend, dtype, _linear)
        keys = keys.at[slot_R, :, :, :P].set(_pack(jnp.transpose(k, (0, 2, 3, 1))), mode="drop")
        values = values.at[slot_R, :, :P].set(_pack(jnp.swapaxes(v, 1, 2)), mode="drop")
        cache.append((keys, values))
    last_RE = jnp.take_along_axis(x, (length_R - 1)[:, None, None], 1)
    token_R, logprob_R = _sample(weights, last_RE, key_R2, jnp.zeros_like(length_R), config, sampler)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slot_R].set(new, mode="drop")

    fresh = rows._replace(
        cache=cache,
        length_B=put(rows.length_B, length_R),
        count_B=put(rows.count_B, jnp.zeros_like(length_R)),
        limit_B=put(rows.limit_B, limit_R),
        done_B=put(rows.done_B, jnp.zeros((R,), bool)),
        stopped_B=put(rows.stopped_B, jnp.zeros((R,), bool)),
        key_B2=put(rows.key_B2, key_R2),
    )
    started_B = jnp.zeros(rows.done_B.shape, bool).at[slot_R].set(True, mode="drop")
    return _append(
        fresh,
        put(rows.token_B, token_R),
        put(jnp.zeros_like(rows.logprob_BN[:, 0]), logprob_R),
        started_B,
        sampler,
    )


@jax.jit(static_argnums=(2, 3, 4), donate_argnums=1)
def _decode(weights: Tree, rows: _Rows, config: ModelConfig, sampler: Sampler, quorum: int) -> _Rows:
    """Up to _CHUNK steps; fewer once `quorum` rows wait to be refilled."""

    def go_on(carry: tuple[jax.Array, _Rows]) -> jax.Array:
        step, rows = carry
        return (step < _CHUNK) & (rows.done_B.sum() < quorum)

    def body(carry: tuple[jax.Array, _Rows]) -> tuple[jax.Array, _Rows]:
        step, rows = carry
        return step + 1, _decode_step(weights, rows, config, sampler)

    return jax.lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), rows))[1]


def _decode_step(weights: Tree, rows: _Rows, config: ModelConfig, sampler: Sampler) -> _Rows:
    """One token for every row; rows that are done compute, and are not written to."""
    B = rows.token_B.shape[0]
    K, G, D = config.kv_heads, config.heads // config.kv_heads, config.head_dim
    dtype, scale = weights["embed"].dtype, transformer.attention_scale(config)
    rope = transformer.rope_tables(rows.length_B[:, None], config)
    slots = rows.cache[0][1].shape[2]
    back_BS = rows.length_B[:, None] - jnp.arange(slots)[None]
    at_B = jnp.where(rows.done_B, slots, rows.length_B)  # out of range: dropped
    x = transformer.embed(weights, rows.token_B[:, None], config, dtype)
    cache = []
    for layer, window, (keys, values) in zip(weights["layers"], config.windows, rows.cache, strict=True):

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, window: int = window, old: Any = (keys, values)
        ) -> tuple[jax.Array, Any]:
            cos, sin = transformer.select_rope(rope, window)
            q, k = transformer.rotate(q, cos, sin), transformer.rotate(k, cos, sin)
            keys = old[0].at[jnp.arange(B), :, :, at_B].set(_pack(k[:, 0]), mode="drop")
            values = old[1].at[jnp.arange(B), :, at_B].set(_pack(v[:, 0]), mode="drop")
            k, v = _unpack(keys, dtype), _unpack(values, dtype)
            visible = (back_BS >= 0) & (back_BS < window) if window else back_BS >= 0
            scores = product("bkgd,bkds->bkgs", q.reshape(B, K, G, D), k)
            scores = jnp.where(visible[:, None, None], scores * np.float32(scale), np.float32(MASKED))
            p = jnp.exp(scores - scores.max(-1, keepdims=True))
            out = product("bkgs,bksd->bkgd", p.astype(dtype), v)
            out = out / p.sum(-1, keepdims=True)
            return out.reshape(B, 1, K * G, D), (keys, values)

        x, kept = transformer.block(x, layer, config, attend, dtype, _linear)
        cache.append(kept)
    token_B, logprob_B = _sample(weights, x, rows.key_B2, rows.count_B, config, sampler)
    active_B = ~rows.done_B
    rows = rows._replace(cache=cache, length_B=rows.length_B + active_B.astype(jnp.int32))
    return _append(rows, token_B, logprob_B, active_B, sampler)


def _append(
    rows: _Rows, token_B: jax.Array, logprob_B: jax.Array, active_B: jax.Array, sampler: Sampler
) -> _Rows:
    """Appends a token to the answers of the active rows, and marks those that are complete."""
    stop_B = jnp.isin(token_B, jnp.asarray(sampler.stop_token_ids, jnp.int32)) & active_B
    wrote_B = active_B & ~stop_B
    at_B = jnp.where(wrote_B, rows.count_B, rows.out_BN.shape[1])
    index_B = jnp.arange(token_B.shape[0])
    count_B = rows.count_B + wrote_B.astype(jnp.int32)
    return rows._replace(
        token_B=jnp.where(active_B, token_B, rows.token_B),
        count_B=count_B,
        done_B=rows.done_B | stop_B | (active_B & (count_B >= rows.limit_B)),
        stopped_B=rows.stopped_B | stop_B,
        out_BN=rows.out_BN.at[index_B, at_B].set(token_B, mode="drop"),
        logprob_BN=rows.logprob_BN.at[index_B, at_B].set(logprob_B, mode="drop"),
    )


def _sample(
    weights: Tree,
    x_B1E: jax.Array,
    key_B2: jax.Array,
    count_B: jax.Array,
    config: ModelConfig,
    sampler: Sampler,
) -> tuple[jax.Array, jax.Array]:
    """(token, log-probability) of each row, from the last layer's output."""
    hidden = transformer.rms_norm(x_B1E, weights["final_norm"], config).astype(weights["embed"].dtype)
    logits_VB = product("ve,be->vb", transformer.head_weights(weights, config), hidden[:, 0])
    logits_VB = transformer.softcap(logits_VB, config.logit_softcap)
    token_B = sample(logits_VB, key_B2, count_B, sampler)
    if not sampler.logprobs:
        return token_B, jnp.zeros(token_B.shape, jnp.float32)
    chosen_B = jnp.take_along_axis(logits_VB, token_B[None], 0)[0]
    return token_B, chosen_B - jax.nn.logsumexp(logits_VB, 0)
