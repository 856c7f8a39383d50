"""Divergences between log-probabilities, each with its gradient: what the chunked loss is made of.

(log p, log q, parameter) -> (value [C], gradient [V, C]): p is the teacher, q = softmax(u) the
student, and the gradient is with respect to u. V may be the vocabulary, or the buckets of a cache.
`train.losses` has the same as plain equations.

Logarithms are finite: that of zero is `LOG_ZERO`, so that zero times it is zero. A mask in its
place would keep XLA from fusing the sums.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

LOG_ZERO = -1e30
HEAD_MASS = 0.5  # of the teacher's likeliest tokens, in adaptive KL

Result = tuple[jax.Array, jax.Array]


def forward_kl(log_p: jax.Array, log_q: jax.Array, parameter: float = 0.0) -> Result:
    """KL(p || q)."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return (p * (log_p - log_q)).sum(0), q - p


def reverse_kl(log_p: jax.Array, log_q: jax.Array, parameter: float = 0.0) -> Result:
    """KL(q || p)."""
    q = jnp.exp(log_q)
    terms = q * (log_q - log_p)
    return terms.sum(0), _through_softmax(terms, q)


def jsd(log_p: jax.Array, log_q: jax.Array, beta: float) -> Result:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; 0 and 1: forward, reverse KL."""
    if beta in (0.0, 1.0):
        return (reverse_kl if beta else forward_kl)(log_p, log_q)
    p, q, log_m = jnp.exp(log_p), jnp.exp(log_q), _log_mix(log_p, log_q, beta)
    from_q = q * (log_q - log_m)
    to_q = np.float32(1 - beta) * from_q
    return (np.float32(beta) * p * (log_p - log_m) + to_q).sum(0), _through_softmax(to_q, q)


def skewed_forward_kl(log_p: jax.Array, log_q: jax.Array, skew: float) -> Result:
    """KL(p || m), m = skew p + (1 - skew) q."""
    p, q, log_m = jnp.exp(log_p), jnp.exp(log_q), _log_mix(log_p, log_q, skew)
    ratio = jnp.exp(log_q - log_m)  # q / m
    return (p * (log_p - log_m)).sum(0), _through_softmax(-np.float32(1 - skew) * p * ratio, q)


def skewed_reverse_kl(log_p: jax.Array, log_q: jax.Array, skew: float) -> Result:
    """KL(q || m), m = skew q + (1 - skew) p."""
    q, log_m = jnp.exp(log_q), _log_mix(log_q, log_p, skew)
    terms = q * (log_q - log_m)
    ratio = jnp.exp(log_q - log_m)
    return terms.sum(0), _through_softmax(terms - np.float32(skew) * q * ratio, q)


def tvd(log_p: jax.Array, log_q: jax.Array, parameter: float = 0.0) -> Result:
    """Half the sum of |p - q|."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    half = np.float32(0.5)
    return half * jnp.abs(p - q).sum(0), _through_softmax(half * q * jnp.sign(q - p), q)


def akl(log_p: jax.Array, log_q: jax.Array, parameter: float = 0.0) -> Result:
    """Forward and reverse KL, weighed (by constants) by where p and q are apart: in the teacher's
    likeliest tokens or in the others."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    sorted_p = -jnp.sort(-p, axis=0)
    before = jnp.cumsum(sorted_p, axis=0) - sorted_p
    least = jnp.where(before < np.float32(HEAD_MASS), sorted_p, jnp.inf).min(0)
    gap = jnp.abs(p - q)
    head, whole = jnp.where(p >= least[None], gap, 0).sum(0), gap.sum(0)
    share = jnp.where(whole > 0, head / jnp.where(whole > 0, whole, 1), np.float32(0.5))
    (forward, g_forward), (reverse, g_reverse) = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
    value = share * forward + (1 - share) * reverse
    return value, share[None] * g_forward + (1 - share)[None] * g_reverse


def log_softmax(logits_VC: jax.Array) -> jax.Array:
    """Over the vocabulary, which comes first, of logits that may be -inf. jax.nn's materialises what is
    subtracted."""
    top_C = logits_VC.max(0)
    log_q_VC = logits_VC - (jnp.log(jnp.exp(logits_VC - top_C[None]).sum(0)) + top_C)[None]
    return jnp.maximum(log_q_VC, np.float32(LOG_ZERO))


def entropy(log_q_VC: jax.Array) -> jax.Array:
    return -(jnp.exp(log_q_VC) * log_q_VC).sum(0)


DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array, float], Result]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "tvd": tvd,
    "akl": akl,
}


def _log_mix(log_a: jax.Array, log_b: jax.Array, share: float) -> jax.Array:
    """log(share a + (1 - share) b)."""
    return jnp.logaddexp(log_a + np.float32(np.log(share)), log_b + np.float32(np.log1p(-share)))


def _through_softmax(qa: jax.Array, q: jax.Array) -> jax.Array:
    """From q * df/dq to df/du, q being softmax(u). The logarithms of large logits are rounded, so that q sums
    to one only nearly: unless that is divided out, the gradient is off by as much of the whole sum."""
    return qa - q * (qa.sum(0) / q.sum(0))[None]
