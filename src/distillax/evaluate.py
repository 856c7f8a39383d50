"""`distillax evaluate`: how well a student predicts held-out answers, and how far it is from its teacher."""

import dataclasses
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from distillax.checkpoints.source import choose_tokenizer
from distillax.data.batches import Batch, make_batches, row_sizes
from distillax.data.examples import Examples, load_examples
from distillax.data.prompts import load_conversations, load_prompts
from distillax.data.targets import TargetStore
from distillax.errors import UserError, about
from distillax.models import tokenizers
from distillax.models.backend import compute_dtype
from distillax.models.families import ModelConfig
from distillax.models.layout import mesh_of, on_mesh
from distillax.models.spec import Tree
from distillax.parallel.mesh import batch_sharding, rows_at_once
from distillax.progress import progress
from distillax.train.evaluation import open_targets
from distillax.train.objectives import Compute, Setup, expect_batch, measure_batch

_SHORTEST_ROW = 128
_MOST_KEPT = 2 << 30  # bytes of a teacher's hidden states
_OF_TEACHER = ("kl_teacher_student", "top1_agreement", "teacher_nll")
_NOTES = {  # by the format of a cache, with its k
    "sampled": "KL is an estimate from a cache of {} sampled ids a token, which is right on average",
    "topk": "KL is a lower bound, from a cache of the {} likeliest ids and one bucket of all others",
}


@dataclass(frozen=True)
class Scores:
    """Over the loss-bearing tokens: nats a token, its exponential, bits a UTF-8 byte of the
    answers; against a teacher also KL(teacher || student) in nats a token, and the share of tokens
    where both think the same one likeliest. From a cache also the teacher's own NLL, and in `note` what KL
    is an estimate of. Rows that were not measured are those longer than the limit, `left_out_long`, and
    those `without_answer`."""

    nll: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    kl_teacher_student: float | None = None
    top1_agreement: float | None = None
    teacher_nll: float | None = None
    note: str | None = None
    left_out_long: int = 0
    without_answer: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class LoadedModel(Protocol):
    """What is measured: distillax.Model is one."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def params(self) -> Tree: ...

    @property
    def tokenizer(self) -> Any: ...


class Expected:
    """The final hidden states of a teacher on the batches that it was asked about, on the host. Those of one
    teacher and dtype: for another it begins anew. Beyond 2 GiB the teacher is run again."""

    def __init__(self) -> None:
        self._of: tuple[Tree, Compute] | None = None
        self._kept: dict[bytes, np.ndarray] = {}

    def hidden(self, teacher: LoadedModel, compute: Compute, batch: Batch) -> jax.Array:
        """[B, T, F] of a batch on the host, which is known by all that is in it."""
        if self._of is None or self._of[0] is not teacher.params or self._of[1] != compute:
            self._of, self._kept = (teacher.params, compute), {}
        digest = hashlib.sha256()
        for name in sorted(batch):
            digest.update(f"{name} {batch[name].dtype} {batch[name].shape} ".encode())
            digest.update(np.ascontiguousarray(batch[name]).tobytes())
        key = digest.digest()
        if key in self._kept:
            return _split(self._kept[key], mesh_of(teacher.params))
        arrays = _split(batch, mesh_of(teacher.params))
        found = expect_batch(teacher.params, arrays, config=teacher.config, compute=compute)
        if sum(kept.nbytes for kept in self._kept.values()) + found.nbytes <= _MOST_KEPT:
            self._kept[key] = np.asarray(found)
        return found


def evaluate(
    student: LoadedModel,
    data: str,
    *,
    teacher: LoadedModel | None = None,
    teacher_cache: str | Path | None = None,
    split: str | None = "train",
    columns: Sequence[str] | None = None,
    enable_thinking: bool | None = None,
    hf_name: str | None = None,
    max_target_length: int = 2048,
    batch_size: int = 4,
    dtype: str = "auto",
    hf_access_token: str | None = None,
    label: str = "evaluate",
    show_progress: bool = True,
    expected: Expected | None = None,
) -> Scores:
    """Scores of `student` on the conversations in `data` (anything that SFT reads).

    In the place of a `teacher` may stand `teacher_cache`, the folder where `distillax capture` has put what
    one expects of the same data. Rows longer than `max_target_length`, or than what was captured, are left
    out. `enable_thinking` goes to the chat template; None is as the data were generated, or the template's
    own default. `dtype` is that of the matrix products; logits and softmax are float32. `label` stands before
    the progress. Where weights lie on a mesh, its devices share the rows, `batch_size` each. Calls for
    several students may share an `Expected`: the teacher is then run once.

    Raises UserError if the teacher's tokenizer is another one, if the cache is of other data or of another
    temperature than 1, or if there is nothing to measure.
    """
    _check_tokenizers(student, teacher)
    cache = _open_cache(student, teacher, teacher_cache)
    limit = max_target_length
    if cache is not None:
        limit = min(limit, cache.manifest["max_target_length"])
    setup = _setup(student.config, teacher.config if teacher else None, cache, dtype)
    examples = load_examples(
        data,
        student.tokenizer,
        split=split,
        columns=columns,
        enable_thinking=enable_thinking,
        hf_name=hf_name,
        ids=setup.ids,
        hf_access_token=hf_access_token,
    )
    total: Counter[str] = Counter()
    mesh = mesh_of(student.params, teacher.params if teacher else None)
    kept, answered, batches = _batches(examples, limit, batch_size, mesh, cache)
    try:
        with progress(len(examples), label, enabled=show_progress) as bar, on_mesh(mesh):
            for batch in batches:
                total.update(_sums(batch, student, teacher, setup, expected))
                bar.update(int(batch["segment_ids"].max(1).sum()))
    finally:
        batches.close()
    left = len(kept) - answered, len(examples) - len(kept)
    if show_progress:
        _tell_left_out(*left, limit)
    return _scores(total, sum(examples.answer_bytes(row) for row in kept), cache, *left)


def with_tokenizer(model: Any, path: str | None, token: str | None = None) -> Any:
    """A distillax.Model with the tokenizer of `path` if it has none of its own, or no chat template. Raises
    UserError where there is none at all, or its ids mean something else."""
    own = model.tokenizer
    if own is not None and (tokenizers.template_of(own) or not path):
        return model
    chosen = choose_tokenizer(own, model.name, path, "--tokenizer-path", token)
    return dataclasses.replace(model, tokenizer=chosen)


def first_prompts(
    data: str,
    number: int,
    *,
    split: str | None = "train",
    column: str | None = None,
    hf_name: str | None = None,
    hf_access_token: str | None = None,
) -> list[list[dict[str, str]]]:
    """The first prompts of a data set, each once, be there several answers to it."""
    which: dict[str, Any] = {"hf_name": hf_name, "hf_access_token": hf_access_token}
    read = max(number, 1)
    while True:
        prompts = load_prompts(data, split, column, read, **which)
        found = {prompt.prompt_id.split("-")[0]: prompt.messages for prompt in prompts}
        if len(found) >= number or len(prompts) < read:
            return list(found.values())[:number]
        read *= 2


def finished_answers(data: str, number: int) -> list[tuple[list[dict[str, str]], str]]:
    """So many prompts of what a teacher wrote, each once, with its answer: those first, in their order, that
    it ended by itself. One that was cut off often goes round in circles, and says little of a student."""
    prompts, answers = load_prompts(data, column="messages"), load_conversations(data, columns="messages")
    ended = [prompt for prompt in prompts if answers.extras(prompt.row)["finish_reason"] == "stop"]
    found: dict[str, Any] = {}
    for prompt in (*ended, *prompts):
        found.setdefault(prompt.prompt_id.split("-")[0], prompt)
    first = list(found.values())[:number]
    return [(prompt.messages, answers[prompt.row][-1]["content"]) for prompt in first]


def _sums(
    batch: Batch,
    student: LoadedModel,
    teacher: LoadedModel | None,
    setup: Setup,
    expected: Expected | None,
) -> dict[str, float]:
    """What a batch on the host adds to the scores, and to the tokens."""
    them = teacher.params if teacher else None
    arrays = _split(batch, mesh_of(student.params, them))
    if teacher is not None and expected is not None:
        arrays["teacher_hidden"] = expected.hidden(teacher, setup.teacher_compute, batch)
    _, tokens, terms = measure_batch(student.params, them, arrays, None, setup=setup)
    if "teacher_nll" in batch:  # NaN, and so the sum, where it is not known
        terms["teacher_nll"] = (batch["teacher_nll"] * batch["weights"]).sum()
    return {name: float(value) for name, value in {**terms, "tokens": tokens}.items()}


def _tell_left_out(silent: int, long: int, limit: int) -> None:
    if silent:
        print(f"{silent} rows without an answer were left out", file=sys.stderr)
    if long:
        print(f"{long} rows longer than {limit} tokens were left out", file=sys.stderr)


def _split(arrays: Any, mesh: Mesh | None) -> Any:
    """Arrays [B, T, ...] of the host, rows and tokens split over the mesh, if there is one."""
    return jax.device_put(arrays, None if mesh is None else batch_sharding(mesh))


def _batches(
    examples: Examples, limit: int, batch_size: int, mesh: Mesh | None, cache: TargetStore | None
) -> tuple[list[int], int, grain.DatasetIterator[Batch]]:
    """The rows that are no longer than `limit`, how many of them have an answer, and batches of these."""
    sizes = row_sizes(examples, examples.encode, limit)
    lengths = sizes[:, 0].tolist()
    kept = [row for row, length in enumerate(lengths) if length <= limit]
    if not sizes[kept, 1].any():
        name = examples.conversations.names[0]
        raise UserError(f"{name} has no answer within {limit} tokens to measure with")
    if cache is not None:
        for row in (row for row in kept if sizes[row, 1]):  # now, and not in the middle
            with about(examples.where(row)):
                cache.row(examples.encode(row))
    longest = max(lengths[row] for row in kept)
    # Rows no longer than they need be leave less room empty; powers of two are few programs.
    row = min(limit, max(_SHORTEST_ROW, 1 << (longest - 1).bit_length()))
    rows = -(-sum(lengths[i] for i in kept) // row)  # at least
    batches = make_batches(
        examples,
        examples.encode,
        batch_size=rows_at_once(mesh, max(rows, 1), batch_size),
        max_target_length=row,
        packing=True,
        shuffle_seed=None,
        overlong="drop",
        num_epochs=1,
        targets=None if cache is None else cache.lookup,
    )
    return kept, int(sizes[kept, 1].astype(bool).sum()), batches


def _open_cache(
    student: LoadedModel, teacher: LoadedModel | None, folder: str | Path | None
) -> TargetStore | None:
    if folder is None:
        return None
    if teacher is not None:
        raise UserError("a teacher and a cache of one are both given; leave one of them out")
    return open_targets(folder, student.config.vocab_size, student.tokenizer)


def _setup(student: ModelConfig, teacher: ModelConfig | None, cache: TargetStore | None, dtype: str) -> Setup:
    compute = Compute(compute_dtype(dtype))
    if cache is not None:
        return Setup(student, compute, vocabulary=min(student.vocab_size, cache.manifest["vocab_size"]))
    if teacher is None:
        return Setup(student, compute)
    # Ids that only one of the two has are padding rows: nothing but the shared ones can happen.
    shared = min(student.vocab_size, teacher.vocab_size)
    return Setup(student, compute, teacher, compute, vocabulary=shared)


def _scores(
    total: Counter[str], text_bytes: int, cache: TargetStore | None, silent: int, long: int
) -> Scores:
    tokens, note = total["tokens"], None
    if cache is not None:
        note = _NOTES[cache.format].format(cache.k)
        if math.isnan(total["teacher_nll"]):
            del total["teacher_nll"]
    nll = total["nll"] / tokens
    return Scores(
        nll=nll,
        perplexity=math.exp(min(nll, 700.0)),
        bits_per_byte=total["nll"] / math.log(2) / text_bytes,
        tokens=int(tokens),
        **{k: total[k] / tokens for k in _OF_TEACHER if k in total},
        note=note,
        left_out_long=long,
        without_answer=silent,
    )


def _check_tokenizers(student: LoadedModel, teacher: LoadedModel | None) -> None:
    for name, model in (("student", student), ("teacher", teacher)):
        if model is not None and model.tokenizer is None:
            raise UserError(f"the {name} has no tokenizer; load it from a folder that has one")
    if teacher is not None and not tokenizers.same(student.tokenizer, teacher.tokenizer):
        raise UserError(
            "teacher and student have different tokenizers, so their logits cannot be compared; "
            "leave --teacher out to measure the student alone"
        )
