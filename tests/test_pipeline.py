"""`distillax run` on tiny models: what is done again after which change, and after a kill."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import small
from fake_server import FakeServer, Fault, running
from test_capture import Scores

import distillax
from distillax.checkpoints.source import Source, find
from distillax.config import PipelineConfig
from distillax.data.prompts import Prompt, split_prompts
from distillax.data.targets import TargetStore
from distillax.errors import UserError
from distillax.evaluate import evaluate
from distillax.pipeline import run
from distillax.preflight import by_keys, with_keys
from distillax.report import tables
from distillax.settings import load_config
from distillax.teachers.capture import capture


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipeline")
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(24)))
    return {"root": root, "teacher": small.chat_model("qwen3", root / "teacher"), "prompts": prompts}


def words(world: dict[str, Path], **changes: object) -> list[str]:
    keys: dict[str, object] = {
        "run_name": "run",
        "base_output_directory": world["root"] / "runs",
        "teacher": world["teacher"],
        "prompts.path": world["prompts"],
        "prompts.held_out": 4,
        "student.layers": 2,
        "generate.max_new_tokens": 6,
        "generate.max_prefill_length": 64,
        "train.steps": 4,
        "train.checkpoint_period": 2,
        "train.max_target_length": 64,
        "train.per_device_batch_size": 2,
        "evaluate.answers": 1,
    }
    return [f"{key}={value}" for key, value in {**keys, **changes}.items()]


def stages(
    world: dict[str, Path], said: list[str] | None = None, **changes: object
) -> tuple[dict[str, bool], dict]:
    """(stage -> was done now rather than before, results); what it said goes to `said`."""
    said = [] if said is None else said
    results = run(load_config(PipelineConfig, None, words(world, **changes)), said.append)
    names = ("prune", "generate", "train", "export", "evaluate")
    return {n: f"{n}: done before" not in said for n in names}, results


def test_only_what_a_change_touches_is_done_again(
    world: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = dict.fromkeys(("prune", "generate", "train", "export", "evaluate"), True)
    nothing = dict.fromkeys(every, False)
    done, first = stages(world)
    assert done == every
    assert stages(world) == (nothing, first)
    said: list[str] = []
    # Says nothing about the numbers.
    assert stages(world, said, **{"train.checkpoint_period": 3})[0] == nothing
    assert not [line for line in said if line.startswith("prompts: ")]
    assert stages(world, said, **{"prompts.num_prompts": 1000})[0] == nothing
    assert "prompts: 20 to train on, as there are no more; prompts.num_prompts=1000" in said
    (world["root"] / "runs" / "run" / "results.json").unlink()
    assert stages(world) == ({**nothing, "evaluate": True}, first)  # the same figures again
    said.clear()
    done, _ = stages(world, said, **{"train.learning_rate": 1e-3})
    assert done == {**every, "prune": False, "generate": False}
    folder = world["root"] / "runs" / "run" / "train"
    assert f"train: {folder} was made with learning_rate=2e-05 (now 0.001), and is made anew" in said
    said.clear()
    answers = (folder.parent / "data" / "train.parquet").read_bytes()
    done, colder = stages(world, said, **{"generate.temperature": 0.0, "train.learning_rate": 1e-3})
    assert done == {**every, "prune": False}
    data = folder.parent / "data"
    assert f"generate: {data} was made with temperature=1.0 (now 0.0), and is made anew" in said
    (kept,) = folder.parent.glob("data.*")
    assert f"generate: what was in {data} is now in {kept}" in said
    assert (kept / "train.parquet").read_bytes() == answers
    assert f"train: {folder} was made from other inputs, and is made anew" in said
    assert colder["scores"] != first["scores"]
    said.clear()
    assert stages(world, said)[0] == {**every, "prune": False}
    assert f"generate: what was in {kept} is now in {data}" in said
    way = "gives way to what these gave before"
    assert f"generate: {data} was made with temperature=0.0 (now 1.0), and {way}" in said
    assert "train: 20 answers, 20 of them cut off at max_new_tokens, all there before" in said
    assert (data / "train.parquet").read_bytes() == answers
    assert [path.name for path in folder.parent.glob("data.*")] != [kept.name]  # the colder ones
    beside = world["teacher"] / "generation_config.json"  # the stop tokens
    before = beside.read_text()
    beside.write_text(before + "\n")
    assert stages(world, **{"generate.temperature": 0.0})[0] == every
    beside.write_text(before)
    page = (world["root"] / "runs" / "run" / "report.html").read_text()
    assert "Say " in page and "KL" in page

    def fails(*_: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("distillax.pipeline.train", fails)
    with pytest.raises(UserError, match="the disk is full"):
        stages(world, **{"generate.temperature": 0.0, "train.learning_rate": 3e-3})
    # The scores of what is no more: a report would show them beside the new curves.
    assert not (world["root"] / "runs" / "run" / "results.json").exists()


def test_matching_goes_on_from_the_training(world: dict[str, Path]) -> None:
    """Both have their place in the table, beside a student that was fine-tuned alone on as many tokens."""
    changes: dict[str, object] = {
        "run_name": "matched",
        "train.steps": 2,
        "train.eval_interval": 2,
        "match.steps": 3,
        "match.max_target_length": 56,  # and some have 57 tokens
        "match.learning_rate": 1e-3,
        "evaluate.sft_control": "true",
    }
    told: list[str] = []
    done, results = stages(world, told, **changes)
    (note,) = [line for line in told if " rows are cut at " in line]
    limit = "max_target_length=56; their ends are not learnt"
    assert re.fullmatch(f"note: (1[0-9]|[1-9]) of 20 rows are cut at {limit}", note)
    measured = {
        name: [
            x["step"] for x in small.metrics(world["root"] / "runs" / "matched" / name) if "eval_loss" in x
        ]
        for name in ("train", "match", "control")
    }
    assert measured == {"train": [2], "match": [], "control": [2, 4]}
    assert list(results["scores"]) == [
        "teacher",
        "student before",
        "after SFT",
        "student after",
        "SFT alone, as long",
    ]
    steps = {name: training["steps"] for name, training in results["training"].items()}
    assert steps == {"train": 2, "match": 3, "control": 4}  # of two rows, one row, and two rows
    run_dir = world["root"] / "runs" / "matched"
    card = (run_dir / "export" / "README.md").read_text()
    assert "teacher, cut to 2 layers, distilled from teacher" in card
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| student after | ")]
    assert [row[1] for row in rows] == [f"{results['scores']['student after']['nll']:.3f}"]
    losses = [
        json.loads(line)["forward_kl"] for line in (run_dir / "match/metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 3
    said = (run_dir / "report.html").read_text()
    assert "SFT alone, as long" in said and "Logit matching: loss" in said
    assert not any(stages(world, **changes)[0].values())
    done, _ = stages(world, **{**changes, "match.learning_rate": 2e-3})
    assert [name for name, now in done.items() if now] == ["export", "evaluate"]
    done, _ = stages(world, **{**changes, "match.learning_rate": 2e-3, "evaluate.answers": 2})
    assert [name for name, now in done.items() if now] == ["evaluate"]
    assert (run_dir / "export" / "README.md").read_text().count("## Scores") == 1


def test_killed_in_the_middle_of_training(world: dict[str, Path]) -> None:
    recipe = world["root"] / "recipe.yml"
    recipe.write_text("generate:\n  temperature: 0.7\n")
    small.run("run", recipe, *words(world, run_name="whole"))
    small.run("run", recipe, *words(world, run_name="killed"), kill=("saved", 3))
    out = small.run("run", recipe, *words(world, run_name="killed"))
    assert "generate: done before" in out and "resuming after step 2 of 4" in out
    found = [
        json.loads((world["root"] / "runs" / n / "results.json").read_text()) for n in ("whole", "killed")
    ]
    assert found[0]["scores"] == found[1]["scores"] and found[0]["answers"] == found[1]["answers"]


def test_teacher_and_student_with_other_tokenizers(world: dict[str, Path]) -> None:
    """The student learns from the text; what compares logits is left out of the table."""
    other = small.chat_model("llama3.1", world["root"] / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["in"], vocabulary["er"] = vocabulary["er"], vocabulary["in"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    changes = {"run_name": "cross", "student.source": other, "student.layers": 0, "evaluate.answers": 0}
    _, results = stages(world, **changes)
    assert "kl_teacher_student" not in results["scores"]["student after"]
    assert any("student after" in line and line.rstrip().endswith("–") for line in tables.text(results))


CACHED: dict[str, object] = {
    "train.steps": 0,
    "match.method": "cached",
    "match.steps": 2,
    "match.max_target_length": 64,
    "match.per_device_batch_size": 2,
    "match.learning_rate": 1e-3,
    "match.eval_interval": 2,
}


def test_from_a_cache_the_teacher_is_read_no_more(world: dict[str, Path], monkeypatch) -> None:
    """Neither to match its logits nor to measure, which comes to the same as with its weights."""
    changes = {"run_name": "cached", **CACHED, "capture.format": "topk", "capture.k": small.VOCABULARY}
    closed: list[Path] = []
    read = Source.iter_params

    def faulty(self: Source, dtype: object = None) -> object:
        assert not closed or self.path != world["teacher"]
        return read(self, dtype)

    def captures(teacher: str, data: str, *arguments: object, **keys: object) -> object:
        summary = capture(teacher, data, *arguments, **keys)  # type: ignore[arg-type]
        closed.extend([Path(data)] * data.endswith("train.parquet"))
        return summary

    monkeypatch.setattr(Source, "iter_params", faulty)
    monkeypatch.setattr("distillax.pipeline.capture", captures)
    said: list[str] = []
    _, results = stages(world, said, **changes)
    folder, scores = world["root"] / "runs" / "cached", results["scores"]
    assert closed and list(scores) == ["teacher", "student before", "student after"]
    assert list(results["training"]) == ["match"] and "KL is a lower bound" in results["note"]
    assert scores["teacher"]["kl_teacher_student"] == 0 and scores["teacher"]["top1_agreement"] == 1
    (held_out,) = [x for x in small.metrics(folder / "match") if "eval_loss" in x]
    assert held_out["eval_kl_teacher_student"] == pytest.approx(
        scores["student after"]["kl_teacher_student"],
        abs=0.05,  # the export is in bfloat16
    )
    rows = pq.read_table(folder / "data" / "held_out.parquet").to_pylist()
    answered = {row["messages"][0]["content"]: row["messages"][-1]["content"] for row in rows}
    assert [(a["prompt"], a["teacher"]) for a in results["answers"]] == [
        (a["prompt"], answered[a["prompt"]]) for a in results["answers"]
    ]
    card, page = (folder / "export" / "README.md").read_text(), (folder / "report.html").read_text()
    assert all("KL is a lower bound" in text for text in (card, page, "\n".join(said)))
    again: list[str] = []
    assert stages(world, again, **changes)[1] == results
    done = ("prune", "generate", "capture", "match", "export", "evaluate")
    assert again[: len(done)] == [f"{name}: done before" for name in done]

    closed.clear()
    student, teacher = (distillax.load(path) for path in (folder / "export", world["teacher"]))
    data = str(folder / "data" / "held_out.parquet")
    whole, own = (
        evaluate(model, data, teacher=teacher, dtype="float32", show_progress=False).as_dict()
        for model in (student, teacher)
    )
    assert scores["student after"] == pytest.approx(whole, rel=2e-3, abs=2e-3)
    assert scores["teacher"] == pytest.approx(own, rel=5e-3, abs=1e-6)  # its NLL is kept in float16
    with pytest.raises(
        UserError, match=r"targets has no targets itself; name a folder in it: held_out, train$"
    ):
        TargetStore.open(folder / "targets")
    anew: list[str] = []
    often = {"capture.format": "sampled", "capture.k": 8, "match.steps": 6, "match.per_device_batch_size": 16}
    _, sampled = stages(world, anew, **changes | often)
    assert "generate: done before" in anew and "capture: done before" not in anew
    assert "an estimate from a cache of 8 sampled ids" in sampled["note"]
    (note,) = [line for line in anew if line.startswith("note: a student that reads sampled targets more")]
    assert note.endswith("take fewer steps, or capture with capture.k=48 (docs/cached.md)")


def test_a_teacher_that_a_server_alone_has(world: dict[str, Path]) -> None:
    """Of which config and tokenizer are here: matched and measured from what the server says of its answers,
    and without a cache the students are measured alone."""
    teacher = world["root"] / "served"
    shutil.copytree(world["teacher"], teacher, ignore=shutil.ignore_patterns("*.safetensors"))
    student = small.chat_model("llama3.1", world["root"] / "small", seed=3)
    with running(Scores()) as server:
        changes = {
            "run_name": "served",
            "teacher": teacher,
            "student.source": student,
            "student.layers": 0,
            "generate.engine": "server",
            "generate.teacher_url": server.url,
        }
        with pytest.raises(UserError, match=r"^teacher, as student.source is not set: .*has no .safetensors"):
            stages(world, **changes | {"student.source": ""})
        assert not server.bodies
        server.fault = lambda body, n: Fault(400, "not this one") if n == 10 else None
        with pytest.raises(UserError, match=r"^1 requests to the teacher failed; run again to retry them"):
            stages(world, **changes)
        said: list[str] = []
        _, alone = stages(world, said, **changes)
        assert any(s.startswith("held_out: 4 answers") and s.endswith(", all there before") for s in said)
        assert any(s.startswith("train: 20 ") and s.endswith(" second, 19 there before") for s in said)
        assert list(alone["scores"]) == ["student before", "student after"]
        assert "kl_teacher_student" not in alone["scores"]["student after"]
        assert alone["answers"][0]["teacher"].startswith("text:[")
        said.clear()
        _, results = stages(world, said, **changes, **CACHED | {"train.steps": 4, "capture.k": 4})
        assert "generate: done before" in said and "train: done before" in said
        template = student / "chat_template.jinja"
        template.write_text(template.read_text() + "{# another #}")
        again: list[str] = []
        targets = world["root"] / "runs" / "served" / "targets" / "train" / "manifest.json"
        longest = json.loads(targets.read_text())["counts"]["longest"]
        server.max_model_len = longest + 1  # filled by the longest answers, which then are cut to be scored
        stages(world, again, **changes, **CACHED | {"train.steps": 4, "capture.k": 4})
        assert "generate: done before" in again and "capture: done before" not in again
        assert json.loads(targets.read_text())["max_target_length"] == longest - 1
        cut = re.search(r"; (\d+) truncated", [s for s in again if s.startswith("data: ")][-1])
        assert cut and 0 < int(cut[1]) < 20
        limit = f"max_target_length={longest - 1}"
        note = f"note: {cut[1]} of 20 rows are cut at {limit}; their ends are not learnt"
        assert note in again and not [s for s in said if " rows are cut at " in s]
    greedy = "the teacher's answers are those that it gave when it was asked, the students' are greedy"
    assert alone["note"] == greedy
    assert "of the 4 likeliest ids" in results["note"] and results["note"].endswith(f"; {greedy}")
    scores = results["scores"]
    assert list(scores) == ["teacher", "student before", "after SFT", "student after"]
    assert scores["teacher"]["nll"] > 90  # what the server says of every token
    assert results["models"]["teacher"]["layers"] and results["answers"][0]["teacher"]
    assert any(line.lstrip().startswith("teacher   ") and "text:[" in line for line in said)


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (Scores(owned_by="somebody"), "capture with generate.engine=embedded or vllm"),
        (FakeServer(), "gave no log-probabilities of the tokens that it was sent; use vLLM's own"),
        (
            Scores(fault=lambda body, n: Fault(400, "no logprobs") if "prompt_logprobs" in body else None),
            "start that server with --max-logprobs 4, or give fewer with capture.k",
        ),
    ],
)
def test_a_server_that_cannot_be_captured_from_answers_nothing(world, server: FakeServer, words: str) -> None:
    with running(server):
        changes = {"generate.engine": "server", "generate.teacher_url": server.url, "capture.k": 4}
        with pytest.raises(UserError, match=words):
            stages(world, run_name="unscored", **CACHED, **changes)
    assert all("prompt_logprobs" in body for _, body in server.bodies)


def test_a_server_is_tried_before_anything_is_removed(world) -> None:
    """And not at all where all answers are there, if for other settings in between."""
    changes = {"run_name": "tried", **CACHED, "generate.engine": "server", "capture.k": 4}
    folder = world["root"] / "runs" / "tried"

    def fails(server: FakeServer, temperature: float, words: str) -> dict[str, bytes]:
        with running(server), pytest.raises(UserError, match=words):
            keys = {"generate.teacher_url": server.url, "generate.temperature": temperature}
            stages(world, **changes, **keys)
        assert server.bodies
        return {path.name: path.read_bytes() for path in (folder / "data").glob("*.manifest.json")}

    def once() -> FakeServer:  # is tried, and scores no answer
        return Scores(fault=lambda body, n: Fault(400, "no") if n and "prompt_logprobs" in body else None)

    data = fails(once(), 1.0, "could not be captured")
    (folder / "results.json").touch()
    assert fails(FakeServer(), 0.5, "gave no log-probabilities of the tokens that it was sent") == data
    assert (folder / "results.json").exists()
    colder = fails(once(), 0.5, "could not be captured")
    assert not (folder / "results.json").exists()
    assert fails(FakeServer(), 1.0, "gave no log-probabilities") == data != colder
    assert sorted(data) == ["held_out.manifest.json", "train.manifest.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.steps": 0}, "train.steps and match.steps are both 0, so that nothing is learnt; set one"),
        (
            {**CACHED, "match.steps": 0, "train.steps": 2},
            "match.method=cached has no effect with match.steps",
        ),
        ({"capture.k": 8}, "capture.k has no effect without targets; leave it out, or set match.method=cac"),
        (
            {**CACHED, "generate.engine": "server", "capture.format": "sampled"},
            "generate.engine=server gives the likeliest ids alone, which capture.format=topk can keep and",
        ),
        (
            {**CACHED, "generate.engine": "vllm", "match.distill_temperature": 2},
            "match.distill_temperature=2 needs all of the teacher's logits, which generate.engine=vllm does",
        ),
        (
            {**CACHED, "generate.engine": "vllm", "capture.teacher_quantization": "int8"},
            "capture.teacher_quantization has no effect with generate.engine=vllm; leave it out",
        ),
        (
            {**CACHED, "match.distill_divergence": "jsd"},
            "match: distill_divergence=jsd cannot be estimated from the sampled targets; set capture.format=",
        ),
    ],
)
def test_what_cannot_be_captured_is_told_before_the_teacher_answers(world, changes, words) -> None:
    with pytest.raises(UserError) as refused:
        stages(world, run_name="refused", **changes)
    assert words in str(refused.value) and not (world["root"] / "runs" / "refused").exists()


def test_errors_of_a_capture_name_keys() -> None:
    with pytest.raises(UserError) as found, by_keys():
        raise UserError(
            "give --max-target-length 12, --k 8 or --engine vllm, or --max-logprobs 64; --k has no"
        )
    assert str(found.value) == (
        "give match.max_target_length=12, capture.k=8 or generate.engine=vllm, or --max-logprobs 64; "
        "capture.k has no"
    )
    assert with_keys("note: or capture with --k 64 (docs)") == "note: or capture with capture.k=64 (docs)"


def base_model(folder: Path) -> Path:
    """One without a chat template."""
    small.chat_model("qwen3", folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": None}))
    return folder


def test_a_base_student_learns_the_chat_template_of_its_teacher(world: dict[str, Path]) -> None:
    base = base_model(world["root"] / "base")
    assert not find(base).tokenizer().chat_template
    changes = {"run_name": "base", "student.source": base, "student.layers": 0, "match.steps": 2}
    _, results = stages(world, **changes)
    assert results["answers"][0].keys() == {
        "prompt",
        "teacher",
        "student before",
        "after SFT",
        "student after",
    }
    template = find(world["teacher"]).tokenizer().chat_template
    assert find(world["root"] / "runs" / "base" / "export").tokenizer().chat_template == template


def test_a_chat_template_is_missed_before_the_teacher_answers(world: dict[str, Path]) -> None:
    base = base_model(world["root"] / "plain")
    changes = {"run_name": "plain", "teacher": base, "generate.use_chat_template": False}
    with pytest.raises(UserError, match=r"neither .*plain nor the teacher has a chat template"):
        stages(world, **changes)
    assert not (world["root"] / "runs" / "plain" / "data").exists()


def test_a_base_teacher_is_measured_with_the_chat_template_of_its_student(world: dict[str, Path]) -> None:
    base = base_model(world["root"] / "bare")
    changes = {"run_name": "bare", "teacher": base, "student.source": world["teacher"], "student.layers": 0}
    with pytest.raises(UserError, match=r"^teacher: .*bare has no chat template; set generate.use_chat_t"):
        stages(world, **changes)
    _, results = stages(world, **changes, **{"generate.use_chat_template": False, "match.steps": 0})
    assert results["scores"]["teacher"]["kl_teacher_student"] == pytest.approx(0, abs=1e-6)


def test_a_base_student_of_another_family_is_refused_before_the_teacher_answers(
    world: dict[str, Path],
) -> None:
    base = base_model(world["root"] / "stranger")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    changes = {"run_name": "stranger", "student.source": base, "student.layers": 0}
    with pytest.raises(UserError, match=r"^teacher: .*teacher is another tokenizer than that of .*stranger"):
        stages(world, **changes)
    assert not (world["root"] / "runs" / "stranger" / "data").exists()


def test_held_out_prompts_are_never_trained_on(world: dict[str, Path]) -> None:
    def turns(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    prompts = [
        Prompt(f"{i % 7:016x}" + (f"-{i // 7 + 1}" if i >= 7 else ""), turns(f"Say {i % 7}."), i)
        for i in range(20)
    ]
    kept, held_out = split_prompts(prompts, 0, 5)
    assert len(kept) + len(held_out) == 20 and len(held_out) >= 5
    assert not {p.prompt_id.split("-")[0] for p in kept} & {p.prompt_id.split("-")[0] for p in held_out}
    assert split_prompts(prompts[::-1], 3, 5)[0][0].prompt_id.split("-")[0] == kept[0].prompt_id.split("-")[0]
    with pytest.raises(UserError, match="held_out"):
        split_prompts(prompts, 0, 20)
    # The same words, written otherwise, are no new question.
    alike = [Prompt(f"{20 + i:016x}", turns(f"say  {i}"), i) for i in range(7)]
    parts = split_prompts([*prompts, *alike], 0, 5)
    kept, held_out = ({p.messages[0]["content"].strip(".").split()[1] for p in part} for part in parts)
    assert not kept & held_out and len(kept | held_out) == 7
