"""Progress of long work: a bar with the time left on a terminal, plain lines elsewhere; and how it went."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Progress(Protocol):
    """What `progress` yields."""

    def update(self, n: int = 1, **fields: object) -> None:
        """Counts `n` more units as done and shows `fields`, such as loss=1.25, beside the count."""
        ...


@contextmanager
def progress(
    total: int,
    label: str,
    *,
    done: int = 0,
    enabled: bool = True,
    stream: TextIO | None = None,
    interval: float = 10.0,
) -> Iterator[Progress]:
    """Shows how far a piece of work has come, on standard error unless `stream` is given.

    `total` is the number of units and `done` how many of them were finished before (a resumed run). The time
    left is told from the speed since the first unit of this run was done, which had to wait for compilers. On
    a terminal this is a bar; elsewhere a line about every `interval` seconds, and one at the end.
    `enabled=False` shows nothing.
    """
    shown_on = stream or sys.stderr
    if not enabled:
        yield _Silent()
    elif shown_on.isatty():
        with _bar(shown_on) as bar:
            task = bar.add_task(label, total=total, completed=done, fields="")
            yield _Bar(bar, task)
    else:
        lines = _Lines(total, label, done, shown_on, interval)
        yield lines
        lines.finish()


@contextmanager
def waiting(label: str, *, stream: TextIO | None = None) -> Iterator[None]:
    """Shows on a terminal for how long a piece of work has run that cannot say how far it is, such as a
    compiler's; elsewhere nothing."""
    shown_on = stream or sys.stderr
    if not shown_on.isatty():
        yield
        return
    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    with RichProgress(*columns, console=Console(file=shown_on), refresh_per_second=1) as clock:
        clock.add_task(label, total=None)
        yield


def _bar(stream: TextIO) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[fields]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )


class _Silent:
    def update(self, n: int = 1, **fields: object) -> None:
        pass


class _Bar:
    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def update(self, n: int = 1, **fields: object) -> None:
        if fields:
            self._bar.update(self._task, fields=_text(fields))
        self._bar.update(self._task, advance=n)


class _Lines:
    def __init__(self, total: int, label: str, done: int, stream: TextIO, interval: float) -> None:
        self._total, self._label, self._done = total, label, done
        self._stream, self._interval = stream, interval
        self._start = self._printed_at = time.monotonic()
        self._began: tuple[float, int] | None = None  # when the first was done, and how many were then
        self._printed: tuple[int, str] | None = None
        self._fields = ""

    def update(self, n: int = 1, **fields: object) -> None:
        self._done += n
        if n:
            self._began = self._began or (time.monotonic(), self._done)
        if fields:
            self._fields = _text(fields)
        if time.monotonic() - self._printed_at >= self._interval:
            self._print()

    def finish(self) -> None:
        if self._printed != (self._done, self._fields):
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        self._printed_at, self._printed = now, (self._done, self._fields)
        parts = [f"{self._label}: {self._done}/{self._total}", self._fields, _duration(now - self._start)]
        began, first = self._began or (now, self._done)
        if first < self._done < self._total:
            left = (now - began) / (self._done - first) * (self._total - self._done)
            parts.append(f"{_duration(left)} left")
        with suppress(OSError):  # nobody reads it any more: no reason to stop the work
            print("  ".join(part for part in parts if part), file=self._stream, flush=True)


def _text(fields: dict[str, object]) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def pace(seconds: float, tokens_per_second: float) -> list[tuple[str, str]]:
    """The end of a summary: how long the work took, or that there was none."""
    if not seconds:
        return [("seconds", "none: all was there before")]
    return [("seconds", f"{seconds:,.1f}"), ("tokens per second", f"{tokens_per_second:,.1f}")]


def best_before(metrics: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The step after which a training's held-out data were measured best, and a clause that says so, of its
    lines of metrics.jsonl; None if the last measurement is that, or within 1% of it. What is measured is KL
    to the teacher in nats a token, or without a teacher NLL. Other data do not count: they may have been
    named since."""
    measured = [line for line in metrics if line.get("eval_loss") is not None]
    if not measured:
        return None
    last = measured[-1]
    key, what = "eval_loss", "NLL"
    if last.get("eval_kl_teacher_student") is not None:
        key, what = "eval_kl_teacher_student", "KL to the teacher"
    same = [line for line in measured if line.get("eval_tokens") == last.get("eval_tokens")]
    best = min((line for line in same if line.get(key) is not None), key=lambda line: line[key])
    if last[key] <= 1.01 * best[key]:
        return None
    lowest, now = (f"{line[key]:.4g} after step {line['step']}" for line in (best, last))
    return best["step"], f"held-out {what} was lowest, {lowest}, and is {now}"
