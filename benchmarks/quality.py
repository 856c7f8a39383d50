"""What each way of distilling is worth for the same tokens: KL to the teacher on held-out answers.

    python benchmarks/quality.py [SEEDS] [STEPS]

SmolLM2 (30 layers) and its cut to 12, which learns from the teacher's own answers to real questions:
by fine-tuning, by online matching, from a cache of sampled targets, from one of the 64 likeliest ids
with their tail, and, for comparison only, from the 12 likeliest ids made to sum to one, as several
systems do. All see the same batches; a seed is an order of the data and a draw of the sample.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import common
import numpy as np

ROWS, LENGTH, PROMPTS, HELD_OUT, NEW_TOKENS = 4, 256, 450, 64, 96
BIASED_K = 12


class Renormalised:
    """The k likeliest ids as if they were all: a biased target, in the shape of a sampled one."""

    format = "sampled"

    def __init__(self, store: Any):
        self._store, self.k, self.manifest = store, store.k, store.manifest
        self.check = store.check

    def lookup(self, example: Any) -> dict[str, np.ndarray]:
        found = self._store.lookup(example)
        weights = found["target_weights"]
        total = weights.sum(1, keepdims=True)
        found["target_weights"] = np.where(total > 0, weights / np.where(total > 0, total, 1), 0)
        found["teacher_entropy"] = np.zeros(len(weights), np.float32)  # the loss is off by a constant
        return found


def answers(teacher: Path, folder: Path, names: Sequence[str] = ("train", "held_out")) -> list[Path]:
    """The teacher's answers to learn from, and those to measure with, or only those that are named."""
    from distillax.config import GenerateConfig
    from distillax.data.prompts import load_prompts
    from distillax.pipeline import split_prompts
    from distillax.teachers.stage import generate

    questions = folder / "questions.jsonl"
    lines = (json.dumps({"prompt": text}) + "\n" for text in common.prompts(10_000))
    questions.write_text("".join(lines), encoding="utf-8")
    learn, measure = split_prompts(load_prompts(str(questions)), PROMPTS, HELD_OUT)
    prompts = {"train": learn, "held_out": measure}
    settings = GenerateConfig(max_new_tokens=NEW_TOKENS, max_num_seqs=64)
    files = [folder / f"{name}.parquet" for name in names]
    for name, file in zip(names, files, strict=True):
        generate(str(teacher), prompts[name], file, settings, prompt_source={"prompts": "chatterbot-corpus"})
    return files


def capture(teacher: Path, data: Path, output: Path, form: str, k: int, seed: int) -> Path:
    words = ["capture", "--teacher-model", teacher, "--dataset", data, "--output-dir", output]
    words += ["--format", form, "--k", k, "--seed", seed]
    common.run_measured([common.PYTHON, "-m", "distillax", *map(str, words)])
    return output


def main(seeds: int = 3, steps: int = 25) -> None:
    import distillax
    from distillax.checkpoints.prune import prune
    from distillax.config import TrainConfig
    from distillax.data.targets import TargetStore
    from distillax.evaluate import evaluate
    from distillax.settings import load_config
    from distillax.train.loop import train

    teacher, _ = common.smollm2()
    student = teacher.parent / "student"
    if not student.exists():
        prune(teacher, student, layers=12)
    folder = teacher.parent / "quality"
    folder.mkdir(exist_ok=True)
    data, held_out = answers(teacher, folder)
    judge = distillax.load(str(teacher))
    open_store = TargetStore.open

    def one(
        name: str, seed: int, method: str, *, renormalised: bool = False, **keys: Any
    ) -> dict[str, float]:
        runs = folder / "runs"
        shutil.rmtree(runs, ignore_errors=True)
        keys |= {
            "run_name": name,
            "base_output_directory": runs,
            "load_parameters_path": student,
            "hf_path": "parquet",
            "hf_train_files": data,
            "steps": steps,
            "per_device_batch_size": ROWS,
            "max_target_length": LENGTH,
            "learning_rate": 5e-4,
            "remat_policy": "none",
            "data_shuffle_seed": seed,
        }
        words = [f"{key}={value}" for key, value in keys.items()]
        config = load_config(TrainConfig, str(common.REPO / f"recipes/{method}.yml"), words)
        opened = (lambda *a: Renormalised(open_store(*a))) if renormalised else open_store
        with mock.patch.object(TargetStore, "open", opened):
            result = train(config, say=lambda _: None)
        model = distillax.load(str(result.run))
        return evaluate(model, str(held_out), teacher=judge, show_progress=False).as_dict()

    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        caches = {
            "sampled": capture(teacher, data, folder / f"sampled-{seed}", "sampled", 10, seed),
            "topk": capture(teacher, data, folder / "topk", "topk", 64, 0),
            "biased": capture(teacher, data, folder / "topk-12", "topk", BIASED_K, 0),
        }
        ways: dict[str, dict[str, Any]] = {
            "sft": {"method": "sft"},
            "online": {"method": "online", "teacher_load_parameters_path": teacher},
            "cached, sampled": {"method": "cached", "teacher_cache_path": caches["sampled"]},
            "cached, top 64 and tail": {"method": "cached", "teacher_cache_path": caches["topk"]},
            "top 12 renormalised": {
                "method": "cached",
                "teacher_cache_path": caches["biased"],
                "renormalised": True,
            },
        }
        for name, keys in ways.items():
            scores = one(name.replace(", ", "-").replace(" ", "-"), seed, **keys)
            found.setdefault(name, []).append(scores)
            common.report("quality", {"seed": seed, "way": name, **scores})
    mean = {
        name: {key: round(statistics.mean(s[key] for s in scores), 4) for key in scores[0]}
        for name, scores in found.items()
    }
    online = mean["online"]["kl_teacher_student"]
    common.report(
        "quality",
        {
            "seeds": seeds,
            "steps": steps,
            "mean": mean,
            "kl_over_online": {k: round(v["kl_teacher_student"] / online, 3) for k, v in mean.items()},
        },
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
