"""What the benchmarks share: real prompts, the real model, memory that glibc keeps, and ratios."""

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
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


def pairs() -> list[tuple[str, str]]:
    """First question and answer of every conversation of the chatterbot corpus."""
    return [(turns[0], turns[1]) for turns in conversations()]


def conversations() -> list[list[str]]:
    """The turns of every conversation of the chatterbot corpus that has more than one."""
    import parts
    import yaml

    found = []
    for file in parts.chatterbot_yaml():
        talks = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        found += [[str(turn) for turn in turns] for turns in talks if len(turns) > 1]
    return found


def smollm2() -> tuple[Path, Any]:
    """SmolLM2-135M-Instruct as a bfloat16 Hugging Face folder, and its tokenizer."""
    import parts

    from distillax.checkpoints.convert import to_hf
    from distillax.checkpoints.source import find_tokenizer

    folder = REPO / ".cache" / "bench" / "smollm2"
    if not folder.exists():
        to_hf(parts.smollm2_gguf(), folder, dtype="bfloat16")
    return folder, find_tokenizer(folder)


def cut(teacher: Path, keep: Sequence[int] | None = None) -> Path:
    """The folder of a teacher's cut to these layers, or to 12 as `distillax prune` chooses them."""
    from distillax.checkpoints.prune import layers_to_keep, prune
    from distillax.checkpoints.source import find

    kept = list(keep or layers_to_keep(find(teacher).config.layers, 12))
    student = teacher.parent / f"student-{'-'.join(map(str, kept))}"
    if not student.exists():
        prune(teacher, student, keep=kept)
    return student


def peer_environment(name: str) -> Path:
    """The Python of a peer's own environment, made at its first use from benchmarks/NAME.txt."""
    folder = REPO / f".venv-{name}"
    done = folder / ".done"
    if not done.exists():
        subprocess.run([PYTHON, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--quiet"]
        subprocess.run([*pip, "-r", REPO / "requirements" / "build.txt"], check=True)
        subprocess.run([*pip, "-r", REPO / "requirements" / "torch.txt"], check=True)
        subprocess.run([*pip, "-r", REPO / "benchmarks" / f"{name}.txt"], check=True)
        done.touch()
    return folder / "bin" / "python"


def run_measured(command: list[str]) -> float:
    """Runs a command to its end; its peak resident memory in GB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return usage.ru_maxrss * 1024 / 1e9


def train(recipe: str, name: str, skip: int, **keys: object) -> dict[str, float]:
    """`distillax train` in a process of its own: loss-bearing tokens/s, the median over the steps after
    the first `skip`, and peak resident memory."""
    runs = REPO / ".cache" / "bench" / "runs"
    shutil.rmtree(runs / name, ignore_errors=True)
    keys |= {
        "run_name": name,
        "base_output_directory": runs,
        "remat_policy": "none",
        "dtype": "bfloat16",
        "learning_rate": "5e-4",
    }
    words = [PYTHON, "-m", "distillax", "train", REPO / "recipes" / recipe]
    peak = run_measured([*map(str, words), *(f"{key}={value}" for key, value in keys.items())])
    lines = (runs / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [json.loads(line)["tokens_per_second"] for line in lines]
    return {"tokens_per_second": statistics.median(speeds[skip:]), "peak_gb": peak}


def forget_peak() -> None:
    """Gives back what is free, and begins to measure this process's peak anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(name: str) -> int:
    """Bytes of memory that this process has (VmRSS), or had at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def report(name: str, figures: dict[str, object]) -> None:
    """One line of JSON a benchmark: for people to read and for programs to collect."""
    print(json.dumps({"benchmark": name, **figures}), flush=True)
