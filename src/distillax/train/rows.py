"""What one token's loss is, given its logits: the functions that `train.fused` calls on each chunk.

Each is a frozen dataclass, so that it is hashable, called as (logits [V, C], tokens of the chunk,
constants) -> (loss [C], terms {name: [C]}, d loss / d logits [V, C]). All of it is float32.

With a teacher, loss = alpha * T^2 * divergence(p_T, q_T) + (1 - alpha) * cross entropy, where p_T
and q_T are the softmaxes at temperature T, and the cross entropy is at temperature 1.

Shapes: C tokens of a chunk, V vocabulary, F width of the teacher, K ids of a cached token.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillax.models.backend import product
from distillax.models.transformer import softcap
from distillax.train.divergences import DIVERGENCES, LOG_ZERO, entropy, log_softmax
from distillax.train.fused import Terms

Output = tuple[jax.Array, Terms, jax.Array]
Distance = tuple[jax.Array, jax.Array, Terms]

# A tail that rounding took away would make a reverse divergence infinite, and a student without any (all
# ids are in the head, or what is left underflows) a forward one.
_LEAST_TAIL, _LEAST_REST = 1e-9, 1e-30


@dataclass(frozen=True)
class CrossEntropy:
    """-log q[target]. Tokens: targets."""

    def __call__(self, logits_VC: jax.Array, tokens: Any, constants: Any) -> Output:
        log_q = log_softmax(logits_VC)
        loss, gradient = _crossentropy(log_q, tokens["targets"])
        return loss, {"cross_entropy": loss}, gradient


@dataclass(frozen=True)
class Matching:
    """What every matching has: a divergence, and a temperature that may be known to be one."""

    divergence: str = "forward_kl"
    parameter: float = 0.0  # beta of jsd, skew of the skewed ones
    unit_temperature: bool = False

    def _mix(self, logits_VC: jax.Array, targets_C: jax.Array, knobs: Any, distance: Any) -> Output:
        """The mixture, `distance` being log q_T [V, C] -> (value, gradient with respect to z / T, terms)."""
        alpha, temperature = knobs["alpha"], knobs["temperature"]
        log_q1 = log_softmax(logits_VC)
        log_q = log_q1 if self.unit_temperature else log_softmax(logits_VC / temperature)
        hard, g_hard = _crossentropy(log_q1, targets_C)
        soft, g_soft, terms = distance(log_q)
        if not self.unit_temperature:
            soft, g_soft = temperature**2 * soft, temperature * g_soft
        terms = {"cross_entropy": hard, self.divergence: soft, "student_entropy": entropy(log_q1), **terms}
        return alpha * soft + (1 - alpha) * hard, terms, alpha * g_soft + (1 - alpha) * g_hard


@dataclass(frozen=True)
class Online(Matching):
    """Against the teacher's own logits. Tokens: targets, teacher (hidden states [C, F]). Constants:
    alpha, temperature, teacher_head [V, F]."""

    teacher_cap: float | None = None

    def __call__(self, logits_VC: jax.Array, tokens: Any, constants: Any) -> Output:
        teacher_VC = softcap(
            product("vf,cf->vc", constants["teacher_head"], tokens["teacher"]), self.teacher_cap
        )
        log_p1 = log_softmax(teacher_VC)
        log_p = log_p1 if self.unit_temperature else log_softmax(teacher_VC / constants["temperature"])

        def distance(log_q: jax.Array) -> Distance:
            value, gradient = DIVERGENCES[self.divergence](log_p, log_q, self.parameter)
            return value, gradient, {"teacher_entropy": entropy(log_p1)}

        return self._mix(logits_VC, tokens["targets"], constants, distance)


@dataclass(frozen=True)
class Sampled(Matching):
    """Against an unbiased sample of the teacher's probabilities: forward KL alone. Tokens: targets,
    target_ids [C, K], target_weights [C, K], teacher_entropy. Constants: alpha, temperature.

    The value is sum_k w_k (-log q_k) - H(p): the weights are unbiased, so the value and its gradient
    (sum w) q - w are so too.
    """

    def __call__(self, logits_VC: jax.Array, tokens: Any, constants: Any) -> Output:

        def distance(log_q: jax.Array) -> Distance:
            value, gradient = _kl_of_sample(log_q, tokens)
            return value, gradient, {"teacher_entropy": tokens["teacher_entropy"]}

        return self._mix(logits_VC, tokens["targets"], constants, distance)


@dataclass(frozen=True)
class TopK(Matching):
    """Against the teacher's K likeliest tokens and, as one bucket, all others. Tokens: targets,
    target_ids [C, K], target_weights [C, K]. Constants: alpha, temperature.

    A divergence between buckets is at most that between the whole distributions, and is zero where
    these are equal.
    """

    def __call__(self, logits_VC: jax.Array, tokens: Any, constants: Any) -> Output:

        def distance(log_q: jax.Array) -> Distance:
            return *_between_buckets(log_q, tokens, self.divergence, self.parameter), {}

        return self._mix(logits_VC, tokens["targets"], constants, distance)


@dataclass(frozen=True)
class Measure:
    """How far a student is from its teacher, at temperature 1. Tokens: targets, teacher. Constants:
    teacher_head."""

    teacher_cap: float | None = None

    def __call__(self, logits_VC: jax.Array, tokens: Any, constants: Any) -> Output:
        log_q = log_softmax(logits_VC)
        nll, gradient = _crossentropy(log_q, tokens["targets"])
        terms = {"nll": nll}
        if constants is not None:
            teacher_VC = product("vf,cf->vc", constants["teacher_head"], tokens["teacher"])
            log_p = log_softmax(softcap(teacher_VC, self.teacher_cap))
            terms["kl_teacher_student"] = DIVERGENCES["forward_kl"](log_p, log_q, 0.0)[0]
            terms["top1_agreement"] = (log_p.argmax(0) == log_q.argmax(0)).astype(jnp.float32)
        return nll, terms, gradient


@dataclass(frozen=True)
class MeasureCached:
    """The same from what a cache holds of the teacher. Tokens: targets, and those of `Sampled` (an estimate
    of KL without bias) or of `TopK` (a lower bound of it).

    Which of the sampled ids is the likeliest is not known for sure: no agreement comes of them.
    """

    def __call__(self, logits_VC: jax.Array, tokens: Any, constants: Any) -> Output:
        log_q = log_softmax(logits_VC)
        nll, gradient = _crossentropy(log_q, tokens["targets"])
        if "teacher_entropy" in tokens:
            return nll, {"nll": nll, "kl_teacher_student": _kl_of_sample(log_q, tokens)[0]}, gradient
        kl, _ = _between_buckets(log_q, tokens, "forward_kl", 0.0)
        first = tokens["target_weights"].argmax(1)[:, None]
        same = jnp.take_along_axis(tokens["target_ids"], first, 1)[:, 0] == log_q.argmax(0)
        terms = {"nll": nll, "kl_teacher_student": kl, "top1_agreement": same.astype(jnp.float32)}
        return nll, terms, gradient


def _kl_of_sample(log_q: jax.Array, tokens: Any) -> tuple[jax.Array, jax.Array]:
    """`Sampled`'s estimate of KL(p || q) [C], and its gradient [V, C]."""
    ids_KC, weights_KC = tokens["target_ids"].T, tokens["target_weights"].T
    value = -(weights_KC * jnp.take_along_axis(log_q, ids_KC, 0)).sum(0) - tokens["teacher_entropy"]
    gradient = jnp.exp(log_q) * weights_KC.sum(0)[None]
    return value, gradient.at[ids_KC, jnp.arange(ids_KC.shape[1])[None]].add(-weights_KC)


def _between_buckets(
    log_q: jax.Array, tokens: Any, divergence: str, parameter: float
) -> tuple[jax.Array, jax.Array]:
    """`TopK`'s divergence [C], and its gradient [V, C]."""
    head_KC = tokens["target_weights"].T
    # An id without weight is none (a padding row of the teacher): past the end, it is left alone.
    ids_KC = jnp.where(head_KC > 0, tokens["target_ids"].T, log_q.shape[0])
    tail_C = jnp.maximum(1 - head_KC.sum(0), np.float32(_LEAST_TAIL))
    log_p = _log(jnp.concatenate([head_KC, tail_C[None]]))
    columns = jnp.arange(ids_KC.shape[1])[None]
    rest_VC = jnp.exp(log_q).at[ids_KC, columns].set(0, mode="drop")
    rest_C = jnp.maximum(rest_VC.sum(0), np.float32(_LEAST_REST))
    log_head_KC = log_q.at[ids_KC, columns].get(mode="fill", fill_value=LOG_ZERO)
    log_buckets = jnp.concatenate([log_head_KC, jnp.log(rest_C)[None]])
    value, g = DIVERGENCES[divergence](log_p, log_buckets, parameter)
    gradient = rest_VC * (g[-1] / rest_C)[None]
    return value, gradient.at[ids_KC, columns].set(g[:-1], mode="drop")


def _crossentropy(log_q_VC: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    hit_VC = jnp.arange(log_q_VC.shape[0])[:, None] == targets_C[None]
    value = -jnp.take_along_axis(log_q_VC, targets_C[None], 0)[0]
    return value, jnp.exp(log_q_VC) - hit_VC.astype(jnp.float32)


def _log(p: jax.Array) -> jax.Array:
    return jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1)), np.float32(LOG_ZERO))
