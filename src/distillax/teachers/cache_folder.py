"""The folder of a capture: what there is of one, and its finished cache beside a manifest."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from distillax.data.shards import ShardStore, refuse_other_config, sha256_file
from distillax.data.targets import FILE, ID_BYTES, MANIFEST, read_manifest
from distillax.errors import UserError, listed
from distillax.progress import pace
from distillax.run_dir import read_json, write_json
from distillax.teachers.dataset import versions

SHARDS = f"{FILE}.shards"
SHARD = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("generation", pa.int32()),
        ("data", pa.large_binary()),
        ("error", pa.string()),
    ]
)
_COUNTS = ("rows", "examples", "positions", "left_out", "longest", "bytes")


@dataclass(frozen=True)
class Summary:
    """What came of a capture. Counts are of the whole cache; `seconds` and `tokens_per_second` (of all
    tokens that the teacher read) of this run, and 0 if nothing was left to do.

    rows: of the data set. examples: different ones with loss. positions: their loss-bearing targets.
    left_out: rows without any within the limit. longest: targets of the longest row, before it was cut.
    """

    rows: int
    examples: int
    positions: int
    left_out: int
    longest: int
    bytes: int
    seconds: float = 0.0
    tokens_per_second: float = 0.0

    def lines(self) -> list[str]:
        """The summary for people, a line a figure."""
        left_out = f" ({self.left_out:,} without loss, left out)" if self.left_out else ""
        figures = [
            ("rows", f"{self.rows:,}{left_out}"),
            ("examples", f"{self.examples:,}"),
            ("positions", f"{self.positions:,}"),
            ("bytes a position", f"{self.bytes / self.positions:,.1f}"),
            *pace(self.seconds, self.tokens_per_second),
        ]
        return [f"{name:<18}{figure}" for name, figure in figures]


def refuse_other_files(folder: Path) -> None:
    """Raises UserError if there are files in `folder`, and no cache, finished or not."""
    if not folder.is_dir() or (folder / FILE).exists() or (folder / SHARDS).exists():
        return
    if names := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        raise UserError(
            f"{folder} holds other files ({listed(names, 3)}), and no captured targets; give --output-dir a "
            "folder of its own"
        )


def begun(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a capture says that is finished or has shards."""
    if (folder / FILE).exists() and (folder / MANIFEST).exists():
        return read_manifest(folder)
    shards = folder / SHARDS
    if any(shards.glob("shard-*.parquet")) and (shards / "manifest.json").exists():
        return read_json(shards / "manifest.json").get("config")
    return None


def publish(store: ShardStore, folder: Path, kept: dict[str, Any], counts: Summary) -> Summary:
    """Writes the cache, then its manifest, and deletes the shards."""

    def select(table: pa.Table) -> pa.Table:
        ids = [bytes.fromhex(key) for key in table["prompt_id"].to_pylist()]
        return pa.table({"id": pa.array(ids, pa.binary(ID_BYTES)), "data": table["data"]})

    # Neither statistics nor a dictionary is of use for bits, and both take room.
    checksum = store.merge(folder / FILE, select, use_dictionary=False, write_statistics=False)
    counts = replace(counts, bytes=(folder / FILE).stat().st_size)
    manifest = {
        **kept,
        "counts": {name: getattr(counts, name) for name in _COUNTS},
        "bytes_per_position": round(counts.bytes / counts.positions, 3),
        "sha256": checksum,
        "versions": versions(),
    }
    write_json(folder / MANIFEST, manifest)
    store.remove()
    return counts


def finished(folder: Path, kept: dict[str, Any]) -> Summary | None:
    """The summary of a cache that is there and complete, or None if there is work to do."""
    path, manifest = folder / FILE, folder / MANIFEST
    if not path.exists():
        return None
    if not manifest.exists():
        if (folder / SHARDS).exists():  # killed between the two files
            return None
        raise UserError(f"{path} is there without a {MANIFEST}; choose another --output-dir or delete it")
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        old, counts = {name: found.get(name) for name in kept}, Summary(**found["counts"])
        checksum = found["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{manifest} is damaged; delete {folder} to start anew") from None
    refuse_other_config(folder, old, kept)
    if checksum != sha256_file(path):
        raise UserError(f"{path} has changed since it was written; delete {folder} to start anew")
    return counts
