"""The report: one self-contained HTML page for a run, or for several side by side.

Everything that a model, a user or a file wrote is data here: the template escapes it, and the page
forbids scripts and any access to the network.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from distillax.errors import UserError
from distillax.report.charts import number
from distillax.report.curves import COLOURS, TRAININGS, charts, legend, overfitted
from distillax.report.read import Run, read_run
from distillax.report.tables import METRICS, cells
from distillax.run_dir import REPORT, write_atomically

TEACHER, BEFORE, AFTER = "teacher", "student before", "student after"
_SAME_NLL = 0.02  # nats between the scores of one teacher on the same answers, at most
ROLE_COLOURS = {BEFORE: "before", "after SFT": "run2", "SFT alone, as long": "run3", AFTER: "after"}


def write_page(run_dirs: Sequence[Path], output: Path) -> None:
    """Writes the page of one or several runs to `output`, which is replaced whole or not at all.

    A run is the folder of `distillax run` (results.json, train/metrics.jsonl, stages.json) or of
    `distillax train` (metrics.jsonl), both with config.yml; what is missing is left out of the page.

    Raises UserError, naming it, for a folder that is no run and for a file that is damaged.
    """
    if not run_dirs:
        raise UserError("no run is given to report on; name at least one run's folder, such as runs/demo")
    if output.is_dir():
        raise UserError(f"the output {output} is a folder; name a file, such as {output / REPORT}")
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"the output {output} is to be a page of HTML; give a name that ends in .html")
    paths = [Path(path) for path in run_dirs]
    names = [path.resolve().name for path in paths]
    labels = [n if names.count(n) == 1 else str(p) for n, p in zip(names, paths, strict=True)]
    runs = [read_run(path, label) for path, label in zip(paths, labels, strict=True)]
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(_view(runs))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    except OSError as error:
        raise UserError(f"the report cannot be written to {output}: {error.strerror or error}") from None


def _view(runs: list[Run]) -> dict[str, Any]:
    """All that the template shows, worded and measured."""
    one = runs[0] if len(runs) == 1 else None
    return {
        "one": one,
        "runs": runs,
        "title": one.label if one else f"{len(runs)} runs compared",
        "headline": _headline(one) if one else _best(runs),
        "sizes": _sizes(runs),
        "bars": [bars for key in ("nll", "kl_teacher_student") if (bars := _bars(runs, key))],
        "table": _table(runs),
        "metrics": METRICS,
        "notes": list(dict.fromkeys(note for run in runs if (note := run.results.get("note")))),
        "incomparable": _incomparable(runs),
        "unmeasured": ", ".join(run.label for run in runs if not run.scores),
        "answers": _answers(runs),
        "charts": (drawn := charts(runs)),
        "legend": (lines := legend(drawn)),
        "held_out": any(line.dashed for line in lines),
        "overfitted": overfitted(runs),
        "counted_on": any(run.matching for run in runs),
        "data": [(run.label, facts) for run in runs if (facts := _facts(run))],
        "exports": [run for run in runs if (run.path / "export" / "config.json").is_file()],
        "trained": [run for run in runs if any((run.path / "checkpoints").glob("[0-9]*"))],
        "differences": _differences(runs),
    }


def _headline(run: Run) -> str:
    before, after = (run.scores.get(name, {}).get("nll") for name in (BEFORE, AFTER))
    if before is not None and after is not None:
        models = [run.models.get(name) for name in (TEACHER, AFTER)]
        sizes = " to ".join(_millions(m["parameters"]) for m in models if m)
        cut = f"From {sizes} parameters. " if len(sizes) and all(models) else ""
        return f"{cut}Held-out NLL {before:.2f} before training, {after:.2f} after: {change(before, after)}."
    losses = [line["loss"] for line in run.metrics if line.get("loss") is not None]
    if losses:
        last = int(run.metrics[-1]["step"])
        steps = "1 step" if last == 1 else f"{last:,} steps"
        return f"Training loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {steps}."
    return f"Not finished; done so far: {', '.join(run.stages)}." if run.stages else "Nothing measured yet."


def _best(runs: list[Run]) -> str:
    """The lowest score of several runs, where there is one to tell."""
    measured = [(run.scores[AFTER]["nll"], run.label) for run in runs if "nll" in run.scores.get(AFTER, {})]
    if len(measured) < len(runs) or _incomparable(runs):
        return ", ".join(run.label for run in runs)
    nll, label = min(measured)
    return f"Lowest held-out NLL: {nll:.2f}, by {label}."


def change(before: float, after: float) -> str:
    """How `after` compares with `before`, both positive, in words."""
    if before <= 0 or after <= 0 or f"{before:.3g}" == f"{after:.3g}":
        return "unchanged" if f"{before:.3g}" == f"{after:.3g}" else f"{after - before:+.3f}"
    word, ratio = ("lower", before / after) if after < before else ("higher", after / before)
    if ratio >= 1.5:
        return f"{ratio:.1f} times {word}"
    return f"{abs(after / before - 1):.0%} {word}"


def _millions(parameters: float) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _titled(role: str) -> str:
    return role[:1].upper() + role[1:]


def _role_colour(runs: Sequence[Run], i: int, role: str) -> str:
    """The class of a model's colour: where runs are compared, a run's colour is its trained student's."""
    if role == TEACHER:
        return "teacher"
    if len(runs) == 1:
        return ROLE_COLOURS.get(role, "plain")
    return f"run{i % COLOURS}" if role == AFTER else "plain"


def _sizes(runs: list[Run]) -> list[dict[str, Any]]:
    """A row for each teacher and student, its bar to scale of the largest."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i, run in enumerate(runs):
        for role in (TEACHER, AFTER):
            model = run.models.get(role)
            if not model:
                continue
            name = Path(model["name"]).name
            who = "teacher" if role == TEACHER else "student" if len(runs) == 1 else run.label
            rows.setdefault(
                (role, name, model["parameters"]) if role == TEACHER else (i,),
                {
                    "who": who,
                    "name": name if role == TEACHER else "",
                    "colour": _role_colour(runs, i, role),
                    "layers": model["layers"],
                    "parameters": model["parameters"],
                    "text": f"{_millions(model['parameters'])} parameters",
                },
            )
    ordered = sorted(rows.values(), key=lambda row: row["colour"] != "teacher")
    largest = max((row["parameters"] for row in ordered), default=1)
    return [row | {"share": 100 * row["parameters"] / largest} for row in ordered]


def _bars(runs: list[Run], key: str) -> dict[str, Any] | None:
    """A bar chart of one score: teacher, before and after of one run, or the students of several."""
    rows: list[tuple[str, str, float]] = []
    if len(runs) > 1 and key == "nll" and not _incomparable(runs):
        rows += [("Teacher", "teacher", run.scores[TEACHER][key]) for run in runs if TEACHER in run.scores][
            :1
        ]
    for i, run in enumerate(runs):
        for role in run.scores:
            value = run.scores[role].get(key)
            own = role == TEACHER and key == "kl_teacher_student"  # zero by definition
            if value is None or own or (len(runs) > 1 and role != AFTER):
                continue
            label = _titled(role) if len(runs) == 1 else run.label
            rows.append((label, _role_colour(runs, i, role), value))
    if not rows:
        return None
    largest = max(max(value for *_, value in rows), 1e-9)
    values = {label: value for label, _, value in rows}
    before, after = values.get("Student before"), values.get("Student after")
    heading = {
        "nll": ("NLL on held-out answers", "nats per token; lower is better"),
        "kl_teacher_student": (
            "Distance from the teacher",
            "KL in nats per token; lower is better",
        ),
    }[key]
    return {
        "title": heading[0],
        "unit": heading[1],
        "change": change(before, after) if before is not None and after is not None else "",
        "rows": [
            (label, colour, f"{value:.3f}", 100 * max(value, 0) / largest) for label, colour, value in rows
        ],
    }


def _table(runs: list[Run]) -> list[dict[str, Any]]:
    """A row of formatted scores for each model of each run."""
    rows = []
    for i, run in enumerate(runs):
        for role, scores in run.scores.items():
            rows.append(
                {
                    "run": run.label,
                    "role": _titled(role),
                    "colour": _role_colour(runs, i, role),
                    "cells": cells(scores),
                }
            )
    return rows


def _incomparable(runs: list[Run]) -> bool:
    """Whether the runs were measured on different answers, which the teacher's own score betrays: that of a
    cache is rounded, and may be of other kernels."""
    teachers = [run.scores[TEACHER] for run in runs if TEACHER in run.scores]
    nlls = [teacher.get("nll", 0) for teacher in teachers]
    other = bool(nlls) and max(nlls) - min(nlls) > _SAME_NLL
    return other or len({teacher.get("tokens") for teacher in teachers}) > 1


def _answers(runs: list[Run]) -> list[dict[str, Any]]:
    """Per prompt: who says what. Where runs are compared, each student after training."""
    prompts: dict[str, list[tuple[str, str, str]]] = {}
    for i, run in enumerate(runs):
        for answer in run.results.get("answers") or []:
            said = prompts.setdefault(answer["prompt"], [])
            for role in answer:
                if role == "prompt" or (len(runs) > 1 and role not in (TEACHER, AFTER)):
                    continue
                label = run.label if len(runs) > 1 and role == AFTER else _titled(role)
                cell = (label, _role_colour(runs, i, role), answer[role].strip())
                if cell not in said:
                    said.append(cell)
    return [{"prompt": prompt, "said": said} for prompt, said in prompts.items()]


def _facts(run: Run) -> list[tuple[str, str]]:
    """(figure, what it is) of the data set and of the training."""
    data = run.results.get("data") or {}
    facts = [
        (f"{data[key]:,}", word)
        for key, word in (
            ("prompts", "training prompts"),
            ("held_out", "prompts held out"),
            ("left_out_long", "too long, left out"),
            ("answers", "answers"),
            ("tokens", "answer tokens"),
            ("truncated", "answers cut off"),
            ("failed", "requests failed"),
            ("empty", "empty answers"),
        )
        if data.get(key) is not None and (data[key] or key in ("truncated", "failed"))
    ]
    if data.get("tokens_per_second"):  # 0 where all was done before
        facts.append((number(round(data["tokens_per_second"])), "tokens/s, generation"))
    for name, training in (run.results.get("training") or {}).items():
        what = TRAININGS[name]
        facts.append((f"{training['steps']:,}", f"steps, {what}"))
        if training.get("seconds"):
            facts.append((_duration(training["seconds"]), what))
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """The keys whose values differ between the runs' configurations that have them, with the values."""
    flat = [_flatten(run) for run in runs]
    rows = {key: [config.get(key) for config in flat] for config in flat for key in config}
    return [
        (key, ["–" if value is None else value for value in values])
        for key, values in rows.items()
        if len(set(values) - {None}) > 1
    ]


def _flatten(run: Run) -> dict[str, str]:
    try:
        config = yaml.safe_load(run.config) or {}
    except yaml.YAMLError:
        raise UserError(f"{run.path / 'config.yml'} is not valid YAML; restore or delete it") from None
    flat: dict[str, str] = {}

    def add(prefix: str, section: dict[str, Any]) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = json.dumps(value, ensure_ascii=False)

    add("", config)
    return flat
