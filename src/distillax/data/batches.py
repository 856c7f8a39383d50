"""The input pipeline: rows -> examples -> (packed) batches, with an exact, checkpointable state.

Legend: B rows of a batch, T target tokens of a row, n tokens of a document. Inputs and targets are
shifted by one here, so a document of n tokens takes n - 1 places.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import grain
import numpy as np
from grain import experimental as grain_experimental

from distillax.data.chat import Example
from distillax.errors import UserError

# Documents are packed into this many rows at a time (or a batch, if that is more): the more, the
# fewer places stay empty, and the more documents are read before the first batch.
_PACKING_ROWS = 64
# Rows that each reading thread encodes ahead.
_ROWS_AHEAD = 16

Batch = dict[str, np.ndarray]
Encode = Callable[[Any], Example]
Overlong = Literal["truncate", "drop"]
Targets = Callable[[Example], dict[str, np.ndarray]]


class Rows(Protocol):
    """Random access to rows: a list, a datasets.Dataset, ..."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Counts:
    """What a data set holds: rows = kept + dropped + empty.

    `truncated` rows were cut to the length limit, `dropped` ones left out because of it, `empty`
    ones left out because no token in them bears loss. `tokens` and `loss_tokens` count the targets
    of the kept rows, all and loss-bearing.
    """

    rows: int
    truncated: int
    dropped: int
    empty: int
    tokens: int
    loss_tokens: int


def make_batches(
    dataset: Rows,
    encode: Encode,
    *,
    batch_size: int,
    max_target_length: int,
    packing: bool,
    shuffle_seed: int | None,
    overlong: Overlong,
    num_epochs: int | None = None,
    num_threads: int = 2,
    targets: Targets | None = None,
) -> grain.DatasetIterator[Batch]:
    """Batches: dicts of arrays [B, T], with B = batch_size, T = max_target_length.

    inputs, targets: int32 token ids, targets[t] being the token after inputs[t].
    segment_ids: int32, 1, 2, ... for the documents of a row, 0 for padding.
    positions: int32, from 0 within each document.
    weights: float32, 1 where the target bears loss, else 0.

    `targets` gives more arrays of an example, [n - 1, ...], such as `TargetStore.lookup`: they are cut,
    shuffled, packed and padded with its tokens, and come out as [B, T, ...] under their names.

    Rows are reshuffled each epoch. Documents are packed whole, never split; with `packing=False` a
    row of the batch holds one. Rows without a loss-bearing target are left out, and so are over-long
    ones if `overlong` is "drop". With `num_epochs` the last batch is filled up with padding rows; None
    repeats for ever.

    `get_state()` gives a JSON-able dict; after `set_state()` the same batches follow, bit for bit,
    whatever `num_threads`. `close()` frees the threads.

    Raises UserError, here, if the data set is empty or all of its rows are left out; and, from
    `next`, if a row cannot be encoded or has no targets, naming the row.
    """
    documents = _Documents(dataset, encode, max_target_length, overlong, targets)
    if (first := next(filter(None, map(documents.__getitem__, range(len(dataset)))), None)) is None:
        raise _nothing_left(scan_lengths(dataset, encode, max_target_length, overlong), max_target_length)

    source = grain.MapDataset.source(documents)
    if shuffle_seed is not None:
        source = source.shuffle(shuffle_seed)
    stream: grain.IterDataset[Any] = source.repeat(num_epochs).to_iter_dataset(
        grain.ReadOptions(num_threads, num_threads * _ROWS_AHEAD)
    )
    if packing:
        stream = _packed(stream, batch_size, dict.fromkeys(first, max_target_length), shuffle_seed)
    else:
        stream = stream.map(functools.partial(_padded_row, length=max_target_length))
    batch_fn = functools.partial(grain_experimental.batch_and_pad, batch_size=batch_size)
    return iter(stream.batch(batch_size, batch_fn=batch_fn))


def scan_lengths(
    dataset: Rows, encode: Encode, max_target_length: int, overlong: Overlong = "truncate"
) -> Counts:
    """Encodes every row once and counts what `make_batches` would make of it.

    Raises UserError, naming the row, if one cannot be encoded.
    """
    counts = dict.fromkeys(("truncated", "dropped", "empty", "tokens", "loss_tokens"), 0)
    for i in range(len(dataset)):
        example = _encode_row(dataset, encode, i)
        too_long = len(example.tokens) - 1 > max_target_length
        if too_long and overlong == "drop":
            counts["dropped"] += 1
            continue
        loss_tokens = int(np.count_nonzero(example.loss_mask[1 : max_target_length + 1]))
        if not loss_tokens:
            counts["empty"] += 1
            continue
        counts["truncated"] += too_long
        counts["tokens"] += min(len(example.tokens) - 1, max_target_length)
        counts["loss_tokens"] += loss_tokens
    return Counts(rows=len(dataset), **counts)


@dataclass(frozen=True)
class _Documents:
    """The rows as documents of shifted tokens, each [n - 1]; None for a row that is left out."""

    dataset: Rows
    encode: Encode
    max_target_length: int
    overlong: Overlong
    targets: Targets | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch | None:
        example = _encode_row(self.dataset, self.encode, index)
        if len(example.tokens) - 1 > self.max_target_length and self.overlong == "drop":
            return None
        tokens = example.tokens[: self.max_target_length + 1].astype(np.int32)
        weights = example.loss_mask[1 : self.max_target_length + 1].astype(np.float32)
        if not weights.any():
            return None
        document = {"inputs": tokens[:-1], "targets": tokens[1:], "weights": weights}
        return document if self.targets is None else document | self._targets(example, index)

    def _targets(self, example: Example, index: int) -> Batch:
        assert self.targets is not None
        length = min(len(example.tokens) - 1, self.max_target_length)
        try:
            found = self.targets(example)
        except UserError as error:
            raise UserError(f"row {index} (counted from 0) of the data set: {error}") from error
        shortest = min(map(len, found.values()))
        if shortest < length:
            raise UserError(
                f"row {index} (counted from 0) of the data set has {length} targets, but only {shortest} "
                f"were captured; set max_target_length={shortest} or less, or capture with more"
            )
        return {name: values[:length] for name, values in found.items()}


def _encode_row(dataset: Rows, encode: Encode, index: int) -> Example:
    try:
        return encode(dataset[index])
    except UserError:
        raise
    except Exception as error:  # ours, not the user's; whatever it is, say which row it was
        raise RuntimeError(f"row {index} (counted from 0) of the data set cannot be encoded") from error


def _packed(
    stream: grain.IterDataset[Any], batch_size: int, lengths: dict[str, int], shuffle_seed: int | None
) -> grain.IterDataset[Any]:
    return grain_experimental.BestFitPackIterDataset(
        stream,
        length_struct=lengths,
        num_packing_bins=max(batch_size, _PACKING_ROWS),
        seed=shuffle_seed or 0,
        shuffle_bins=shuffle_seed is not None,
    ).map(functools.partial(_packed_row, names=tuple(lengths)))


def _packed_row(row: Batch, names: tuple[str, ...]) -> Batch:
    """What was packed under `names`, and of the segments and positions that come with each, one."""
    where = {"segment_ids": row["inputs_segment_ids"], "positions": row["inputs_positions"]}
    return where | {name: row[name] for name in names}


def _padded_row(document: Batch, length: int) -> Batch:
    n = len(document["inputs"])

    def pad(values: np.ndarray) -> np.ndarray:
        return np.pad(values, [(0, length - n), *[(0, 0)] * (values.ndim - 1)])

    where = {"segment_ids": np.ones(n, np.int32), "positions": np.arange(n, dtype=np.int32)}
    return {name: pad(values) for name, values in (where | document).items()}


def _nothing_left(counts: Counts, max_target_length: int) -> UserError:
    if not counts.dropped:
        return UserError(
            f"none of the {counts.rows} rows has a token to learn within max_target_length="
            f"{max_target_length}: check that the rows have assistant turns, or raise it."
        )
    return UserError(
        f"no row of the data set is left: of {counts.rows}, {counts.dropped} are longer than "
        f"max_target_length={max_target_length} and {counts.empty} have no token to learn; "
        "raise it, or truncate over-long rows."
    )
