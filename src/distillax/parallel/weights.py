"""A model's weights, laid on the mesh as they are read: no device, and no host of many, holds them whole."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from distillax.models.families import ModelConfig, param_specs
from distillax.models.layout import RULES, Rules
from distillax.models.quantize import Quantized, quantized_specs
from distillax.models.spec import ParamSpec, Tree, iter_specs, unflatten
from distillax.parallel import hosts
from distillax.parallel.assemble import assemble
from distillax.parallel.mesh import local_mesh, param_shardings


def place(
    source: Any,
    dtype: Any,
    mesh: Mesh,
    quantization: str = "",
    rules: Rules = RULES,
    products: str = "",
) -> Tree:
    """The weights of a checkpoints.source.Source, in the dtypes that its `weights` says, each quantised, if
    it is to be, and laid on the devices as it is read: a process reads its share."""
    config: ModelConfig = source.config
    specs, placed = dict(iter_specs(param_specs(config))), {}
    described = abstract_weights(config, jnp.float32, mesh, quantization, rules)
    for weight in source.weights(dtype, quantization, products):
        spec, found = specs[weight.path], cast(Any, described)
        for name in weight.path:
            found = found[name]
        quantized = isinstance(found, Quantized)  # which has its own dtypes
        like: Any = found if quantized else found.update(dtype=jnp.dtype(weight.dtype))
        if len(spec.shape) < 2 or mesh.size == 1:  # a vector is small: every process reads all of it
            placed[weight.path] = jax.tree.map(
                lambda leaf, array: hosts.global_array(leaf.sharding, array), like, weight.read()
            )
        else:
            layers = config.layers if spec.stacked else None
            placed[weight.path] = assemble(like, layers, weight.axis, weight.read)
    return unflatten(placed)


def place_here(source: Any, dtype: Any = None, quantization: str = "", products: str = "") -> Tree:
    """As `place`, on all devices of this process, which share every weight that can be split. `dtype` None
    keeps the stored ones."""
    mesh = local_mesh()
    if mesh.size > 1:
        return place(source, dtype, mesh, quantization, products=products)
    # Where they are bound to no mesh, what is made beside them need not be bound either.
    weights = source.weights(dtype, quantization, products)
    return unflatten({weight.path: jax.tree.map(jnp.asarray, weight.read()) for weight in weights})


def abstract_weights(
    config: ModelConfig, dtype: Any, mesh: Mesh, quantization: str = "", rules: Rules = RULES
) -> Tree:
    """Shapes, dtypes and shardings of what `place` gives for a model: nothing is read."""
    specs = quantized_specs(param_specs(config)) if quantization else param_specs(config)

    def leaf(spec: ParamSpec, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        shape = spec.full_shape(config.layers)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(spec.dtype or dtype), sharding=sharding)

    return jax.tree.map(leaf, specs, param_shardings(specs, config.layers, mesh, rules))
