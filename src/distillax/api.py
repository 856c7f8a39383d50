"""What the command line does, in three lines of Python: load a model, look at it, let it answer."""

import difflib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillax.checkpoints.source import find
from distillax.data import chat
from distillax.errors import UserError
from distillax.models import transformer
from distillax.models.backend import compute_dtype
from distillax.models.families import ModelConfig
from distillax.models.layout import mesh_of, on_mesh
from distillax.models.spec import Tree
from distillax.parallel.weights import place_here
from distillax.progress import progress
from distillax.teachers import Request, SamplingParams
from distillax.teachers.embedded import EmbeddedTeacher


@dataclass(frozen=True)
class Model:
    """A model in memory. `params` are laid out as models.spec says; `tokenizer` is None where the
    source has none."""

    config: ModelConfig
    params: Tree
    tokenizer: Any
    generation_config: dict[str, Any]
    name: str

    def logits(self, tokens: Any, dtype: Any = jnp.float32) -> jax.Array:
        """int[B, T] -> float32[B, T, V], the products computed in `dtype`. Raises UserError for another
        shape, such as that of one text alone: [tokens] is a batch of it."""
        if isinstance(tokens, str) or any(isinstance(row, str) for row in tokens):
            raise UserError("logits are of token ids, not of text; give [model.tokenizer.encode(text)]")
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2:
            raise UserError(f"tokens are of shape {tokens.shape}, not [rows, tokens]; put one text in a list")
        with on_mesh(mesh_of(self.params)):
            return _logits(self.params, tokens, self.config, np.dtype(dtype).name)

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        enable_thinking: bool | None = None,
        dtype: Any = None,
        batch_size: int = 32,
        label: str = "",
        **sampling: Any,
    ) -> list[str]:
        """Answers to prompts, batched. Greedy unless `temperature` is given. With a `label`, which stands
        before it, progress is shown.

        A prompt is a string or a conversation (a list of {role, content}), rendered by the chat
        template, with `enable_thinking` if it is not None. `sampling` are the fields of
        teachers.SamplingParams. Raises UserError for one that is not, where there is no tokenizer or no
        chat template, for a prompt that is not in a list, and for one with an id that the model has no row
        for.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one string, not a list of prompts; give [prompt]")
        if self.tokenizer is None:
            raise UserError(
                f"{self.name} has no tokenizer, which text goes through; load it with one beside it"
            )
        requests = []
        for i, prompt in enumerate(prompts):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            text = chat.render_prompt(self.tokenizer, messages, enable_thinking)
            tokens = chat.encode(self.tokenizer, text)
            chat.check_ids(self.tokenizer, tokens, self.config.vocab_size)
            requests.append(Request(f"{i:08d}", 0, messages, text, tokens))
        fields = SamplingParams.__dataclass_fields__
        if wrong := next((name for name in sampling if name not in fields), None):
            near = difflib.get_close_matches(wrong, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise UserError(f"generate takes no {wrong}; {hint}")
        stops = chat.stop_tokens(self.generation_config, self.tokenizer)
        params = replace(SamplingParams(temperature=0.0, stop_token_ids=stops), **sampling)
        teacher = EmbeddedTeacher(
            self.config, self.params, self.tokenizer, batch_size=batch_size, dtype=dtype
        )
        found = {}
        with teacher, progress(len(requests), label, enabled=bool(label and requests)) as bar:
            for completion in teacher.generate(requests, params):
                found[completion.prompt_id] = completion.text
                bar.update()
        return [found[request.prompt_id] for request in requests]


@jax.jit(static_argnums=(2, 3))
def _logits(params: Tree, tokens: jax.Array, config: ModelConfig, dtype: str) -> jax.Array:
    hidden = transformer.hidden_states(params, tokens, config, dtype=jnp.dtype(dtype))
    return transformer.logits(params, hidden, config)


def _check_float(dtype: Any) -> None:
    with suppress(TypeError):
        if jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            return
    raise UserError(f"dtype={dtype!r} is none of weights; give float32, bfloat16 or float16")


def load(
    source: str | Path, dtype: Any = None, hf_access_token: str | None = None, *, products: str = ""
) -> Model:
    """Loads a model from a Hugging Face folder or hub id, a GGUF file, or an Orbax checkpoint, onto all
    devices of this process: each holds a part of every weight that can be split.

    `dtype` None keeps the stored one. Weights that serve products alone are kept in the dtype `products`
    ("auto": what is fast here) where that is narrower; what is computed in it stays the same. Raises
    UserError for anything that is not exactly a model of a supported family.
    """
    if products not in ("", "auto", "float32", "bfloat16"):
        raise UserError(f"products={products!r} is no dtype of products; give auto, float32 or bfloat16")
    if dtype is not None:
        _check_float(dtype)
    found = find(source, hf_access_token=hf_access_token)
    params = place_here(found, dtype, products=products and compute_dtype(products))
    return Model(found.config, params, found.tokenizer_or_none(), found.generation_config, found.name)
