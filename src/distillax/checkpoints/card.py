"""The model card of an export: what it is, what it was made of and how, and how to load it.

What it says of trainings is from the folders of the runs: their config.yml and metrics.jsonl.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from distillax.checkpoints.source import HUB_ID, Source
from distillax.models.families import ModelConfig, param_specs
from distillax.models.spec import count_params

_PACKAGES = ("distillax", "jax", "transformers")


def card(
    found: Source,
    config: ModelConfig,
    title: str | None = None,
    source_name: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """README.md of an export of `found` with this `config`, which has fewer layers if it was cut.

    `source_name` says in words what it was made of. `datasets` and base model are named in the front matter
    if they are on the hub, the license if it is known.
    """
    trainings = list(_trainings(found.path))[::-1]
    name = title or Path(found.name).name
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"license": found.license} if found.license else {}
    head |= {"base_model": found.base_model} if found.base_model else {}
    ours = (name for name in datasets if HUB_ID.fullmatch(name) and not Path(name).exists())
    known = sorted({*ours, *config.hf.get("datasets", [])})
    head |= {"datasets": known} if known else {}
    distilled = bool(source_name and "distilled" in source_name) or any(
        t["method"] != "sft" for t in trainings
    )
    head["tags"] = ["distillax", *(["distillation"] if distilled else [])]
    size = count_params(param_specs(config), config.layers)
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n",
        f"# {name}\n",
        f"A {config.family} decoder with {config.layers} layers of width {config.width} "
        f"({size / 1e6:,.1f}M parameters), written by distillax.\n",
        f"- Source: `{source_name or Path(found.name).name}`",
        f"- License: {found.license or 'see the source model'}",
        *([f"- Base model: `{found.base_model}`"] if found.base_model else []),
        *(f"- Training {i}: {_said(t)}" for i, t in enumerate(trainings, 1)),
        f"- Versions: {', '.join(_versions())}",
        "\n## Use\n\nWith `PATH` for this folder, or for its name on the hub:\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n',
        "```sh\nvllm serve PATH\n```\n",
    ]
    return "\n".join(lines)


def _versions() -> Iterator[str]:
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # of a source tree that is not installed
            yield f"{name} {version(name)}"


def _trainings(path: Path) -> Iterator[dict[str, Any]]:
    """The trainings that led to a checkpoint, the last one first: keys of their configs, the `step` that was
    taken of each, the `teacher`, and the `tokens` that bore loss until then."""
    seen: set[Path] = set()
    while (run := _run_of(path)) is not None and run not in seen:
        seen.add(run)
        config = _config(run)
        names = path.resolve().relative_to(run).parts, (file.name for file in (run / "checkpoints").iterdir())
        step = next(max(found) for part in names if (found := [int(n) for n in part if n.isdigit()]))
        teacher = config.get("teacher_load_parameters_path") if config["method"] != "sft" else ""
        yield config | {"step": step, "teacher": teacher or "", "tokens": _tokens(run, step)}
        path = Path(config["load_parameters_path"]).expanduser()


def _run_of(path: Path) -> Path | None:
    """The folder of `distillax train` that a checkpoint lies in, or that is the path itself."""
    path = path.resolve()
    for folder in (path, *list(path.parents)[:3]):
        if any((folder / "checkpoints").glob("[0-9]*")) and _config(folder).keys() >= {"method", "steps"}:
            return folder
    return None


def _config(run: Path) -> dict[str, Any]:
    """That of a training, or {}: other programs have folders that look alike."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.safe_load((run / "config.yml").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _tokens(run: Path, step: int) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    whole = [json.loads(line) for line in lines if re.fullmatch(r"\{.*\}", line)]
    return round(sum(line.get("weight_sum", 0.0) for line in whole if line["step"] <= step))


def _said(training: dict[str, Any]) -> str:
    t = training
    what = "supervised fine-tuning on text (`sft`)"
    if t["method"] != "sft":
        path = Path(t["teacher"]).expanduser()
        of_hub = HUB_ID.fullmatch(t["teacher"]) and not path.exists()
        teacher = f" of `{t['teacher'] if of_hub else path.name}`"
        what = f"logits{teacher if t['teacher'] else ' from a cache'} matched (`{t['method']}`)"
        what += f", {t['distill_divergence']} at temperature {t['distill_temperature']:g}"
        what += f", weight {t['distill_alpha']:g}"
    tokens = f", {t['tokens']:,} tokens with loss" if t["tokens"] else ""
    return f"{what}; {t['step']:,} steps{tokens}, peak learning rate {t['learning_rate']:g}"
