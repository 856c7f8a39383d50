"""Training from the command line: killed and resumed, exact steps, token ids, learning."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import small
from jax.sharding import AbstractMesh

from distillax.checkpoints import state
from distillax.checkpoints.source import find
from distillax.config import TrainConfig
from distillax.errors import Stopped, UserError
from distillax.models import backend, tokenizers
from distillax.models.layout import AXES
from distillax.parallel import hosts
from distillax.parallel.mesh import make_mesh, notes_on_heads
from distillax.run_dir import Metrics
from distillax.settings import load_config
from distillax.train import loop
from distillax.train.feed import make_feed, read_examples
from distillax.train.loop import train
from distillax.train.optimizer import learning_rate_schedule

STEPS = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("train")
    return {
        "root": root,
        "student": small.chat_model("qwen3", root / "student"),
        "data": small.questions(root / "data.jsonl", 60),
    }


def arguments(world: dict[str, Path], run_name: str, **changes: object) -> list[str]:
    keys: dict[str, object] = dict(
        steps=STEPS,
        per_device_batch_size=2,
        gradient_accumulation_steps=2,
        max_target_length=64,
        checkpoint_period=3,
        learning_rate=1e-3,
    )
    return small.training("sft", world, run_name, **(keys | changes))


def in_process(world: dict[str, Path], run_name: str, **changes: object):
    recipe, *overrides = arguments(world, run_name, **changes)
    return train(load_config(TrainConfig, recipe, overrides), say=lambda _: None)


def weights(path: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(find(path).params())]


@pytest.mark.optimised
def test_killed_at_three_points_ends_with_the_same_bits(world: dict[str, Path]) -> None:
    """Before the first checkpoint, just after one, and between two: pitfall 21. A start from 0 instead of 3
    would leave the checkpoint of step 3 once more."""
    small.run("train", *arguments(world, "whole"))
    for kill in (("step", 2), ("saved", 4), ("saved", 5)):  # steps counted from where each start resumes
        small.run("train", *arguments(world, "killed"), kill=kill)
    assert "resuming after step 6 of 10" in small.run("train", *arguments(world, "killed"))
    whole, killed = world["root"] / "runs" / "whole", world["root"] / "runs" / "killed"
    for a, b in zip(weights(whole), weights(killed), strict=True):
        assert a.tobytes() == b.tobytes()
    kept = [{k: v for k, v in x.items() if "second" not in k} for x in small.metrics(whole)]
    assert kept == [{k: v for k, v in x.items() if "second" not in k} for x in small.metrics(killed)]
    assert [x["step"] for x in small.metrics(killed)] == list(range(1, STEPS + 1))
    assert "loss" in kept[0] and kept[-1]["loss"] < 0.9 * kept[0]["loss"]


@pytest.mark.parametrize(("bad", "early"), [(("robot", "x"), True), (("user", "poison"), False)])
def test_a_bad_row_of_many(world: dict[str, Path], tmp_path: Path, bad: tuple[str, str], early: bool) -> None:
    """Where rows are too many to be tokenised first, all are still read before the first step: one that is
    no conversation does not end the training in its middle. One that the template refuses does."""
    turn = {"role": "assistant", "content": "a"}
    rows = [{"messages": [{"role": "user", "content": "q"}, turn]}] * 60
    rows[50] = {"messages": [dict(zip(("role", "content"), bad, strict=True)), turn]}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, *overrides = arguments(world, "many", packing="false", data_shuffle_seed=1)
    config = load_config(TrainConfig, None, [*overrides, f"hf_path={data}", "hf_train_files="])
    tokenizer = find(world["student"]).tokenizer()
    refuse = "{% if 'poison' in messages[0].content %}{{ raise_exception('poison') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    mesh = make_mesh(config)
    examples = read_examples(config, tokenizer, "train", "", None)
    if early:
        with pytest.raises(
            UserError, match=r"data\.jsonl, line 51 \(row 50, counted from 0\): unknown role 'robot'"
        ):
            make_feed(config, mesh, examples, most=20)
        return
    batches = make_feed(config, mesh, examples, most=20).training()
    with pytest.raises(
        UserError,
        match=r"data\.jsonl, line 51 \(row 50, counted from 0\): .*poison; this run cannot go on .*run_name",
    ):
        for _ in range(60):
            next(batches)
    batches.close()


def test_an_answer_without_text_is_left_out_and_told(world: dict[str, Path], tmp_path: Path) -> None:
    blank = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": blank}) + "\n" + world["data"].read_text())
    said: list[str] = []
    recipe, *overrides = arguments(world, "blank", steps=1, hf_path=data)
    train(load_config(TrainConfig, recipe, overrides), say=said.append)
    assert [x for x in said if x.startswith("data: 61 rows") and x.endswith(" 1 without a loss token")]
    assert [x for x in said if x.startswith("note: 1 of 61 rows are left out, whose answers have no text")]


def test_steps_and_schedule_count_optimizer_steps(world: dict[str, Path]) -> None:
    """Pitfall 21: accumulation neither shortens the schedule nor adds steps."""
    result = in_process(world, "accumulated", gradient_accumulation_steps=4, per_device_batch_size=1)
    found = small.metrics(result.run)
    assert [x["step"] for x in found] == list(range(1, STEPS + 1))
    config = load_config(TrainConfig, None, [f"steps={STEPS}", "learning_rate=1e-3"])
    schedule = learning_rate_schedule(config)
    np.testing.assert_allclose(
        [x["learning_rate"] for x in found], [float(schedule(i)) for i in range(STEPS)]
    )
    assert float(schedule(1)) == pytest.approx(1e-3)  # one warm-up step of ten
    assert float(schedule(STEPS)) == pytest.approx(1e-4)
    again = in_process(world, "accumulated", gradient_accumulation_steps=4, per_device_batch_size=1)
    assert small.metrics(again.run) == found  # finished: nothing is done twice


def test_microbatches_do_not_change_an_update(world: dict[str, Path]) -> None:
    """Pitfalls 1 and 21, through the whole program: the first steps are the same numbers."""
    runs = [
        in_process(world, f"split-{a}", gradient_accumulation_steps=a, per_device_batch_size=8 // a, steps=3)
        for a in (1, 4)
    ]
    for one, four in zip(*(small.metrics(r.run) for r in runs), strict=True):
        assert one["weight_sum"] == four["weight_sum"]
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)


def test_one_step_by_hand(world: dict[str, Path]) -> None:
    """Loss and update of the first step, computed again from transformers' model and Adam's equations."""
    import torch
    from transformers import AutoModelForCausalLM

    result = in_process(
        world, "by-hand", steps=1, packing="false", gradient_accumulation_steps=1, warmup_steps_fraction=0
    )
    from distillax.data.batches import make_batches
    from distillax.data.examples import load_examples

    examples = load_examples(str(world["data"]), find(world["student"]).tokenizer())
    batch = next(
        make_batches(
            examples,
            examples.encode,
            batch_size=2,
            max_target_length=64,
            packing=False,
            shuffle_seed=0,
            overlong="truncate",
        )
    )
    model = AutoModelForCausalLM.from_pretrained(world["student"], dtype=torch.float32)
    logits = model(torch.tensor(batch["inputs"]), attention_mask=torch.tensor(batch["segment_ids"])).logits
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.tensor(batch["targets"], dtype=torch.long), reduction="none"
    )
    mask = torch.tensor(batch["weights"])
    loss = (nll * mask).sum() / mask.sum()
    loss.backward()
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters())).item()  # type: ignore[arg-type]
    assert result.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    name = "model.layers.1.mlp.up_proj.weight"
    before, gradient = (
        x.detach().numpy() for x in (model.get_parameter(name), model.get_parameter(name).grad)
    )
    clipped = gradient * min(1.0, 1.0 / norm)
    update = -1e-3 * clipped / (np.abs(clipped) + 1e-8)  # Adam's first step, bias corrected
    after = find(result.run).params()["layers"]["up"][1].T
    sure = np.abs(clipped) > 1e-6  # elsewhere rounding decides the sign
    assert sure.mean() > 0.5
    np.testing.assert_allclose(after[sure], (before + update)[sure], atol=3e-5)
    assert np.abs(after - before).max() > 5e-4


def test_bfloat16_follows_float32(world: dict[str, Path]) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        losses[dtype] = small.metrics(in_process(world, f"in-{dtype}", dtype=dtype).run)[-1]["loss"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)


def test_another_configuration_on_the_same_run_is_refused(world: dict[str, Path]) -> None:
    in_process(world, "mine", steps=1)
    with pytest.raises(UserError, match="learning_rate"):
        in_process(world, "mine", steps=1, learning_rate=2e-3)


def test_a_run_does_not_go_on_with_other_data_or_tokens(world, tmp_path, monkeypatch) -> None:
    data = small.questions(tmp_path / "data.jsonl", 20)
    in_process(world, "other-data", steps=4, hf_path=data, checkpoint_period=2)
    run = world["root"] / "runs" / "other-data"
    for step in run.glob("checkpoints/4*"):  # as if it had been killed
        shutil.rmtree(step)
    small.questions(data, 21)
    with pytest.raises(UserError, match=r"data\.jsonl has changed since .*other-data was trained on it"):
        in_process(world, "other-data", steps=4, hf_path=data, checkpoint_period=2)
    small.questions(data, 20)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers, "template_of", lambda tokenizer: tokenizer.chat_template + " ")
        with pytest.raises(
            UserError, match=r"the tokenizer, or its chat template, has changed since .*give the"
        ):
            in_process(world, "other-data", steps=4, hf_path=data, checkpoint_period=2)
    assert in_process(world, "other-data", steps=4, hf_path=data, checkpoint_period=2).step == 4


def test_what_is_likely_a_mistake_is_noted(world: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than the model's texts, weights that round small updates away, and heads that devices
    cannot share (as if there were some: see test_scale.py)."""
    said: list[str] = []
    few = AbstractMesh((1, 1, 3, 1, 1), AXES)
    monkeypatch.setattr(
        "distillax.train.loop.notes_on_heads", lambda _, *models: notes_on_heads(few, *models)
    )
    keys = {"max_target_length": 1024, "weight_dtype": "bfloat16"}
    recipe, *overrides = arguments(world, "noted", steps=1, **keys)
    train(load_config(TrainConfig, recipe, overrides), said.append)
    assert "note: max_target_length is beyond the 512 tokens that the student was made for" in said
    assert "note: bfloat16 master weights do not take updates below some 1/256 of a weight" in said
    assert [
        line for line in said if line.startswith("note: the 4 heads of the student cannot be split over 3")
    ]


def test_a_signal_saves_once_there_is_a_step(
    world: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C: before a step it ends the run, after one it saves first; a second one ends it at once. Whoever
    called it does not go on, be it with the last step that the signal comes."""
    write, signals = Metrics.write, {3: "INT", 7: "INT INT"}  # sent when a step's numbers are written

    def writing(self: Metrics, step: int, values: object) -> None:
        write(self, step, values)  # type: ignore[arg-type]
        for name in signals.pop(step, "").split():
            signal.raise_signal(signal.Signals[f"SIG{name}"])

    monkeypatch.setattr(Metrics, "write", writing)
    handler = signal.getsignal(signal.SIGINT)

    def train_until(ending: type[BaseException], words: str, name: str = "signals") -> None:
        with pytest.raises(ending, match=words):
            in_process(world, name, checkpoint_period=100)
        assert signal.getsignal(signal.SIGINT) is handler

    train_until(
        KeyboardInterrupt, r"^interrupted after step 4 of 10; the checkpoint is in .*/4, and the same"
    )
    assert "stopping after this step, to save" in capfd.readouterr().err
    train_until(KeyboardInterrupt, "^$")
    folder = world["root"] / "runs" / "signals"
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()] == ["4"]
    signals[STEPS] = "INT"
    train_until(KeyboardInterrupt, "^$")
    assert in_process(world, "signals", checkpoint_period=100).step == STEPS
    assert [line["step"] for line in small.metrics(folder)] == list(range(1, STEPS + 1))
    signals[STEPS - 1] = "INT"
    train_until(KeyboardInterrupt, r"^interrupted after step 10 of 10; the checkpoint is in .*/10$", "late")
    signals[STEPS] = "TERM"
    train_until(Stopped, "^stopped by SIGTERM after the last step$", "later")
    for number, ending, words in (
        (signal.SIGINT, KeyboardInterrupt, "^$"),
        (signal.SIGTERM, Stopped, "^stopped by SIGTERM before the first step"),
    ):
        monkeypatch.setattr("distillax.train.loop._announce", lambda *_, n=number: signal.raise_signal(n))
        train_until(ending, words, "never begun")


_DEAF = """
import ctypes, threading
from distillax.parallel import hosts

with hosts.stopping() as stop:
    libc = ctypes.CDLL(None)
    lock = ctypes.create_string_buffer(64)
    {before}
    libc.pthread_mutex_lock(lock)
    threading.Timer(1, print, ["deaf"], {{"flush": True}}).start()
    libc.pthread_mutex_lock(lock)  # for ever, as in a compilation, which no handler of Python's breaks off
"""


@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_in_the_midst_of_a_library_is_one_still(number: int, ending: type[BaseException]) -> None:
    """Orbax makes errors of its own of what is raised while it reads."""
    with pytest.raises(ending), hosts.stopping():
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise ValueError("cannot read the array") from error
    with pytest.raises(ValueError, match="cannot read"), hosts.stopping():
        raise ValueError("cannot read the array")


@pytest.mark.parametrize(("before", "code"), [("", 0), ("stop(1)", -signal.SIGKILL)])
def test_sigterm_while_the_main_thread_hears_nothing(before: str, code: int) -> None:
    """Ends the process at once while there is nothing to save, and not after a step."""
    words = [sys.executable, "-c", _DEAF.format(before=before)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "deaf\n"
        process.terminate()
        try:
            _, errors = process.communicate(timeout=30 if code == 0 else 4)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
    assert process.returncode == code
    assert errors.count("stopped by SIGTERM before the first step of this start") == (code == 0)


@pytest.mark.parametrize(
    ("flags", "dtype"), [("avx512_vnni avx512_bf16 amx_bf16", "bfloat16"), ("avx512_vnni", "float32")]
)
def test_products_are_in_what_the_cpu_is_fast_at(flags, dtype, world, tmp_path, monkeypatch) -> None:
    """Probed when a run starts, and said."""
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor: 0\nflags: fpu sse2 {flags} la57\n", encoding="ascii")
    monkeypatch.setattr(backend, "_CPU_INFO", info)
    backend._cpu_has_bfloat16.cache_clear()
    said: list[str] = []
    recipe, *overrides = arguments(world, f"fast-{dtype}", steps=1, dtype="auto")
    try:
        run = train(load_config(TrainConfig, recipe, overrides), say=said.append).run
    finally:
        backend._cpu_has_bfloat16.cache_clear()
    assert [x for x in said if x.startswith(f"compute: {dtype} on cpu")]
    (exact,) = small.metrics(in_process(world, f"exactly-{dtype}", steps=1).run)
    (found,) = small.metrics(run)
    assert found["loss"] == pytest.approx(exact["loss"], rel=1e-3)
    assert (found["loss"] == exact["loss"]) == (dtype == "float32")


def test_evaluation_split_and_profile(world: dict[str, Path]) -> None:
    """A run that was ended between its last checkpoint and the evaluation there makes up for it."""
    files = {"hf_path": "json", "hf_train_files": world["data"], "hf_eval_files": world["data"]}
    keys = {"steps": 5, "eval_interval": 2, **files, "profiler": "xplane", "profiler_steps": 1}
    result = in_process(world, "watched", **keys)
    lines = small.metrics(result.run)
    assert [x["step"] for x in lines if "eval_loss" in x] == [2, 4, 5]
    assert list((result.run / "profile").rglob("*.xplane.pb"))
    assert "eval_loss" in lines[-1]
    (result.run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    assert in_process(world, "watched", **keys).step == 5
    assert small.metrics(result.run)[-1] == lines[-1]


def test_a_student_that_was_better_before_the_end_is_told(world: dict[str, Path]) -> None:
    """At the end, with the checkpoint of that step as long as it is kept."""
    files = {"hf_path": "json", "hf_train_files": world["data"], "hf_eval_files": world["data"]}
    keys = {"steps": 2, "checkpoint_period": 1, "eval_interval": 1, "learning_rate": 30.0, **files}

    def told(**more: object) -> list[str]:
        said: list[str] = []
        recipe, *overrides = arguments(world, "overfitted", **keys, **more)
        train(load_config(TrainConfig, recipe, overrides), said.append)
        both = f"note: {world['data'].resolve()} is trained on, and measured as held-out data"
        assert said.count(both) == 1
        return [line for line in said if line.startswith("note: held-out")]

    (line,) = told()
    folder = world["root"] / "runs" / "overfitted"
    first, last = (x["eval_loss"] for x in small.metrics(folder) if "eval_loss" in x)
    assert first < last
    assert f"held-out NLL was lowest, {first:.4g} after step 1, and is {last:.4g} after step 2" in line
    assert line.endswith(f"; take {folder}/checkpoints/1, or try a lower learning_rate")
    shutil.rmtree(folder / "checkpoints" / "1")
    without = [json.dumps(x) for x in small.metrics(folder)][:-1]
    (folder / "metrics.jsonl").write_text("".join(f"{x}\n" for x in without))
    assert told()[0].endswith("; try fewer steps, or a lower learning_rate")


def test_held_out_rows_that_cannot_be_measured_are_told_before_the_first_step(world, tmp_path, monkeypatch):
    """Rows that a template refuses, and rows none of which fits: not at the first evaluation."""
    monkeypatch.setattr(loop, "new_state", lambda *_: pytest.fail("the student was read"))
    bad = small.questions(tmp_path / "bad.jsonl", 3)
    bad.write_text(bad.read_text() + json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n")
    files = {"hf_path": "json", "hf_train_files": world["data"], "eval_interval": 2}
    with pytest.raises(UserError, match=r"bad\.jsonl.*no assistant turn.*hf_eval_files names"):
        in_process(world, "bad-rows", hf_eval_files=bad, **files)
    long = {"role": "user", "content": "on and on " * 99}, {"role": "assistant", "content": "Yes."}
    bad.write_text(json.dumps({"messages": long}) + "\n")
    with pytest.raises(UserError, match=r"none of the 1 rows.*hf_eval_files names"):
        in_process(world, "long-rows", hf_eval_files=bad, **files)


def test_held_out_data_that_are_missing_are_told_before_weights_are_read(world, monkeypatch) -> None:
    monkeypatch.setattr(loop, "new_state", lambda *_: pytest.fail("the student was read"))
    files = {"hf_path": "json", "hf_train_files": world["data"], "hf_eval_files": "nowhere.jsonl"}
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        in_process(world, "unheld", eval_interval=2, **files)
    assert not (world["root"] / "runs" / "unheld").exists()


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(world, monkeypatch) -> None:
    bytes_of_it = 12 * sum(x.size for x in weights(world["student"]))  # float32, and two moments
    free = bytes_of_it + 1000
    monkeypatch.setattr(state.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, free=free))
    monkeypatch.setattr(state, "_WORTH_A_LINE", bytes_of_it)
    said: list[str] = []
    recipe, *overrides = arguments(world, "room", steps=1)
    train(load_config(TrainConfig, recipe, overrides), said.append)
    (line,) = [line for line in said if line.startswith("a checkpoint takes ")]
    assert re.fullmatch(
        r"a checkpoint takes 0\.0 GB, 2 are kept; 0\.0 GB are free in /.*/room/checkpoints", line
    )
    free = bytes_of_it - 1
    monkeypatch.setattr(loop, "new_state", lambda *_: pytest.fail("the student was read"))
    with pytest.raises(
        UserError, match=r"but only 0\.0 GB are free in /.*/full/checkpoints; make room there"
    ):
        in_process(world, "full", steps=1)
    assert not (world["root"] / "runs" / "full").exists()


def test_a_base_model_learns_where_the_chat_template_stops(world: dict[str, Path], tmp_path: Path) -> None:
    """Pitfall 7: base weights, another model's tokenizer; the run's generation config ends turns as
    the template does, and keeps no file of the old tokenizer."""
    base = small.chat_model("llama3.1", tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 1}')
    (base / "merges.txt").write_text("of another tokenizer")
    result = in_process(world, "base", load_parameters_path=base, tokenizer_path=world["student"], steps=1)
    found = find(result.run).generation_config["eos_token_id"]
    assert set(found) == {1, find(world["student"]).tokenizer().eos_token_id}
    assert not (result.run / "huggingface" / "merges.txt").exists()


def test_another_familys_tokenizer_is_refused(world: dict[str, Path], tmp_path: Path) -> None:
    other = small.of_another_family(world["student"], tmp_path / "other")
    with pytest.raises(
        UserError,
        match=r"tokenizer_path: .*other is another tokenizer than that of .*student, whose.*; leave it",
    ):
        in_process(world, "other-tokenizer", tokenizer_path=other)


@pytest.mark.parametrize(
    ("words", "added", "fits"),
    [
        (["a", "b", "<end>", "<1>"], ["<end>", "<1>"], True),
        (["a", "b", "<end>", "<tool>", "<new>"], ["<end>", "<tool>", "<new>"], True),
        (["a", "b", "<end>", "<tool>"], [], True),  # as a file without added tokens has it
        (["a", "b", "<end>"], ["<end>"], True),
        (["b", "a", "<end>", "<1>"], ["<end>", "<1>"], False),
        (["a", *(f"c{i}" for i in range(60))], [], False),
    ],
)
def test_a_tokenizer_may_rename_added_tokens_alone(words: list[str], added: list[str], fits: bool) -> None:
    """However few the others are."""

    def tokenizer(words: list[str], added: list[str]) -> Any:
        vocab = {word: i for i, word in enumerate(words)}
        return SimpleNamespace(
            get_vocab=lambda: vocab, get_added_vocab=lambda: {word: vocab[word] for word in added}
        )

    base = tokenizer(["a", "b", "<end>", "<1>"], ["<end>", "<1>"])
    assert tokenizers.extends(tokenizer(words, added), base) == fits


def test_keys_without_effect_are_refused(world: dict[str, Path]) -> None:
    files = {"hf_path": "json", "hf_train_files": world["data"], "eval_interval": 2}
    idle = {"distill_alpha": 0.2}, {"eval_interval": 2}, {"ici_context_parallelism": 2}
    idle = *idle, {"eval_split": "validation", **files}
    idle = *idle, {"eval_cache_path": "x", "eval_split": "validation", **files}
    for changes in (*idle, {"hf_eval_files": world["data"]}, {"eval_split": "train"}):
        with pytest.raises(UserError, match=next(iter(changes))):
            in_process(world, "idle", **changes)


def test_random_weights_only_by_name(world: dict[str, Path]) -> None:
    """Pitfall 25."""
    with pytest.raises(UserError, match="load_parameters_path"):
        in_process(world, "none", load_parameters_path="")
    with pytest.raises(UserError, match="does not exist"):
        in_process(world, "gone", load_parameters_path=world["root"] / "nowhere")
