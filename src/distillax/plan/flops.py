"""Floating-point operations of a training step, by the count that model FLOPs utilisation (MFU) goes by."""

from collections.abc import Iterator

from distillax.models.families import ModelConfig, param_specs
from distillax.models.spec import count_params


def step_flops(
    student: ModelConfig, teacher: ModelConfig | None, lengths: list[int], loss_tokens: int
) -> tuple[float, float]:
    """(FLOPs of a step with its heads at every token, with its heads only where there is loss).

    `lengths` are those of the documents, whose tokens see their own past. A product of n weights is 2 n
    FLOPs a token; the backward pass is two forward ones; a look-up is none, and what remat computes
    again earns nothing.
    """
    tokens, context = sum(lengths), sum(n * n for n in lengths) / sum(lengths)
    everywhere = strict = 0.0
    for passes, body, head in _models(student, teacher, context):
        everywhere += passes * 2 * tokens * (body + head)
        strict += passes * 2 * (tokens * body + loss_tokens * head)
    return everywhere, strict


def remat_flops(student: ModelConfig, lengths: list[int]) -> float:
    """What a step computes besides, if its layers keep nothing but their inputs: another forward pass."""
    context = sum(n * n for n in lengths) / sum(lengths)
    return sum(2 * sum(lengths) * body for _, body, _ in _models(student, None, context))


def _models(
    student: ModelConfig, teacher: ModelConfig | None, context: float
) -> Iterator[tuple[int, float, int]]:
    """(forward passes' worth of a step, FLOPs/2 a token of the layers, of the head) of each model."""
    for config, passes in ((student, 3), (teacher, 1)):
        if config is None:
            continue
        head = config.vocab_size * config.width
        body = count_params(param_specs(config), config.layers) - head * (1 if config.tied else 2)
        seen = sum(min(context, 2 * window) if window else context for window in config.windows)
        yield passes, body + seen * config.heads * config.head_dim, head
