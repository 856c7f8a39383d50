"""The batches of a training run. Every host reads the rows of its own devices, and gives them to these."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distillax.config import TrainConfig
from distillax.data.batches import Batch, Encode, Share, make_batches, row_sizes
from distillax.data.chat import Example
from distillax.data.examples import Examples, load_examples
from distillax.data.rows import BUILDERS, refuse_split_of_file
from distillax.data.targets import TargetStore
from distillax.errors import UserError, about
from distillax.parallel import hosts
from distillax.parallel.mesh import batch_devices, batch_sharding, rows_a_step
from distillax.progress import progress

COUNTED_ROWS = 100_000  # beyond this many, the rows are not all encoded just to be counted
_SOON = 5_000  # rows that are read before anybody asks what takes so long


@dataclass(frozen=True)
class Feed:
    """Examples as batches for a mesh, with what a teacher expects of them, if `targets` hold it. `sizes` are
    those of all rows (`row_sizes`), or None where a single host, which does not need them, has not counted
    them."""

    config: TrainConfig
    mesh: Mesh
    examples: Examples
    sizes: np.ndarray | None
    targets: TargetStore | None = None

    def training(self) -> Any:
        """Batches [A * B, T] for ever, A being the microbatches, in the order of the seed: an iterator whose
        state (`make_batches`) is the same on every host."""
        rows, microbatches = rows_a_step(self.config, self.mesh), self.config.gradient_accumulation_steps
        return self._batches(
            (microbatches, rows // microbatches),
            self._encode,
            shuffle_seed=self.config.data_shuffle_seed,
        )

    def to_devices(self, batch: Batch) -> dict[str, jax.Array]:
        """[A * B, T] -> [A, B, T] over all devices."""
        sharding, microbatches = batch_sharding(self.mesh, leading=1), self.config.gradient_accumulation_steps
        return {
            name: hosts.global_array(sharding, x.reshape(microbatches, -1, *x.shape[1:]))
            for name, x in batch.items()
        }

    def evaluation(self) -> Iterator[dict[str, jax.Array]]:
        """Batches [B, T] over all devices: the examples once, in order, or eval_steps batches."""
        rows = self.config.per_device_batch_size * batch_devices(self.mesh)
        batches = self._batches((rows,), self.examples.encode, shuffle_seed=None, num_epochs=1)
        try:
            for number, batch in enumerate(batches):
                if number == self.config.eval_steps:
                    return
                sharding = batch_sharding(self.mesh)
                yield {name: hosts.global_array(sharding, x) for name, x in batch.items()}
        finally:
            batches.close()

    def _encode(self, row: int) -> Example:
        """A row, whose faults come in the middle of a run if nobody has encoded it before."""
        try:
            return self.examples.encode(row)
        except UserError as error:
            raise UserError(
                f"{error}; this run cannot go on with another row there: start a new one (run_name)"
            ) from error

    def _batches(self, shape: tuple[int, ...], encode: Encode, **options: Any) -> Any:
        """Batches of rows that become `shape`, the last axis of which the devices share."""
        length, share = self.config.max_target_length, None
        if jax.process_count() > 1:
            assert self.sizes is not None
            sharding = batch_sharding(self.mesh, leading=len(shape) - 1)
            share = Share(self.sizes, hosts.own_rows(sharding, (*shape, length)).ravel())
        return make_batches(
            self.examples,
            encode,
            batch_size=int(np.prod(shape)),
            max_target_length=length,
            packing=self.config.packing,
            overlong=self.config.overlong,
            share=share,
            targets=None if self.targets is None else self.targets.lookup,
            **options,
        )


def make_feed(
    config: TrainConfig, mesh: Mesh, examples: Examples, most: int, targets: TargetStore | None = None
) -> Feed:
    """A single host encodes every row once, to count them, if there are no more than `most`. Several always
    do, each its share, and tell each other the sizes: which rows a batch holds depends on all before it. Rows
    that are not encoded are read, which takes seconds, so that the training does not end at a bad one.
    Raises UserError if they read different data, or, naming the row, if one cannot be read, or `targets` lack
    one that is encoded."""
    count, own, rows = jax.process_count(), jax.process_index(), len(examples)
    if count == 1 and rows > most:
        for row in _told(range(rows)):
            examples.conversations[row]
        return Feed(config, mesh, examples, None, targets)
    if count > 1:
        name = f"{rows:,} rows with the fingerprint {examples.fingerprint()} {examples.tokens_by()}"
        hosts.same_for_all(name, "the data", "the same files and tokenizer")
    mine = _told(range(own, rows, count))
    limit = config.max_target_length

    def encode(row: int) -> Example:
        example = examples.encode(row)
        used = example.loss_mask[1 : limit + 1].any()
        if config.overlong == "drop":
            used = used and len(example.tokens) - 1 <= limit
        if targets is not None and used:  # now, and not after hours of training
            with about(examples.conversations.where(row)):
                targets.row(example)
        return example

    part = row_sizes(examples, encode, limit, mine)
    return Feed(config, mesh, examples, hosts.from_all(part, rows), targets)


def _told(rows: Sequence[int]) -> Iterator[int]:
    with progress(len(rows), "read", enabled=hosts.is_first() and len(rows) > _SOON) as bar:
        for row in rows:
            yield row
            bar.update(1)


def refuse_idle_splits(config: TrainConfig) -> None:
    """Raises UserError for a split of files that are named, which have none: all of them would be read."""
    path = Path(config.hf_path).expanduser()
    for key, files in (("train_split", "hf_train_files"), ("eval_split", "hf_eval_files")):
        split, named = getattr(config, key), getattr(config, files)
        if split in ("", "train"):
            continue
        refuse_split_of_file(config.hf_path, split, f"{key}={split}")
        if named and (config.hf_path in BUILDERS or path.is_dir()):
            raise UserError(f"{key}={split}: {files} names the files to read, without splits; leave it out")


def read_examples(config: TrainConfig, tokenizer: Any, split: str, files: str, token: str | None) -> Examples:
    """A split of the data set that the keys name."""
    return load_examples(
        config.hf_path,
        tokenizer,
        split=split,
        columns=config.train_data_columns,
        files=files,
        hf_name=config.hf_name,
        train_on=config.train_on,
        enable_thinking=config.enable_thinking,
        hf_access_token=token,
    )
