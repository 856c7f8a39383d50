"""TRL's SFTTrainer on a JSONL of {prompt, completion}, in its own environment: prints JSON.

    python benchmarks/peer_trl.py MODEL DATA.jsonl STEPS SKIP BATCH LENGTH

bfloat16 autocast over float32 weights, TRL's packing, loss on completions, no gradient
checkpointing (faster for it), AdamW.
"""

import sys

import peer_trainer
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main(model_path: str, data: str, steps: int, skip: int, batch: int, length: int) -> None:
    peer_trainer.prepare()
    options = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "max_length": length,
        "packing": True,
        "completion_only_loss": True,
    }
    peer_trainer.train(
        SFTTrainer,
        SFTConfig,
        options,
        skip,
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model_path),
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7]))
