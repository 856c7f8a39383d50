"""Rows of a data set -> prompts for a teacher, or conversations for a student. Faults name file and row."""

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, overload

from distillax.data.files import kind, text_of
from distillax.data.rows import Rows, read_rows
from distillax.errors import UserError

Message = dict[str, str]

PROMPT_COLUMNS = ("messages", "prompt", "question", "conversations", "instruction")
CONVERSATION_COLUMNS = (
    ("messages",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("conversations",),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
)
# Alpaca's prompts: what `instruction` is about stands in a column of its own, empty where there is nothing.
_ALPACA = ("instruction", "input", "output")
# What a question is about, in SQuAD, Dolly and many others: without it there is no answer.
_CONTEXT, _QUESTIONS = "context", ("prompt", "question", "instruction")
EXTRA_COLUMNS = ("completion_token_ids", "finish_reason")
ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys of a turn that would change what it says, and that nothing here reads.
_CALLS = ("tool_calls", "function_call")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_COMPARED = 50_000  # rows of a fingerprint at least, where there are as many


@dataclass(frozen=True)
class Prompt:
    """A conversation up to and including its last user turn.

    `prompt_id` depends on the content, and for a repeated prompt on how often it came before ("...-2");
    `row` is the row of the data set that it comes from.
    """

    prompt_id: str
    messages: list[Message]
    row: int


class Conversations(Sequence[list[Message]]):
    """Conversations of a data set, by index. A row is checked when it is read.

    `extras(row)` gives what the row has of completion_token_ids and finish_reason; `where(row)` names
    file and row for errors; `names` are the files, or the data set.
    """

    def __init__(self, rows: Rows, columns: Sequence[str]) -> None:
        self._rows, self._columns = rows, tuple(columns)
        self._extras = [column for column in EXTRA_COLUMNS if column in rows.columns]
        self.where, self.names = rows.where, rows.names

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> list[Message]: ...

    @overload
    def __getitem__(self, row: slice) -> list[list[Message]]: ...

    def __getitem__(self, row: int | slice) -> list[Message] | list[list[Message]]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        messages: list[Message] = []
        roles = ("user", "assistant") if len(self._columns) == 2 else ("user",)
        for column, role in zip(self._columns, roles, strict=True):
            value = _value(self._rows, column, row)
            _refuse_unread(value, _CALLS + _THOUGHTS, self.where(row))
            messages += _messages(value, role, column, self.where(row))
        if not any(message["role"] == "assistant" for message in messages):
            if len(self._columns) == 1 and isinstance(self._rows.value(self._columns[0], row), str):
                raise UserError(
                    f"{self.where(row)}: {self._columns[0]!r} is text, and holds no answer to learn from; "
                    "name two columns, such as question,answer, or one of conversations"
                )
            raise UserError(f"{self.where(row)}: there is no assistant turn to learn from; remove the row")
        _refuse_repeated(messages, ("assistant",), self.where(row))
        return messages

    @property
    def local(self) -> bool:
        """Whether it is of files or folders, and not of the hub."""
        return any("://" in name or Path(name).expanduser().exists() for name in self.names)

    @property
    def by_teacher(self) -> bool:
        """Whether the columns are those that `distillax generate` writes."""
        return set(self._rows.columns) >= {"prompt_id", "generation", "finish_reason"}

    def fingerprint(self) -> str:
        """What changes when what is learnt does: of all rows, or, of 100,000 and more, of every n-th, which
        are 50,000 to 75,000. Found once: seconds of many rows."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{len(self)}".encode())
        for row in range(0, len(self), max(len(self) // _COMPARED, 1)):
            more = [self.extras(row).get(key) for key in EXTRA_COLUMNS]
            digest.update(json.dumps([self[row], more], sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def extras(self, row: int) -> dict[str, Any]:
        return {column: self._rows.value(column, row % len(self)) for column in self._extras}


def load_prompts(
    source: str,
    split: str | None = "train",
    column: str | None = None,
    num_prompts: int | None = None,
    *,
    files: str | Sequence[str] | None = None,
    hf_name: str | None = None,
    hf_access_token: str | None = None,
) -> list[Prompt]:
    """The first `num_prompts` prompts (all by default) of a data set that `read_rows` reads.

    `column` is by default the first that is there of PROMPT_COLUMNS. Its values are
    conversations (lists of {role, content}, or ShareGPT's {from, value}), of which everything after the
    last user turn is left away, or strings, each of which is one user turn, `instruction` with its `input`.

    Raises UserError for a column that isn't there, and, naming file and row, for an unknown role, a
    conversation without a user turn, or two turns in a row by the user or the assistant.
    """
    if num_prompts is not None and num_prompts < 1:
        raise UserError(f"the number of prompts must be at least 1, not {num_prompts}")
    only = _with_input([column] if column else PROMPT_COLUMNS)
    read = partial(read_rows, source, split, files=files, hf_name=hf_name, hf_access_token=hf_access_token)
    rows, named = read(only=only), column
    # As of conversations, so that what is measured and what is answered are the same.
    pairs = [names[:1] for names in CONVERSATION_COLUMNS if set(names) <= set(rows.columns)]
    known = [*pairs, *((name,) for name in PROMPT_COLUMNS)]
    column, *_ = columns = _find_columns(rows, [column] if column else None, known, "prompts.column")
    number = len(rows) if num_prompts is None else min(num_prompts, len(rows))
    if not named:
        _refuse_context(rows, read, number, columns, "prompts.column")
    seen: dict[str, int] = {}
    prompts = []
    for row in range(number):
        value = _value(rows, column, row)
        messages = _up_to_last_user(_messages(value, "user", column, rows.where(row)))
        if not messages:
            raise UserError(f"{rows.where(row)}: there is no user turn to answer; remove the row")
        _refuse_unread(value[: len(messages)], _CALLS, rows.where(row))
        _refuse_repeated(messages, ("user", "assistant"), rows.where(row))
        name = _prompt_hash(messages)
        seen[name] = seen.get(name, 0) + 1
        prompts.append(Prompt(name if seen[name] == 1 else f"{name}-{seen[name]}", messages, row))
    return prompts


def split_prompts(prompts: list[Prompt], number: int, held_out: int) -> tuple[list[Prompt], list[Prompt]]:
    """(to train on, held out): a sample by content hash, so that it does not hang on the order of
    the data set, and prompts with the same words fall on one side. `number` 0 takes all that are left."""
    same: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        same.setdefault(_words(prompt), []).append(prompt)
    groups = sorted(same.values(), key=lambda group: min(prompt.prompt_id for prompt in group))
    ordered = [prompt for group in groups for prompt in group]
    edge = 0
    for group in groups:
        if edge >= held_out:
            break
        edge += len(group)
    kept = ordered[edge : edge + number] if number else ordered[edge:]
    if not kept:
        raise UserError(
            f"there are {len(prompts)} prompts, and prompts.held_out={held_out} leaves none to train on; "
            "lower it"
        )
    return kept, ordered[:edge]


def _words(prompt: Prompt) -> str:
    """What two prompts share that differ in case, spaces or punctuation alone."""
    text = "\n".join(f"{turn['role']} {turn['content']}" for turn in prompt.messages)
    return "".join(c for c in text.casefold() if c.isalnum())


def load_conversations(
    source: str,
    split: str | None = "train",
    columns: str | Sequence[str] | None = None,
    *,
    files: str | Sequence[str] | None = None,
    hf_name: str | None = None,
    hf_access_token: str | None = None,
) -> Conversations:
    """Conversations to learn from, or to evaluate on, of a data set that `read_rows` reads.

    `columns` names one column of conversations, or a column of prompts and one of completions; by default
    the first that is there of CONVERSATION_COLUMNS. To `instruction` belongs what `input` has.

    Raises UserError for columns that aren't there; the conversations raise it, naming file and row, for an
    unknown role, content that isn't a string, no assistant turn, or two of them in a row.
    """
    named = [columns] if isinstance(columns, str) else columns
    if named and tuple(named) == _ALPACA:
        named = _ALPACA[::2]
    if named and len(named) > 2:
        raise UserError(f"at most two data columns can be named (prompt and completion), not {len(named)}")
    only = _with_input([*(named or chain(*CONVERSATION_COLUMNS)), *EXTRA_COLUMNS])
    read = partial(read_rows, source, split, files=files, hf_name=hf_name, hf_access_token=hf_access_token)
    rows = read(only=only)
    found = _find_columns(rows, named, CONVERSATION_COLUMNS, "train_data_columns")
    if not named:
        _refuse_context(rows, read, len(rows), found, "train_data_columns")
    return Conversations(rows, found)


def _up_to_last_user(messages: list[Message]) -> list[Message]:
    """The conversation up to and including its last user turn; empty if there is none."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return messages[: last + 1]


# What names the columns: a key in trainings and runs, else a flag.
_HOW = {
    "prompts.column": "--data-columns, or, in `distillax run`, with prompts.column=",
    "train_data_columns": "--data-columns, or, in `distillax train`, with train_data_columns=",
}


def _find_columns(
    rows: Rows, named: Sequence[str] | None, known: Sequence[tuple[str, ...]], key: str
) -> tuple[str, ...]:
    there = f"the columns there are: {', '.join(rows.columns)}"
    if named:
        for name in named:
            if name not in rows.columns:
                near = difflib.get_close_matches(name, rows.columns, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]!r}? T{there[1:]}" if near else there
                raise UserError(f"{rows.source} has no column {name!r}; {hint}")
        return tuple(named)
    for names in known:
        if all(name in rows.columns for name in names):
            return names
    wanted = ", ".join(" + ".join(names) for names in known)
    advice = f"name its own with {_HOW[key]}"
    if known is CONVERSATION_COLUMNS and {"prompt", "question"} & set(rows.columns):
        advice += ", or have prompts without answers answered by `distillax generate`"
    elif known is CONVERSATION_COLUMNS and "text" in rows.columns:
        advice += " (plain text is not trained on)"
    raise UserError(f"{rows.source} has none of the columns {wanted}; {advice}; {there}")


def _refuse_context(
    rows: Rows, read: Callable[..., Rows], number: int, columns: Sequence[str], key: str
) -> None:
    """Raises UserError if one of the first `number` rows has more to its question than `columns` say."""
    if _CONTEXT not in rows.columns or columns[0] not in _QUESTIONS:
        return
    contexts = rows.table.column(_CONTEXT)
    if contexts.null_count == len(rows):  # most often as it was not read, and now it is not kept
        contexts = read(only=[_CONTEXT]).table.column(_CONTEXT)
    filled = [row for row, value in enumerate(contexts[:number]) if not _is_empty(value.as_py())]
    if filled:
        raise UserError(
            f"{rows.where(filled[0])}: {_CONTEXT!r}, beside {columns[0]!r}, would be left out, in "
            f"{len(filled):,} of {number:,} rows; join the two, or, if it may be left out, name "
            f"{','.join(columns)} with {_HOW[key]}"
        )


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, str) and value.isspace())


def _with_input(columns: Sequence[str]) -> Sequence[str]:
    return [*columns, _ALPACA[1]] if _ALPACA[0] in columns else columns


def _value(rows: Rows, column: str, row: int) -> Any:
    """A column's value; to Alpaca's instruction belongs its input, if it has one."""
    value = rows.value(column, row)
    if column != _ALPACA[0] or _ALPACA[1] not in rows.columns or not isinstance(value, str):
        return value
    more = rows.value(_ALPACA[1], row)
    if more is not None and not isinstance(more, str):
        raise UserError(f"{rows.where(row)}: {_ALPACA[1]!r} is {kind(more)}, not a string")
    return f"{value}\n\n{more}" if more and not more.isspace() else value


def _messages(value: Any, role: str, column: str, where: str) -> list[Message]:
    """A column's value as messages; a string is one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"{where}: {column!r} is {kind(value)}, not a string or a list of messages")
    messages = []
    for turn in value:
        # Arrow gives all turns of a file the same keys, and those that one has not are null.
        role = turn.get("from") if turn.get("role") is None else turn["role"]
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        content = text_of(turn.get("value") if turn.get("content") is None else turn["content"])
        if content is None and any(turn.get(key) for key in _CALLS):
            content = ""  # as it is where a turn is a call; whoever keeps the turn refuses that
        if role not in ROLES:
            raise UserError(f"{where}: unknown role {role!r}; the roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{where}: the content of a {role} turn is {kind(content)}, not a string")
        messages.append({"role": role, "content": content})
    return messages


def _refuse_unread(value: Any, keys: Sequence[str], where: str) -> None:
    for turn in value if isinstance(value, list) else ():
        for key in keys:
            if isinstance(turn, dict) and turn.get(key):
                raise UserError(
                    f"{where}: a turn has {key!r}, which would be lost; write it into the content, as the "
                    "model is to say it, or remove the key"
                )


def _refuse_repeated(messages: list[Message], roles: Sequence[str], where: str) -> None:
    for before, after in pairwise(messages):
        if before["role"] == after["role"] in roles:
            raise UserError(
                f"{where}: two {after['role']} turns in a row; user and assistant must alternate, "
                "so correct or remove the row"
            )


def _prompt_hash(messages: list[Message]) -> str:
    canonical = json.dumps(messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
