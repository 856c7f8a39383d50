"""One optimizer step: sums over microbatches, one division, one update."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distillax.models.backend import unrolled
from distillax.models.spec import Tree
from distillax.train.objectives import Batch, Setup, Sums
from distillax.train.optimizer import global_norm


class TrainState(NamedTuple):
    """What an update changes: float32 master weights and the optimizer's moments."""

    params: Tree
    optimizer_state: Any


Metrics = dict[str, jax.Array]
StepFunction = Callable[[TrainState, Any, Batch, Any], tuple[TrainState, Metrics]]


def make_step(
    objective: Callable[..., Sums], setup: Setup, optimizer: optax.GradientTransformation
) -> StepFunction:
    """step(state, teacher, batch, knobs) -> (state, metrics).

    Arrays of the batch are [A, B, T]: A microbatches of B rows. Gradients of the summed loss add
    up in float32 and are divided by the weight of all A * B rows, so A changes nothing but memory.
    """
    sums = partial(objective, setup=setup)

    def step(state: TrainState, teacher: Any, batch: Batch, knobs: Any) -> tuple[TrainState, Metrics]:
        gradients, weight, terms = accumulate(sums, state.params, teacher, batch, knobs)
        safe = jnp.maximum(weight, np.float32(1e-9))  # no loss at all gives no gradient, not NaN
        gradients = jax.tree.map(lambda g: g / safe, gradients)
        with jax.numpy_dtype_promotion("standard"):  # which optax counts on
            updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        metrics = {name: value / safe for name, value in terms.items()}
        tokens = (batch["segment_ids"] > 0).sum()
        metrics |= {"weight_sum": weight, "tokens": tokens, "grad_norm": global_norm(gradients)}
        return TrainState(params, optimizer_state), metrics

    return step


def accumulate(
    sums: Callable[..., Sums], params: Tree, teacher: Any, batch: Batch, knobs: Any
) -> tuple[Tree, jax.Array, Metrics]:
    """(gradient of the summed loss, summed weight, summed loss terms) over all microbatches."""

    @partial(jax.jit, inline=True)  # traced once, for its shapes, though it is called twice
    def one(params: Tree, teacher: Any, microbatch: Batch, knobs: Any) -> tuple[Tree, jax.Array, Metrics]:
        def loss_of(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
            loss, weight, terms = sums(params, teacher, microbatch, knobs)
            return loss, (weight, {"loss": loss, **terms})

        (_, (weight, terms)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        # Whatever the weights' dtype: microbatches added up in bfloat16 would lose what is small.
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), weight, terms

    microbatches = batch["inputs"].shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    if microbatches == 1:
        return one(params, teacher, first, knobs)

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(params, teacher, microbatch, knobs)), None

    shapes = jax.eval_shape(one, params, teacher, first, knobs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, batch, unroll=unrolled(microbatches))[0]
