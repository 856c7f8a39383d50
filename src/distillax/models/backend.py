"""What each backend is fast at. The one place where a backend makes a difference."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp


@functools.cache
def fast_bfloat16() -> bool:
    """Whether bfloat16 products with float32 accumulation are the fast path here."""
    if jax.default_backend() != "cpu":
        return True
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text(encoding="ascii", errors="ignore")


def compute_dtype(wanted: str) -> str:
    """Resolves "auto": bfloat16 where it is fast, else float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if fast_bfloat16() else "float32"


def loss_chunk_tokens() -> int:
    """Tokens whose logits are held at once by the chunked loss."""
    return 512 if jax.default_backend() == "cpu" else 4096


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum with float32 accumulation and output; float32 operands are never rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    z = jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # XLA would turn a transposed product into one of transposed operands, for which its CPU
        # backend has no bfloat16 kernel ("Unsupported element type for DotThunk").
        z = jax.lax.optimization_barrier(z)
    return z


def transposed(x: jax.Array) -> jax.Array:
    """x.T of a matrix, for the left side of products. On CPU it is laid out anew: a product with a
    transposed left operand leaves the fast path there, and XLA would fold a plain transpose into it."""
    return jax.lax.optimization_barrier(x.T) if jax.default_backend() == "cpu" else x.T
