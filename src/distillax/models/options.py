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
_ROPE_BY_KIND = ("gemma3_text",)  # families whose layers have the rotary positions of their kind


def refuse_options(hf: Mapping[str, Any]) -> None:
    """Raises UserError for an option of this config.json that would change what its family computes, and is
    not read."""
    family = hf["model_type"]
    for name, value, neutral in _found(hf, family):
        if any(x is not None and x not in neutral for x in (value if isinstance(value, list) else [value])):
            said = json.dumps(value)
            raise UserError(
                f"config.json: {name}={said if len(said) < 60 else said[:56] + ' ...'} is not supported for "
                f"model_type {family}; give a model without it"
            )


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
