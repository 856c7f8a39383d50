"""What a training run minimises, made from its configuration: objective, teacher, targets, knobs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distillax.checkpoints.source import Source, choose_tokenizer, find
from distillax.config import TrainConfig
from distillax.data.targets import TargetStore
from distillax.errors import UserError, about
from distillax.models import tokenizers
from distillax.models.backend import compute_dtype
from distillax.models.families import ModelConfig
from distillax.models.layout import TEACHER_RULES
from distillax.models.spec import Tree
from distillax.parallel import hosts
from distillax.parallel.weights import place
from distillax.train import rows
from distillax.train.objectives import OBJECTIVES, Compute, Features, Setup, Sums
from distillax.train.setup import check_name

# The keys that a method reads besides those that all do; anything else must be left alone.
_MATCHING = (
    "distill_divergence",
    "distill_jsd_beta",
    "distill_skew",
    "distill_alpha",
    "distill_alpha_end",
    "distill_alpha_schedule",
    "distill_temperature",
    "distill_temperature_end",
    "distill_temperature_schedule",
)
_FEATURES = (
    "distill_beta",
    "distill_beta_end",
    "distill_beta_schedule",
    "distill_feature_loss_type",
    "distill_layer_indices",
    "distill_teacher_layer_indices",
)
_READS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "online": (
        "teacher_load_parameters_path",
        "teacher_model_name",
        "teacher_dtype",
        "teacher_quantization",
        "teacher_sharding",
        *_MATCHING,
        *_FEATURES,
    ),
    "cached": ("teacher_load_parameters_path", "teacher_cache_path", "eval_cache_path", *_MATCHING),
}


@dataclass(frozen=True)
class Method:
    """An objective with its setup, and what it compares the student with: a teacher in memory, which
    `load_teacher` reads, a cache of targets (`targets`), or nothing but the data."""

    objective: Callable[..., Sums]
    setup: Setup
    load_teacher: Callable[[], Tree | None] = lambda: None
    teacher_name: str = ""
    own_template: bool = False  # the teacher has another chat template than the student, whose text both read
    targets: TargetStore | None = None


def check_sources(config: TrainConfig) -> None:
    """Raises UserError for a method without what it learns from, before anything is read."""
    if config.method == "online" and not config.teacher_load_parameters_path:
        raise UserError("method=online needs a teacher; set teacher_load_parameters_path")
    if config.method == "cached" and not config.teacher_cache_path:
        raise UserError("method=cached needs targets; set teacher_cache_path to what distillax capture wrote")


def make_method(
    config: TrainConfig, source: Source, tokenizer: Any, mesh: Mesh, token: str | None = None
) -> Method:
    """Raises UserError for whatever does not fit together. No weight of the teacher is read yet."""
    objective = OBJECTIVES[config.method]
    if config.method == "sft":
        return Method(objective, make_setup(config, source.config))
    if config.method == "cached":
        store = _open_targets(config, source, tokenizer, token)
        hosts.same_for_all(store.manifest["sha256"], "teacher_cache_path", "the same files")
        cache = store.format, store.slots, store.manifest["vocab_size"]
        return Method(objective, make_setup(config, source.config, cache=cache), targets=store)
    with about("teacher_load_parameters_path"):
        found = find(config.teacher_load_parameters_path, hf_access_token=token)
    hosts.same_for_all(found.version(), "the teacher")
    if config.teacher_model_name:
        check_name("teacher_model_name", config.teacher_model_name, found)
    theirs, ours = map(tokenizers.template_of, (check_tokenizer(tokenizer, found), tokenizer))
    setup = make_setup(config, source.config, found.config)
    dtype = jnp.dtype(teacher_dtype(config))
    rules = TEACHER_RULES[config.teacher_sharding]
    load = partial(place, found, dtype, mesh, config.teacher_quantization, rules)
    return Method(objective, setup, load, found.name, theirs not in ("", ours))


def refuse_format(config: TrainConfig, format: str, otherwise: str) -> None:
    """Raises UserError for what cannot be learnt from a cache of this format. `otherwise` says of sampled
    targets where they are, and how others are made."""
    if config.distill_temperature_end not in (None, config.distill_temperature):
        raise UserError(
            "distill_temperature_end: a cache has one temperature; leave it out, or use method=online"
        )
    if config.distill_divergence == "akl":
        raise UserError("distill_divergence=akl needs the teacher's whole distribution; use method=online")
    if format == "sampled" and config.distill_divergence != "forward_kl":
        raise UserError(
            f"distill_divergence={config.distill_divergence} cannot be estimated from the sampled "
            f"targets{otherwise}, or use forward_kl"
        )


def make_setup(
    config: TrainConfig,
    student: ModelConfig,
    teacher: ModelConfig | None = None,
    cache: tuple[str, int, int] | None = None,
) -> Setup:
    """What the objective is to know: the models, and (format, slots a token, vocabulary) of a cache. Raises
    UserError for layers that are not there."""
    compute = Compute(compute_dtype(config.dtype), config.remat_policy, config.scan_layers)
    options = (config.distill_divergence, _parameter(config), is_constant_one(config))
    if cache is not None:
        kind = rows.Sampled if cache[0] == "sampled" else rows.TopK
        return Setup(student, compute, rows=kind(*options), vocabulary=min(student.vocab_size, cache[2]))
    if teacher is None:
        return Setup(student, compute)
    return Setup(
        student,
        compute,
        teacher,
        Compute(teacher_dtype(config), "none", config.scan_layers),
        rows.Online(*options, teacher_cap=teacher.logit_softcap),
        matched_layers(config, student.layers, teacher.layers),
        min(student.vocab_size, teacher.vocab_size),
    )


def teacher_dtype(config: TrainConfig) -> str:
    """The dtype of the teacher's products, and of its weights, unless they are quantised."""
    return compute_dtype(config.dtype if config.teacher_dtype == "auto" else config.teacher_dtype)


def refuse_idle_keys(config: TrainConfig) -> None:
    """A key that would have no effect is a mistake, or a hope that we would disappoint."""
    reads = _READS[config.method]
    for name in dict.fromkeys(name for names in _READS.values() for name in names):
        if name not in reads and getattr(config, name) != TrainConfig.model_fields[name].default:
            takers = " or ".join(method for method, names in _READS.items() if name in names)
            raise UserError(
                f"{name} has no effect with method={config.method}; leave it out, or set method={takers}"
            )
    for knob in ("distill_alpha", "distill_temperature", "distill_beta"):
        end, schedule = getattr(config, f"{knob}_end"), getattr(config, f"{knob}_schedule")
        if (end is None) != (schedule == "constant"):
            raise UserError(
                f"{knob}_end={'null' if end is None else end} and {knob}_schedule={schedule} do not go "
                f"together; set both, with a linear or cosine schedule, or neither"
            )
    for name, divergence in (("distill_jsd_beta", "jsd"), ("distill_skew", "skewed")):
        unused = divergence not in config.distill_divergence
        if unused and getattr(config, name) != TrainConfig.model_fields[name].default:
            raise UserError(f"{name} has no effect with distill_divergence={config.distill_divergence}")
    matched = config.distill_beta > 0 or (config.distill_beta_end or 0) > 0
    if matched != bool(config.distill_layer_indices):
        raise UserError(
            "distill_beta and distill_layer_indices do not go together; set both to match hidden states, "
            "or neither"
        )
    if not matched and config.distill_feature_loss_type != "cosine":
        raise UserError("distill_feature_loss_type has no effect without distill_beta; set both, or neither")


def matched_layers(config: TrainConfig, student: int, teacher: int) -> Features:
    """The hidden states to match between models of so many layers, or a UserError."""
    mine = config.distill_layer_indices
    theirs = config.distill_teacher_layer_indices or mine
    if len(mine) != len(theirs):
        raise UserError(
            f"distill_layer_indices names {len(mine)} layers, and distill_teacher_layer_indices "
            f"{len(theirs)}; give as many of each"
        )
    if mine and not config.distill_teacher_layer_indices and student != teacher:
        raise UserError(
            f"the teacher has {teacher} layers and the student {student}: name the teacher's for each of "
            f"distill_layer_indices with distill_teacher_layer_indices (of a cut student, those it has kept)"
        )
    for name, numbers, layers in (
        ("distill_layer_indices", mine, student),
        ("distill_teacher_layer_indices", theirs, teacher),
    ):
        wrong = [n for n in numbers if not 0 <= n < layers]
        if wrong:
            raise UserError(f"{name}: there is no layer {wrong[0]}; the model has 0 to {layers - 1}")
    return Features(tuple(zip(mine, theirs, strict=True)), config.distill_feature_loss_type)


def knobs(config: TrainConfig, step: int) -> dict[str, np.ndarray]:
    """alpha, temperature and beta of one step (counted from 1), float32 scalars: from the start value
    at the first step towards the end value, which a run of one step more would reach."""
    progress = min(max((step - 1) / config.steps, 0.0), 1.0)
    values = {}
    for name in ("alpha", "temperature", "beta"):
        start, end = getattr(config, f"distill_{name}"), getattr(config, f"distill_{name}_end")
        schedule = getattr(config, f"distill_{name}_schedule")
        done = 0.0 if end is None else progress
        if schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        values[name] = np.asarray(start + done * ((end or 0.0) - start), np.float32)
    return values


def is_constant_one(config: TrainConfig) -> bool:
    """Whether the temperature is one at every step: softmaxes then need to be computed once only."""
    return config.distill_temperature == 1 and config.distill_temperature_end in (None, 1)


def student_tokenizer(config: TrainConfig, student: Source, token: str | None) -> Any:
    """The student's own, or that of tokenizer_path, which may have more tokens. Raises UserError if its ids
    mean something else."""
    own = student.tokenizer_or_none()
    return choose_tokenizer(own, student.name, config.tokenizer_path, "tokenizer_path", token)


def check_tokenizer(tokenizer: Any, teacher: Source) -> Any:
    """The teacher's tokenizer. Raises UserError if its ids mean something else."""
    theirs = teacher.tokenizer()
    if not tokenizers.same(tokenizer, theirs):
        raise UserError(
            f"{teacher.name} has another tokenizer than the student, so their logits cannot be matched; "
            "let it write answers (distillax generate) and train on them with method=sft"
        )
    return theirs


def summary(config: TrainConfig, method: Method) -> list[str]:
    """What is minimised, in the words that C4 asks for."""
    if config.method == "sft":
        return ["method: sft, cross entropy"]
    parameter = f"({_parameter(config):g})" if _parameter(config) else ""
    lines = [
        f"method: {config.method}, {config.distill_divergence}{parameter}, alpha {_way(config, 'alpha')}, "
        f"temperature {_way(config, 'temperature')} (loss times its square)"
    ]
    if method.targets is not None:
        average = " on average" if method.targets.format == "sampled" else ""
        lines.append(
            f"teacher: cached, {method.targets.format}, {method.targets.k} ids a token{average}, "
            f"from {method.targets.manifest['teacher']}"
            f"{_in_bits(method.targets.manifest.get('teacher_quantization'))}"
        )
        return lines
    setup = method.setup
    assert setup.teacher is not None
    lines.append(
        f"teacher: {method.teacher_name} ({setup.teacher.layers} layers, {setup.teacher_compute.dtype}"
        f"{_in_bits(config.teacher_quantization)})"
    )
    if method.own_template:
        lines.append("note: the teacher has another chat template; both read the text in the student's")
    sizes = (setup.student.vocab_size, setup.teacher.vocab_size)
    if len(set(sizes)) > 1:
        lines.append(
            f"vocabulary: the {min(sizes):,} ids that both have; {max(sizes) - min(sizes):,} others masked"
        )
    if setup.features.layers:
        pairs = ", ".join(f"{a}->{b}" for a, b in setup.features.layers)
        lines.append(f"hidden states: {setup.features.distance}, layers {pairs}, beta {_way(config, 'beta')}")
    return lines


def _in_bits(quantization: str | None) -> str:
    return f", layers in {quantization}" if quantization else ""


def _way(config: TrainConfig, name: str) -> str:
    start, end = getattr(config, f"distill_{name}"), getattr(config, f"distill_{name}_end")
    return (
        f"{start:g}"
        if end is None
        else f"{start:g} to {end:g} ({getattr(config, f'distill_{name}_schedule')})"
    )


def _parameter(config: TrainConfig) -> float:
    if config.distill_divergence == "jsd":
        return config.distill_jsd_beta
    return config.distill_skew if "skewed" in config.distill_divergence else 0.0


def _open_targets(config: TrainConfig, source: Source, tokenizer: Any, token: str | None) -> TargetStore:
    store = TargetStore.open(config.teacher_cache_path, source.config.vocab_size)
    teacher = config.teacher_load_parameters_path
    store.check(
        tokenizer_fingerprint=tokenizers.fingerprint(tokenizer),
        temperature=config.distill_temperature,
        teacher_identity=find(teacher, hf_access_token=token).identity() if teacher else None,
        max_target_length=config.max_target_length,
    )
    refuse_format(config, store.format, f" in {config.teacher_cache_path}; capture with --format topk")
    return store
