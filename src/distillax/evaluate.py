"""`distillax evaluate`: how well a student predicts held-out answers, and how far it is from its teacher.

Shapes: N tokens, C tokens of a chunk, E model width, V vocabulary.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distillax.data import chat
from distillax.data.batches import make_batches
from distillax.data.examples import load_examples
from distillax.errors import UserError
from distillax.models import transformer
from distillax.models.backend import compute_dtype, loss_chunk_tokens, product
from distillax.models.families import ModelConfig
from distillax.models.spec import Tree
from distillax.progress import progress


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
    show_progress: bool = True,
) -> Scores:
    """Scores of `student` on the conversations in `data` (anything that SFT reads).

    Rows longer than `max_target_length` are left out. `dtype` is that of the matrix products; logits
    and softmax are float32.

    Raises UserError if the teacher's tokenizer is another one.
    """
    if teacher is not None:
        _same_tokenizer(student, teacher)
    examples = load_examples(
        data, student.tokenizer, split=split, columns=columns, hf_access_token=hf_access_token
    )
    batches = make_batches(
        examples,
        examples.encode,
        batch_size=batch_size,
        max_target_length=max_target_length,
        packing=True,
        shuffle_seed=None,
        overlong="drop",
        num_epochs=1,
    )
    # Ids that only one of the two has are padding rows: nothing but the shared ones can happen.
    vocabulary = student.config.vocab_size
    if teacher is not None:
        vocabulary = min(vocabulary, teacher.config.vocab_size)
    total = np.zeros(4)
    compute = compute_dtype(dtype)
    try:
        with progress(len(examples), "evaluate", enabled=show_progress) as bar:
            for batch in batches:
                total += np.asarray(_measure_batch(student, teacher, batch, vocabulary, compute), np.float64)
                bar.update(int(batch["segment_ids"].max(1).sum()))
    finally:
        batches.close()
    lengths = ((row, len(examples.encode(row).tokens) - 1) for row in range(len(examples)))
    kept = [row for row, length in lengths if length <= max_target_length]
    if len(kept) < len(examples) and show_progress:
        print(
            f"{len(examples) - len(kept)} rows longer than {max_target_length} tokens were left out",
            file=sys.stderr,
        )
    text_bytes = sum(examples.answer_bytes(row) for row in kept)
    return _scores(total, text_bytes, teacher is not None)


def _measure_batch(
    student: LoadedModel,
    teacher: LoadedModel | None,
    batch: dict[str, np.ndarray],
    vocabulary: int,
    dtype: str,
) -> jax.Array:
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    hidden_NE, head_VE = _hidden(student.params, arrays, student.config, dtype)
    if teacher is None:
        pair = None
        caps = (student.config.logit_softcap, None)
    else:
        pair = _hidden(teacher.params, arrays, teacher.config, dtype)
        caps = (student.config.logit_softcap, teacher.config.logit_softcap)
    targets, weights = arrays["targets"].reshape(-1), arrays["weights"].reshape(-1)
    return _measure(hidden_NE, head_VE, pair, targets, weights, caps, vocabulary)


@partial(jax.jit, static_argnums=(2, 3))
def _hidden(
    params: Tree, batch: dict[str, jax.Array], config: ModelConfig, dtype: str
) -> tuple[jax.Array, jax.Array]:
    head_VE = transformer.head_weights(params, config).astype(dtype)
    hidden = transformer.hidden_states(
        params,
        batch["inputs"],
        config,
        segment_ids_BT=batch["segment_ids"],
        positions_BT=batch["positions"],
        dtype=jnp.dtype(dtype),
    )
    return hidden.reshape(-1, hidden.shape[-1]), head_VE


@partial(jax.jit, static_argnums=(5, 6))
def _measure(
    hidden_NE: jax.Array,
    head_VE: jax.Array,
    teacher: tuple[jax.Array, jax.Array] | None,
    targets_N: jax.Array,
    weights_N: jax.Array,
    caps: tuple[float | None, float | None],
    vocabulary: int,
) -> jax.Array:
    """float32[4]: sums of NLL, KL and agreement over the tokens that bear loss, and their number."""
    chunk = loss_chunk_tokens()
    bears_N = weights_N != 0
    order_N = jnp.pad(jnp.argsort(~bears_N, stable=True), (0, -bears_N.shape[0] % chunk))
    count = bears_N.sum()

    def log_probabilities(hidden: jax.Array, head: jax.Array, cap: float | None) -> jax.Array:
        logits = product("ce,ve->cv", hidden, head[:vocabulary])
        return jax.nn.log_softmax(transformer.softcap(logits, cap), -1)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice(order_N, (i * chunk,), (chunk,))
        counted = (i * chunk + jnp.arange(chunk) < count).astype(jnp.float32)
        log_q = log_probabilities(hidden_NE[rows], head_VE, caps[0])
        nll = -jnp.take_along_axis(log_q, targets_N[rows][:, None], 1)[:, 0]
        kl = agree = jnp.zeros(chunk, jnp.float32)
        if teacher is not None:
            log_p = log_probabilities(teacher[0][rows], teacher[1], caps[1])
            kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
            agree = (log_p.argmax(-1) == log_q.argmax(-1)).astype(jnp.float32)
        sums = [(counted * value).sum() for value in (nll, kl, agree, jnp.ones(chunk, jnp.float32))]
        return total + jnp.stack(sums)

    return jax.lax.fori_loop(0, -(-count // chunk), add, jnp.zeros(4, jnp.float32))


def _scores(total: np.ndarray, text_bytes: int, against_teacher: bool) -> Scores:
    nll, kl, agree, tokens = total.tolist()
    return Scores(
        nll=nll / tokens,
        perplexity=math.exp(min(nll / tokens, 700.0)),
        bits_per_byte=nll / math.log(2) / text_bytes,
        tokens=int(tokens),
        kl_teacher_student=kl / tokens if against_teacher else None,
        top1_agreement=agree / tokens if against_teacher else None,
    )


def _same_tokenizer(student: LoadedModel, teacher: LoadedModel) -> None:
    ours, theirs = (chat.tokenizer_fingerprint(model.tokenizer) for model in (student, teacher))
    if ours != theirs:
        raise UserError(
            "teacher and student have different tokenizers, so their logits cannot be compared; "
            "leave --teacher out to measure the student alone"
        )
