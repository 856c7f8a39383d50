"""The chunked loss against the naive one, where that fits: forward KL and its gradients, in bfloat16.

    python benchmarks/loss.py [TOKENS ...]

Both from the hidden states and heads of SmolLM2's shape (width 576, vocabulary 49,152), teacher and student;
the naive one holds all logits and leaves the gradients to autodiff. Pairs of runs alternate; the ratio is
that of the medians.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

WIDTH, VOCABULARY, PAIRS = 576, 49_152, 7


def main(*numbers: str) -> None:
    from distillax.models.backend import product
    from distillax.train.fused import chunked
    from distillax.train.rows import Online

    def naive(h: Any, w: Any, tokens: Any, constants: Any, weights: Any) -> jax.Array:
        log_q = jax.nn.log_softmax(product("ne,ve->nv", h, w))
        log_p = jax.nn.log_softmax(product("ne,ve->nv", tokens["teacher"], constants["teacher_head"]))
        return (weights * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)).sum()

    def ours(h: Any, w: Any, tokens: Any, constants: Any, weights: Any) -> jax.Array:
        return chunked(Online("forward_kl", 0.0, True), h, w, weights, tokens, constants)[0]

    for number in map(int, numbers or ("512", "1024", "2048")):
        rng = np.random.default_rng(0)
        h, t = (jnp.asarray(rng.normal(size=(number, WIDTH)), jnp.bfloat16) for _ in range(2))
        w, u = (jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH)) * 0.1, jnp.bfloat16) for _ in range(2))
        tokens = {"targets": jnp.asarray(rng.integers(0, VOCABULARY, number), jnp.int32), "teacher": t}
        knobs = {name: jnp.float32(1) for name in ("alpha", "temperature")}
        rest = tokens, {**knobs, "teacher_head": u}, jnp.ones(number, jnp.float32)
        steps = {
            name: jax.jit(jax.value_and_grad(f, (0, 1))) for name, f in (("naive", naive), ("ours", ours))
        }
        values = {name: float(step(h, w, *rest)[0]) for name, step in steps.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(PAIRS):
            for name, step in steps.items():
                seconds[name].append(clocked(step, h, w, *rest))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        figures = {"tokens": number, "seconds": medians, "loss": values}
        common.report("loss", {**figures, "naive_over_ours": medians["naive"] / medians["ours"]})


def clocked(step: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    return time.perf_counter() - start


if __name__ == "__main__":
    common.keep_freed_memory()
    main(*sys.argv[1:])
