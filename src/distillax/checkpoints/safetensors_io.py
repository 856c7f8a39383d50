"""Reading and writing safetensors one tensor at a time.

The safetensors library maps whole files and writes whole dictionaries. To convert a model that is
larger than memory, tensors are read with plain reads (mapped pages would count as ours) and are
written at their place in a file whose header is known beforehand. The format: eight bytes of
header length, a JSON header, then the data.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from distillax.errors import UserError

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` in bytes from the start of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file. Raises UserError if it is not a whole safetensors file."""
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            size = os.fstat(handle.fileno()).st_size
            if length + 8 > size:
                raise ValueError("header longer than the file")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        infos = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            info = TensorInfo(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin)
            if end - begin != info.nbytes or 8 + length + end > size:
                raise ValueError(f"tensor {name} does not fit its bytes")
            infos[name] = info
        return infos
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a complete safetensors file ({error}); download it again") from None


def read_tensor(info: TensorInfo, rows: slice = slice(None)) -> np.ndarray:
    """One tensor, or those `rows` of its first axis, in memory of its own."""
    first, shape = 0, info.shape
    if shape:
        first, last, _ = rows.indices(shape[0])
        shape = (last - first, *shape[1:])
    array = np.empty(shape, info.dtype)
    row_bytes = info.nbytes // info.shape[0] if first else 0
    with open(info.file, "rb", buffering=0) as handle:
        handle.seek(info.offset + first * row_bytes)
        view = array.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            count = handle.readinto(view[done:])
            if not count:
                raise UserError(f"{info.file} ends too early; download it again")
            done += count
    return array


class Writer:
    """Writes tensors of known names, shapes and dtypes, in any order, each once.

    Files follow the Hugging Face convention: model.safetensors, or numbered ones of at most
    `max_bytes` and an index.
    """

    def __init__(
        self, folder: Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], max_bytes: int
    ):
        self._handles: dict[Path, int] = {}
        self._infos: dict[str, TensorInfo] = {}
        groups: list[dict[str, TensorInfo]] = [{}]
        size = 0
        for name, shape, dtype in tensors:
            info = TensorInfo(folder, np.dtype(dtype), tuple(shape), 0)
            if groups[-1] and size + info.nbytes > max_bytes:
                groups.append({})
                size = 0
            groups[-1][name] = info
            size += info.nbytes
        for number, group in enumerate(groups, 1):
            many = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self._create(folder / ("model.safetensors" if len(groups) == 1 else many), group)
        if len(groups) > 1:
            total = sum(info.nbytes for info in self._infos.values())
            weight_map = {name: info.file.name for name, info in self._infos.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        self._missing = set(self._infos)

    def _create(self, file: Path, group: dict[str, TensorInfo]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name, info in group.items():
            end = begin + info.nbytes
            header[name] = {"dtype": _NAMES[info.dtype], "shape": info.shape, "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(handle, len(text).to_bytes(8, "little") + text)
        os.ftruncate(handle, 8 + len(text) + begin)
        self._handles[file] = handle
        offset = 8 + len(text)
        for name, info in group.items():
            self._infos[name] = TensorInfo(file, info.dtype, info.shape, offset)
            offset += info.nbytes

    def write(self, name: str, array: np.ndarray) -> None:
        info = self._infos[name]
        if array.shape != info.shape or array.dtype != info.dtype or name not in self._missing:
            raise ValueError(f"tensor {name}: {array.dtype}{array.shape} does not match its declaration")
        handle = self._handles[info.file]
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            done += os.pwrite(handle, view[done:], info.offset + done)
        self._missing.discard(name)

    def close(self) -> None:
        """Flushes to disk. Raises ValueError if a declared tensor was never written."""
        for handle in self._handles.values():
            os.fsync(handle)
            os.close(handle)
        self._handles = {}
        if self._missing:
            raise ValueError(f"tensors never written: {sorted(self._missing)[:5]}")
