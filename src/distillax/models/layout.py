"""How arrays lie on the mesh that a program is traced under: the rules, and the constraints.

`jax.set_mesh` (see parallel.mesh) says which mesh that is. Without one, or on one device, nothing
here has an effect, so a model need not know whether it is split.

Shapes: B batch, T tokens.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distillax.models.backend import scattered_at_once

AXES = ("data", "fsdp", "tensor", "context", "expert")
BATCH_AXES = ("data", "fsdp", "expert")  # a dense model has no experts: that axis helps with its batch
SEQUENCE_AXES = ("context",)

Rules = Mapping[str, tuple[str, ...]]  # logical axis of a weight -> mesh axes that it is split over

RULES: Rules = {
    "embed": ("fsdp", "expert", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
# A weight is whole but for these while it is multiplied with tokens, which batch and sequence axes split.
GATHERED: Rules = {
    name: tuple(axis for axis in axes if axis not in (*BATCH_AXES, *SEQUENCE_AXES))
    for name, axes in RULES.items()
}
# Of a frozen teacher, by teacher_sharding: where it is never split over those axes, nothing is gathered.
TEACHER_RULES: dict[str, Rules] = {"fsdp": RULES, "replicated": GATHERED}

_BETWEEN_SLICES: ContextVar[frozenset[str]] = ContextVar("between_slices", default=frozenset())
Mesh = Any  # a jax Mesh or AbstractMesh: hashable, so that it may be static


def mesh_of(*params: Any) -> Mesh | None:
    """The mesh of several devices that weights lie on, or None where there is no such."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    meshes = (s.mesh for s in shardings if isinstance(s, NamedSharding) and s.mesh.size > 1)
    return next(meshes, None)


@contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """What is traced in here is split over the mesh, if there is one."""
    if mesh is None:
        yield
        return
    token = _BETWEEN_SLICES.set(_between_slices(mesh))
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _BETWEEN_SLICES.reset(token)


@functools.cache
def _between_slices(mesh: Mesh) -> frozenset[str]:
    """The axes of a mesh that go from one slice to another, over the slower network."""
    slices = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat])
    slices = slices.reshape(mesh.devices.shape)
    return frozenset(name for i, name in enumerate(mesh.axis_names) if (np.diff(slices, axis=i) != 0).any())


def active_mesh() -> Mesh | None:
    """The mesh that this is traced under, or None where there is nothing to split."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def split(mesh: Mesh, axes: Sequence[str], dimension: int) -> tuple[str, ...] | None:
    """Those of the mesh axes that have more than one device, if together they divide the dimension."""
    names = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return names if names and dimension % math.prod(mesh.shape[n] for n in names) == 0 else None


def weight_spec(
    mesh: Mesh, logical: Sequence[str | None], shape: Sequence[int], rules: Rules = RULES
) -> PartitionSpec:
    """The partition of a weight. Of the mesh axes of a dimension as many split it, from the first on, as
    together divide it."""

    def most(name: str | None, dimension: int) -> tuple[str, ...] | None:
        axes = rules.get(name or "", ())
        found = (split(mesh, axes[:n], dimension) for n in range(len(axes), 0, -1))
        return next(filter(None, found), None)

    return PartitionSpec(*map(most, logical, shape))


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
    """A weight as a product with tokens wants it that are split over devices: whole, but for tensor
    parallelism."""
    mesh = active_mesh()
    if mesh is None:
        return weight
    return jax.lax.with_sharding_constraint(weight, weight_spec(mesh, axes, weight.shape, GATHERED))


def summed_over_tokens(
    function: Callable[..., jax.Array], x_BTI: jax.Array, y_BTO: jax.Array, axes: Sequence[str | None]
) -> jax.Array:
    """function(x, y) [I, O], a sum over tokens such as a weight's gradient: of each device's own tokens, then
    summed over the devices, each of which keeps the part of the result that it has of the weight."""
    mesh = active_mesh()
    if mesh is None:
        return function(x_BTI, y_BTO)
    shape = x_BTI.shape[-1], y_BTO.shape[-1]
    tokens, whole = tokens_spec(mesh, x_BTI.shape), weight_spec(mesh, axes, shape, GATHERED)
    summed, spec = axes_of(tokens), weight_spec(mesh, axes, shape)
    # An axis that splits no tokens has nothing to scatter: its devices have the sum already.
    spec = PartitionSpec(*(part if set(named(part)) <= {*summed, *axes_of(whole)} else None for part in spec))

    def local(x: jax.Array, y: jax.Array) -> jax.Array:
        scattered = PartitionSpec(*(a if a != b else None for a, b in zip(spec, whole, strict=True)))
        return scatter_sum(function(x, y), summed, scattered)

    specs = PartitionSpec(*tokens, whole[0]), PartitionSpec(*tokens, whole[1])
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(x_BTI, y_BTO)


def scatter_sum(x: jax.Array, summed: tuple[str, ...], spec: PartitionSpec) -> jax.Array:
    """Within a shard_map: the sum over the mesh axes `summed`, of which each device keeps the part that
    `spec` gives it."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    most = scattered_at_once(device.device_kind if device else "")
    for dimension, part in enumerate(spec):
        # In turns no more is sent, but more room is needed. From slice to slice more would be sent: the first
        # turn would exchange there what is not summed within them yet.
        whole = math.prod(jax.lax.axis_size(axis) for axis in named(part)) <= most
        whole |= not _BETWEEN_SLICES.get().isdisjoint(named(part))
        turns = [(axis, groups) for axis in named(part) for groups in turns_of(jax.lax.axis_size(axis), most)]
        for axes, groups in [(named(part), None)] if part and whole else turns:
            x = jax.lax.psum_scatter(
                x, axes, scatter_dimension=dimension, axis_index_groups=groups, tiled=True
            )
    rest = tuple(axis for axis in summed if axis not in axes_of(spec))
    return jax.lax.psum(x, rest) if rest else x


def turns_of(size: int, most: int) -> list[list[list[int]] | None]:
    """The turns in which a sum is scattered over an axis of so many devices, each within groups of at most so
    many, or of a larger prime number. A turn takes what the one before has left of the sum, so that each
    device ends with the part of its own place on the axis."""
    turns: list[list[list[int]] | None] = []
    left = size  # devices that hold the same part
    while left > 1:
        sizes = (*range(min(most, left), 1, -1), *range(2, left + 1))
        n = next(n for n in sizes if left % n == 0)
        step = left // n
        groups = [
            list(range(first + place, first + left, step))
            for first in range(0, size, left)
            for place in range(step)
        ]
        turns.append(None if n == size else groups)
        left = step
    return turns
