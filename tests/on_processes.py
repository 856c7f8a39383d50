"""Weights placed on meshes of one process or two, and what this one read for them, as JSON: run by
test_assemble.py in processes of their own, since the number of devices is said before JAX starts."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import AxisType

from distillax.checkpoints import huggingface
from distillax.checkpoints.source import find
from distillax.models.layout import AXES
from distillax.train.setup import abstract_weights, place

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


def main(case: dict[str, Any]) -> None:
    if case["processes"] > 1:
        jax.distributed.initialize(case["address"], case["processes"], case["index"])
    for sizes in case["meshes"]:
        shape = [sizes.get(axis, 1) for axis in AXES]
        devices = jax.devices()[: math.prod(shape)]
        mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
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
