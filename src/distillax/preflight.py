"""What would else come out after hours of a `distillax run`; and what its recipe means to other commands."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distillax.checkpoints.source import Source, choose_tokenizer, find
from distillax.config import GenerateConfig, PipelineConfig, TargetsConfig
from distillax.data.prompts import Prompt, load_prompts, split_prompts
from distillax.data.rows import refuse_split_of_file
from distillax.errors import UserError, about
from distillax.models import tokenizers
from distillax.teachers.capture_config import CaptureConfig
from distillax.train.method import check_tokenizer, matched_layers, refuse_format, refuse_idle_keys


def check_trainings(config: PipelineConfig) -> None:
    """What would else come out after hours of generation, or of training."""
    if not (config.train.steps or config.match.steps):
        raise UserError("train.steps and match.steps are both 0, so that nothing is learnt; set one of them")
    if config.match.method == "cached" and not config.match.steps:
        raise UserError("match.method=cached has no effect with match.steps=0; set match.steps")
    for section in (config.train, config.match):
        refuse_idle_keys(section)
    for name, value in config.capture:
        if matched(config) != "cached" and value != TargetsConfig.model_fields[name].default:
            raise UserError(
                f"capture.{name} has no effect without targets; leave it out, or set match.method=cached and "
                "match.steps"
            )
    token = config.hf_access_token.get_secret_value() if config.hf_access_token else None
    source = find(config.student.source or config.teacher, hf_access_token=token)
    if is_served(config):  # of the teacher, config and tokenizer are enough, but not of the student
        with about("student.source" if config.student.source else "teacher, as student.source is not set"):
            source.iter_params()
    _check_teacher(config, token)
    own, path = source.tokenizer_or_none(), tokenizer_path(config, source)
    tokenizer = choose_tokenizer(own, source.name, path, "teacher", token)
    if not tokenizers.template_of(tokenizer):
        raise UserError(f"neither {source.name} nor the teacher has a chat template; give one of them one")
    if not config.match.steps:
        return
    teacher = find(config.teacher, hf_access_token=token, weights=matched(config) == "online")
    check_tokenizer(tokenizer, teacher)
    if matched(config) == "cached":
        kept = capture_config(config, config.match.distill_temperature, config.match.max_target_length)
        with about("match"):
            refuse_format(config.match, kept.format, "; set capture.format=topk")
        return
    layers = config.student.layers or len(config.student.keep) or source.config.layers
    matched_layers(config.match, layers, teacher.config.layers)


def _check_teacher(config: PipelineConfig, token: str | None) -> None:
    """Raises UserError for a teacher that cannot be asked as the recipe says, or not be measured."""
    teacher = find(config.teacher, hf_access_token=token, weights=False)
    own = teacher.tokenizer_or_none()
    if own is None:
        raise UserError(
            f"teacher: {teacher.name} has no tokenizer, which text goes through; put one beside it"
        )
    if not tokenizers.template_of(own):
        if config.generate.use_chat_template:
            raise UserError(
                f"teacher: {teacher.name} has no chat template; set generate.use_chat_template=false to put "
                "the bare text to it, or give a chat model"
            )
        choose_tokenizer(own, teacher.name, config.student.source, "student.source", token)


def tokenizer_path(config: PipelineConfig, student: Source) -> str:
    """The teacher, whose chat template a student without one learns: a base model of the same family."""
    own = student.tokenizer_or_none()
    return "" if own is not None and tokenizers.template_of(own) else config.teacher


def matched(config: PipelineConfig) -> str:
    """How logits are matched, if they are."""
    return config.match.method if config.match.steps else ""


def is_served(config: PipelineConfig) -> bool:
    """Whether the teacher answers from elsewhere, so that its weights need not be here."""
    return config.generate.engine == "server"


def capture_config(config: PipelineConfig, temperature: float, limit: int) -> CaptureConfig:
    """How targets are captured: by what generates. Raises UserError for what does not go together."""
    keys, how = config.capture, config.generate
    embedded = how.engine == "embedded"
    # Not max_num_seqs: what is scored at once takes far more room than what is written.
    options: dict[str, Any] = {"dtype": how.dtype} if embedded else {}
    names = {
        "embedded": (),
        "vllm": ("tp_size", "max_model_len", "gpu_memory_utilization"),
        "server": ("teacher_url", "teacher_name"),
    }
    options |= {name: getattr(how, name) or None for name in names[how.engine]}
    with by_keys():
        return CaptureConfig(
            format=keys.format or ("sampled" if embedded else "topk"),
            k=keys.k,
            temperature=temperature,
            max_target_length=limit,
            train_on=config.match.train_on,
            enable_thinking=config.match.enable_thinking,
            teacher_quantization=keys.teacher_quantization,
            engine=how.engine,
            **options,
        )


@contextmanager
def by_keys() -> Iterator[None]:
    """Puts the keys of a recipe in the place of the flags of `distillax capture` that a UserError names. A
    server's own flags stay."""
    try:
        yield
    except UserError as error:
        raise UserError(with_keys(str(error))) from error


def with_keys(sentence: str) -> str:
    """The sentence with keys of a recipe in the place of the flags of `distillax capture`."""
    return re.sub(r"--([a-z-]+)( (?=(?!has )[\w/]))?", _key, sentence)


def _key(flag: re.Match[str]) -> str:
    name = flag[1].replace("-", "_")
    keys = {name: f"capture.{name}" for name in TargetsConfig.model_fields}
    keys |= {name: f"generate.{name}" for name in GenerateConfig.model_fields if name not in keys}
    keys |= {"temperature": "match.distill_temperature", "max_target_length": "match.max_target_length"}
    return keys[name] + ("=" if flag[2] else "") if name in keys else flag[0]


def read_prompts(config: PipelineConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Those to learn from, and those to measure with. First of all, as they may be missing, or too few."""
    token = config.hf_access_token.get_secret_value() if config.hf_access_token else None
    keys = config.prompts
    refuse_split_of_file(keys.path, keys.split, f"prompts.split={keys.split}")
    found = load_prompts(keys.path, keys.split, keys.column or None, hf_name=keys.name, hf_access_token=token)
    return split_prompts(found, keys.num_prompts, keys.held_out)
