"""The device mesh, and what lies where on it (by the rules in models.layout)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distillax.config import TrainConfig
from distillax.errors import UserError
from distillax.models.backend import from_jax
from distillax.models.families import ModelConfig
from distillax.models.layout import AXES, BATCH_AXES, RULES, SEQUENCE_AXES, Rules, weight_spec
from distillax.models.spec import ParamSpec, Tree, map_specs


def make_mesh(config: TrainConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that the ici_* and dcn_* keys ask for, of these devices, or of all.

    Raises UserError if their product is not the number of devices, naming one that would be.
    """
    devices = jax.devices() if devices is None else devices
    # GPUs say the number of their node there. An axis may go from node to node, unless a dcn_* key is
    # above 1, or -1 on another axis than data, whose default that is.
    tpu = devices[0].platform == "tpu"
    given = {axis: getattr(config, f"dcn_{axis}_parallelism") for axis in AXES}
    asked = any(size > 1 or (size == -1 and axis != "data") for axis, size in given.items())
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu or asked else 1
    ici = _resolve(config, "ici", len(devices) // slices)
    dcn = _resolve(config, "dcn", slices)
    types = (AxisType.Auto,) * len(AXES)
    if slices > 1:  # the axes of the slower network lie across slices, the others within
        arranged = from_jax("jax.experimental.mesh_utils", "create_hybrid_device_mesh")(ici, dcn, devices)
        return Mesh(arranged, AXES, axis_types=types)
    if not tpu:  # JAX's own would refuse the GPUs of several nodes
        return Mesh(np.asarray(devices).reshape(ici), AXES, axis_types=types)
    return jax.make_mesh(ici, AXES, axis_types=types, devices=devices)


def local_mesh() -> Mesh:
    """All devices of this process, which share the weights and the rows."""
    return make_mesh(TrainConfig(ici_fsdp_parallelism=-1), jax.local_devices())


def rows_at_once(mesh: Mesh | None, rows: int, most: int) -> int:
    """How many of so many rows to compute at once: `most`, or so many a device of a mesh, but for a few rows
    a lower power of two, so that few devices are without any."""
    if mesh is None:
        return most
    return mesh.size * min(most, 1 << (-(-rows // mesh.size) - 1).bit_length())


def check_length(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError if the devices that split a sequence cannot have equal parts of it."""
    parts = math.prod(mesh.shape[axis] for axis in SEQUENCE_AXES)
    if config.max_target_length % parts:
        length = -(-config.max_target_length // parts) * parts
        raise UserError(
            f"max_target_length={config.max_target_length} cannot be split over {parts} devices "
            f"(ici_context_parallelism); set it to {length}"
        )


def notes_on_heads(mesh: Mesh, student: ModelConfig, teacher: ModelConfig | None) -> Iterator[str]:
    """A line for each model whose heads the devices that are to split them cannot share."""
    parts = mesh.shape["tensor"]
    for who, model in (("student", student), ("teacher", teacher)):
        if model is not None and model.heads % parts:
            fits = math.gcd(model.heads, parts)
            yield (
                f"note: the {model.heads} heads of the {who} cannot be split over {parts} devices "
                f"(ici_tensor_parallelism), so each of these computes all of its attention"
                f"{f'; {fits} could share it' if fits > 1 else ''}"
            )


def rows_a_step(config: TrainConfig, mesh: Mesh) -> int:
    """Rows of a global batch: those that one update learns from."""
    return config.per_device_batch_size * config.gradient_accumulation_steps * batch_devices(mesh)


def check_rows(config: TrainConfig, mesh: Mesh, saved: int) -> None:
    """Raises UserError if a step would not read as many rows as in the run that is to go on: its numbers,
    and its place in the data, would be others."""
    devices, rows = batch_devices(mesh), rows_a_step(config, mesh)
    if rows == saved:
        return
    size, steps = config.per_device_batch_size, config.gradient_accumulation_steps
    if saved % devices:
        advice = f"which cannot share {saved}; set ici_*_parallelism so that their number divides {saved}"
    else:
        fits = math.gcd(size, saved // devices)  # no more rows at once than was asked for
        advice = f"set per_device_batch_size={fits} gradient_accumulation_steps={saved // devices // fits}"
    raise UserError(
        f"a step of this run reads {saved} rows, but per_device_batch_size={size} and "
        f"gradient_accumulation_steps={steps} make {rows} on the {devices} devices that split the batch"
        f"{', ' if saved % devices else '; '}{advice}, or give another run_name to start a new run"
    )


def _resolve(config: TrainConfig, group: str, devices: int) -> tuple[int, ...]:
    sizes = {axis: getattr(config, f"{group}_{axis}_parallelism") for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = ", ".join(f"{group}_{axis}_parallelism={size}" for axis, size in sizes.items() if size != 1)
    asked = asked or f"{group}_data_parallelism=1"
    free = [axis for axis, size in sizes.items() if size == -1]
    if devices % fixed or (not free and fixed != devices):
        what = ("slice" if group == "dcn" else "device") + "s" * (fixed > 1)
        fits = _that_fit(sizes, devices)
        changes = [f"{group}_{axis}_parallelism={fits[axis]}" for axis in AXES if fits[axis] != sizes[axis]]
        multiple = "a multiple of " if free else ""
        raise UserError(
            f"{asked} asks for {multiple}{fixed} {what}, but there are {devices}; set {' '.join(changes)}"
        )
    return tuple(devices // fixed if size == -1 else size for size in sizes.values())


def _that_fit(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """For each axis as many of the devices as they can be shared by, up to its size, from the first on; the
    rest is for the axis that is -1, which is the first if none is."""
    free = -1 in sizes.values()
    found = {}
    for axis, size in sizes.items():
        if size == -1 or (axis == AXES[0] and not free):
            found[axis] = -1
        else:
            found[axis] = next(n for n in range(min(size, devices), 0, -1) if devices % n == 0)
            devices //= found[axis]
    return found


def param_shardings(specs: Tree, layers: int, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """A NamedSharding for every parameter of a model of so many layers."""

    def sharding(spec: ParamSpec) -> NamedSharding:
        return NamedSharding(mesh, weight_spec(mesh, spec.full_axes(), spec.full_shape(layers), rules))

    return map_specs(sharding, specs)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over the batch axes, tokens over the sequence's; `leading` axes before the rows are whole."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES, SEQUENCE_AXES))


def batch_devices(mesh: Mesh) -> int:
    """Devices that hold different rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
