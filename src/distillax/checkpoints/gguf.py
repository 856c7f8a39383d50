"""GGUF files: their tensors under Hugging Face names, and the Hugging Face configuration that they imply.

llama.cpp changes three things on the way into a GGUF, all undone here: it renames the tensors, it permutes
the query and key rows of the `llama` architecture for interleaved rotary embeddings, and it adds one to the
norm weights of Gemma.
"""

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from distillax.checkpoints.gguf_file import GGUFFile, open_gguf
from distillax.checkpoints.gguf_tokenizer import build_tokenizer, special_token_ids, stop_token_ids
from distillax.errors import UserError

_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
_MLP = {f"ffn_{name}.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
_QKV_BIAS = {f"attn_{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
_QK_NORM = {f"attn_{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"}
_PRE_NORM = {"ffn_norm.weight": "post_attention_layernorm.weight"}
_SANDWICH_NORM = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_OUTPUT_BIAS = {"attn_output.bias": "self_attn.o_proj.bias"}

# Architecture -> the tensors of one block, GGUF name -> Hugging Face name.
_BLOCKS = {
    "llama": _ATTENTION | _MLP | _PRE_NORM | _QKV_BIAS | _OUTPUT_BIAS,
    "qwen2": _ATTENTION | _MLP | _PRE_NORM | _QKV_BIAS,
    "qwen3": _ATTENTION | _MLP | _PRE_NORM | _QK_NORM,
    "gemma3": _ATTENTION | _MLP | _SANDWICH_NORM | _QK_NORM,
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FREQS = "rope_freqs.weight"
_GEMMA3_27B_LAYERS = 62


class GGUFSource:
    """The tensors of a GGUF file with Hugging Face names, shapes and values; all float32.

    Raises UserError for a file that is no GGUF, an unsupported architecture, and any tensor without a
    Hugging Face counterpart, by name.
    """

    def __init__(self, path: str | Path):
        self._file = open_gguf(path)
        self._stored_names = _name_map(self._file)

    def names(self) -> list[str]:
        """Hugging Face names, in the file's order."""
        return list(self._stored_names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._stored_names[name]].shape

    def dtype(self, name: str) -> np.dtype:
        """float32, whatever the type in the file."""
        return np.dtype(np.float32)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or those `rows` of it, freshly read and de-quantised: float32, in the Hugging Face
        layout."""
        stored = self._stored_names[name]
        if self._file.architecture == "llama":
            if ".attn_q." in stored:
                return self._read_heads(stored, self._file.require("{arch}.attention.head_count"), rows)
            if ".attn_k." in stored:
                return self._read_heads(stored, _kv_heads(self._file), rows)
        values = self._file.read(stored, rows)
        if self._file.architecture == "gemma3" and stored.endswith("norm.weight"):
            return values - np.float32(1)
        return values

    def _read_heads(self, stored: str, heads: int, rows: slice) -> np.ndarray:
        """Rows of a tensor whose rows llama.cpp has permuted within each head."""
        total = self._file.tensors[stored].shape[0]
        size = total // heads
        start, stop, _ = rows.indices(total)
        first, last = start // size, -(-stop // size)
        values = self._file.read(stored, slice(first * size, last * size))
        return _half_split_rows(values, last - first)[start - first * size : stop - first * size]


def _half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from pairs (0, 1), (2, 3), ... to halves: rotary dimension i pairs with i + D/2."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _name_map(file: GGUFFile) -> dict[str, str]:
    """Hugging Face name -> GGUF name, for every tensor in the file, each exactly once."""
    block = _BLOCKS[_supported(file)]
    layers = file.require("{arch}.block_count")
    known = _TOP | {
        f"blk.{layer}.{stored}": f"model.layers.{layer}.{name}"
        for layer in range(layers)
        for stored, name in block.items()
    }
    names = [name for name in file.tensors if name != _ROPE_FREQS]
    if len(names) < len(file.tensors):
        _llama3_scaling(file)  # these factors become configuration; unknown ones are refused
    unknown = [name for name in names if name not in known]
    if unknown:
        listed = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise UserError(
            f"{file.path} holds tensors that a {file.architecture} model with {layers} layers does not have: "
            f"{listed}; such a model is not supported."
        )
    return {known[name]: name for name in names}


def _supported(file: GGUFFile) -> str:
    if file.architecture not in _BLOCKS:
        raise UserError(
            f"{file.path} has the architecture {file.architecture}, which is not supported; "
            f"supported are {', '.join(sorted(_BLOCKS))}."
        )
    return file.architecture


def _kv_heads(file: GGUFFile) -> int:
    return file.get("{arch}.attention.head_count_kv", file.require("{arch}.attention.head_count"))


def hf_config(path: str | Path) -> dict[str, Any]:
    """The contents of the config.json that this GGUF file was made from, as far as the file tells.

    A llama file with a sliding window is `mistral`; without one the two are the same model. Raises UserError
    for an unsupported architecture (named, with the supported ones) or rope scaling, or missing metadata.
    """
    file = open_gguf(path)
    _name_map(file)
    config = _common_config(file)
    if file.architecture == "llama":
        config |= _llama_config(file)
    elif file.architecture == "qwen2":
        config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
    elif file.architecture == "qwen3":
        config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}
        config["attention_bias"] = False
    else:
        config |= _gemma3_config(file)
    return config


def _common_config(file: GGUFFile) -> dict[str, Any]:
    heads, width = file.require("{arch}.attention.head_count"), file.require("{arch}.embedding_length")
    kv_heads, mlp_width = _kv_heads(file), file.require("{arch}.feed_forward_length")
    if not all(isinstance(value, int) for value in (heads, kv_heads, mlp_width)):
        raise UserError(f"{file.path} has layers of different sizes, which is not supported.")
    head_dim = file.get("{arch}.attention.key_length", width // heads)
    if file.get("{arch}.attention.value_length", head_dim) != head_dim:
        raise UserError(f"{file.path} has keys and values of different sizes, which is not supported.")
    ids = special_token_ids(file)
    config = {
        "hidden_size": width,
        "num_hidden_layers": file.require("{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": mlp_width,
        "vocab_size": _tensor_shape(file, "token_embd.weight")[0],
        "rms_norm_eps": file.require("{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.get("{arch}.rope.freq_base", 10000.0),
        "max_position_embeddings": file.require("{arch}.context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
        "torch_dtype": "float32",
    }
    if scaling := _rope_scaling(file):
        config["rope_scaling"] = scaling
    return config


def _tensor_shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise UserError(f"{file.path} has no tensor {name}; convert the model to GGUF again.")
    return file.tensors[name].shape


def _llama_config(file: GGUFFile) -> dict[str, Any]:
    if window := file.get("{arch}.attention.sliding_window"):
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }


def _gemma3_config(file: GGUFFile) -> dict[str, Any]:
    """Gemma 3 text (https://arxiv.org/abs/2503.19786): five sliding-window layers, then a global one."""
    layers = file.require("{arch}.block_count")
    heads, width = file.require("{arch}.attention.head_count"), file.require("{arch}.embedding_length")
    head_dim = file.get("{arch}.attention.key_length", width // heads)
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": file.require("{arch}.attention.sliding_window"),
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
        "rope_local_base_freq": file.get("{arch}.rope.freq_base_swa", 10000.0),
        # The file does not say; the 27B model alone scales by the width of a head, not by head_dim.
        "query_pre_attn_scalar": width // heads if layers == _GEMMA3_27B_LAYERS else head_dim,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": file.get("{arch}.final_logit_softcapping"),
    }


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    """The rope_scaling entry of config.json, or None."""
    if _ROPE_FREQS in file.tensors:
        return _llama3_scaling(file)
    kind = file.get("{arch}.rope.scaling.type", "none")
    factor = file.get("{arch}.rope.scaling.factor")
    if kind == "none" or factor is None:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = file.require("{arch}.rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UserError(f"{file.path} scales its rotary embeddings by {kind}, which is not supported.")


def _llama3_scaling(file: GGUFFile) -> dict[str, Any]:
    """The llama3 scaling whose divisors `rope_freqs.weight` holds; llama.cpp does not keep its parameters."""
    stored = file.read(_ROPE_FREQS)
    theta = file.get("{arch}.rope.freq_base", 10000.0)
    # Llama 3.1 and 3.3 scale by 8, Llama 3.2 by 32; the other parameters are the same.
    for factor in (8.0, 32.0):
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = llama3_divisors(scaling, theta, 2 * stored.size)
        if file.architecture == "llama" and np.allclose(stored, expected, rtol=1e-4, atol=0):
            return scaling
    raise UserError(
        f"{file.path}: {_ROPE_FREQS} is neither the rope scaling of Llama 3.1 (factor 8) nor that of "
        "Llama 3.2 (factor 32), so it is unknown; use the Hugging Face checkpoint instead."
    )


def llama3_divisors(scaling: dict[str, Any], theta: float, dim: int) -> np.ndarray:
    """float64[dim / 2]: what llama3 rope scaling divides each rotary frequency by.

    Long wavelengths are divided by `factor`, short ones by 1, and between the two the reciprocal is
    interpolated linearly in original length / wavelength (Llama 3.1 reference code).
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelength
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def generation_config(path: str | Path) -> dict[str, Any]:
    """The contents of generation_config.json: bos, eos and pad ids, those that the file has.

    `eos_token_id` is a list where a chat turn ends with another token than the text does.
    """
    file = open_gguf(path)
    ids = special_token_ids(file)
    stops = stop_token_ids(file)
    eos = stops[0] if len(stops) == 1 else stops or None
    config = {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["pad"]}
    return {key: value for key, value in config.items() if value is not None}


def license_name(path: str | Path) -> Any:
    """The license that the file says it has, such as apache-2.0; None if it says nothing."""
    return open_gguf(path).metadata.get("general.license")


def tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The PreTrainedTokenizerFast of a GGUF file, from its own metadata; see `build_tokenizer`."""
    return build_tokenizer(open_gguf(path))
