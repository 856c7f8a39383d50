"""Parquet and JSON files -> Arrow tables. A fault names its file and row, and of JSONL the line."""

import json
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from distillax.errors import UserError, first_line, listed
from distillax.run_dir import parse_json

SUFFIXES = (".parquet", ".jsonl", ".json")
_JSON_BATCH = 10_000  # rows that are Python objects at a time
_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", dict: "an object"}


@dataclass
class Part:
    """A file or data set, and how many rows it has. Rows are counted from 0, as by data frames, and lines of
    JSONL from 1, as by editors; `blanks`: the rows that an empty line stands before, None without lines."""

    name: str
    rows: int = 0
    blanks: list[int] | None = None

    def where(self, row: int) -> str:
        """`file, row 3 (counted from 0)`, or `file.jsonl, line 4 (row 3, counted from 0)`, for errors."""
        return f"{self.name}, {self.place(row)}"

    def place(self, row: int) -> str:
        """The same without the file."""
        if self.blanks is None:
            return f"row {row} (counted from 0)"
        return f"line {row + 1 + bisect_right(self.blanks, row)} (row {row}, counted from 0)"


def kind(value: Any) -> str:
    """What a value is, for errors."""
    for part in value if isinstance(value, list) else ():
        if isinstance(part, dict) and "type" in part and not _is_text(part):
            return f"a list with a part of type {part['type']!r}"
    return "empty (null)" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def text_of(content: Any) -> Any:
    """What a turn says: OpenAI's list of parts, if all of them are text, each from a new line."""
    if not isinstance(content, list) or not content or not all(map(_is_text, content)):
        return content
    return "\n".join(part["text"] for part in content)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def read_files(paths: Sequence[Path], only: Collection[str] | None) -> tuple[pa.Table, list[Part]]:
    """The rows of all files, one after the other, with all columns that any of them has; those that are not
    in `only` (None: all) are null, and take no room.

    Raises UserError for a file that cannot be read, and for a column of several types, with the row.
    """
    parts = [Part(str(path)) for path in paths]
    read = [
        _read_parquet(path, part, only) if path.suffix == ".parquet" else _read_json(path, part, only)
        for path, part in zip(paths, parts, strict=True)
    ]
    return _concat(read, [(part, 0) for part in parts]), parts


def _read_parquet(path: Path, part: Part, only: Collection[str] | None) -> pa.Table:
    try:
        there = pq.read_metadata(path)
        part.rows = there.num_rows
        if only is None:
            return pq.read_table(path, memory_map=True)
        names = there.schema.to_arrow_schema().names
        read = pq.read_table(path, columns=[name for name in names if name in only], memory_map=True)
        return pa.table({n: read[n] if n in only else pa.nulls(there.num_rows) for n in names})
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({first_line(error)})") from None


def _read_json(path: Path, part: Part, only: Collection[str] | None) -> pa.Table:
    """JSON: a list of objects, or an object a line."""
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{path} has an unknown type; the types are {', '.join(SUFFIXES)}")
    tables: list[pa.Table] = []
    batch: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for row in _json_rows(file, part):
                if not isinstance(row, dict):
                    raise UserError(f"{part.where(part.rows)}: {kind(row)}, not a JSON object")
                if not row:  # it would be no row of the table, and those after it had other numbers
                    raise UserError(f"{part.where(part.rows)}: an object without keys; remove it")
                part.rows += 1
                batch.append(row)
                if len(batch) == _JSON_BATCH:
                    tables.append(_table(batch, part, only))
                    batch = []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({first_line(error)})") from None
    tables.append(_table(batch, part, only))
    return _concat(tables, [(part, i * _JSON_BATCH) for i in range(len(tables))])


def _json_rows(file: TextIO, part: Part) -> Iterator[Any]:
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    file.seek(0)
    if first == "[":
        yield from _parsed(file.read(), part, 1)
        return
    part.blanks = []
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _parsed(line.rstrip(), part, number)
        else:
            part.blanks.append(part.rows)


def _parsed(text: str, part: Part, line: int) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        told = f"not valid JSON ({error.msg}, column {error.colno}); correct it"
        raise UserError(f"{part.name}, line {line}: {told}") from None


def _table(rows: list[dict[str, Any]], part: Part, only: Collection[str] | None) -> pa.Table:
    """The last rows that were read of a file."""
    first = part.rows - len(rows)
    arrays = {}
    for name in {name: None for row in rows for name in row}:
        if only is not None and name not in only:
            arrays[name] = pa.nulls(len(rows))
            continue
        values = [row.get(name) for row in rows]
        try:
            arrays[name] = _array(values, part, first)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
            placed = ((part, row, value) for row, value in enumerate(values, first))
            raise _odd_value(part.name, name, placed, error) from None
    return pa.table(arrays)


def _array(values: list[Any], part: Part, first: int) -> pa.Array:
    """A column of the rows from `first` on, the contents of turns as text where they can be."""
    turns = [
        (row, turn)
        for row, value in enumerate(values, first)
        for turn in (value if isinstance(value, list) else ())
        if isinstance(turn, dict) and isinstance(turn.get("content"), list)
    ]
    for _, turn in turns:
        turn["content"] = text_of(turn["content"])
    try:
        return pa.array(values)
    except pa.ArrowException:
        for row, turn in turns:
            if not isinstance(turn["content"], str):
                what = kind(turn["content"])
                raise UserError(f"{part.where(row)}: the content of a turn is {what}, not a string") from None
        raise


def _concat(tables: Sequence[pa.Table], starts: Sequence[tuple[Part, int]]) -> pa.Table:
    """One table of all; `starts` says of what file each is, and from which row on."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        for name in {name: None for table in tables for name in table.column_names}:
            have = [
                (table.select([name]), *start)
                for table, start in zip(tables, starts, strict=True)
                if name in table.column_names
            ]
            try:
                pa.concat_tables([table for table, *_ in have], promote_options="permissive")
            except pa.ArrowException:
                # The values of each have one type, which some of them show.
                placed = (
                    (part, first + row, value.as_py())
                    for table, part, first in have
                    for row, value in enumerate(table[name][:_JSON_BATCH])
                )
                names = dict.fromkeys(part.name for _, part, _ in have)
                raise _odd_value(listed([*names], 3), name, placed, error) from None
        raise


def _odd_value(
    files: str, column: str, values: Iterable[tuple[Part, int, Any]], error: Exception
) -> UserError:
    """The first of a column's values, each with its file and row, that does not go with those before it."""
    seen: dict[str, tuple[str, Part, int]] = {}
    told = first_line(error)
    for part, row, value in values:
        for place, what in _kinds_in(value, repr(column)):
            before, first, at = seen.setdefault(place, (what, part, row))
            if before != what:
                there = f"in {first.place(at) if first is part else first.where(at)}"
                there = "elsewhere in that row" if first is part and at == row else there
                return UserError(
                    f"{part.where(row)}: {place} is {what}, but {before} {there}; give all one type"
                )
        try:
            pa.array([value])
        except UnicodeEncodeError as fault:
            return UserError(
                f"{part.where(row)}: {column!r} has half a character ({first_line(fault)}); correct it"
            )
        except OverflowError:
            return UserError(f"{part.where(row)}: {column!r} has a number that is too large; correct it")
        except pa.ArrowException as fault:
            told = first_line(fault)
    return UserError(f"{files}: the values of {column!r} don't have one type ({told}); correct them")


def _kinds_in(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """What a value and all within it are, and where; no two kinds may be at one place."""
    if value is None:
        return
    yield place, "a list" if isinstance(value, list) else kind(value)
    for item in value if isinstance(value, list) else ():
        yield from _kinds_in(item, f"an item of {place}")
    for name, item in value.items() if isinstance(value, dict) else ():
        yield from _kinds_in(item, f"{name!r} in {place}")
