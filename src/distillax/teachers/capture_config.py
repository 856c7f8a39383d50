"""How `distillax capture` is to capture: its flags, and which of them go together."""

from dataclasses import dataclass
from typing import Literal

from distillax.config import TrainOn
from distillax.data.targets import DEFAULT_K, Format
from distillax.errors import UserError
from distillax.models.quantize import KINDS


@dataclass(frozen=True)
class CaptureConfig:
    """How to capture; the flags of `distillax capture`. `k` None is 19 sampled ids a position on
    average, or the 64 likeliest.

    Raises UserError for values that make no sense, by themselves or together.
    """

    format: Format = "sampled"
    k: int | None = None
    temperature: float = 1.0
    seed: int = 0
    max_target_length: int = 2048
    train_on: TrainOn | None = None
    enable_thinking: bool | None = None
    dtype: str = "auto"
    teacher_quantization: str = ""
    engine: Literal["embedded", "vllm", "server"] = "embedded"
    teacher_url: tuple[str, ...] = ()
    teacher_name: str | None = None
    tp_size: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float | None = None

    def __post_init__(self) -> None:
        for name, engines in _ENGINES_OF.items():
            if getattr(self, name) not in (None, (), "", "auto") and self.engine not in engines:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} has no effect with --engine {self.engine}; leave it out")
        if self.engine != "embedded" and self.format != "topk":
            raise UserError(
                f"--engine {self.engine} gives the likeliest ids alone, which --format topk can keep and "
                f"--format {self.format} cannot; give --format topk, or --engine embedded"
            )
        if self.engine != "embedded" and self.temperature != 1.0:
            raise UserError(
                f"--temperature {self.temperature:g} needs all of the teacher's logits, which --engine "
                f"{self.engine} does not give; leave it at 1, or give --engine embedded"
            )
        if self.engine == "server" and not self.teacher_url:
            raise UserError("--engine server needs --teacher-url, such as http://localhost:8000/v1")
        if self.teacher_quantization not in KINDS:
            raise UserError(
                f"--teacher-quantization {self.teacher_quantization} is not known; give int8, or leave it out"
            )
        if self.k is not None and self.k < 1:
            raise UserError(f"--k must be at least 1, not {self.k}")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature must be a positive number, not {self.temperature:g}")
        if self.max_target_length < 1:
            raise UserError(f"--max-target-length must be at least 1, not {self.max_target_length}")

    @property
    def ids(self) -> int:
        return self.k or DEFAULT_K[self.format]


# Flags that some engines have no use for: taking them in silence with another would hide a mistake.
_ENGINES_OF = {
    "dtype": ("embedded", "vllm"),
    "teacher_quantization": ("embedded",),
    "teacher_url": ("server",),
    "teacher_name": ("server",),
    "tp_size": ("vllm",),
    "max_model_len": ("vllm",),
    "max_num_seqs": ("vllm", "server"),
    "gpu_memory_utilization": ("vllm",),
}
