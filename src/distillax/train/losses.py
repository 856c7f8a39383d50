"""What a student can minimise, on full logits and like the equations: the reference for every faster path.

Each function gives one value per token, computed in float32, or in float64 where an input is. p is
the teacher's distribution, q the student's. A logit of -inf is a probability of zero: where both
models have it, values and gradients are finite, and the token counts for nothing. A row of nothing
else has divergence zero. Gradients flow to both sides: whoever freezes the teacher stops its own.

A temperature T divides the logits of both sides, and the divergence is multiplied by T^2, so that
its gradient keeps its size (Hinton et al. 2015). The parameters beta and skew are Python numbers.

Shapes: N tokens (any number of axes), V vocabulary, D width of the hidden states.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Divergence = Callable[[Array, Array, float, float], Array]

HEAD_MASS = 0.5  # mu of adaptive KL


def cross_entropy(logits_NV: Array, targets_N: Array) -> Array:
    """-log softmax(logits)[target]: logits [N, V], targets int[N] in 0..V-1 -> nats [N], in [0, inf]."""
    log_q_NV = _log_softmax(logits_NV)
    return -jnp.take_along_axis(log_q_NV, targets_N[..., None], axis=-1)[..., 0]


def entropy(logits: Array, temperature: float = 1.0) -> Array:
    """-sum p log p of p = softmax(logits / T): logits [N, V] -> nats [N], in [0, log V] (Shannon 1948)."""
    log_p = _log_softmax(logits, temperature)
    return -_kl(log_p, jnp.zeros_like(log_p))


def forward_kl(student_logits: Array, teacher_logits: Array, temperature: float = 1.0) -> Array:
    """T^2 KL(p || q): logits [N, V] -> nats [N], in [0, inf] (Hinton et al. 2015).

    Infinite where the student excludes a token that the teacher does not.
    """
    return _tempered(_kl, student_logits, teacher_logits, temperature)


def reverse_kl(student_logits: Array, teacher_logits: Array, temperature: float = 1.0) -> Array:
    """T^2 KL(q || p): logits [N, V] -> nats [N], in [0, inf] (MiniLLM, Gu et al. 2024).

    Infinite where the teacher excludes a token that the student does not.
    """
    return _tempered(lambda log_p, log_q: _kl(log_q, log_p), student_logits, teacher_logits, temperature)


def jsd(student_logits: Array, teacher_logits: Array, beta: float, temperature: float = 1.0) -> Array:
    """T^2 [beta KL(p || m) + (1 - beta) KL(q || m)], m = beta p + (1 - beta) q (GKD, Agarwal et al. 2024).

    Logits [N, V] -> nats [N], in T^2 [0, H(beta)] for 0 < beta < 1, H(1/2) = log 2. There it
    vanishes as beta KL(p || q) and (1 - beta) KL(q || p) at the ends; beta = 0 and 1 themselves mean
    forward and reverse KL, as in TRL.
    """
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student_logits, teacher_logits, temperature)

    def divergence(log_p: Array, log_q: Array) -> Array:
        log_m = _log_mixture(log_p, log_q, beta)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)

    return _tempered(divergence, student_logits, teacher_logits, temperature)


def skewed_forward_kl(
    student_logits: Array, teacher_logits: Array, skew: float, temperature: float = 1.0
) -> Array:
    """T^2 KL(p || skew p + (1 - skew) q): [N, V] -> nats [N], in T^2 [0, -log skew] (Ko et al. 2024)."""

    def divergence(log_p: Array, log_q: Array) -> Array:
        return _kl(log_p, _log_mixture(log_p, log_q, skew))

    return _tempered(divergence, student_logits, teacher_logits, temperature)


def skewed_reverse_kl(
    student_logits: Array, teacher_logits: Array, skew: float, temperature: float = 1.0
) -> Array:
    """T^2 KL(q || skew q + (1 - skew) p): [N, V] -> nats [N], in T^2 [0, -log skew] (Ko et al. 2024)."""
    return skewed_forward_kl(teacher_logits, student_logits, skew, temperature)


def tvd(student_logits: Array, teacher_logits: Array, temperature: float = 1.0) -> Array:
    """T^2 1/2 sum |p - q|: logits [N, V] -> probabilities, not nats, [N], in T^2 [0, 1] (Wen et al. 2023)."""

    def divergence(log_p: Array, log_q: Array) -> Array:
        return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1)

    return _tempered(divergence, student_logits, teacher_logits, temperature)


def akl(student_logits: Array, teacher_logits: Array, temperature: float = 1.0) -> Array:
    """T^2 [w KL(p || q) + (1 - w) KL(q || p)], adaptive KL: logits [N, V] -> nats [N], in [0, inf].

    w is the share of the gap sum |p - q| that lies in the teacher's head, 1/2 where there is no gap,
    and a constant to the gradient. The head is the smallest set of the teacher's likeliest tokens
    whose mass reaches mu = 1/2, with all that are as likely as its last one (Wu et al. 2024,
    "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models").
    """

    def divergence(log_p: Array, log_q: Array) -> Array:
        w = _head_share(*jax.lax.stop_gradient((jnp.exp(log_p), jnp.exp(log_q))))
        return w * _kl(log_p, log_q) + (1 - w) * _kl(log_q, log_p)

    return _tempered(divergence, student_logits, teacher_logits, temperature)


def cosine_distance(student_ND: Array, teacher_ND: Array) -> Array:
    """1 - cos(student, teacher): [N, D] twice -> [N], in [0, 2] (DistilBERT, Sanh et al. 2019).

    1, with a finite gradient, where a vector is zero.
    """
    return 1 - (_unit(_wide(student_ND)) * _unit(_wide(teacher_ND))).sum(-1)


def l2_distance(student_ND: Array, teacher_ND: Array) -> Array:
    """mean_D (student - teacher)^2: [N, D] twice -> [N], in [0, inf] (FitNets, Romero et al. 2015)."""
    return jnp.square(_wide(student_ND) - _wide(teacher_ND)).mean(-1)


def _tempered(
    divergence: Callable[[Array, Array], Array], student: Array, teacher: Array, temperature: float
) -> Array:
    """T^2 D(log p, log q) at temperature T: the one place where T^2 is."""
    log_p, log_q = _log_softmax(teacher, temperature), _log_softmax(student, temperature)
    return temperature**2 * divergence(log_p, log_q)


def _kl(log_a: Array, log_b: Array) -> Array:
    """sum a (log a - log b), where 0 log 0 = 0."""
    a = jnp.exp(log_a)
    # Masked before the difference as well, so that -inf - -inf, a NaN, is never computed.
    log_ratio = jnp.where(a == 0, 0.0, log_a) - jnp.where(a == 0, 0.0, log_b)
    return (a * log_ratio).sum(-1)


def _log_softmax(logits: Array, temperature: float = 1.0) -> Array:
    """log softmax(logits / T), -inf where the logit is, in all of a row if need be."""
    z = _wide(logits) / temperature
    excluded = z == -jnp.inf
    z = jnp.where(excluded.all(-1, keepdims=True), 0.0, z)
    return jnp.where(excluded, -jnp.inf, jax.nn.log_softmax(z))


def _log_mixture(log_a: Array, log_b: Array, weight: float) -> Array:
    """log(weight a + (1 - weight) b)."""
    if weight in (0, 1):
        return log_a if weight else log_b
    excluded = (log_a == -jnp.inf) & (log_b == -jnp.inf)
    log_a, log_b = jnp.where(excluded, 0.0, log_a), jnp.where(excluded, 0.0, log_b)
    return jnp.where(excluded, -jnp.inf, jnp.logaddexp(math.log(weight) + log_a, math.log1p(-weight) + log_b))


def _head_share(p: Array, q: Array) -> Array:
    """g_head / (g_head + g_tail) of adaptive KL, 1/2 without a gap."""
    likeliest = jnp.sort(p, axis=-1, descending=True)
    last = jnp.where(jnp.cumsum(likeliest, axis=-1) >= HEAD_MASS, likeliest, 0.0).max(-1, keepdims=True)
    gap = jnp.abs(p - q)
    head, total = jnp.where(p >= last, gap, 0.0).sum(-1), gap.sum(-1)
    return jnp.where(total == 0, 0.5, head / jnp.where(total == 0, 1.0, total))


def _unit(x: Array) -> Array:
    """x / |x|, zero for zero."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(square == 0, 1.0, square))


def _wide(x: Array) -> Array:
    """At least float32: a log-softmax in bfloat16 is off by more than a small divergence."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _entry(divergence: Callable[..., Array], *, has_parameter: bool = False) -> Divergence:
    def entry(student_logits: Array, teacher_logits: Array, parameter: float, temperature: float) -> Array:
        own = (parameter,) if has_parameter else ()
        return divergence(student_logits, teacher_logits, *own, temperature)

    return entry


# (student logits, teacher logits, parameter, temperature): beta or skew, which the others ignore.
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": _entry(forward_kl),
    "reverse_kl": _entry(reverse_kl),
    "jsd": _entry(jsd, has_parameter=True),
    "skewed_forward_kl": _entry(skewed_forward_kl, has_parameter=True),
    "skewed_reverse_kl": _entry(skewed_reverse_kl, has_parameter=True),
    "tvd": _entry(tvd),
    "akl": _entry(akl),
}
