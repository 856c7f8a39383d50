"""What a teacher in memory expects after each token: k ids a position, never [tokens, vocabulary].

Shapes: B rows, T tokens of a row, C positions of a chunk, E model width, V vocabulary, k ids of a position.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distillax.data.targets import Layout, round_log_ratios, round_weights
from distillax.models import transformer
from distillax.models.backend import loss_chunk_tokens, product
from distillax.models.families import ModelConfig
from distillax.models.spec import Tree

_SHORTEST_ROW = 128
_LANES = 128  # ids that are summed up before a draw is looked for among them


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
    products; logits, softmax and log-sum-exp are float32. `max_length` bounds the tokens of a row.
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
        self._max_length = max_length
        self._head_VE = transformer.head_weights(params, config).astype(dtype)

    def __enter__(self) -> "Embedded":
        return self

    def __exit__(self, *exc: object) -> None:
        self._params, self._head_VE = {}, jnp.zeros(())

    def capture(self, blocks: Iterable[Sequence[Item]]) -> Iterator[Captured]:
        """Yields every example of each block, in order."""
        for block in blocks:
            hidden_NE = self._hidden(block)
            targets_N = np.concatenate([item.tokens[1:][item.at] for item in block])
            u_N2 = np.concatenate([uniforms(self._seed, item.key, len(item.at)) for item in block])
            ids, codes, halves = self._targets(hidden_NE, targets_N, u_N2)
            start = 0
            for item in block:
                part = slice(start, start := start + len(item.at))
                data = self._layout.encode(ids[part], codes[part], halves[part])
                yield Captured(item.key, data, len(item.tokens) - 1)

    def _hidden(self, block: Sequence[Item]) -> np.ndarray:
        """[N, E]: the states before every target of the block that bears loss, in the examples' order."""
        lengths = [len(item.tokens) - 1 for item in block]
        T = _row_length(max(lengths), self._max_length)
        B = max(1, _step_tokens() // T)
        rows = pack(lengths, T)
        found: dict[int, np.ndarray] = {}
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
            hidden = _forward(self._params, tokens, segments, positions, self._config, self._dtype)
            states = np.asarray(hidden)
            found.update((i, states[at]) for i, at in places)
        return np.concatenate([found[i] for i in range(len(block))])

    def _targets(
        self, hidden_NE: np.ndarray, targets_N: np.ndarray, u_N2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids int[N, k] ascending, codes int[N, k], halves float32[N, 3]; see Layout."""
        C, count = loss_chunk_tokens(self._head_VE.shape[0]), len(targets_N)
        sampled = self._layout.format == "sampled"
        of_chunk = _sampled if sampled else _topk
        outs = []
        for start in range(0, count, C):
            part = slice(start, start + C)
            h, y, u = (_padded(values[part], C) for values in (hidden_NE, targets_N, u_N2[:, 0]))
            cap = self._config.logit_softcap
            outs.append(_chunk(of_chunk, h, self._head_VE, y, u, self._layout.k, cap, self._temperature))
        ids, values, halves = (
            np.concatenate([np.asarray(x) for x in xs])[:count] for xs in zip(*outs, strict=True)
        )
        order = np.argsort(ids, 1, kind="stable")
        ids, values = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
        codes = round_weights(values, u_N2[:, 1]) if sampled else round_log_ratios(values)
        return ids, codes, halves


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
    hidden_BTE = transformer.hidden_states(
        params, tokens, config, segment_ids_BT=segments, positions_BT=positions, dtype=jnp.dtype(dtype)
    )
    return hidden_BTE.reshape(-1, hidden_BTE.shape[-1])


class _Logits(NamedTuple):
    """Of a chunk: logits over the temperature and their log-sum-exp; log-sum-exp and NLL at temperature 1."""

    z_CV: jax.Array
    lse_z_C: jax.Array
    lse_C: jax.Array
    nll_C: jax.Array


@partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _chunk(
    of_chunk: Callable[[_Logits, jax.Array, int], tuple[jax.Array, jax.Array, jax.Array]],
    h_CE: jax.Array,
    head_VE: jax.Array,
    targets_C: jax.Array,
    u_C: jax.Array,
    k: int,
    cap: float | None,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ids [C, k], a number for each, and (log-sum-exp, NLL, a third) [C, 3], as `of_chunk` says."""
    logits_CV = transformer.softcap(product("ce,ve->cv", h_CE, head_VE), cap)
    lse_C = jax.nn.logsumexp(logits_CV, -1)
    nll_C = lse_C - jnp.take_along_axis(logits_CV, targets_C[:, None], 1)[:, 0]
    z_CV = logits_CV if temperature == 1.0 else logits_CV / np.float32(temperature)
    lse_z_C = lse_C if temperature == 1.0 else jax.nn.logsumexp(z_CV, -1)
    return of_chunk(_Logits(z_CV, lse_z_C, lse_C, nll_C), u_C, k)


def _sampled(x: _Logits, u_C: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ids, their weights, and (log-sum-exp, NLL, entropy at the temperature)."""
    p_CV = jnp.exp(x.z_CV - x.lse_z_C[:, None])
    entropy_C = x.lse_z_C - (p_CV * x.z_CV).sum(-1)
    ids, weights = sample(p_CV, u_C, k)
    return ids, weights, jnp.stack([x.lse_C, x.nll_C, entropy_C], 1)


def _topk(x: _Logits, u_C: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ids, log(p / largest p) <= 0, and (log-sum-exp, NLL, log of the mass beyond the k)."""
    top_z, ids = _top(x.z_CV, k)
    p_CV = jnp.exp(x.z_CV - x.lse_z_C[:, None])
    tail_C = jnp.where(_after(x.z_CV, top_z[:, -1:], ids[:, -1:]), p_CV, np.float32(0)).sum(-1)
    return ids, top_z - top_z[:, :1], jnp.stack([x.lse_C, x.nll_C, jnp.log(tail_C)], 1)


def _top(x_CV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest, descending, with their ids. The barrier keeps XLA from moving the slices of those who
    use them into the top-k, which its CPU backend then does by sorting everything."""
    return jax.lax.optimization_barrier(tuple(jax.lax.top_k(x_CV, k)))


def _after(x_CV: jax.Array, value_C1: jax.Array, id_C1: jax.Array) -> jax.Array:
    """bool[C, V]: what comes after (value, id) in the order of top_k: of equals, the lower id is first."""
    ids = jnp.arange(x_CV.shape[1])[None]
    return (x_CV < value_C1) | ((x_CV == value_C1) & (ids > id_C1))


def sample(p_CV: jax.Array, u_C: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """k ids of each distribution with weights whose expectation is the distribution: (int32[C, k],
    float32[C, k]), in no order. `p_CV` float32 probabilities, `u_C` float32 uniform in [0, 1).

    The unbiased k-sparse estimate of least variance (Fearnhead & Clifford 2003, section 4): with c such
    that sum_v min(p_v / c, 1) = k, ids with p_v >= c are kept with weight p_v, and of the others k - j
    are drawn, each with probability p_v / c and weight c, by systematic sampling (one uniform number).
    If no more than k ids have any probability, all are kept, and slots left over weigh 0.
    """
    C, V = p_CV.shape
    slot = jnp.arange(k)[None]
    top_p, top_ids = _top(p_CV, k)
    tail_CV = jnp.where(_after(p_CV, top_p[:, -1:], top_ids[:, -1:]), p_CV, np.float32(0))
    # What is left when the j likeliest are kept; summed from the small ones, as 1 - sum would lose them.
    left_Ck = tail_CV.sum(-1, keepdims=True) + jnp.cumsum(top_p[:, ::-1], 1)[:, ::-1]
    fits_Ck = top_p < left_Ck / (k - slot).astype(jnp.float32)
    j_C1 = jnp.where(fits_Ck.any(1), fits_Ck.argmax(1), k)[:, None]
    drawn = slot >= j_C1
    last_C1 = jnp.maximum(j_C1 - 1, 0)
    last_p = jnp.where(j_C1 > 0, jnp.take_along_axis(top_p, last_C1, 1), np.float32(np.inf))
    last_id = jnp.take_along_axis(top_ids, last_C1, 1)
    small_CV = jnp.where(_after(p_CV, last_p, last_id), p_CV, np.float32(0))

    # Two levels: which run of ids, then which of it. Faster than a running sum over V, and more exact.
    runs = jnp.pad(small_CV, ((0, 0), (0, -V % _LANES))).reshape(C, -1, _LANES)
    mass = runs.sum(-1)
    sums = jnp.cumsum(mass, 1)
    c_C1 = sums[:, -1:] / jnp.maximum(k - j_C1, 1).astype(jnp.float32)
    below = np.float32(1 - 2**-23)
    mark_Ck = jnp.minimum((u_C[:, None] + (slot - j_C1).astype(jnp.float32)) * c_C1, sums[:, -1:] * below)
    run_Ck = jnp.minimum((sums[:, None] <= mark_Ck[..., None]).sum(-1), sums.shape[1] - 1)
    before = jnp.take_along_axis(sums, run_Ck, 1) - jnp.take_along_axis(mass, run_Ck, 1)
    within = jnp.cumsum(jnp.take_along_axis(runs, run_Ck[..., None], 1), -1)
    mark_Ck = jnp.minimum(mark_Ck - before, within[..., -1] * below)
    lane_Ck = (within > mark_Ck[..., None]).argmax(-1)
    ids = jnp.minimum(run_Ck * _LANES + lane_Ck, V - 1)
    return jnp.where(drawn, ids, top_ids).astype(jnp.int32), jnp.where(drawn, c_C1, top_p)
