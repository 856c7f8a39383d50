"""What a training method minimises: (student params, teacher, batch, knobs, setup) -> sums.

Sums, not means: divided once by the weight of the whole global batch, they make gradients
independent of microbatches, packing, padding and devices.

Shapes: B batch, T tokens, N = B * T, E and F widths of student and teacher, M matched layers.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distillax.models import transformer
from distillax.models.families import ModelConfig
from distillax.models.spec import Tree
from distillax.train import losses, rows
from distillax.train.fused import Rows, chunked

Batch = dict[str, jax.Array]
Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]
_DISTANCES = {"cosine": losses.cosine_distance, "l2": losses.l2_distance}
_CACHED = ("target_ids", "target_weights", "teacher_entropy")  # what a batch brings of a cache
PROJECTION = "projection"  # among the student's parameters while its hidden states are matched


@dataclass(frozen=True)
class Compute:
    """How a forward pass is computed."""

    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True


@dataclass(frozen=True)
class Features:
    """Hidden states to match: pairs of (student layer, teacher layer), by number from 0, each after
    its block; `distance` is "cosine" or "l2"."""

    layers: tuple[tuple[int, int], ...] = ()
    distance: str = "cosine"


@dataclass(frozen=True)
class Setup:
    """What an objective knows before it sees a number. Static under jit."""

    student: ModelConfig
    compute: Compute = field(default_factory=Compute)
    teacher: ModelConfig | None = None
    teacher_compute: Compute = field(default_factory=Compute)
    rows: Rows = field(default_factory=rows.CrossEntropy)
    features: Features = field(default_factory=Features)
    # Ids that both sides have; the others are padding, and get no probability on either (C5).
    vocabulary: int | None = None

    @property
    def ids(self) -> int:
        """How many ids a text may be made of."""
        return self.vocabulary or self.student.vocab_size


def sft(params: Tree, teacher: None, batch: Batch, knobs: Any, setup: Setup) -> Sums:
    """Cross entropy on the tokens that bear loss: (nats, tokens, further sums)."""
    hidden_BTE, _ = forward(params, batch, setup.student, setup.compute)
    tokens = {"targets": batch["targets"]}
    return _reduce(setup, params, hidden_BTE, batch, tokens, None)


def online(params: Tree, teacher: Tree, batch: Batch, knobs: Any, setup: Setup) -> Sums:
    """alpha T^2 divergence(teacher, student) + (1 - alpha) cross entropy + beta hidden-state distance.

    `teacher` is the teacher's parameters, which get no gradient; `knobs` holds alpha, temperature
    and beta, float32 scalars.
    """
    mine, theirs = zip(*setup.features.layers, strict=True) if setup.features.layers else ((), ())
    hidden_BTE, features = forward(params, batch, setup.student, setup.compute, mine)
    target_BTF, head_VF, target_features = _expect(teacher, batch, setup, theirs)
    tokens = {"targets": batch["targets"], "teacher": target_BTF}
    loss, weight, terms = _reduce(
        setup, params, hidden_BTE, batch, tokens, {**knobs, "teacher_head": head_VF}
    )
    if setup.features.layers:
        distance = _distance(setup, features, target_features, params.get(PROJECTION), batch["weights"])
        loss, terms = loss + knobs["beta"] * distance, {**terms, "features": distance}
    return loss, weight, terms


def cached(params: Tree, teacher: None, batch: Batch, knobs: Any, setup: Setup) -> Sums:
    """As `online` without its features, the teacher's probabilities being in the batch."""
    hidden_BTE, _ = forward(params, batch, setup.student, setup.compute)
    tokens = {name: batch[name] for name in ("targets", *_CACHED) if name in batch}
    return _reduce(setup, params, hidden_BTE, batch, tokens, knobs)


OBJECTIVES: dict[str, Any] = {"sft": sft, "online": online, "cached": cached}


def measure(params: Tree, teacher: Tree | None, batch: Batch, knobs: Any, setup: Setup) -> Sums:
    """(NLL, tokens, sums of NLL and, with a teacher, of KL(teacher || student) and top-1 agreement),
    whatever `setup` says is minimised. A batch may bring the teacher's hidden states, `teacher_hidden`, or
    what a cache holds of it."""
    cap = setup.teacher.logit_softcap if setup.teacher else None
    setup = replace(setup, rows=rows.MeasureCached() if "target_ids" in batch else rows.Measure(cap))
    hidden_BTE, _ = forward(params, batch, setup.student, setup.compute, frozen=True)
    tokens, constants = {name: batch[name] for name in ("targets", *_CACHED) if name in batch}, None
    if teacher is not None:
        if "teacher_hidden" in batch:
            tokens["teacher"] = batch["teacher_hidden"]
            head_VF = _teacher_head(teacher, batch["teacher_hidden"], setup)
        else:
            tokens["teacher"], head_VF, _ = _expect(teacher, batch, setup)
        constants = {"teacher_head": head_VF}
    return _reduce(setup, params, hidden_BTE, batch, tokens, constants)


@partial(jax.jit, static_argnames=("config", "compute"))
def expect_batch(teacher: Tree, batch: Batch, config: ModelConfig, compute: Compute) -> jax.Array:
    """A teacher's hidden states [B, T, F] on a batch, for the batch to bring them to `measure`."""
    return forward(teacher, batch, config, compute, frozen=True)[0]


# One for all callers: a student before, during and after its training is measured alike.
measure_batch = jax.jit(measure, static_argnames=("setup",))


def forward(
    params: Tree,
    batch: Batch,
    config: ModelConfig,
    compute: Compute,
    collect: tuple[int, ...] = (),
    frozen: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Hidden states [B, T, E] of a (packed) batch, and those after the layers `collect` [M, B, T, E]."""
    return transformer.hidden_states_and_features(
        params,
        batch["inputs"],
        config,
        collect,
        segment_ids_BT=batch["segment_ids"],
        positions_BT=batch["positions"],
        dtype=jnp.dtype(compute.dtype),
        remat=compute.remat,
        scan=compute.scan,
        frozen=frozen,
    )


def _expect(
    teacher: Tree, batch: Batch, setup: Setup, collect: tuple[int, ...] = ()
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The teacher's hidden states [B, T, F], its head [V, F], and its states after the layers `collect`."""
    assert setup.teacher is not None
    teacher = jax.lax.stop_gradient(teacher)
    hidden_BTF, features = forward(teacher, batch, setup.teacher, setup.teacher_compute, collect, frozen=True)
    return hidden_BTF, _teacher_head(teacher, hidden_BTF, setup), features


def _teacher_head(teacher: Tree, hidden_BTF: jax.Array, setup: Setup) -> jax.Array:
    assert setup.teacher is not None
    head_VF = transformer.head_weights(teacher, setup.teacher)[: setup.vocabulary]
    return head_VF.astype(hidden_BTF.dtype)


def _reduce(
    setup: Setup, params: Tree, hidden_BTE: jax.Array, batch: Batch, tokens: Any, constants: Any
) -> Sums:
    """The chunked loss of a batch; `tokens` are arrays [B, T, ...]."""
    weights_BT = batch["weights"]
    head_VE = transformer.head_weights(params, setup.student)[: setup.vocabulary]
    loss, terms = chunked(
        setup.rows, hidden_BTE, head_VE, weights_BT, tokens, constants, cap=setup.student.logit_softcap
    )
    return loss, weights_BT.sum(), terms


def _distance(
    setup: Setup, student_MBTE: Any, teacher_MBTF: Any, projection_MEF: Any, weights_BT: jax.Array
) -> jax.Array:
    """Weighted sum over tokens of the distance between hidden states, a mean over the layers."""
    if projection_MEF is not None:
        # In the compute dtype, accumulated in float32, as every product.
        student_MBTE = jnp.stack(
            [
                transformer.matmul(x, projection_MEF[m], ("embed", None))
                for m, x in enumerate(student_MBTE.astype(setup.compute.dtype))
            ]
        )
    distance_MBT = _DISTANCES[setup.features.distance](
        student_MBTE.astype(jnp.float32), teacher_MBTF.astype(jnp.float32)
    )
    return (distance_MBT.mean(0) * weights_BT).sum()
