"""teachers/dataset.py: prompts -> teacher -> Parquet. The teacher is a fake: it has to fail on cue."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distillax.data.prompts import Prompt, load_conversations, load_prompts
from distillax.data.shards import manifest_path, sha256_file
from distillax.errors import UserError
from distillax.progress import progress, waiting
from distillax.teachers import Completion, Request, SamplingParams
from distillax.teachers.dataset import Summary, generate_dataset

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}<nothink>{% endif %}"
    "{% endif %}"
)
SPECIAL = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<nothink>"]


def make_tokenizer(template: str | None = TEMPLATE):
    vocabulary = {text: i for i, text in enumerate([*SPECIAL, *(chr(c) for c in range(32, 127))])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", bos_token="<s>", chat_template=template
    )


class FakeTeacher:
    """Answers depend on (prompt id, generation) alone, and come in an order of its own."""

    def __init__(self, seed=0, fail=(), empty=(), long=(), kill_after=None, skip=()):
        self.seed, self.fail, self.empty, self.long, self.skip = seed, fail, empty, long, skip
        self.kill_after = kill_after
        self.asked: list[Request] = []
        self.opened = 0

    def __call__(self):
        self.opened += 1
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def generate(self, requests, sampling, working):
        working(7)
        requests = list(requests)
        self.asked += requests
        random.Random(self.seed).shuffle(requests)
        for count, request in enumerate(requests):
            if count == self.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if request.prompt_id not in self.skip:
                yield self.answer(request)

    def answer(self, request):
        name, prompt_tokens = request.prompt_id, len(request.prompt_token_ids)
        if name in self.fail:
            return Completion(name, request.generation, "", "error", prompt_tokens, 0, error="HTTP 500")
        if name in self.empty:
            return Completion(name, request.generation, " \n", "stop", prompt_tokens, 1, [5], [-0.5])
        text = f"answer {request.generation} to {request.messages[-1]['content']}"
        reason = "length" if name in self.long else "stop"
        # As a server that gives no token ids for every second answer.
        ids = [5] * len(text) if request.generation % 2 == 0 else None
        logprobs = [-0.25] * len(text) if ids else None
        return Completion(name, request.generation, text, reason, prompt_tokens, len(text), ids, logprobs)


def make_prompts(count=40):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "and?"},
    ]
    return [Prompt("talk", talk, 0)] + [
        Prompt(f"p{i}", [{"role": "user", "content": f"question {i}"}], i) for i in range(1, count)
    ]


def generate(teacher, output, prompts=None, tokenizer=None, **changes):
    options = {
        "sampling": SamplingParams(temperature=0.7, seed=3),
        "num_generations": 2,
        "max_prefill_length": 64,
        "provenance": {"teacher": "fake", "prompt_source": "here"},
        "show_progress": False,
    }
    prompts = make_prompts() if prompts is None else prompts
    return generate_dataset(
        teacher, tokenizer or make_tokenizer(), prompts, output_file=output, **(options | changes)
    )


def read(output):
    return pq.read_table(output).to_pylist()


def read_manifest(output):
    return json.loads(manifest_path(output).read_text())


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "new" / "out.parquet"


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "out.parquet"
    generate(FakeTeacher(), path)
    return path


# The data set


def test_rows_manifest_and_summary(output):
    teacher = FakeTeacher(empty=["p1"], long=["p2"])
    summary = generate(teacher, output)
    rows = read(output)
    assert [(row["prompt_id"], row["generation"]) for row in rows[:4]] == [
        ("talk", 0), ("talk", 1), ("p2", 0), ("p2", 1)
    ]  # fmt: skip
    text = "answer 0 to and?"
    assert rows[0] == {
        "messages": [*make_prompts()[0].messages, {"role": "assistant", "content": text}],
        "prompt_id": "talk",
        "generation": 0,
        "finish_reason": "stop",
        "prompt_tokens": len(rows[0]["prompt_token_ids"]),
        "completion_tokens": len(text),
        "prompt_token_ids": teacher.asked[0].prompt_token_ids,
        "completion_token_ids": [5] * len(text),
        "logprobs": [-0.25] * len(text),
        "truncated": False,
    }
    assert rows[1]["completion_token_ids"] is None and rows[1]["logprobs"] is None
    assert [row["prompt_id"] for row in rows if row["truncated"]] == ["p2", "p2"]

    tokens = sum(row["completion_tokens"] for row in rows) + 2
    assert replace(summary, seconds=0, tokens_per_second=0) == Summary(
        prompts=40, left_out_long=0, answers=78, tokens=tokens, truncated=2, failed=0, empty=2
    )
    assert summary.tokens_per_second == pytest.approx(tokens / summary.seconds)
    found = read_manifest(output)
    assert found["sha256"] == sha256_file(output) and found["counts"]["answers"] == 78
    assert found["config"]["sampling"]["seed"] == 3 and found["config"]["provenance"]["teacher"] == "fake"
    assert not output.with_name("out.parquet.shards").exists()
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.manifest.json", "out.parquet"]


def test_the_file_is_read_by_datasets_and_no_assistant_follows_another(expected, tmp_path):
    """Pitfall 18."""
    loaded: Any = datasets.load_dataset(
        "parquet", data_files=str(expected), split="train", cache_dir=str(tmp_path)
    )
    assert len(loaded) == 80
    for row in loaded:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    conversations = load_conversations(str(expected))
    assert [conversations[i] for i in range(80)] == [row["messages"] for row in loaded]
    assert conversations.extras(0)["completion_token_ids"] == loaded[0]["completion_token_ids"]


def test_its_prompts_are_the_prompts_it_was_made_of(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    prompts = load_prompts(str(source))
    generate(FakeTeacher(), tmp_path / "out.parquet", prompts, num_generations=1)
    assert load_prompts(str(tmp_path / "out.parquet")) == prompts


def test_prompts_that_are_too_long_are_left_out_and_counted(output):
    prompts = [*make_prompts(3), Prompt("long", [{"role": "user", "content": "x" * 62}], 3)]
    summary = generate(FakeTeacher(), output, prompts)
    assert (summary.prompts, summary.left_out_long, summary.answers) == (4, 1, 6)
    assert any("4 (1 too long, left out)" in line for line in summary.lines())
    other = output.with_name("other.parquet")
    exact = generate(FakeTeacher(), other, prompts, max_prefill_length=65)  # 62 and three special ones
    assert exact.left_out_long == 0
    # No room for an answer is too long as well.
    sampling = SamplingParams(max_length=65)
    tight = generate(
        FakeTeacher(), output.with_name("tight.parquet"), prompts, max_prefill_length=65, sampling=sampling
    )
    assert tight.left_out_long == 1
    with pytest.raises(UserError, match="all 4 prompts have more than 3 tokens"):
        generate(FakeTeacher(), output.with_name("none.parquet"), prompts, max_prefill_length=3)


def test_truncated_answers_are_dropped_by_the_flag_and_counted(output):
    summary = generate(FakeTeacher(long=["p2"]), output, keep_truncated=False)
    assert summary.truncated == 2 and summary.answers == 78
    assert "p2" not in {row["prompt_id"] for row in read(output)}


def test_how_prompts_are_rendered(output):
    teacher = FakeTeacher()
    generate(teacher, output, enable_thinking=False)
    text = "<|user|>hi<|end|><|assistant|>ho<|end|><|user|>and?<|end|><|assistant|><nothink>"
    assert teacher.asked[0].prompt_text == text
    assert "".join(make_tokenizer().convert_ids_to_tokens(teacher.asked[0].prompt_token_ids)) == text
    plain = FakeTeacher()
    generate(plain, output.with_name("plain.parquet"), use_chat_template=False)
    assert plain.asked[0].prompt_text == "hi\nho\nand?"
    assert plain.asked[0].prompt_token_ids[0] == 0  # bare text begins with BOS


def test_no_chat_template(output):
    with pytest.raises(UserError, match="chat template"):
        generate(FakeTeacher(), output, tokenizer=make_tokenizer(template=None))
    assert generate(FakeTeacher(), output, tokenizer=make_tokenizer(template=None), use_chat_template=False)


def test_nothing_to_keep_is_an_error_that_says_why(output):
    names = [prompt.prompt_id for prompt in make_prompts()]
    with pytest.raises(UserError, match=r"80 requests failed \(the first: HTTP 500\)"):
        generate(FakeTeacher(fail=names), output)
    assert not output.exists()
    assert generate(FakeTeacher(), output).answers == 80


def test_a_teacher_that_forgets_a_request_is_a_fault(output):
    with pytest.raises(RuntimeError, match=r"nothing for 2 requests, such as \('p7', 0\)"):
        generate(FakeTeacher(skip=["p7"]), output)
    again = FakeTeacher()
    generate(again, output)
    assert [request.prompt_id for request in again.asked] == ["p7", "p7"]


# Going on


@pytest.mark.parametrize("kill_after", [1, 66, 79])
def test_killed_and_started_again(output, expected, kill_after):
    """Pitfall 26. 80 requests are two blocks, of 64 and 16; the order of answers differs between the runs."""
    command = [sys.executable, __file__, str(output), str(kill_after)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert out.returncode == -signal.SIGKILL, out.stderr
    assert not output.exists()
    done = 64 * output.with_name("out.parquet.shards").joinpath("shard-00000.json").exists()
    done += 16 * output.with_name("out.parquet.shards").joinpath("shard-00001.json").exists()
    teacher = FakeTeacher(seed=9)
    generate(teacher, output)
    assert len(teacher.asked) == 80 - done
    assert output.read_bytes() == expected.read_bytes()
    assert manifest_path(output).read_bytes() == manifest_path(expected).read_bytes()


def test_an_exception_in_the_teacher_loses_nothing(output, expected):
    class Broken(FakeTeacher):
        def answer(self, request):
            if request.prompt_id == "p30":
                raise OSError("gone")
            return super().answer(request)

    with pytest.raises(OSError, match="gone"):
        generate(Broken(), output)
    teacher = FakeTeacher()
    generate(teacher, output)
    assert 0 < len(teacher.asked) < 80
    assert output.read_bytes() == expected.read_bytes()


def test_done_work_is_not_done_again(output, expected):
    first = generate(FakeTeacher(), output)
    teacher = FakeTeacher()
    again = generate(teacher, output)
    assert teacher.opened == 0
    assert again == replace(first, seconds=0.0, tokens_per_second=0.0, had_before=80)
    assert output.read_bytes() == expected.read_bytes()
    short = output.with_name("short.parquet")
    generate(FakeTeacher(empty=["p1"], long=["p2"]), short, keep_truncated=False)
    again = generate(FakeTeacher(), short, keep_truncated=False)
    assert (again.answers, again.had_before) == (76, 80)  # two are empty, and two were cut off


def test_failed_requests_are_asked_again_at_the_next_start(output, expected):
    summary = generate(FakeTeacher(fail=["p3", "p20"]), output)
    assert (summary.failed, summary.answers) == (4, 76)
    assert any("start again to retry" in line for line in summary.lines())
    assert read_manifest(output)["counts"]["failed"] == 4
    teacher = FakeTeacher()
    summary = generate(teacher, output)
    assert {request.prompt_id for request in teacher.asked} == {"p3", "p20"}
    assert (summary.failed, summary.answers) == (0, 80)
    assert f"{'answers':<18}80 (76 requests had theirs before)" in summary.lines()
    assert output.read_bytes() == expected.read_bytes()
    assert not output.with_name("out.parquet.shards").exists()


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"sampling": SamplingParams(temperature=0.8, seed=3)}, "temperature"),
        ({"num_generations": 3}, "num_generations"),
        ({"provenance": {"teacher": "other", "prompt_source": "here"}}, "teacher"),
        ({"prompts": make_prompts(39)}, "prompts.count, prompts.sha256"),
        ({"tokenizer": make_tokenizer(TEMPLATE + " ")}, "chat_template"),
        ({"keep_truncated": False, "enable_thinking": True}, "enable_thinking, keep_truncated"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_another_configuration_is_refused(output, complete, changes, keys):
    generate(FakeTeacher(fail=() if complete else ["p3"]), output)
    if not complete:
        output.unlink()
        manifest_path(output).unlink()
    teacher = FakeTeacher()
    shown = ", ".join(re.escape(key) + r"(=.+ \(now .+\))?" for key in keys.split(", "))
    with pytest.raises(UserError, match=rf"out\.parquet.* configuration: {shown}; give"):
        generate(teacher, output, **changes)
    assert teacher.opened == 0


def test_a_killed_end_is_finished_without_the_teacher(output, expected):
    """Killed after the Parquet file and before its manifest, or before the old one was replaced."""
    generate(FakeTeacher(fail=["p3"]), output)
    old_manifest = manifest_path(output).read_bytes()
    generate(FakeTeacher(fail=["p3"]), output)  # the shards stay while something has failed
    for manifest in (None, old_manifest):
        output.write_bytes(expected.read_bytes())
        if manifest is None:
            manifest_path(output).unlink()
        else:
            manifest_path(output).write_bytes(manifest)
        generate(FakeTeacher(fail=["p3"]), output)
        assert read_manifest(output)["sha256"] == sha256_file(output) != sha256_file(expected)


def test_files_of_somebody_else_are_not_overwritten(output):
    output.parent.mkdir()
    output.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"is there without a out\.manifest\.json"):
        generate(FakeTeacher(), output)
    assert output.read_bytes() == b"mine"
    output.unlink()
    generate(FakeTeacher(), output)
    output.write_bytes(b"changed")
    with pytest.raises(UserError, match="has changed since"):
        generate(FakeTeacher(), output)
    manifest_path(output).write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        generate(FakeTeacher(), output)
    with pytest.raises(UserError, match=r"must end in \.parquet"):
        generate(FakeTeacher(), output.with_suffix(".json"))


def test_two_writers_of_one_output(output):
    class Nested(FakeTeacher):
        def answer(self, request):
            with pytest.raises(UserError, match="another process is writing"):
                generate(FakeTeacher(), output)
            return super().answer(request)

    generate(Nested(), output, make_prompts(2))
    assert len(read(output)) == 4


# Progress


def test_progress_without_a_terminal_is_plain_lines(monkeypatch):
    """The first unit takes a minute, of which nothing is said of the others."""
    now = iter([100.0, *[160.0] * 3, *[165.0] * 2, *[170.0] * 2])
    monkeypatch.setattr("distillax.progress.time", SimpleNamespace(monotonic=lambda: next(now)))
    stream = io.StringIO()
    with progress(5, "work", done=1, stream=stream, interval=0.0) as shown:
        shown.update(1, loss=1.23456, name="x")
        shown.update(1)
        shown.update(2)
    assert stream.getvalue().splitlines() == [
        "work: 2/5  loss=1.235 name=x  0:01:00",
        "work: 3/5  loss=1.235 name=x  0:01:05  0:00:10 left",
        "work: 5/5  loss=1.235 name=x  0:01:10",
    ]


def test_progress_keeps_to_its_interval_and_prints_the_end():
    stream = io.StringIO()
    with progress(1000, "work", stream=stream, interval=60.0) as shown:
        for _ in range(1000):
            shown.update()
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["work: 1000/1000"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_a_bar():
    stream = Terminal()
    with progress(4, "work", done=1, stream=stream) as shown:
        shown.update(3, loss=1.5)
    assert "4/4" in stream.getvalue() and "loss=1.5" in stream.getvalue()


@pytest.mark.parametrize(("stream", "shown"), [(Terminal(), True), (io.StringIO(), False)])
def test_what_cannot_say_how_far_it_is_has_its_time_shown_on_a_terminal(stream, shown):
    with waiting("compiling", stream=stream):
        time.sleep(1.2)  # in which it is drawn anew by itself
    said = stream.getvalue()
    assert ("compiling" in said and "0:00:01" in said) if shown else not said


def test_progress_counts_answers_that_failed_or_were_cut_off(output, capsys):
    generate(FakeTeacher(long=["p2"]), output, show_progress=True)
    assert "failed=0 truncated=2" in capsys.readouterr().err


def test_progress_tells_of_answers_that_are_unfinished(output, capsys, monkeypatch):
    monkeypatch.setattr("distillax.teachers.dataset.progress", partial(progress, interval=0.0))
    generate(FakeTeacher(), output, show_progress=True)
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("generate: 0/80  tokens=7 ") and "left" not in first
    assert second.startswith("generate: 1/80  tokens=") and "left" not in second


def test_progress_that_is_switched_off_shows_nothing(capsys):
    with progress(4, "work", enabled=False) as shown:
        shown.update(4)
    assert capsys.readouterr() == ("", "")


if __name__ == "__main__":
    generate(FakeTeacher(seed=5, kill_after=int(sys.argv[2])), Path(sys.argv[1]))
