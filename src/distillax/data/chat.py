"""Chat templates: prompts as text, conversations as tokens with a loss mask.

A template is text in, text out, so where an answer begins and ends is found in the rendered text
and carried to the tokens by their character offsets. `{% generation %}` markers are not used: few
templates have them, and transformers keeps their state in the shared template, which is not safe
in the threads of an input pipeline.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from distillax.config import TrainOn
from distillax.data.prompts import ROLES
from distillax.data.turns import Messages, Turn, assistant_turns, named, tokenise
from distillax.errors import UserError
from distillax.models import tokenizers

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


def check_messages(messages: Messages) -> None:
    """Raises UserError unless every message has a known role and a text as its content."""
    if not messages:
        raise UserError("the conversation is empty: give it at least one message.")
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise UserError(
                f"message {i} (counted from 0) has the unknown role {role!r}: use one of {', '.join(ROLES)}."
            )
        if not isinstance(message.get("content"), str):
            raise UserError(
                f"message {i} ({role}, counted from 0) has no text as its content: give it a string."
            )


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
    return _end_of_turn_id(tokenizer, tokenizers.template_of(tokenizer))


def stop_tokens(generation_config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: the generation config's, the tokenizer's, the chat template's."""
    ids = generation_config.get("eos_token_id")
    found = [*(ids if isinstance(ids, list) else [ids]), getattr(tokenizer, "eos_token_id", None)]
    if tokenizers.template_of(tokenizer):
        found.append(end_of_turn_id(tokenizer))
    return tuple(sorted({int(i) for i in found if i is not None}))


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    train_on: TrainOn = "assistant",
    completion_token_ids: Sequence[int] | None = None,
    complete: bool = True,
    enable_thinking: bool | None = None,
) -> Example:
    """Tokenises a conversation once, as a whole, and marks the tokens to be learned.

    Targets are the assistant turns with their end-of-turn tokens (also where that token doubles as
    padding), without header and without the white space that the template puts behind them; with
    `train_on="last"`, the last of them alone; with "all", every token but the first. A turn without text
    is no target: a student would learn to say nothing. Nothing is kept after the last assistant turn. A
    token that straddles the start of a turn counts as prompt, one that straddles its end as answer.

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
        whole = tokenise(tokenizer, render(rendered, True))
        turns = assistant_turns(whole, rendered, render)
        tokens = [*whole.ids, *completion_token_ids]
        turns.append(Turn(len(whole.ids), len(tokens), len(tokens), False))
    else:
        rendered = messages[: answers[-1] + 1]
        whole = tokenise(tokenizer, render(rendered, False))
        turns = assistant_turns(whole, rendered, render)
        tokens = whole.ids[: turns[-1].stop if complete else turns[-1].content_stop]

    mask = np.zeros(len(tokens) + 1, bool)
    texts = said(tokenizer, messages, enable_thinking, completion_token_ids is not None)
    says = [bool(text.strip()) for text in texts]
    for turn, says_something in list(zip(turns, says, strict=True))[-1 if train_on == "last" else 0 :]:
        mask[turn.first : turn.stop] = says_something
    if complete and not turns[-1].has_end:
        tokens = [*tokens, end_of_turn_id(tokenizer)]
        mask[len(tokens) - 1] = says[-1]
    mask = mask[: len(tokens)]
    if train_on == "all":
        mask[:] = True
    mask[:1] = False
    return Example(np.asarray(tokens, np.int32), mask)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    add_generation_prompt: bool,
    enable_thinking: bool | None,
) -> str:
    template = tokenizers.template_of(tokenizer)
    if not template:
        raise UserError(
            f"{named(tokenizer)} has no chat template: set tokenizer_path (--tokenizer-path) to that "
            "of a chat model of its family, give it a chat_template, or generate with --no-use-chat-template."
        )
    if "developer" not in template:  # OpenAI's newer name for the system's turn, which most drop unseen
        messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
    options: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=_with_date(template),
            date_string=_DATE.strftime("%d %b %Y"),
            **options,
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {error}") from error
    return str(text)


def _with_date(template: str) -> str:
    """The template with our date in the place of today's: a function, as an argument, would become text."""
    return _NOW.sub(lambda c: repr(_DATE.strftime(c["format"])), template)


@functools.lru_cache(maxsize=8)
def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> int:
    """What is kept is of one template, as a tokenizer may be given another."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    render = functools.partial(_render, tokenizer, enable_thinking=None)
    whole = tokenise(tokenizer, render(messages, False))
    turn = assistant_turns(whole, messages, render)[-1]
    if turn.has_end:
        return whole.ids[turn.stop - 1]
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"neither the chat template nor {named(tokenizer)} has a token that ends "
            "an answer: set its eos_token."
        )
    return int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
