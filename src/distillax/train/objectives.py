"""What a training method minimises: (student params, teacher, batch, options) -> sums.

Sums, not means: divided once by the weight of the whole global batch, they make gradients
independent of microbatches, packing, padding and devices.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from distillax.models import transformer
from distillax.models.families import ModelConfig
from distillax.models.spec import Tree
from distillax.train import fused

Batch = dict[str, jax.Array]
Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


@dataclass(frozen=True)
class Compute:
    """How a forward pass is computed. Static under jit."""

    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True


def sft(params: Tree, teacher: None, batch: Batch, config: ModelConfig, compute: Compute) -> Sums:
    """Cross entropy on the tokens that bear loss: (nats, tokens, further sums)."""
    del teacher
    hidden_BTE = forward(params, batch, config, compute)
    weight = batch["weights"].sum()
    loss = fused.cross_entropy(
        hidden_BTE.reshape(-1, hidden_BTE.shape[-1]),
        transformer.head_weights(params, config),
        batch["targets"].reshape(-1),
        batch["weights"].reshape(-1),
        config.logit_softcap,
    )
    return loss, weight, {"cross_entropy": loss}


def forward(params: Tree, batch: Batch, config: ModelConfig, compute: Compute) -> jax.Array:
    """Hidden states [B, T, E] of a (packed) batch."""
    return transformer.hidden_states(
        params,
        batch["inputs"],
        config,
        segment_ids_BT=batch["segment_ids"],
        positions_BT=batch["positions"],
        dtype=jnp.dtype(compute.dtype),
        remat=compute.remat,
        scan=compute.scan,
    )


OBJECTIVES: dict[str, Any] = {"sft": sft}
