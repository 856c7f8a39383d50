"""TRL's GKDTrainer on a JSONL of {input_ids, completion_mask, prompt}, in its own environment: prints JSON.

    python benchmarks/peer_trl_online.py STUDENT TEACHER DATA.jsonl STEPS SKIP BATCH MICROBATCHES LENGTH

lmbda=0 trains on the data's own answers, and beta=0 is the forward KL (its loss takes temperature 1
whatever the config says). bfloat16 autocast over float32 weights, teacher in bfloat16, no gradient
checkpointing (faster for it), fused AdamW, rows padded to the longest of their batch.
"""

import ctypes
import json
import resource
import statistics
import sys
import tempfile
import time

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


def main(student: str, teacher: str, data: str, *numbers: int) -> None:
    steps, skip, batch, microbatches, length = numbers
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 30)  # keep freed memory, which is worth 30-55% to torch
    libc.mallopt(-1, (1 << 31) - 1)
    torch.set_num_threads(2)
    speeds: list[float] = []
    state = {"tokens": 0, "clock": 0.0}

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            state["clock"] = state["clock"] or time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            now = time.perf_counter()
            speeds.append(state["tokens"] / (now - state["clock"]))
            state["clock"], state["tokens"] = now, 0

    class Counting(GKDTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            state["tokens"] += int((inputs["labels"][:, 1:] != -100).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    def model(path: str, dtype: torch.dtype):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    arguments = GKDConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=microbatches,
        max_length=length,
        lmbda=0.0,
        beta=0.0,
        learning_rate=5e-4,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    trainer = Counting(
        model=model(student, torch.float32),
        teacher_model=model(teacher, torch.bfloat16),
        args=arguments,
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(student),
        callbacks=[Clock()],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_second": statistics.median(speeds[skip:]), "peak_gb": peak / 1e9}))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:9]))
