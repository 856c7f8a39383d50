"""What a teacher in memory expects after each token: a few ids a position, never [tokens, vocabulary].

Shapes: B rows, T tokens of a row, C positions of a chunk, E model width, V vocabulary, K ids of a
position at most.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distillax.data.targets import DRAWN, Encoded, Layout, round_log_ratios, round_weights
from distillax.errors import UserError
from distillax.models import transformer
from distillax.models.backend import loss_chunk_tokens, product
from distillax.models.families import ModelConfig
from distillax.models.layout import AXES, BATCH_AXES, active_mesh, mesh_of, on_mesh
from distillax.models.spec import Tree
from distillax.parallel.mesh import rows_at_once
from distillax.teachers.draws import sample, share

_SHORTEST_ROW = 128
_GROUP = 64  # ids among which `_top` knows the largest first


@dataclass(frozen=True)
class Item:
    """An example to capture, cut to its length limit: `tokens` int32[n + 1], and the shifted positions
    that bear loss, `at` int[p], in [0, n). `key` is its id, in hexadecimal digits."""

    key: str
    tokens: np.ndarray
    at: np.ndarray


class Captured(NamedTuple):
    """`data` is the encoded example, or None if it failed, and `error` says why."""

    key: str
    data: bytes | None
    tokens: int  # that the teacher read
    error: str | None = None


class Embedded:
    """Captures with weights that are in memory. Use as a context manager: leaving it frees them.

    What comes out of a block of examples depends on that block alone. `dtype` is that of the matrix
    products; logits, softmax and log-sum-exp are float32. `max_length` bounds the tokens of a row. Where the
    weights lie on a mesh, its devices share the rows, and the positions of a chunk.
    """

    whole_blocks = True  # the examples of a block are computed together

    def __init__(
        self,
        config: ModelConfig,
        params: Tree,
        layout: Layout,
        *,
        temperature: float,
        seed: int,
        dtype: str,
        max_length: int,
    ):
        self._config, self._params, self._layout = config, params, layout
        self._temperature, self._seed, self._dtype = temperature, seed, dtype
        self._max_length, self._mesh = max_length, mesh_of(params)
        self._head_VE = transformer.head_weights(params, config).astype(dtype)

    def __enter__(self) -> "Embedded":
        return self

    def __exit__(self, *exc: object) -> None:
        self._params, self._head_VE = {}, jnp.zeros(())

    def capture(self, blocks: Iterable[Sequence[Item]]) -> Iterator[Captured]:
        """Yields every example of each block, in order, one block late: while the devices compute a block, a
        thread encodes the one before."""
        upcoming = iter(blocks)
        before: Future[list[Captured]] | None = None
        with ThreadPoolExecutor(1) as thread:
            while True:
                try:
                    block = next(upcoming, None)  # which is read and tokenised here
                    found = self._targets(block) if block is not None else ()
                finally:  # where an error or a signal ends it, too: what is finished is not lost
                    if before is not None:
                        yield from before.result()
                if block is None:
                    return
                before = thread.submit(self._encoded, block, *found)

    def _targets(self, block: Sequence[Item]) -> tuple[np.ndarray, ...]:
        """counts int[N], ids int[N, K] ascending, of which the first `counts` are there, codes int[N, K] and
        numbers float32[N, 3], of all N positions of a block; see Encoded."""
        hidden_NE = self._hidden(block)
        targets_N = np.concatenate([item.tokens[1:][item.at] for item in block])
        if self._layout.format == "topk":
            return self._likeliest(hidden_NE, targets_N)
        u_N2 = np.concatenate([uniforms(self._seed, item.key, len(item.at)) for item in block])
        return self._sampled(hidden_NE, targets_N, u_N2, _ends(block))

    def _encoded(self, block: Sequence[Item], *found: np.ndarray) -> list[Captured]:
        done: list[Captured] = []
        for item, *arrays in zip(block, *(np.split(x, _ends(block)[:-1]) for x in found), strict=True):
            counts, ids, codes, numbers = arrays
            filled = np.arange(ids.shape[1]) < counts[:, None]
            data = self._layout.encode(Encoded(counts, ids[filled], codes[filled], numbers))
            done.append(Captured(item.key, data, len(item.tokens) - 1))
        return done

    def _hidden(self, block: Sequence[Item]) -> np.ndarray:
        """[N, E]: the states before every target of the block that bears loss, in the examples' order."""
        lengths = [len(item.tokens) - 1 for item in block]
        T = _row_length(max(lengths), self._max_length)
        rows = pack(lengths, T)
        B = rows_at_once(self._mesh, len(rows), max(1, _step_tokens() // T))
        found: dict[int, np.ndarray] = {}
        computing: list[tuple[jax.Array, list[tuple[int, np.ndarray]]]] = []

        def fetch() -> None:
            hidden, places = computing.pop(0)
            states = np.asarray(hidden)
            found.update((i, states[at]) for i, at in places)

        for first in range(0, len(rows), B):
            step = rows[first : first + B]
            tokens, segments, positions = np.zeros((3, B, T), np.int32)
            places = []
            for r, members in enumerate(step):
                start = 0
                for s, i in enumerate(members, start=1):
                    part = slice(start, start + lengths[i])
                    tokens[r, part], segments[r, part] = block[i].tokens[:-1], s
                    positions[r, part] = np.arange(lengths[i])
                    places.append((i, r * T + start + block[i].at))
                    start += lengths[i]
            with on_mesh(self._mesh):
                arrays = self._split((tokens, segments, positions), BATCH_AXES)
                hidden = _forward(self._params, *arrays, self._config, self._dtype)
            computing.append((hidden, places))
            if len(computing) > 1:  # one step is fetched while the devices compute the next
                fetch()
        fetch()
        return np.concatenate([found[i] for i in range(len(block))])

    def _split(self, arrays: Any, axes: tuple[str, ...]) -> Any:
        """Arrays of the host, their first axis split over the mesh axes."""
        if self._mesh is None:
            return arrays
        return jax.device_put(arrays, NamedSharding(self._mesh, PartitionSpec(axes)))

    def _likeliest(self, hidden_NE: np.ndarray, targets_N: np.ndarray) -> tuple[np.ndarray, ...]:
        ids, top_z, numbers = self._chunks(_topk, hidden_NE, targets_N)
        order = np.argsort(ids, 1, kind="stable")
        codes = np.take_along_axis(round_log_ratios(top_z), order, 1)
        return np.full(len(ids), ids.shape[1]), np.take_along_axis(ids, order, 1), codes, numbers

    def _sampled(
        self, hidden_NE: np.ndarray, targets_N: np.ndarray, u_N2: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """With room for `Layout.slots` ids. `ends` are those of the examples, each of which shares its ids
        out among its positions."""
        top_ids, top_p, numbers = self._chunks(_peaks, hidden_NE, targets_N)
        numbers, sums = numbers[:, :3], numbers[:, 3:]
        parts = zip(*(np.split(x, ends[:-1]) for x in (top_p, *sums.T)), strict=True)
        shares = [share(top, tail, squares, self._layout.k) for top, tail, squares in parts]
        counts, sure = (np.concatenate(x) for x in zip(*shares, strict=True))
        ids, weights, _ = self._chunks(_drawn, hidden_NE, targets_N, top_ids, counts, sure, u_N2[:, 0])
        slot = np.arange(ids.shape[1])
        kept = slot < sure[:, None]
        codes = np.where(kept, round_weights(np.where(kept, weights, 0), u_N2[:, 1]), DRAWN)
        order = np.argsort(np.where(slot < counts[:, None], ids, self._layout.vocab_size), 1, kind="stable")
        return counts, np.take_along_axis(ids, order, 1), np.take_along_axis(codes, order, 1), numbers

    def _chunks(
        self, of_chunk: "_OfChunk", hidden_NE: np.ndarray, *more: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """`of_chunk` of all positions, chunk by chunk: ids [N, K], a number for each, and more numbers."""
        devices = 1 if self._mesh is None else self._mesh.size
        C, count = devices * loss_chunk_tokens(self._head_VE.shape[0]), len(hidden_NE)
        settings = self._layout.slots, self._config.logit_softcap, self._temperature
        outs = []
        for start in range(0, count, C):
            arrays = tuple(_padded(values[start : start + C], C) for values in (hidden_NE, *more))
            with on_mesh(self._mesh):
                h, *rest = self._split(arrays, AXES)
                outs.append(_chunk(of_chunk, h, self._head_VE, tuple(rest), *settings))
        found = tuple(np.concatenate([np.asarray(x) for x in xs])[:count] for xs in zip(*outs, strict=True))
        if np.isnan(found[-1]).any():
            raise UserError(
                "the teacher's logits are not numbers (NaN); check its weights, or give --dtype float32"
            )
        return found


def _ends(block: Sequence[Item]) -> np.ndarray:
    """Where the positions of each example end among those of the block."""
    return np.cumsum([len(item.at) for item in block])


def uniforms(seed: int, key: str, positions: int) -> np.ndarray:
    """float32[positions, 2], uniform in [0, 1): they depend on the seed and the example's id alone, and
    those of a shorter example are the first of a longer one's."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.random((positions, 2), dtype=np.float32)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of documents, row by row: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def _row_length(longest: int, limit: int) -> int:
    """Few different lengths, so that few programs are compiled; attention costs less in short rows."""
    length = _SHORTEST_ROW
    while length < longest:
        length *= 2
    return max(longest, min(length, limit))


def _step_tokens() -> int:
    return 2048 if jax.default_backend() == "cpu" else 8192


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, [(0, length - len(values)), *[(0, 0)] * (values.ndim - 1)])


@partial(jax.jit, static_argnums=(4, 5))
def _forward(
    params: Tree,
    tokens: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    config: ModelConfig,
    dtype: str,
) -> jax.Array:
    """[B * T, E]"""
    rows = {"segment_ids_BT": segments, "positions_BT": positions}
    hidden_BTE = transformer.hidden_states(
        params, tokens, config, dtype=jnp.dtype(dtype), frozen=True, **rows
    )
    return hidden_BTE.reshape(-1, hidden_BTE.shape[-1])


class _Logits(NamedTuple):
    """Of a chunk: logits over the temperature and their log-sum-exp; log-sum-exp and NLL at temperature 1."""

    z_CV: jax.Array
    lse_z_C: jax.Array
    lse_C: jax.Array
    nll_C: jax.Array

    def p_CV(self) -> jax.Array:
        return jnp.exp(self.z_CV - self.lse_z_C[:, None])


_OfChunk = Callable[[_Logits, tuple[jax.Array, ...], int], tuple[jax.Array, jax.Array, jax.Array]]


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _chunk(
    of_chunk: _OfChunk,
    h_CE: jax.Array,
    head_VE: jax.Array,
    more: tuple[jax.Array, ...],
    slots: int,
    cap: float | None,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `of_chunk` says of the logits and of `more`, whose first are the targets [C]. On a mesh, every
    device takes its own positions, with the head gathered for as long."""
    local = partial(_of_positions, of_chunk, slots, cap, temperature)
    if (mesh := active_mesh()) is not None:
        each, whole = PartitionSpec(AXES), PartitionSpec()
        local = jax.shard_map(local, mesh=mesh, in_specs=(each, whole, each), out_specs=each, check_vma=False)
    return local(h_CE, head_VE, more)


def _of_positions(
    of_chunk: _OfChunk,
    slots: int,
    cap: float | None,
    temperature: float,
    h_CE: jax.Array,
    head_VE: jax.Array,
    more: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits_CV = transformer.softcap(product("ce,ve->cv", h_CE, head_VE), cap)
    lse_C = jax.nn.logsumexp(logits_CV, -1)
    nll_C = lse_C - jnp.take_along_axis(logits_CV, more[0][:, None], 1)[:, 0]
    z_CV = logits_CV if temperature == 1.0 else logits_CV / np.float32(temperature)
    lse_z_C = lse_C if temperature == 1.0 else jax.nn.logsumexp(z_CV, -1)
    return of_chunk(_Logits(z_CV, lse_z_C, lse_C, nll_C), more[1:], slots)


def _peaks(x: _Logits, _: tuple[jax.Array, ...], slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The likeliest ids, their probabilities, and (log-sum-exp, NLL, entropy at the temperature, mass beyond
    the likeliest, its squares)."""
    p_CV = x.p_CV()
    entropy_C = x.lse_z_C - (p_CV * x.z_CV).sum(-1)
    top_z, ids = _top(x.z_CV, slots)
    tail_CV = jnp.where(_after(x.z_CV, top_z[:, -1:], ids[:, -1:]), p_CV, np.float32(0))
    numbers = (x.lse_C, x.nll_C, entropy_C, tail_CV.sum(-1), (tail_CV**2).sum(-1))
    return ids, jnp.exp(top_z - x.lse_z_C[:, None]), jnp.stack(numbers, 1)


def _drawn(x: _Logits, more: tuple[jax.Array, ...], slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ids and their weights, of (the likeliest ids, how many ids, how many of them are kept, u)."""
    ids, weights = sample(x.p_CV(), *more)
    return ids, weights, x.nll_C


def _topk(x: _Logits, _: tuple[jax.Array, ...], k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ids, log(p / largest p) <= 0, and (log-sum-exp, NLL, log of the mass beyond the k)."""
    top_z, ids = _top(x.z_CV, k)
    tail_C = jnp.where(_after(x.z_CV, top_z[:, -1:], ids[:, -1:]), x.p_CV(), np.float32(0)).sum(-1)
    return ids, top_z - top_z[:, :1], jnp.stack([x.lse_C, x.nll_C, jnp.log(tail_C)], 1)


def _top(x_CV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest, descending, with their ids; of equals, the lower id is first.

    They are in the k groups of ids that have the largest maxima: of V numbers, V / 64 maxima and 64 k members
    are looked through, or sorted, as GPUs do.
    """
    C, V = x_CV.shape
    if k > V // _GROUP:
        return _top_k(x_CV, k)
    x_CGg = jnp.pad(x_CV, ((0, 0), (0, -V % _GROUP)), constant_values=-np.inf).reshape(C, -1, _GROUP)
    groups_Ck = jnp.sort(_top_k(x_CGg.max(-1), k)[1], 1)
    values, at = _top_k(jnp.take_along_axis(x_CGg, groups_Ck[..., None], 1).reshape(C, -1), k)
    return values, jnp.take_along_axis(groups_Ck, at // _GROUP, 1) * _GROUP + at % _GROUP


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The barriers keep XLA from moving the slices of those who use them into the top-k, which its CPU
    backend then does by sorting everything. One for both would crash it where a program is split."""
    values, ids = jax.lax.top_k(x, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(ids)


def _after(x_CV: jax.Array, value_C1: jax.Array, id_C1: jax.Array) -> jax.Array:
    """bool[C, V]: what comes after (value, id) in the order of top_k: of equals, the lower id is first."""
    ids = jnp.arange(x_CV.shape[1])[None]
    return (x_CV < value_C1) | ((x_CV == value_C1) & (ids > id_C1))
