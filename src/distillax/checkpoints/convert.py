"""Hugging Face or GGUF -> Orbax -> Hugging Face, one layer of one tensor in memory at a time."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace as replace_in
from pathlib import Path
from typing import Any

import numpy as np

from distillax.checkpoints import gguf, state
from distillax.checkpoints.card import card
from distillax.checkpoints.huggingface import sidecars, write_folder
from distillax.checkpoints.source import HF_FOLDER, Source, find, tokenizer_folder
from distillax.errors import UserError
from distillax.models.families import ModelConfig
from distillax.models.spec import unflatten
from distillax.run_dir import read_json, write_json

_MARK = ".distillax"  # a file that says, by a hash, what the folder was made of, and which files we wrote


def to_orbax(
    source: str | Path, folder: str | Path, *, dtype: Any = None, hf_access_token: str | None = None
) -> Path:
    """Writes `folder`/0/items (the parameters) and `folder`/huggingface (config, tokenizer).

    `folder`, `folder`/0 and `folder`/0/items all serve as load_parameters_path. `dtype` None keeps
    the source's. `folder` appears whole or not at all. Returns the path of the parameters.

    Raises UserError if `folder` holds anything but what the same call has written before.
    """
    found, folder = find(source, hf_access_token=hf_access_token), Path(folder).expanduser()
    mark = _mark("orbax", source, dtype)
    _refuse_other(found, folder, mark)
    temporary = _partial(folder, mark)
    params = {
        p.path: state.LazyArray(p.shape, p.dtype, p.read, stacked=state.is_stacked(p.path))
        for p in found.iter_params(dtype)
    }
    write_side(found, temporary / HF_FOLDER)
    (temporary / "0").mkdir()
    state.save_params(temporary / "0" / "items", unflatten(params))
    _put(temporary, folder, mark)
    return folder / "0" / "items"


def to_hf(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: Any = None,
    layers: list[int] | None = None,
    hf_access_token: str | None = None,
    config: ModelConfig | None = None,
    title: str | None = None,
    source_name: str | None = None,
    datasets: Sequence[str] = (),
    replace: bool = False,
) -> Path:
    """Writes a Hugging Face folder: weights, config, tokenizer, generation config, model card.

    `dtype` None keeps the source's. `layers` keeps only those, with the `config` that belongs to
    them. `title`, `source_name` and `datasets` go into the card. The folder appears whole or not at all.

    Raises UserError if `folder` holds anything but what the same call has written before, or, with
    `replace`, another one.
    """
    found, folder = find(source, hf_access_token=hf_access_token), Path(folder).expanduser()
    mark = _mark("hf", source, dtype, layers)
    _refuse_other(found, folder, None if replace else mark)
    stored = {p.path: p for p in found.iter_params(dtype)}

    def read(path: tuple[str, ...], layer: int | None) -> np.ndarray:
        return stored[path].read(layer if layers is None or layer is None else layers[layer])

    temporary = _partial(folder, mark)
    write_side(found, temporary)
    config = config or found.config
    described = replace_in(config, hf=config.hf | _origin(found))
    write_folder(temporary, described, read, lambda path: stored[path].dtype)
    text = card(temporary, found, config, title, source_name, datasets)
    (temporary / "README.md").write_text(text, encoding="utf-8")
    _put(temporary, folder, mark)
    return folder


def write_side(
    found: Source,
    folder: Path,
    tokenizer: Any = None,
    stop_token_ids: tuple[int, ...] = (),
    datasets: Sequence[str] = (),
) -> None:
    """Writes config.json, generation_config.json and the tokenizer of a source into a folder.

    A `tokenizer` given takes the place of the source's own, and `stop_token_ids` that of the tokens
    that end an answer: a base model trained on a chat template must stop where that does. `datasets` on the
    hub, which it is trained on, go into config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", found.config.hf | _origin(found, datasets))
    generation = dict(found.generation_config)
    if tokenizer is not None:
        _write_tokenizer(tokenizer, folder)
    elif found.kind == "gguf":
        _write_tokenizer(gguf.tokenizer(found.path), folder)
    else:
        for name, content in found.sidecars().items():
            (folder / name).write_bytes(content)
    if stop_token_ids:
        generation["eos_token_id"] = stop_token_ids[0] if len(stop_token_ids) == 1 else list(stop_token_ids)
    if generation:
        write_json(folder / "generation_config.json", generation)


def _origin(found: Source, datasets: Sequence[str] = ()) -> dict[str, Any]:
    """What a config.json says beside the model: license, base model and data sets, where they are known."""
    datasets = sorted({*found.config.hf.get("datasets", []), *datasets})
    known = {"license": found.license, "base_model": found.base_model, "datasets": datasets}
    return {name: value for name, value in known.items() if value}


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The files that it was read from, if it is still the same; else such as transformers 4 reads, too: 5
    names a class, and gives a list, that 4 does not know."""
    if (origin := tokenizer_folder(tokenizer)) is not None:
        for name, content in sidecars(origin).items():
            (folder / name).write_bytes(content)
        return
    tokenizer.save_pretrained(str(folder))
    config = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    if isinstance(more := config.pop("extra_special_tokens", None), list):
        config["additional_special_tokens"] = more
    write_json(folder / "tokenizer_config.json", config)


def _mark(kind: str, source: str | Path, dtype: Any, layers: list[int] | None = None) -> str:
    """A hash of what a conversion was asked for: the source by its place, not its content, which may be a
    run that has gone on since."""
    path = Path(source).expanduser()
    where = str(path.resolve()) if path.parent.exists() else str(source)
    kept = None if dtype is None else str(np.dtype(dtype))
    return hashlib.sha256(json.dumps([kind, where, kept, layers]).encode()).hexdigest()[:16]


def _refuse_other(found: Source, folder: Path, mark: str | None) -> None:
    """An existing folder is replaced only if it is empty, or holds what we wrote and nothing else, and
    with this `mark`, if it is to have one."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another output")
    if found.path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} holds the source itself; choose another output")
    if not any(folder.iterdir()):
        return
    written = _read_mark(folder)
    if not set(_files(folder)) <= {_MARK, *written.get("files", [])}:
        raise UserError(
            f"{folder} holds something else than a model that distillax wrote; move it, or choose another "
            "output"
        )
    if mark and written.get("made_of") != mark:
        raise UserError(
            f"{folder} holds a model that another command wrote (other source, format, dtype or layers); "
            "remove it, or choose another output"
        )


def _read_mark(folder: Path) -> dict[str, Any]:
    """What the mark of a folder says, `files` only if it is complete; {} if there is none to be read."""
    with suppress(UserError, OSError):
        return read_json(folder / _MARK)
    return {}


def _files(folder: Path) -> list[str]:
    """All that is in a folder and is no folder."""
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()
    )


def _partial(folder: Path, mark: str) -> Path:
    """A folder beside the output, empty but for the mark, to become it when it is complete."""
    temporary = folder.with_name(folder.name + ".partial")
    if temporary.exists() and _read_mark(temporary).keys() != {"made_of"}:
        raise UserError(
            f"{temporary} is in the way of what becomes {folder}; move it, or choose another output"
        )
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_json(temporary / _MARK, {"made_of": mark})
    return temporary


def _put(temporary: Path, folder: Path, mark: str) -> None:
    write_json(temporary / _MARK, {"made_of": mark, "files": _files(temporary)})
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
