"""What one process computes is the same on one device and on four, none of which holds the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import on_devices
import pytest
import small

import distillax
from distillax.data.examples import load_examples
from distillax.data.targets import TargetStore


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """Models and data, and what came of them on one device and on four."""
    world = tmp_path_factory.mktemp("devices")
    small.chat_model("qwen3", world / "student")
    small.chat_model("llama3.1", world / "teacher", seed=1)
    small.chat_model("gemma3-softcap", world / "softcap", seed=2)
    small.questions(world / "data.jsonl", 90)
    done = subprocess.run(
        [sys.executable, on_devices.__file__, str(world), str(world / "4")],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {1: on_devices.main(world, world / "1"), 4: json.loads(done.stdout.splitlines()[-1])}
    return world, found


def test_weights_are_split(runs: tuple[Path, dict[int, Any]]) -> None:
    _, found = runs
    assert found[1]["parts"] == [1, 1] and found[1]["head"] == 1
    assert found[4]["parts"] == [0.25, 0.25] and found[4]["head"] == 0.25
    assert (found[1]["engine"], found[4]["engine"]) == (1, 0.25)


def test_scores_are_the_same(runs: tuple[Path, dict[int, Any]]) -> None:
    """With a teacher that is run at once, and with one whose hidden states are kept on the host."""
    _, found = runs
    for one, four in zip(found[1]["scores"], found[4]["scores"], strict=True):
        assert one["tokens"] > 1000 and four == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", ["teacher-sampled", "softcap-topk", "teacher-sampledint8"])
def test_targets_are_the_same(name: str, runs: tuple[Path, dict[int, Any]]) -> None:
    """But for ids whose probabilities, or distances from a draw, are equal up to rounding."""
    world, _ = runs
    stores = [TargetStore.open(world / devices / name) for devices in ("1", "4")]
    examples = load_examples(str(world / "data.jsonl"), distillax.load(world / name.split("-")[0]).tokenizer)
    positions = others = 0
    for row in range(len(examples)):
        one, four = (store.lookup(examples.encode(row)) for store in stores)
        same = (one["target_ids"] == four["target_ids"]).all(1)
        positions, others = positions + len(same), others + int(np.count_nonzero(~same))
        np.testing.assert_allclose(four["teacher_nll"], one["teacher_nll"], atol=1.1e-3)  # rounded so
        # A step in which weights are stored.
        np.testing.assert_allclose(four["target_weights"][same], one["target_weights"][same], atol=1.01 / 127)
    assert positions > 1000 and others <= positions // 500, (others, positions)


def test_greedy_answers_are_the_same(runs: tuple[Path, dict[int, Any]]) -> None:
    """Of devices that share the queries' heads and the hidden units, but not the two heads of the keys."""
    _, found = runs
    assert len({text for texts in found[1]["answers"] for text in texts}) > 40
    assert found[4]["answers"] == found[1]["answers"]
