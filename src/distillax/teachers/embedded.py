"""The embedded teacher: our own JAX engine, with nothing to install and nothing to serve."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from distillax.errors import UserError
from distillax.models.backend import compute_dtype
from distillax.models.families import ModelConfig
from distillax.models.generate import Engine
from distillax.models.sampling import Sampler
from distillax.models.schedule import Prompt
from distillax.models.spec import Tree
from distillax.teachers import Completion, Request, SamplingParams, Working, untold

DEFAULT_BATCH = 32


class EmbeddedTeacher:
    """Answers with weights that are in memory. `dtype` None computes in what is fast here. `owned` weights
    are given away: they are freed on the way to those that the engine decodes with."""

    def __init__(
        self,
        config: ModelConfig,
        params: Tree,
        tokenizer: Any,
        *,
        batch_size: int = DEFAULT_BATCH,
        dtype: Any = None,
        owned: bool = False,
    ):
        self._config, self._tokenizer = config, tokenizer
        self._engine: Engine | None = Engine(
            params,
            config,
            batch_size=batch_size,
            max_length=config.max_position,
            dtype=dtype or compute_dtype("auto"),
            owned=owned,
        )

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, working: Working = untold
    ) -> Iterator[Completion]:
        """Yields a completion a request as each finishes; every one depends on its request alone.

        Raises UserError for a prompt that leaves no room for an answer below `max_length`.
        """
        # The cache is as long as the settings allow, whatever the prompts of this call happen to be.
        sampling = replace(sampling, max_length=min(sampling.max_length, self._config.max_position))
        limits = [answer_limit(request, sampling) for request in requests]
        prompts = [
            Prompt(request.prompt_token_ids, limit, _key(sampling.seed, request))
            for request, limit in zip(requests, limits, strict=True)
        ]
        sampler = Sampler(
            sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop_token_ids, sampling.logprobs
        )
        assert self._engine is not None
        self._engine.max_length = sampling.max_length
        for answer in self._engine.run(prompts, sampler, working):
            request = requests[answer.index]
            yield Completion(
                prompt_id=request.prompt_id,
                generation=request.generation,
                text=self._tokenizer.decode(answer.tokens, skip_special_tokens=True),
                finish_reason="stop" if answer.stopped else "length",
                prompt_tokens=len(request.prompt_token_ids),
                completion_tokens=len(answer.tokens),
                token_ids=answer.tokens,
                logprobs=answer.logprobs,
            )

    def __enter__(self) -> "EmbeddedTeacher":
        return self

    def __exit__(self, *exc: object) -> None:
        self._engine = None


def answer_limit(request: Request, sampling: SamplingParams) -> int:
    """New tokens that an answer may have. Raises UserError if there is no room for one."""
    room = sampling.max_length - len(request.prompt_token_ids)
    if room < 1:
        raise UserError(
            f"prompt {request.prompt_id} has {len(request.prompt_token_ids)} tokens, no fewer than the "
            f"{sampling.max_length} of prompt and answer; raise --max-target-length"
        )
    return min(room, sampling.max_new_tokens)


def _key(seed: int, request: Request) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{request.prompt_id}/{request.generation}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
