"""Which ids of a distribution are kept: a few, whose weights have the distribution as their expectation.

Of all estimates on k ids, the one of least variance (Fearnhead & Clifford 2003, section 4): with c such
that sum_v min(p_v / c, 1) = k, ids with p_v >= c are kept with weight p_v, and of the others k - j are drawn,
each with probability p_v / c and weight c. Its variance, summed over ids, is p_v (c - p_v) of the others.

Shapes: n positions of an example, C positions of a chunk, K ids of a position at most, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_LANES = 128  # ids that are summed up before a draw is looked for among them


class Shares(NamedTuple):
    """Of each position: how many ids it has, and how many of these, the likeliest, are kept for sure."""

    counts: np.ndarray  # int32[n]
    sure: np.ndarray  # int32[n]


def share(top_p_nK: np.ndarray, tail_n: np.ndarray, squares_n: np.ndarray, mean: int) -> Shares:
    """Gives the positions of one example `mean` ids each, on average and at most, so that the sum of their
    variances is least: few where the teacher is sure, more where it is not.

    `top_p_nK` the K largest probabilities, descending; `tail_n` and `squares_n` the sum of all others, and of
    their squares.
    """
    n, K = top_p_nK.shape
    p, counts = top_p_nK.astype(np.float64), np.arange(1, K + 1)
    # Of what remains when the j likeliest are kept, j = 0..K: summed from the small ones, as 1 - sum would
    # lose them.
    left, squares = (
        np.concatenate([np.cumsum(x[:, ::-1], 1)[:, ::-1] + rest[:, None], rest[:, None]], 1)
        for x, rest in ((p, tail_n.astype(np.float64)), (p**2, squares_n.astype(np.float64)))
    )
    # The j-th is kept among k ids if p_j (k - j) >= left_j: from this k on, which grows with j.
    with np.errstate(divide="ignore", invalid="ignore"):
        least = np.ceil(np.nan_to_num(left[:, :K] / p, nan=np.inf) + np.arange(K))
    begins = np.minimum(least, K + 1).astype(np.int64) + np.arange(n)[:, None] * (K + 2)
    sure = np.cumsum(np.bincount(begins.ravel(), minlength=n * (K + 2)).reshape(n, K + 2), 1)[:, 1 : K + 1]
    rest, square = (np.take_along_axis(x, sure, 1) for x in (left, squares))
    variance = np.where(sure < counts, rest**2 / np.maximum(counts - sure, 1) - square, 0.0)
    at = _cheapest(variance, n * mean)
    return Shares((at + 1).astype(np.int32), np.take_along_axis(sure, at[:, None], 1)[:, 0].astype(np.int32))


def _cheapest(variance_nK: np.ndarray, budget: int) -> np.ndarray:
    """int[n], places in the rows, of the least sum with a count of `budget` ids at most."""

    def chosen(price: float) -> np.ndarray:
        return (variance_nK + price * np.arange(variance_nK.shape[1])).argmin(1)

    low, high = 1e-15, 1.0  # a variance is below 1, so at a price of 1 one id is best
    spare = budget - len(variance_nK)
    if chosen(low).sum() <= spare:
        return chosen(low)
    for _ in range(40):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if chosen(middle).sum() > spare else (low, middle)
    few, many = chosen(high), chosen(low)  # equal positions would have more all at once: some have
    return np.where(np.cumsum(many - few) <= spare - few.sum(), many, few)


def sample(
    p_CV: jax.Array, top_ids_CK: jax.Array, counts_C: jax.Array, sure_C: jax.Array, u_C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Ids of each distribution, and weights whose expectation is the distribution (int32, float32, [C, K]).
    The first `sure_C` are of `top_ids_CK`, the K likeliest, descending; then come those that are drawn, by
    systematic sampling, up to `counts_C`; slots left over weigh 0.

    `p_CV` float32 probabilities, `u_C` float32 uniform in [0, 1), one number a position.
    """
    C, V = p_CV.shape
    slot = jnp.arange(top_ids_CK.shape[1])[None]
    kept = slot < sure_C[:, None]
    others_C1 = (counts_C - sure_C)[:, None]
    rows = jnp.arange(C)[:, None]
    small_CV = p_CV.at[rows, jnp.where(kept, top_ids_CK, V)].set(np.float32(0), mode="drop")

    # Two levels: which run of ids, then which of it. Faster than a running sum over V, and more exact.
    runs = jnp.pad(small_CV, ((0, 0), (0, -V % _LANES))).reshape(C, -1, _LANES)
    mass = runs.sum(-1)
    sums = jnp.cumsum(mass, 1)
    c_C1 = sums[:, -1:] / jnp.maximum(others_C1, 1).astype(jnp.float32)
    below = np.float32(1 - 2**-23)
    place = jnp.clip(slot - sure_C[:, None], 0).astype(jnp.float32)
    mark_CK = jnp.minimum((u_C[:, None] + place) * c_C1, sums[:, -1:] * below)
    run_CK = jnp.minimum((sums[:, None] <= mark_CK[..., None]).sum(-1), sums.shape[1] - 1)
    before = jnp.take_along_axis(sums, run_CK, 1) - jnp.take_along_axis(mass, run_CK, 1)
    within = jnp.cumsum(jnp.take_along_axis(runs, run_CK[..., None], 1), -1)
    mark_CK = jnp.minimum(mark_CK - before, within[..., -1] * below)
    lane_CK = (within > mark_CK[..., None]).argmax(-1)
    drawn = jnp.minimum(run_CK * _LANES + lane_CK, V - 1)
    ids = jnp.where(kept, top_ids_CK, drawn).astype(jnp.int32)
    weights = jnp.where(kept, jnp.take_along_axis(p_CV, top_ids_CK, 1), c_C1)
    return ids, jnp.where(slot < counts_C[:, None], weights, np.float32(0))
