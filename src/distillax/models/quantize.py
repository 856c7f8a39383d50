"""Weights in 8 bits, for a teacher that is only read: its layers take half the room of bfloat16.

Shapes: L layers, I inputs, O outputs of a matrix.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from distillax.errors import UserError
from distillax.models.spec import ParamSpec, Tree, map_specs

KINDS = ("", "int8")  # what teacher_quantization may be; the first is none
_LEVELS = 127  # symmetric: -128 would have no opposite


class Quantized(NamedTuple):
    """A matrix as `values * scale`: int8[..., I, O], and float32[..., 1, O], one number an output channel.

    It stands in a parameter tree where the matrix would, and is a tree of two leaves itself, so whatever
    stacks, slices or places weights need not know of it.
    """

    values: Any
    scale: Any


def quantize(w_IO: np.ndarray) -> Quantized:
    """The nearest of 255 evenly spaced values in each output channel, the largest weight being the last of
    them: |w - values * scale| <= scale / 2. On the host, in float32.

    Raises ValueError for a weight that is not finite, which integers would hide.
    """
    w_IO = np.asarray(w_IO, np.float32)
    peak = np.abs(w_IO).max(-2, keepdims=True)
    if not np.isfinite(peak).all():
        raise ValueError("a weight is not a finite number")
    # The bound from below is for channels of zeros.
    scale = np.maximum(peak / np.float32(_LEVELS), np.finfo(np.float32).tiny)
    return Quantized(np.rint(w_IO / scale).astype(np.int8), scale)


def read_quantized(
    read: Callable[..., np.ndarray],
    spec: ParamSpec,
    layers: int,
    where: str,
    layer: int | None = None,
    part: tuple[slice, ...] = (),
) -> Quantized:
    """A stacked matrix, or one `layer` of it, or a part of that with all inputs, by `read(layer, part)`: no
    more than a layer is in memory at its full size.

    Raises UserError, naming the model (`where`) and the weight, if one is not finite.
    """
    if layer is not None:
        try:
            return quantize(read(layer, part))
        except ValueError as error:
            name = spec.hf.format(layer=layer)
            raise UserError(f"{where}: {name} cannot be quantised: {error}; check its weights") from None
    whole = Quantized(
        np.empty((layers, *spec.shape), np.int8), np.empty((layers, 1, spec.shape[1]), np.float32)
    )
    for i in range(layers):
        whole.values[i], whole.scale[i] = read_quantized(read, spec, layers, where, i)
    return whole


def is_quantized(spec: ParamSpec) -> bool:
    """Whether quantisation covers a weight: the matrices of the layers. The embeddings and the head stay as
    they are: an error in them is in every logit, and they are a small part of all but small models."""
    return spec.stacked and len(spec.shape) == 2


def quantized_specs(specs: Tree) -> Tree:
    """The table of a quantised model: `Quantized` of two ParamSpecs in the place of each matrix that is.
    The scales are split as the outputs are that they belong to."""

    def parts(spec: ParamSpec) -> ParamSpec | Quantized:
        if not is_quantized(spec):
            return spec
        scale = replace(spec, shape=(1, spec.shape[1]), axes=(None, spec.axes[1]), dtype="float32")
        return Quantized(replace(spec, dtype="int8"), scale)

    return map_specs(parts, specs)
