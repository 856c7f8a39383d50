"""The report, as text and in a real browser."""

import html
import importlib.util
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from distillax.config import PipelineConfig
from distillax.errors import UserError
from distillax.report import curves
from distillax.report.charts import MAX_POINTS, Series, line_chart, number, thin_out, ticks
from distillax.report.curves import overfitted
from distillax.report.page import _differences, change, write_page
from distillax.report.read import Run, read_run
from distillax.settings import dump

REPO = Path(__file__).resolve().parents[1]
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
ANSWERS = [
    (
        "What is the difference between a virus and a bacterium?",
        "A bacterium is a living cell that can grow and divide by itself. A virus is much smaller, and can "
        "only multiply inside the cells of a host.",
        "the the of of and and the in a the the of the of the and the",
        "A bacterium is a living organism that can grow on its own. A virus needs a host to multiply.",
    ),
    (
        "Do you like science fiction?",
        "As an AI, I don't have likes, but I can tell you about its great books and films.",
        "",
        "I don't have personal likes, but science fiction is a popular genre of books and films.",
    ),
    ("Show me some HTML: <b>bold</b> & more", HOSTILE, "]]>-->", "Here you are:\n\n" + HOSTILE),
]


def metrics_lines(steps: int = 60) -> list[str]:
    """Lines as the training loop writes them: 60 steps, the loss from about 14 to 2.4."""
    lines, draw = [], random.Random(0)
    for step in range(1, steps + 1):
        noise = draw.uniform(-0.5, 0.5)
        warm = min(1.0, step / 6)
        loss = 2.3 + 11.8 * math.exp(-step / 9) + noise * 0.25
        line = {
            "step": step,
            "loss": loss,
            "cross_entropy": loss,
            "weight_sum": 1711.0 + 60 * noise,
            "grad_norm": 1.2 + 9 * math.exp(-step / 8) + abs(noise),
            "learning_rate": 5e-4 * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
            "step_seconds": 9.5 if step == 1 else 1.42 + noise * 0.1,
            "tokens_per_second": 180.0 if step == 1 else 1205.0 + 90 * noise,
        }
        lines.append(json.dumps(line))
        if step % 20 == 0:
            lines.append(json.dumps({"step": step, "eval_loss": loss + 0.15, "eval_tokens": 2911.0}))
    return lines


def write_pipeline_run(folder: Path, nll_after: float = 2.412, layers: int = 12) -> Path:
    """A folder as `distillax run` leaves it."""

    def model(name: str, layers: int) -> dict[str, object]:
        return {
            "name": name,
            "family": "llama",
            "layers": layers,
            "parameters": 28_312_128 + layers * 3_540_096,
        }

    def scores(nll: float, kl: float, agreement: float) -> dict[str, float]:
        return {
            "nll": nll,
            "perplexity": math.exp(nll),
            "bits_per_byte": nll / 3.1,
            "tokens": 2911,
            "kl_teacher_student": kl,
            "top1_agreement": agreement,
        }

    results = {
        "title": folder.name,
        "models": {
            "teacher": model(".cache/demo/teacher.gguf", 30),
            "student before": model(str(folder / "student"), layers),
            "student after": model(str(folder / "export"), layers),
        },
        "data": {
            "prompts": 400,
            "left_out_long": 0,
            "answers": 400,
            "tokens": 21_480,
            "truncated": 236,
            "failed": 0,
            "empty": 0,
            "seconds": 61.0,
            "tokens_per_second": 352.1,
            "held_out": 64,
        },
        "training": {"train": {"steps": 60, "seconds": 96.4}},
        "scores": {
            "teacher": scores(0.941, 0.0, 1.0),
            "student before": scores(13.874, 12.51, 0.021),
            "student after": scores(nll_after, nll_after - 0.95, 0.478),
        },
        "answers": [
            {"prompt": p, "teacher": t, "student before": b, "student after": a} for p, t, b, a in ANSWERS
        ],
    }
    (folder / "train").mkdir(parents=True)
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "stages.json").write_text(json.dumps({"prune": "a1", "train:begun": "b2", "train": "b2"}))
    config = PipelineConfig.model_validate(
        {
            "run_name": folder.name,
            "teacher": "teacher.gguf",
            "student": {"layers": layers},
            "hf_access_token": "hf_SECRET",
        }
    )
    (folder / "config.yml").write_text(dump(config))
    (folder / "train" / "metrics.jsonl").write_text("\n".join(metrics_lines()) + "\n")
    return folder


def write_train_run(folder: Path, lines: list[str] | None = None) -> Path:
    """A folder as `distillax train` leaves it."""
    (folder / "checkpoints" / "60").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines or metrics_lines()) + "\n")
    (folder / "config.yml").write_text("run_name: plain\nsteps: 60\n")
    return folder


def page_of(tmp_path: Path, *runs: Path) -> str:
    write_page(runs, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_story_of_one_run_in_words(tmp_path):
    page = page_of(tmp_path, write_pipeline_run(tmp_path / "demo"))
    assert "From 134.5M to 70.8M parameters." in page
    assert "Held-out NLL 13.87 before training, 2.41 after: 5.8 times lower." in page
    assert "8.6 times lower" in page  # KL
    for figure in (
        "30 layers",
        "12 layers",
        "13.874",
        "2.412",
        "47.8%",
        "21,480",
        "236",
        "352",
        "1 min 36 s",
    ):
        assert figure in page, figure
    assert f'distillax.load("{tmp_path / "demo"}/export")' in page
    assert "layers: 12" in page  # the configuration
    assert "SECRET" not in page


def test_bars_are_to_scale(tmp_path):
    page = page_of(tmp_path, write_pipeline_run(tmp_path / "demo"))
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", page)]
    sizes, nll, kl = widths[:2], widths[2:5], widths[5:]
    assert sizes == [100, pytest.approx(100 * 70.793 / 134.515, abs=0.02)]
    assert nll == [pytest.approx(100 * 0.941 / 13.874, abs=0.01), 100, pytest.approx(17.39, abs=0.01)]
    assert kl == [100, pytest.approx(100 * 1.462 / 12.51, abs=0.01)]


class Tags(HTMLParser):
    """Collects the names of a page's elements."""

    def __init__(self, page: str):
        super().__init__()
        self.names: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)


def test_model_text_is_data(tmp_path):
    page = page_of(tmp_path, write_pipeline_run(tmp_path / "demo"))
    assert {"section", "svg", "details"} <= Tags(page).names
    assert not {"script", "img"} & Tags(page).names
    assert page.count("&lt;script&gt;document.title") == 2
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; more" in page


def test_names_are_data_too(tmp_path):
    page = page_of(tmp_path, write_train_run(tmp_path / '<em>run & "co"'))
    assert "em" not in Tags(page).names
    assert "&lt;em&gt;run &amp; &#34;co&#34;" in page


def test_the_page_needs_nothing_else(tmp_path):
    page = page_of(tmp_path, write_pipeline_run(tmp_path / "demo"), write_train_run(tmp_path / "plain"))
    assert re.findall(r"<[^>]*\b(?:src|href)=(\"[^\"]*\")", page) == ['"data:,"']
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_a_plain_training_run(tmp_path):
    page = page_of(tmp_path, write_train_run(tmp_path / "plain"))
    assert re.search(r"Training loss 1\d\.\d\d at first, 2\.\d\d after 60 steps\.", page)
    assert page.count("<svg") == 4
    assert page.count('class="line dashed"') == 1  # the evaluation
    assert "Answers to held-out" not in page and "Scores on held-out" not in page
    assert f"distillax convert to-hf {tmp_path / 'plain'} FOLDER" in page


def test_a_folder_of_runs_names_them(tmp_path):
    run = write_train_run(tmp_path / "runs" / "r")
    with pytest.raises(UserError, match=rf"holds no run; .* or metrics.jsonl, as {run} does"):
        read_run(tmp_path / "runs", "r")


def test_several_runs_side_by_side(tmp_path):
    runs = write_pipeline_run(tmp_path / "demo"), write_pipeline_run(tmp_path / "six", 3.1, layers=6)
    page = page_of(tmp_path, *runs)
    assert "2 runs compared" in page and "Lowest held-out NLL: 2.41, by demo." in page
    assert page.count("<svg") == 4 and page.count('class="line"') == 8
    assert page.count('<th class="name mark') == 6
    assert 'student.layers</th><td class="value">12</td><td class="value">6</td>' in page
    assert "measured on different answers" not in page


def drawn(runs: list[Run]) -> dict[str, list[str]]:
    """The labels of each chart's lines."""
    return {chart.title: [line.label for line in chart.lines] for chart in curves.charts(runs)}


def test_losses_of_two_kinds_share_no_chart(tmp_path):
    """Cross entropy and a divergence, told apart by what only a matching run logs."""
    for name, more in (("text", {}), ("logits", {"student_entropy": 1.0})):
        (tmp_path / name).mkdir()
        line = {"loss": 1.0, "cross_entropy": 1.0, "grad_norm": 1.0, **more}
        lines = [json.dumps({"step": step, **line}) for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert drawn([read_run(tmp_path / name, name) for name in ("text", "logits")]) == {
        "Cross entropy": ["text", "logits"],
        "Logit matching: loss": ["logits"],
        "Gradient norm before clipping": ["text", "logits"],
    }


def test_the_legend_names_every_line(tmp_path):
    for name, more in (("text", {}), ("logits", {"student_entropy": 1.0})):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "cross_entropy": 3.0 - step, **more}) for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    legend = re.search(
        r'<ul class="legend">(.*?)</ul>', page_of(tmp_path, tmp_path / "text", tmp_path / "logits")
    )
    assert legend and re.findall(r"<span>(.+?)</span>", legend[1]) == ["text", "logits"]


def write_stages(folder: Path, match: list[dict[str, float]], control: list[dict[str, float]]) -> Path:
    """The folder of a `distillax run` that also matched logits, and trained a control."""
    run = write_pipeline_run(folder)
    results = json.loads((run / "results.json").read_text())
    before, after = results["scores"]["student before"], results["scores"]["student after"]
    middle = {"after SFT": before, "student after": after, "SFT alone, as long": before}
    results["scores"] = {"teacher": results["scores"]["teacher"], "student before": before, **middle}
    for answer in results["answers"]:
        answer |= {"after SFT": "fine-tuned", "student after": answer.pop("student after")}
        answer["SFT alone, as long"] = "fine-tuned alone"
    for name, lines in (("match", match), ("control", control)):
        (run / name).mkdir()
        (run / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        results["training"][name] = results["training"]["train"]
    (run / "results.json").write_text(json.dumps(results))
    return run


MATCH = {"loss": 2.0, "cross_entropy": 3.0, "student_entropy": 1.0, "learning_rate": 1e-3}
HELD_OUT = {"eval_tokens": 9.0, "eval_loss": 3.5, "eval_kl_teacher_student": 2.5, "eval_top1_agreement": 0.4}


def test_all_trainings_of_a_run_are_drawn(tmp_path):
    match = [{"step": 1, **MATCH}, {"step": 2, **MATCH}, {"step": 2, **HELD_OUT}]
    control = [{"step": step, "loss": 4.0, "cross_entropy": 4.0} for step in (1, 62)]
    run = write_stages(tmp_path / "demo", match, control)
    stages = ["fine-tuning", "logit matching", "fine-tuning alone"]
    matched = "logit matching, held out"
    assert drawn([read_run(run, "demo")]) == {
        "Cross entropy": [*stages, "fine-tuning, held out", matched],
        "Logit matching: loss, and held-out KL": ["logit matching", matched],
        "Same likeliest token as the teacher, held out": [matched],
        "Learning rate": stages[:2],
        "Loss-bearing tokens per second": stages[:1],
        "Gradient norm before clipping": stages[:1],
    }
    # One axis of steps: the matching went on from the fine-tuning's 60.
    text, logits, agreement, *_ = curves.charts([read_run(run, "demo")])
    assert [dot.text for dot in logits.lines[0].dots] == ["step 61: 2 nats/token", "step 62: 2 nats/token"]
    assert [dot.text for dot in logits.lines[1].dots] == ["step 62: 2.5 nats/token"]
    assert [dot.text for dot in text.lines[4].dots] == ["step 62: 3.5 nats/token"]
    assert agreement.lines[0].dots[0].text == "step 62: 0.4"
    assert [line.dashed for line in text.lines] == [False, False, False, True, True]
    page = page_of(tmp_path, run)
    assert "Dashed: held-out data" in page and "counted on from those of the fine-tuning" in page
    # Of two runs each has one line, through both trainings.
    other = write_pipeline_run(tmp_path / "other")
    both = curves.charts([read_run(run, "demo"), read_run(other, "other")])
    rates = next(chart for chart in both if chart.title == "Learning rate")
    assert [(line.label, line.dots[-1].text) for line in rates.lines] == [
        ("demo", "step 62: 0.001"),
        ("other", "step 60: 5e-5"),
    ]


def test_a_training_by_logits_has_its_evaluations_drawn(tmp_path):
    """Of method=online all of them, of method=cached, which has no teacher, what there is."""
    lines = [{"step": 1, **MATCH}, {"step": 1, **HELD_OUT}]
    online = write_train_run(tmp_path / "online", [json.dumps(line) for line in lines])
    (chart,) = [c for c in curves.charts([read_run(online, "online")]) if "KL" in c.title]
    assert [line.dots[0].text for line in chart.lines] == ["step 1: 2 nats/token", "step 1: 2.5 nats/token"]
    lines[1] = {"step": 1, "eval_tokens": 9.0, "eval_loss": 3.5}
    cached = write_train_run(tmp_path / "cached", [json.dumps(line) for line in lines])
    found = drawn([read_run(cached, "cached")])
    assert found["Cross entropy"] == ["training", "training, held out"]
    assert found["Logit matching: loss"] == ["training"]


def test_a_student_that_was_better_before_the_end_is_told(tmp_path):
    """By KL where a teacher is there, else by NLL, on the data of the last measurement."""

    def lines(*measured: tuple[int, float, float], tokens: float = 9.0) -> list[dict[str, float]]:
        keys = ("step", "eval_loss", "eval_kl_teacher_student")
        found = [dict(zip(keys, values, strict=False)) | {"eval_tokens": tokens} for values in measured]
        return [{"step": 1, **MATCH}, *found]

    match = lines((20, 3.0, 2.5), (40, 3.4, 2.0), (60, 2.9, 2.25))
    control = lines((20, 3.0), (40, 3.02))
    run = write_stages(tmp_path / "demo", match, control)
    said = "held-out KL to the teacher was lowest, 2 after step 100, and is 2.25 after step 120"
    assert overfitted([read_run(run, "demo")]) == [f"Logit matching: {said}, a sign of overfitting."]
    plain = [json.dumps(line) for line in lines((20, 1.0), tokens=8.0) + lines((40, 2.0), (60, 2.5))]
    other = write_train_run(tmp_path / "plain", plain)
    two = overfitted([read_run(run, "demo"), read_run(other, "plain")])
    assert [line.split(": held-out ")[0] for line in two] == ["demo, logit matching", "plain, training"]
    assert "held-out NLL was lowest, 2 after step 40, and is 2.5 after step 60" in two[1]
    assert f"<p>{two[0]}</p>" in page_of(tmp_path, run, other)


def test_models_stand_in_one_order(tmp_path):
    page = page_of(tmp_path, write_stages(tmp_path / "demo", [{"step": 1, **MATCH}], []))
    order = ["Teacher", "Student before", "After SFT", "Student after", "SFT alone, as long"]
    bars = re.findall(r'<div class="labels"><span>([A-Z][\w ,]+)</span>', page)
    assert bars == order + order[1:]  # NLL, and KL, which the teacher has none of
    answers = re.findall(r'<div class="panel \w+"><h3>(.+?)</h3>', page)
    assert answers == order * len(ANSWERS)
    assert [role.capitalize() for role in re.findall(r'scope="row"><span>(.+?)</span>', page)] == [
        role.capitalize() for role in order
    ]


def test_keys_of_one_run_alone_are_no_differences(tmp_path):
    runs = [write_train_run(tmp_path / name) for name in ("demo", "a", "b")]
    (runs[0] / "config.yml").write_text("student:\n  layers: 1\n")
    (runs[1] / "config.yml").write_text("steps: 1\nshared: 1\n")
    (runs[2] / "config.yml").write_text("steps: 2\nshared: 1\n")
    found = _differences([read_run(run, run.name) for run in runs])
    assert found == [("steps", ["–", "1", "2"])]


def test_runs_measured_on_different_answers_say_so(tmp_path):
    runs = write_pipeline_run(tmp_path / "demo"), write_pipeline_run(tmp_path / "six", 3.1)
    results = json.loads((runs[1] / "results.json").read_text())
    results["scores"]["teacher"]["nll"] = 1.4
    (runs[1] / "results.json").write_text(json.dumps(results))
    page = page_of(tmp_path, *runs)
    assert "measured on different answers" in page
    assert "Lowest held-out NLL" not in page
    results["scores"]["teacher"]["nll"] = read_run(runs[0], "").scores["teacher"]["nll"] + 0.004  # a cache's
    (runs[1] / "results.json").write_text(json.dumps(results))
    assert "measured on different answers" not in page_of(tmp_path, *runs)


def test_a_training_of_an_earlier_recipe_is_not_drawn(tmp_path):
    run = write_pipeline_run(tmp_path / "demo")
    assert read_run(run, "").metrics
    results = json.loads((run / "results.json").read_text())
    results["training"] = {"match": {"steps": 60, "seconds": 1.0, "loss_tokens": 100.0}}
    (run / "results.json").write_text(json.dumps(results))
    assert not read_run(run, "").metrics


def test_a_run_that_was_not_evaluated_is_not_passed_over_in_silence(tmp_path):
    runs = write_pipeline_run(tmp_path / "demo"), write_train_run(tmp_path / "plain")
    assert "Not evaluated, and so not among them: plain." in page_of(tmp_path, *runs)
    assert "Not evaluated" not in page_of(tmp_path, runs[0])


def test_a_run_without_a_checkpoint_has_no_student_to_use(tmp_path):
    run = write_train_run(tmp_path / "plain")
    assert "distillax.load(" in page_of(tmp_path, run)
    (run / "checkpoints" / "60").rmdir()
    assert "distillax.load(" not in page_of(tmp_path, run)


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = write_train_run(tmp_path / "a" / "train"), write_train_run(tmp_path / "b" / "train")
    page = page_of(tmp_path, *runs)
    assert f"<span>{runs[0]}</span>" in page and f"<span>{runs[1]}</span>" in page


def test_an_unfinished_pipeline_says_how_far_it_is(tmp_path):
    run = tmp_path / "begun"
    run.mkdir()
    (run / "stages.json").write_text('{"prune": "a", "generate": "b", "train:begun": "c"}')
    assert "Not finished; done so far: prune, generate." in page_of(tmp_path, run)


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path):
    whole = page_of(tmp_path, write_train_run(tmp_path / "a" / "run"))
    run = write_train_run(tmp_path / "b" / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    assert page_of(tmp_path, run) == whole.replace(str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    run = write_train_run(tmp_path / "run", ["{}", *metrics_lines()])
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a line of metrics"):
        page_of(tmp_path, run)


def test_a_loss_that_is_not_a_number_interrupts_its_curve(tmp_path):
    lines = [json.dumps({"step": i, "cross_entropy": None if i == 3 else 1.0 + i}) for i in range(1, 6)]
    page = page_of(tmp_path, write_train_run(tmp_path / "run", lines))
    path = re.search(r'class="line" d="([^"]*)"', page)
    assert path and path[1].count("M") == 2 and path[1].count("L") == 2


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_no_run_is_refused(tmp_path, there):
    folder = tmp_path / "empty"
    if there:
        folder.mkdir()
    with pytest.raises(UserError, match=re.escape(str(folder))):
        page_of(tmp_path, folder)
    assert not (tmp_path / "page.html").exists()


def test_damaged_results_are_named(tmp_path):
    run = write_pipeline_run(tmp_path / "demo")
    (run / "results.json").write_text('{"scores": ')
    with pytest.raises(UserError, match=r"results\.json is not valid JSON"):
        page_of(tmp_path, run)


def test_an_output_that_is_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is a folder; name a file"):
        write_page([write_train_run(tmp_path / "run")], tmp_path)
    with pytest.raises(UserError, match=r"page\.txt is to be a page of HTML; give .*\.html"):
        write_page([tmp_path / "run"], tmp_path / "page.txt")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (13.874, 2.412, "5.8 times lower"),
        (2.0, 1.8, "10% lower"),
        (2.0, 2.5, "25% higher"),
        (1.0, 3.0, "3.0 times higher"),
        (2.0, 2.0, "unchanged"),
        (0.0, 0.5, "+0.500"),
    ],
)
def test_changes_in_words(before, after, words):
    assert change(before, after) == words


def test_numbers_are_short():
    shown = [number(v) for v in (0, 12345.6, 2.412, 5e-4, -1.25e-5, 61.5, 3.2e12)]
    assert shown == ["0", "12,346", "2.412", "5e-4", "-1.25e-5", "61.5", "3.2e12"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 14.2), (1, 60), (2.3, 2.31), (-4, 1e-9), (5, 5), (0, 0), (0, 5e-4)]
)
def test_ticks_are_even_and_cover_the_range(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-8 and found[-1] >= high - 1e-8
    assert 2 <= len(found) <= 9
    steps = [b - a for a, b in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_thinning_keeps_the_spikes_and_the_gaps():
    points = [(i, None if i == 77_777 else 100.0 if i == 50_001 else math.sin(i)) for i in range(100_000)]
    kept = thin_out(points)
    assert len(kept) <= MAX_POINTS + 2
    assert (50_001, 100.0) in kept
    assert any(y is None for _, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_curves_lie_within_their_axes():
    chart = line_chart("loss", [Series("a", [(1, 14.0), (60, 2.4)]), Series("b", [(1, None)])])
    assert chart and len(chart.lines) == 1
    first, last = chart.lines[0].dots
    assert (first.x, last.x) == (chart.left, chart.right)
    assert chart.top <= first.y < last.y <= chart.bottom
    assert chart.y_ticks[0].label == "0" and chart.y_ticks[-1].at == chart.top
    assert first.text == "step 1: 14"
    assert line_chart("nothing", [Series("a", [(1, None)])]) is None


@pytest.fixture(scope="module")
def tool():
    """tools/report_picture.py, which knows how to start a browser."""
    spec = importlib.util.spec_from_file_location("report_picture", REPO / "tools" / "report_picture.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.browser() is None:
        pytest.fail(
            "the report is tested in a browser; run: apt-get install --no-install-recommends chromium"
        )
    return module


# Measures pages in frames of several widths, from outside: nothing is put into the pages.
FRAMES = """<!doctype html><meta charset="utf-8"><body>FRAMES<pre id="found"></pre><script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const charts = [...page.querySelectorAll("svg")], body = frame.contentWindow.getComputedStyle(page.body);
    return {
      title: page.title, width: root.clientWidth, scroll: root.scrollWidth, background: body.backgroundColor,
      scripts: page.scripts.length, images: page.images.length, charts: charts.length,
      narrowest: Math.min(...charts.map(chart => chart.getBoundingClientRect().width)),
      tooltip: page.querySelector("svg circle title").textContent,
    };
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(tmp_path, tool, dark):
    """No script runs, nothing is wider than the screen, nothing is complained of, in either theme."""
    demo = write_pipeline_run(tmp_path / "demo")
    long = write_train_run(tmp_path / ("a-very-long-name-without-any-space" * 3))
    write_page([demo], tmp_path / "one.html")
    write_page([demo, long], tmp_path / "two.html")
    pages = [("one", 390), ("two", 390), ("one", 1200)]
    frames = [f'<iframe src="{name}.html" width="{width}" height="600"></iframe>' for name, width in pages]
    (tmp_path / "frames.html").write_text(FRAMES.replace("FRAMES", "".join(frames)))
    shown = tool.browse(
        tmp_path / "frames.html",
        "--dump-dom",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    )
    found = re.search(r'<pre id="found">(.+?)</pre>', shown.stdout)
    assert found, shown.stderr[-2000:]
    measured = json.loads(html.unescape(found[1]))
    assert [page["title"].split(" · ")[0] for page in measured] == ["demo", "2 runs compared", "demo"]
    for page in measured:
        assert page["scroll"] <= page["width"], page
        assert (page["scripts"], page["images"], page["charts"]) == (0, 0, 4)
        assert page["narrowest"] > 290
        assert page["background"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        assert "step 1: " in page["tooltip"]
    assert "CONSOLE" not in shown.stderr, shown.stderr


def test_a_browser_that_complains_is_heard(tmp_path, tool):
    (tmp_path / "bad.html").write_text("<script>missing()</script>")
    assert "CONSOLE" in tool.browse(tmp_path / "bad.html", "--dump-dom", "--enable-logging=stderr").stderr


def test_the_picture_for_the_readme(tmp_path, tool):
    run, picture = write_pipeline_run(tmp_path / "demo"), tmp_path / "report.png"
    subprocess.run(
        [sys.executable, REPO / "tools" / "report_picture.py", run, picture], check=True, timeout=60
    )
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and 20_000 < len(data) < 250_000
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert (width, height) == (tool.WIDTH * tool.SCALE, tool.HEIGHT * tool.SCALE)
