"""Configuration: every key, typed, frozen and documented. Keys that MaxText has keep MaxText's names.

`distillax.settings` reads it from a recipe and `key=value` overrides.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from distillax.recipe import parse_value
from distillax.settings import refusal


def _as_items(value: Any) -> Any:
    """A list typed on a command line: `['a', 'b']`, `[a, b]`, `a,b` or `a`."""
    if value is None or value == "":
        return ()
    if not isinstance(value, str):
        return value
    if not value.startswith("["):
        return [part.strip() for part in value.split(",")]
    try:
        return parse_value(value)
    except yaml.YAMLError:
        raise ValueError("must be a list such as ['messages']") from None


def _axis(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("must be -1 (whatever is left) or at least 1")
    return value


Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_items)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_as_items)]
Axis = Annotated[int, AfterValidator(_axis)]
Schedule = Literal["constant", "linear", "cosine"]
TrainOn = Literal["assistant", "last", "all"]
Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "tvd", "akl"
]


def key(default: Any, meaning: str, **limits: Any) -> Any:
    """A config key: its default, its one-line meaning, and pydantic's limits (ge, gt, le, ...)."""
    return Field(default, description=meaning, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        """Raises UserError for a key that isn't there and for a bad value, as the command line has it."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise refusal(type(self), error, values) from None

    # As pydantic marks its own: validation of what is no call, such as a recipe's, goes without ours.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]


def _secret() -> Any:
    return key(None, "Hugging Face token; never written anywhere", exclude=True, repr=False)


class TrainConfig(_Section):
    """What `distillax train` reads. Every key has a default, a type and a meaning."""

    run_name: Text = key("", "name of the run, and of its folder")
    base_output_directory: Text = key("runs", "folder that holds the run folders")

    model_name: Text = key(
        "", "architecture preset (llama3.1-8b, ...); default: that of load_parameters_path"
    )
    load_parameters_path: Text = key(
        "", "student weights: Hugging Face folder or hub id, GGUF file, or Orbax model_params"
    )
    tokenizer_path: Text = key("", "Hugging Face tokenizer; default: that of load_parameters_path")
    tokenizer_type: Literal["huggingface"] = key("huggingface", "kind of tokenizer")
    hf_access_token: SecretStr | None = _secret()
    scan_layers: bool = key(True, "scan over stacked layers (compiles faster) instead of unrolling them")

    method: Literal["sft", "online", "cached"] = key("sft", "training method")
    teacher_load_parameters_path: Text = key(
        "", "teacher weights, from such a source; cached: checked, not read"
    )
    teacher_model_name: Text = key("", "the teacher's architecture preset, for a plan; checked in training")
    teacher_dtype: Literal["auto", "bfloat16", "float32"] = key(
        "auto", "online: dtype of the teacher's weights and products; auto: the compute dtype"
    )
    teacher_quantization: Literal["", "int8"] = key(
        "", "online: int8: the teacher's layers in 8 bits, with a scale for each output channel"
    )
    teacher_sharding: Literal["fsdp", "replicated"] = key(
        "fsdp", "online: how the teacher lies: fsdp: as the student; replicated: split by tensor alone"
    )
    teacher_cache_path: Text = key("", "cached: folder that `distillax capture` wrote")
    eval_cache_path: Text = key("", "cached: such a folder of the data to evaluate on, to measure KL by")
    distill_divergence: Divergence = key("forward_kl", "what is matched between teacher and student")
    distill_jsd_beta: float = key(
        0.5, "beta of the generalised JSD; 0 is forward KL, 1 is reverse KL", ge=0, le=1
    )
    distill_skew: float = key(0.1, "share of the own distribution in the skewed KL's mixture", gt=0, lt=1)
    distill_alpha: float = key(
        0.5, "weight of the distillation loss against the hard-label loss; online.yml has 1", ge=0, le=1
    )
    distill_alpha_end: float | None = key(None, "where it goes: its value a step after the last", ge=0, le=1)
    distill_alpha_schedule: Schedule = key("constant", "its way there")
    distill_temperature: float = key(1.0, "temperature of both softmaxes in the distillation loss", gt=0)
    distill_temperature_end: float | None = key(None, "where it goes: its value a step after the last", gt=0)
    distill_temperature_schedule: Schedule = key("constant", "its way there")
    distill_beta: float = key(0.0, "weight of the distance between hidden states; 0: none", ge=0)
    distill_beta_end: float | None = key(None, "where it goes: its value a step after the last", ge=0)
    distill_beta_schedule: Schedule = key("constant", "its way there")
    distill_feature_loss_type: Literal["cosine", "l2"] = key("cosine", "distance between hidden states")
    distill_layer_indices: Ints = key((), "student layers whose hidden states are matched, from 0")
    distill_teacher_layer_indices: Ints = key(
        (), "the teacher layer for each of distill_layer_indices; default: the same, of as many layers"
    )

    dataset_type: Literal["hf"] = key("hf", "kind of data pipeline")
    hf_path: Text = key("", "data set: hub id, local folder, or parquet/json with hf_train_files")
    hf_train_files: Text = key("", "training files (a path or a glob) for hf_path=parquet or json")
    hf_eval_files: Text = key("", "evaluation files (a path or a glob)")
    hf_name: Text = key("", "configuration of a data set on the hub that has several")
    train_split: Text = key("train", "split to train on")
    eval_split: Text = key("", "split to evaluate on; empty: none")
    train_data_columns: Texts = key(
        (),
        "default: messages, or conversations, or a known pair such as prompt,response",
    )
    train_on: TrainOn | None = key(
        None, "assistant turns, the last, or all; null: the last if a teacher wrote it, else assistant"
    )
    overlong: Literal["truncate", "drop"] = key("truncate", "examples longer than max_target_length")
    enable_thinking: bool | None = key(None, "for the chat template; null: as the data, or its own default")
    packing: bool = key(True, "pack several examples into one row")
    max_target_length: int = key(2048, "tokens in a row", ge=2)
    data_shuffle_seed: int = key(0, "seed of the data order", ge=0, lt=2**32)

    steps: int = key(200, "optimizer steps, exactly", ge=1)
    per_device_batch_size: int = key(1, "rows a device and microbatch", ge=1)
    gradient_accumulation_steps: int = key(1, "microbatches an optimizer step", ge=1)
    learning_rate: float = key(2e-5, "peak learning rate", ge=0)
    learning_rate_schedule: Literal["cosine", "constant"] = key("cosine", "shape after the warm-up")
    warmup_steps_fraction: float = key(0.1, "share of the steps that warm up linearly", ge=0, le=1)
    learning_rate_final_fraction: float = key(0.1, "end of the cosine, as a share of the peak", ge=0, le=1)
    adam_b1: float = key(0.9, "AdamW first-moment decay", ge=0, lt=1)
    adam_b2: float = key(0.95, "AdamW second-moment decay", ge=0, lt=1)
    adam_eps: float = key(1e-8, "AdamW epsilon", gt=0)
    adam_weight_decay: float = key(0.0, "AdamW decoupled weight decay", ge=0)
    gradient_clipping_threshold: float = key(1.0, "largest global gradient norm; 0: no clipping", ge=0)
    dtype: Literal["auto", "bfloat16", "float32"] = key(
        "auto", "compute dtype; auto: bfloat16 where the backend is fast at it"
    )
    weight_dtype: Literal["float32", "bfloat16"] = key("float32", "dtype of the master weights")
    remat_policy: Literal["none", "minimal", "full"] = key(
        "full", "what the backward pass recomputes: nothing, all but the matrix products, or everything"
    )
    init_weights_seed: int = key(
        0, "seed of random initial weights, where model_name asks for them", ge=0, lt=2**32
    )

    checkpoint_period: int = key(100, "steps between checkpoints; the last step is always saved", ge=1)
    max_num_checkpoints_to_keep: int = key(2, "newest checkpoints kept", ge=1)
    eval_interval: int = key(-1, "steps between evaluations; the last step has one, too; -1: none", ge=-1)
    eval_steps: int | None = key(None, "batches an evaluation; null: the whole split", ge=1)
    profiler: Literal["", "xplane"] = key("", "xplane: write a profile for TensorBoard or Perfetto")
    profiler_steps: int = key(5, "steps to profile", ge=1)
    skip_first_n_steps_for_profiler: int = key(1, "steps before the profile starts", ge=0)

    ici_data_parallelism: Axis = key(
        1, "chips that split the batch; -1 where ici_fsdp_parallelism is given and no axis is -1"
    )
    ici_fsdp_parallelism: Axis = key(
        -1, "chips that split batch and weights; -1: what is left; -1 on another axis makes it 1"
    )
    ici_tensor_parallelism: Axis = key(1, "chips that split heads and hidden units")
    ici_context_parallelism: Axis = key(1, "chips that split the sequence and the weights")
    ici_expert_parallelism: Axis = key(1, "chips that split the experts (and the batch, in dense models)")
    dcn_data_parallelism: Axis = key(-1, "slices that split the batch; -1 on another axis makes it 1")
    dcn_fsdp_parallelism: Axis = key(1, "slices that split the batch and the weights")
    dcn_tensor_parallelism: Axis = key(1, "slices that split heads and hidden units")
    dcn_context_parallelism: Axis = key(1, "slices that split the sequence and the weights")
    dcn_expert_parallelism: Axis = key(1, "slices that split the experts")

    coordinator_address: Text = key(
        "", "many processes: host:port of the first; not needed under Slurm and on TPUs"
    )
    process_count: int = key(1, "many processes: how many", ge=1)
    process_index: int = key(-1, "many processes: the number of this one, from 0", ge=-1)
    jax_distributed_initialization_timeout: int = key(300, "seconds to wait for the other processes", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _free_axes(cls, values: Any) -> Any:
        """The default -1 gives way to a -1 that was asked for on another axis, and where fsdp is given, the
        data axis takes what that leaves."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        for group, free in (("ici", "fsdp"), ("dcn", "data")):
            given = [name for name in _axes(group) if name in values]
            if any(str(values[name]) == "-1" for name in given):
                filled.setdefault(f"{group}_{free}_parallelism", 1)
            elif group == "ici" and "ici_fsdp_parallelism" in given:
                filled.setdefault("ici_data_parallelism", -1)
        return filled

    @model_validator(mode="after")
    def _one_free_axis(self) -> Self:
        for group in ("ici", "dcn"):
            free = [name for name in _axes(group) if getattr(self, name) == -1]
            if len(free) > 1:
                raise ValueError(f"{' and '.join(free)} are both -1, but only one axis can take what is left")
        return self


def _axes(group: str) -> list[str]:
    return [f"{group}_{axis}_parallelism" for axis in ("data", "fsdp", "tensor", "context", "expert")]


class PlanConfig(TrainConfig):
    """What `distillax plan` reads: a recipe of `distillax train`, and what to compile it for."""

    topology: Text = key("", "devices to plan for: v6e-8 and the like, 2xv6e-8 for two slices, or cpu-N")


class SftConfig(TrainConfig):
    """The training of a pipeline on its teacher's answers. Any key of `distillax train`."""

    steps: int = key(200, "optimizer steps, exactly; 0: none, the logits of the untrained are matched", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _of_train(cls, values: Any) -> Any:
        return dict(values) if isinstance(values, TrainConfig) else values


class MatchConfig(TrainConfig):
    """Logit matching after the training of a pipeline. Any key of `distillax train`."""

    method: Literal["online", "cached"] = key("online", "cached: from the teacher's logits, kept before")
    steps: int = key(0, "optimizer steps of logit matching after the training; 0: none", ge=0)
    learning_rate: float = key(1e-4, "peak learning rate", ge=0)
    distill_alpha: float = key(1.0, "weight of the distillation loss against the hard-label loss", ge=0, le=1)


class StudentConfig(_Section):
    """Where the student of a pipeline comes from: a model, whole or cut to fewer layers."""

    source: Text = key("", "model that the student is made from; default: the teacher")
    layers: int = key(0, "cut the student to so many layers; 0: no cut", ge=0)
    keep: Ints = key((), "the layers to keep, by number; default: chosen by the rule of `distillax prune`")

    @model_validator(mode="after")
    def _one_cut(self) -> Self:
        if self.layers and self.keep and self.layers != len(self.keep):
            raise ValueError(
                f"student.layers is {self.layers}, but student.keep names {len(self.keep)} layers"
            )
        return self


class PromptsConfig(_Section):
    """The prompts of a pipeline, and how many of them are held out for the evaluation."""

    path: Text = key("", "hub id, folder, or a .parquet, .json or .jsonl file")
    name: Text = key("", "configuration of a data set on the hub that has several")
    split: Text = key("train", "split to read")
    column: Text = key(
        "", "column of the prompt; default: messages, prompt, question, conversations, instruction"
    )
    num_prompts: int = key(0, "prompts to train on; 0: all that are left", ge=0)
    held_out: int = key(64, "prompts kept for the evaluation, never trained on", ge=1)


class GenerateConfig(_Section):
    """How the teacher of a pipeline answers."""

    engine: Literal["embedded", "vllm", "server"] = key("embedded", "what runs the teacher")
    teacher_url: Texts = key((), "URL(s) of OpenAI-compatible servers, for engine=server")
    use_chat_template: bool = key(True, "render prompts by the teacher's chat template")
    enable_thinking: bool | None = key(None, "passed to the chat template; null: the template's own default")
    num_generations: int = key(1, "answers a prompt", ge=1)
    temperature: float = key(1.0, "sampling temperature; 0: greedy", ge=0)
    top_p: float = key(1.0, "nucleus sampling; 1: no cut", gt=0, le=1)
    top_k: int = key(0, "sample from the k likeliest tokens; 0: no cut", ge=0)
    seed: int = key(0, "seed of the sampling")
    max_new_tokens: int = key(256, "longest answer, in tokens", ge=1)
    max_prefill_length: int = key(1024, "prompts longer than this are left out, and counted", ge=1)
    max_target_length: int = key(2048, "longest prompt and answer together, in tokens", ge=2)
    keep_truncated: bool = key(True, "keep answers that were cut off (always marked)")
    logprobs: bool = key(False, "store the log-probability of each sampled token")
    dtype: Literal["auto", "bfloat16", "float32"] = key("auto", "embedded: compute dtype")
    teacher_name: Text = key("", "server: name of the model there; default: the one it serves")
    max_num_seqs: int | None = key(
        None,
        "answers written at once; null: 32 embedded, 64 a server, vLLM's own default on a GPU",
        ge=1,
    )
    max_num_batched_tokens: int | None = key(None, "vLLM: tokens a step; null: vLLM's own default", ge=1)
    max_model_len: int | None = key(None, "vLLM: context length; null: the model's own", ge=1)
    tp_size: int = key(1, "vLLM: tensor parallelism", ge=1)
    gpu_memory_utilization: float = key(0.9, "vLLM: share of the device's memory", gt=0, le=1)

    @model_validator(mode="after")
    def _no_idle_keys(self) -> Self:
        for name, engine in _ENGINE_OF.items():
            default = type(self).model_fields[name].default
            if self.engine != engine and getattr(self, name) != default:
                raise ValueError(f"{name} has no effect with engine={self.engine}, but with engine={engine}")
        if any("@" in url for url in self.teacher_url):
            raise ValueError("teacher_url must hold no password; the key is read from OPENAI_API_KEY")
        return self


# Keys that one engine has a use for: taking them in silence with another would hide a mistake.
_VLLM = ("max_num_batched_tokens", "max_model_len", "tp_size", "gpu_memory_utilization")
_ENGINE_OF = {"teacher_url": "server", "teacher_name": "server", "dtype": "embedded"}
_ENGINE_OF |= dict.fromkeys(_VLLM, "vllm")


class TargetsConfig(_Section):
    """What a pipeline keeps of the teacher's logits, for match.method=cached."""

    format: Literal["", "sampled", "topk"] = key("", "empty: sampled of an embedded teacher, else topk")
    k: int | None = key(None, "ids a token; null: 19 sampled on average, or the 64 likeliest", ge=1)
    teacher_quantization: Literal["", "int8"] = key("", "embedded: int8: the teacher's layers in 8 bits")


class EvaluateConfig(_Section):
    """The evaluation at the end of a pipeline."""

    answers: int = key(3, "held-out prompts answered by teacher and student, side by side", ge=0)
    sft_control: bool = key(
        False, "with matching: also train a student by SFT on as many tokens in all, to compare"
    )


_SET_BY_PIPELINE = {
    "run_name",
    "base_output_directory",
    "load_parameters_path",
    "hf_path",
    "hf_name",
    "hf_train_files",
    "hf_eval_files",
    "train_split",
    "eval_split",
    "train_data_columns",
    "tokenizer_path",
    "teacher_load_parameters_path",
    "teacher_cache_path",
    "eval_cache_path",
}


class PipelineConfig(_Section):
    """What `distillax run` reads: the whole pipeline, a section a stage."""

    run_name: Text = key("", "name of the run, and of its folder")
    base_output_directory: Text = key("runs", "folder that holds the run folders")
    teacher: Text = key("", "teacher: Hugging Face folder or hub id, GGUF file, or Orbax model_params")
    hf_access_token: SecretStr | None = _secret()
    student: StudentConfig = key(StudentConfig(), "the student")
    prompts: PromptsConfig = key(PromptsConfig(), "the prompts")
    generate: GenerateConfig = key(GenerateConfig(), "the teacher's answers")
    train: SftConfig = key(SftConfig(), "the training on the answers: any key of `distillax train`")
    capture: TargetsConfig = key(TargetsConfig(), "the teacher's logits, kept for match.method=cached")
    match: MatchConfig = key(MatchConfig(), "the logit matching after it: any key of `distillax train`")
    evaluate: EvaluateConfig = key(EvaluateConfig(), "the evaluation")

    @model_validator(mode="after")
    def _stage_owns(self) -> Self:
        default = TrainConfig()
        for section, values in (("train", self.train), ("match", self.match)):
            owned = sorted(n for n in _SET_BY_PIPELINE if getattr(values, n) != getattr(default, n))
            if owned:
                raise ValueError(f"{section}.{owned[0]} is set by the pipeline; leave it out of the recipe")
        if self.train.method != "sft":
            raise ValueError(
                f"train.method={self.train.method}: the keys of `match` say how logits are matched"
            )
        if self.evaluate.sft_control and not self.match.steps:
            raise ValueError("evaluate.sft_control compares with match; set match.steps, or it to false")
        return self
