"""How many rows a chip takes with our loss, and with one that holds all logits: 8B to 8B on a v6e-8.

    python benchmarks/plan_naive.py [ours|naive] ROWS ...

Nothing runs: each is compiled for the slice by libtpu, in a minute or two. The naive loss is forward KL as
one writes it: log-softmax of both models' logits at every token, and autodiff.
"""

import sys
from typing import Any

import common
import jax
import jax.numpy as jnp

RECIPE = common.REPO / "recipes" / "llama3.1-8b-online-v6e-8.yml"


def naive_loss(
    rows: Any, hidden: jax.Array, head: jax.Array, weights: jax.Array, tokens: Any, constants: Any, **_: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """In the place of `train.fused.chunked`."""
    from distillax.models.backend import product

    log_q = jax.nn.log_softmax(product("bte,ve->btv", hidden, head.astype(hidden.dtype)))
    log_p = jax.nn.log_softmax(product("bte,ve->btv", tokens["teacher"], constants["teacher_head"]))
    return (weights * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)).sum(), {}


def main(loss: str, *numbers: str) -> None:
    from distillax.config import PlanConfig
    from distillax.plan.chips import find_topology, prepare
    from distillax.plan.program import compile_step, trace_step
    from distillax.settings import load_config
    from distillax.train import objectives

    if loss == "naive":
        objectives.chunked = naive_loss
    topology = find_topology("v6e-8")
    prepare(topology)
    assert topology.chip is not None
    for number in numbers:
        config = load_config(PlanConfig, str(RECIPE), [f"per_device_batch_size={number}"])
        found = compile_step(trace_step(config, topology), topology.chip.hbm_bytes)
        figures = {"loss": loss, "rows": int(number), "fits": found.fits, "peak_gb": found.peak_bytes / 1e9}
        common.report("plan_naive", figures)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["ours", "12"]))
