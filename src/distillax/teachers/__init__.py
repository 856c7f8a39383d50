"""Teachers: whatever answers prompts. One protocol, three engines (embedded, server, vllm)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

Working = Callable[[int], None]


def untold(tokens: int) -> None:
    """A `Working` that nobody listens to."""


@dataclass(frozen=True)
class Request:
    """One answer to be written: the `generation`-th answer to the prompt `prompt_id`.

    `messages` is the conversation up to and including the last user turn. `prompt_text` is that
    conversation rendered by the teacher's chat template (or the bare text, if no template is
    used), and `prompt_token_ids` are its tokens, special tokens included.
    """

    prompt_id: str
    generation: int
    messages: list[dict[str, str]]
    prompt_text: str
    prompt_token_ids: list[int]


@dataclass(frozen=True)
class SamplingParams:
    """How the teacher samples. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 cut nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    max_length: int = 2048  # prompt + answer, in tokens
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False


@dataclass(frozen=True)
class Completion:
    """What came back for one request.

    `finish_reason` is "stop" (the model ended the turn), "length" (cut off) or "error", in which
    case `error` says why and `text` is empty. `token_ids` are the sampled ids without the stop
    token, where the engine gives them; `logprobs` the log-probabilities (nats) of those ids.
    """

    prompt_id: str
    generation: int
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    error: str | None = None


class Teacher(Protocol):
    """An engine that answers requests. Use as a context manager: leaving it frees everything."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, working: Working = untold
    ) -> Iterator[Completion]:
        """Yields one completion a request, in any order, each as soon as it is finished. `working` is told
        now and then, where the engine knows, how many tokens the unfinished ones have."""
        ...

    def __enter__(self) -> "Teacher": ...

    def __exit__(self, *exc: object) -> None: ...
