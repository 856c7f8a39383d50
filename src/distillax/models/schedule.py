"""Which prompt is in which row of a batch that is generated, and what is to be prefilled.

Prompts run in segments of T tokens, R of them in one call. What a prompt has in common with one that some
row holds (a system turn, or all of it for a second answer) is copied from there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_SEGMENT = 16  # T
_ALIGN = 8  # what is copied of another prompt is a multiple of it


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue by at most `max_new_tokens`, with 64 bits of randomness of its own."""

    tokens: Sequence[int]
    max_new_tokens: int
    key: tuple[int, int] = (0, 0)


class Segments(NamedTuple):
    """One call of prefill. Row numbers out of range mean: none."""

    tokens_RT: np.ndarray
    start_R: np.ndarray  # the position of the first token
    count_R: np.ndarray  # tokens, without the padding
    row_R: np.ndarray  # whose prompt this is
    source_R: np.ndarray  # the row whose cache is copied ...
    target_R: np.ndarray  # ... to this one before
    last_R: np.ndarray  # the row, if its prompt ends here
    length_R: np.ndarray  # tokens of that prompt
    limit_R: np.ndarray
    key_R2: np.ndarray


class Table:
    """Which prompt is in which row, and what each row's cache holds."""

    def __init__(self, waiting: list[int], prompts: Sequence[Prompt], limits: list[int], batch_size: int):
        """`waiting`: the next prompt is the last."""
        self.waiting, self._prompts, self._limits = waiting, prompts, limits
        self.owner: list[int | None] = [None] * batch_size
        self.length = np.zeros(batch_size, np.int64)
        self.quorum = max(1, batch_size // 5)  # free rows that are worth a prefill
        self._segments = min(8, batch_size)
        self._held = [np.zeros(0, np.int32)] * batch_size  # the prompt tokens in the row's cache

    def reach(self, steps: int) -> int:
        """Tokens of the longest row after so many steps."""
        ends = [0]
        for row, index in enumerate(self.owner):
            if index is not None:
                end = len(self._prompts[index].tokens) + self._limits[index]
                ends.append(min(int(self.length[row]) + steps, end))
        return max(ends)

    def refill(self) -> Iterator[tuple[Segments, int]]:
        """The prefills that put waiting prompts into free rows, each with the tokens its rows reach."""
        free = [row for row, index in enumerate(self.owner) if index is None]
        todo: list[tuple[int, int, int, int]] = []  # (row, prompt, start, row to copy from)
        while todo or (free and self.waiting):
            call: list[tuple[int, int, int, int]] = []
            fresh: list[np.ndarray] = []  # prompts that come in with this call
            while len(call) < self._segments and (todo or (free and self.waiting)):
                if not todo:
                    tokens = np.asarray(self._prompts[self.waiting[-1]].tokens, np.int32)
                    shared = [_shared(tokens, held) for held in self._held]
                    if max((_shared(tokens, other) for other in fresh), default=0) >= max(shared) + _SEGMENT:
                        break  # after this call there is more to copy
                    fresh.append(tokens)
                    row, source, index = free.pop(0), int(np.argmax(shared)), self.waiting.pop()
                    self.owner[row], self.length[row] = index, len(tokens)
                    starts = range(shared[source], len(tokens), _SEGMENT)
                    todo = [(row, index, start, source if start == starts[0] else -1) for start in starts]
                call.append(todo.pop(0))
            yield self._pack(call)

    def _pack(self, call: list[tuple[int, int, int, int]]) -> tuple[Segments, int]:
        R, none = self._segments, len(self.owner)
        s = Segments(
            np.zeros((R, _SEGMENT), np.int32),
            *(np.zeros(R, np.int32) for _ in range(3)),
            source_R=np.zeros(R, np.int32),
            target_R=np.full(R, none, np.int32),
            last_R=np.full(R, none, np.int32),
            length_R=np.zeros(R, np.int32),
            limit_R=np.zeros(R, np.int32),
            key_R2=np.zeros((R, 2), np.uint32),
        )
        reached = 0
        for i, (row, index, start, source) in enumerate(call):
            prompt = self._prompts[index]
            tokens = np.asarray(prompt.tokens[start : start + _SEGMENT], np.int32)
            end = start + len(tokens)
            s.tokens_RT[i, : len(tokens)] = tokens
            s.start_R[i], s.count_R[i], s.row_R[i] = start, len(tokens), row
            if source >= 0:
                s.source_R[i], s.target_R[i] = source, row
            if end == len(prompt.tokens):
                s.last_R[i], s.length_R[i] = row, end
                s.limit_R[i], s.key_R2[i] = self._limits[index], prompt.key
            self._held[row] = np.asarray(prompt.tokens[:end], np.int32)
            reached = max(reached, end)
        return s, reached


def _shared(tokens: np.ndarray, held: np.ndarray) -> int:
    """How much of a prompt can be copied from a row that holds another: not its last token, whose
    output is needed."""
    n = min(len(tokens) - 1, len(held))
    differ = np.flatnonzero(tokens[:n] != held[:n])
    return int(differ[0] if len(differ) else n) // _ALIGN * _ALIGN
