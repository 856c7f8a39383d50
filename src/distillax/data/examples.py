"""Conversations of a data set -> examples to learn from, or to be measured on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from distillax.config import TrainOn
from distillax.data import chat
from distillax.data.prompts import Conversations, load_conversations
from distillax.data.shards import manifest_path
from distillax.errors import UserError, about
from distillax.models import tokenizers

_KEPT_BYTES = 2**30  # of examples, so that they are tokenised once: 5 a token,
_ROW_BYTES = 130  # and what Python takes for a row


class _Kept:
    """Examples by row, while there is room for more. Bytes, which the garbage collector need not look at:
    int32 tokens, and then a byte of the mask for each."""

    def __init__(self) -> None:
        self._rows: dict[int, bytes] = {}
        self._room = _KEPT_BYTES

    def __getitem__(self, row: int) -> chat.Example | None:
        kept = self._rows.get(row)
        if kept is None:
            return None
        n = len(kept) // 5
        return chat.Example(np.frombuffer(kept, np.int32, n), np.frombuffer(kept, bool, n, 4 * n))

    def __setitem__(self, row: int, example: chat.Example) -> None:
        kept = example.tokens.tobytes() + example.loss_mask.tobytes()
        if (size := len(kept) + _ROW_BYTES) <= self._room:  # threads at once may keep a row too many
            self._room -= size
            self._rows[row] = kept


@dataclass(frozen=True)
class Examples:
    """A data set and how its rows become tokens. Indexing gives a row's number, which `encode`
    turns into an Example: so nothing but numbers travels through the input pipeline.

    `sampled_ids`: the data set holds the ids that a teacher with this very tokenizer sampled, and
    they are used instead of the text tokenised again. `ids`: how many ids the model has rows for.
    """

    conversations: Conversations
    tokenizer: Any
    train_on: TrainOn
    enable_thinking: bool | None
    sampled_ids: bool
    ids: int | None = None
    _kept: _Kept = field(default_factory=_Kept, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> int:
        return index

    def where(self, row: int) -> str:
        """File, row and line, for errors."""
        return self.conversations.where(row)

    def encode(self, row: int) -> chat.Example:
        """Tokens and loss mask of one row, not to be written to: what is encoded is kept, up to a gibibyte.
        Raises UserError for a row that cannot be learned from."""
        if (example := self._kept[row]) is None:
            self._kept[row] = example = self._encode(row)
        return example

    def _encode(self, row: int) -> chat.Example:
        extras = self.conversations.extras(row)
        messages = self.conversations[row]
        with about(self.where(row)):
            example = chat.encode_conversation(
                self.tokenizer,
                messages,
                train_on=self.train_on,
                completion_token_ids=extras.get("completion_token_ids") if self.sampled_ids else None,
                complete=extras.get("finish_reason") != "length",
                enable_thinking=self.enable_thinking,
            )
            chat.check_ids(self.tokenizer, example.tokens, self.ids)
        return example

    def fingerprint(self) -> str:
        """What changes when the tokens do that are learnt, the tokenizer aside."""
        last = " last" if self.train_on == "last" else ""
        return f"{self.conversations.fingerprint()} {self.sampled_ids:d} {self.enable_thinking}{last}"

    def tokens_by(self) -> str:
        """What changes when the same data would become other tokens."""
        template = tokenizers.template_of(self.tokenizer)
        return f"{tokenizers.fingerprint(self.tokenizer)[:16]} {sha256(template.encode()).hexdigest()[:16]}"

    def answer_bytes(self, row: int) -> int:
        """UTF-8 bytes of the row's assistant turns, as the chat template shows them."""
        sampled = self.sampled_ids and bool(self.conversations.extras(row).get("completion_token_ids"))
        turns = chat.said(self.tokenizer, self.conversations[row], self.enable_thinking, sampled)
        learnt = turns[-1:] if self.train_on == "last" else turns
        return sum(len(turn.encode()) for turn in learnt if turn.strip())


def load_examples(
    source: str,
    tokenizer: Any,
    *,
    split: str | None = "train",
    columns: Sequence[str] | None = None,
    files: str | None = None,
    hf_name: str | None = None,
    train_on: TrainOn | None = None,
    enable_thinking: bool | None = None,
    ids: int | None = None,
    hf_access_token: str | None = None,
) -> Examples:
    """Reads a data set as `load_conversations` does, and the manifest beside it if a teacher wrote it.
    `train_on` None is the last assistant turn in what a teacher wrote, who left the others as they were, and
    elsewhere all of them. `ids` is how many ids the model has rows for: a row with another one is refused
    when it is encoded, be it in what would be cut off.

    Raises UserError for a source that is not there or is empty, and for a tokenizer without a chat
    template.
    """
    if not source:
        raise UserError("no data set is given; set hf_path (and hf_train_files for hf_path=parquet or json)")
    if not tokenizers.template_of(tokenizer):
        raise UserError(
            "the tokenizer has no chat template, which conversations are rendered by; "
            "give that of a chat model of the same family: tokenizer_path, or --tokenizer-path"
        )
    conversations = load_conversations(
        source, split, columns, files=files or None, hf_name=hf_name, hf_access_token=hf_access_token
    )
    manifest = generated_with(conversations.names)
    if enable_thinking is None:
        enable_thinking = manifest.get("enable_thinking")
    same = manifest.get("tokenizer") == tokenizers.fingerprint(tokenizer)
    return Examples(
        conversations,
        tokenizer,
        train_on or ("last" if manifest or conversations.by_teacher else "assistant"),
        enable_thinking,
        same and manifest.get("use_chat_template") is True,
        ids,
    )


def generated_with(files: Sequence[str]) -> dict[str, Any]:
    """The configuration in the manifests beside files that `distillax generate` wrote: what all of them have
    in common, or {} if one has none."""
    found = [_manifest(Path(file)) for file in files]
    return {k: v for k, v in found[0].items() if all(k in other and other[k] == v for other in found)}


def _manifest(path: Path) -> dict[str, Any]:
    manifest = manifest_path(path)
    if path.suffix != ".parquet" or not manifest.is_file():
        return {}
    try:
        return dict(json.loads(manifest.read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{manifest} is damaged; delete it to read {path.name} without it") from None
