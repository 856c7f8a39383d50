"""Arrays on the mesh from what the processes read of them, each another part.

What lies together in a file is seldom what a device will hold: rows of a tensor do, and fsdp splits columns.
So a tensor is read as it lies, in as many runs as there are devices, and the devices exchange parts over a
network that is faster than a disk. It goes a layer at a time: a host never holds more than its part of one.
"""

import math
from collections.abc import Callable
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
    if layers is None:
        return jax.tree.map(partial(_move, axis), like, _read_part(like, axis, partial(read, None)))
    whole, one = jax.tree.map(_zeros, like), jax.tree.map(_layer_of, like)
    for layer in range(layers):
        part = _read_part(one, axis, partial(read, layer))
        jax.block_until_ready(whole)  # or parts would pile up that are read faster than they are sent
        whole = jax.tree.map(partial(_put, axis, layer), like, whole, part)
    return whole


def _read_part(like: Tree, axis: int, read: Callable[[tuple[slice, ...]], Any]) -> Tree:
    """The arrays that `like` describes, split into runs along `axis`. Each run is read once."""
    found: dict[int, list[np.ndarray]] = {}

    def run(number: int, index: Any) -> np.ndarray:
        start = index[axis].start or 0
        if start not in found:
            found[start] = jax.tree.leaves(read(index))
        return found[start][number]

    leaves, structure = jax.tree.flatten(like)
    arrays = [
        jax.make_array_from_callback(leaf.shape, _runs(leaf, axis), partial(run, number))
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, arrays)


def _runs(like: jax.ShapeDtypeStruct, axis: int) -> NamedSharding:
    """`axis` over all devices, as far as these divide it: first over the mesh axes that split it in the end,
    then over those that split another, so that they can be gathered or exchanged in turn."""
    sharding: Any = like.sharding
    mesh, chosen = sharding.mesh, []
    for name in dict.fromkeys([*named(sharding.spec[axis]), *axes_of(sharding.spec), *mesh.axis_names]):
        devices = math.prod(mesh.shape[other] for other in [*chosen, name])
        if mesh.shape[name] > 1 and like.shape[axis] % devices == 0:
            chosen.append(name)
    return _along(like, axis, chosen)


def _along(like: jax.ShapeDtypeStruct, axis: int, names: list[str]) -> NamedSharding:
    sharding: Any = like.sharding
    spec: list[Any] = [None] * len(like.shape)
    spec[axis] = tuple(names) or None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _layer_of(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding: Any = like.sharding
    one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(like.shape[1:], like.dtype, sharding=one)


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(partial(jnp.zeros, like.shape, like.dtype), out_shardings=like.sharding)()


def _move(axis: int, like: jax.ShapeDtypeStruct, runs: jax.Array) -> jax.Array:
    """Runs along `axis` -> as `like` is split."""
    sharding: Any = like.sharding
    if runs.sharding.is_equivalent_to(sharding, runs.ndim):
        return runs
    return _moved(runs, kept=_kept(like, axis), to=sharding)


def _kept(like: jax.ShapeDtypeStruct, axis: int) -> NamedSharding:
    """The runs without the mesh axes that do not split what `like` describes."""
    runs, sharding = _runs(like, axis), cast(Any, like.sharding)
    return _along(like, axis, [name for name in axes_of(runs.spec) if name in axes_of(sharding.spec)])


@partial(jax.jit, static_argnames=("kept", "to"))
def _moved(runs: jax.Array, kept: NamedSharding, to: NamedSharding) -> jax.Array:
    # In two steps, which XLA has collectives for: gather over some mesh axes, exchange over the others.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(runs, kept), to)


def _put(axis: int, layer: int, like: jax.ShapeDtypeStruct, whole: jax.Array, runs: jax.Array) -> jax.Array:
    one = _layer_of(like)
    return _put_layer(whole, runs, np.int32(layer), kept=_kept(one, axis), to=one.sharding, out=like.sharding)


@partial(jax.jit, donate_argnums=0, static_argnames=("kept", "to", "out"))
def _put_layer(whole: jax.Array, runs: jax.Array, layer: Any, kept: Any, to: Any, out: Any) -> jax.Array:
    updated = jax.lax.dynamic_update_index_in_dim(whole, _moved(runs, kept, to), layer, 0)
    return jax.lax.with_sharding_constraint(updated, out)
