"""All short benchmarks, one after the other: `make bench`. Of the others, quality.py, prune.py and draws.py
take long, plan_naive.py and plan_maxtext.py compile for TPUs, and gpu.py wants a GPU."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = (
    "generation.py",
    "vllm_overhead.py",
    "loss.py",
    "sft.py",
    "online.py",
    "int8.py",
    "share.py",
    "convert_memory.py",
    "plan_memory.py",
    "restore_memory.py",
)


def main() -> int:
    codes = []
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        codes.append(subprocess.run([sys.executable, Path(__file__).with_name(name)]).returncode)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
