"""A teacher's targets for a data set: a few token ids a position with their probabilities, packed in bits.

`distillax capture` writes them, `TargetStore` reads them. docs/cached.md gives the format bit by bit.

Shapes: n positions of an example (those that bear loss), m ids of all of them, V vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distillax.data.bits import Reader, Writer, digits
from distillax.data.chat import Example
from distillax.data.shards import sha256_file
from distillax.errors import UserError

Format = Literal["sampled", "topk"]

VERSION = 3
DEFAULT_K: dict[Format, int] = {"sampled": 19, "topk": 64}
FILE, MANIFEST = "targets.parquet", "manifest.json"
ID_BYTES = 16
COUNT_BYTES = 4  # the number of an example's ids, before all else
NUMBERS = 3  # of a position: log-sum-exp, NLL, entropy or (topk, where they are float16) log of the tail
HALF_BYTES = 2 * NUMBERS
WEIGHT_BITS, CODE_BITS = 8, 7
DRAWN = -1  # the code of an id that was drawn: its weight is its share of what the kept ones leave
SPREAD = 2  # a position has this many times as many sampled ids as the average, at most
_WEIGHT_STEPS = 2**WEIGHT_BITS - 1
_ID_BITS = 32  # of an id, at most
_SMALL = 256  # ids below are one group
_STEPS = np.array([16, 256, 1024])  # of the numbers of a sampled position, in a nat
_LARGEST = 65504.0  # nats, of the numbers, as in float16
_CODE_STEPS = 2**CODE_BITS - 1
_LOG_RANGE = 20.0  # nats below the likeliest id at which a probability of the top k is cut off


class Encoded(NamedTuple):
    """An example's ids and numbers. The ids of a position ascend; repeats are allowed.

    counts: int[n], ids of each position. ids, codes: int[m], those of all positions, one after the other.
    numbers: float[n, 3], see NUMBERS.
    """

    counts: np.ndarray
    ids: np.ndarray
    codes: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class Layout:
    """How an example becomes bits, most significant first.

    Tokenizers give the lower ids to the commoner pieces, so ids are coded in groups by size: those below
    256, and then those with as many binary digits. In each, with p the place of its position, an id is the
    number p * (ids of the group) + (id - first of the group), and the steps from number to number are Rice
    coded. `sampled`: a bit for each id, 1 if it was kept, then the codes of those and the three numbers of
    the positions, exponential Golomb coded. docs/cached.md has it bit by bit.
    """

    format: Format
    k: int
    vocab_size: int

    @property
    def slots(self) -> int:
        """Ids of a position, at most. `k` is the average of sampled ones, and the number of the likeliest."""
        return min(SPREAD * self.k, self.vocab_size) if self.format == "sampled" else self.k

    def encode(self, example: Encoded) -> bytes:
        """One example, all of whose ids are in [0, V)."""
        counts, ids, codes, numbers = example
        n, m = len(counts), len(ids)
        bits = Writer()
        if self.format == "sampled":
            kept = codes != DRAWN
            bits.flags(kept)
            bits.golomb(codes[kept])
            for column in _to_steps(numbers):
                bits.golomb(column)
        else:
            bits.write(codes, np.full(m, CODE_BITS))
        first, size = self._groups
        group = _group(ids)
        # From group to group, in each from position to position; bytes are sorted by counting them.
        order = np.argsort(group.astype(np.uint8), kind="stable")
        inside, group = ids[order] - first[group[order]], group[order]
        each = np.bincount(group, minlength=len(first))
        places = np.repeat(np.arange(n, dtype=np.int64), counts)[order] * size[group] + inside
        steps = np.diff(places, prepend=0)
        begins = np.flatnonzero(np.diff(group, prepend=-1))
        steps[begins] = places[begins]
        bits.write(each[:-1], np.full(len(each) - 1, m.bit_length()))
        bits.rice(steps, _low_bits(n * size, each)[group])
        halves = numbers.astype("<f2").tobytes() if self.format == "topk" else b""
        return np.array([m], "<u4").tobytes() + halves + bits.bytes()

    def decode(self, data: Any, positions: int) -> Encoded:
        """What `encode` was given. Raises ValueError if the data are not of so many positions."""
        n, sampled = positions, self.format == "sampled"
        m = int(np.frombuffer(data, "<u4", 1)[0])
        if not (n if sampled else n * self.k) <= m <= n * self.slots:
            raise ValueError(f"{m} ids for {n} positions")
        start = COUNT_BYTES + (0 if sampled else HALF_BYTES * n)
        bits = Reader(np.frombuffer(data, np.uint8, offset=start))
        if sampled:
            kept = bits.flags(m)
            codes = np.full(m, DRAWN, np.int64)
            codes[kept] = bits.golomb(int(kept.sum()))
            numbers = _from_steps([bits.golomb(n) for _ in range(NUMBERS)])
        else:
            codes = bits.read(np.full(m, CODE_BITS))
            numbers = np.frombuffer(data, "<f2", NUMBERS * n, COUNT_BYTES).reshape(n, NUMBERS)
        first, size = self._groups
        each = bits.read(np.full(len(first) - 1, m.bit_length()))
        each = np.append(each, m - each.sum())
        if each[-1] < 0:
            raise ValueError(f"not {m} ids of {n} positions")
        sums = bits.rice(np.repeat(_low_bits(n * size, each), each)).cumsum()
        bits.end()
        places = sums - np.repeat(np.append(0, sums)[each.cumsum() - each], each)
        at = places >> np.repeat(digits(size) - 1, each)  # all sizes but the last are powers of two
        rest = m - each[-1]
        at[rest:] = places[rest:] // size[-1]
        counts = np.bincount(at, minlength=n)
        if len(counts) != n or not (1 if sampled else self.k) <= counts.min() <= counts.max() <= self.slots:
            raise ValueError(f"not {n} positions with {self.slots} ids at most")
        ids = places - at * np.repeat(size, each) + np.repeat(first, each)
        ids += at << _ID_BITS
        ids.sort()  # by position: as numbers, which is several times faster than to find their order
        return Encoded(counts, ids.astype(np.int32), codes, numbers.astype(np.float32))

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The first id of each group, and how many ids it has."""
        last = int(_group(np.array([self.vocab_size - 1]))[0])
        first = np.append(0, _SMALL << np.arange(last))
        return first, np.diff(first, append=self.vocab_size)


def _group(ids: np.ndarray) -> np.ndarray:
    """The group of each id: 0 below 256, 1 below 512, ..."""
    return digits(ids // _SMALL)


def _low_bits(places: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Low bits of a step, where `taken` of so many places are: the best of a Rice code is about
    the least with 2^l > 0.48 of the mean step (Kiely 2004), where steps are as for places taken at random."""
    return digits(places * 31 // (64 * np.maximum(taken, 1)))


def _to_steps(numbers: np.ndarray) -> np.ndarray:
    """int64[3, n], not negative, of [n, 3]: log-sum-exp in steps of 1/16, as the difference from the position
    before, by turns positive and negative (0, -1, 1, -2, ...); NLL in steps of 1/256, entropy of 1/1024."""
    if np.isnan(numbers).any():
        raise ValueError("not a number")
    nats = np.clip(numbers.T.astype(np.float64), -_LARGEST, _LARGEST)
    steps = np.rint(nats * _STEPS[:, None]).astype(np.int64)
    change = np.diff(steps[0], prepend=0)
    return np.stack([np.where(change < 0, -2 * change - 1, 2 * change), *np.maximum(steps[1:], 0)])


def _from_steps(steps: Sequence[np.ndarray]) -> np.ndarray:
    turn = steps[0]
    return np.array([((turn >> 1) ^ -(turn & 1)).cumsum(), *steps[1:]]).T / _STEPS


def round_weights(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """int64[n, k] in [0, 255] with E[code / 255] = weight, and all that is missing to 1 in the same way.

    `weights` float[n, k], not negative, with a sum of 1 at most; `u` float32[n], uniform in [0, 1): the
    running sums are rounded at 255 S + u, so what one code loses, its neighbour has.
    """
    sums = np.minimum(np.cumsum(weights, 1, dtype=np.float64), 1.0)
    steps = np.floor(_WEIGHT_STEPS * sums + u[:, None].astype(np.float64))
    return np.diff(steps, axis=1, prepend=0.0).astype(np.int64)


def round_log_ratios(log_ratios: np.ndarray) -> np.ndarray:
    """Codes int64 in [0, 127] of log(p / largest p), in nats, at most 0: -20 (code / 127)^2."""
    share = np.clip(-np.asarray(log_ratios, np.float64) / _LOG_RANGE, 0.0, 1.0)
    return np.rint(_CODE_STEPS * np.sqrt(share)).astype(np.int64)


def _sampled_weights(counts: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """float32[m], of a sum of 1 at each position: of kept ids as their codes say, and those that were drawn
    share what is left. Where none was, rounding may have left something."""
    drawn, begins = codes == DRAWN, counts.cumsum() - counts
    others = np.add.reduceat(drawn, begins, dtype=np.int64)
    sums = np.add.reduceat(np.where(drawn, 0, codes), begins)
    whole = np.where(others > 0, _WEIGHT_STEPS, np.maximum(sums, 1))
    share = (_WEIGHT_STEPS - sums) / np.maximum(others, 1) / whole
    return np.where(drawn, np.repeat(share, counts), codes / np.repeat(whole, counts)).astype(np.float32)


def _head_probabilities(ids: np.ndarray, codes: np.ndarray, log_tail: np.ndarray) -> np.ndarray:
    """float32[n, k]: as the codes say, scaled so that head and tail sum to 1. A repeated id is a spare
    slot, whose code cannot say zero."""
    ratios = np.exp(np.float32(-_LOG_RANGE) * (codes.astype(np.float32) / np.float32(_CODE_STEPS)) ** 2)
    ratios[:, 1:][ids[:, 1:] == ids[:, :-1]] = 0
    head = -np.expm1(np.minimum(log_tail, 0.0).astype(np.float32))
    return ratios * (head / ratios.sum(1))[:, None]


def example_id(example: Example) -> bytes:
    """16 bytes that name an example by its content: the start of sha256(int32 token ids, loss mask bytes)."""
    digest = hashlib.sha256(np.ascontiguousarray(example.tokens, "<i4").tobytes())
    digest.update(np.ascontiguousarray(example.loss_mask, np.uint8).tobytes())
    return digest.digest()[:ID_BYTES]


class TargetStore:
    """The targets in a folder that `distillax capture` wrote. They stay encoded until they are looked up.

    `manifest` is what manifest.json says; `format` "sampled" (`k` ids a position on average, with unbiased
    weights that sum to 1) or "topk" (probabilities of the `k` likeliest ids, which sum to 1 - tail); a
    position has room for `slots` ids.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], table: pa.Table, vocab_size: int | None):
        self.directory, self.manifest = directory, manifest
        self.format: Format = manifest["format"]
        self.k: int = manifest["k"]
        self._layout = Layout(self.format, self.k, manifest["vocab_size"])
        self.slots = self._layout.slots
        self._limit = vocab_size if vocab_size and vocab_size < manifest["vocab_size"] else None
        self._data = table.column("data")
        self._rows = {key: row for row, key in enumerate(table.column("id").to_pylist())}

    @classmethod
    def open(cls, directory: str | Path, vocab_size: int | None = None) -> "TargetStore":
        """Reads and checks a cache. Ids at or above `vocab_size`, which the student then lacks (padding
        rows of the teacher), get weight 0, and the others make up for it.

        Raises UserError if it is missing, unfinished, damaged or of a format of another version.
        """
        folder = Path(directory).expanduser()
        if folder.is_file() and folder.name in (FILE, MANIFEST):  # a file in it was named
            folder = folder.parent
        manifest = read_manifest(folder)
        path = folder / FILE
        if not path.is_file() or sha256_file(path) != manifest["sha256"]:
            raise UserError(
                f"{path} is missing or has changed since it was captured; delete {folder} and capture again"
            )
        # Read ahead, as is the default, the file would be held twice.
        return cls(folder, manifest, pq.read_table(path, use_threads=False, pre_buffer=False), vocab_size)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, example: Example) -> bool:
        return example_id(example) in self._rows

    def row(self, example: Example) -> int:
        """The row of the file that holds an example. Raises UserError if none does."""
        row = self._rows.get(example_id(example))
        if row is None:
            raise UserError(
                f"{self.directory} has no targets for this example: it was captured from other data "
                f"({self.manifest['data']['path']}), or with another train_on, chat template or tokenizer; "
                "run `distillax capture` on the data that is read here"
            )
        return row

    def lookup(self, example: Example) -> dict[str, np.ndarray]:
        """The targets of an example of m + 1 tokens (not cut), for its m shifted positions, or for as many
        as were captured (`manifest["max_target_length"]`) if that is less; zeros where no loss is.

        target_ids int32[m, slots]; target_weights float32[m, slots], probabilities at its temperature;
        teacher_nll float32[m], nats, of the token that follows, at temperature 1; and, if sampled,
        teacher_entropy float32[m], nats, at the cache's temperature. A repeated id counts with the sum
        of its weights. Where loss is, NaN in teacher_nll means that it isn't known.

        Raises UserError if the cache does not hold the example.
        """
        row = self.row(example)
        mask = np.asarray(example.loss_mask[1 : self.manifest["max_target_length"] + 1], bool)
        at = np.flatnonzero(mask)
        try:
            encoded = self._layout.decode(self._data[row].as_buffer(), len(at))
        except ValueError:
            raise UserError(
                f"{self.directory / FILE}, row {row} is damaged; delete the folder and capture again"
            ) from None
        return self._spread(encoded, at, len(mask))

    def _spread(self, encoded: Encoded, at: np.ndarray, length: int) -> dict[str, np.ndarray]:
        counts, ids, codes, numbers = encoded
        sampled = self.format == "sampled"
        if sampled:
            ids, weights = _side_by_side(counts, ids, _sampled_weights(counts, codes), self.slots)
        else:
            ids, codes = ids.reshape(-1, self.k), codes.reshape(-1, self.k)
            weights = _head_probabilities(ids, codes, numbers[:, 2])
        if self._limit is not None:
            ids, weights = _without(ids, weights, self._limit)
        found = {"target_ids": ids, "target_weights": weights, "teacher_nll": numbers[:, 1]}
        if sampled:
            found["teacher_entropy"] = numbers[:, 2]
        return {name: _scatter(values, at, length) for name, values in found.items()}

    def check(
        self,
        *,
        tokenizer_fingerprint: str,
        temperature: float,
        teacher_identity: Sequence[Any] | None = None,
        max_target_length: int | None = None,
    ) -> None:
        """Raises UserError, naming what to change, if the cache does not fit a training run."""
        kept, here = self.manifest, self.directory
        if kept["tokenizer"] != tokenizer_fingerprint:
            raise UserError(
                f"{here} was captured with the tokenizer of {kept['teacher']}, which is not the student's; "
                "cached targets need a student with the same tokenizer"
            )
        if kept["temperature"] != temperature:
            raise UserError(
                f"{here} was captured at temperature {kept['temperature']:g}, not {temperature:g}; set "
                f"distill_temperature={kept['temperature']:g}, or capture with --temperature {temperature:g}"
            )
        theirs = kept["teacher_identity"] if kept.get("engine") != "server" else None  # it does not say
        if teacher_identity and theirs and theirs != json.loads(json.dumps(teacher_identity)):
            raise UserError(
                f"{here} was captured from other weights than those of the teacher named now "
                f"({kept['teacher']} then); capture again, or leave the teacher out"
            )
        if max_target_length is not None and max_target_length > kept["max_target_length"]:
            longest = kept["counts"]["longest"]
            if longest > kept["max_target_length"]:
                raise UserError(
                    f"{here} holds the first {kept['max_target_length']} targets of each example, and some "
                    f"are longer; set max_target_length={kept['max_target_length']}, or capture with more"
                )


def _without(ids: np.ndarray, weights: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids below `limit` alone: probabilities given that no other happens."""
    kept = ids < limit
    tail = np.maximum(np.float32(1) - weights.sum(1, keepdims=True), np.float32(0))
    # Not 1 less what is lost: next to nothing may be left, and rounding would make that nothing.
    share = np.where(kept, weights, np.float32(0)).sum(1, keepdims=True) + tail
    share = np.maximum(share, np.finfo(np.float32).tiny)
    return np.where(kept, ids, 0), np.where(kept, weights / share, np.float32(0))


def _side_by_side(
    counts: np.ndarray, ids: np.ndarray, weights: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """[m] of all positions -> [n, slots]. Slots left over repeat an id of their position, and weigh 0."""
    filled = np.arange(slots) < counts[:, None]
    wide = np.repeat(ids[counts.cumsum() - counts], slots).reshape(filled.shape)
    wide[filled] = ids
    spread = np.zeros(filled.shape, np.float32)
    spread[filled] = weights
    return wide, spread


def _scatter(values: np.ndarray, at: np.ndarray, length: int) -> np.ndarray:
    spread = np.zeros((length, *values.shape[1:]), values.dtype)
    spread[at] = values
    return spread


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache. Raises UserError if it is missing, damaged or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = (folder / f"{FILE}.shards").is_dir()  # it has a manifest of its own
        inside = sorted(found.parent.name for found in folder.glob(f"*/{MANIFEST}"))
        if inside and not unfinished:
            raise UserError(f"{folder} has no targets itself; name a folder in it: {', '.join(inside)}")
        what = "an unfinished capture: run the same `distillax capture` again" if unfinished else (
            f"no captured targets: run `distillax capture --output-dir {folder}` first"
        )  # fmt: skip
        raise UserError(f"{folder} has {what}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
        if version == VERSION:
            needed = ("format", "k", "vocab_size", "temperature", "tokenizer", "teacher", "teacher_identity")
            for name in (*needed, "sha256", "max_target_length", "data", "counts"):
                manifest[name]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete {folder} and capture again") from None
    if version != VERSION:
        raise UserError(
            f"{path} is of version {version}, and this distillax reads version {VERSION}; capture again"
        )
    return manifest
