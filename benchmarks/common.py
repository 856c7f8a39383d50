"""What the benchmarks share: real prompts, the real model, memory that glibc keeps, and ratios."""

import ctypes
import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "tests"), str(REPO / "tools")]


def keep_freed_memory() -> None:
    """glibc returns large blocks to the kernel when they are freed, and every step faults them in
    again. Keeping them makes torch's short steps 30-55% faster, so every peer gets it."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def prompts(number: int) -> list[str]:
    """Questions of the chatterbot corpus, each once, in a fixed order."""
    from demo_parts import package_folder, questions

    return sorted(questions(package_folder("chatterbot_corpus") / "data" / "english"))[:number]


def report(name: str, figures: dict[str, object]) -> None:
    """One line of JSON a benchmark: for people to read and for programs to collect."""
    print(json.dumps({"benchmark": name, **figures}), flush=True)
