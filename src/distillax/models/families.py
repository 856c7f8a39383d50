"""Hugging Face config.json -> ModelConfig and its parameter table.

A family is a function that reads its own keys; `options` refuses others that matter. What the families share
(grouped-query attention, gated MLP, RMS norm, rotary positions) is one decoder, and every difference is a
field here.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distillax.errors import UserError
from distillax.models.options import refuse_options, refuse_values
from distillax.models.spec import ParamSpec, Tree


@dataclass(frozen=True)
class RopeScaling:
    """Context extension of rotary positions: "linear" divides every frequency by `factor`;
    "llama3" divides the low ones only, with a smooth passage between the two cut-offs."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Hashable, so it can be a static argument of jit.

    `windows[i]` is the attention window of layer i in tokens (itself included), 0 for none; a
    windowed layer of Gemma 3 uses `local_rope_theta`. `hf` is the config.json it came from,
    which the export writes back.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_position: int
    rms_eps: float
    rope_theta: float
    tied: bool
    windows: tuple[int, ...]
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    activation: str = "silu"  # silu | gelu_tanh
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # Gemma: a norm after attention and after the MLP, before the residual
    norm_offset: float = 0.0  # Gemma: weights are stored with one taken off
    scale_embeddings: bool = False
    query_scale: float | None = None  # None: 1/sqrt(head_dim)
    logit_softcap: float | None = None
    hf: dict[str, Any] = field(default_factory=dict, compare=False, hash=False, repr=False)


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Reads a config.json. Raises UserError for an unknown family or an option we do not compute."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise UserError(f"config.json: model_type {model_type!r} is not supported; supported are {known}")
    refuse_values(hf)
    refuse_options(hf)
    try:
        return _READERS[model_type](hf)
    except KeyError as error:
        raise UserError(f"config.json of a {model_type} model lacks the key {error}") from None


def preset(model_name: str) -> ModelConfig:
    """The architecture of a well-known model, by MaxText's name for it. Architecture only."""
    if model_name not in _PRESETS:
        near = difflib.get_close_matches(model_name, _PRESETS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(_PRESETS))}"
        raise UserError(f"model_name={model_name!r} is unknown; {hint}")
    return config_from_hf(_PRESETS[model_name])


# The logical axes of a layer's matrices, [in, out].
MATRIX_AXES = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}


def param_specs(config: ModelConfig) -> Tree:
    """The table of weights of a model: nested dicts of ParamSpec, shaped like its parameters."""
    c = config
    norm_init = "zeros" if c.norm_offset else "ones"
    at = "model.layers.{layer}."

    def norm(name: str, width: int = c.width, axis: str | None = "norm") -> ParamSpec:
        return ParamSpec((width,), (axis,), f"{at}{name}.weight", norm_init)

    def dense(name: str, inputs: int, outputs: int) -> ParamSpec:
        axes = MATRIX_AXES[name.split(".")[1].removesuffix("_proj")]
        return ParamSpec((inputs, outputs), axes, f"{at}{name}.weight", transpose=True)

    def bias(name: str, width: int, axis: str) -> ParamSpec:
        return ParamSpec((width,), (axis,), f"{at}{name}.bias", "zeros")

    q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layer: Tree = {
        "attention_norm": norm("input_layernorm"),
        "q": dense("self_attn.q_proj", c.width, q_width),
        "k": dense("self_attn.k_proj", c.width, kv_width),
        "v": dense("self_attn.v_proj", c.width, kv_width),
        "o": dense("self_attn.o_proj", q_width, c.width),
        "mlp_norm": norm("pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"),
        "gate": dense("mlp.gate_proj", c.width, c.mlp_width),
        "up": dense("mlp.up_proj", c.width, c.mlp_width),
        "down": dense("mlp.down_proj", c.mlp_width, c.width),
    }
    if c.qkv_bias:
        layer["q_bias"] = bias("self_attn.q_proj", q_width, "heads")
        layer["k_bias"] = bias("self_attn.k_proj", kv_width, "kv_heads")
        layer["v_bias"] = bias("self_attn.v_proj", kv_width, "kv_heads")
    if c.out_bias:
        layer["o_bias"] = bias("self_attn.o_proj", c.width, "norm")
    if c.qk_norm:
        layer["q_norm"] = norm("self_attn.q_norm", c.head_dim, None)
        layer["k_norm"] = norm("self_attn.k_norm", c.head_dim, None)
    if c.post_norms:
        layer["post_attention_norm"] = norm("post_attention_layernorm")
        layer["post_mlp_norm"] = norm("post_feedforward_layernorm")
    specs: Tree = {
        "embed": ParamSpec((c.vocab_size, c.width), ("vocab", "embed"), "model.embed_tokens.weight"),
        "layers": layer,
        "final_norm": ParamSpec((c.width,), ("norm",), "model.norm.weight", norm_init),
    }
    if not c.tied:
        specs["head"] = ParamSpec((c.vocab_size, c.width), ("vocab", "embed"), "lm_head.weight")
    return specs


def with_layers(config: ModelConfig, keep: list[int]) -> ModelConfig:
    """The configuration of the model that keeps the layers `keep` of this one, in that order."""
    hf = {**config.hf, "num_hidden_layers": len(keep)}
    if hf.get("layer_types"):
        hf["layer_types"] = [hf["layer_types"][i] for i in keep]
    elif any(config.windows):
        # The rule by which a family derives its windows from the layer's number would give other
        # ones after the cut, so they are written out.
        hf["layer_types"] = ["sliding_attention" if config.windows[i] else "full_attention" for i in keep]
    return config_from_hf(hf)


def _common(hf: dict[str, Any], family: str, **options: Any) -> ModelConfig:
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    rope = hf.get("rope_parameters") or {}
    scaling = options.pop("rope_scaling", rope or hf.get("rope_scaling"))
    values: dict[str, Any] = dict(
        family=family,
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=layers,
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_width=hf["intermediate_size"],
        max_position=int(hf.get("max_position_embeddings") or 2048),
        rms_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(scaling),
        tied=bool(hf.get("tie_word_embeddings", False)),
        windows=(0,) * layers,
        activation=_activation(hf.get("hidden_act") or hf.get("hidden_activation") or "silu"),
        hf=hf,
    )
    values.update(options)
    return ModelConfig(**values)


def _activation(name: str) -> str:
    names = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if not isinstance(name, str) or name not in names:
        raise UserError(
            f"config.json: activation {name!r} is not supported; supported are {', '.join(names)}"
        )
    return names[name]


def _rope_scaling(raw: dict[str, Any] | None) -> RopeScaling | None:
    raw = {name: value for name, value in (raw or {}).items() if value is not None}
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(raw["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(raw["factor"]),
            float(raw["low_freq_factor"]),
            float(raw["high_freq_factor"]),
            int(raw["original_max_position_embeddings"]),
        )
    raise UserError(f"config.json: rope scaling {kind!r} is not supported; supported are linear, llama3")


def _windows(hf: dict[str, Any], derived: Callable[[int], bool]) -> tuple[int, ...]:
    """Windows by layer_types where the config has them, else by the family's rule."""
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window") or 0
    types = hf.get("layer_types")
    if types is not None and len(types) != layers:
        raise UserError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
    local = [t == "sliding_attention" for t in types] if types else [derived(i) for i in range(layers)]
    if window < 0 and any(local):
        raise UserError(f"config.json: sliding_window={window}, which is no number of tokens; correct it")
    return tuple(window if is_local else 0 for is_local in local)


def _llama(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return _common(hf, "llama", qkv_bias=bias, out_bias=bias)


def _mistral(hf: dict[str, Any]) -> ModelConfig:
    return _common(hf, "mistral", windows=_windows(hf, lambda _: True))


def _qwen2(hf: dict[str, Any]) -> ModelConfig:
    return _common(hf, "qwen2", qkv_bias=True, windows=_qwen_windows(hf))


def _qwen3(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return _common(hf, "qwen3", qkv_bias=bias, out_bias=bias, qk_norm=True, windows=_qwen_windows(hf))


def _qwen_windows(hf: dict[str, Any]) -> tuple[int, ...]:
    if not hf.get("use_sliding_window"):
        return (0,) * hf["num_hidden_layers"]
    return _windows(hf, lambda layer: layer >= _given(hf, "max_window_layers", 28))


def _given(hf: dict[str, Any], name: str, default: int) -> int:
    return default if hf.get(name) is None else hf[name]


def _gemma3(hf: dict[str, Any]) -> ModelConfig:
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    rope = hf.get("rope_parameters") or {}
    full, local = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
    return _common(
        hf,
        "gemma3_text",
        tied=bool(hf.get("tie_word_embeddings", True)),
        windows=_windows(hf, lambda layer: (layer + 1) % pattern != 0),
        rope_theta=float(full.get("rope_theta") or hf.get("rope_theta") or 1e6),
        rope_scaling=full or hf.get("rope_scaling"),
        local_rope_theta=float(local.get("rope_theta") or hf.get("rope_local_base_freq") or 1e4),
        head_dim=hf.get("head_dim") or 256,
        activation=_activation(hf.get("hidden_activation") or "gelu_pytorch_tanh"),
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        scale_embeddings=True,
        query_scale=(hf.get("query_pre_attn_scalar") or 256) ** -0.5,
        logit_softcap=hf.get("final_logit_softcapping"),
    )


_READERS: dict[str, Callable[[dict[str, Any]], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
}


def _hf(model_type: str, architecture: str, dims: tuple[int, ...], **options: Any) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("intermediate_size", "vocab_size")
    sizes = dict(zip(names, dims, strict=True))
    return {"model_type": model_type, "architectures": [architecture], **sizes, **options}


def _llama3(*dims: int, factor: float | None, theta: float = 5e5, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"rms_norm_eps": 1e-5, "rope_theta": theta, "max_position_embeddings": 131072}
    if factor:
        defaults["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return _hf("llama", "LlamaForCausalLM", dims, **{**defaults, **options})


def _smollm2(*dims: int, theta: float = 1e5) -> dict[str, Any]:
    options = {"tie_word_embeddings": True, "max_position_embeddings": 8192}
    return _llama3(*dims, 49152, factor=None, theta=theta, **options)


def _qwen(version: int, *dims: int, tied: bool) -> dict[str, Any]:
    options = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": tied}
    options["max_position_embeddings"] = 40960 if version == 3 else 32768
    return _hf(f"qwen{version}", f"Qwen{version}ForCausalLM", dims, **options)


def _gemma(*dims: int, window: int, **options: Any) -> dict[str, Any]:
    defaults = {"rms_norm_eps": 1e-6, "sliding_window": window, "query_pre_attn_scalar": 256}
    return _hf("gemma3_text", "Gemma3ForCausalLM", dims, **defaults, max_position_embeddings=32768, **options)


# width, layers, heads, kv heads, head width, MLP width, vocabulary: from the models' config.json.
_PRESETS: dict[str, dict[str, Any]] = {
    "llama3.1-8b": _llama3(4096, 32, 32, 8, 128, 14336, 128256, factor=8.0),
    "llama3.1-70b": _llama3(8192, 80, 64, 8, 128, 28672, 128256, factor=8.0),
    "llama3.2-1b": _llama3(2048, 16, 32, 8, 64, 8192, 128256, factor=32.0, tie_word_embeddings=True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8, 128, 8192, 128256, factor=32.0, tie_word_embeddings=True),
    "qwen3-0.6b": _qwen(3, 1024, 28, 16, 8, 128, 3072, 151936, tied=True),
    "qwen3-1.7b": _qwen(3, 2048, 28, 16, 8, 128, 6144, 151936, tied=True),
    "qwen3-4b": _qwen(3, 2560, 36, 32, 8, 128, 9728, 151936, tied=True),
    "qwen3-8b": _qwen(3, 4096, 36, 32, 8, 128, 12288, 151936, tied=False),
    "qwen3-14b": _qwen(3, 5120, 40, 40, 8, 128, 17408, 151936, tied=False),
    "qwen3-32b": _qwen(3, 5120, 64, 64, 8, 128, 25600, 151936, tied=False),
    "qwen2.5-0.5b": _qwen(2, 896, 24, 14, 2, 64, 4864, 151936, tied=True),
    "qwen2.5-1.5b": _qwen(2, 1536, 28, 12, 2, 128, 8960, 151936, tied=True),
    "qwen2.5-7b": _qwen(2, 3584, 28, 28, 4, 128, 18944, 152064, tied=False),
    "gemma3-270m": _gemma(640, 18, 4, 1, 256, 2048, 262144, window=512),
    "gemma3-1b": _gemma(1152, 26, 4, 1, 256, 6912, 262144, window=512),
    "gemma3-4b": _gemma(
        2560, 34, 8, 4, 256, 10240, 262208, window=1024, rope_scaling={"rope_type": "linear", "factor": 8.0}
    ),
    "smollm2-135m": _smollm2(576, 30, 9, 3, 64, 1536),
    "smollm2-360m": _smollm2(960, 32, 15, 5, 64, 2560),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 32, 64, 8192, theta=130000.0),
    "mistral-7b": _hf(
        "mistral",
        "MistralForCausalLM",
        (4096, 32, 32, 8, 128, 14336, 32768),
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        max_position_embeddings=32768,
    ),
}
