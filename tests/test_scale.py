"""The same run on one device, eight, and two processes; what stops one of them, and how it goes on."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh

from distillax.checkpoints.source import find
from distillax.checkpoints.state import RunCheckpoints
from distillax.config import TrainConfig
from distillax.errors import UserError
from distillax.models.backend import compile_for, scattered_at_once
from distillax.models.families import preset
from distillax.models.layout import AXES, turns_of
from distillax.parallel import hosts
from distillax.parallel.mesh import check_rows, make_mesh, notes_on_heads
from distillax.settings import load_config
from distillax.teachers.capture import CaptureConfig, capture
from distillax.train.loop import train

STEPS = 12
ON_MESH = str(Path(__file__).parent / "on_mesh.py")
STARTED: list[subprocess.Popen[str]] = []

# `distillax train` where the shared disk is behind: this process sees no checkpoint yet.
BEHIND = """
import sys
from distillax import cli
from distillax.checkpoints.state import RunCheckpoints

RunCheckpoints.latest_step = lambda self: None
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""

# Several runs after another, all in this process.
SEVERAL = """
import json, sys
from distillax import cli

for words in json.loads(sys.argv[1]):
    if code := cli.main(["train", *words]):
        sys.exit(code)
"""


def test_one_step_is_the_same_on_every_mesh() -> None:
    """SFT, online (another width, tied head, JSD at temperature 2; the teacher replicated, or in 8 bits with
    hidden states to match and padding rows) and cached (either format), in two microbatches of packed rows,
    on two, four and eight devices over all axes, gradients scattered over all at once or in turns: loss and
    update to 1e-5, float32."""
    heads, flops, attention, *found = one_step(start([], 8, (ON_MESH,)))
    # A head is gathered once and its gradient scattered once, and nothing else moves, least of all from one
    # chunk to the next: over fsdp 8, and, with a teacher's head, over fsdp 4 and tensor 2, axis after axis.
    assert heads == [
        {"entry all-gather": 1, "entry reduce-scatter": 1},
        {"entry all-gather": 2 * 2, "entry reduce-scatter": 2},
    ]
    assert max(flops) < 0.27, flops  # four devices share the heads, however few have keys and values
    for errors in attention:  # the kernel of TPUs on parts of rows and heads
        assert max(errors.values()) < 0.01, errors
    methods = {"sft", "online", "cached", "online, int8, hidden states", "cached, sampled"}
    assert len(found) == 28 and {row["method"] for row in found} == methods
    check(found)
    # A replicated teacher's matrices (three layers of queries, keys, values, outputs, three of the MLP, and
    # the tied head) are not gathered in either microbatch: 4 bytes each, 7 of 8 parts.
    *_, replicated = found
    assert replicated["teacher_sharding"] == "replicated"
    (split,) = (x for x in found[:-1] if (x["method"], x["mesh"]) == ("online", replicated["mesh"]))
    matrices = 3 * 48 * (2 * 32 + 2 * 16 + 3 * 64) + 96 * 48
    assert split["gathered"] - replicated["gathered"] == pytest.approx(2 * 4 * matrices * 7 / 8, rel=0.05)


def test_one_step_is_the_same_on_two_processes() -> None:
    """As above, with two devices each."""
    address = free_address()
    processes = [start([address, str(index)], 2, (ON_MESH,)) for index in range(2)]
    for found in [one_step(process) for process in processes]:
        assert [row["method"] for row in found] == ["sft", "online", "online", "cached"]
        check(found)


def one_step(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]  # which speaks, too
    return [json.loads(line) for line in lines if line.startswith(("{", "["))]


def check(found: list[dict[str, Any]]) -> None:
    for row in found:
        assert row["loss"] < 1e-5 and row["update"] < 1e-5 and row["moved"] > 1e-3, row


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scale")
    return {
        "root": root,
        "student": small.chat_model("qwen3", root / "student"),
        "teacher": small.chat_model("llama3.1", root / "teacher", seed=1),
        "data": small.questions(root / "data.jsonl", 60),
    }


def arguments(world: dict[str, Path], run_name: str, method: str = "online", **changes: object) -> list[str]:
    keys: dict[str, object] = dict(
        teacher_load_parameters_path=world["teacher"],
        steps=STEPS,
        per_device_batch_size=1,
        max_target_length=64,
        checkpoint_period=2,
        learning_rate="1e-3",
        adam_eps="1e-5",  # a gradient that is rounding noise would otherwise move a weight like any other
        ici_fsdp_parallelism=2,
        eval_split="train",
        eval_interval=STEPS,
    )
    return small.training(method, world, run_name, **(keys | changes))


def start(
    words: list[str],
    devices: int,
    program: tuple[str, ...] = ("-m", "distillax", "train"),
    **environment: str,
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment,
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_survives() -> Iterator[None]:
    """What a failed test leaves behind would wait for others, or train on."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, f"{out[-2000:]}\n{errors[-4000:]}"
    return out + errors


def start_two(
    world: dict[str, Path], run_name: str, of_second: dict[str, object] | None = None, **changes: object
) -> list[subprocess.Popen[str]]:
    """The run as two processes of two devices each; the second may have other values of its own."""
    each = two(world, run_name, of_second, **changes)
    return [start(words, devices=2) for words in each]


def two(
    world: dict[str, Path], run_name: str, of_second: dict[str, object] | None = None, **changes: Any
) -> list[list[str]]:
    keys = {"coordinator_address": free_address(), "process_count": 2} | changes
    each = keys | {"process_index": 0}, keys | {"process_index": 1} | (of_second or {})
    return [arguments(world, run_name, **words) for words in each]


def weights(world: dict[str, Path], run_name: str) -> np.ndarray:
    """All of them, in a row."""
    params = find(world["root"] / "runs" / run_name).params()
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(params)])


@pytest.fixture(scope="module")
def whole(world: dict[str, Path]) -> dict[str, Path]:
    """The run of one process with four devices, which nobody disturbs."""
    finish(start(arguments(world, "whole"), devices=4))
    return world


def test_two_processes_are_one(whole: dict[str, Path]) -> None:
    outputs = [finish(process) for process in start_two(whole, "two")]
    assert f"done: {STEPS} steps" in outputs[0] and "done" not in outputs[1]  # one of them speaks
    runs = [small.metrics(whole["root"] / "runs" / name) for name in ("whole", "two")]
    assert [line["step"] for line in runs[1]] == [*range(1, STEPS + 1), STEPS]  # and an evaluation
    for one, two in zip(*(lines[:-1] for lines in runs), strict=True):
        assert one["weight_sum"] == two["weight_sum"] and two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for name in ("eval_tokens", "eval_loss", "eval_kl_teacher_student"):
        assert runs[1][-1][name] == pytest.approx(runs[0][-1][name], rel=1e-5)
    np.testing.assert_allclose(weights(whole, "two"), weights(whole, "whole"), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "size", "groups"),
    [
        ("TPU v5 lite", 8, [8]),
        ("TPU v6 lite", 32, [8, 4]),
        ("TPU v4", 8, [4, 2]),
        ("TPU v5", 32, [4, 4, 2]),
        ("TPU7x", 12, [4, 3]),
        ("", 14, [2, 7]),
        ("", 25, [5, 5]),
        ("TPU v6e", 1, []),
    ],
)
def test_a_sum_is_scattered_in_turns(kind: str, size: int, groups: list[int]) -> None:
    """By hand, of a sum of one number a device: each ends with the sum of its own place."""
    with compile_for("tpu"):
        turns = turns_of(size, scattered_at_once(kind))
    assert [len(turn[0]) if turn else size for turn in turns] == groups
    held = [dict(enumerate(np.arange(size) * 100 + device)) for device in range(size)]
    for turn in turns:
        for group in turn or [list(range(size))]:
            places = np.split(np.array(sorted(held[group[0]])), len(group))
            sums = {place: sum(held[device][place] for device in group) for place in held[group[0]]}
            for device, own in zip(group, places, strict=True):
                held[device] = {place: sums[place] for place in own}
    wanted = sum(range(size))
    assert held == [{device: size * 100 * device + wanted} for device in range(size)]


def test_two_processes_are_one_without_a_teacher(world: dict[str, Path]) -> None:
    """SFT, and a cache's targets, of which each host reads those of its rows. Of the rows that the other one
    reads it knows the sizes alone. Both methods in one pair of processes."""
    cache = world["root"] / "cache"
    config = CaptureConfig(dtype="float32", k=4)
    capture(str(world["teacher"]), str(world["data"]), cache, config, show_progress=False)
    usual = dict(steps=2, eval_split="", eval_interval=-1, teacher_load_parameters_path="")
    each: dict[str, dict[str, object]] = {"sft": {}, "cached": {"teacher_cache_path": cache}}
    pairs = [two(world, f"{method}-two", method=method, **usual, **keys) for method, keys in each.items()]
    runs = [json.dumps(words) for words in zip(*pairs, strict=True)]
    for process in [start([words], devices=2, program=("-c", SEVERAL)) for words in runs]:
        finish(process)
    alone = {"ici_fsdp_parallelism": 1, "per_device_batch_size": 4}
    for method, keys in each.items():
        recipe, *words = arguments(world, f"{method}-whole", method=method, **usual, **keys, **alone)
        train(load_config(TrainConfig, recipe, words), say=lambda _: None)
        whole, halves = (small.metrics(world["root"] / "runs" / f"{method}-{x}") for x in ("whole", "two"))
        assert len(whole) == 2
        for one, other in zip(whole, halves, strict=True):
            assert one["weight_sum"] == other["weight_sum"] > 0
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        found, wanted = (weights(world, f"{method}-{x}") for x in ("two", "whole"))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_rows_of_a_host_are_those_of_its_devices() -> None:
    """Here the second half of each of two microbatches, and half of the tokens of some of it."""
    parts = {0: np.s_[:, 4:6, :], 1: np.s_[:, 6:8, :32], 2: np.s_[:, 6:8, 32:]}
    sharding: Any = SimpleNamespace(addressable_devices_indices_map=lambda _: parts)
    rows = hosts.own_rows(sharding, (2, 8, 64))
    assert rows.tolist() == 2 * [[False] * 4 + [True] * 4]


def test_what_each_host_has_a_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them, and seven rows: three, two and two."""
    rows, said = np.arange(14).reshape(7, 2), []

    def gather(own: np.ndarray) -> np.ndarray:
        said.append(own)
        return np.stack([np.pad(rows[h::3], [(0, 3 - len(rows[h::3])), (0, 0)]) for h in range(3)])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    np.testing.assert_array_equal(hosts.from_all(rows[1::3], 7), rows)
    assert [own.tolist() for own in said] == [[[2, 3], [8, 9], [0, 0]]]


def test_a_run_goes_on_elsewhere(whole: dict[str, Path]) -> None:
    """Ten steps on four devices (data 2, fsdp 2), two more on two devices of the data axis, each with two
    rows for one: the weights of twelve steps on four. Another number of rows a step is refused."""
    runs = whole["root"] / "runs"
    shutil.copytree(runs / "whole", runs / "moved")
    shutil.rmtree(runs / "moved" / "checkpoints" / "12")
    elsewhere = {"ici_fsdp_parallelism": 1, "per_device_batch_size": 1}
    said = finish(start(arguments(whole, "moved", **elsewhere), devices=2), code=2)
    assert "a step of this run reads 4 rows" in said
    assert "set per_device_batch_size=1 gradient_accumulation_steps=2" in said
    elsewhere["per_device_batch_size"] = 2
    said = finish(start(arguments(whole, "moved", **elsewhere), devices=2))
    assert "resuming after step 10 of 12" in said and "data 2;" in said
    np.testing.assert_allclose(weights(whole, "moved"), weights(whole, "whole"), atol=1e-5)


@pytest.mark.parametrize(
    ("saved", "devices", "words"),
    [
        (32, 1, "; set per_device_batch_size=4 gradient_accumulation_steps=8"),
        (12, 2, "; set per_device_batch_size=2 gradient_accumulation_steps=3"),
        (8, 3, ", which cannot share 8; set ici_.* so that their number divides 8"),
    ],
)
def test_rows_a_step_are_kept(saved: int, devices: int, words: str) -> None:
    """With the sizes that keep them, and no more rows at once than was asked for."""
    mesh: Any = AbstractMesh((1, devices, 1, 1, 1), AXES)
    config = TrainConfig(per_device_batch_size=4, gradient_accumulation_steps=2)
    check_rows(config, mesh, 8 * devices)
    with pytest.raises(UserError, match=f"reads {saved} rows, .* on the {devices} .*{words}, or give"):
        check_rows(config, mesh, saved)


def test_heads_that_devices_cannot_share_are_noted() -> None:
    """28 and 9 query heads; that 4 and 3 have keys and values is no matter."""
    student, teacher = preset("smollm2-135m"), preset("qwen2.5-7b")
    notes = {
        tensor: list(notes_on_heads(AbstractMesh((1, 1, tensor, 1, 1), AXES), student, teacher))
        for tensor in (1, 2, 7, 8)
    }
    assert notes[1] == [] and [len(notes[tensor]) for tensor in (2, 7, 8)] == [1, 1, 2]
    said = "heads of the {} cannot be split over 8 devices (ici_tensor_parallelism), so each of"
    assert said.format("student") in notes[8][0] and "could share" not in notes[8][0]
    assert said.format("teacher") in notes[8][1] and notes[8][1].endswith("; 4 could share it")


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_is_killed(victim: int, whole: dict[str, Path]) -> None:
    """The other ends within a minute, and says why, in words of JAX if that noticed first, as it does where
    the first process is gone; then one process of four devices, or two again, end with the weights of a run
    that nobody disturbed."""
    world, name = whole, f"killed-{victim}"
    run = world["root"] / "runs" / name
    processes = start_two(world, name)
    wait_for(run / "checkpoints" / "2" / "model_params" / "_METADATA", *processes)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = processes[1 - victim].communicate(timeout=120)
    processes[victim].communicate()
    assert time.monotonic() - killed < 60
    assert processes[1 - victim].returncode != 0, errors[-3000:]
    words = r"^distillax: error: another process of this run is gone \(.+\)|another task died"
    assert re.search(words, errors, re.M), errors[-3000:]
    assert not (run / "checkpoints" / str(STEPS)).exists()
    again = start_two(world, name) if victim else [start(arguments(world, name), devices=4)]
    said = [finish(process) for process in again]
    assert "resuming after step" in said[0] and f"done: {STEPS} steps" in said[0]
    np.testing.assert_allclose(weights(world, name), weights(world, "whole"), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("INTERNAL: Gloo all-reduce failed: Connection closed by peer", "INTERNAL: Gloo"),
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes",
            "the memory of the device is too small (8 bytes)",
        ),
        ("NaN", "NaN"),
    ],
)
def test_a_connection_that_broke(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What JAX raises then becomes a sentence, for the others too; what else it raises does not."""
    told: dict[str, str] = {}

    def nothing(*_: object) -> str:
        raise jax.errors.JaxRuntimeError("NOT_FOUND")

    store = SimpleNamespace(
        key_value_try_get=nothing, wait_at_barrier=nothing, key_value_set=lambda k, v: told.update({k: v})
    )
    monkeypatch.setattr(hosts, "join", lambda config: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "_coordinator", lambda: store)
    with pytest.raises((UserError, jax.errors.JaxRuntimeError)) as raised, hosts.joined(TrainConfig()):
        raise jax.errors.JaxRuntimeError(f"{text}\nand more")
    gone = f"another process of this run is gone ({text}); start them all again: the run goes on from its"
    assert str(raised.value).startswith(gone if "Gloo" in text else text)
    index, code, sentence = json.loads(told[hosts._FAILURE])
    assert (index, code) == (0, 1 if text == "NaN" else 2) and said in sentence


def test_a_mistake_of_the_first_process_ends_the_other(world: dict[str, Path]) -> None:
    """Also where that one is far ahead, and waits for the first among the devices."""
    run = world["root"] / "runs" / "foreign"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("not a line of metrics\n")
    processes = start_two(world, "foreign")
    first, second = (finish(process, code=2) for process in processes)
    (mistake,) = re.findall(r"^distillax: error: (.*metrics\.jsonl.*)$", first, re.M)
    assert f"distillax: error: the first process stopped: {mistake}\n" in second
    assert "Traceback" not in first + second


@pytest.mark.parametrize("rows", [57, 60])
def test_two_processes_with_different_data(rows: int, world: dict[str, Path]) -> None:
    """Fewer rows, or as many, of which the answer to one is another of the same length."""
    text = small.questions(world["root"] / "other.jsonl", rows).read_text(encoding="utf-8")
    assert text.count("It is 9.") == 1
    (world["root"] / "other.jsonl").write_text(text.replace("It is 9.", "It is 8."), encoding="utf-8")
    processes = start_two(world, f"differ-{rows}", of_second={"hf_path": world["root"] / "other.jsonl"})
    words = r"versions of the data \(this one: (\d+) rows with .*\); every host needs the same files"
    for said in [finish(process, code=2) for process in processes]:
        match = re.search(words, said)
        assert match and int(match[1]) in (60, rows), said


def test_a_folder_that_is_not_shared_is_told(world: dict[str, Path], tmp_path: Path) -> None:
    """The first checkpoint would wait for ever."""
    soon = "from distillax import cli, run_dir; run_dir._SHARED_S = 3; cli.main()"
    each = two(world, "local", of_second={"base_output_directory": tmp_path})
    processes = [start(words, devices=2, program=("-c", soon, "train")) for words in each]
    for said in [finish(process, code=2) for process in processes]:
        assert "local is not the folder that the first process has under that name; give a base_out" in said


def test_the_processes_read_one_checkpoint(world: dict[str, Path], tmp_path: Path) -> None:
    """Of a hub id, of which one has an older snapshot."""
    first, second = (tmp_path / host / "models--a--b" / "snapshots" / host for host in ("new", "old"))
    for folder in (first, second):
        shutil.copytree(world["student"], folder)
    keys = {"load_parameters_path": first}
    processes = start_two(world, "weights", of_second={"load_parameters_path": second}, **keys)
    for said in [finish(process, code=2) for process in processes]:
        assert "the processes read different versions of the student (this one: " in said
    assert find(world["student"]).version() == ""  # a copy of one's own may lie anywhere


def test_a_mistake_of_the_second_process_ends_the_first(world: dict[str, Path]) -> None:
    processes = start_two(world, "lonely", of_second={"hf_path": world["root"] / "elsewhere.jsonl"})
    second = finish(processes[1], code=2)
    failed = time.monotonic()
    first = finish(processes[0], code=2)
    assert time.monotonic() - failed < 20
    (mistake,) = re.findall(r"^distillax: error: (.*elsewhere\.jsonl.*)$", second, re.M)
    assert f"distillax: error: process 1 stopped: {mistake}\n" in first
    assert "Traceback" not in first + second


def test_an_interrupt_of_one_process_ends_the_other(world: dict[str, Path]) -> None:
    """In the middle of the steps, with a checkpoint perhaps half written."""
    processes = start_two(world, "interrupted", steps=5000, checkpoint_period=2)
    checkpoint = world["root"] / "runs" / "interrupted" / "checkpoints" / "2"
    wait_for(checkpoint / "model_params" / "_METADATA", *processes)
    processes[1].send_signal(signal.SIGINT)
    told = time.monotonic()
    first, second = (finish(process, code=130) for process in processes)
    assert time.monotonic() - told < 30
    assert "distillax: interrupted" in second and "process 1 stopped: interrupted" in first
    assert "Traceback" not in first + second


def test_sigterm_saves_and_ends_well(whole: dict[str, Path]) -> None:
    run = whole["root"] / "runs" / "told"
    process = start(arguments(whole, "told", steps=5000, checkpoint_period=5000), devices=4)
    wait_for(run / "metrics.jsonl", process, lines=2)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    (saved,) = (path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert f"stopped by SIGTERM after step {saved} of 5000" in said and "goes on from there" in said


def told(world: dict[str, Path], name: str, *which: int) -> int:
    """The step after which two processes saved and ended well, when these of them were sent SIGTERM."""
    folder = world["root"] / "runs" / name / "checkpoints"
    processes = start_two(world, name)
    wait_for(folder / "2" / "model_params" / "_METADATA", *processes)
    for index in which:
        processes[index].send_signal(signal.SIGTERM)
    outputs = [finish(process) for process in processes]
    saved = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    assert 2 <= saved < STEPS
    for said in outputs:
        assert f"stopped by SIGTERM after step {saved} of {STEPS}" in said and "goes on from there" in said
    return saved


# `distillax train` where the data take long to be read.
SLOW = """
import sys, time
from distillax import cli
from distillax.train import loop

loop.make_feed = lambda *_: time.sleep(600)
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def test_sigterm_before_the_first_step_ends_both(world: dict[str, Path]) -> None:
    """At once, though the first waits in a collective, and only the second was told."""
    first, second = two(world, "early")
    processes = [start(first, devices=2), start(second, devices=2, program=("-c", SLOW))]
    wait_for(world["root"] / "runs" / "early" / "config.yml", *processes)
    processes[1].send_signal(signal.SIGTERM)
    told = time.monotonic()
    for said in [finish(process, code=143) for process in processes]:
        assert "distillax: stopped by SIGTERM before the first step of this start; the same command" in said
        assert "Traceback" not in said
    assert time.monotonic() - told < 20


def test_processes_agree_on_calls_not_on_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """JAX takes one that has not called yet to be at 0, and so would have a run that goes on after step 100
    stop after step 1; in a second training it takes it to be where the first one ended. Orbax would tell it
    of steps, too, and of such as are past."""
    told: list[int] = []
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda n: (told.append(n), n == 2)[1]
    )
    monkeypatch.setattr(hosts, "_calls", itertools.count(1))
    with RunCheckpoints(tmp_path, keep=1) as checkpoints, monkeypatch.context() as several:
        several.setattr(jax, "process_count", lambda: 2)
        with hosts.stopping() as stop:
            assert [stop(101), stop(102)] == [0, signal.SIGTERM]
        with hosts.stopping() as stop:
            assert stop(1) == 0
        several.undo()
        checkpoints.save(102, {"x": jnp.zeros(2)}, {"y": jnp.zeros(2)}, {})
    assert told == [1, 2, 3] and (tmp_path / "102").is_dir()


def test_sigterm_to_both_of_two_processes(world: dict[str, Path]) -> None:
    told(world, "told-both", 0, 1)


def test_sigterm_to_one_of_two_processes(whole: dict[str, Path]) -> None:
    """A second start, though one process does not see the checkpoint yet, ends with the weights of a run
    that nobody disturbed."""
    saved = told(whole, "told-one", 1)
    first, second = two(whole, "told-one")
    processes = [start(first, devices=2), start(second, devices=2, program=("-c", BEHIND))]
    said = [finish(process) for process in processes]
    assert f"resuming after step {saved} of {STEPS}" in said[0]
    np.testing.assert_allclose(weights(whole, "told-one"), weights(whole, "whole"), atol=1e-5)


def wait_for(path: Path, *processes: subprocess.Popen[str], lines: int = 0) -> None:
    deadline = time.monotonic() + 240
    while not path.exists() or len(path.read_bytes().splitlines()) < lines:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [
            p.communicate()[1][-2000:] for p in processes if p.poll() is not None
        ]
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"coordinator_address": "a:1"}, "without process_count and process_index"),
        ({"coordinator_address": "a:1", "process_count": 2, "process_index": 2}, "from 0 to 1"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        hosts.join(TrainConfig.model_validate(keys), {})


def test_a_launcher_may_name_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("nobody to join"))
    keys = {"coordinator_address": "a:1", "process_count": 1, "process_index": 0}
    hosts.join(TrainConfig.model_validate(keys), {})


@pytest.mark.parametrize(
    ("backend", "environment", "kept"),
    [
        ("gpu", {}, False),
        ("gpu", {"JAX_ENABLE_COMPILATION_CACHE": "1"}, True),
        ("tpu", {}, True),
        ("cpu", {}, True),
    ],
)
def test_processes_on_gpus_compile_all_of_them_or_none(
    backend: str, environment: dict[str, str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for what each other's compilers find, which one that has the program already never says."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    before = jax.config.jax_enable_compilation_cache
    assert before
    try:
        keys = {"coordinator_address": "a:1", "process_count": 2, "process_index": 1}
        hosts.join(TrainConfig.model_validate(keys), environment)
        assert jax.config.jax_enable_compilation_cache == kept
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, None),  # JAX: all of them
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, None),  # no GPU
        (
            {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2"},
            [0, 1, 2],
        ),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_GPUS": "0,1"}, [0, 1]),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2),2", "SLURM_STEP_GPUS": "0,1"}, None),
        ({"SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "3"}, [0]),
        ({"SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),
        (
            {
                "SLURM_LOCALID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "1",
                "CUDA_VISIBLE_DEVICES": "0,1",
                "JAX_LOCAL_DEVICE_IDS": "1",
            },
            None,
        ),
    ],
)
def test_a_process_of_slurm_has_the_gpus_it_is_there_for(environment: dict[str, str], gpus: object) -> None:
    assert hosts._local_gpus(environment) == gpus


def test_nodes_of_gpus_are_no_slices() -> None:
    """And fsdp takes what nobody else does, of all nodes."""

    @dataclass(frozen=True)
    class Device:
        id: int
        platform: str
        device_kind: str = "x"

        @property
        def slice_index(self) -> int:
            return self.id // 8

        process_index = slice_index

    def shape(platform: str, **keys: int) -> dict[str, int]:
        config = TrainConfig.model_validate(
            {f"{axis if '_' in axis else f'ici_{axis}'}_parallelism": n for axis, n in keys.items()}
        )
        return dict(make_mesh(config, [Device(i, platform) for i in range(16)]).shape)

    assert shape("gpu") == shape("gpu", fsdp=16) == shape("gpu", fsdp=-1)
    assert shape("gpu") == {"data": 1, "fsdp": 16, "tensor": 1, "context": 1, "expert": 1}
    assert shape("gpu", data=-1)["data"] == 16 and shape("gpu", context=4)["fsdp"] == 4
    assert shape("gpu", fsdp=8, dcn_data=2) == {"data": 2, "fsdp": 8, "tensor": 1, "context": 1, "expert": 1}
    assert shape("gpu", fsdp=8, dcn_fsdp=-1)["fsdp"] == 16
    with pytest.raises(UserError, match="there are 8"):
        shape("tpu", fsdp=16)


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The metadata server of a TPU VM, on this machine, and what it says."""
    said: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if name in said else 404)
            self.end_headers()
            self.wfile.write(said.get(name, "").encode())

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # JAX sets it where it sees no TPU
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        yield said
        server.shutdown()


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ("x:y:127.0.0.1,x:y:127.0.0.2,x:y:127.0.0.3,x:y:127.0.0.4", [("127.0.0.1:8482", 4, 2)]),
        ("x:y:127.0.0.1", []),
    ],
    ids=["slice", "single host"],
)
def test_tpu_vms_find_each_other(
    metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch, workers: str, expected: list[object]
) -> None:
    metadata |= {"agent-worker-number": "2", "worker-network-endpoints": workers, "tpu-env": ""}
    found: list[object] = []

    def initialize(**_: object) -> None:
        found.append(ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 9)[:3])

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    hosts.join(TrainConfig(), {})
    assert found == expected
    hosts.join(TrainConfig(), {"JAX_PLATFORMS": "cpu"})
    assert found == expected


def test_processes_that_slurm_starts_find_each_other(world: dict[str, Path]) -> None:
    """By what srun leaves in the environment, of which JAX makes the rest; no key is given."""
    slurm = {"SLURM_JOB_ID": free_job(), "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    words = arguments(world, "slurm", steps=1, eval_split="", eval_interval=-1)
    first, second = [finish(p) for p in [start(words, 2, SLURM_PROCID=str(i), **slurm) for i in range(2)]]
    assert "cpu, data 2, fsdp 2;" in first and "done: 1 step;" in first and "done: 1" not in second


def free_job() -> str:
    """The number of a job of which JAX makes a port that is free."""
    for job in range(os.getpid(), os.getpid() + 4096):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", job % 2**12 + 65535 - 2**12 + 1))
            return str(job)
    raise AssertionError("no free port")


def test_a_tpu_without_a_metadata_server_is_alone(
    metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("nobody to join"))
        hosts.join(TrainConfig(), {})
