"""What each backend is fast at. The one place where a backend makes a difference."""

import functools
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from distillax.errors import UserError

_CPU_INFO = Path("/proc/cpuinfo")
_TILE = 32  # rows that `transposed` turns at once
_LARGE = 1 << 24  # a matrix of which it makes no second copy
_LOSS_CHUNK = 1 << 27  # logits of a chunk on a TPU; GPUs have more memory
# TPUs scatter a sum only if its rows are a multiple of so many: of 151,936 they send all to all.
SCATTERED_ROWS = 512
_TARGET: ContextVar[str] = ContextVar("target", default="")


def platform() -> str:
    """What programs are made for: "cpu", "gpu" or "tpu"."""
    return _TARGET.get() or jax.default_backend()


@contextmanager
def compile_for(platform: str) -> Iterator[None]:
    """Programs traced in here are for another platform than this one."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def from_jax(module: str, name: str) -> Any:
    """Something of JAX that is not of its public interface, and so may be elsewhere in another version.
    Raises UserError if it is."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UserError(
            f"jax {jax.__version__} has no {module}.{name}; install an older one, or a newer distillax"
        ) from None


def fast_bfloat16() -> bool:
    """Whether bfloat16 products with float32 accumulation are the fast path here."""
    if platform() == "gpu":
        return _gpu_capability() is None or nvidia_is_ampere()
    return platform() != "cpu" or _cpu_has_bfloat16()


def nvidia_is_ampere() -> bool:
    """Whether this is an NVIDIA GPU of that generation, the first with bfloat16, or a later one."""
    return (_gpu_capability() or (0, 0)) >= (8, 0)


def _gpu_capability() -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; other makers have none like it."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.devices()[0], "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else None


@functools.cache
def _cpu_has_bfloat16() -> bool:
    known = _CPU_INFO.is_file()
    return known and "avx512_bf16" in _CPU_INFO.read_text(encoding="ascii", errors="ignore")


def compute_dtype(wanted: str) -> str:
    """Resolves "auto": bfloat16 where it is fast, else float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if fast_bfloat16() else "float32"


def stream_dtype(dtype: Any) -> Any:
    """What the results of products in `dtype`, and the residual stream between layers, are rounded to.
    Accelerators have no more to spare: half as many bytes leave room for twice the batch."""
    return jnp.float32 if platform() == "cpu" else dtype


def scattered_at_once(kind: str) -> int:
    """Over how many devices of this kind a sum is scattered at once. Over more, TPUs may send all of it to
    all, by how they lie: over 8 of a v4 or v5p, whose links go three ways, over 16 of a v5e or v6e."""
    if platform() != "tpu":
        return sys.maxsize
    return 8 if re.search(r"lite|\de$", kind) else 4


def loss_chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits are held at once by the chunked loss: a few arrays of as many float32."""
    if platform() == "cpu":
        return 256
    room = _LOSS_CHUNK * (2 if platform() == "gpu" else 1)
    return min(4096, max(256, 1 << ((room // vocabulary).bit_length() - 1)))


def unrolled(microbatches: int) -> int:
    """How many microbatches follow each other without a loop. Two do on accelerators: a loop of two would
    hold 8% more (Qwen3-32B to Qwen3-8B on a v6e-8, two of two rows). On a CPU a program is compiled sooner
    if the model is in it once."""
    return 2 if microbatches == 2 and platform() != "cpu" else 1


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum with float32 accumulation and output; float32 operands are never rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    z = jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)
    if x.dtype == jnp.bfloat16 and platform() == "cpu":
        # XLA would turn a transposed product into one of transposed operands, for which its CPU
        # backend has no bfloat16 kernel ("Unsupported element type for DotThunk").
        z = jax.lax.optimization_barrier(z)
    return z


def transposed(x_MN: jax.Array) -> jax.Array:
    """x.T of a matrix, for the left side of products. On CPU it is laid out anew: a bfloat16 product with
    a left operand that is transposed in name only is computed in float32 there, at half the speed."""
    if not copies_transposed():
        return x_MN.T
    rows, columns = x_MN.shape
    if rows % _TILE or x_MN.size > _LARGE:
        return _laid_out(x_MN.T, 0, 1)
    # In two passes, each with short runs of what lies together: twice as fast as one that jumps all the way.
    tiles = _laid_out(x_MN.reshape(rows // _TILE, _TILE, columns).transpose(0, 2, 1), 0, 1, 2)
    return _laid_out(tiles.transpose(1, 0, 2), 0, 1, 2).reshape(columns, rows)


def _laid_out(x: jax.Array, *axes: int) -> jax.Array:
    """x with its axes in this order in memory."""
    module = "jax.experimental.layout"
    return from_jax(module, "with_layout_constraint")(x, from_jax(module, "Layout")(axes))


def copies_transposed() -> bool:
    """Whether `transposed` makes a copy: better once than at every turn of a loop."""
    return platform() == "cpu"


def converted(weight: jax.Array, dtype: Any) -> jax.Array:
    """A layer's weight in `dtype`. On TPUs XLA would convert the stack of all layers before the loop,
    and keep that until the step ends; it does not where the weight is rounded, to the same number, first."""
    to = jnp.finfo(dtype)
    if platform() == "tpu" and to.bits < jnp.finfo(weight.dtype).bits:
        weight = jax.lax.reduce_precision(weight, exponent_bits=to.nexp, mantissa_bits=to.nmant)
    return weight.astype(dtype)


def packed(x: jax.Array) -> jax.Array:
    """What to keep of x where a loop takes slices of it: XLA's CPU backend turns a whole stack of bfloat16
    into float32 before it slices it, at every call, but leaves 16-bit integers alone."""
    narrow = x.dtype == jnp.bfloat16 and platform() == "cpu"
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if narrow else x


def unpacked(x: jax.Array) -> jax.Array:
    """The inverse of `packed`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
