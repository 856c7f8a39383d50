"""One declaration per weight, from which initialisation, import, export and sharding derive."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]  # nested dicts with one kind of leaf: ParamSpec, or an array


@dataclass(frozen=True)
class ParamSpec:
    """A weight of one layer, or of the model if not `stacked`.

    `shape` and `axes` (logical names, for sharding) leave the layer axis out; a stacked weight
    lives as one array [L, *shape]. `hf` is the Hugging Face tensor name, with `{layer}` where
    stacked. `transpose`: Hugging Face stores [out, in], we keep [in, out].
    `dtype` is that of the model, unless it names another.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    hf: str
    init: str = "normal"  # normal | zeros | ones
    transpose: bool = False
    dtype: str = ""

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf

    @property
    def hf_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transpose else self.shape

    def full_shape(self, layers: int) -> tuple[int, ...]:
        return (layers, *self.shape) if self.stacked else self.shape

    def full_axes(self) -> tuple[str | None, ...]:
        return ("layers", *self.axes) if self.stacked else self.axes

    def hf_names(self, layers: int) -> list[str]:
        return [self.hf.format(layer=i) for i in range(layers)] if self.stacked else [self.hf]


def map_specs(function: Callable[[ParamSpec], Any], specs: Tree) -> Tree:
    """Applies `function` to every ParamSpec of a tree of them."""
    return jax.tree.map(function, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def iter_specs(specs: Tree, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], ParamSpec]]:
    """Yields (path, spec) of every weight, in a fixed order."""
    for name, node in specs.items():
        if isinstance(node, ParamSpec):
            yield (*prefix, name), node
        else:
            yield from iter_specs(node, (*prefix, name))


def count_params(specs: Tree, layers: int) -> int:
    return sum(math.prod(spec.full_shape(layers)) for _, spec in iter_specs(specs))


def init_params(specs: Tree, layers: int, key: jax.Array, dtype: Any = jnp.float32) -> Tree:
    """Random weights: normal with standard deviation 1/sqrt(fan-in); norms and biases constant.

    For planning and for tests. A run never starts from these unless it asks for them by name.
    """

    def init(path: tuple[str, ...], spec: ParamSpec) -> jax.Array:
        shape = spec.full_shape(layers)
        if spec.init == "zeros":
            return jnp.zeros(shape, dtype)
        if spec.init == "ones":
            return jnp.ones(shape, dtype)
        name = jax.random.fold_in(key, _stable_hash("/".join(path)))
        fan_in = spec.shape[-2] if spec.transpose else spec.shape[-1]
        return (jax.random.normal(name, shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)

    return unflatten({path: init(path, spec) for path, spec in iter_specs(specs)})


def unflatten(flat: dict[tuple[str, ...], Any]) -> Tree:
    """{("layers", "q"): x} -> {"layers": {"q": x}}."""
    tree: Tree = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def _stable_hash(text: str) -> int:
    """FNV-1a: Python's own hash of a string changes from run to run."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value
