"""TRL's GKDTrainer on a JSONL of {input_ids, completion_mask, prompt}, in its own environment: prints JSON.

    python benchmarks/peer_trl_online.py STUDENT TEACHER DATA.jsonl STEPS SKIP BATCH MICROBATCHES LENGTH

lmbda=0 trains on the data's own answers, and beta=0 is the forward KL (its loss takes temperature 1
whatever the config says). bfloat16 autocast over float32 weights, teacher in bfloat16, no gradient
checkpointing (faster for it), fused AdamW, rows padded to the longest of their batch.
"""

import sys

import peer_trainer
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer


def main(student: str, teacher: str, data: str, *numbers: int) -> None:
    steps, skip, batch, microbatches, length = numbers
    peer_trainer.prepare()
    options = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": microbatches,
        "max_length": length,
        "lmbda": 0.0,
        "beta": 0.0,
    }
    peer_trainer.train(
        GKDTrainer,
        GKDConfig,
        options,
        skip,
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(student),
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:9]))
