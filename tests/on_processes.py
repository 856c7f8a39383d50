"""Weights placed on meshes of one process or two, and what this one read for them, as JSON: run by
test_assemble.py in processes of their own, since the number of devices is said before JAX starts."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorstore as ts
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distillax.checkpoints import huggingface, state
from distillax.checkpoints.source import find
from distillax.checkpoints.state import RunCheckpoints
from distillax.models.layout import AXES
from distillax.parallel.weights import abstract_weights, place

reads: list[int] = []


def counted(read: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def counting(*args: Any) -> np.ndarray:
        values = read(*args)
        reads.append(values.nbytes)
        return values

    return counting


huggingface.read_tensor = counted(huggingface.read_tensor)


def stored_bytes() -> int:
    """What this process has read so far by tensorstore, as it lies in the files."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def same(placed: jax.Array, whole: np.ndarray) -> bool:
    return all(np.asarray(s.data).tobytes() == whole[s.index].tobytes() for s in placed.addressable_shards)


def make_mesh(sizes: dict[str, int]) -> Mesh:
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def save(case: dict[str, Any]) -> None:
    """A model and its moments, as a run that has a projection saves them, in as many chunks as a large model
    has."""
    state._CHUNK_BYTES = 2_000
    mesh = make_mesh(case["save"])
    with jax.set_mesh(mesh), RunCheckpoints(Path(case["run"]), keep=1) as checkpoints:
        params = place(find(Path(case["of"])), "float32", mesh)
        checkpoints.save(1, params, moments(params, jax.tree.map(jnp.square, params), jnp.int32(7)), {})


def moments(mu: Any, nu: Any, count: Any) -> Any:
    return {"projection": count, "optimizer": (optax.ScaleByAdamState(count, mu, nu), optax.EmptyState())}


def restored(case: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    source, before = find(Path(case["of"])), stored_bytes()
    described = abstract_weights(source.config, "float32", mesh, "")
    with jax.set_mesh(mesh), RunCheckpoints(Path(case["run"]), keep=1) as checkpoints:
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
        params, found = checkpoints.restore(1, described, moments(described, described, number))
        (adam, _) = found["optimizer"]
    stored, whole = stored_bytes() - before, source.params("float32", "")
    equal = jax.tree.map(lambda x, y, w: same(x, w) and same(y, np.square(w)), params, adam.nu, whole)
    assert adam.count == found["projection"] == 7 and all(jax.tree.leaves(jax.tree.map(same, adam.mu, whole)))
    as_described = jax.tree.map(lambda x, y: x.sharding == y.sharding, adam.nu, described)
    figures = {"equal": all(jax.tree.leaves(equal)), "described": all(jax.tree.leaves(as_described))}
    return {"weights": ["run"], "stored": stored, **figures}


def main(case: dict[str, Any]) -> None:
    if case["processes"] > 1:
        jax.distributed.initialize(case["address"], case["processes"], case["index"])
    if "save" in case:
        save(case)
    for sizes in case["meshes"]:
        mesh = make_mesh(sizes)
        if "run" in case:
            print(json.dumps({"mesh": sizes, **restored(case, mesh)}), flush=True)
        for name, dtype, quantization in case["weights"]:
            source = find(Path(name))
            reads.clear()
            before = stored_bytes()
            with jax.set_mesh(mesh):
                placed = jax.block_until_ready(place(source, dtype, mesh, quantization))
            found = {"bytes": sum(reads), "largest": max(reads, default=0), "stored": stored_bytes() - before}
            described = abstract_weights(source.config, dtype, mesh, quantization)
            as_described = jax.tree.map(
                lambda x, y: x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim),
                placed,
                described,
            )
            equal = jax.tree.map(same, placed, source.params(dtype, quantization))
            found |= {"equal": all(jax.tree.leaves(equal)), "described": all(jax.tree.leaves(as_described))}
            print(json.dumps({"mesh": sizes, "weights": [name, dtype, quantization], **found}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
