"""The input pipeline: rows -> examples -> (packed) batches, with an exact, checkpointable state.

Legend: B rows of a batch, T target tokens of a row, n tokens of a document. Inputs and targets are
shifted by one here, so a document of n tokens takes n - 1 places.
"""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import grain
import numpy as np
from grain import experimental as grain_experimental

from distillax.data.chat import Example
from distillax.errors import Stopped, UserError

# Documents are packed into this many rows at a time (or a batch, if that is more): the more, the
# fewer places stay empty, and the more documents are read before the first batch.
_PACKING_ROWS = 64
# Rows that each reading thread encodes ahead.
_ROWS_AHEAD = 16
# That count the rows before the first step, when nothing else runs. Python is a fifth of what a row takes.
_THREADS = min(os.cpu_count() or 1, 8)

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


@dataclass(frozen=True)
class Share:
    """What one of several hosts reads: the `rows` of each batch, bool[B], and nothing else of it. `sizes` are
    the sizes of all rows of the data set (`row_sizes`), by which every host packs alike."""

    sizes: np.ndarray
    rows: np.ndarray


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
    share: Share | None = None,
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

    With `share`, rows of a batch that are not the host's have segment_ids and positions alone.

    `get_state()` gives a JSON-able dict; after `set_state()` the same batches follow, bit for bit,
    whatever `num_threads` and `share`. `close()` frees the threads.

    Raises UserError, here, if the data set is empty or all of its rows are left out; and, from
    `next`, if a row cannot be encoded or has no targets, naming the row.
    """
    documents = _Documents(dataset, encode, max_target_length, overlong, targets)
    places = documents if share is None else _Places(kept_lengths(share.sizes, max_target_length, overlong))
    if (first := next(filter(None, map(places.__getitem__, range(len(dataset)))), None)) is None:
        sizes = row_sizes(dataset, encode, max_target_length) if share is None else share.sizes
        raise _nothing_left(count_rows(sizes, max_target_length, overlong), max_target_length)

    source = grain.MapDataset.source(places)
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
    stream = stream.batch(batch_size, batch_fn=batch_fn)
    if share is not None:
        like = documents[int(first["inputs"][0])]
        assert like is not None
        stream = stream.map(functools.partial(_filled, documents=documents, like=like, mine=share.rows))
    return iter(stream)


def row_sizes(
    dataset: Rows, encode: Encode, max_target_length: int, rows: Iterable[int] | None = None
) -> np.ndarray:
    """int32[rows, 2]: the targets of each row, and how many of those within the limit bear loss. Rows are
    encoded in threads, of which tokenizers make use.

    Raises UserError, naming the first row that cannot be encoded, if there is one.
    """

    def size(row: int) -> tuple[int, int]:
        example = _encode_row(dataset, encode, row)
        bearing = np.count_nonzero(example.loss_mask[1 : max_target_length + 1])
        return len(example.tokens) - 1, int(bearing)

    sizes: list[tuple[int, int]] = []
    numbers = iter(range(len(dataset)) if rows is None else rows)
    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(islice(numbers, _THREADS * _ROWS_AHEAD)):
            sizes += pool.map(size, some)
    return np.array(sizes, np.int32).reshape(-1, 2)


def kept_lengths(sizes: np.ndarray, max_target_length: int, overlong: Overlong) -> np.ndarray:
    """int[rows]: targets of each row in a batch, 0 if it is left out."""
    tokens, bearing = sizes.T
    left_out = (bearing == 0) | ((overlong == "drop") & (tokens > max_target_length))
    return np.where(left_out, 0, np.minimum(tokens, max_target_length))


def count_rows(sizes: np.ndarray, max_target_length: int, overlong: Overlong) -> Counts:
    """What `make_batches` makes of rows of such sizes."""
    tokens, bearing = sizes.T
    lengths = kept_lengths(sizes, max_target_length, overlong)
    dropped = (tokens > max_target_length) & (overlong == "drop")
    return Counts(
        rows=len(sizes),
        truncated=int(np.count_nonzero((lengths > 0) & (lengths < tokens))),
        dropped=int(np.count_nonzero(dropped)),
        empty=int(np.count_nonzero((bearing == 0) & ~dropped)),
        tokens=int(lengths.sum()),
        loss_tokens=int(bearing[lengths > 0].sum()),
    )


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
            raise UserError(f"{_where(self.dataset, index)}: {error}") from error
        shortest = min(map(len, found.values()))
        if shortest < length:
            raise UserError(
                f"{_where(self.dataset, index)}: it has {length} targets, but only {shortest} were captured; "
                f"set max_target_length={shortest} or less, or capture with more"
            )
        return {name: values[:length] for name, values in found.items()}


@dataclass(frozen=True)
class _Places:
    """Stand-ins of documents, which are packed in their place: as long, and all of their row's number."""

    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Batch | None:
        length = int(self.lengths[index])
        return {"inputs": np.full(length, index, np.int32)} if length else None


def _filled(batch: Batch, documents: _Documents, like: Batch, mine: np.ndarray) -> Batch:
    """A batch of stand-ins with the documents in them, in the rows that are `mine`; `like` any document."""
    numbers, segments, positions = (batch[name] for name in ("inputs", "segment_ids", "positions"))
    arrays = {name: np.zeros((*numbers.shape, *x.shape[1:]), x.dtype) for name, x in like.items()}
    begins = (segments > 0) & (positions == 0) & mine[:, None]
    for row, start in zip(*np.nonzero(begins), strict=True):
        number, length = int(numbers[row, start]), int((segments[row] == segments[row, start]).sum())
        document = documents[number]
        if document is None or len(document["inputs"]) != length:
            raise UserError(
                f"{_where(documents.dataset, number)}: it is not as long here as it was measured; "
                "every host needs the same files and tokenizer"
            )
        for name, values in document.items():
            arrays[name][row, start : start + length] = values
    return {"segment_ids": segments, "positions": positions, **arrays}


def _where(dataset: Rows, row: int) -> str:
    """For errors: by file, where the rows know it."""
    where: Callable[[int], str] | None = getattr(dataset, "where", None)
    return where(row) if where else f"row {row} (counted from 0) of the data set"


def _encode_row(dataset: Rows, encode: Encode, index: int) -> Example:
    try:
        return encode(dataset[index])
    except (UserError, Stopped):
        raise
    except Exception as error:  # ours, not the user's; whatever it is, say which row it was
        raise RuntimeError(f"{_where(dataset, index)}: it cannot be encoded") from error


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
