"""Batched generation: prefill, decode and sampling over a key/value cache.

A fixed number of rows decode together; a finished row is refilled with the next prompt at once.
What a row computes does not depend on its neighbours: every product has one shape, whatever the
prompts and however long the cache, and random numbers come from a row's own key.

Shapes: B rows, R segments of one prefill, T tokens of a segment, N new tokens at most, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distillax.models import kv_cache, transformer
from distillax.models.backend import packed, product
from distillax.models.families import MATRIX_AXES, ModelConfig
from distillax.models.kv_cache import Cache
from distillax.models.layout import Mesh, Rules, active_mesh, mesh_of, on_mesh, weight_spec
from distillax.models.sampling import Sampler, sample
from distillax.models.schedule import Prompt, Table
from distillax.models.spec import Tree

_CHUNK = 16  # decode steps between two looks at which rows have finished


@dataclass(frozen=True)
class Answer:
    """The continuation of prompt number `index`, without the stop token. `stopped`: it ended by
    itself. `logprobs` in nats, of the model's own distribution (temperature 1, nothing cut)."""

    index: int
    tokens: list[int]
    stopped: bool
    logprobs: list[float] | None


class _Rows(NamedTuple):
    """The state of the decoding rows, but for their cache."""

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
    """Generates with one set of weights. Compiles once for each number of pages in use."""

    def __init__(
        self,
        params: Tree,
        config: ModelConfig,
        *,
        batch_size: int,
        max_length: int,
        dtype: Any,
        owned: bool = False,
    ):
        """`max_length`: prompt and answer together, at most, in tokens. `owned` weights are given away, and
        freed on the way to the engine's own. Devices of their mesh share heads, hidden units, cache."""
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.batch_size, self.max_length = batch_size, max_length
        self._mesh = mesh_of(params)
        self._weights = _unstack(params, config, self.dtype, self._mesh, owned)

    def run(
        self, prompts: Sequence[Prompt], sampler: Sampler, working: Callable[[int], None] = lambda _: None
    ) -> Iterator[Answer]:
        """Yields answers as they finish, in about the order of the prompts; of those that are near, ones that
        begin alike go one after the other. Now and then `working` is told the tokens of unfinished ones."""
        limits = [min(p.max_new_tokens, self.max_length - len(p.tokens)) for p in prompts]
        near = 4 * self.batch_size  # further apart, and a block of answers would be complete at the very end
        order = sorted(range(len(prompts)), key=lambda i: (i // near, list(prompts[i].tokens), i))
        yield from (Answer(i, [], False, [] if sampler.logprobs else None) for i in order if limits[i] <= 0)
        table = Table([i for i in reversed(order) if limits[i] > 0], prompts, limits, self.batch_size)
        # Limits that are near share a program.
        room = kv_cache.pages_for(max(limits, default=0)) * kv_cache.PAGE
        rows, cache = self._placed(_empty(self.batch_size, room), PartitionSpec()), Cache()
        while table.waiting or table.owner.count(None) < self.batch_size:
            for segments, tokens in table.refill():
                pages = self._pages(cache, tokens)
                with on_mesh(self._mesh):
                    rows, cache[:pages] = _prefill(
                        self._weights, cache[:pages], rows, segments, self.config, sampler
                    )
            pages = self._pages(cache, table.reach(_CHUNK))
            quorum = np.int32(table.quorum if table.waiting else self.batch_size)
            with on_mesh(self._mesh):
                rows, cache[:pages] = _decode(
                    self._weights, cache[:pages], rows, self.config, sampler, quorum
                )
            done, stopped, count = (np.asarray(x) for x in (rows.done_B, rows.stopped_B, rows.count_B))
            table.length = np.asarray(rows.length_B).astype(np.int64)
            owned = np.array([index is not None for index in table.owner])
            working(int(count[owned & ~done].sum()))
            finished = np.flatnonzero(owned & done)
            if len(finished):
                out, logprob = np.asarray(rows.out_BN), np.asarray(rows.logprob_BN)
            for row in finished:
                index, table.owner[row] = table.owner[row], None
                tokens = out[row, : count[row]].tolist()
                scores = logprob[row, : count[row]].tolist() if sampler.logprobs else None
                yield Answer(index, tokens, bool(stopped[row]), scores)  # type: ignore[arg-type]

    def _pages(self, cache: Cache, tokens: int) -> int:
        """Makes room for so many tokens a row; the number of pages that hold them."""
        pages = kv_cache.pages_for(tokens)
        while len(cache) < pages:
            page = kv_cache.empty_page(self.config, self.batch_size, self.dtype)
            cache.append(self._placed(page, _page_spec(self._mesh, self.config)))
        return pages

    def _placed(self, arrays: Any, spec: PartitionSpec) -> Any:
        return arrays if self._mesh is None else jax.device_put(arrays, NamedSharding(self._mesh, spec))


def _unstack(params: Tree, config: ModelConfig, dtype: Any, mesh: Mesh | None, owned: bool) -> Tree:
    """Weights in the compute dtype, a dictionary a layer: decoding runs through unrolled layers,
    and a slice of a stacked weight would be copied at every step. Matrices are turned to [O, I]:
    see `kv_cache.linear`. `lookup` is the embedding as `kv_cache.extend` reads it; `head` may be it again.
    On a mesh, each product's heads, hidden units or ids are split, as its devices can share them."""
    rules = {} if mesh is None else _rules(mesh, config)

    def sharding(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding | None:
        return None if mesh is None else NamedSharding(mesh, weight_spec(mesh, axes, shape, rules))

    layers: list[Tree] = [{} for _ in range(config.layers)]
    stacked = params["layers"]
    for name in list(stacked):
        weight = stacked.pop(name) if owned else stacked[name]
        matrix = weight.ndim == 3
        to = sharding(MATRIX_AXES[name][::-1] if matrix else (None,), weight.shape[:0:-1])
        for i, layer in enumerate(layers):
            layer[name] = _layer(weight, np.int32(i), dtype if matrix else jnp.dtype("float32"), to)
    embed = jnp.asarray(params["embed"], dtype)
    head = embed if config.tied else jnp.asarray(params["head"], dtype)
    lookup = packed(embed)
    if mesh is not None:
        head = jax.device_put(head, sharding(("vocab", None), head.shape))
        lookup = jax.device_put(lookup, sharding((None, "mlp"), lookup.shape))
    norm = jnp.asarray(params["final_norm"], jnp.float32)
    if owned:
        params.clear()
    return {"layers": layers, "final_norm": norm, "head": head, "lookup": lookup}


@jax.jit(static_argnums=(2, 3))
def _layer(stacked: jax.Array, i: Any, dtype: Any, to: NamedSharding | None) -> jax.Array:
    one = jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False).astype(dtype).T
    return one if to is None else jax.lax.with_sharding_constraint(one, to)


def _rules(mesh: Mesh, config: ModelConfig) -> Rules:
    """What the devices of a mesh share: heads are whole on each of them."""
    every = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1)
    rules = {"mlp": every, "vocab": every}
    heads = {"heads": config.heads, "kv_heads": config.kv_heads}
    return rules | {name: every for name, number in heads.items() if number % mesh.size == 0}


def _page_spec(mesh: Mesh | None, config: ModelConfig) -> PartitionSpec:
    return PartitionSpec() if mesh is None else PartitionSpec(None, _rules(mesh, config).get("kv_heads"))


def _laid_out(rows: _Rows, cache: Cache, config: ModelConfig) -> tuple[_Rows, Cache]:
    """Rows and cache as they came, for the next call to run the same program."""
    if (mesh := active_mesh()) is None:
        return rows, cache
    rows = jax.lax.with_sharding_constraint(rows, PartitionSpec())
    return rows, jax.lax.with_sharding_constraint(cache, _page_spec(mesh, config))


def _empty(batch: int, new_tokens: int) -> _Rows:
    def zeros(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros(shape, dtype)

    return _Rows(
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


@jax.jit(static_argnums=(4, 5), donate_argnums=(1, 2))
def _prefill(
    weights: Tree, cache: Cache, rows: _Rows, s: Any, config: ModelConfig, sampler: Sampler
) -> tuple[_Rows, Cache]:
    """Runs segments of prompts; where a prompt ends, samples the first token of its answer."""
    cache = kv_cache.copy_rows(cache, s.source_R, s.target_R)
    x_RTE, cache = kv_cache.extend(weights, cache, s.tokens_RT, s.start_R, s.count_R, s.row_R, config)
    last_R1E = jnp.take_along_axis(x_RTE, jnp.maximum(s.count_R - 1, 0)[:, None, None], 1)
    token_R, logprob_R = _sample(weights, last_R1E, s.key_R2, jnp.zeros_like(s.length_R), config, sampler)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[s.last_R].set(new, mode="drop")

    fresh = rows._replace(
        length_B=put(rows.length_B, s.length_R),
        count_B=put(rows.count_B, jnp.zeros_like(s.length_R)),
        limit_B=put(rows.limit_B, s.limit_R),
        done_B=put(rows.done_B, jnp.zeros(s.last_R.shape, bool)),
        stopped_B=put(rows.stopped_B, jnp.zeros(s.last_R.shape, bool)),
        key_B2=put(rows.key_B2, s.key_R2),
    )
    token_B, started_B = (
        put(rows.token_B, token_R),
        put(jnp.zeros_like(rows.done_B), jnp.ones_like(s.last_R, bool)),
    )
    logprob_B = put(jnp.zeros_like(rows.logprob_BN[:, 0]), logprob_R)
    return _laid_out(_append(fresh, token_B, logprob_B, started_B, sampler), cache, config)


@jax.jit(static_argnums=(3, 4), donate_argnums=(1, 2))
def _decode(
    weights: Tree, cache: Cache, rows: _Rows, config: ModelConfig, sampler: Sampler, quorum: Any
) -> tuple[_Rows, Cache]:
    """Up to _CHUNK steps; fewer once `quorum` rows wait to be refilled."""

    def go_on(carry: tuple[jax.Array, _Rows, Cache]) -> jax.Array:
        step, rows, _ = carry
        return (step < _CHUNK) & (rows.done_B.sum() < quorum)

    def body(carry: tuple[jax.Array, _Rows, Cache]) -> tuple[jax.Array, _Rows, Cache]:
        step, rows, cache = carry
        return step + 1, *_decode_step(weights, cache, rows, config, sampler)

    _, rows, cache = jax.lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), rows, cache))
    return _laid_out(rows, cache, config)


def _decode_step(
    weights: Tree, cache: Cache, rows: _Rows, config: ModelConfig, sampler: Sampler
) -> tuple[_Rows, Cache]:
    """One token for every row; rows that are done compute, and are not written to."""
    active_B = ~rows.done_B
    one_B = active_B.astype(jnp.int32)
    x, cache = kv_cache.extend(weights, cache, rows.token_B[:, None], rows.length_B, one_B, None, config)
    token_B, logprob_B = _sample(weights, x, rows.key_B2, rows.count_B, config, sampler)
    rows = rows._replace(length_B=rows.length_B + one_B)
    return _append(rows, token_B, logprob_B, active_B, sampler), cache


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
    hidden = transformer.rms_norm(x_B1E, weights["final_norm"], config).astype(weights["head"].dtype)
    logits_VB = product("ve,be->vb", weights["head"], hidden[:, 0])
    logits_VB = transformer.softcap(logits_VB, config.logit_softcap)
    if active_mesh() is not None:  # a few rows: every device samples all of them
        logits_VB = jax.lax.with_sharding_constraint(logits_VB, PartitionSpec())
    token_B = sample(logits_VB, key_B2, count_B, sampler)
    if not sampler.logprobs:
        return token_B, jnp.zeros(token_B.shape, jnp.float32)
    chosen_B = jnp.take_along_axis(logits_VB, token_B[None], 0)[0]
    return token_B, chosen_B - jax.nn.logsumexp(logits_VB, 0)
