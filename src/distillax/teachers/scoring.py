"""The likeliest ids at every token of a text, as a vLLM server gives them: the second source of targets.

Shapes: n tokens, k ids of a position.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np

from distillax.data.targets import Encoded, Layout, round_log_ratios
from distillax.errors import UserError
from distillax.teachers import Request
from distillax.teachers.endpoint import Endpoint, RequestError, post
from distillax.teachers.forward import Captured, Item

IN_FLIGHT = 16  # a server holds [tokens, vocabulary] for each of them
_TOGETHER = 1024  # examples that are requests at one time


@dataclass(frozen=True)
class Scored:
    """What a server said of one request's tokens: `entries[i]` has the log-probabilities (nats) of ids at
    token i, given those before it, and is None for the first. `error` says why there is nothing."""

    prompt_id: str
    entries: list[dict[str, Any] | None] = field(default_factory=list)
    error: str | None = None


class Scorer(Protocol):
    """A teacher that scores tokens: ServerTeacher and VllmTeacher."""

    def score(self, requests: Sequence[Request], k: int) -> Iterator[Scored]: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> Any: ...


class ServerCapture:
    """Captures the k likeliest ids with a teacher that scores tokens. Use as a context manager."""

    whole_blocks = False

    def __init__(self, teacher: Callable[[], Scorer], layout: Layout):
        self._teacher, self._layout = teacher(), layout

    def __enter__(self) -> "ServerCapture":
        self._teacher.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._teacher.__exit__(*exc)

    def capture(self, blocks: Iterable[Sequence[Item]]) -> Iterator[Captured]:
        """Yields every example as its answer comes. Raises UserError for a server that gives too little."""
        waiting = chain.from_iterable(blocks)
        while items := list(islice(waiting, _TOGETHER)):
            by_key = {item.key: item for item in items}
            requests = [Request(item.key, 0, [], "", item.tokens.tolist()) for item in items]
            for scored in self._teacher.score(requests, self._layout.k):
                item = by_key[scored.prompt_id]
                data = None if scored.error else encode(self._layout, item, scored.entries)
                yield Captured(item.key, data, len(item.tokens) - 1, scored.error)


def encode(layout: Layout, item: Item, entries: Sequence[Mapping[str, Any] | None]) -> bytes:
    """An example from what a server said of its tokens. Log-sum-exp is not known: NaN.

    Ids that the layout has no room for (a server's padding rows) are left out, into the tail.
    """
    k = layout.k
    ids = np.zeros((len(item.at), k), np.int64)
    log_p = np.zeros((len(item.at), k))
    nll = np.zeros(len(item.at))
    for row, token in enumerate(item.at + 1):
        ids[row], log_p[row], nll[row] = _position(entries[token], int(item.tokens[token]), layout)
    order = np.argsort(ids, 1, kind="stable")
    ids, log_p = np.take_along_axis(ids, order, 1), np.take_along_axis(log_p, order, 1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.maximum(0.0, 1 - np.exp(log_p).sum(1)))
    numbers = np.stack([np.full(len(nll), np.nan), nll, log_tail], 1)
    codes = round_log_ratios(log_p - log_p.max(1, keepdims=True))
    return layout.encode(Encoded(np.full(len(ids), k), ids.ravel(), codes.ravel(), numbers))


def _position(
    entry: Mapping[str, Any] | None, target: int, layout: Layout
) -> tuple[np.ndarray, np.ndarray, float]:
    """The k likeliest ids, their log-probabilities, and the NLL of the target.

    vLLM gives k entries, or k + 1 where the target is not among the k likeliest. Slots left over by ids
    without room repeat the last with a probability of nothing.
    """
    found = {int(token): float(value["logprob"]) for token, value in (entry or {}).items()}
    if target not in found or len(found) < layout.k:
        raise UserError(
            f"the server gave {len(found)} log-probabilities for a token where {layout.k} were asked for; "
            f"start it with --max-logprobs {layout.k}, or give fewer with --k"
        )
    likeliest = sorted(found, key=lambda token: (-found[token], token))[: layout.k]
    likeliest = [token for token in likeliest if token < layout.vocab_size]
    if not likeliest:
        raise UserError(
            f"none of the server's likeliest ids is one of the tokenizer's {layout.vocab_size}; give the "
            "tokenizer of the model that is served with --tokenizer-path"
        )
    spare = layout.k - len(likeliest)
    values = [found[token] for token in likeliest] + [-np.inf] * spare
    return np.array(likeliest + likeliest[-1:] * spare), np.array(values), -found[target]


async def score(endpoint: Endpoint, request: Request, room: int, *, k: int) -> Scored:
    """Scores one request's tokens, fewer than `room`. Raises RequestError, and UserError where no request can
    do better."""
    if not endpoint.is_vllm:
        raise UserError(
            f"{endpoint.url} is no vLLM server, which capturing needs for log-probabilities of a given text; "
            "capture with --engine embedded or vllm"
        )
    body = {
        "model": endpoint.model,
        "prompt": request.prompt_token_ids,
        "max_tokens": 1,
        "prompt_logprobs": k,
    }
    try:
        answer = await post(endpoint, "/completions", body)
    except RequestError as failure:
        if failure.status == 400 and "logprobs" in failure.reason:
            raise UserError(
                f"{failure.reason}: start that server with --max-logprobs {k}, or give fewer with --k"
            ) from None
        raise
    try:
        entries = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        entries = None
    if not isinstance(entries, list) or len(entries) != len(request.prompt_token_ids):
        raise UserError(
            f"{endpoint.url} gave no log-probabilities of the tokens that it was sent; use vLLM's own server"
        )
    return Scored(request.prompt_id, entries)
