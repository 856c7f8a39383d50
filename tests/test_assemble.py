"""Weights on a mesh: each process reads its share, and every device has what it would have of the whole."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from distillax.checkpoints import state
from distillax.checkpoints.convert import to_orbax
from distillax.checkpoints.huggingface import FolderSource

PROGRAM = Path(__file__).parent / "on_processes.py"
MESHES = [
    {},
    {"data": 8},
    {"fsdp": 4, "expert": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 2, "tensor": 2},
    {"fsdp": 3},  # which divides some axes and not others
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("assemble")
    tiny.make("qwen3", root / "folder")
    tiny.make("qwen3", root / "four", num_hidden_layers=4, vocab_size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "_CHUNK_BYTES", 2_000)  # as many chunks as a large model has
        to_orbax(root / "folder", root / "orbax")
    return {name: root / name for name in ("folder", "four", "orbax")}


def start(case: dict[str, Any], devices: int) -> subprocess.Popen[str]:
    strict = {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", PROGRAM, json.dumps(case)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | strict,
    )


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]  # Gloo speaks too
    assert rows and all(row["equal"] and row["described"] for row in rows), rows
    return rows


def sizes(folder: Path) -> tuple[int, int, int]:
    """Stored bytes of all matrices, of all vectors, and of the largest."""
    source = FolderSource(folder)
    nbytes = {n: math.prod(source.shape(n)) * source.dtype(n).itemsize for n in source.names()}
    vectors = sum(size for name, size in nbytes.items() if len(source.shape(name)) == 1)
    return sum(nbytes.values()) - vectors, vectors, max(nbytes.values())


def test_one_process_reads_a_checkpoint_once_for_any_mesh(models: dict[str, Path]) -> None:
    """Nothing is read twice, not for devices that hold the same either."""
    weights = [(str(models["folder"]), "bfloat16", ""), (str(models["folder"]), "float32", "int8")]
    case = {"processes": 1, "meshes": MESHES, "weights": [*weights, (str(models["orbax"]), "float32", "")]}
    rows = finish(start(case, devices=8))
    assert len(rows) == 3 * len(MESHES)
    matrices, vectors, _ = sizes(models["folder"])
    assert {row["bytes"] for row in rows if row["weights"][0] == weights[0][0]} == {matrices + vectors}


def test_each_of_two_processes_reads_its_half(models: dict[str, Path], tmp_path: Path) -> None:
    """Of the matrices, whether the devices of the other hold the same in the end or not; the vectors are
    read by both. Never more at a time than a device's part of the largest, of one layer. So too of a run's
    parameters and moments, on another mesh than that which saved them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    folder, orbax = str(models["folder"]), str(models["orbax"])
    case = {
        "processes": 2,
        "address": address,
        "meshes": [{"data": 2, "fsdp": 2}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}],
        "weights": [(folder, "bfloat16", ""), (folder, "float32", "int8"), (orbax, "float32", "")],
        "run": str(tmp_path / "run"),
        "of": str(models["four"]),
    }
    alone = finish(start(case | {"processes": 1, "save": {"data": 4}}, devices=4))
    both = [finish(process) for process in [start(case | {"index": i}, devices=2) for i in range(2)]]
    matrices, vectors, largest = sizes(models["folder"])
    for *rows, whole in zip(*both, alone, strict=True):
        for row in rows:
            if row["weights"][0] == folder:
                assert row["bytes"] == matrices // 2 + vectors, row
                assert row["largest"] == largest // 4
            else:  # by chunks, and with what says where they lie
                copies = row["weights"] == ["run"] and "data" in row["mesh"]  # each process has all of it
                assert copies or row["stored"] < 0.65 * whole["stored"], (row, whole)
