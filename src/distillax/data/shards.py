"""Parquet shards: work that is written as it finishes, and that goes on after a kill.

The work is an ordered list of keys, cut into fixed blocks. Rows arrive in any order; a block is one
shard, written atomically as soon as it is complete, with its sha256 beside it. At the start every
shard is checked: a corrupt or partial one is done again. The merged file depends on the rows alone,
never on how often the work was interrupted.

    F.parquet.shards/
        lock                  held by the one process that may write here
        manifest.json         the configuration that the shards belong to
        shard-00000.parquet   rows of the first block, in key order
        shard-00000.json      its checksum
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distillax.errors import UserError, changed_values
from distillax.run_dir import fsync, write_json

Key = tuple[str, int]
Row = dict[str, Any]

BLOCK_SIZE = 64  # rows a shard: what a kill can cost, at most, for each row in flight
ROWS_PER_GROUP = 1024  # of the merged file


def fingerprint(config: Mapping[str, Any]) -> str:
    """sha256 (64 hex digits) of a configuration that can be written as JSON; the order of keys is free."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ between two configurations, nested ones as `sampling.seed`."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    absent = object()
    return sorted(k for k in flat_old | flat_new if flat_old.get(k, absent) != flat_new.get(k, absent))


def sha256_file(path: Path) -> str:
    """sha256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardStore:
    """The shards of one output. Use as a context manager: it holds the lock, and on the way out it
    keeps the rows of unfinished blocks too, so that an orderly stop loses nothing.

    `keys` are unique (prompt_id, generation) pairs in the order of the merged file; `schema` has the
    columns `prompt_id`, `generation` and `error`. A row whose `error` is not null has failed: it is
    stored, and it is missing again at the next start. `config` must not hold secrets. To an interrupt a note
    is added of how many of the `what` are kept.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keys: Sequence[Key],
        schema: pa.Schema,
        config: Mapping[str, Any],
        block_size: int = BLOCK_SIZE,
        what: str = "rows",
    ) -> None:
        self._what, self._failed = what, 0  # so many rows that were added
        self._directory, self._schema, self._config = directory, schema, dict(config)
        self._blocks = [tuple(keys[i : i + block_size]) for i in range(0, len(keys), block_size)]
        self._block_of = {key: i for i, block in enumerate(self._blocks) for key in block}
        if len(self._block_of) != len(keys):
            raise ValueError("the keys of a shard store must be unique")
        self._rows: dict[int, dict[Key, Row]] = {}  # of unfinished blocks
        self._complete: set[int] = set()
        self._lock: int | None = None

    def __enter__(self) -> "ShardStore":
        """Raises UserError if another process has the lock, or the shards have another configuration."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._directory)
        try:
            self._check_manifest()
            for tmp in self._directory.glob("*.tmp"):
                tmp.unlink()
            for block in range(len(self._blocks)):
                self._recall(block)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            kept, all_ = len(self._block_of) - len(self.missing()) - self._failed, len(self._block_of)
            there = f"{kept:,} of {all_:,} {self._what} are kept in {self._directory}"
            error.add_note(f"{there}, and the same command goes on from there")
        with ExitStack() as stack:  # what goes wrong with one block leaves the others as they are
            stack.callback(self._unlock)
            for block, rows in self._rows.items():
                if rows:
                    stack.callback(self._write, block, rows)

    def missing(self) -> list[Key]:
        """The keys that have no row yet, in order; failed rows of earlier runs are among them."""
        return [
            key
            for i, block in enumerate(self._blocks)
            if i not in self._complete
            for key in block
            if key not in self._rows.get(i, {})
        ]

    def add(self, row: Row) -> None:
        """Takes one finished row, and writes its shard if it was the last one of its block.

        Raises KeyError if the row isn't part of the work, ValueError if it is there already.
        """
        key = (row["prompt_id"], row["generation"])
        block = self._block_of[key]
        rows = self._rows.setdefault(block, {})
        if block in self._complete or key in rows:
            raise ValueError(f"{key} came twice")
        self._failed += row["error"] is not None
        rows[key] = row
        if len(rows) == len(self._blocks[block]):
            self._write(block, rows)
            self._complete.add(block)
            del self._rows[block]

    def tables(self) -> Iterator[pa.Table]:
        """The shards in order. Raises RuntimeError if one isn't there, complete and intact."""
        for i, block in enumerate(self._blocks):
            table = self._read(i)
            if table is None or table.num_rows != len(block):
                raise RuntimeError(f"{self._path(i)} is missing or damaged: start again to make it anew")
            yield table

    def merge(self, output_file: Path, select: Callable[[pa.Table], pa.Table], **options: Any) -> str:
        """Writes `output_file` atomically from what `select` takes of each shard; returns its sha256.
        `options` are those of pyarrow's ParquetWriter.

        The bytes depend on the selected rows only: fixed row groups, no times, no metadata of a run.
        """
        tmp = _tmp(output_file)
        schema = select(self._schema.empty_table()).schema
        with pq.ParquetWriter(tmp, schema, compression="zstd", **options) as writer:
            waiting = schema.empty_table()
            for table in self.tables():
                waiting = pa.concat_tables([waiting, select(table)]).combine_chunks()
                while waiting.num_rows >= ROWS_PER_GROUP:
                    writer.write_table(waiting.slice(0, ROWS_PER_GROUP))
                    waiting = waiting.slice(ROWS_PER_GROUP)
            if waiting.num_rows:
                writer.write_table(waiting)
        checksum = sha256_file(tmp)
        _publish(tmp, output_file)
        return checksum

    def remove(self) -> None:
        """Deletes the shards. Call it once the merged file and its manifest are in place."""
        self._rows.clear()
        for path in self._directory.glob("shard-*"):  # before the manifest, without which they mean nothing
            path.unlink()
        shutil.rmtree(self._directory)

    def _path(self, block: int) -> Path:
        return self._directory / f"shard-{block:05d}.parquet"

    def _check_manifest(self) -> None:
        path = self._directory / "manifest.json"
        keys = hashlib.sha256(json.dumps(self._blocks).encode()).hexdigest()
        wanted = {"config": self._config, "fingerprint": fingerprint(self._config), "keys": keys}
        shards = any(self._directory.glob("shard-*.parquet"))
        if path.exists() and shards:
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise UserError(f"{path} is not valid JSON; delete {self._directory} to start anew") from None
            refuse_other_config(self._directory, found.get("config", {}), self._config)
            if found != json.loads(json.dumps(wanted)):
                raise UserError(
                    f"{self._directory} was made for other work (its list of prompts differs); "
                    "choose another output or delete it"
                )
        elif shards:
            raise UserError(f"{self._directory} has shards but no manifest.json; delete it to start anew")
        else:  # nothing was done for another configuration, if there was one
            write_json(path, wanted)

    def _recall(self, block: int) -> None:
        """Takes over what an earlier run has left of a block."""
        table = self._read(block)
        if table is None:
            return
        rows = {
            (row["prompt_id"], row["generation"]): row for row in table.to_pylist() if row["error"] is None
        }
        if len(rows) == len(self._blocks[block]):
            self._complete.add(block)
        else:
            self._rows[block] = rows

    def _read(self, block: int) -> pa.Table | None:
        """A shard's rows, or None if it isn't there or isn't what was written."""
        path = self._path(block)
        try:
            record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if record["sha256"] != sha256_file(path):
                return None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return pq.read_table(path)

    def _write(self, block: int, rows: dict[Key, Row]) -> None:
        """Writes the rows of a block in key order. A kill between the two files leaves a checksum that
        doesn't match, so the block is done again."""
        path = self._path(block)
        ordered = [rows[key] for key in self._blocks[block] if key in rows]
        tmp = _tmp(path)
        pq.write_table(pa.Table.from_pylist(ordered, schema=self._schema), tmp, compression="zstd")
        checksum = sha256_file(tmp)
        _publish(tmp, path)
        write_json(path.with_suffix(".json"), {"rows": len(ordered), "sha256": checksum})

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def refuse_other_config(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises UserError, naming the keys, if what lies at `path` was made with another configuration."""
    before, now = _flatten(old), _flatten(json.loads(json.dumps(new)))
    if changed := differences(before, now):
        values = changed_values(
            (re.sub("^(provenance|sampling)[.]", "", name), before.get(name), now.get(name))
            for name in changed
        )
        raise UserError(
            f"{path} was made with another configuration: {values}; give the old values, choose another "
            "output, or delete it"
        )


def _lock(directory: Path) -> int:
    """An open file that holds the lock, released when it is closed or the process dies."""
    path = directory / "lock"
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(
                f"another process is writing {directory}; wait for it or choose another output file"
            ) from None
        # A process that has just finished may have deleted the file between our two calls.
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
        os.close(lock)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _tmp(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _publish(tmp: Path, path: Path) -> None:
    """Moves a finished file into place; its contents are on the disk before its name is."""
    fsync(tmp)
    os.replace(tmp, path)
    fsync(path.parent)


def manifest_path(output_file: Path) -> Path:
    """Where the manifest of a data set lies."""
    return output_file.with_name(output_file.stem + ".manifest.json")
