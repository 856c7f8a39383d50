"""Arrays on the mesh from what the processes read of them, each another part.

What lies together in a file is seldom what a device will hold: rows of a tensor do, and fsdp splits columns.
So a tensor is read as it lies, in as many runs as there are devices, and the devices exchange parts over a
network that is faster than a disk. It goes a layer at a time: a host never holds more than its part of one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distillax.models.layout import axes_of, named
from distillax.models.spec import Tree


def assemble(like: Tree, layers: int | None, axis: int, read: Callable[..., Any]) -> Tree:
    """The array that `like` describes (shape, dtype, sharding), or a tree of them that are read together.

    `read(layer, part)` gives a part of a layer, slices of its axes that are whole but for `axis` (counted
    from the last), as numpy arrays; with `layers` None, of an array that is not stacked. Every process calls
    this alike, and reads what no other does, as far as the mesh divides the axis.
    """
    one = like if layers is None else jax.tree.map(_layer_of, like)
    runs = _Runs(axis, _run_axes(jax.tree.leaves(one)[0], axis))
    if layers is None:
        return jax.tree.map(runs.move, one, runs.read(one, partial(read, None)))
    whole = jax.tree.map(_zeros, like)
    for layer in range(layers):
        part = runs.read(one, partial(read, layer))
        jax.block_until_ready(whole)  # or parts would pile up that are read faster than they are sent
        whole = jax.tree.map(partial(runs.put, layer), like, whole, part)
    return whole


@dataclass(frozen=True)
class _Runs:
    """How arrays are read: `axis` split over these mesh axes, and nothing else."""

    axis: int
    axes: tuple[str, ...]

    def sharding(self, like: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> NamedSharding:
        spec: list[Any] = [None] * len(like.shape)
        spec[self.axis] = axes or None
        return NamedSharding(cast(Any, like.sharding).mesh, PartitionSpec(*spec))

    def read(self, like: Tree, read: Callable[[tuple[slice, ...]], Any]) -> Tree:
        """The arrays that `like` describes, in runs. Each run is read once."""
        found: dict[int, list[np.ndarray]] = {}

        def run(number: int, index: Any) -> np.ndarray:
            start = index[self.axis].start or 0
            if start not in found:
                found[start] = jax.tree.leaves(read(index))
            return found[start][number]

        leaves, structure = jax.tree.flatten(like)
        arrays = [
            jax.make_array_from_callback(leaf.shape, self.sharding(leaf, self.axes), partial(run, number))
            for number, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, arrays)

    def kept(self, like: jax.ShapeDtypeStruct) -> NamedSharding:
        """The runs without the mesh axes that do not split what `like` describes."""
        wanted = axes_of(cast(Any, like.sharding).spec)
        return self.sharding(like, tuple(name for name in self.axes if name in wanted))

    def move(self, like: jax.ShapeDtypeStruct, runs: jax.Array) -> jax.Array:
        """Runs -> as `like` is split."""
        sharding: Any = like.sharding
        if runs.sharding.is_equivalent_to(sharding, runs.ndim):
            return runs
        return _moved(runs, self.kept(like), sharding)

    def put(self, layer: int, like: jax.ShapeDtypeStruct, whole: jax.Array, runs: jax.Array) -> jax.Array:
        """`whole`, which is given away, with a layer of it from runs."""
        one = _layer_of(like)
        return _put_layer(whole, runs, np.int32(layer), self.kept(one), one.sharding, like.sharding)


def _run_axes(like: jax.ShapeDtypeStruct, axis: int) -> tuple[str, ...]:
    """All mesh axes, as far as they divide the array's: first those that split it there in the end, then
    those that split it elsewhere, so that the others can be gathered, and these exchanged, in turn."""
    sharding: Any = like.sharding
    mesh, chosen = sharding.mesh, ()
    for name in dict.fromkeys([*named(sharding.spec[axis]), *axes_of(sharding.spec), *mesh.axis_names]):
        devices = math.prod(mesh.shape[other] for other in (*chosen, name))
        if mesh.shape[name] > 1 and like.shape[axis] % devices == 0:
            chosen = (*chosen, name)
    return chosen


def _layer_of(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding: Any = like.sharding
    one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(like.shape[1:], like.dtype, sharding=one)


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(partial(jnp.zeros, like.shape, like.dtype), out_shardings=like.sharding)()


@partial(jax.jit, static_argnums=(1, 2))
def _moved(runs: jax.Array, kept: NamedSharding, to: NamedSharding) -> jax.Array:
    # In two steps, which XLA has collectives for: gather over some mesh axes, exchange over the others.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(runs, kept), to)


@partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _put_layer(whole: jax.Array, runs: jax.Array, layer: Any, kept: Any, to: Any, out: Any) -> jax.Array:
    updated = jax.lax.dynamic_update_index_in_dim(whole, _moved(runs, kept, to), layer, 0)
    return jax.lax.with_sharding_constraint(updated, out)
