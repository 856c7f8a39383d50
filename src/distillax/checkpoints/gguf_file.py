"""The GGUF container: metadata and where each tensor's bytes lie.

Read here rather than by `gguf.GGUFReader`, which makes numpy views of every string: seven seconds and 700 MB
for a vocabulary of 262,144. De-quantisation itself is the gguf library's.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from distillax.errors import UserError

_SCALARS = {kind: f"<{code}" for kind, code in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)}
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
_CHUNK = 1 << 22  # values de-quantised at a time


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape (outermost axis first), type and byte range in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A parsed GGUF header; the tensors stay on disk."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return self.require("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, where `{arch}` stands for the file's architecture."""
        if "{arch}" in key:
            key = key.replace("{arch}", self.architecture)
        return self.metadata.get(key, default)

    def require(self, key: str) -> Any:
        """As `get`, but an absent key raises UserError."""
        value = self.get(key)
        if value is None:
            name = key.replace("{arch}", str(self.metadata.get("general.architecture")))
            raise UserError(f"{self.path} has no metadata key {name}; convert the model to GGUF again.")
        return value

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or those `rows` of its first axis, de-quantised: float32, outermost axis first, freshly
        read from the file."""
        info = self.tensors[name]
        if len(info.shape) == 1:
            return self._read(name, 0, 1, info)[0, rows]
        first, last, _ = rows.indices(info.shape[0])
        each = math.prod(info.shape[1:-1])
        values = self._read(name, first * each, last * each, info)
        return values.reshape(last - first, *info.shape[1:])

    def _read(self, name: str, first: int, last: int, info: TensorInfo) -> np.ndarray:
        """float32[last - first, innermost axis]; the blocks of quantisation never cross that axis."""
        width = info.shape[-1]
        values = np.empty((last - first, width), np.float32)
        row_bytes = info.nbytes // math.prod(info.shape[:-1])
        step = max(1, _CHUNK // width)  # in pieces: de-quantising needs several times its result
        for start in range(0, len(values), step):
            some = values[start : start + step]
            at = info.offset + (first + start) * row_bytes
            raw = np.fromfile(self.path, np.uint8, len(some) * row_bytes, offset=at)
            try:
                some[:] = dequantize(raw.reshape(len(some), row_bytes), info.kind)
            except NotImplementedError:
                raise UserError(
                    f"{self.path}: tensor {name} is stored as {info.kind.name}, which cannot be read; "
                    "convert the model to a common type such as F16, BF16, Q8_0 or Q4_K."
                ) from None
        return values


class _Cursor:
    """Reads little-endian values one after another from a buffer."""

    def __init__(self, buffer: mmap.mmap):
        self.buffer, self.at = buffer, 0

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.buffer, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self.buffer):
            raise struct.error("a string reaches past the end")
        return self.buffer[start : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        value = self.scalar(_SCALARS[kind])
        return _shortest(value) if kind == _FLOAT32 else value

    def array(self) -> list:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        values = np.frombuffer(self.buffer, np.dtype(_SCALARS[kind]), count, self.at)
        self.at += values.nbytes
        return values.tolist()


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def open_gguf(path: str | Path) -> GGUFFile:
    """Parse the header of a GGUF file (versions 2 and 3, little-endian).

    Raises UserError where the file is missing, is no GGUF, is cut short, or is one part of a split model.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the path of a GGUF file.")
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF.")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            try:
                metadata, tensors = _parse(path, _Cursor(buffer))
            except (struct.error, ValueError, KeyError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{path} is damaged or cut short ({error}); download it again.") from None
    for name, info in tensors.items():
        if info.offset + info.nbytes > size:
            raise UserError(f"{path} is cut short: tensor {name} reaches past its end; download it again.")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise UserError(f"{path} is one of {parts} parts; merge them with llama-gguf-split --merge.")
    return GGUFFile(path, metadata, tensors)


def _parse(path: Path, cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    cursor.at = 4
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise UserError(f"{path} is a big-endian or unknown version of GGUF; convert the model to version 3.")
    tensor_count, key_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    entries: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        if name in entries:
            raise UserError(f"{path} holds the tensor {name} twice; convert the model to GGUF again.")
        # GGUF lists the innermost axis first.
        shape = tuple(cursor.scalar("<Q") for _ in range(cursor.scalar("<I")))[::-1]
        entries[name] = shape, GGMLQuantizationType(cursor.scalar("<I")), cursor.scalar("<Q")
    alignment = metadata.get("general.alignment") or 32
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in entries.items():
        block, block_bytes = GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
        tensors[name] = TensorInfo(shape, kind, start + offset, nbytes)
    return metadata, tensors
