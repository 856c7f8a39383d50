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


@pytest.mark.parametrize("family", CLASSES)
def test_what_transformers_writes(family: str) -> None:
    """Its defaults are accepted; and each of its keys is read, refused where it matters, or known not to."""
    hf = getattr(transformers, CLASSES[family])().to_dict()
    assert config_from_hf(hf).family == family
    assert set(hf) - READ_BY_ALL - ASIDE - set(_NEUTRAL) == set()
    assert set(hf) >= set(_READ[family]) - {"rope_local_base_freq", "layer_types"}  # those of older versions


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
    both["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
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
        ({"sliding_window": 8}, "sliding_window=8"),
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
