"""Options of a config.json that change what a decoder computes: one that its family does not read is refused
by name, unless its value changes nothing.

What transformers' decoders of such layers have, under their names. Other keys, such as `use_cache`, are left
alone.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from distillax.errors import UserError

_FULL, _SLIDING = "full_attention", "sliding_attention"

# The values that change nothing, besides null; of a list, those of its entries.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # attention
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (0,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (0,),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "layer_types": (_FULL,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "sliding_window": (0,),
    "use_bidirectional_attention": (False,),
    "use_qk_norm": (False,),
    # positions
    "no_rope_layer_interval": (0,),
    "no_rope_layers": (1,),  # one says that the layer has rotary positions
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "rotary_pct": (1,),
    # MLP
    "mlp_bias": (False,),
    "n_routed_experts": (0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    # scales, and the order of the parts
    "dim_model_base": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "num_kv_shared_layers": (0,),
    "parallel_attn": (False,),
    "residual_multiplier": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_parallel_residual": (False,),
}
_WINDOWS = ("layer_types", "sliding_window")
_READ: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "sliding_window"),  # no window in transformers, either
    "mistral": _WINDOWS,
    "qwen2": ("attention_bias", *_WINDOWS),  # which it always has
    "qwen3": ("attention_bias", *_WINDOWS),
    "gemma3_text": (
        *("final_logit_softcapping", "query_pre_attn_scalar", "rope_local_base_freq"),
        *_WINDOWS,
    ),
}
# The numbers that are read, and how large they may be: more than any model's.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
_COUNTS = (
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"),
    *("sliding_window", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"),
)
_LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")  # written as 8192.0 at times
_REALS = (
    *("rms_norm_eps", "query_pre_attn_scalar", "final_logit_softcapping"),
    *("rope_theta", "rope_local_base_freq", "factor", "low_freq_factor", "high_freq_factor"),
)
_WITHIN: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_SIZES, (1, 10**9)),
    **dict.fromkeys(_COUNTS, (0, 10**12)),
    **dict.fromkeys(_REALS, (0, 1e30)),
    "num_hidden_layers": (1, 10**5),
    "sliding_window": (-1, 10**12),  # where nothing reads it
}
_NEVER_NULL = (*_SIZES, "rms_norm_eps")
_ROPE = ("rope_scaling", "rope_parameters", _FULL, _SLIDING)  # objects, the last two in the second
_ROPE_BY_KIND = ("gemma3_text",)  # families whose layers have the rotary positions of their kind


def refuse_options(hf: Mapping[str, Any]) -> None:
    """Raises UserError for an option of this config.json that would change what its family computes, and is
    not read."""
    family = hf["model_type"]
    for name, value, neutral in _found(hf, family):
        if any(x is not None and x not in neutral for x in (value if isinstance(value, list) else [value])):
            raise UserError(
                f"config.json: {name}={_short(value)} is not supported for model_type {family}; "
                "give a model without it"
            )


def refuse_values(hf: Mapping[str, Any], inside: str = "") -> None:
    """Raises UserError for a number of this config.json that no model has, or what should be one and is
    not: computing with it would fail, or take all memory."""
    for name, value in hf.items():
        where = f"{inside}{name}"
        if name in _ROPE and isinstance(value, Mapping):
            refuse_values(value, f"{where}.")
            continue
        if value is None and name not in _NEVER_NULL:
            continue
        if name in _WITHIN:
            least, most = _WITHIN[name]
            whole = "" if name in _REALS else "whole "
            fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
            if fits and whole and isinstance(value, float):
                fits = name in _LENGTHS and value.is_integer()
            wanted = f"a {whole}number from {least:,} to {most:,}"
        else:
            fits, wanted = name not in _ROPE, "an object"
        if not fits:
            raise UserError(f"config.json: {where}={_short(value)}, which is not {wanted}; correct it")


def _short(value: Any) -> str:
    said = json.dumps(value)
    return said if len(said) < 60 else said[:56] + " ..."


def _found(hf: Mapping[str, Any], family: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(name, value, values that change nothing) of each option that is there and not read."""
    for name, neutral in _NEUTRAL.items():
        if name in hf and name not in _READ[family]:
            yield name, hf[name], neutral
    yield "layer_types", hf.get("layer_types"), (_FULL, _SLIDING)  # other kinds nobody reads
    yield from _of_rope(hf, family)


def _of_rope(hf: Mapping[str, Any], family: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """The same of rotary positions, whose options are in two places, by transformers' version."""
    new, old = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    parts = {"rope_parameters": new, "rope_scaling": old}
    of_kinds = {f"rope_parameters.{kind}": new.get(kind) or {} for kind in (_FULL, _SLIDING)}
    whole = new
    if new and family in _ROPE_BY_KIND:
        parts |= of_kinds
        whole, local = of_kinds.values()
        yield "rope_parameters.rope_theta", new.get("rope_theta"), ()
        yield f"rope_parameters.{_SLIDING}.rope_type", local.get("rope_type"), ("default",)
    else:
        yield from ((name, part or None, ()) for name, part in of_kinds.items())
    for name, part in parts.items():
        yield f"{name}.partial_rotary_factor", part.get("partial_rotary_factor"), (1,)
    same = {**whole, "type": whole.get("rope_type")}  # its name before
    if new and any(same.get(name) != value for name, value in old.items()):
        yield "rope_scaling", old, ()  # which the new one overrides
