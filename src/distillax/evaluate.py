"""`distillax evaluate`: how well a student predicts held-out answers, and how far it is from its teacher."""

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distillax.data import chat
from distillax.data.batches import make_batches
from distillax.data.examples import Examples, load_examples
from distillax.errors import UserError
from distillax.models.backend import compute_dtype
from distillax.models.families import ModelConfig
from distillax.models.spec import Tree
from distillax.progress import progress
from distillax.train.objectives import Compute, Setup, expect_batch, measure_batch

_SHORTEST_ROW = 128
_MOST_KEPT = 2 << 30  # bytes of a teacher's hidden states


@dataclass(frozen=True)
class Scores:
    """Over the loss-bearing tokens: nats a token, its exponential, bits a UTF-8 byte of the
    answers; against a teacher also KL(teacher || student) in nats a token, and the share of tokens
    where both think the same one likeliest."""

    nll: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    kl_teacher_student: float | None = None
    top1_agreement: float | None = None

    def as_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class LoadedModel(Protocol):
    """What is measured: distillax.Model is one."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def params(self) -> Tree: ...

    @property
    def tokenizer(self) -> Any: ...


def evaluate(
    student: LoadedModel,
    data: str,
    *,
    teacher: LoadedModel | None = None,
    split: str | None = "train",
    columns: Sequence[str] | None = None,
    max_target_length: int = 2048,
    batch_size: int = 4,
    dtype: str = "auto",
    hf_access_token: str | None = None,
    label: str = "evaluate",
    show_progress: bool = True,
    expected: dict[bytes, np.ndarray] | None = None,
) -> Scores:
    """Scores of `student` on the conversations in `data` (anything that SFT reads).

    Rows longer than `max_target_length` are left out. `dtype` is that of the matrix products; logits
    and softmax are float32. `label` stands before the progress. What
    the teacher's last layer makes of the data is kept in `expected`: given to the calls for several
    students, the teacher is run once.

    Raises UserError if the teacher's tokenizer is another one.
    """
    if teacher is not None:
        _same_tokenizer(student, teacher)
    compute = Compute(compute_dtype(dtype))
    setup = _setup(student.config, teacher.config if teacher else None, compute)
    examples = load_examples(
        data,
        student.tokenizer,
        split=split,
        columns=columns,
        ids=setup.ids,
        hf_access_token=hf_access_token,
    )
    kept, batches = _batches(examples, max_target_length, batch_size)
    total: Counter[str] = Counter()
    try:
        with progress(len(examples), label, enabled=show_progress) as bar:
            for batch in batches:
                arrays = {name: jnp.asarray(value) for name, value in batch.items()}
                them = None if teacher is None else teacher.params
                if teacher is not None and expected is not None:
                    arrays["teacher"] = _expected(teacher, arrays, compute, expected)
                _, tokens, terms = measure_batch(student.params, them, arrays, None, setup=setup)
                total.update({name: float(value) for name, value in {**terms, "tokens": tokens}.items()})
                bar.update(int(batch["segment_ids"].max(1).sum()))
    finally:
        batches.close()
    if len(kept) < len(examples) and show_progress:
        print(
            f"{len(examples) - len(kept)} rows longer than {max_target_length} tokens were left out",
            file=sys.stderr,
        )
    text_bytes = sum(examples.answer_bytes(row) for row in kept)
    return _scores(total, text_bytes)


def _batches(examples: Examples, limit: int, batch_size: int) -> tuple[list[int], Any]:
    """The rows that are no longer than `limit`, and batches of them."""
    lengths = [len(examples.encode(row).tokens) - 1 for row in range(len(examples))]
    kept = [row for row, length in enumerate(lengths) if length <= limit]
    longest = max((lengths[row] for row in kept), default=1)
    batches = make_batches(
        examples,
        examples.encode,
        batch_size=batch_size,
        # Rows no longer than they need be leave less room empty; powers of two are few programs.
        max_target_length=min(limit, max(_SHORTEST_ROW, 1 << (longest - 1).bit_length())),
        packing=True,
        shuffle_seed=None,
        overlong="drop",
        num_epochs=1,
    )
    return kept, batches


def _expected(
    teacher: LoadedModel, batch: dict[str, jax.Array], compute: Compute, seen: dict[bytes, np.ndarray]
) -> jax.Array:
    """The teacher's hidden states on a batch, which is known by all that is in it."""
    inputs = [np.asarray(batch[name]).tobytes() for name in sorted(batch)]
    key = hashlib.sha256(b"".join(inputs)).digest()
    if key in seen:
        return jnp.asarray(seen[key])
    found = expect_batch(teacher.params, batch, config=teacher.config, compute=compute)
    if sum(kept.nbytes for kept in seen.values()) + found.nbytes <= _MOST_KEPT:
        seen[key] = np.asarray(found)
    return found


def _setup(student: ModelConfig, teacher: ModelConfig | None, compute: Compute) -> Setup:
    if teacher is None:
        return Setup(student, compute)
    # Ids that only one of the two has are padding rows: nothing but the shared ones can happen.
    shared = min(student.vocab_size, teacher.vocab_size)
    return Setup(student, compute, teacher, compute, vocabulary=shared)


def _scores(total: Counter[str], text_bytes: int) -> Scores:
    tokens = total["tokens"]
    nll = total["nll"] / tokens
    return Scores(
        nll=nll,
        perplexity=math.exp(min(nll, 700.0)),
        bits_per_byte=total["nll"] / math.log(2) / text_bytes,
        tokens=int(tokens),
        **{k: total[k] / tokens for k in ("kl_teacher_student", "top1_agreement") if k in total},
    )


def _same_tokenizer(student: LoadedModel, teacher: LoadedModel) -> None:
    if not chat.same_tokenizer(student.tokenizer, teacher.tokenizer):
        raise UserError(
            "teacher and student have different tokenizers, so their logits cannot be compared; "
            "leave --teacher out to measure the student alone"
        )
