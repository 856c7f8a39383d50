"""The real SmolLM2 and the real Gemma 3 against transformers, in float32."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parts
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import distillax
from distillax.checkpoints.convert import to_hf
from distillax.data import chat
from distillax.errors import UserError
from distillax.models.generate import Engine, Prompt
from distillax.models.sampling import Sampler

TEXTS = [
    "The capital of France is Paris, and that of Japan is",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
]


def reference(source: Path, folder: Path):
    """The export, as transformers loads it: so the export is tested too."""
    to_hf(source, folder)
    assert AutoTokenizer.from_pretrained(folder).encode(TEXTS[0])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_logits_equal_transformers(name: str, tmp_path: Path, smollm2_gguf: Path, gemma3_gguf: Path) -> None:
    source = smollm2_gguf if name == "smollm2" else gemma3_gguf
    theirs, ours = reference(source, tmp_path / "export"), distillax.load(source)
    rng = np.random.default_rng(0)
    long = rng.integers(300, 40_000, 600)  # beyond Gemma's window of 512
    for tokens in [*(ours.tokenizer.encode(text) for text in TEXTS), long]:
        with torch.no_grad():
            wanted = theirs(torch.tensor(np.asarray(tokens)[None])).logits[0].numpy()
        got = np.asarray(ours.logits([tokens]))[0]
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    shutil.rmtree(tmp_path / "export")


def test_greedy_equals_transformers_token_for_token(smollm2_gguf: Path, tmp_path: Path) -> None:
    """32 prompts, 64 tokens. A difference counts only where the two best logits are more than 1e-3 apart."""
    theirs, ours = reference(smollm2_gguf, tmp_path / "export"), distillax.load(smollm2_gguf)
    rows = [c[0] for f in parts.chatterbot_yaml() for c in yaml.safe_load(f.read_text())["conversations"]]
    questions = sorted({str(row) for row in rows})[::20][:32]
    ids = [
        chat.encode(ours.tokenizer, chat.render_prompt(ours.tokenizer, [{"role": "user", "content": q}]))
        for q in questions
    ]
    engine = Engine(ours.params, ours.config, batch_size=16, max_length=256, dtype=jnp.float32)
    sampler = Sampler(stop_token_ids=(ours.tokenizer.eos_token_id,))
    answers = {a.index: a for a in engine.run([Prompt(tokens, 64) for tokens in ids], sampler)}
    assert len(ids) == len(answers) == 32
    same = 0
    for row, prompt in enumerate(ids):
        # Greedy decoding takes the likeliest token after each beginning; ours is such a beginning for as
        # long as they agree, so one pass over our answer says what theirs is.
        got = answers[row].tokens
        if len(got) < 64:
            got = [*got, ours.tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        differ = [step for step, wanted in enumerate(best.indices[:, 0].tolist()) if wanted != got[step]]
        if differ:
            first, second = best.values[differ[0]].tolist()
            assert first - second <= 1e-3, (questions[row], differ[0])
        same += not differ
    assert same >= 28  # near-ties are rare


def test_three_lines_of_python(smollm2_gguf: Path) -> None:
    model = distillax.load(smollm2_gguf)
    answers = model.generate(
        ["What is the capital of France?", [{"role": "user", "content": "Say hi."}]], max_new_tokens=16
    )
    assert "Paris" in answers[0] and len(answers) == 2
    assert model.logits([[1, 2, 3], [4, 5, 6]]).dtype == jax.numpy.float32
    with pytest.raises(UserError, match=r"\(3,\), not \[rows, tokens\]"):
        model.logits([1, 2, 3])
    with pytest.raises(UserError, match="not of text"):
        model.logits("hello")
    with pytest.raises(UserError, match=r"give \[prompt\]"):
        model.generate("What is the capital of France?")
