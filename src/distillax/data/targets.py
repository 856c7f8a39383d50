"""A teacher's targets for a data set: a few token ids a position with their probabilities, packed in bits.

`distillax capture` writes them, `TargetStore` reads them. docs/cached.md gives the format byte by byte.

Shapes: n positions of an example (those that bear loss), k ids of a position, V vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distillax.data.chat import Example
from distillax.data.shards import sha256_file
from distillax.errors import UserError

Format = Literal["sampled", "topk"]

VERSION = 1
FILE, MANIFEST = "targets.parquet", "manifest.json"
ID_BYTES = 16
HALVES = 3  # float16 numbers of a position, before the bits: log-sum-exp, NLL, entropy or log of the tail
HALF_BYTES = 2 * HALVES
WEIGHT_BITS, CODE_BITS = 10, 7
_WEIGHT_STEPS = 2**WEIGHT_BITS - 1
_CODE_STEPS = 2**CODE_BITS - 1
_LOG_RANGE = 20.0  # nats below the likeliest id at which a probability of the top k is cut off


@dataclass(frozen=True)
class Layout:
    """How a position's k ids and their codes become `record_bits` bits, most significant first.

    The ids, ascending, repeats allowed, are Elias-Fano coded: the low bits of each as they are, then
    the high bits in unary, a 1 for each id after as many 0s as its high part has grown. The codes follow.
    """

    format: Format
    k: int
    vocab_size: int

    @property
    def low_bits(self) -> int:
        """The number of low bits that makes the ids shortest."""
        return min(range(self.vocab_size.bit_length()), key=lambda low: (self._id_bits(low), low))

    @property
    def unary_bits(self) -> int:
        return self.k + ((self.vocab_size - 1) >> self.low_bits)

    @property
    def code_bits(self) -> int:
        return WEIGHT_BITS if self.format == "sampled" else CODE_BITS

    @property
    def record_bits(self) -> int:
        return self._id_bits(self.low_bits) + self.k * self.code_bits

    def _id_bits(self, low: int) -> int:
        return self.k * (1 + low) + ((self.vocab_size - 1) >> low)

    def size(self, positions: int) -> int:
        """Bytes that an example of so many positions takes."""
        return HALF_BYTES * positions + -(-positions * self.record_bits // 8)

    def encode(self, ids: np.ndarray, codes: np.ndarray, halves: np.ndarray) -> bytes:
        """One example. `ids` int[n, k], ascending in [0, V); `codes` int[n, k]; `halves` float[n, 3]."""
        n, low = len(ids), self.low_bits
        bits = np.zeros((n, self.record_bits), np.uint8)
        unary = self.k * low + (ids >> low) + np.arange(self.k)
        np.put_along_axis(bits, unary, 1, 1)
        bits[:, : self.k * low] = _to_bits(ids, low)
        bits[:, self.record_bits - self.k * self.code_bits :] = _to_bits(codes, self.code_bits)
        return halves.astype("<f2").tobytes() + np.packbits(bits).tobytes()

    def decode(self, data: Any, positions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `encode` was given: ids int32[n, k], codes int32[n, k], halves float32[n, 3]."""
        k, low = self.k, self.low_bits
        halves = np.frombuffer(data, "<f2", HALVES * positions).reshape(positions, HALVES)
        packed = np.frombuffer(data, np.uint8, offset=HALF_BYTES * positions)
        bits = np.unpackbits(packed, count=positions * self.record_bits).reshape(positions, self.record_bits)
        unary = bits[:, k * low : k * low + self.unary_bits]
        ones = np.flatnonzero(unary).reshape(positions, k) % self.unary_bits
        high = (ones - np.arange(k)).astype(np.int32)
        codes = _from_bits(bits[:, self.record_bits - k * self.code_bits :], self.code_bits)
        ids = (high << low) | _from_bits(bits[:, : k * low], low)
        return ids.reshape(positions, k), codes.reshape(positions, k), halves.astype(np.float32)


def _to_bits(values: np.ndarray, width: int) -> np.ndarray:
    """int[n, k] -> uint8[n, k * width] of bits."""
    raw = values.astype(">u4")[..., None].view(np.uint8)
    return np.unpackbits(raw, axis=-1)[..., 32 - width :].reshape(len(values), -1)


def _from_bits(bits: np.ndarray, width: int) -> np.ndarray:
    """uint8[n, k * width] of bits -> int32[n, k]."""
    if not width:
        return np.zeros((len(bits), 1), np.int32)
    size, kind = (16, ">u2") if width <= 16 else (32, ">u4")
    wide = np.zeros((len(bits), bits.shape[1] // width, size), np.uint8)
    wide[..., size - width :] = bits.reshape(*wide.shape[:2], width)
    return np.packbits(wide, axis=-1).view(kind)[..., 0].astype(np.int32)


def round_weights(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """int64[n, k] in [0, 1023], each row summing to 1023, with E[code / 1023] = weight / sum(weights).

    `weights` float[n, k], not negative; `u` float32[n], uniform in [0, 1): the running sums are rounded at
    1023 S + u, so what one code loses, its neighbour has.
    """
    sums = np.cumsum(weights, 1, dtype=np.float64)
    sums /= sums[:, -1:]
    steps = np.floor(_WEIGHT_STEPS * sums + u[:, None].astype(np.float64))
    return np.diff(steps, axis=1, prepend=0.0).astype(np.int64)


def round_log_ratios(log_ratios: np.ndarray) -> np.ndarray:
    """Codes int64 in [0, 127] of log(p / largest p), in nats, at most 0: -20 (code / 127)^2."""
    share = np.clip(-np.asarray(log_ratios, np.float64) / _LOG_RANGE, 0.0, 1.0)
    return np.rint(_CODE_STEPS * np.sqrt(share)).astype(np.int64)


def _sampled_weights(codes: np.ndarray) -> np.ndarray:
    return codes.astype(np.float32) / np.float32(_WEIGHT_STEPS)


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

    `manifest` is what manifest.json says; `k` ids a position; `format` "sampled" (unbiased weights that
    sum to 1) or "topk" (probabilities of the k likeliest ids, which sum to 1 - tail).
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], table: pa.Table, vocab_size: int | None):
        self.directory, self.manifest = directory, manifest
        self.format: Format = manifest["format"]
        self.k: int = manifest["k"]
        self._layout = Layout(self.format, self.k, manifest["vocab_size"])
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

        target_ids int32[m, k]; target_weights float32[m, k], probabilities at the cache's temperature;
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
        data = self._data[row].as_buffer()
        if data.size != self._layout.size(len(at)):
            raise UserError(
                f"{self.directory / FILE}, row {row} is damaged; delete the folder and capture again"
            )
        ids, codes, halves = self._layout.decode(data, len(at))
        return self._spread(ids, codes, halves, at, len(mask))

    def _spread(
        self, ids: np.ndarray, codes: np.ndarray, halves: np.ndarray, at: np.ndarray, length: int
    ) -> dict[str, np.ndarray]:
        sampled = self.format == "sampled"
        weights = _sampled_weights(codes) if sampled else _head_probabilities(ids, codes, halves[:, 2])
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
