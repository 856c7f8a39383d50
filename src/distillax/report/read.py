"""What is known of a run: the files that its folder holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillax.errors import UserError
from distillax.run_dir import read_json


@dataclass(frozen=True)
class Run:
    """What is known of one run. Whatever its folder lacks is empty here."""

    path: Path
    label: str
    results: dict[str, Any]
    metrics: list[dict[str, Any]]
    matching: list[dict[str, Any]]
    control: list[dict[str, Any]]
    config: str
    stages: list[str]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        return self.results.get("scores") or {}

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        return self.results.get("models") or {}


def read_run(path: Path, label: str) -> Run:
    results, stages = _read_json(path / "results.json"), _read_json(path / "stages.json")
    trained = "train" in results.get("training", ["train"])  # if not, what is there is an earlier recipe's
    files = ([path / "train/metrics.jsonl"] if trained else []) + [path / "metrics.jsonl"]
    metrics = next((file for file in files if file.is_file()), None)

    def stage(name: str) -> list[dict[str, Any]]:
        """Of a training that the results are of: an earlier recipe may have left one, too."""
        file = path / name / "metrics.jsonl"
        return _read_metrics(file) if name in (results.get("training") or {}) and file.is_file() else []

    if not path.is_dir() or not (metrics or results or stages):
        what = "holds no run" if path.is_dir() else "is not a folder"
        known = ("results.json", "metrics.jsonl")
        inside = sorted({str(file.parent) for name in known for file in path.glob(f"*/{name}")})
        hint = f", as {' or '.join(inside[:3])} does" if inside else ""
        raise UserError(f"{path} {what}; give the folder of a run, which holds {' or '.join(known)}{hint}")
    config = path / "config.yml"
    return Run(
        path,
        label,
        results,
        _read_metrics(metrics) if metrics else [],
        stage("match"),
        stage("control"),
        config.read_text(encoding="utf-8") if config.is_file() else "",
        [name for name in stages if ":" not in name],
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except UserError as error:
        raise UserError(f"{error}; delete it and run that stage again") from None


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. The last one may be torn: its writer may be at work, or was killed."""
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for i, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            float(values["step"])
        except (ValueError, KeyError, TypeError):
            if i == len(lines):
                break
            raise UserError(f"{path}:{i}: not a line of metrics; remove the line") from None
        found.append(values)
    return found
