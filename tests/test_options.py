"""Options of a config.json: which are refused, and what transformers itself writes is not."""

import copy
from typing import Any

import pytest
import tiny
import transformers

from distillax.errors import UserError
from distillax.models.families import _PRESETS, config_from_hf
from distillax.models.options import _NEUTRAL, _READ

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 160,
}
CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma3_text": "Gemma3TextConfig",
}
# Of transformers' configurations: what every family of ours reads, and what is not of the computation.
READ_BY_ALL = {
    *SIZES,
    *("head_dim", "hidden_act", "hidden_activation", "max_position_embeddings", "model_type"),
    *("rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("use_sliding_window", "max_window_layers", "_sliding_window_pattern"),  # where the family has them
}
ASIDE = {
    *("_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward"),
    *("dtype", "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id"),
    *("output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type"),
    *("return_dict", "transformers_version", "use_cache"),
}
FULL, SLIDING = "full_attention", "sliding_attention"
TOLERATED = {"layer_types", "attention_bias", "sliding_window"}  # in configs of some families, without a use

# As published: what is not of the computation is left out, but for a few.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False},
        **{"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "mlp_bias": False},
        **{"max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32},
        **{"num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
        **{"tie_word_embeddings": False, "use_cache": True, "vocab_size": 128256},
        "rope_scaling": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
    },
    "Mistral-7B-v0.1": {
        **{"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336},
        **{"max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32},
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096},
        **{"tie_word_embeddings": False, "vocab_size": 32000},
    },
    "Qwen2.5-0.5B": {
        **{"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864},
        **{"max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14},
        **{"num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
        **{"sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False},
        **{"use_sliding_window": False, "vocab_size": 151936},
    },
    "Qwen3-0.6B": {
        **{"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu"},
        **{"hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960},
        **{"max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28},
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e6},
        **{"sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False},
        **{"vocab_size": 151936},
    },
    "gemma-3-1b": {
        **{"model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None},
        **{"cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256},
        **{"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912},
        **{"max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26},
        **{"num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6},
        **{"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000},
        **{"sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144},
    },
}


@pytest.mark.parametrize("family", CLASSES)
def test_what_transformers_writes(family: str) -> None:
    """Its defaults are accepted; and each of its keys is read, refused where it matters, or known not to."""
    hf = getattr(transformers, CLASSES[family])().to_dict()
    assert config_from_hf(hf).family == family
    assert set(hf) - READ_BY_ALL - ASIDE - set(_NEUTRAL) == set()
    assert set(hf) >= set(_READ[family]) - {
        "rope_local_base_freq",
        *TOLERATED,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_accepted(name: str) -> None:
    found = config_from_hf(PUBLISHED[name])
    assert found.layers == PUBLISHED[name]["num_hidden_layers"]


def test_real_configs_are_accepted() -> None:
    for name, hf in _PRESETS.items():
        assert config_from_hf(hf).layers == hf["num_hidden_layers"], name
    for kind, own in tiny.FAMILIES.values():
        assert config_from_hf(getattr(transformers, kind)(**{**tiny.SMALL, **own}).to_dict())
    idle = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1, "use_mrope": False}
    found = config_from_hf({**SIZES, "model_type": "qwen2", **idle, "rope_scaling": None})
    assert found.windows == (0, 0)
    smollm2 = {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}}
    assert config_from_hf({**SIZES, "model_type": "llama", **smollm2, "pretraining_tp": 2})
    neutral = {name: values[0] for name, values in _NEUTRAL.items() if values}
    lists = {"layer_types": [FULL] * 2, "no_rope_layers": [1, 1]}
    assert config_from_hf({**SIZES, "model_type": "llama", **neutral, **lists}).windows == (0, 0)
    both = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}
    both["rope_scaling"] = {"rope_type": "linear", "type": "linear", "factor": 2.0}
    assert config_from_hf({**SIZES, "model_type": "llama", **both}).rope_theta == 5.0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor=0.5"),
        (
            {"rope_parameters": {FULL: {"rope_theta": 5.0}}},
            'rope_parameters.full_attention={"rope_theta": 5.0}',
        ),
        (
            {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            'rope_scaling={"type": "linear", "factor": 2.0}',
        ),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"attention_multiplier": 0.1}, "attention_multiplier=0.1"),
        ({"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
        ({"embedding_multiplier": 12}, "embedding_multiplier=12"),
        ({"logits_scaling": 8}, "logits_scaling=8"),
        ({"layer_types": [SLIDING, FULL], "sliding_window": 8}, f'layer_types=["{SLIDING}", "{FULL}"]'),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0]"),
        ({"no_rope_layers": [0] * 40}, "no_rope_layers=[0, 0, 0, 0"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"num_experts": 128}, "num_experts=128"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias=true"),
        ({"model_type": "qwen3", "final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        (
            {"model_type": "qwen3", "layer_types": [FULL, "linear_attention"]},
            'layer_types=["full_attention", "li',
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention=true",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters.rope_theta=5.0",
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}},
            },
            'rope_parameters.sliding_attention.rope_type="linear"',
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {FULL: {"partial_rotary_factor": 0.5}}},
            "rope_parameters.full_attention.partial_rotary_factor=0.5",
        ),
    ],
)
def test_what_is_not_computed_is_refused(option: dict[str, Any], said: str) -> None:
    hf = {**SIZES, "model_type": "llama", **copy.deepcopy(option)}
    with pytest.raises(UserError) as error:
        config_from_hf(hf)
    assert str(error.value).startswith(f"config.json: {said}")
    assert str(error.value).endswith(
        f"is not supported for model_type {hf['model_type']}; give a model without it"
    )
    assert len(str(error.value)) < 180


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": float("inf")}, "hidden_size=Infinity, which is not a whole number from 1 to 1,0"),
        ({"vocab_size": 0}, "vocab_size=0, which is not a whole number from 1 "),
        (
            {"num_hidden_layers": 10**4000},
            f"num_hidden_layers=1{'0' * 55} ..., which is not a whole number from",
        ),
        ({"num_attention_heads": True}, "num_attention_heads=true, which is not a whole number from 1 "),
        ({"intermediate_size": None}, "intermediate_size=null, which is not a whole number from 1 "),
        ({"max_position_embeddings": "2048"}, 'max_position_embeddings="2048", which is not a whole number '),
        (
            {"rms_norm_eps": float("nan")},
            "rms_norm_eps=NaN, which is not a number from 0 to 1e+30; correct it",
        ),
        ({"rope_scaling": 2}, "rope_scaling=2, which is not an object; correct it"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
            f"rope_scaling.factor=1{'0' * 55} ..., which is not a number from 0 ",
        ),
        (
            {"rope_parameters": {SLIDING: {"rope_theta": -1}}, "model_type": "gemma3_text"},
            f"rope_parameters.{SLIDING}.rope_theta=-1, which is not a number from 0 ",
        ),
    ],
)
def test_a_number_that_no_model_has_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_hf({**SIZES, "model_type": "llama", **change})
    assert str(error.value).startswith(f"config.json: {said}")
    assert str(error.value).endswith("; correct it") and len(str(error.value)) < 180


def test_null_is_as_if_the_key_were_not_there() -> None:
    names = ("head_dim", "num_key_value_heads", "query_pre_attn_scalar", "rope_scaling", "sliding_window")
    for family in CLASSES:
        hf = {**SIZES, "model_type": family}
        del hf["num_key_value_heads"]
        assert config_from_hf(hf | dict.fromkeys(names)) == config_from_hf(hf)
    windowed = {**SIZES, "model_type": "qwen2", "use_sliding_window": True}
    null = config_from_hf(windowed | {"max_window_layers": None, "max_position_embeddings": None})
    assert null == config_from_hf(windowed)
    rope = {"full_attention": None, "sliding_attention": None}
    assert config_from_hf({**SIZES, "model_type": "gemma3_text", "rope_parameters": rope}).rope_theta == 1e6
    long = config_from_hf({**SIZES, "model_type": "llama", "max_position_embeddings": 2048.0})
    assert type(long.max_position) is int and long.max_position == 2048
    unread = {**SIZES, "model_type": "qwen3", "use_sliding_window": False, "sliding_window": -1}
    assert not any(config_from_hf(unread).windows)
    with pytest.raises(UserError, match="sliding_window=-1, which is no number of tokens"):
        config_from_hf({**SIZES, "model_type": "mistral", "sliding_window": -1})
    with pytest.raises(UserError, match="activation .* is not supported"):
        config_from_hf({**SIZES, "model_type": "llama", "hidden_act": ["silu"]})
    with pytest.raises(UserError, match="lacks the key 'factor'"):
        config_from_hf({**SIZES, "model_type": "llama", "rope_scaling": {"type": "linear", "factor": None}})
