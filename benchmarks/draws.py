"""What it is worth that positions share sampled ids out, against as many ids for each.

    python benchmarks/draws.py [--train]

The variance of targets sampled for answers of SmolLM2 (1,600 positions), in both ways. With --train, a
quarter of an hour: KL to the teacher of its cut to 12 layers, after 134 steps over one answer to each of 150
questions, some six times over the text: by online matching, from a cache with 10 ids for each, and from ones
that share out 14 and 19 (the default of `distillax capture`).
"""

import argparse
import shutil
from pathlib import Path
from unittest import mock

import common
import numpy as np
import pyarrow.parquet as pq
from quality import answers, models

import distillax
from distillax.data.examples import load_examples
from distillax.data.targets import SPREAD
from distillax.teachers import forward
from distillax.teachers.capture import capture
from distillax.teachers.capture_config import CaptureConfig
from distillax.teachers.draws import Shares, share

COUNTS, EXAMPLES, QUESTIONS, STEPS = (10, 14, 19, 24, 48), 20, 150, 134


def alike(top_p_nK: np.ndarray, tail_n: np.ndarray, squares_n: np.ndarray, mean: int) -> Shares:
    """As many ids for each position: what each would have by itself."""
    parts = zip(top_p_nK[:, None], tail_n[:, None], squares_n[:, None], strict=True)
    each = [share(top_p, tail, squares, mean) for top_p, tail, squares in parts]
    return Shares(*(np.concatenate(x) for x in zip(*each, strict=True)))


def variance(p_nV: np.ndarray, shares: Shares) -> float:
    """Of all positions together: sum p (c - p) over what is not kept for sure; `p_nV` descending."""
    total = 0.0
    for p, count, sure in zip(p_nV, *shares, strict=True):
        rest = p[sure:]
        total += rest.sum() ** 2 / (count - sure) - (rest**2).sum() if count > sure else 0.0
    return total


def variances(teacher: Path, data: Path) -> None:
    model = distillax.load(teacher)
    examples = load_examples(str(data), model.tokenizer)
    found = {(way, k): 0.0 for k in COUNTS for way in ("alike", "shared")}
    positions = 0
    for row in range(0, len(examples), len(examples) // EXAMPLES):
        example = examples.encode(row)
        at = np.flatnonzero(example.loss_mask[1:])
        z = np.asarray(model.logits([example.tokens[:-1]])[0], np.float64)[at]
        p = np.exp(z - z.max(1, keepdims=True))
        p = -np.sort(-p / p.sum(1, keepdims=True), 1)
        positions += len(at)
        for way, k in found:
            K = SPREAD * k
            parts = p[:, :K].astype(np.float32), p[:, K:].sum(1), (p[:, K:] ** 2).sum(1)
            found[way, k] += variance(p, (share if way == "shared" else alike)(*parts, k))
    for (way, k), total in found.items():
        common.report("draws", {"way": way, "ids": k, "positions": positions, "variance": total / positions})


def trained(teacher: Path, student: Path, folder: Path, data: Path) -> None:
    from distillax.config import TrainConfig
    from distillax.evaluate import evaluate
    from distillax.settings import load_config
    from distillax.train.loop import train

    rows = pq.read_table(data, filters=[("generation", "=", 0)])
    pq.write_table(rows.slice(0, QUESTIONS), folder / "few.parquet")
    base = {"base_output_directory": folder / "runs", "load_parameters_path": student, "steps": STEPS}
    base |= {"hf_path": folder / "few.parquet", "per_device_batch_size": 4, "max_target_length": 256}
    for way, how, k in (
        ("online", None, 0),
        ("alike", alike, 10),
        ("shared", share, 14),
        ("shared", share, 19),
    ):
        name = f"draws-{way}-{k}"
        keys = {**base, "run_name": name, "learning_rate": 1e-3, "checkpoint_period": STEPS}
        for old in (folder / "draws", folder / "runs" / name):
            shutil.rmtree(old, ignore_errors=True)
        size = None
        if how is None:
            keys["teacher_load_parameters_path"] = teacher
        else:
            with mock.patch.object(forward, "share", how):
                counts = capture(
                    str(teacher), str(folder / "few.parquet"), folder / "draws", CaptureConfig(k=k)
                )
            keys["teacher_cache_path"], size = folder / "draws", counts.bytes / counts.positions
        recipe = common.REPO / "recipes" / ("cached.yml" if how else "online.yml")
        words = [f"{key}={value}" for key, value in keys.items()]
        run = train(load_config(TrainConfig, str(recipe), words), say=lambda _: None).run
        scores = evaluate(
            distillax.load(run), str(folder / "held_out.parquet"), teacher=distillax.load(teacher)
        )
        common.report("draws", {"way": way, "ids": k, "bytes": size, "kl": scores.kl_teacher_student})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", action="store_true", help="compare trained students, too")
    args = parser.parse_args()
    teacher, student, folder = models()
    data, _ = answers(teacher, folder, generations=4)
    variances(teacher, data)
    if args.train:
        trained(teacher, student, folder, data)


if __name__ == "__main__":
    main()
