"""Where the assistant turns stand in a conversation that a chat template rendered, as text and as tokens."""

import bisect
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from distillax.errors import UserError

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Tokenised:
    text: str
    ids: list[int]
    starts: list[int]  # the character at which each token starts; ascending
    special: list[int]  # indices of the special tokens


@dataclass(frozen=True)
class Turn:
    """An assistant turn: its tokens are [first, stop); with the end-of-turn token if there is one."""

    first: int
    content_stop: int  # the tokens [first, content_stop) start within the content
    stop: int
    has_end: bool


def named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path}".rstrip()


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokenised:
    if not tokenizer.is_fast:
        raise UserError(
            f"{named(tokenizer)} gives no character offsets: use its fast version (tokenizer.json)."
        )
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids: list[int] = encoding["input_ids"]  # pyright: ignore[reportAssignmentType]
    starts: list[int] = []
    previous_end = 0
    for start, end in encoding["offset_mapping"]:
        # Byte-level tokenizers may leave the spaces of a token out of its offsets: give them back.
        if previous_end < start and text[previous_end:start].isspace():
            start = previous_end
        starts.append(start)
        previous_end = end
    special_ids = _special_ids(tokenizer)
    return Tokenised(text, ids, starts, [i for i, token in enumerate(ids) if token in special_ids])


@functools.lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def assistant_turns(
    whole: Tokenised, messages: Messages, render: Callable[[Messages, bool], str]
) -> list[Turn]:
    """The assistant turns of `messages` in their rendered text, which is `whole`."""

    def prefix_length(count: int, add_generation_prompt: bool) -> int | None:
        if not 0 < count < len(messages):
            return None
        try:
            prefix = render(messages[:count], add_generation_prompt)
        except UserError:  # some templates refuse a part of what they take as a whole
            return None
        return len(prefix) if whole.text.startswith(prefix) else None

    turns: list[Turn] = []
    cursor, searched = 0, 0  # the characters and the messages that are accounted for
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = prefix_length(i, True)
        limit = len(whole.text) if i + 1 == len(messages) else prefix_length(i + 1, False)
        search_from = start if start is not None else _skip(whole, messages[searched:i], cursor)
        found = _find(whole, message["content"], search_from, limit or len(whole.text))
        if not found:
            raise UserError(
                f"message {i} (assistant, counted from 0) is not in the text that the chat template makes "
                "of the conversation, as it drops or rewrites it: use another template or leave the row out."
            )
        turn = _turn(whole, found[0] if start is None else start, found[1], limit)
        turns.append(turn)
        cursor = whole.starts[turn.stop - 1] + 1 if turn.has_end else found[1]
        searched = i + 1
    return turns


def _skip(whole: Tokenised, messages: Messages, cursor: int) -> int:
    """The end of `messages` in the text: what they say must not be taken for the answer."""
    for message in messages:
        found = _find(whole, message["content"], cursor, len(whole.text))
        cursor = found[1] if found else cursor
    return cursor


def _turn(whole: Tokenised, start: int, content_end: int, limit: int | None) -> Turn:
    """The turn whose content ends at character `content_end` and whose rendering ends at `limit`."""
    first = bisect.bisect_left(whole.starts, start)
    content_stop = max(first, bisect.bisect_left(whole.starts, content_end))
    if limit is None:
        limit = _skip_space(whole.text, content_end) + 1
    k = bisect.bisect_left(whole.special, content_stop)
    if k < len(whole.special) and whole.starts[whole.special[k]] < limit:
        return Turn(first, content_stop, whole.special[k] + 1, True)
    return Turn(first, content_stop, content_stop, False)


def _find(whole: Tokenised, content: str, start: int, limit: int) -> tuple[int, int] | None:
    """Where `content` stands in the text from `start` to `limit`, as the template may have left it.

    Of several places, the first one that a special token or the limit follows: a short answer may
    also occur in what the template puts around it.
    """
    answer = content.rsplit("</think>", 1)[-1]
    forms = list(dict.fromkeys([content, content.strip(), answer, answer.strip()]))
    places = [place for form in forms if (place := _find_whole(whole, form, start, limit))]
    if places:
        return min(places, key=lambda place: place[0])  # of equals the first: the longest form
    for form in forms:
        at = whole.text.find(form, start, limit)
        if at >= 0:
            return at, at + len(form)
    return None


def _find_whole(whole: Tokenised, form: str, start: int, limit: int) -> tuple[int, int] | None:
    special_starts = {whole.starts[i] for i in whole.special}
    at = whole.text.find(form, start, limit)
    while at >= 0:
        end = at + len(form)
        after = _skip_space(whole.text, end)
        if after >= limit or not special_starts.isdisjoint(range(end, after + 1)):
            return at, end
        at = whole.text.find(form, at + 1, limit)
    return None


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
