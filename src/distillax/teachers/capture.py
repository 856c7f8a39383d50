"""`distillax capture`: what a teacher expects after each token of a data set, to train without it."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from distillax.checkpoints.source import Source
from distillax.data.batches import row_sizes
from distillax.data.chat import Example, encode_plain
from distillax.data.examples import Examples, load_examples
from distillax.data.shards import ShardStore
from distillax.data.targets import VERSION, Layout, example_id
from distillax.errors import UserError
from distillax.models import tokenizers
from distillax.models.backend import compute_dtype
from distillax.parallel.weights import place_here
from distillax.progress import progress
from distillax.teachers.cache_folder import (
    SHARD,
    SHARDS,
    Summary,
    begun,
    finished,
    publish,
    refuse_other_files,
)
from distillax.teachers.capture_config import CaptureConfig
from distillax.teachers.forward import Captured, Embedded, Item
from distillax.teachers.scoring import IN_FLIGHT, ServerCapture
from distillax.teachers.server import ServerTeacher
from distillax.teachers.stage import identify
from distillax.teachers.vllm import VllmTeacher

_log = logging.getLogger(__name__)

BLOCK = 64  # examples that are captured together, and a shard; a kill can cost two
ROOM = 2  # tokens that vLLM wants beside an example's targets: the first, and one that it would write


class Engine(AbstractContextManager["Engine"], Protocol):
    """What captures: each example of each block, in any order, as it is finished.

    `whole_blocks`: it must be given all examples of a block to compute the same again.
    """

    @property
    def whole_blocks(self) -> bool: ...

    def capture(self, blocks: Iterable[list[Item]]) -> Iterator[Captured]: ...


@dataclass(frozen=True)
class _Work:
    """The examples to capture: keys in order, and for each the row that it is read from; and int32[rows],
    the targets of every row before it is cut."""

    examples: Examples
    rows: dict[str, int]
    limit: int
    counts: Summary
    lengths: np.ndarray

    def item(self, key: str) -> Item:
        example = self.examples.encode(self.rows[key])
        tokens, mask = example.tokens[: self.limit + 1], example.loss_mask[1 : self.limit + 1]
        return Item(key, tokens, np.flatnonzero(mask))


def capture(
    teacher: str,
    data: str,
    output_dir: str | Path,
    config: CaptureConfig,
    *,
    split: str | None = "train",
    columns: Sequence[str] | None = None,
    hf_name: str | None = None,
    tokenizer_path: str | None = None,
    hf_access_token: str | None = None,
    show_progress: bool = True,
) -> Summary:
    """Captures `teacher`'s targets for the conversations in `data`, and writes `output_dir`/targets.parquet
    and its manifest.json, for `TargetStore`.

    Work is kept in `output_dir`/targets.parquet.shards as it finishes: the same call after a kill does
    what is missing and gives the same bytes; when all is done, it does nothing.

    Raises UserError if the output belongs to another configuration, teacher, tokenizer or data set, or holds
    other files alone, another process is writing it, or no row bears loss; and whatever reading teacher and
    data raises.
    """
    folder = Path(output_dir)
    refuse_other_files(folder)
    source, tokenizer = identify(teacher, config.engine, tokenizer_path, hf_access_token)
    # A server does not say how many ids its model has; the tokenizer knows of those that occur.
    vocab_size = source.config.vocab_size if source else max(tokenizer.get_vocab().values()) + 1
    if config.ids > vocab_size:
        raise UserError(f"--k {config.ids} is more than the {vocab_size} ids that {teacher} has; give fewer")
    examples = load_examples(
        data,
        tokenizer,
        split=split,
        columns=columns,
        hf_name=hf_name,
        train_on=config.train_on,
        enable_thinking=config.enable_thinking,
        ids=vocab_size,
        hf_access_token=hf_access_token,
    )
    work = _read(examples, _limit(config, source), data, show_progress)
    if config.engine == "server" and (limit := _served_limit(config, work, folder)) < work.limit:
        work = _read(examples, limit, data, show_progress)
    kept = {
        **_kept(config, data, tokenizer, work),
        "vocab_size": vocab_size,
        "teacher": teacher,
        "teacher_identity": source.identity() if source else config.teacher_name,
        "engine": config.engine,
        "dtype": compute_dtype(config.dtype) if config.engine == "embedded" else config.dtype,
        "teacher_quantization": config.teacher_quantization or None,
    }
    layout = Layout(config.format, config.ids, vocab_size)
    if work.limit < config.max_target_length and config.engine == "server":
        kept["asked_target_length"] = config.max_target_length
    return _run(_factory(config, source, layout, work.limit), work, folder, kept, show_progress)


def try_server(teacher: str, config: CaptureConfig, hf_access_token: str | None = None) -> None:
    """Has the server of `config` score one short text, before it is asked for hours of answers. Raises
    UserError, as `capture` would, if targets cannot come from it."""
    _, tokenizer = identify(teacher, config.engine, None, hf_access_token)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    tokens = np.asarray(encode_plain(tokenizer, "The quick brown fox jumps over the lazy dog."))
    item = Item("a first try", tokens, np.arange(len(tokens) - 1))
    layout = Layout(config.format, config.ids, vocab_size)
    with _factory(config, None, layout, len(tokens))() as engine:
        for found in engine.capture([[item]]):
            if found.error:
                raise UserError(f"the server scores no text ({found.error}); see to it and run this again")


def _limit(config: CaptureConfig, source: Source | None) -> int:
    """Targets of an example, at most; of a server, what is asked for."""
    if source is None:
        return config.max_target_length
    longest = config.max_model_len or source.config.max_position
    return min(config.max_target_length, longest - ROOM if config.engine == "vllm" else longest)


def _served_limit(config: CaptureConfig, work: _Work, folder: Path) -> int:
    """Targets of an example, at most: if the longest row needs more than the server takes, then as many as it
    takes, and says so. Where the capture was begun it is what it was: the server may be gone, or another."""
    if before := begun(folder):
        same = before.get("asked_target_length") == config.max_target_length
        limit = before["max_target_length"] if same else work.limit
    else:
        with ServerTeacher(config.teacher_url, config.teacher_name) as teacher:
            window = teacher.window()
        limit = max(window - ROOM, 1) if window else work.limit
    cut = int((work.lengths > limit).sum())
    if not cut or limit >= work.limit:
        return work.limit
    _log.warning(
        "the server has room for %d tokens: of %d of the %d rows, the first %d targets alone are captured",
        limit + ROOM,
        cut,
        len(work.lengths),
        limit,
    )
    return limit


def _factory(
    config: CaptureConfig, source: Source | None, layout: Layout, limit: int
) -> Callable[[], Engine]:
    in_flight = config.max_num_seqs or IN_FLIGHT
    if source is None:
        urls, name = config.teacher_url, config.teacher_name
        return lambda: ServerCapture(lambda: ServerTeacher(urls, name, max_in_flight=in_flight), layout)
    if config.engine == "vllm":
        options: dict[str, Any] = {
            "tensor_parallel_size": config.tp_size or 1,
            "max_model_len": config.max_model_len,
            "max_num_seqs": in_flight,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "dtype": None if config.dtype == "auto" else config.dtype,
            "extra_args": [f"--max-logprobs={layout.k}"],
        }
        return lambda: ServerCapture(lambda: VllmTeacher(source.path, **options), layout)
    dtype, quantization = compute_dtype(config.dtype), config.teacher_quantization
    return lambda: Embedded(
        source.config,
        place_here(source, quantization=quantization, products=dtype),
        layout,
        temperature=config.temperature,
        seed=config.seed,
        dtype=dtype,
        max_length=limit,
    )


def _read(examples: Examples, limit: int, data: str, show_progress: bool) -> _Work:
    """Finds the different examples that bear loss."""
    keys: dict[int, str] = {}
    rows: dict[str, int] = {}
    counting = Lock()

    def encode(row: int) -> Example:
        example = examples.encode(row)
        keys[row] = example_id(example).hex()
        with counting:
            shown.update(1)
        return example

    with progress(len(examples), "read", enabled=show_progress) as shown:
        lengths, bearing = row_sizes(examples, encode, limit).T
    for row in np.flatnonzero(bearing):
        rows.setdefault(keys[int(row)], int(row))
    if not rows:
        raise UserError(
            f"none of the {len(examples)} rows of {data} has a token to learn within --max-target-length "
            f"{limit}; check that they have assistant turns, or raise it"
        )
    positions, left_out = int(bearing[list(rows.values())].sum()), int((bearing == 0).sum())
    counts = Summary(len(examples), len(rows), positions, left_out, int(lengths.max()), 0)
    return _Work(examples, rows, limit, counts, lengths)


def _kept(config: CaptureConfig, data: str, tokenizer: Any, work: _Work) -> dict[str, Any]:
    """What the manifest keeps of the configuration, and what no other run may change."""
    return {
        "version": VERSION,
        "format": config.format,
        "k": config.ids,
        "temperature": config.temperature,
        "seed": config.seed if config.format == "sampled" else None,
        "max_target_length": work.limit,
        "train_on": work.examples.train_on,
        "enable_thinking": work.examples.enable_thinking,
        "tokenizer": tokenizers.fingerprint(tokenizer),
        "data": {
            "path": data,
            "rows": len(work.examples),
            "sha256": hashlib.sha256("\n".join(work.rows).encode()).hexdigest(),  # of the examples' ids
        },
    }


def _run(
    engine: Callable[[], Engine], work: _Work, folder: Path, kept: dict[str, Any], show_progress: bool
) -> Summary:
    """Does what is missing, and publishes the whole."""
    shards = folder / SHARDS
    if (done := finished(folder, kept)) and not shards.exists():
        return done
    keys = list(work.rows)
    with ShardStore(
        shards, keys=[(key, 0) for key in keys], schema=SHARD, config=kept, block_size=BLOCK
    ) as store:
        if done := finished(folder, kept):  # another process may just have done it
            store.remove()
            return done
        tokens, seconds = _fill(engine, work, store, keys, show_progress)
        counts = publish(store, folder, kept, work.counts)
    return replace(counts, seconds=seconds, tokens_per_second=tokens / seconds if tokens else 0.0)


def _fill(
    engine: Callable[[], Engine], work: _Work, store: ShardStore, keys: list[str], show_progress: bool
) -> tuple[int, float]:
    """Captures what is missing; returns the tokens that were read for it, and the seconds."""
    missing = {key for key, _ in store.missing()}
    if not missing:
        return 0, 0.0
    # Whole blocks: a row of the batch, and so its rounding, is the same whatever was there before.
    cut = [keys[i : i + BLOCK] for i in range(0, len(keys), BLOCK)]
    wanted = [block for block in cut if not missing.isdisjoint(block)]
    tokens = failed = 0
    reason = ""
    with (
        engine() as teacher,
        progress(len(keys), "capture", done=len(keys) - len(missing), enabled=show_progress) as shown,
    ):
        started = time.monotonic()
        whole = teacher.whole_blocks
        blocks = ([work.item(key) for key in block if whole or key in missing] for block in wanted)
        for found in teacher.capture(blocks):
            if found.key not in missing:
                continue
            missing.remove(found.key)
            store.add({"prompt_id": found.key, "generation": 0, "data": found.data, "error": found.error})
            failed, reason = failed + (found.error is not None), reason or found.error or ""
            tokens += found.tokens
            shown.update(1, tokens_per_second=round(tokens / max(time.monotonic() - started, 1e-9)))
        seconds = time.monotonic() - started
    if failed:
        raise UserError(
            f"{failed} examples could not be captured (the first: {reason}); run this again to retry"
        )
    return tokens, seconds
