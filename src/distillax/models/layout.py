"""How arrays lie on the mesh that a program is traced under: the rules, and the constraints.

`jax.set_mesh` (see parallel.mesh) says which mesh that is. Without one, or on one device, nothing
here has an effect, so a model need not know whether it is split.

Shapes: B batch, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp", "tensor", "context", "expert")
BATCH_AXES = ("data", "fsdp", "expert")  # a dense model has no experts: that axis helps with its batch
SEQUENCE_AXES = ("context",)

# Logical axis of a weight -> mesh axes that it is split over.
RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

Mesh = Any  # a jax Mesh or AbstractMesh: hashable, so that it may be static


def active_mesh() -> Mesh | None:
    """The mesh that this is traced under, or None where there is nothing to split."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def split(mesh: Mesh, axes: Sequence[str], dimension: int) -> tuple[str, ...] | None:
    """Those of the mesh axes that have more than one device, if together they divide the dimension."""
    names = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return names if names and dimension % math.prod(mesh.shape[n] for n in names) == 0 else None


def weight_spec(mesh: Mesh, logical: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The partition of a weight. An axis that does not divide its dimension leaves it whole."""
    rules = [RULES.get(axis or "", ()) for axis in logical]
    return PartitionSpec(*map(split, [mesh] * len(rules), rules, shape))


def gathered_spec(mesh: Mesh, logical: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The partition of a weight while rows that are split over the batch axes are multiplied with it."""
    rules = [[axis for axis in RULES.get(name or "", ()) if axis not in BATCH_AXES] for name in logical]
    return PartitionSpec(*map(split, [mesh] * len(rules), rules, shape))


def tokens_spec(mesh: Mesh, shape: Sequence[int], more: Sequence[str] = ()) -> PartitionSpec:
    """The partition of an array [B, T, ...]: rows over the batch axes, tokens over the sequence's and
    over `more`."""
    return PartitionSpec(split(mesh, BATCH_AXES, shape[0]), split(mesh, (*SEQUENCE_AXES, *more), shape[1]))


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a partition names."""
    return tuple(name for part in spec for name in named(part))


def named(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension of a partition, which JAX writes without a tuple if it is one."""
    return (part,) if isinstance(part, str) else part or ()


def constrain_tokens(x: jax.Array) -> jax.Array:
    """x [B, T, ...] laid out as tokens are."""
    mesh = active_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, tokens_spec(mesh, x.shape))


def gathered(weight: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """A weight as a product with rows wants it that are split over the batch axes: whole, but for tensor
    parallelism."""
    return _constrain(gathered_spec, weight, axes)


def scattered(gradient: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """A weight's gradient, summed over the devices and split as the weight itself is."""
    return _constrain(weight_spec, gradient, axes)


def _constrain(spec: Callable[..., PartitionSpec], x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    mesh = active_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))
