"""Hugging Face or GGUF -> Orbax -> Hugging Face, one stacked tensor in memory at a time."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from distillax.checkpoints import gguf, state
from distillax.checkpoints.huggingface import write_folder, write_json
from distillax.checkpoints.source import HF_FOLDER, Source, find
from distillax.errors import UserError
from distillax.models.families import ModelConfig
from distillax.models.spec import unflatten


def to_orbax(
    source: str | Path, folder: str | Path, *, dtype: Any = None, hf_access_token: str | None = None
) -> Path:
    """Writes `folder`/0/items (the parameters) and `folder`/huggingface (config, tokenizer).

    `folder`, `folder`/0 and `folder`/0/items all serve as load_parameters_path. `dtype` None keeps
    the source's. Returns the path of the parameters.
    """
    found, folder = find(source, hf_access_token=hf_access_token), Path(folder).expanduser()
    _refuse_other(folder, "_METADATA")
    params = {
        path: state.LazyArray(shape, kept, read) for path, shape, kept, read in found.iter_params(dtype)
    }
    write_side(found, folder / HF_FOLDER)
    (folder / "0").mkdir(parents=True, exist_ok=True)
    state.save_params(folder / "0" / "items", unflatten(params))
    return folder / "0" / "items"


def to_hf(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: Any = None,
    layers: list[int] | None = None,
    hf_access_token: str | None = None,
    card: str | None = None,
    config: ModelConfig | None = None,
) -> Path:
    """Writes a Hugging Face folder: weights, config, tokenizer, generation config, model card.

    `dtype` None keeps the source's. `layers` keeps only those, with the `config` that belongs to
    them. The folder appears whole or not at all.
    """
    found, folder = find(source, hf_access_token=hf_access_token), Path(folder).expanduser()
    _refuse_other(folder, "config.json")
    parts = {path: (kept, read) for path, _, kept, read in found.iter_params(dtype)}

    def read(path: tuple[str, ...]) -> np.ndarray:
        array = parts[path][1]()
        return array[np.asarray(layers)] if layers is not None and path[0] == "layers" else array

    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_side(found, temporary)
    write_folder(temporary, config or found.config, read, lambda path: parts[path][0])
    (temporary / "README.md").write_text(card or _card(found), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    return folder


def write_side(found: Source, folder: Path) -> None:
    """Writes config.json, generation_config.json and the tokenizer of a source into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", found.config.hf)
    if found.generation_config:
        write_json(folder / "generation_config.json", found.generation_config)
    if found.kind == "gguf":
        gguf.tokenizer(found.path).save_pretrained(str(folder))
    for name, content in found.sidecars().items():
        if name != "generation_config.json":
            (folder / name).write_bytes(content)


def _refuse_other(folder: Path, ours: str) -> None:
    """An existing folder is replaced only if it is empty or holds what we would write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another output")
    if any(folder.iterdir()) and not any(folder.rglob(ours)):
        raise UserError(f"{folder} holds something else than a converted model; choose another output")


def _card(found: Source) -> str:
    c = found.config
    license_line = found.config.hf.get("license") or "see the source model"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [distillax]\n---\n\n"
        f"# {Path(found.name).name}\n\n"
        f"A {c.family} decoder with {c.layers} layers of width {c.width}, written by distillax.\n\n"
        f"- Source: `{Path(found.name).name}`\n- License: {license_line}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n'
    )
