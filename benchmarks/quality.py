"""What each way of distilling is worth for the same tokens: KL to the teacher on held-out answers.

    python benchmarks/quality.py [--seeds 3] [--steps 25] [--rows 4] [--length 256] [--rates 5e-4,1e-3]
                                 [--sft-rates RATES] [--text teacher] [--train-on assistant] [--generations 1]
                                 [--draws 19] [--top 64] [--keep LAYERS] [--jobs 1] [--json FILE]

SmolLM2 (30 layers) and its cut to 12, which learns from the teacher's own answers to real questions, or,
with --text people, from conversations as people wrote them, and is measured on others of the same kind. It
learns by fine-tuning, by online matching, from caches of sampled targets (one for each number of ids in
--draws) and of the likeliest ids with their tail (--top), and, for comparison only, from the 12 likeliest
ids made to sum to one, as several systems do. All see the same batches; a seed is an order of the data and
a draw of the sample. Every way has the learning rate that serves it best of those given, by the KL that is
reported, chosen with the first seed. On a GPU several runs share the device: --jobs 6.

What was measured is kept in .cache/bench/quality/results.jsonl, and not measured again, so that hours of
runs can be stopped and gone on with; delete the file to begin anew.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PROMPTS, HELD_OUT, NEW_TOKENS = 450, 64, 96
DIALOGUES_HELD_OUT = 150
FILES = ("data", "held_out", "cache", "student")  # keys of a row
BIASED_K = 12
BIASED = f"top {BIASED_K} renormalised"


def caches_of(args: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """The format and k of the cache of each way that has one."""
    sampled = {f"cached, sampled {k}": ("sampled", k) for k in args.draws}
    likeliest = {f"cached, top {k} and tail": ("topk", k) for k in args.top}
    return sampled | likeliest | {BIASED: ("topk", BIASED_K)}


def numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",") if word]


class Renormalised:
    """The k likeliest ids as if they were all: a biased target, in the shape of a sampled one."""

    format = "sampled"

    def __init__(self, store: Any):
        self._store, self.k, self.slots, self.manifest = store, store.k, store.slots, store.manifest
        self.check, self.row = store.check, store.row

    def lookup(self, example: Any) -> dict[str, np.ndarray]:
        found = self._store.lookup(example)
        weights = found["target_weights"]
        total = weights.sum(1, keepdims=True)
        found["target_weights"] = np.where(total > 0, weights / np.where(total > 0, total, 1), 0)
        found["teacher_entropy"] = np.zeros(len(weights), np.float32)  # the loss is off by a constant
        return found


def answers(
    teacher: Path, folder: Path, names: Sequence[str] = ("train", "held_out"), generations: int = 1
) -> list[Path]:
    """The teacher's answers to learn from, so many a prompt, and those to measure with, or only those that
    are named. What is there is taken."""
    files = {
        name: folder / (f"{name}.parquet" if name != "train" else f"train-{generations}.parquet")
        for name in names
    }
    if all(file.exists() for file in files.values()):
        return list(files.values())
    from distillax.config import GenerateConfig
    from distillax.data.prompts import load_prompts, split_prompts
    from distillax.teachers.stage import generate

    questions = folder / "questions.jsonl"
    lines = (json.dumps({"prompt": text}) + "\n" for text in common.prompts(10_000))
    questions.write_text("".join(lines), encoding="utf-8")
    learn, measure = split_prompts(load_prompts(str(questions)), PROMPTS, HELD_OUT)
    prompts = {"train": learn, "held_out": measure}
    for name, file in files.items():
        number = generations if name == "train" else 1
        settings = GenerateConfig(max_new_tokens=NEW_TOKENS, max_num_seqs=64, num_generations=number)
        generate(str(teacher), prompts[name], file, settings, prompt_source={"prompts": "chatterbot-corpus"})
    return list(files.values())


def dialogues(folder: Path) -> list[Path]:
    """The different conversations of the chatterbot corpus, to learn from and to measure with."""
    found = {json.dumps(turns[: len(turns) // 2 * 2]): None for turns in common.conversations()}
    rows = [json.loads(turns) for turns in found]
    random.Random(0).shuffle(rows)
    files = [folder / "people.parquet", folder / "people-held-out.parquet"]
    for file, part in zip(files, (rows[DIALOGUES_HELD_OUT:], rows[:DIALOGUES_HELD_OUT]), strict=True):
        talks = [
            [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            for turns in part
        ]
        pq.write_table(pa.table({"messages": talks}), file)
    return files


def models() -> tuple[Path, Path, Path]:
    """Teacher, student, and the folder of data and runs."""
    teacher, _ = common.smollm2()
    folder = teacher.parent / "quality"
    folder.mkdir(exist_ok=True)
    return teacher, common.cut(teacher), folder


def capture(teacher: Path, data: Path, output: Path, train_on: str, form: str, k: int, seed: int) -> None:
    words = ["capture", "--teacher-model", teacher, "--dataset", data, "--output-dir", output]
    words += ["--format", form, "--k", k, "--seed", seed, "--train-on", train_on]
    command = [common.PYTHON, "-m", "distillax", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stderr}")


def environment() -> dict[str, str]:
    """Of a program that shares the accelerator with others: it takes memory as it needs it."""
    return os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def one(row: dict[str, Any]) -> dict[str, Any]:
    """Trains and measures one student, in this process."""
    import jax

    import distillax
    from distillax.config import TrainConfig
    from distillax.data.targets import TargetStore
    from distillax.evaluate import evaluate
    from distillax.settings import load_config
    from distillax.train.loop import train

    teacher, _, folder = models()
    method = "cached" if row["cache"] else row["way"]
    run = f"{row['way'].replace(',', '').replace(' ', '-')}-{row['seed']}-{row['learning_rate']}"
    shutil.rmtree(folder / "runs" / run, ignore_errors=True)
    keys = {
        "run_name": run,
        "base_output_directory": folder / "runs",
        "load_parameters_path": row["student"],
        "hf_path": "parquet",
        "hf_train_files": row["data"],
        "steps": row["steps"],
        "per_device_batch_size": row["rows"],
        "max_target_length": row["length"],
        "learning_rate": row["learning_rate"],
        "remat_policy": "none",
        "data_shuffle_seed": row["seed"],
        "checkpoint_period": row["steps"],
    }
    if method == "online":
        keys["teacher_load_parameters_path"] = teacher
    if row["cache"]:
        keys["teacher_cache_path"] = row["cache"]
    if train_on := row.get("train_on"):
        keys["train_on"] = train_on
    words = [f"{key}={value}" for key, value in keys.items()]
    config = load_config(TrainConfig, str(common.REPO / f"recipes/{method}.yml"), words)
    open_store = TargetStore.open
    opened = (lambda *a: Renormalised(open_store(*a))) if row["way"] == BIASED else open_store
    start = time.monotonic()
    with mock.patch.object(TargetStore, "open", opened):
        result = train(config, say=lambda _: None)
    seconds = time.monotonic() - start
    lines = (result.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    scores = evaluate(
        distillax.load(str(result.run)),
        row.get("held_out") or str(folder / "held_out.parquet"),
        teacher=distillax.load(str(teacher)),
        show_progress=False,
    )
    shutil.rmtree(folder / "runs" / run)
    return {
        "seed": row["seed"],
        "way": row["way"],
        "learning_rate": row["learning_rate"],
        "device": jax.devices()[0].device_kind,
        "loss_tokens": sum(step.get("weight_sum", 0) for step in steps),
        "seconds": round(seconds, 1),
        "step_ms": round(1e3 * statistics.median(step["step_seconds"] for step in steps[1:] or steps), 2),
        **scores.as_dict(),
    }


def in_a_process(row: dict[str, Any]) -> dict[str, Any]:
    """What came of a row, now or when it was first measured."""
    kept = models()[2] / "results.jsonl"
    asked = {key: Path(x).name if key in FILES and x else x for key, x in row.items()}
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    found = next((line["found"] for line in map(json.loads, lines) if line["asked"] == asked), None)
    if found is None:
        words = [common.PYTHON, __file__, "--row", json.dumps(row)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment())
        if done.returncode:
            raise SystemExit(f"{row['way']}: exit {done.returncode}\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"asked": asked, "found": found}) + "\n")
    common.report("quality", found)
    return found


def rows(
    args: argparse.Namespace, files: list[Path], folder: Path, ways: dict[str, list[str]], seeds: range
) -> list[dict[str, Any]]:
    """Of these ways with these rates, by every seed."""
    shape = {"data": str(files[0]), "student": str(common.cut(models()[0], args.keep))}
    if args.text == "people":  # those of the teacher are what is measured with, unless it is said otherwise
        shape["held_out"] = str(files[1])
    shape |= {"steps": args.steps, "rows": args.rows, "length": args.length}
    if args.train_on != "assistant":
        shape["train_on"] = args.train_on
    caches = caches_of(args)
    found = []
    for seed in seeds:
        for way, rates in ways.items():
            cache = str(folder / cache_name(*caches[way], seed, args)) if way in caches else None
            found += [{"way": way, "seed": seed, "learning_rate": r, "cache": cache, **shape} for r in rates]
    return found


def cache_name(form: str, k: int, seed: int, args: argparse.Namespace) -> str:
    """Sampled targets are drawn for a seed; the others are what they are."""
    text = str(args.generations) if args.text == "teacher" else args.text
    text += "" if args.train_on == "assistant" else f"-{args.train_on}"
    return f"{form}-{k}-{text}" + (f"-{seed}" if form == "sampled" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rows", type=int, default=4, help="packed rows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--rates", default="5e-4,1e-3", help="learning rates to choose from")
    parser.add_argument("--sft-rates", help="those to choose from for fine-tuning (default: --rates)")
    parser.add_argument("--text", default="teacher", choices=("teacher", "people"), help="who wrote it")
    parser.add_argument("--train-on", default="assistant", choices=("assistant", "all"))
    parser.add_argument("--generations", type=int, default=1, help="answers of the teacher to each prompt")
    parser.add_argument("--draws", default=[19], type=numbers, help="ids a position, of sampled caches")
    parser.add_argument("--top", default=[64], type=numbers, help="those of the likeliest, with their tail")
    parser.add_argument("--keep", type=numbers, help="layers of the student (default: those of prune)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(one(json.loads(args.row))))
        return

    teacher, _, folder = models()
    people = args.text == "people"
    files = dialogues(folder) if people else answers(teacher, folder, generations=args.generations)
    ways = ["sft", "online", *caches_of(args)]
    rates = dict.fromkeys(ways, args.rates.split(","))
    rates["sft"] = (args.sft_rates or args.rates).split(",")
    with ThreadPoolExecutor(args.jobs) as pool:
        wanted = {
            cache_name(form, k, seed, args): (args.train_on, form, k, seed)
            for form, k in caches_of(args).values()
            for seed in range(args.seeds)
        }
        for done in [
            pool.submit(capture, teacher, files[0], folder / name, *how) for name, how in wanted.items()
        ]:
            done.result()
        found = list(pool.map(in_a_process, rows(args, files, folder, rates, range(1))))
        best = {
            way: min((f for f in found if f["way"] == way), key=lambda f: f["kl_teacher_student"])[
                "learning_rate"
            ]
            for way in ways
        }
        chosen = {way: [rate] for way, rate in best.items()}
        found += pool.map(in_a_process, rows(args, files, folder, chosen, range(1, args.seeds)))
    kept = [f for f in found if f["learning_rate"] == best[f["way"]]]
    mean = {
        way: {
            key: round(statistics.mean(f[key] for f in kept if f["way"] == way), 4)
            for key in ("kl_teacher_student", "nll", "top1_agreement", "loss_tokens")
        }
        for way in ways
    }
    online = mean["online"]["kl_teacher_student"]
    figures = {
        **{key: getattr(args, key) for key in ("text", "train_on", "seeds", "steps", "rows", "length")},
        **{key: getattr(args, key) for key in ("generations", "draws")},
        "learning_rates": best,
        "mean": mean,
        "kl_over_online": {k: round(v["kl_teacher_student"] / online, 3) for k, v in mean.items()},
        "online_over_sft": round(online / mean["sft"]["kl_teacher_student"], 3),
    }
    common.report("quality", figures)
    if args.json:
        args.json.write_text(json.dumps({**figures, "runs": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
