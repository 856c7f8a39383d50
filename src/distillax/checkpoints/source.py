"""One door for every kind of model on disk: Hugging Face folder or hub id, GGUF, Orbax."""

import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from distillax.checkpoints import gguf, state
from distillax.checkpoints.huggingface import FolderSource, Stored, iter_params, sidecars
from distillax.errors import UserError, about, first_line, listed
from distillax.models.families import ModelConfig, config_from_hf, param_specs, preset
from distillax.models.quantize import is_quantized, read_quantized
from distillax.models.spec import Tree, iter_specs, unflatten
from distillax.models.tokenizers import extends, template_of
from distillax.run_dir import read_json

HF_FOLDER = "huggingface"  # config and tokenizer beside an Orbax checkpoint
_BLOCK, _BLOCKS = 1 << 18, 1024  # bytes in a block, and how many of them of a model tell it from another
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SIDE_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md"]
# The same weights once more, under the names or in the dtypes of other programs; "*" crosses folders there.
_OTHER_WEIGHTS = ["consolidated*", "*/*.safetensors"]
# Folder, chat template and number of tokens of the tokenizers that were read.
_READ: WeakKeyDictionary[Any, tuple[Path, Any, int]] = WeakKeyDictionary()


class Source:
    """Where a model lies. Nothing is read before it is asked for.

    `kind` is "folder", "gguf" or "orbax". `path` holds the weights; `side` the Hugging Face
    config and tokenizer, and may be None for an Orbax checkpoint that stands alone.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        path: Path,
        side: Path | None,
        model_name: str | None = None,
        downloaded: bool = False,
    ):
        self.name, self.kind, self.path, self.side = name, kind, path, side
        self._model_name, self._downloaded = model_name, downloaded

    def version(self) -> str:
        """What moves on under the same name: the step of an Orbax checkpoint, or the snapshot of a hub id."""
        parts = self.path.resolve().parts
        if self.kind == "orbax":
            return "/".join(parts[-2:])
        for model, folder, snapshot in zip(parts, parts[1:], parts[2:], strict=False):
            if model.startswith("models--") and folder == "snapshots":
                return snapshot
        return ""

    @cached_property
    def config(self) -> ModelConfig:
        if self.kind == "gguf" or self.side is not None:
            read = gguf.hf_config(self.path) if self.side is None else read_json(self.side / "config.json")
            with about(self.name):
                return config_from_hf(read)
        if self._model_name:
            return preset(self._model_name)
        raise UserError(
            f"{self.path} has no {HF_FOLDER}/config.json beside it or above it; "
            "give model_name, or keep the checkpoint in the folder that wrote it"
        )

    @cached_property
    def license(self) -> str | None:
        """The license's name as the hub has it, such as apache-2.0: of a GGUF file's metadata, of a config
        that we wrote, or of the model card beside one. None where none of them has a name of that kind."""
        if self.kind == "gguf":
            said = gguf.license_name(self.path)
        elif self.side is None:
            return None
        elif not (said := self.config.hf.get("license")):
            card = self.side / "README.md"
            text = card.read_text(encoding="utf-8", errors="ignore") if card.is_file() else ""
            head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
            line = re.search(r"^license:[ \t]*(\S+)[ \t]*$", head[1], re.MULTILINE) if head else None
            said = line[1] if line else None
        return said if isinstance(said, str) and re.fullmatch(r"[\w.-]+", said) else None

    @cached_property
    def base_model(self) -> str | None:
        """The hub id that it came from, if that is known: its own, or that in a config that we wrote."""
        if self._downloaded:
            return self.name
        said = None if self.kind != "gguf" and self.side is None else self.config.hf.get("base_model")
        return said if isinstance(said, str) and HUB_ID.fullmatch(said) else None

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Stop tokens and sampling defaults: generation_config.json over config.json's ids."""
        if self.kind == "gguf":
            return gguf.generation_config(self.path)
        ids = {
            k: v for k, v in self.config.hf.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        file = self.side / "generation_config.json" if self.side else None
        return {**ids, **(read_json(file) if file and file.is_file() else {})}

    def tokenizer(self) -> Any:
        """A transformers fast tokenizer. Raises UserError where the source has none."""
        if self.kind == "gguf":
            return gguf.tokenizer(self.path)
        if self.side is None or not has_tokenizer(self.side):
            raise UserError(f"{self.name} has no tokenizer; put its tokenizer.json there")
        return load_tokenizer_folder(self.side)

    def tokenizer_or_none(self) -> Any:
        """None where there is none, or one of a kind that cannot be read here: of some GGUF files, or as
        tokenizer.model alone. A tokenizer.json that cannot be read raises UserError: what another one says of
        its ids could not be checked."""
        if self.side is not None and (self.side / "tokenizer.json").is_file():
            return self.tokenizer()
        with suppress(UserError):
            return self.tokenizer()
        return None

    def iter_params(self, dtype: Any = None) -> list[Stored]:
        """Every parameter, checked against the config. `dtype` None keeps the source's own."""
        if self.kind != "orbax":
            source = gguf.GGUFSource(self.path) if self.kind == "gguf" else FolderSource(self.path)
            return list(iter_params(source, self.config, self.name, dtype))
        found = state.open_params(self.path)
        self._check_orbax({path: leaf.shape for path, leaf in found.items()})
        out = []
        for path, _ in iter_specs(param_specs(self.config)):
            store = found[path]
            kept = np.dtype(dtype) if dtype is not None else store.dtype.numpy_dtype
            axis = state.split_axis(store, state.is_stacked(path))
            out.append(Stored(path, store.shape, kept, axis, partial(state.read_param, store, kept)))
        return out

    def weights(self, dtype: Any = None, quantization: str = "", products: str = "") -> list[Stored]:
        """As `iter_params`. What serves products alone, the matrices of the layers and a head of its own, is
        read in the dtype `products` where that is narrower: products in it would round it so anyway.

        With `quantization` int8 the matrices of the layers are read, a layer at a time, as `Quantized`, made
        from the stored numbers, whatever the dtypes. A part of one is of outputs only. To read a weight that
        cannot be quantised raises UserError.
        """
        found = {stored.path: stored for stored in self.iter_params(dtype)}
        specs = dict(iter_specs(param_specs(self.config)))
        matrices = [path for path, spec in specs.items() if is_quantized(spec)]
        if products:
            narrow = {stored.path: stored for stored in self.iter_params(products)}
            for path in (*matrices, ("head",)):
                if path in found and narrow[path].dtype.itemsize < found[path].dtype.itemsize:
                    found[path] = narrow[path]
        if quantization:
            exact = {stored.path: stored for stored in self.iter_params(np.float32)}
            for path in matrices:
                read: Any = partial(
                    read_quantized, exact[path].read, specs[path], self.config.layers, self.name
                )
                found[path] = replace(exact[path], axis=-1, read=read)
        return list(found.values())

    def params(self, dtype: Any = None, quantization: str = "") -> Tree:
        """All parameters as numpy arrays; `quantization` as in `weights`."""
        return unflatten({stored.path: stored.read() for stored in self.weights(dtype, quantization)})

    def identity(self) -> list[Any]:
        """What changes when the weights do, and is the same for a copy elsewhere: size and digest of their
        files; where these are more than 256 MB, of so many bytes from all over them."""
        if self.kind == "folder":
            files = [*sorted(self.path.glob("*.safetensors")), self.path / "config.json"]
        elif self.kind == "gguf":
            files = [self.path]
        else:
            files = sorted(path for path in self.path.rglob("*") if path.is_file())
        blocks = max(16, _BLOCKS // max(len(files), 1))
        return [[path.name, path.stat().st_size, _digest(path, blocks)] for path in files]

    def sidecars(self) -> dict[str, bytes]:
        """Tokenizer and generation files, to be copied beside another copy of the model."""
        if self.side is not None:
            return sidecars(self.side)
        return {}

    def _check_orbax(self, found: dict[tuple[str, ...], tuple[int, ...]]) -> None:
        specs = iter_specs(param_specs(self.config))
        wanted = {path: spec.full_shape(self.config.layers) for path, spec in specs}
        missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        wrong = sorted(p for p in set(wanted) & set(found) if tuple(found[p]) != wanted[p])
        problems = [
            f"{what} {listed(['/'.join(path) for path in paths])}"
            for what, paths in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
            if paths
        ]
        if problems:
            raise UserError(f"{self.path} does not fit its configuration: {'; '.join(problems)}")


def _digest(file: Path, blocks: int) -> str:
    """16 hex digits of the sha256 of a file's bytes; of a large file, of so many blocks from all over it."""
    size, found = file.stat().st_size, hashlib.sha256()
    starts: Iterable[int] = range(0, size, _BLOCK)
    if size > blocks * _BLOCK:
        starts = (i * (size - _BLOCK) // (blocks - 1) for i in range(blocks))
    with file.open("rb") as data:
        for start in starts:
            data.seek(start)
            found.update(data.read(_BLOCK))
    return found.hexdigest()[:16]


def find(
    source: str | Path,
    *,
    model_name: str | None = None,
    hf_access_token: str | None = None,
    weights: bool = True,
) -> Source:
    """Finds out what a source is, downloading a hub id: all of it, or without its `weights`. `model_name`
    serves an Orbax checkpoint that lies without its config.json. Raises UserError if there is nothing."""
    name = str(source)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is a file, but not a .gguf; give a model's folder or a GGUF file")
        return Source(name, "gguf", path, None)
    orbax = _find_orbax(path)
    if orbax is not None:
        return Source(name, "orbax", orbax, _find_side(orbax), model_name)
    if (path / "config.json").is_file():
        return Source(name, "folder", path, path)
    if _holds_model(path / "export"):  # of a run of `distillax run`: what came of it
        return find(path / "export")
    if path.exists():
        inside = [child for child in sorted(path.glob("*")) if _holds_model(child)]
        hint = f"; {' or '.join(map(str, inside[:3]))} does" if inside else ""
        raise UserError(f"{name} holds no model: neither config.json nor an Orbax checkpoint is in it{hint}")
    if HUB_ID.fullmatch(name) and not path.parent.exists():
        folder = _download(name, hf_access_token, [*(["*.safetensors"] if weights else []), *_SIDE_FILES])
        return Source(name, "folder", folder, folder, downloaded=True)
    raise UserError(f"{name} does not exist; give a folder, a GGUF file, an Orbax checkpoint or a hub id")


def find_tokenizer(source: str | Path, hf_access_token: str | None = None) -> Any:
    """The tokenizer of a source, or of a folder that holds a tokenizer only."""
    path = Path(source).expanduser()
    if (path / "tokenizer.json").is_file():
        return load_tokenizer_folder(path)
    return find(source, hf_access_token=hf_access_token, weights=False).tokenizer()


def choose_tokenizer(own: Any, whose: str, path: str | None, key: str, token: str | None = None) -> Any:
    """The tokenizer of `path`, which `key` gives, or else a model's `own`. Raises UserError if there is
    neither, or ids of `own` mean something else in the one of `path`."""
    if not path and own is None:
        raise UserError(f"{whose} has no tokenizer; give {key}")
    if not path:
        return own
    given = find_tokenizer(path, token)
    if own is not None and not extends(given, own):
        instead = "leave it out, or give" if template_of(own) else "give"
        raise UserError(
            f"{key}: {path} is another tokenizer than that of {whose}, whose weights know other ids; "
            f"{instead} one of the same family"
        )
    return given


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of whatever kind: a damaged file gives all sorts
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the tokenizer in {folder} cannot be read ({reason})") from error
    _READ[tokenizer] = folder, tokenizer.chat_template, len(tokenizer)
    return tokenizer


def tokenizer_folder(tokenizer: Any) -> Path | None:
    """Where a tokenizer was read from, if it is there, and the tokenizer still the same."""
    folder, *as_read = _READ.get(tokenizer, (Path(os.devnull), None, 0))
    same = as_read == [tokenizer.chat_template, len(tokenizer)]
    return folder if same and has_tokenizer(folder) else None


def _holds_model(path: Path) -> bool:
    with suppress(OSError):  # a folder of somebody else's
        whole = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
        return whole or _find_orbax(path) is not None
    return False


def _find_orbax(path: Path) -> Path | None:
    """The parameter checkpoint meant by a path: itself, a step, a conversion, or a run's latest."""
    if path.name == "latest" and not path.exists():
        path = path.parent
    for candidate in (path, path / state.MODEL_PARAMS, path / "0" / "items"):
        if state.is_params(candidate):
            return candidate
    steps_in = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not steps_in.is_dir():
        return None
    steps = [
        int(p.name)
        for p in steps_in.iterdir()
        if p.name.isdigit() and state.is_params(p / state.MODEL_PARAMS)
    ]
    return steps_in / str(max(steps)) / state.MODEL_PARAMS if steps else None


def _find_side(path: Path) -> Path | None:
    """The nearest folder with the model's config.json, at or above a checkpoint."""
    for parent in (path, *list(path.absolute().parents)[:3]):
        if (parent / HF_FOLDER / "config.json").is_file():
            return parent / HF_FOLDER
    return None


def _download(hub_id: str, token: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=files, ignore_patterns=_OTHER_WEIGHTS, token=token)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{hub_id} is neither a local path nor a hub id that can be fetched ({first_line(error)})"
        ) from None
