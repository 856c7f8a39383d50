"""Any data set -> rows, kept in Arrow. A fault names its file and row; nothing is ever executed."""

import glob
import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from distillax.data.files import SUFFIXES, Part, read_files
from distillax.errors import UserError, first_line, listed

BUILDERS = ("parquet", "json")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SHARD_SUFFIX = re.compile(r"-\d+(-of-\d+)?$")
_CONFIGS = re.compile(r"available(?: configs)?: \[(.*)\]", re.IGNORECASE)  # in errors of `datasets`
_NAMED_BY = "--data-name, or in a recipe hf_name or prompts.name"
_HUB_TIMEOUT_S = 10.0
_SPLIT_WORD = re.compile(r"(train|test|valid|validation|val|dev|eval)([^a-z]|$)")


class Rows(Sequence[dict[str, Any]]):
    """Rows of a data set, by index. `table` holds them in Arrow; `names` are those of its `parts`."""

    def __init__(self, table: pa.Table, parts: Sequence[Part]) -> None:
        self.table = table
        self.names = [part.name for part in parts]
        self._parts, self._ends = parts, list(accumulate(part.rows for part in parts))

    @property
    def columns(self) -> list[str]:
        return self.table.column_names

    @property
    def source(self) -> str:
        """The file or data set, or the first of them, for errors."""
        return self.names[0]

    def where(self, row: int) -> str:
        """File, row and line, in its own file, for errors (`Part.where`)."""
        part = bisect_right(self._ends, row)
        return self._parts[part].where(row - (self._ends[part - 1] if part else 0))

    def value(self, column: str, row: int) -> Any:
        return self.table.column(column)[row].as_py()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row):  # type: ignore[override]
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return {column: self.value(column, row % len(self)) for column in self.columns}


def read_rows(
    path_or_hub_id: str,
    split: str | None = "train",
    *,
    files: str | Sequence[str] | None = None,
    only: Collection[str] | None = None,
    hf_name: str | None = None,
    hf_access_token: str | None = None,
) -> Rows:
    """Reads a data set; nothing of it is ever executed.

    `path_or_hub_id` is a Parquet, JSON or JSONL file (`split` isn't used then), a folder of such files or
    one that `datasets` has saved, a Hugging Face hub id, or "parquet" or "json", with `files` naming the
    files (paths, patterns or URLs). Of files no columns but `only` those are read; the others are there, and
    null, which takes no room. `hf_name` is the configuration of a data set on the hub that has several.

    Raises UserError, naming the path, if it isn't there, is broken or empty, or has no such split or
    configuration.
    """
    path = Path(path_or_hub_id).expanduser()
    names = [files] if isinstance(files, str) else list(files or ())
    if hf_name and (names or path.exists() or path_or_hub_id in BUILDERS):
        what = f"files of {path_or_hub_id}" if names else path_or_hub_id
        raise UserError(
            f"the configuration {hf_name!r} ({_NAMED_BY}) is for a data set on the hub, and {what} has none; "
            "leave it out"
        )
    if path_or_hub_id in BUILDERS and not path.is_dir():
        if not names:
            raise UserError(f"{path_or_hub_id!r} needs files to read; name them with hf_train_files")
        if any("://" in name for name in names):
            rows = _read_hub(path_or_hub_id, None, "train", names, hf_access_token)
        else:
            rows = _read_named(names, only)
    elif path.is_file() and names:
        raise UserError(
            f"{path_or_hub_id} is one file, so {', '.join(names)} would not be read; give hf_path=parquet, "
            "or json for .json and .jsonl, with hf_train_files and hf_eval_files"
        )
    elif path.is_file():
        rows = Rows(*read_files([path], only))
    elif path.is_dir() and names:
        rows = _read_named([str(path / name) for name in names], only)
    elif path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        rows = _read_saved(path, split) if saved else Rows(*read_files(_files_of_split(path, split), only))
    elif "/" not in path_or_hub_id and names and all(Path(name).expanduser().is_file() for name in names):
        raise UserError(
            f"{path_or_hub_id!r} reads no files; give hf_path=parquet, or json for .json and .jsonl"
        )
    else:
        rows = _read_hub(path_or_hub_id, hf_name or None, split, names, hf_access_token)
    if not len(rows):
        raise UserError(f"{', '.join(names) or path_or_hub_id} has no rows; name a data set that has some")
    return rows


def refuse_split_of_file(path: str, split: str, said: str) -> None:
    """Raises UserError for a split, given as `said`, of a single file: all of it would be read."""
    if split not in ("", "train") and Path(path).expanduser().is_file():
        raise UserError(f"{said}: {path} is one file, without splits; leave it out")


def _read_named(patterns: Sequence[str], only: Collection[str] | None) -> Rows:
    paths: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found = [path] if path.is_file() else _glob(path)
        if not found:
            raise UserError(f"there is no file {pattern}; check its path")
        paths += found
    return Rows(*read_files(paths, only))


def _glob(pattern: Path) -> list[Path]:
    return [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)) if Path(name).is_file()]


def _files_of_split(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder that belong to a split: `test.jsonl`, `data/test-00000-of-00002.parquet`
    and `test/any.parquet` are test's. Files that name no split are train's."""
    files: list[Path] = []
    for suffix in SUFFIXES:  # one type only: JSON beside Parquet is most often metadata
        if files := sorted(folder.rglob(f"*{suffix}")):
            break
    else:
        raise UserError(f"the folder {folder} has no data files ({', '.join(SUFFIXES)})")
    names = {file: _split_names(file.relative_to(folder)) for file in files}
    if split is not None and (of_split := [file for file in files if split in names[file]]):
        return of_split
    named = sorted({name for file in files for name in names[file] if _SPLIT_WORD.match(name)})
    if not named and split in (None, "train"):
        return files
    if split is None and len(named) == 1:
        return [file for file in files if named[0] in names[file]]
    wanted = "several splits" if split is None else f"no split {split!r}"
    raise UserError(f"the folder {folder} has {wanted}; the splits there are: {', '.join(named) or 'train'}")


def _split_names(file: Path) -> set[str]:
    return {_SHARD_SUFFIX.sub("", file.stem), *file.parent.parts}


def _read_saved(folder: Path, split: str | None) -> Rows:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{folder} is not a readable saved data set ({first_line(error)})") from None
    if not isinstance(saved, dict) and split not in (None, "", "train"):
        raise UserError(f"{folder} is one data set, without splits, so there is no {split!r}; leave it out")
    return _rows(_of_split(saved, split, str(folder)), str(folder))


def _of_split(loaded: Any, split: str | None, name: str) -> Any:
    """One data set of a dictionary of splits."""
    if not isinstance(loaded, dict):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        wanted = "several splits" if split is None else f"no split {split!r}"
        raise UserError(f"{name} has {wanted}; the splits there are: {', '.join(loaded)}")
    return loaded[split]


def _read_hub(name: str, config: str | None, split: str | None, files: list[str], token: str | None) -> Rows:
    if not _HUB_ID.fullmatch(name) or name.endswith(SUFFIXES):
        raise UserError(f"there is no file or folder {name}; check the path")
    import datasets
    from datasets import config as settings
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    offline = settings.HF_HUB_OFFLINE
    fault = None if offline else _unreachable(name, token)
    try:
        settings.HF_HUB_OFFLINE = offline or bool(fault)  # what is kept here is read all the same
        loaded = datasets.load_dataset(name, config, data_files=files or None, token=token, split=split)
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        if found := _CONFIGS.search(str(error)):
            wanted = f"no configuration {config!r}" if config else "several configurations"
            there = listed(re.findall(r"'(.*?)'", found[1]), 8)
            raise UserError(f"{name} has {wanted}; name one ({_NAMED_BY}) of {there}") from None
        reason = fault if fault and isinstance(error, ConnectionError) else first_line(error)
        reason = reason.replace(token, "***") if token else reason
        raise UserError(
            f"{name} is neither here nor readable on the Hugging Face hub as split {split!r} ({reason}); "
            "check the name, the split, the network and the access token"
        ) from None
    finally:
        settings.HF_HUB_OFFLINE = offline
    return _rows(_of_split(loaded, split, name), ", ".join(files) or name)


def _unreachable(name: str, token: str | None) -> str | None:
    """Why the hub gives no answer about a data set, if it gives none. Asked once: where there is no network,
    `datasets` tries for half a minute, or for six where packets are lost."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        HfApi(token=token).dataset_info(name, timeout=_HUB_TIMEOUT_S, expand=["sha"])
    except (HfHubHTTPError, ValueError, KeyError, TypeError, AttributeError):
        return None  # what is wrong is told by who reads it
    except (HTTPError, OSError) as error:
        return f"the hub does not answer: {first_line(error)}"
    return None


def _rows(dataset: Any, name: str) -> Rows:
    table = dataset.with_format("arrow")[:]
    return Rows(table, [Part(name, table.num_rows)])
