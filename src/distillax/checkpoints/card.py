"""The model card of an export: what it is, what it was made of and how, and how to load it.

What it says of trainings is from the folders of the runs, their config.yml and metrics.jsonl, and from the
card of the export that the first of them was begun from, if it was one.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from distillax.checkpoints.source import HUB_ID, Source, has_tokenizer
from distillax.models.families import ModelConfig, param_specs
from distillax.models.spec import count_params
from distillax.run_dir import read_json

_PACKAGES = ("distillax", "jax", "transformers")
_QUESTION = '{"role": "user", "content": "What is a good name for a cat?"}'
_WRITTEN, _SFT = "parameters), written by distillax.", "supervised fine-tuning on text (`sft`)"
_TEXT = "A good name for a cat is"


def card(
    folder: Path,
    found: Source,
    config: ModelConfig,
    title: str | None = None,
    source_name: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """README.md of the export of `found` in `folder`, with this `config`: of fewer layers if it was cut.

    `source_name` says in words what it was made of: else that is the model that the first training was begun
    from, as far back as runs and cards can be read. `datasets` and base model are named in the front matter
    if they are on the hub, the license if it is known.
    """
    trainings, origin = _history(found)
    cut = f", cut to {config.layers} layers" if config.layers < found.config.layers else ""
    begun = [origin] if source_name and called(origin) not in source_name else []
    name = title or called(found.name)
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"license": found.license} if found.license else {}
    head |= {"base_model": found.base_model} if found.base_model else {}
    ours = (name for name in datasets if HUB_ID.fullmatch(name) and not Path(name).exists())
    known = sorted({*ours, *config.hf.get("datasets", [])})
    head |= {"datasets": known} if known else {}
    source_name = source_name or origin + cut
    distilled = ", distilled from " in source_name or any(_SFT not in training for training in trainings)
    head["tags"] = ["distillax", *(["distillation"] if distilled else [])]
    size = count_params(param_specs(config), config.layers)
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n",
        f"# {name}\n",
        f"A {config.family} decoder with {config.layers} layers of width {config.width} "
        f"({size / 1e6:,.1f}M {_WRITTEN}\n",
        f"- Source: `{source_name}`",
        *(f"- Begun from: `{model}`" for model in begun),
        f"- License: {found.license or 'see the source model'}",
        *([f"- Base model: `{found.base_model}`"] if found.base_model else []),
        *(f"- Training {i}: {said}" for i, said in enumerate(trainings, 1)),
        f"- Versions: {', '.join(_versions())}",
        "\n## Use\n\nWith `PATH` for this folder, or for its name on the hub:\n",
        *_use(folder),
    ]
    return "\n".join(lines)


def _use(folder: Path) -> Iterator[str]:
    """How an export answers a question, or, without a chat template, goes on with a text."""
    with_tokenizer, template = has_tokenizer(folder), _chat_template(folder)
    yield f"```python\nfrom transformers import AutoModelForCausalLM{', AutoTokenizer' * with_tokenizer}\n"
    yield 'model = AutoModelForCausalLM.from_pretrained("PATH")'
    if not with_tokenizer:
        yield "```\n\nIt has no tokenizer of its own; take that of the source model.\n"
        return
    yield 'tokenizer = AutoTokenizer.from_pretrained("PATH")'
    if template:
        yield f"messages = [{_QUESTION}]"
        yield 'rendered = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}'
        yield "inputs = tokenizer.apply_chat_template(messages, **rendered)"
    else:
        yield f'inputs = tokenizer("{_TEXT}", return_tensors="pt")'
    yield "output = model.generate(**inputs, max_new_tokens=128)"
    yield 'answer = output[0, inputs["input_ids"].shape[1] :]'
    yield "print(tokenizer.decode(answer, skip_special_tokens=True))\n```\n"
    if "enable_thinking" in template:
        yield "If it was trained without thinking, give the template `enable_thinking=False`, too, and"
        yield 'the server `"chat_template_kwargs": {"enable_thinking": false}` in the request.\n'
    what, path = (f'"messages": [{_QUESTION}]', "chat/") if template else (f'"prompt": "{_TEXT}"', "")
    yield "```sh\nvllm serve PATH\n"
    yield f"curl http://localhost:8000/v1/{path}completions -H 'Content-Type: application/json' \\"
    yield f"""    -d '{{"model": "PATH", {what}, "max_tokens": 128}}'\n```\n"""


def _chat_template(folder: Path) -> str:
    """The text of an export's chat template, or of all that it has; empty if it has none."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found = read_json(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else json.dumps(found) if found else ""


def _versions() -> Iterator[str]:
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # of a source tree that is not installed
            yield f"{name} {version(name)}"


def _history(found: Source) -> tuple[list[str], str]:
    """The trainings that led to a model, the first one first, and of what model that was begun."""
    path, origin, trainings = found.path, called(found.name), []
    seen: set[Path] = set()
    while not _own_card(path) and (run := _run_of(path)) is not None and run not in seen:
        seen.add(run)
        config = _config(run)
        names = path.resolve().relative_to(run).parts, (file.name for file in (run / "checkpoints").iterdir())
        step = next(max(numbers) for part in names if (numbers := [int(n) for n in part if n.isdigit()]))
        trainings.insert(0, _said(run, config, step))
        begun = config["load_parameters_path"]
        path = _meant(begun, run, lambda there: _run_of(there) or _card_of(there))
        origin = _named(begun, _meant(begun, run, Path.exists))
    before = _card_of(path)
    trainings = re.findall(r"^- Training \d+: (.+)$", before, re.MULTILINE) + trainings
    origins = [origin, *re.findall(r"^- (?:Source|Begun from): `(.+)`$", before, re.MULTILINE)]
    return trainings, origins[-1]


def _card_of(path: Path) -> str:
    """The card of an export, or of that of a run of `distillax run`, if we wrote it; else nothing."""
    return _own_card(path) or _own_card(path / "export")


def _own_card(folder: Path) -> str:
    with suppress(OSError):
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        return text if _WRITTEN in text else ""
    return ""


def _teacher(run: Path, config: dict[str, Any]) -> str:
    """Whose logits were matched, of a cache by its manifest. Empty if it is not known."""
    said, beside = config.get("teacher_load_parameters_path") or "", run
    if not said and (cache := config.get("teacher_cache_path")):
        cache = re.sub(r"/(targets\.parquet|manifest\.json)$", "", cache)  # a file may stand for its folder
        beside = _meant(cache, run, lambda found: (found / "manifest.json").is_file())
        with suppress(OSError, ValueError):
            said = read_json(beside / "manifest.json").get("teacher", "")
    return _named(said, _meant(said, beside, Path.exists))


def _named(said: str, meant: Path) -> str:
    """A model that a config names: a hub id, or the name of a file, folder or run."""
    return said if HUB_ID.fullmatch(said) and not meant.exists() else called(said)


def called(path: str) -> str:
    """The name of a file or folder; of a checkpoint in a run, or in a conversion, that of the folder that was
    given for it."""
    return Path(re.sub(r"/(latest|checkpoints(/\d+(/model_params)?)?|0|\d+/items)/*$", "", path)).name


def _meant(said: str, beside: Path, fits: Callable[[Path], object]) -> Path:
    """A path as the command meant it that wrote the folder `beside`: relative to where it was given, which is
    most often a folder above."""
    path = Path(said).expanduser()
    return next(filter(fits, (folder / path for folder in beside.resolve().parents)), path)


def _run_of(path: Path) -> Path | None:
    """The folder of `distillax train` that a checkpoint lies in, or that is the path itself; None if there is
    no such path, be its folder a run's: a hub id may be read as one. `latest` is a name, and no file."""
    path = path.resolve()
    there = (path.parent if path.name == "latest" else path).exists()
    for folder in (path, *list(path.parents)[:3]) if there else ():
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


def _said(run: Path, config: dict[str, Any], step: int) -> str:
    """A training until this step: its method, its teacher, and the tokens that bore loss."""
    c, what = config, _SFT
    if c["method"] != "sft":
        teacher = _teacher(run, c)
        of, cache = f" of `{teacher}`" * bool(teacher), " from a cache" * (c["method"] == "cached")
        what = f"logits{of} matched{cache} (`{c['method']}`)"
        what += f", {c['distill_divergence']} at temperature {c['distill_temperature']:g}"
        what += f", weight {c['distill_alpha']:g}"
    n = _tokens(run, step)
    tokens = f", {n:,} tokens with loss" if n else ""
    return f"{what}; {step:,} steps{tokens}, peak learning rate {c['learning_rate']:g}"
