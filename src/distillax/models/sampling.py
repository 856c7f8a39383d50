"""Sampling a token from logits, with random numbers of the row's own.

Shapes: B rows, V vocabulary, C blocks of W tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Sampler:
    """Static choices of sampling. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 cut nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False


def sample(logits_VB: jax.Array, key_B2: jax.Array, count_B: jax.Array, sampler: Sampler) -> jax.Array:
    """int32[B]: a token a row. The random number depends on the row's key (two uint32) and on how
    many tokens it has, and on nothing else."""
    if sampler.temperature == 0:
        return _first_greatest(logits_VB)
    return _draw(cut(logits_VB.T / np.float32(sampler.temperature), sampler), key_B2, count_B)


def _first_greatest(logits_VB: jax.Array) -> jax.Array:
    """argmax, which no backend vectorises, in one pass over the logits: the greatest of each block, then
    the place in the first block that has the greatest of all."""
    V, B = logits_VB.shape
    width = math.gcd(V, 256)
    logits_CWB = logits_VB.reshape(-1, width, B)
    block_B = jnp.argmax(logits_CWB.max(1), 0)
    logits_WB = jnp.take_along_axis(logits_CWB, block_B[None, None], 0)[0]
    return (block_B * width + jnp.argmax(logits_WB, 0)).astype(jnp.int32)


def cut(logits_BV: jax.Array, sampler: Sampler) -> jax.Array:
    """Top-k, then top-p of what is left; what is cut becomes -inf. Ties at the edge are kept."""
    if 0 < sampler.top_k < logits_BV.shape[-1]:
        edge = _edge(logits_BV, lambda kept: kept.sum(-1) >= sampler.top_k)
        logits_BV = jnp.where(logits_BV >= edge, logits_BV, -jnp.inf)
    if sampler.top_p < 1:
        p_BV = jax.nn.softmax(logits_BV, -1)
        edge = _edge(logits_BV, lambda kept: jnp.where(kept, p_BV, 0).sum(-1) >= np.float32(sampler.top_p))
        logits_BV = jnp.where(logits_BV >= edge, logits_BV, -jnp.inf)
    return logits_BV


def _edge(logits_BV: jax.Array, enough: Any) -> jax.Array:
    """The highest value whose set {logits >= value} is `enough`, by bisection over the bits of
    float32 (32 passes over the row cost less than sorting it)."""
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    ordered_BV = jnp.where(bits_BV < 0, bits_BV ^ np.int32(0x7FFFFFFF), bits_BV)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # {>= low} is enough, {>= high} is not
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        good = enough(ordered_BV >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    B = logits_BV.shape[0]
    bounds = (jnp.full((B,), -(2**31), jnp.int32), jnp.full((B,), 2**31 - 1, jnp.int32))
    low, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    low = jnp.where(low < 0, low ^ np.int32(0x7FFFFFFF), low)
    return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]


def _draw(logits_BV: jax.Array, key_B2: jax.Array, count_B: jax.Array) -> jax.Array:
    """Inverse-CDF sampling with one random number a row, in two levels: a block, then a token."""
    B, V = logits_BV.shape
    width = 256
    p_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    p_BCW = jnp.pad(p_BV, ((0, 0), (0, -V % width))).reshape(B, -1, width)

    def uniform(key: jax.Array, count: jax.Array) -> jax.Array:
        return jax.random.uniform(
            jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count)
        )

    mass_BC = p_BCW.sum(-1)
    target_B = jax.vmap(uniform)(key_B2, count_B) * mass_BC.sum(-1)
    block_B, rest_B = _locate(mass_BC, target_B)
    p_BW = jnp.take_along_axis(p_BCW, block_B[:, None, None], 1)[:, 0]
    token_B, _ = _locate(p_BW, rest_B)
    return (block_B * width + token_B).astype(jnp.int32)


def _locate(mass_BC: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index with positive mass whose cumulative mass exceeds the target, and the
    target less the mass before it."""
    total_BC = jnp.cumsum(mass_BC, -1)
    beyond_BC = (total_BC > target_B[:, None]) & (mass_BC > 0)
    last_B = mass_BC.shape[1] - 1 - jnp.argmax(mass_BC[:, ::-1] > 0, -1)  # rounding can leave none
    index_B = jnp.where(beyond_BC.any(-1), jnp.argmax(beyond_BC, -1), last_B)
    before_B = jnp.take_along_axis(total_BC - mass_BC, index_B[:, None], 1)[:, 0]
    return index_B, target_B - before_B
