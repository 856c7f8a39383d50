"""Hugging Face tensors <-> parameters: every tensor mapped exactly once, or an error.

The map itself is the `hf` column of the parameter table; here is only the strictness around it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distillax.checkpoints.safetensors_io import Writer, read_header, read_tensor
from distillax.errors import UserError, listed
from distillax.models.families import ModelConfig, param_specs
from distillax.models.spec import ParamSpec, iter_specs
from distillax.run_dir import read_json, write_json

_MAX_FILE_BYTES = 4_000_000_000
_BLOCK_BYTES = 16_000_000  # of a tensor, read at a time
_STRIP_BYTES = 1_000_000  # transposed and cast at a time: what fits a cache takes half the time
_ALL = slice(None)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class TensorSource(Protocol):
    """Tensors by Hugging Face name, read one at a time, or some rows of one: of its first axis."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str, rows: slice = _ALL) -> np.ndarray: ...


class FolderSource:
    """The safetensors of a Hugging Face folder, one file or many."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files = sorted(set(read_json(index)["weight_map"].values()))
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            hint = "; its pickled weights (.bin) are not read" if list(folder.glob("*.bin")) else ""
            raise UserError(f"{folder} has no .safetensors files{hint}; download the model's safetensors")
        self._infos = {}
        for name in files:
            if not (folder / name).is_file():
                raise UserError(f"{index} names {name}, which is not in {folder}; download it again")
            self._infos.update(read_header(folder / name))

    def names(self) -> list[str]:
        return list(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._infos[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._infos[name].dtype

    def read(self, name: str, rows: slice = _ALL) -> np.ndarray:
        return read_tensor(self._infos[name], rows)


class Read(Protocol):
    """Reads a parameter; given `layer`, that one of a stacked parameter and no other; given `part`, a slice
    of each axis of that layer (or of what is not stacked), no more than it needs."""

    def __call__(self, layer: int | None = None, part: tuple[slice, ...] = ()) -> np.ndarray: ...


@dataclass(frozen=True)
class Stored:
    """A parameter where it lies, stacked over layers. A part that is whole but for `axis`, counted from the
    last, is one that can be read alone."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    axis: int
    read: Read


def check_tensors(source: TensorSource, config: ModelConfig, where: str) -> None:
    """Raises UserError listing the missing, unknown and mis-shaped tensors, unless there are none."""
    wanted = {
        name: spec.hf_shape
        for _, spec in iter_specs(param_specs(config))
        for name in spec.hf_names(config.layers)
    }
    have = set(source.names())
    # A tied model may repeat the embedding as its head; equality is checked where it is read.
    have -= _redundant_head(source, config)
    problems = []
    if missing := sorted(set(wanted) - have):
        problems.append(f"missing {listed(missing)}")
    if unknown := sorted(have - set(wanted)):
        problems.append(f"unknown {listed(unknown)}")
    shapes = {name: source.shape(name) for name in have & set(wanted)}
    if wrong := sorted(name for name, shape in shapes.items() if tuple(shape) != wanted[name]):
        problems.append(
            f"wrong shape {listed([f'{n} {tuple(shapes[n])} instead of {wanted[n]}' for n in wrong])}"
        )
    if problems:
        raise UserError(
            f"{where} does not fit its config.json ({config.family}, {config.layers} layers): "
            f"{'; '.join(problems)}; check that weights and config belong together"
        )


def iter_params(source: TensorSource, config: ModelConfig, where: str, dtype: Any = None) -> Iterator[Stored]:
    """Yields each parameter. `dtype` None keeps the source's own."""
    check_tensors(source, config, where)
    embedding = "model.embed_tokens.weight"
    for name in _redundant_head(source, config):
        if not all(
            np.array_equal(source.read(name, r), source.read(embedding, r)) for r in _blocks(source, name)
        ):
            raise UserError(f"{where}: tie_word_embeddings is true, yet {name} differs from the embedding")
    for path, spec in iter_specs(param_specs(config)):
        names = spec.hf_names(config.layers)
        if dtype is None and len(found := sorted({str(source.dtype(name)) for name in names})) > 1:
            raise UserError(
                f"{where}: {names[0]} and its like in other layers have dtypes {', '.join(found)}"
            )
        kept = np.dtype(dtype) if dtype is not None else source.dtype(names[0])
        axis = -1 if spec.transpose else -len(spec.shape)  # rows of a tensor lie together
        read = partial(_read, source, names, spec, kept)
        yield Stored(path, spec.full_shape(config.layers), kept, axis, read)


def _read(
    source: TensorSource,
    names: list[str],
    spec: ParamSpec,
    dtype: np.dtype,
    layer: int | None = None,
    part: tuple[slice, ...] = (),
) -> np.ndarray:
    part = part or (_ALL,) * len(spec.shape)
    shape = tuple(len(range(*s.indices(n))) for s, n in zip(part, spec.shape, strict=True))
    if layer is None and spec.stacked:
        found = np.empty((len(names), *shape), dtype)
        for name, one in zip(names, found, strict=True):
            _fill(one, source, name, spec, part)
        return found
    found = np.empty(shape, dtype)
    _fill(found, source, names[layer or 0], spec, part)
    return found


def _fill(
    found: np.ndarray, source: TensorSource, name: str, spec: ParamSpec, part: tuple[slice, ...]
) -> None:
    """Reads a part of a tensor into an array of our layout and dtype, a block at a time."""
    found, (rows, *columns) = (found.T, part[::-1]) if spec.transpose else (found, part)
    first = rows.indices(spec.hf_shape[0])[0]
    for block in _blocks(source, name, rows):
        values = source.read(name, block)[(_ALL, *columns)]
        step = max(1, _STRIP_BYTES // max(1, values[0].nbytes))
        for start in range(0, len(values), step):
            strip = values[start : start + step]
            at = block.start - first + start
            found[at : at + len(strip)] = strip


def _blocks(source: TensorSource, name: str, rows: slice = _ALL) -> Iterator[slice]:
    """Rows of a tensor, so many at a time as are read at once."""
    first, last, _ = rows.indices(source.shape(name)[0])
    row_bytes = source.dtype(name).itemsize * math.prod(source.shape(name)[1:])
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


def write_folder(
    folder: Path,
    config: ModelConfig,
    read: Callable[[tuple[str, ...], int | None], np.ndarray],
    dtype_of: Callable[[tuple[str, ...]], np.dtype],
) -> None:
    """Writes config.json and safetensors, holding one tensor at a time.

    `read(path, layer)` gives a layer of a stacked parameter, or with None one that is not stacked;
    `dtype_of(path)` the dtype to store it in.
    """
    specs = list(iter_specs(param_specs(config)))
    declared = []
    for layer in range(config.layers):  # the order in which a reader loads them: layer by layer
        for path, spec in specs:
            if spec.stacked:
                declared.append((spec.hf.format(layer=layer), spec.hf_shape, dtype_of(path)))
    declared[:0] = [(s.hf, s.hf_shape, dtype_of(p)) for p, s in specs if not s.stacked]
    folder.mkdir(parents=True, exist_ok=True)
    writer = Writer(folder, declared, _MAX_FILE_BYTES)
    for path, spec in specs:
        for layer, name in enumerate(spec.hf_names(config.layers)):
            array = read(path, layer if spec.stacked else None)
            writer.write(name, (array.T if spec.transpose else array).astype(dtype_of(path), copy=False))
    writer.close()
    name = str(dtype_of(specs[0][0]))
    hf = {**config.hf, "torch_dtype": name, "dtype": name}
    write_json(folder / "config.json", hf)


def sidecars(folder: Path) -> dict[str, bytes]:
    """The tokenizer and generation files of a Hugging Face folder, by name."""
    names = (*_TOKENIZER_FILES, "generation_config.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _redundant_head(source: TensorSource, config: ModelConfig) -> set[str]:
    return {"lm_head.weight"} & set(source.names()) if config.tied else set()
