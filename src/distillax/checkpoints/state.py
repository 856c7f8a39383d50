"""Orbax: a model's parameters alone, and the whole state of a training run.

A run keeps `checkpoints/<step>/{model_params, optimizer_state, iter}`; `model_params` is a
checkpoint of its own, laid out like the parameter tree.
"""

import asyncio
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import future

from distillax.checkpoints.huggingface import Read
from distillax.errors import UserError
from distillax.models.spec import Tree

_CHUNK_BYTES = 8_000_000  # small, since who needs a part of an array reads whole chunks
_WORTH_A_LINE = 10**8  # bytes
MODEL_PARAMS, OPTIMIZER_STATE, ITERATOR = "model_params", "optimizer_state", "iter"


@dataclass(frozen=True)
class LazyArray:
    """An array that is read when Orbax comes to write it: a layer at a time if it is stacked."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Read
    stacked: bool

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes LazyArrays one after the other, as if they were numpy arrays."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Any:
        write_one = super().serialize

        async def write_all() -> None:
            for value, info in zip(values, infos, strict=True):
                for written in await write_one([value], [info], [_save_args(value.stacked)]):
                    await asyncio.to_thread(written.result)

        return [future.CommitFutureAwaitingContractedSignals(write_all(), name="lazy_arrays")]

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
        """What Orbax does here with a whole array: all of it would be in memory, plain and compressed."""
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        if not value.stacked or value.nbytes <= _CHUNK_BYTES:
            await store.write(value.read(), can_reference_source_data_indefinitely=True)
            return
        for layer in range(value.shape[0]):
            await store[layer].write(value.read(layer), can_reference_source_data_indefinitely=True)


class _OpenHandler(ocp.type_handlers.NumpyHandler):
    """Restores arrays as open tensorstores: nothing of them is read yet."""

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Any:
        specs = [
            ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=bool(info.is_ocdbt_checkpoint))
            for info in infos
        ]
        opening = (
            ts.open(ts.Spec(s), open=True, context=i.ts_context) for s, i in zip(specs, infos, strict=True)
        )
        return await asyncio.gather(*opening)


def is_stacked(path: tuple[str, ...]) -> bool:
    """Also of a moment, whose path ends as that of its parameter."""
    return "layers" in path


def _save_args(stacked: bool) -> ocp.SaveArgs:
    """No chunk reaches over two layers, so that one layer can be read and written alone."""
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ())


def _in_chunks(tree: Any) -> Any:
    """How the arrays of a tree are saved: in chunks of which a process, on whatever mesh, reads those of its
    devices."""

    def of(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
        names = tuple(str(getattr(key, "key", "")) for key in path)
        return _save_args(is_stacked(names)) if leaf.ndim else ocp.SaveArgs()

    return jax.tree_util.tree_map_with_path(of, tree)


@contextmanager
def _without_hints() -> Iterator[None]:
    """Orbax would warn of what is meant so: handlers of our own, a checkpoint inside another one's folder."""
    meant = ("No jax.Array in TypeHandlerRegistry", "Metadata file does not exist")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(meant)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@_without_hints()
def save_params(folder: Path, params: Tree) -> None:
    """Writes a parameter tree of LazyArrays as one Orbax checkpoint; what was there is replaced."""
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, _LazyHandler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(temporary.absolute(), args=ocp.args.PyTreeSave(params), force=True)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def is_params(folder: Path) -> bool:
    return (folder / "_METADATA").is_file()


@_without_hints()
def open_params(folder: Path) -> dict[tuple[str, ...], ts.TensorStore]:
    """Every array of a parameter checkpoint by its path in the tree, open but not read."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=ts.TensorStore), tree)
    registry = ocp.type_handlers.create_type_handler_registry((ts.TensorStore, _OpenHandler()))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        tree = checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=arguments))
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def read_param(
    store: ts.TensorStore, dtype: np.dtype, layer: int | None = None, part: tuple[slice, ...] = ()
) -> np.ndarray:
    """An array of a parameter checkpoint; given `layer`, that one and no other; given `part`, that of it."""
    one = store if layer is None else store[layer]
    one = one[part] if part else one
    return one.read().result().astype(dtype, copy=False)


def split_axis(store: ts.TensorStore, stacked: bool) -> int:
    """The axis of a layer's array, counted from the last, that lies in the most chunks: a part is read by
    whole chunks."""
    chunk: Any = store.chunk_layout.read_chunk.shape or store.shape
    chunks = [math.ceil(size / part) for size, part in zip(store.shape, chunk, strict=True)]
    return max(range(int(stacked), store.rank), key=chunks.__getitem__) - store.rank


def _sizes(tree: Any) -> list[int]:
    """Bytes of each array of an (abstract) tree."""
    return [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)]


def _restore(folder: Path, tree: Any) -> Any:
    """One item of a checkpoint, as the (abstract) tree says. Orbax reads every array at once, which would be
    in memory a second time; so it may have no more on the way than the largest of them needs."""
    largest = max(_sizes(tree), default=0)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 10**9)
    arguments = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(folder, args=arguments)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Orbax would tell JAX that this process is at the step that is saved, be it long past: then the
        processes could not agree on one after which to stop (`hosts.stopping`)."""
        return False


class RunCheckpoints:
    """The checkpoints of a training run: asynchronous, the newest few kept. A context manager, which
    waits at its end until everything begun is on disk."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        names = (MODEL_PARAMS, OPTIMIZER_STATE, ITERATOR)
        self._keep = keep
        self._manager = _Manager(folder.absolute(), options=options, item_names=names)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def check_room(self, params: Tree, optimizer_state: Any) -> str | None:
        """A line about the room that checkpoints of these (abstract) trees take, where it is worth one.
        Raises UserError if the disk has none even for a single one."""
        folder = Path(self._manager.directory)
        size, disk = sum(_sizes((params, optimizer_state))), shutil.disk_usage(folder)
        needed, free = f"a checkpoint takes {size / 1e9:,.1f} GB", f"{disk.free / 1e9:,.1f} GB"
        if size > disk.free and disk.total:  # some network drives tell nothing
            raise UserError(
                f"{needed}, but only {free} are free in {folder}; make room there, or give another "
                "base_output_directory"
            )
        kept = f"{self._keep} are kept" if self._keep > 1 else "one is kept"
        return f"{needed}, {kept}; {free} are free in {folder}" if size >= _WORTH_A_LINE else None

    def save(self, step: int, params: Tree, optimizer_state: Any, iterator: dict[str, Any]) -> None:
        """Begins to save; the arrays may be donated afterwards. `iterator` is plain JSON."""
        items: dict[str, Any] = {
            MODEL_PARAMS: ocp.args.PyTreeSave(params, save_args=_in_chunks(params)),
            OPTIMIZER_STATE: ocp.args.PyTreeSave(optimizer_state, save_args=_in_chunks(optimizer_state)),
            ITERATOR: ocp.args.JsonSave(iterator),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, params: Tree, optimizer_state: Any) -> tuple[Tree, Any]:
        """Restores into the shapes, dtypes and shardings of the (abstract) trees given."""
        folder = Path(self._manager.directory) / str(step)
        with self._complete(step):
            return _restore(folder / MODEL_PARAMS, params), _restore(
                folder / OPTIMIZER_STATE, optimizer_state
            )

    def restore_iterator(self, step: int) -> dict[str, Any]:
        """What was saved as `iterator`."""
        with self._complete(step):
            items = ocp.args.Composite(**{ITERATOR: ocp.args.JsonRestore()})
            return self._manager.restore(step, args=items)[ITERATOR]

    @contextmanager
    def _complete(self, step: int) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, KeyError) as error:
            where = f"{self._manager.directory}/{step}"
            raise UserError(
                f"the checkpoint {where} is not complete ({error}); remove it to go on"
            ) from error

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Many processes finish a checkpoint together; where one of them has failed, it never would be.
        if kind is not None and jax.process_count() > 1:
            return
        self._manager.wait_until_finished()
        self._manager.close()
