"""`distillax generate`: a teacher by name and engine, asked a list of prompts."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distillax.checkpoints.source import Source, choose_tokenizer, find, find_tokenizer
from distillax.config import GenerateConfig
from distillax.data import chat
from distillax.data.prompts import Prompt
from distillax.errors import UserError, about
from distillax.models.backend import compute_dtype
from distillax.parallel.weights import place_here
from distillax.teachers import SamplingParams, Teacher
from distillax.teachers.dataset import Summary, generate_dataset
from distillax.teachers.embedded import DEFAULT_BATCH, EmbeddedTeacher
from distillax.teachers.server import DEFAULT_IN_FLIGHT, ServerTeacher
from distillax.teachers.vllm import VllmTeacher

_log = logging.getLogger(__name__)


def generate(
    teacher: str,
    prompts: Sequence[Prompt],
    output_file: str | Path,
    config: GenerateConfig,
    *,
    prompt_source: dict[str, Any],
    tokenizer_path: str | None = None,
    hf_access_token: str | None = None,
    show_progress: bool = True,
) -> Summary:
    """Has `teacher` answer the prompts with the engine of `config`, and writes the data set.

    `prompt_source` says where the prompts came from; the manifest keeps it. Raises UserError for a
    teacher that cannot be used so, and whatever generate_dataset raises.
    """
    source, tokenizer = identify(teacher, config.engine, tokenizer_path, hf_access_token)
    generation_config = source.generation_config if source else {}
    longest = source.config.max_position if source else config.max_target_length
    _warn(config, longest)
    sampling = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens,
        # What a row needs at most, longer prompts being left out: the embedded cache is that long.
        max_length=min(config.max_target_length, config.max_prefill_length + config.max_new_tokens, longest),
        seed=config.seed,
        stop_token_ids=chat.stop_tokens(generation_config, tokenizer),
        logprobs=config.logprobs,
    )
    return generate_dataset(
        _factory(source, tokenizer, config),
        tokenizer,
        prompts,
        output_file=output_file,
        sampling=sampling,
        max_prefill_length=config.max_prefill_length,
        ids=source.config.vocab_size if source else None,
        provenance={
            "teacher": teacher,
            "weights": source.identity() if source else config.teacher_name,
            "tokenizer": tokenizer_path,
            "engine": config.engine,
            "dtype": config.dtype,
            **prompt_source,
        },
        num_generations=config.num_generations,
        keep_truncated=config.keep_truncated,
        use_chat_template=config.use_chat_template,
        enable_thinking=config.enable_thinking,
        show_progress=show_progress,
    )


def _warn(config: GenerateConfig, longest: int) -> None:
    """Of what is likely a mistake, of a teacher that was made for rows of `longest` tokens."""
    if config.temperature == 0 and config.num_generations > 1:
        _log.warning("at temperature 0 the %d answers to a prompt are all alike", config.num_generations)
    room = min(config.max_target_length, longest)
    if config.max_new_tokens >= room:
        whose = "max_target_length" if room < longest else "what the teacher was made for"
        end = "answers end before max_new_tokens=%d: with their prompts they have room for %d tokens, by %s"
        _log.warning(end, config.max_new_tokens, room, whose)


def identify(
    teacher: str, engine: str, tokenizer_path: str | None, token: str | None
) -> tuple[Source | None, Any]:
    """The teacher's files, if the engine needs them here, and its tokenizer."""
    if engine == "server":
        with about("--tokenizer-path" if tokenizer_path else "--teacher-model, or --tokenizer-path"):
            return None, find_tokenizer(tokenizer_path or teacher, token)
    source = find(teacher, hf_access_token=token)
    if engine == "vllm" and source.kind != "folder":
        raise UserError(
            f"vLLM serves Hugging Face folders, and {teacher} is none; "
            f"write one with: distillax convert to-hf {teacher} FOLDER"
        )
    own = source.tokenizer_or_none()
    return source, choose_tokenizer(own, source.name, tokenizer_path, "--tokenizer-path", token)


def _factory(source: Source | None, tokenizer: Any, config: GenerateConfig) -> Callable[[], Teacher]:
    if config.engine == "server":
        return lambda: ServerTeacher(
            config.teacher_url,
            config.teacher_name or None,
            max_in_flight=config.max_num_seqs or DEFAULT_IN_FLIGHT,
            use_chat_template=config.use_chat_template,
            enable_thinking=config.enable_thinking,
        )
    assert source is not None
    if config.engine == "vllm":
        return lambda: VllmTeacher(
            source.path,
            tensor_parallel_size=config.tp_size,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enable_thinking=config.enable_thinking,
            use_chat_template=config.use_chat_template,
        )
    dtype = compute_dtype(config.dtype)
    return lambda: EmbeddedTeacher(
        source.config,
        place_here(source, products=dtype),
        tokenizer,
        batch_size=config.max_num_seqs or DEFAULT_BATCH,
        dtype=dtype,
        owned=True,
    )
