"""What benchmarks/ ask of themselves: they are no tests and take hours, so nothing is measured here."""

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path

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
