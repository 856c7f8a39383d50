"""What benchmarks/ ask of themselves: they are no tests and take hours, so nothing is measured here."""

import argparse
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The rows that benchmarks/prune.py measures; `quality` is as it is then."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    quality, common, prune = map(importlib.import_module, ("quality", "common", "prune"))
    found: list[dict[str, object]] = []
    monkeypatch.setattr(quality, "models", lambda: (tmp_path, tmp_path, tmp_path))
    monkeypatch.setattr(quality, "answers", lambda *_, **__: [tmp_path / "data", tmp_path / "held_out"])
    monkeypatch.setattr(common, "cut", lambda *_: tmp_path / "student")
    monkeypatch.setattr(quality, "in_a_process", lambda row: found.append(row) or {"kl_teacher_student": 1.0})
    monkeypatch.setattr(sys, "argv", ["prune.py"])
    prune.main()
    return found


@pytest.mark.parametrize("text", ["teacher", "people"])
def test_a_row_has_all_that_is_read_of_it(asked: list[dict[str, object]], tmp_path: Path, text: str) -> None:
    quality = sys.modules["quality"]
    files = [tmp_path / "data", tmp_path / "others"]
    options = {
        "text": text,
        "train_on": "assistant",
        "keep": None,
        "draws": [19],
        "top": [64],
        "generations": 1,
    }
    args = argparse.Namespace(**options, steps=2, rows=1, length=64)
    ways = {way: ["1e-3"] for way in ("sft", "online", *quality.caches_of(args))}
    rows = quality.rows(args, files, tmp_path, ways, range(2))
    assert len(rows) == 2 * len(ways) and len(asked) == 4
    assert {row.get("held_out") for row in rows} == {None if text == "teacher" else str(files[1])}
    read = set(re.findall(r'\brow\["(\w+)"\]', inspect.getsource(quality.one)))
    assert {"way", "data", "student"} <= read
    assert all(read <= row.keys() for row in (*rows, *asked))


@pytest.mark.parametrize(("ratios", "code"), [((1.0, 1.14), 0), ((0.8, 1.0), 1), ((1.0, 1.2), 1)])
def test_a_plan_that_is_not_honest_fails(
    ratios: tuple[float, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two cases, whichever, planned at that share of what is measured."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    plan_memory = importlib.import_module("plan_memory")
    monkeypatch.setattr(plan_memory, "CASES", {str(ratio): ("sft",) for ratio in ratios})
    planned, reported = iter(ratios), []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        if "--json" in command:
            figures = {"peak_bytes": 500 * next(planned), "devices": 2}
            Path(command[-1]).write_text(json.dumps(figures), encoding="utf-8")
        return SimpleNamespace(stdout="a line\n1000\n")

    monkeypatch.setattr(plan_memory.subprocess, "run", run)
    monkeypatch.setattr(plan_memory.common, "report", lambda _, figures: reported.append(figures))
    assert plan_memory.main() == code
    assert [figures["planned_over_measured"] for figures in reported] == pytest.approx(ratios)
