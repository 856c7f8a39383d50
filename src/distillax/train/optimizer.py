"""AdamW on float32 masters, with the schedules counted in optimizer steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distillax.config import TrainConfig
from distillax.models.spec import Tree, map_specs


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from zero, then constant or a cosine down to `learning_rate_final_fraction`.

    Step 0 is the first update; with a warm-up of w steps the peak is reached at step w.
    """
    warmup = round(config.steps * config.warmup_steps_fraction)
    peak, rest = config.learning_rate, max(config.steps - warmup, 1)
    if config.learning_rate_schedule == "constant":
        after: optax.Schedule = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, rest, config.learning_rate_final_fraction)
    if warmup == 0:
        return after
    # The first update should move something: warm-up starts one step in.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: TrainConfig, specs: Tree) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; weight decay on matrices alone, not on norms and biases."""
    decayed = map_specs(lambda spec: len(spec.shape) > 1, specs)
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.adam_weight_decay,
        mask=decayed,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_clipping_threshold), adamw)
    return _float32_moments(optimizer if config.gradient_clipping_threshold > 0 else adamw)


def _float32_moments(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Both moments, whatever the weights' dtype: 0.999 of a bfloat16 number is that number."""

    def init(params: Any) -> Any:
        return optimizer.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    return optax.GradientTransformation(init, optimizer.update)


def global_norm(tree: Any) -> jax.Array:
    """Square root of the sum of all squares, in float32."""
    squares = (jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
