"""Orbax: a model's parameters alone, and the whole state of a training run.

A run keeps `checkpoints/<step>/{model_params, optimizer_state, iter}`; `model_params` is a
checkpoint of its own, laid out like the parameter tree.
"""

import asyncio
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from distillax.errors import UserError
from distillax.models.spec import Tree, unflatten

# An array is compressed a chunk at a time, so a whole one would be in memory twice more.
_CHUNK_BYTES = 64_000_000
MODEL_PARAMS, OPTIMIZER_STATE, ITERATOR = "model_params", "optimizer_state", "iter"


@dataclass(frozen=True)
class LazyArray:
    """An array that is read when Orbax comes to write it, so that one at a time is in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

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
        args = [ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)] * len(values)
        write_one = super().serialize

        async def write_all() -> None:
            for value, info, arg in zip(values, infos, args, strict=True):
                for written in await write_one([value.read()], [info], [arg]):
                    await asyncio.to_thread(written.result)

        return [future.CommitFutureAwaitingContractedSignals(write_all(), name="lazy_arrays")]


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


def params_metadata(folder: Path) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a parameter checkpoint, by its path in the tree."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(folder.absolute())
    tree = getattr(metadata, "item_metadata", metadata)
    tree = getattr(tree, "tree", tree)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        tuple(str(getattr(key, "key", key)) for key in path): jax.ShapeDtypeStruct(
            leaf.shape, np.dtype(leaf.dtype)
        )
        for path, leaf in leaves
    }


def read_param(folder: Path, path: tuple[str, ...]) -> np.ndarray:
    """One array of a parameter checkpoint; nothing else of it is read."""
    item = unflatten({path: 0})
    arguments = unflatten({path: ocp.RestoreArgs(restore_type=np.ndarray)})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restore = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        tree = checkpointer.restore(folder.absolute(), args=restore)
    for name in path:
        tree = tree[name]
    return np.asarray(tree)


class RunCheckpoints:
    """The checkpoints of a training run: asynchronous, the newest few kept."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        names = (MODEL_PARAMS, OPTIMIZER_STATE, ITERATOR)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_names=names)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, params: Tree, optimizer_state: Any, iterator: dict[str, Any]) -> None:
        """Begins to save; the arrays may be donated afterwards. `iterator` is plain JSON."""
        items: dict[str, Any] = {
            MODEL_PARAMS: ocp.args.PyTreeSave(params),
            OPTIMIZER_STATE: ocp.args.PyTreeSave(optimizer_state),
            ITERATOR: ocp.args.JsonSave(iterator),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, params: Tree, optimizer_state: Any) -> tuple[Tree, Any, dict[str, Any]]:
        """Restores into the shapes, dtypes and shardings of the (abstract) trees given."""

        def arguments(tree: Any) -> Any:
            return ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
            )

        items: dict[str, Any] = {
            MODEL_PARAMS: arguments(params),
            OPTIMIZER_STATE: arguments(optimizer_state),
            ITERATOR: ocp.args.JsonRestore(),
        }
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (FileNotFoundError, KeyError) as error:
            where = f"{self._manager.directory}/{step}"
            raise UserError(
                f"the checkpoint {where} is not complete ({error}); remove it to go on"
            ) from error
        return restored[MODEL_PARAMS], restored[OPTIMIZER_STATE], restored[ITERATOR]

    def close(self) -> None:
        """Waits until everything begun is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
