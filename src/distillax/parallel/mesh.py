"""The device mesh, and the one table that lays logical axes onto it."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distillax.config import TrainConfig
from distillax.errors import UserError
from distillax.models.spec import ParamSpec, Tree, map_specs

AXES = ("data", "fsdp", "tensor", "context", "expert")

# Logical axis of a weight -> mesh axes it is split over. A dense model has no experts, so that
# axis helps to split its weights and its batch.
RULES: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
BATCH_AXES = ("data", "fsdp", "expert")


def make_mesh(config: TrainConfig) -> Mesh:
    """The mesh that the ici_* and dcn_* keys ask for.

    Raises UserError if their product is not the number of devices, naming one that would be.
    """
    slices = len({getattr(device, "slice_index", 0) for device in jax.devices()})
    ici = _resolve(config, "ici", jax.device_count() // slices)
    dcn = _resolve(config, "dcn", slices)
    shape = tuple(a * b for a, b in zip(ici, dcn, strict=True))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _resolve(config: TrainConfig, group: str, devices: int) -> tuple[int, ...]:
    if getattr(config, f"{group}_context_parallelism") != 1:
        raise UserError(f"{group}_context_parallelism: sequences cannot be split yet; leave it at 1")
    sizes = {axis: getattr(config, f"{group}_{axis}_parallelism") for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = ", ".join(f"{group}_{axis}_parallelism={size}" for axis, size in sizes.items() if size != 1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if devices % fixed or (not free and fixed != devices):
        what = "slices" if group == "dcn" else "devices"
        raise UserError(
            f"{asked} asks for a multiple of {fixed} {what}, but there are {devices}; "
            f"set {group}_data_parallelism=-1 and the others to divisors of {devices}"
        )
    return tuple(devices // fixed if size == -1 else size for size in sizes.values())


def param_shardings(specs: Tree, layers: int, mesh: Mesh) -> Tree:
    """A NamedSharding for every parameter of a model of so many layers."""
    return map_specs(lambda spec: NamedSharding(mesh, _partition(spec, layers, mesh)), specs)


def _partition(spec: ParamSpec, layers: int, mesh: Mesh) -> PartitionSpec:
    """An axis that does not divide its dimension leaves it whole."""
    parts: list[Any] = []
    for size, axis in zip(spec.full_shape(layers), spec.full_axes(), strict=True):
        names = tuple(name for name in RULES.get(axis or "", ()) if mesh.shape[name] > 1)
        split = math.prod(mesh.shape[name] for name in names)
        parts.append(names if names and size % split == 0 else None)
    return PartitionSpec(*parts)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over the batch axes; `leading` axes before the rows are whole."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
    """Devices that hold different rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
