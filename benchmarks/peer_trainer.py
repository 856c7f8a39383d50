"""What the peers that run in TRL's environment share: memory that glibc keeps, and a clock of loss tokens."""

import ctypes
import json
import resource
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import TrainerCallback

# What both trainers are given: bfloat16 autocast over float32 weights, and nothing but training.
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "bf16": True,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}


def prepare() -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 30)  # keep freed memory, which makes torch's short steps faster
    libc.mallopt(-1, (1 << 31) - 1)
    torch.set_num_threads(2)


class Clock(TrainerCallback):
    """Loss-bearing tokens per second of each step. `count` is called with every microbatch."""

    def __init__(self) -> None:
        self.speeds: list[float] = []
        self._tokens, self._last = 0, 0.0

    def count(self, labels: torch.Tensor) -> None:
        self._tokens += int((labels[:, 1:] != -100).sum())

    def on_step_begin(self, *args, **kwargs):
        self._last = self._last or time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter()
        self.speeds.append(self._tokens / (now - self._last))
        self._last, self._tokens = now, 0

    def report(self, skip: int) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"tokens_per_second": statistics.median(self.speeds[skip:]), "peak_gb": peak / 1e9}))


def train(trainer: type[Any], arguments: type[Any], options: dict[str, Any], skip: int, **parts: Any) -> None:
    """Trains with a trainer class of TRL, and prints its speed and memory as JSON."""
    clock = Clock()

    class Counting(trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            clock.count(inputs["labels"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    configured = arguments(output_dir=tempfile.mkdtemp(), **ARGUMENTS, **options)
    Counting(args=configured, callbacks=[clock], **parts).train()
    clock.report(skip)
