"""What each backend is fast at. The one place where a backend makes a difference."""

import functools
from pathlib import Path

import jax


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
