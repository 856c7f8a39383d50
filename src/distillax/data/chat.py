"""Chat templates: prompts as text, conversations as tokens with a loss mask.

A template is text in, text out, so where an answer begins and ends is found in the rendered text
and carried to the tokens by their character offsets. `{% generation %}` markers are not used: few
templates have them, and transformers keeps their state in the shared template, which is not safe
in the threads of an input pipeline.
"""

import bisect
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from distillax.errors import UserError

Messages = Sequence[dict[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")

# Some templates print today's date. A run that is resumed tomorrow must see the same tokens.
_DATE = date(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(?P<format>.*?)\1\s*\)""")


@dataclass(frozen=True)
class Example:
    """One tokenised conversation.

    `tokens` int32[n], special tokens included; `loss_mask` bool[n], True where the token is a
    target, that is, where predicting it from those before it bears loss. `loss_mask[0]` is False.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class _Tokenised:
    text: str
    ids: list[int]
    starts: list[int]  # the character at which each token starts; ascending
    special: list[int]  # indices of the special tokens


@dataclass(frozen=True)
class _Turn:
    """An assistant turn: its tokens are [first, stop); with the end-of-turn token if there is one."""

    first: int
    content_stop: int  # the tokens [first, content_stop) start within the content
    stop: int
    has_end: bool


def check_messages(messages: Messages) -> None:
    """Raises UserError unless every message has a known role and a text as its content."""
    if not messages:
        raise UserError("the conversation is empty: give it at least one message.")
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"message {i} has the unknown role {role!r}: use one of {', '.join(ROLES)}.")
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {i} ({role}) has no text as its content: give it a string.")


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, enable_thinking: bool | None = None
) -> str:
    """The conversation as text, ready for the model's answer (the generation prompt is added).

    `enable_thinking` is handed to the template unless it is None.
    Raises UserError if the tokenizer has no chat template or the template refuses the messages.
    """
    check_messages(messages)
    return _render(tokenizer, messages, True, enable_thinking)


def said(tokenizer: Any, messages: Messages, enable_thinking: bool | None, sampled: bool) -> list[str]:
    """What the template leaves of each assistant turn: some drop thoughts. All of the last, if `sampled`."""
    turns = [message["content"] for message in messages if message["role"] == "assistant"]
    if "</think>" in "".join(turns):
        end = max(i for i, message in enumerate(messages, 1) if message["role"] == "assistant")
        text = "".join(_render(tokenizer, messages[:end], False, enable_thinking).split())
        for i, turn in enumerate(turns[: len(turns) - sampled]):
            if "".join(turn.split()) not in text:
                turns[i] = turn.rsplit("</think>", 1)[-1]
    return turns


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text that a chat template rendered: no special token is added to those in it."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of bare text, with the special tokens (BOS) that the tokenizer adds by itself."""
    return tokenizer.encode(text, add_special_tokens=True, verbose=False)


def check_ids(tokenizer: Any, tokens: Sequence[int] | np.ndarray, ids: int | None) -> None:
    """Raises UserError for an id that is not below `ids`, how many a model (or the smaller of two) has rows
    for: a look-up would take another row for it, without a word."""
    highest = int(np.max(tokens, initial=0))
    if ids is not None and highest >= ids:
        known = highest < len(tokenizer)
        token = repr(tokenizer.convert_ids_to_tokens(highest)) if known else "a token"
        raise UserError(
            f"{token} has the id {highest:,}, and the model (the smaller one, if there are two) has rows for "
            f"{ids:,} ids; leave that text out, or take a tokenizer and models that belong together"
        )


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends an assistant turn in the chat template; EOS if the template writes none.

    Raises UserError if there is neither.
    """
    return _end_of_turn_id(tokenizer, str(tokenizer.chat_template))


def stop_tokens(generation_config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: the generation config's, the tokenizer's, the chat template's."""
    ids = generation_config.get("eos_token_id")
    found = [*(ids if isinstance(ids, list) else [ids]), getattr(tokenizer, "eos_token_id", None)]
    if getattr(tokenizer, "chat_template", None):
        found.append(end_of_turn_id(tokenizer))
    return tuple(sorted({int(i) for i in found if i is not None}))


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    train_on: Literal["assistant", "all"] = "assistant",
    completion_token_ids: Sequence[int] | None = None,
    complete: bool = True,
    enable_thinking: bool | None = None,
) -> Example:
    """Tokenises a conversation once, as a whole, and marks the tokens to be learned.

    Targets are the assistant turns with their end-of-turn tokens (also where that token doubles
    as padding), without header and without the white space that the template puts behind them;
    with `train_on="all"`, every token but the first. Nothing is kept after the last assistant
    turn. A token that straddles the start of a turn counts as prompt, one that straddles its end
    as answer.

    completion_token_ids: the last assistant turn as it was sampled, without the stop token. They
        follow the rendered prompt exactly as they followed it when they were sampled
        (re-tokenising the text may give others); give the `enable_thinking` of that time.
    complete: False if the last answer was cut off: it then gets no end-of-turn token.

    Raises UserError if no message is the assistant's, or its content is not in the rendered text.
    """
    check_messages(messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError("the conversation has no assistant message: there is nothing to learn from it.")
    render = functools.partial(_render, tokenizer, enable_thinking=enable_thinking)
    if completion_token_ids is not None:
        rendered = messages[: answers[-1]]
        whole = _tokenise(tokenizer, render(rendered, True))
        turns = _assistant_turns(whole, rendered, render)
        tokens = [*whole.ids, *completion_token_ids]
        turns.append(_Turn(len(whole.ids), len(tokens), len(tokens), False))
    else:
        rendered = messages[: answers[-1] + 1]
        whole = _tokenise(tokenizer, render(rendered, False))
        turns = _assistant_turns(whole, rendered, render)
        tokens = whole.ids[: turns[-1].stop if complete else turns[-1].content_stop]

    mask = np.zeros(len(tokens) + 1, bool)
    for turn in turns:
        mask[turn.first : turn.stop] = True
    if complete and not turns[-1].has_end:
        tokens = [*tokens, end_of_turn_id(tokenizer)]
        mask[len(tokens) - 1] = True
    mask = mask[: len(tokens)]
    if train_on == "all":
        mask[:] = True
    mask[:1] = False
    return Example(np.asarray(tokens, np.int32), mask)


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path}".rstrip()


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    add_generation_prompt: bool,
    enable_thinking: bool | None,
) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"{_named(tokenizer)} has no chat template: set tokenizer_path to the tokenizer of a chat "
            "(instruction-tuned) model, or give it a chat_template."
        )
    options: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **_with_date(tokenizer.chat_template),
            date_string=_DATE.strftime("%d %b %Y"),
            **options,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {error}") from error
    return str(text)


def _with_date(template: Any) -> dict[str, str]:
    """The template with our date in the place of today's: a function, as an argument, would become text."""
    text = template.get("default") if isinstance(template, dict) else template
    return {"chat_template": _NOW.sub(lambda c: repr(_DATE.strftime(c["format"])), text)} if text else {}


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> _Tokenised:
    if not tokenizer.is_fast:
        raise UserError(
            f"{_named(tokenizer)} gives no character offsets: use its fast version (tokenizer.json)."
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
    return _Tokenised(text, ids, starts, [i for i, token in enumerate(ids) if token in special_ids])


@functools.lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


@functools.lru_cache(maxsize=8)
def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> int:
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    render = functools.partial(_render, tokenizer, enable_thinking=None)
    whole = _tokenise(tokenizer, render(messages, False))
    turn = _assistant_turns(whole, messages, render)[-1]
    if turn.has_end:
        return whole.ids[turn.stop - 1]
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"neither the chat template nor {_named(tokenizer)} has a token that ends "
            "an answer: set its eos_token."
        )
    return int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]


def _assistant_turns(
    whole: _Tokenised, messages: Messages, render: Callable[[Messages, bool], str]
) -> list[_Turn]:
    """The assistant turns of `messages` in their rendered text, which is `whole`."""

    def prefix_length(count: int, add_generation_prompt: bool) -> int | None:
        if not 0 < count < len(messages):
            return None
        try:
            prefix = render(messages[:count], add_generation_prompt)
        except UserError:  # some templates refuse a part of what they take as a whole
            return None
        return len(prefix) if whole.text.startswith(prefix) else None

    turns: list[_Turn] = []
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
                f"message {i} (assistant) is not in the text that the chat template makes of the "
                "conversation: the template drops or rewrites it; use another template or leave the row out."
            )
        turn = _turn(whole, found[0] if start is None else start, found[1], limit)
        turns.append(turn)
        cursor = whole.starts[turn.stop - 1] + 1 if turn.has_end else found[1]
        searched = i + 1
    return turns


def _skip(whole: _Tokenised, messages: Messages, cursor: int) -> int:
    """The end of `messages` in the text: what they say must not be taken for the answer."""
    for message in messages:
        found = _find(whole, message["content"], cursor, len(whole.text))
        cursor = found[1] if found else cursor
    return cursor


def _turn(whole: _Tokenised, start: int, content_end: int, limit: int | None) -> _Turn:
    """The turn whose content ends at character `content_end` and whose rendering ends at `limit`."""
    first = bisect.bisect_left(whole.starts, start)
    content_stop = max(first, bisect.bisect_left(whole.starts, content_end))
    if limit is None:
        limit = _skip_space(whole.text, content_end) + 1
    k = bisect.bisect_left(whole.special, content_stop)
    if k < len(whole.special) and whole.starts[whole.special[k]] < limit:
        return _Turn(first, content_stop, whole.special[k] + 1, True)
    return _Turn(first, content_stop, content_stop, False)


def _find(whole: _Tokenised, content: str, start: int, limit: int) -> tuple[int, int] | None:
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


def _find_whole(whole: _Tokenised, form: str, start: int, limit: int) -> tuple[int, int] | None:
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
