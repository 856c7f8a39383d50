"""Prompts -> teacher -> a Parquet data set to learn from, with its manifest and a summary."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distillax.data import chat
from distillax.data.prompts import Prompt
from distillax.data.shards import (
    ShardStore,
    fingerprint,
    manifest_path,
    refuse_other_config,
    sha256_file,
)
from distillax.errors import UserError, about
from distillax.models import tokenizers
from distillax.progress import pace, progress
from distillax.run_dir import write_json
from distillax.teachers import Completion, Request, SamplingParams, Teacher

SCHEMA = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("prompt_id", pa.string()),
        ("generation", pa.int32()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("completion_token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("truncated", pa.bool_()),
        ("empty", pa.bool_()),
        ("error", pa.string()),
    ]
)
SHARD_COLUMNS = ["empty", "error"]  # not in the data set


@dataclass(frozen=True)
class Summary:
    """What came of a generation. All counts are of the whole data set; `seconds` and
    `tokens_per_second` are of this run, without the start of the teacher, and 0 if nothing was left to do;
    `had_before` is how many requests had their answer before it, whatever became of that.

    prompts: prompts asked for. left_out_long: of these, too long to be asked. answers: rows of the
    Parquet file. tokens: completion tokens of all answers. truncated: answers cut off by a length limit,
    kept or not. failed: requests without an answer. empty: answers without text, not kept.
    """

    prompts: int
    left_out_long: int
    answers: int
    tokens: int
    truncated: int
    failed: int
    empty: int
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    had_before: int = 0

    def lines(self) -> list[str]:
        """The summary for people, a line a figure."""
        left_out = f" ({self.left_out_long:,} too long, left out)" if self.left_out_long else ""
        retry = " (start again to retry them)" if self.failed else ""
        most = " (most of them: raise --max-new-tokens)" if 2 * self.truncated > self.answers else ""
        before = f" ({self.had_before:,} requests had theirs before)" * bool(self.had_before and self.seconds)
        figures = [
            ("prompts", f"{self.prompts:,}" + left_out),
            ("answers", f"{self.answers:,}{before}"),
            ("tokens", f"{self.tokens:,}"),
            ("truncated", f"{self.truncated:,}{most}"),
            ("failed", f"{self.failed:,}" + retry),
            ("empty", f"{self.empty:,}"),
            *pace(self.seconds, self.tokens_per_second),
        ]
        return [f"{name:<18}{figure}" for name, figure in figures]


def generate_dataset(
    teacher_factory: Callable[[], Teacher],
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    output_file: str | Path,
    sampling: SamplingParams,
    max_prefill_length: int,
    provenance: Mapping[str, Any],
    ids: int | None = None,
    num_generations: int = 1,
    keep_truncated: bool = True,
    use_chat_template: bool = True,
    enable_thinking: bool | None = None,
    show_progress: bool = True,
) -> Summary:
    """Has a teacher answer every prompt `num_generations` times, and writes `output_file` and beside it
    `<output_file without .parquet>.manifest.json`.

    The work is kept in `<output_file>.shards/` as it finishes. The same call after a kill does only what is
    missing, and gives the same bytes if the teacher gives the same answers; after requests have failed, it
    asks them again; when all is done, it does nothing. The teacher is made only if something is missing.

    Prompts of more than `max_prefill_length` tokens, or without room for an answer in `sampling.max_length`,
    are left out and counted. `provenance` says where all comes from (teacher, engine, prompt source); it is
    part of the configuration, so it must hold neither secrets nor what changes between runs, such as a port.

    Raises UserError if the output belongs to another configuration, another process is writing it, no
    prompt is short enough, one has an id that is not below `ids` (if given), or no answer is left to keep.
    """
    output = Path(output_file)
    if output.suffix != ".parquet":
        raise UserError(f"the output file {output} must end in .parquet")
    prompt_ids = "\n".join(prompt.prompt_id for prompt in prompts)
    config = {
        "provenance": dict(provenance),
        **_tokenizer_identity(tokenizer, use_chat_template),
        "sampling": asdict(sampling),
        "num_generations": num_generations,
        "max_prefill_length": max_prefill_length,
        "keep_truncated": keep_truncated,
        "enable_thinking": enable_thinking,
        "prompts": {"count": len(prompts), "sha256": _sha256(prompt_ids)},
    }
    shards = output.with_name(output.name + ".shards")
    if (finished := _finished(output, shards, config)) and not shards.exists():
        return finished

    limit = min(max_prefill_length, sampling.max_length - 1)
    chat_keys = use_chat_template, enable_thinking
    requests, left_out = _requests(tokenizer, prompts, num_generations, limit, *chat_keys, ids)
    keys = [(request.prompt_id, request.generation) for request in requests]
    with ShardStore(shards, keys=keys, schema=SCHEMA, config=config, what="answers") as store:
        # Asked again now that nobody else can be writing: another process may just have finished.
        if finished := _finished(output, shards, config):
            store.remove()
            return finished
        work = _answer(teacher_factory, store, requests, sampling, show_progress)
        counts = _publish(store, output, config, len(prompts), left_out, keep_truncated)
    return replace(counts, **work)


def _tokenizer_identity(tokenizer: Any, use_chat_template: bool) -> dict[str, Any]:
    """What tells one rendering of the prompts from another; the fingerprint leaves out the template."""
    return {
        "tokenizer": tokenizers.fingerprint(tokenizer),
        "use_chat_template": use_chat_template,
        "chat_template": _sha256(tokenizers.template_of(tokenizer)) if use_chat_template else None,
    }


def _requests(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    num_generations: int,
    limit: int,
    use_chat_template: bool,
    enable_thinking: bool | None,
    ids: int | None,
) -> tuple[list[Request], int]:
    """The requests in order, and how many prompts have more than `limit` tokens."""
    requests: list[Request] = []
    left_out = 0
    for prompt in prompts:
        if use_chat_template:
            text = chat.render_prompt(tokenizer, prompt.messages, enable_thinking)
            tokens = chat.encode(tokenizer, text)
        else:
            text = "\n".join(message["content"] for message in prompt.messages)
            tokens = chat.encode_plain(tokenizer, text)
        if len(tokens) > limit:
            left_out += 1
            continue
        with about(f"the prompt {prompt.messages[-1]['content'][:60]!r}"):
            chat.check_ids(tokenizer, tokens, ids)
        for generation in range(num_generations):
            requests.append(Request(prompt.prompt_id, generation, prompt.messages, text, tokens))
    if not requests:
        raise UserError(
            f"all {len(prompts)} prompts have more than {limit} tokens; raise max_prefill_length "
            "or max_target_length"
        )
    return requests, left_out


def _answer(
    teacher_factory: Callable[[], Teacher],
    store: ShardStore,
    requests: Sequence[Request],
    sampling: SamplingParams,
    show_progress: bool,
) -> dict[str, Any]:
    """Has everything that is missing answered; returns what the Summary says of that: the seconds without the
    teacher's start, the speed, and how much was there before."""
    missing = set(store.missing())
    done = len(requests) - len(missing)
    if not missing:
        return {"had_before": done}
    waiting = {(r.prompt_id, r.generation): r for r in requests if (r.prompt_id, r.generation) in missing}
    ordered = list(waiting.values())
    tokens = failed = truncated = unfinished = 0

    def show(more: int) -> None:
        speed = round((tokens + unfinished) / max(time.monotonic() - started, 1e-9))
        fields = {"tokens": tokens + unfinished, "tokens_per_second": speed}
        shown.update(more, **fields, failed=failed, truncated=truncated)

    def working(tokens: int) -> None:
        nonlocal unfinished
        unfinished = tokens
        show(0)

    with (
        teacher_factory() as teacher,
        progress(len(requests), "generate", done=done, enabled=show_progress) as shown,
    ):
        started = time.monotonic()
        for completion in teacher.generate(ordered, sampling, working):
            request = waiting.pop((completion.prompt_id, completion.generation))
            store.add(_row(request, completion))
            tokens += completion.completion_tokens
            failed += completion.finish_reason == "error"
            truncated += completion.finish_reason == "length"
            show(1)
        seconds = time.monotonic() - started
    if waiting:
        first = next(iter(waiting))
        raise RuntimeError(f"the teacher gave nothing for {len(waiting)} requests, such as {first}")
    return {"seconds": seconds, "tokens_per_second": tokens / seconds if tokens else 0.0, "had_before": done}


def _row(request: Request, completion: Completion) -> dict[str, Any]:
    failed = completion.finish_reason == "error"
    return {
        "messages": [*request.messages, {"role": "assistant", "content": completion.text}],
        "prompt_id": request.prompt_id,
        "generation": request.generation,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "prompt_token_ids": request.prompt_token_ids,
        "completion_token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "truncated": completion.finish_reason == "length",
        "empty": not failed and not completion.text.strip(),
        "error": (completion.error or "unknown") if failed else None,
    }


def _kept(table: pa.Table, keep_truncated: bool) -> pa.Table:
    """The rows and columns of a shard that belong in the data set."""
    kept = ~_column(table, "empty") & np.asarray([e is None for e in table["error"].to_pylist()], bool)
    if not keep_truncated:
        kept &= ~_column(table, "truncated")
    return table.filter(pa.array(kept)).drop_columns(SHARD_COLUMNS)


def _column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def _count(store: ShardStore, prompts: int, left_out: int, keep_truncated: bool) -> Summary:
    """Counts the shards. Raises UserError if none of their rows would be kept."""
    answers = tokens = truncated = failed = empty = 0
    error = ""
    for table in store.tables():
        answers += _kept(table, keep_truncated).num_rows
        tokens += int(_column(table, "completion_tokens").sum())
        truncated += int(_column(table, "truncated").sum())
        errors = table["error"].drop_null()
        failed += len(errors)
        error = error or (errors[0].as_py() if len(errors) else "")
        empty += int(_column(table, "empty").sum())
    if not answers:
        reason = f" (the first: {error})" if error else ""
        raise UserError(
            f"no answer is left to keep: {failed} requests failed{reason}, {empty} answers were empty and "
            f"{truncated} truncated; see to the teacher, raise max_new_tokens, or keep truncated answers"
        )
    return Summary(prompts, left_out, answers, tokens, truncated, failed, empty)


def _publish(
    store: ShardStore,
    output: Path,
    config: Mapping[str, Any],
    prompts: int,
    left_out: int,
    keep_truncated: bool,
) -> Summary:
    """Writes the data set, then its manifest, and deletes the shards unless failed requests need them."""
    counts = _count(store, prompts, left_out, keep_truncated)
    checksum = store.merge(output, lambda table: _kept(table, keep_truncated))
    _write_manifest(output, config, counts, checksum)
    if not counts.failed:
        store.remove()
    return counts


def _finished(output: Path, shards: Path, config: Mapping[str, Any]) -> Summary | None:
    """The summary of a data set that is there and complete, or None if there is still work to do."""
    manifest = manifest_path(output)
    if not output.exists():
        return None
    if not manifest.exists():
        if shards.exists():  # killed between the two files
            return None
        raise UserError(f"{output} is there without a {manifest.name}; choose another output or delete it")
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        old_config, counts, checksum = found["config"], found["counts"], found["sha256"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{manifest} is damaged; delete it and {output.name} to start anew") from None
    refuse_other_config(output, old_config, config)
    if shards.exists() and (counts["failed"] or checksum != sha256_file(output)):
        return None
    if checksum != sha256_file(output):
        raise UserError(f"{output} has changed since it was written; choose another output or delete it")
    asked = (counts["prompts"] - counts["left_out_long"]) * config["num_generations"]
    return Summary(**counts, had_before=asked - counts["failed"])


def _write_manifest(output: Path, config: Mapping[str, Any], counts: Summary, checksum: str) -> None:
    kept = asdict(counts)
    del kept["seconds"], kept["tokens_per_second"], kept["had_before"]
    write_json(
        manifest_path(output),
        {
            "file": output.name,
            "sha256": checksum,
            "config": config,
            "fingerprint": fingerprint(config),
            "counts": kept,
            "versions": versions(),
        },
    )


def versions() -> dict[str, str | None]:
    """What wrote a file, for its manifest."""
    return {name: _version(name) for name in ("distillax", "pyarrow", "transformers")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # run from a source tree that isn't installed


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
