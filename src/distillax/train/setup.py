"""What a training run starts from: the student's weights, placed on the mesh, and the optimizer's state."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distillax.checkpoints.source import Source, find
from distillax.config import TrainConfig
from distillax.errors import UserError, about
from distillax.models.families import param_specs, preset
from distillax.models.spec import ParamSpec, Tree, init_params
from distillax.parallel.mesh import param_shardings
from distillax.parallel.weights import place
from distillax.train.objectives import PROJECTION, Setup
from distillax.train.step import TrainState

RANDOM = "random"  # load_parameters_path for random weights, which must be asked for by name


def student_source(config: TrainConfig, token: str | None) -> Source:
    """Where the student comes from. Raises UserError if it is nowhere, or is not what model_name says."""
    if not config.load_parameters_path:
        raise UserError(
            "load_parameters_path is not set; give the student's weights, "
            f"or {RANDOM} with a model_name to begin from random ones"
        )
    if config.load_parameters_path == RANDOM:
        if not config.model_name:
            raise UserError(f"load_parameters_path={RANDOM} needs a model_name")
        preset(config.model_name)  # a misspelt name is the first thing to say
        return Source(config.model_name, RANDOM, Path(), None, config.model_name)
    with about("load_parameters_path"):
        source = find(
            config.load_parameters_path, model_name=config.model_name or None, hf_access_token=token
        )
    if config.model_name and (source.side is not None or source.kind == "gguf"):
        check_name("model_name", config.model_name, source)
    return source


def check_name(key: str, model_name: str, source: Source) -> None:
    """A model_name that is not what the checkpoint holds is a mistake worth stopping for."""
    wanted, found = preset(model_name), source.config
    for name in ("family", "layers", "width", "heads", "kv_heads", "mlp_width"):
        if getattr(wanted, name) != getattr(found, name):
            raise UserError(
                f"{key}={model_name} has {name} {getattr(wanted, name)}, but {source.name} has "
                f"{getattr(found, name)}; leave {key} out, or give the weights that belong to it"
            )


def trained_specs(setup: Setup) -> Tree:
    """Every weight that is trained: the student's, and the projections of its hidden states to the
    teacher's width, where the two differ."""
    specs = param_specs(setup.student)
    if not setup.features.layers or setup.teacher is None or setup.teacher.width == setup.student.width:
        return specs
    shape = (len(setup.features.layers), setup.student.width, setup.teacher.width)
    return {**specs, PROJECTION: ParamSpec(shape, (None, "embed", None), hf="", transpose=True)}


def new_state(source: Source, setup: Setup, optimizer: Any, config: TrainConfig, mesh: Mesh) -> TrainState:
    """Master weights from the source, each placed on the devices as it is read."""
    dtype, specs = jnp.dtype(config.weight_dtype), trained_specs(setup)
    if source.kind == RANDOM:
        params = _random(specs, source.config.layers, config, dtype, mesh)
    else:
        params = place(source, dtype, mesh)
        more = {name: spec for name, spec in specs.items() if name not in params}
        params |= _random(more, source.config.layers, config, dtype, mesh)
    optimizer_state = jax.jit(optimizer.init, out_shardings=_optimizer_shardings(optimizer, params, mesh))(
        params
    )
    return TrainState(params, optimizer_state)


def abstract_state(setup: Setup, optimizer: Any, config: TrainConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, for a restore."""
    dtype, specs, layers = jnp.dtype(config.weight_dtype), trained_specs(setup), setup.student.layers

    def leaf(spec: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.full_shape(layers), dtype, sharding=sharding)

    params = jax.tree.map(leaf, specs, param_shardings(specs, layers, mesh))
    shapes = jax.eval_shape(optimizer.init, params)
    optimizer_state = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        _optimizer_shardings(optimizer, params, mesh),
    )
    return TrainState(params, optimizer_state)


def to_saved(state: TrainState) -> tuple[Tree, Any]:
    """(the student's parameters alone, all else that a resumed run needs)."""
    params = dict(state.params)
    if PROJECTION not in params:
        return params, state.optimizer_state
    return params, {PROJECTION: params.pop(PROJECTION), "optimizer": state.optimizer_state}


def from_saved(params: Tree, rest: Any) -> TrainState:
    """The inverse of `to_saved`."""
    if isinstance(rest, dict) and PROJECTION in rest:
        return TrainState({**params, PROJECTION: rest[PROJECTION]}, rest["optimizer"])
    return TrainState(params, rest)


def _random(specs: Tree, layers: int, config: TrainConfig, dtype: Any, mesh: Mesh) -> Tree:
    key, shardings = jax.random.key(config.init_weights_seed), param_shardings(specs, layers, mesh)
    return jax.jit(lambda: init_params(specs, layers, key, dtype), out_shardings=shardings)()


def _optimizer_shardings(optimizer: Any, params: Any, mesh: Mesh) -> Any:
    """Moments are split like the parameters they belong to; counters are whole."""
    shapes = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer,
        lambda _, param: param.sharding,
        shapes,
        params,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
