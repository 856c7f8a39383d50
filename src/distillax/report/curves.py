"""The curves of trainings: what metrics.jsonl has, as charts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distillax.progress import best_before
from distillax.report.charts import Chart, Line, Point, Series, line_chart
from distillax.report.read import Run

TRAININGS = {"train": "fine-tuning", "match": "logit matching", "control": "fine-tuning alone"}
COLOURS = 8  # of the page's palette; further runs begin anew with it
# Where a run has several trainings, each has the colour that the scores of its student have.
_COLOUR = {"train": 2, "match": 0, "control": 3}
_CURVES = (
    ("eval_top1_agreement", "Same likeliest token as the teacher, held out"),
    ("learning_rate", "Learning rate"),
    ("tokens_per_second", "Loss-bearing tokens per second"),
    ("grad_norm", "Gradient norm before clipping"),
)


@dataclass(frozen=True)
class _Training:
    """Lines of metrics that are drawn as one line. `logits` are those of matching, whose loss is no cross
    entropy."""

    label: str
    colour: int
    lines: list[dict[str, Any]]

    @property
    def logits(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "student_entropy" in line]

    def series(self, key: str) -> Series:
        """A key's curve, dashed if it is of held-out data."""
        held_out = key.startswith("eval_")
        label = f"{self.label}, held out" if held_out else self.label
        return Series(label, _points(self.lines, key), self.colour, held_out)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The trainings of one run, or of each of several what led to its student: in nats a token, what all
    trainings have, their cross entropy; the loss of those by logits; and what else is known of a step."""
    trainings = list(_trainings(runs))
    text = [t.series(key) for key in ("cross_entropy", "eval_loss") for t in trainings]
    kl = [t.series("eval_kl_teacher_student") for t in trainings]
    matching = [Series(t.label, _points(t.logits, "loss"), t.colour) for t in trainings]
    title = "Logit matching: loss" + ", and held-out KL" * any(s.points for s in kl)
    found = [
        line_chart("Cross entropy", text, " nats/token"),
        line_chart(title, [*matching, *kl], " nats/token"),
        *(line_chart(title, [t.series(key) for t in trainings]) for key, title in _CURVES),
    ]
    return [chart for chart in found if chart]


def legend(drawn: Sequence[Chart]) -> list[Line]:
    """The lines of all charts, each once."""
    lines = {(line.label, line.colour, line.dashed): line for chart in drawn for line in chart.lines}
    return list(lines.values())


def overfitted(runs: Sequence[Run]) -> list[str]:
    """A sentence about each training whose held-out data were measured better before its end."""
    found = []
    for run in runs:
        for training in _trainings([run]):
            if best := best_before(training.lines):
                whose = f"{run.label}, {training.label}" if len(runs) > 1 else training.label.capitalize()
                found.append(f"{whose}: {best[1]}, a sign of overfitting.")
    return found


def _trainings(runs: Sequence[Run]) -> Iterator[_Training]:
    for i, run in enumerate(runs):
        before = max((int(line["step"]) for line in run.metrics), default=0)
        # The student went on from there, so its steps are counted on.
        matching = [line | {"step": line["step"] + before} for line in run.matching]
        if len(runs) > 1:
            yield _Training(run.label, i % COLOURS, run.metrics + matching)
        elif matching:
            lines = {"train": run.metrics, "match": matching, "control": run.control}
            yield from (_Training(TRAININGS[name], _COLOUR[name], lines[name]) for name in TRAININGS)
        else:
            yield _Training("training", 0, run.metrics)


def _points(lines: Sequence[dict[str, Any]], key: str) -> list[Point]:
    return [(line["step"], line[key]) for line in lines if key in line]
