"""A teacher's targets for a data set: a few token ids a position with their probabilities, packed in bits.

`distillax capture` writes them, `TargetStore` reads them. docs/cached.md gives the format byte by byte.

Shapes: n positions of an example (those that bear loss), m ids of all of them, V vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distillax.data.chat import Example
from distillax.data.shards import sha256_file
from distillax.errors import UserError

Format = Literal["sampled", "topk"]

VERSION = 2
DEFAULT_K: dict[Format, int] = {"sampled": 14, "topk": 64}
FILE, MANIFEST = "targets.parquet", "manifest.json"
ID_BYTES = 16
COUNT_BYTES = 4  # the number of an example's ids, before all else
HALVES = 3  # float16 numbers of a position, before the bits: log-sum-exp, NLL, entropy or log of the tail
HALF_BYTES = 2 * HALVES
WEIGHT_BITS, CODE_BITS = 10, 7
DRAWN = -1  # the code of an id that was drawn: its weight is its share of what the kept ones leave
SPREAD = 2  # a position has this many times as many sampled ids as the average, at most
_WEIGHT_STEPS = 2**WEIGHT_BITS - 1
_CODE_STEPS = 2**CODE_BITS - 1
_LOG_RANGE = 20.0  # nats below the likeliest id at which a probability of the top k is cut off


class Encoded(NamedTuple):
    """An example's ids and numbers. The ids of a position ascend; repeats are allowed.

    counts: int[n], ids of each position. ids, codes: int[m], those of all positions, one after the other.
    halves: float[n, 3].
    """

    counts: np.ndarray
    ids: np.ndarray
    codes: np.ndarray
    halves: np.ndarray


@dataclass(frozen=True)
class Layout:
    """How an example becomes bits, most significant first.

    With p the place of its position, an id is the number p V + id. These m numbers, which ascend, are
    Elias-Fano coded: the low bits of each as they are, then the high bits in unary, a 1 for each number after
    as many 0s as its high part has grown. `sampled`: a bit for each id, 1 if it was kept, and codes of those.
    """

    format: Format
    k: int
    vocab_size: int

    @property
    def slots(self) -> int:
        """Ids of a position, at most. `k` is the average of sampled ones, and the number of the likeliest."""
        return min(SPREAD * self.k, self.vocab_size) if self.format == "sampled" else self.k

    @property
    def code_bits(self) -> int:
        return WEIGHT_BITS if self.format == "sampled" else CODE_BITS

    def encode(self, example: Encoded) -> bytes:
        """One example, all of whose ids are in [0, V)."""
        counts, ids, codes, halves = example
        n, m = len(counts), len(ids)
        low, zeros = self._split(n, m)
        numbers = np.repeat(np.arange(n, dtype=np.int64), counts) * self.vocab_size + ids
        unary = np.zeros(m + zeros, np.uint8)
        unary[(numbers >> low) + np.arange(m)] = 1
        kept = codes != DRAWN
        flags = kept.astype(np.uint8) if self.format == "sampled" else unary[:0]
        bits = (_to_bits(numbers, low), unary, flags, _to_bits(codes[kept], self.code_bits))
        head = np.array([m], "<u4").tobytes() + halves.astype("<f2").tobytes()
        return head + np.packbits(np.concatenate(bits)).tobytes()

    def decode(self, data: Any, positions: int) -> Encoded:
        """What `encode` was given. Raises ValueError if the data are not of so many positions."""
        n, start = positions, COUNT_BYTES + HALF_BYTES * positions
        m = int(np.frombuffer(data, "<u4", 1)[0])
        if not (n if self.format == "sampled" else n * self.k) <= m <= n * self.slots:
            raise ValueError(f"{m} ids for {n} positions")
        halves = np.frombuffer(data, "<f2", HALVES * n, COUNT_BYTES).reshape(n, HALVES).astype(np.float32)
        bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=start))
        low, zeros = self._split(n, m)
        sampled = self.format == "sampled"
        ends = np.cumsum([m * low, m + zeros, m if sampled else 0])
        lows, unary, flags, rest = np.split(bits, ends)
        kept = flags.astype(bool) if sampled else np.ones(m, bool)
        ones, written = np.flatnonzero(unary), int(kept.sum()) * self.code_bits
        if len(bits) < ends[-1] or len(ones) != m or not written <= len(rest) < written + 8:
            raise ValueError(f"not {m} ids of {n} positions")
        numbers = ((ones - np.arange(m)) << low) | _from_bits(lows, low, m)
        codes = np.full(m, DRAWN, np.int32)
        codes[kept] = _from_bits(rest[:written], self.code_bits, int(kept.sum()))
        counts = np.bincount(numbers // self.vocab_size, minlength=n)
        if len(counts) != n or not (1 if sampled else self.k) <= counts.min() <= counts.max() <= self.slots:
            raise ValueError(f"not {n} positions with {self.slots} ids at most")
        return Encoded(counts, (numbers % self.vocab_size).astype(np.int32), codes, halves)

    def _split(self, n: int, m: int) -> tuple[int, int]:
        """(low bits of a number, zeros in the unary part): as many as make the ids shortest."""
        last = n * self.vocab_size - 1
        low = min(range(self.vocab_size.bit_length() + 1), key=lambda low: (m * low + (last >> low), low))
        return low, last >> low


def _to_bits(values: np.ndarray, width: int) -> np.ndarray:
    """int[n] -> uint8[n * width], the low `width` bits of each."""
    raw = values.astype(">u8")[:, None].view(np.uint8)
    return np.unpackbits(raw, axis=1)[:, 64 - width :].ravel()


def _from_bits(bits: np.ndarray, width: int, number: int) -> np.ndarray:
    """uint8[number * width] of bits -> int32[number]."""
    wide = np.zeros((number, 32), np.uint8)
    wide[:, 32 - width :] = bits.reshape(number, width)
    return np.packbits(wide, axis=1).view(">u4")[:, 0].astype(np.int32)


def round_weights(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """int64[n, k] in [0, 1023] with E[code / 1023] = weight, and all that is missing to 1 in the same way.

    `weights` float[n, k], not negative, with a sum of 1 at most; `u` float32[n], uniform in [0, 1): the
    running sums are rounded at 1023 S + u, so what one code loses, its neighbour has.
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
    at, drawn = np.repeat(np.arange(len(counts)), counts), codes == DRAWN
    kept = np.where(drawn, 0, codes)
    sums, others = (np.bincount(at, x, len(counts)) for x in (kept, drawn))
    share = (_WEIGHT_STEPS - sums) / np.maximum(others, 1)
    whole = np.where(others > 0, _WEIGHT_STEPS, np.maximum(sums, 1))
    return (np.where(drawn, share[at], kept) / whole[at]).astype(np.float32)


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
        ids = table.column("id").to_pylist()
        self._rows = {key: row for row, key in enumerate(ids)}

    @classmethod
    def open(cls, directory: str | Path, vocab_size: int | None = None) -> "TargetStore":
        """Reads and checks a cache. Ids at or above `vocab_size`, which the student then lacks (padding
        rows of the teacher), get weight 0, and the others make up for it.

        Raises UserError if it is missing, unfinished, damaged or of a format of another version.
        """
        folder = Path(directory)
        manifest = _read_manifest(folder)
        path = folder / FILE
        if not path.is_file() or sha256_file(path) != manifest["sha256"]:
            raise UserError(
                f"{path} is missing or has changed since it was captured; delete {folder} and capture again"
            )
        return cls(folder, manifest, pq.read_table(path), vocab_size)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, example: Example) -> bool:
        return example_id(example) in self._rows

    def lookup(self, example: Example) -> dict[str, np.ndarray]:
        """The targets of an example of m + 1 tokens (not cut), for its m shifted positions, or for as many
        as were captured (`manifest["max_target_length"]`) if that is less; zeros where no loss is.

        target_ids int32[m, slots]; target_weights float32[m, slots], probabilities at its temperature;
        teacher_nll float32[m], nats, of the token that follows, at temperature 1; and, if sampled,
        teacher_entropy float32[m], nats, at the cache's temperature. A repeated id counts with the sum
        of its weights. Where loss is, NaN in teacher_nll means that it isn't known.

        Raises UserError if the cache does not hold the example.
        """
        row = self._rows.get(example_id(example))
        if row is None:
            raise UserError(
                f"{self.directory} has no targets for this example: it was captured from other data "
                f"({self.manifest['data']['path']}), or with another train_on, chat template or tokenizer; "
                "run `distillax capture` on the data that is trained on"
            )
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
        counts, ids, codes, halves = encoded
        sampled = self.format == "sampled"
        if sampled:
            ids, weights = _side_by_side(counts, ids, _sampled_weights(counts, codes), self.slots)
        else:
            ids, codes = ids.reshape(-1, self.k), codes.reshape(-1, self.k)
            weights = _head_probabilities(ids, codes, halves[:, 2])
        if self._limit is not None:
            ids, weights = _without(ids, weights, self._limit)
        found = {"target_ids": ids, "target_weights": weights, "teacher_nll": halves[:, 1]}
        if sampled:
            found["teacher_entropy"] = halves[:, 2]
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
        if teacher_identity is not None and kept["teacher_identity"] != json.loads(
            json.dumps(teacher_identity)
        ):
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
    wide = np.repeat(ids[np.cumsum(counts) - counts][:, None], slots, 1)
    wide[filled] = ids
    spread = np.zeros(filled.shape, np.float32)
    spread[filled] = weights
    return wide, spread


def _scatter(values: np.ndarray, at: np.ndarray, length: int) -> np.ndarray:
    spread = np.zeros((length, *values.shape[1:]), values.dtype)
    spread[at] = values
    return spread


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = (folder / f"{FILE}.shards").is_dir()
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
