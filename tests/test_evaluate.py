"""Scores against float64 arithmetic on transformers' logits, also where the vocabularies differ."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
import torch
from transformers import AutoModelForCausalLM

import distillax
from distillax.cli import evaluation
from distillax.data.examples import load_examples
from distillax.data.shards import manifest_path, sha256_file
from distillax.data.targets import Layout
from distillax.errors import UserError
from distillax.evaluate import Expected, evaluate, finished_answers, with_tokenizer
from distillax.models import tokenizers
from distillax.teachers.capture import CaptureConfig, capture
from distillax.train.objectives import expect_batch


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)


def test_weights_in_the_dtype_of_products_change_no_score(tmp_path: Path) -> None:
    folder = small.chat_model("qwen3", tmp_path / "model")
    data = str(small.questions(tmp_path / "data.jsonl", 9))
    stored, narrow = distillax.load(folder), distillax.load(folder, products="bfloat16")
    assert stored.params["layers"]["up"].dtype == np.float32
    assert narrow.params["layers"]["up"].dtype == jnp.bfloat16 and narrow.params["embed"].dtype == np.float32
    a, b = (evaluate(model, data, dtype="bfloat16", show_progress=False) for model in (stored, narrow))
    assert a == b
    with pytest.raises(UserError, match="products='int8' is no dtype of products; give auto, float32"):
        distillax.load(folder, products="int8")
    with pytest.raises(UserError, match="dtype='fp' is none of weights; give float32"):
        distillax.load(folder, dtype="fp")


def in_float64(student: Path, teacher: Path, data: Path) -> dict[str, float]:
    """The scores from transformers' logits. C5: ids that one of the two alone has get no probability, but in
    the teacher's own NLL."""
    tokenizer = distillax.load(student).tokenizer
    examples = load_examples(str(data), tokenizer)
    theirs = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (student, teacher)]
    nll, kl, agree, own, count, size = 0.0, 0.0, 0, 0.0, 0, 0
    for row in range(len(examples)):
        example = examples.encode(row)
        with torch.no_grad():
            found = [
                m(torch.tensor(example.tokens[None], dtype=torch.long)).logits[0].numpy() for m in theirs
            ]
        log_q, log_p = (log_softmax(z[:-1, : small.VOCABULARY]) for z in found)
        targets, mask = example.tokens[1:], example.loss_mask[1:]
        nll -= log_q[np.arange(len(targets)), targets][mask].sum()
        own -= log_softmax(found[1][:-1])[np.arange(len(targets)), targets][mask].sum()
        kl += (np.exp(log_p) * (log_p - log_q)).sum(-1)[mask].sum()
        agree += (log_p.argmax(-1) == log_q.argmax(-1))[mask].sum()
        count += mask.sum()
        messages = json.loads(data.read_text().splitlines()[row])["messages"]
        size += sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
    return {
        "nll": nll / count,
        "perplexity": np.exp(nll / count),
        "bits_per_byte": nll / np.log(2) / size,
        "tokens": count,
        "kl_teacher_student": kl / count,
        "top1_agreement": agree / count,
        "teacher_nll": own / count,
        "left_out_long": 0,
        "without_answer": 0,
    }


@pytest.mark.parametrize("padding_rows", [0, 24])
def test_scores_equal_float64(padding_rows: int, tmp_path: Path) -> None:
    """Against the teacher's weights, and against a cache of all that it expects; and of a model against
    itself. What rounding costs a cache is in docs/cached.md."""
    student = small.chat_model("qwen3", tmp_path / "student")
    rows = small.VOCABULARY + padding_rows
    teacher = small.chat_model("llama3.1", tmp_path / "teacher", seed=1, rows=rows)
    data = small.questions(tmp_path / "data.jsonl", 9)
    wanted = in_float64(student, teacher, data)
    models = [distillax.load(student), distillax.load(teacher)]
    how: dict[str, Any] = {"dtype": "float32", "show_progress": False}
    found = evaluate(models[0], str(data), teacher=models[1], **how).as_dict()
    assert found["tokens"] == wanted["tokens"]
    assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-4)
    itself = evaluate(models[1], str(data), teacher=models[1], **how)
    assert itself.kl_teacher_student == pytest.approx(0, abs=1e-6) and itself.top1_agreement == 1

    cache = tmp_path / "cache"
    all_ids = CaptureConfig(format="topk", k=rows, dtype="float32")
    capture(str(teacher), str(data), cache, all_ids, show_progress=False)
    found = evaluate(models[0], str(data), teacher_cache=cache, **how).as_dict()
    assert found.pop("note") == (
        f"KL is a lower bound, from a cache of the {rows} likeliest ids and one bucket of all others"
    )
    assert found.keys() == wanted.keys()
    assert found.pop("kl_teacher_student") == pytest.approx(wanted.pop("kl_teacher_student"), abs=1e-3)
    assert found == pytest.approx(wanted, rel=1e-3)
    itself = evaluate(models[1], str(data), teacher_cache=cache, **how)
    assert 0 <= itself.kl_teacher_student <= 1e-3 and itself.top1_agreement == 1
    assert itself.teacher_nll == pytest.approx(itself.nll, rel=1e-3)


def test_kl_from_few_ids_of_the_teacher(tmp_path: Path) -> None:
    """Of the likeliest a lower bound, which more ids bring closer; of sampled ones right in the mean."""
    student = small.chat_model("qwen3", tmp_path / "student")
    teacher = small.chat_model("llama3.1", tmp_path / "teacher", seed=1)
    data = small.questions(tmp_path / "data.jsonl", 9)
    wanted, model = in_float64(student, teacher, data), distillax.load(student)

    def found(name: str, **config: Any) -> dict[str, Any]:
        how = CaptureConfig(dtype="float32", **config)
        capture(str(teacher), str(data), tmp_path / name, how, show_progress=False)
        settings: dict[str, Any] = {"dtype": "float32", "show_progress": False}
        return evaluate(model, str(data), teacher_cache=tmp_path / name, **settings).as_dict()

    bounds = [found(f"top{k}", format="topk", k=k)["kl_teacher_student"] for k in (2, 64)]
    assert 0 < bounds[0] < bounds[1] < wanted["kl_teacher_student"]
    draws = [found(f"seed{seed}", k=8, seed=seed) for seed in range(8)]
    assert draws[0]["note"].startswith("KL is an estimate from a cache of 8 sampled ids a token")
    assert all("top1_agreement" not in one for one in draws)
    assert draws[0]["teacher_nll"] == pytest.approx(wanted["teacher_nll"], abs=1 / 512)
    kl = np.array([one["kl_teacher_student"] for one in draws])
    error = kl.std(ddof=1) / np.sqrt(len(kl))
    # The entropy is kept in steps of 1/1024: its rounding is the same whatever the seed.
    assert 0 < error < 0.05 and abs(kl.mean() - wanted["kl_teacher_student"]) < 4 * error + 1 / 2048


def test_a_cache_that_does_not_fit_what_is_measured(tmp_path: Path) -> None:
    model = distillax.load(folder := small.chat_model("qwen3", tmp_path / "model"))
    data, more = small.questions(tmp_path / "data.jsonl", 5), small.questions(tmp_path / "more.jsonl", 6)

    def cached(name: str, **config: Any) -> Path:
        how = CaptureConfig(format="topk", k=4, dtype="float32", **config)
        capture(str(folder), str(data), tmp_path / name, how, show_progress=False)
        return tmp_path / name

    cache, how = cached("cache"), {"dtype": "float32", "show_progress": False}
    with pytest.raises(UserError, match="a teacher and a cache of one are both given"):
        evaluate(model, str(data), teacher=model, teacher_cache=cache)
    with pytest.raises(UserError, match=r"^.*more\.jsonl, line 6 .*has no targets for this example"):
        evaluate(model, str(more), teacher_cache=cache, **how)
    with pytest.raises(UserError, match="captured at temperature 2, and KL is measured at 1; capture"):
        evaluate(model, str(data), teacher_cache=cached("warm", temperature=2.0), **how)
    other = distillax.load(small.of_another_family(folder, tmp_path / "other"))
    with pytest.raises(UserError, match="was captured with the tokenizer of .*model, which is not the"):
        evaluate(other, str(data), teacher_cache=cache, **how)
    whole = evaluate(model, str(data), teacher_cache=cache, **how)
    for file in ("targets.parquet", "manifest.json"):  # stands for its folder
        assert evaluate(model, str(data), teacher_cache=cache / file, **how) == whole
    lengths = [len(load_examples(str(data), model.tokenizer).encode(row).tokens) - 1 for row in range(5)]
    short = cached("short", max_target_length=sorted(lengths)[3])
    found = evaluate(model, str(data), teacher_cache=short, **how)
    assert found.tokens < whole.tokens  # the longest row is left out
    manifest = json.loads((cache / "manifest.json").read_text())
    table, unknown = pq.read_table(cache / "targets.parquet"), tmp_path / "unknown"
    layout = Layout("topk", 4, manifest["vocab_size"])
    encoded = []
    for row, blob in enumerate(table["data"].to_pylist()):
        positions = int(np.frombuffer(blob, "<u4", 1)[0]) // 4
        one = layout.decode(blob, positions)
        one.numbers[0, 1] = np.nan if row == 0 else one.numbers[0, 1]
        encoded.append(layout.encode(one))
    unknown.mkdir()
    changed = table.set_column(1, "data", pa.array(encoded, pa.large_binary()))
    pq.write_table(changed, unknown / "targets.parquet")
    manifest["sha256"] = sha256_file(unknown / "targets.parquet")
    (unknown / "manifest.json").write_text(json.dumps(manifest))
    found = evaluate(model, str(data), teacher_cache=unknown, **how).as_dict()
    assert "teacher_nll" not in found and found["kl_teacher_student"] == whole.kl_teacher_student


def test_a_teacher_is_run_once_for_several_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its hidden states serve no other data, teacher or dtype."""
    teachers = [distillax.load(small.chat_model("llama3.1", tmp_path / f"t{n}", seed=n)) for n in (1, 4)]
    students = [distillax.load(small.chat_model("qwen3", tmp_path / f"s{n}", seed=n)) for n in (2, 3)]
    data = [small.questions(tmp_path / f"{n}.jsonl", n) for n in (9, 5)]
    runs: list[object] = []

    def counted(*args: object, **more: object) -> object:
        runs.append(args)
        return expect_batch(*args, **more)

    def scores(student, file=0, teacher=0, dtype="float32", expected: Expected | None = None):
        given = {"teacher": teachers[teacher], "dtype": dtype, "show_progress": False}
        return evaluate(students[student], str(data[file]), **given, expected=expected).as_dict()

    monkeypatch.setattr("distillax.evaluate.expect_batch", counted)
    expected = Expected()
    for case, runs_now in (
        ((0,), True),
        ((1,), False),
        ((0, 1), True),
        ((1, 1), False),
        ((0, 0, 1), True),
        ((0, 0, 1, "bfloat16"), True),
    ):
        before = len(runs)
        assert scores(*case, expected=expected) == pytest.approx(scores(*case), rel=1e-5), case
        assert (len(runs) > before) == runs_now, case
    monkeypatch.setattr("distillax.evaluate._MOST_KEPT", 0)
    for _ in range(2):  # nothing is kept, and all is run again
        before = len(runs)
        assert scores(0, expected=expected) == pytest.approx(scores(0), rel=1e-5)
        assert len(runs) > before


def test_long_rows_are_left_out_of_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = distillax.load(small.chat_model("qwen3", tmp_path / "model"))
    data = small.questions(tmp_path / "data.jsonl", 9)
    lengths = [len(load_examples(str(data), model.tokenizer).encode(row).tokens) - 1 for row in range(9)]
    limit = sorted(lengths)[5]
    scores = evaluate(model, str(data), max_target_length=limit, dtype="float32")
    short = tmp_path / "short.jsonl"
    rows = data.read_text().splitlines()
    short.write_text("\n".join(r for r, n in zip(rows, lengths, strict=True) if n <= limit))
    long = sum(n > limit for n in lengths)
    assert f"{long} rows longer" in capsys.readouterr().err
    left = scores.as_dict()
    assert (left["left_out_long"], left["without_answer"]) == (long, 0)
    same = evaluate(model, str(short), max_target_length=limit, dtype="float32", show_progress=False)
    assert same.as_dict()["left_out_long"] == 0
    assert scores.tokens == same.tokens and scores.bits_per_byte == pytest.approx(
        same.bits_per_byte, rel=1e-6
    )


def test_thoughts_that_the_template_drops_are_not_counted(tmp_path: Path) -> None:
    tokenizer = distillax.load(small.chat_model("qwen3", tmp_path / "model")).tokenizer
    drops = "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}"
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>" + drops + "<|im_end|>{% endfor %}"
    turns = [
        ("user", "q"),
        ("assistant", "<think>long</think>one"),
        ("user", "q"),
        ("assistant", "</think>two"),
    ]
    file = tmp_path / "thoughts.jsonl"
    file.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
    assert load_examples(str(file), tokenizer).answer_bytes(0) == len("one" + "</think>two")
    more = json.dumps({"messages": [{"role": r, "content": c} for r, c in [*turns, ("user", "bye")]]})
    file.write_text(more)
    assert load_examples(str(file), tokenizer).answer_bytes(0) == len("one" + "</think>two")
    tokenizer.chat_template = tokenizer.chat_template.replace("if not loop.last else m.content ", "")
    assert load_examples(str(file), tokenizer).answer_bytes(0) == len("one" + "two")
    blank = [("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "  ")]  # nothing learnt of it
    file.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in blank]}))
    assert load_examples(str(file), tokenizer).answer_bytes(0) == len("one")


def test_a_base_model_is_given_a_chat_template_of_its_own_tokens(tmp_path: Path) -> None:
    chatty = small.chat_model("qwen3", tmp_path / "chat")
    model = distillax.load(small.chat_model("qwen3", tmp_path / "base"))
    assert with_tokenizer(model, str(chatty)) is model  # it has one
    model.tokenizer.chat_template = None
    assert with_tokenizer(model, str(chatty)).tokenizer.chat_template
    with pytest.raises(UserError, match="has no tokenizer; give --tokenizer-path"):
        with_tokenizer(dataclasses.replace(model, tokenizer=None), None)
    other = small.of_another_family(chatty, tmp_path / "other")
    with pytest.raises(
        UserError,
        match=r"^--tokenizer-path: .*other is another tokenizer than that of .*base, whose .*; give one of",
    ):
        with_tokenizer(model, str(other))


def test_models_without_tokenizer_and_data_without_answers_are_named(tmp_path: Path) -> None:
    model = distillax.load(small.chat_model("qwen3", tmp_path / "model"))
    data = str(small.questions(tmp_path / "data.jsonl", 3))
    with pytest.raises(UserError, match="the teacher has no tokenizer"):
        evaluate(model, data, teacher=dataclasses.replace(model, tokenizer=None))
    empty = tmp_path / "empty.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]
    empty.write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match=r"empty\.jsonl has no answer within 2048 tokens"):
        evaluate(model, str(empty), show_progress=False)


@pytest.mark.parametrize("how", ["home", "folder", "pattern", "file of a folder"])
def test_the_ids_that_a_teacher_sampled_are_found_however_the_file_is_named(
    how, tmp_path, monkeypatch
) -> None:
    tokenizer = distillax.load(small.chat_model("qwen3", tmp_path / "model")).tokenizer
    folder = tmp_path / "data"
    folder.mkdir()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    config = {"enable_thinking": False, "use_chat_template": True}
    config["tokenizer"] = tokenizers.fingerprint(tokenizer)
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"messages": [turns], "completion_token_ids": [[5, 6, 7]]}), folder / name)
        manifest_path(folder / name).write_text(json.dumps({"config": {**config, "file": name}}))
    monkeypatch.setenv("HOME", str(tmp_path))
    source, files = {
        "home": ("~/data/a.parquet", None),
        "folder": (str(folder), None),
        "pattern": ("parquet", str(folder / "*.parquet")),
        "file of a folder": (str(folder), "b.parquet"),
    }[how]
    found = load_examples(source, tokenizer, files=files)
    assert found.sampled_ids and found.enable_thinking is False
    assert found.encode(0).tokens[-4:-1].tolist() == [5, 6, 7]
    config["enable_thinking"] = True
    manifest_path(folder / "b.parquet").write_text(json.dumps({"config": config}))
    mixed = load_examples(str(folder), tokenizer)
    without = load_examples(str(folder), tokenizer, enable_thinking=False)
    assert mixed.fingerprint() != without.fingerprint()  # another prompt, and so other tokens
    assert mixed.sampled_ids and mixed.enable_thinking is None  # they do not agree about it
    manifest_path(folder / "b.parquet").unlink()
    alone = load_examples(str(folder), tokenizer)
    assert not alone.sampled_ids and alone.fingerprint() != mixed.fingerprint()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    model = distillax.load(small.chat_model("qwen3", tmp_path / "model"))
    other = distillax.load(small.chat_model("qwen3", tmp_path / "other"))
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="different tokenizers"):
        evaluate(model, str(small.questions(tmp_path / "data.jsonl", 3)), teacher=other)


def test_answers_are_asked_for_as_those_in_the_data_were(tmp_path: Path) -> None:
    """Without thinking, where the data was generated so: by its manifest."""
    data = tmp_path / "answers.parquet"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    pq.write_table(pa.table({"messages": [turns]}), data)
    manifest_path(data).write_text(json.dumps({"config": {"enable_thinking": False}}))
    asked: list[dict[str, Any]] = []

    class Model:
        def generate(self, prompts: list[Any], **how: Any) -> list[str]:
            asked.append(how)
            return ["Ho"] * len(prompts)

    args = argparse.Namespace(
        data=str(data),
        data_split="train",
        data_name=None,
        data_columns=None,
        answers=1,
        enable_thinking=None,
        max_new_tokens=8,
        hf_access_token=None,
        max_target_length=64,
    )
    found = evaluation._answers({"student": Model()}, args)
    assert found == [{"prompt": "Hi", "student": "Ho"}] and asked[0]["enable_thinking"] is False
    evaluation._answers({"student": Model()}, argparse.Namespace(**{**vars(args), "enable_thinking": True}))
    assert asked[1]["enable_thinking"] is True


def test_prompts_are_shown_whose_answer_the_teacher_finished(tmp_path: Path) -> None:
    """Each once, be any of its answers whole; and then the others."""
    said = [("a", "length"), ("b", "stop"), ("c", "length"), ("c", "stop"), ("d", "length"), ("b", "stop")]
    turns = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": f"{p} {why}"}] for p, why in said
    ]
    columns = {"messages": turns, "finish_reason": [reason for _, reason in said]}
    pq.write_table(pa.table(columns), tmp_path / "held_out.parquet")

    def shown(number: int) -> str:
        found = finished_answers(str(tmp_path / "held_out.parquet"), number)
        prompts = [prompt for prompt, _ in found]
        assert all(answer.startswith(f"{prompt[-1]['content']} stop") for prompt, answer in found[:2])
        assert all([turn["role"] for turn in prompt] == ["user"] for prompt in prompts)
        return "".join(prompt[-1]["content"] for prompt in prompts)

    assert [shown(n) for n in (0, 1, 2, 3, 9)] == ["", "b", "bc", "bca", "bcad"]


def test_of_what_a_teacher_wrote_its_own_turn_is_learnt_and_measured(tmp_path: Path) -> None:
    """Those before it are the source's."""
    tokenizer = distillax.load(small.chat_model("qwen3", tmp_path / "model")).tokenizer
    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": r, "content": c} for r, c in zip(roles, ("q", "gold", "more", "teacher"), strict=True)]
    file = tmp_path / "answers.parquet"
    columns = {"messages": [turns], "prompt_id": ["a"], "generation": [0]}
    pq.write_table(pa.table(columns), file)

    def learnt(train_on: Any = None) -> tuple[str, int]:
        examples = load_examples(str(file), tokenizer, train_on=train_on)
        example = examples.encode(0)
        return tokenizer.decode(example.tokens[example.loss_mask]), examples.answer_bytes(0)

    text, size = learnt()
    assert "gold" in text and "teacher" in text and size == len("goldteacher")
    manifest_path(file).write_text(json.dumps({"config": {"enable_thinking": None}}))
    text, size = learnt()
    assert "gold" not in text and "teacher" in text and size == len("teacher")
    assert learnt("assistant")[1] == len("goldteacher")
    manifest_path(file).unlink()  # as where one of several files was copied alone
    pq.write_table(pa.table(columns | {"finish_reason": ["stop"]}), file)
    assert learnt() == (text, size)
