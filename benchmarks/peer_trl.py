"""TRL's SFTTrainer on a JSONL of {prompt, completion}, in its own environment: prints JSON.

    python benchmarks/peer_trl.py MODEL DATA.jsonl STEPS SKIP BATCH LENGTH

bfloat16 autocast over float32 weights, TRL's packing, loss on completions, no gradient
checkpointing (faster for it), AdamW.
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
from trl import SFTConfig, SFTTrainer


def main(model_path: str, data: str, steps: int, skip: int, batch: int, length: int) -> None:
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

    class Counting(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            state["tokens"] += int((inputs["labels"][:, 1:] != -100).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=batch,
        max_length=length,
        packing=True,
        completion_only_loss=True,
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
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        args=arguments,
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        callbacks=[Clock()],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_second": statistics.median(speeds[skip:]), "peak_gb": peak / 1e9}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7]))
