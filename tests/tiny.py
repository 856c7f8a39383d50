"""Tiny random models of every family, made by transformers, to compare with."""

from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}

# name -> (transformers' config class, options): each with the family's options switched on.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {}),
    "llama2-bias": ("LlamaConfig", {"attention_bias": True}),
    "llama3.1": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama3.2-tied": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "smollm2": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral-window": ("MistralConfig", {"sliding_window": 7, "head_dim": 24}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "qwen3-bias-tied": ("Qwen3Config", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 24,
            "sliding_window": 9,
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    "gemma3-softcap": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 5, "final_logit_softcapping": 3.0},
    ),
}


def make(name: str, folder: Path | None = None, seed: int = 0, **options: Any) -> Any:
    """A random torch model of the family, float32, saved into `folder` if given."""
    import torch
    import transformers

    kind, own = FAMILIES[name]
    config = getattr(transformers, kind)(**{**SMALL, **own, **options})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: zeros and ones hide mistakes
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    if folder is not None:
        model.save_pretrained(folder)
    return model
