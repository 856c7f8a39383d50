"""The step that `distillax train` would run, compiled for devices that need not be here."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distillax.checkpoints.source import find
from distillax.config import TrainConfig
from distillax.data.targets import DEFAULT_K, Layout, TargetStore
from distillax.errors import UserError
from distillax.models import backend
from distillax.models.families import ModelConfig, preset
from distillax.models.layout import TEACHER_RULES, on_mesh
from distillax.parallel.mesh import batch_devices, batch_sharding, check_length, make_mesh
from distillax.parallel.weights import abstract_weights
from distillax.plan.chips import Topology, find_devices
from distillax.train.method import make_setup, teacher_dtype
from distillax.train.objectives import OBJECTIVES, Setup
from distillax.train.optimizer import make_optimizer
from distillax.train.setup import RANDOM, abstract_state, trained_specs
from distillax.train.step import make_step

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """A compiled step. Bytes are those of one device; `peak_bytes` of a program that does not fit is what
    its compiler said that it needs. `hlo` is empty then, and `temp_size_in_bytes` is not known."""

    setup: Setup
    mesh: Mesh
    fits: bool
    peak_bytes: int
    parameter_bytes: int
    optimizer_bytes: int
    teacher_bytes: int
    batch_bytes: int
    temp_size_in_bytes: int | None = None
    hlo: str = ""

    @property
    def temporary_bytes(self) -> int:
        """What there is at the peak besides the arguments."""
        arguments = self.parameter_bytes + self.optimizer_bytes + self.teacher_bytes + self.batch_bytes
        return max(self.peak_bytes - arguments, 0)


@dataclass(frozen=True)
class Step:
    """A step as it is traced: `arguments` are (state, teacher, batch, knobs), of abstract arrays."""

    topology: Topology
    setup: Setup
    mesh: Mesh
    arguments: tuple[Any, Any, Any, Any]
    lowered: jax.stages.Lowered


def trace_step(config: TrainConfig, topology: Topology) -> Step:
    """Raises UserError for what cannot be trained."""
    mesh = make_mesh(config, find_devices(topology))
    check_length(config, mesh)
    student, teacher, cache = architectures(config)
    with backend.compile_for(topology.platform):
        setup = make_setup(config, student, teacher, cache)
        optimizer = make_optimizer(config, trained_specs(setup))
        state = abstract_state(setup, optimizer, config, mesh)
        weights = None
        if teacher is not None:
            dtype, rules = jnp.dtype(teacher_dtype(config)), TEACHER_RULES[config.teacher_sharding]
            weights = abstract_weights(teacher, dtype, mesh, config.teacher_quantization, rules)
        knobs = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in ("alpha", "temperature", "beta")}
        arguments = state, weights, abstract_batch(config, mesh, cache), knobs
        step = jax.jit(make_step(OBJECTIVES[config.method], setup, optimizer), donate_argnums=0)
        with on_mesh(mesh):
            return Step(topology, setup, mesh, arguments, step.lower(*arguments))


def compile_step(step: Step, memory: int) -> Program:
    """Compiles the step for a device with `memory` bytes."""
    state, weights, batch, _ = step.arguments
    params, moments, teacher_bytes, rows = map(_bytes, (state.params, state.optimizer_state, weights, batch))
    sizes = params, moments, teacher_bytes, rows
    try:
        compiled = step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Program(step.setup, step.mesh, False, max(_needed(str(error)), memory + 1), *sizes)
    found: Any = compiled.memory_analysis()
    # Compilers of CPUs say no peak; those of TPUs count more temporaries than there are (docs/scale.md).
    temporaries = found.temp_size_in_bytes
    peak = found.peak_memory_in_bytes if step.topology.chip else sum(sizes) + temporaries
    return Program(step.setup, step.mesh, peak <= memory, peak, *sizes, temporaries, compiled.as_text() or "")


def architectures(
    config: TrainConfig,
) -> tuple[ModelConfig, ModelConfig | None, tuple[str, int, int] | None]:
    """(student, teacher, (format, slots a token, vocabulary) of a cache): of the models where they lie, else
    by model_name and teacher_model_name. No weight is read. Raises UserError for one that is neither."""
    token = config.hf_access_token.get_secret_value() if config.hf_access_token else None

    def of(whose: str, name: str, path: str, keys: str) -> ModelConfig:
        if name:
            return preset(name)
        if not path or path == RANDOM:
            raise UserError(f"a plan needs to know the architecture of the {whose}; set {keys}")
        return find(path, hf_access_token=token, weights=False).config

    keys = "model_name or load_parameters_path"
    student = of("student", config.model_name, config.load_parameters_path, keys)
    if config.method == "online":
        keys = "teacher_model_name or teacher_load_parameters_path"
        name, path = config.teacher_model_name, config.teacher_load_parameters_path
        return student, of("teacher", name, path, keys), None
    if config.method == "sft":
        return student, None, None
    if not config.teacher_cache_path:
        slots = Layout("sampled", DEFAULT_K["sampled"], student.vocab_size).slots
        return student, None, ("sampled", slots, student.vocab_size)
    store = TargetStore.open(config.teacher_cache_path, student.vocab_size)
    return student, None, (store.format, store.slots, store.manifest["vocab_size"])


def abstract_batch(config: TrainConfig, mesh: Mesh, cache: tuple[str, int, int] | None) -> dict[str, Any]:
    """Shapes, dtypes and shardings of the arrays of a step's batch."""
    rows = config.per_device_batch_size * batch_devices(mesh)
    shape = (config.gradient_accumulation_steps, rows, config.max_target_length)
    kinds: dict[str, tuple[tuple[int, ...], Any]] = {
        name: ((), jnp.int32) for name in ("inputs", "targets", "segment_ids", "positions")
    }
    kinds["weights"] = ((), jnp.float32)
    if cache is not None:
        form, ids, _ = cache
        kinds |= {"target_ids": ((ids,), jnp.int32), "target_weights": ((ids,), jnp.float32)}
        kinds["teacher_nll"] = ((), jnp.float32)
        if form == "sampled":
            kinds["teacher_entropy"] = ((), jnp.float32)
    sharding = batch_sharding(mesh, leading=1)
    return {
        name: jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=sharding)
        for name, (more, dtype) in kinds.items()
    }


def _bytes(tree: Any) -> int:
    """What a device holds of a tree of abstract arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
    )


def _needed(message: str) -> int:
    """Bytes that a program needs, of the compiler's words on why it does not fit."""
    match = re.search(r"(?:required[^(]*\(|Used )([\d.]+)([KMGT])", message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0
