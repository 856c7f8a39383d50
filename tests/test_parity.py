"""The forward pass against transformers, on random models of every family."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from distillax.checkpoints.source import find
from distillax.models import attention, transformer


def load(folder: Path):
    source = find(folder)
    return source.config, jax.tree.map(jnp.asarray, source.params())


def our_logits(params, tokens, config, **options):
    tokens = jnp.asarray(tokens, jnp.int32)
    hidden = transformer.hidden_states(params, tokens, config, **options)
    return np.asarray(transformer.logits(params, hidden, config))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = tiny.make(name, tmp_path)
    config, params = load(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 160, (2, 150))
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    for scan in (True, False):
        got = our_logits(params, tokens, config, scan=scan)
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.fixture(params=["", "looped"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as in short rows, and as in long ones: of many more blocks than are compiled one by one."""
    if request.param:
        monkeypatch.setattr(attention, "_BLOCK", 8)
        monkeypatch.setattr(attention, "_UNROLLED", 2)


@pytest.mark.parametrize("name", ["llama3.1", "mistral-window", "gemma3"])
def test_packed_documents_equal_themselves_alone(name: str, blocks: None, tmp_path: Path) -> None:
    tiny.make(name, tmp_path)
    config, params = load(tmp_path)
    rng = np.random.default_rng(1)
    lengths = [40, 1, 150, 60]
    documents = [rng.integers(3, 160, n) for n in lengths]
    tokens = np.concatenate(documents)[None]
    segments = np.repeat([1, 2, 3, 0], lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    packed = our_logits(
        params, tokens, config, segment_ids_BT=jnp.asarray(segments), positions_BT=jnp.asarray(positions)
    )[0]
    start = 0
    for document in documents:
        alone = our_logits(params, document[None], config)[0]
        part = packed[start : start + len(document)]
        assert np.abs(part - alone).max() <= 1e-5 * np.abs(alone).max()
        start += len(document)


@pytest.mark.parametrize("name", ["qwen2", "gemma3-softcap"])
def test_gradients_equal_torch(name: str, tmp_path: Path) -> None:
    """Backward pass too: every weight's gradient, with each remat policy."""
    reference = tiny.make(name, tmp_path)
    config, params = load(tmp_path)
    tokens = np.random.default_rng(2).integers(3, 160, (2, 140))
    mix = np.random.default_rng(3).normal(size=(2, 140, 160)).astype(np.float32)
    (reference(torch.tensor(tokens)).logits * torch.tensor(mix)).sum().backward()

    def loss(params, remat):
        hidden = transformer.hidden_states(params, jnp.asarray(tokens, jnp.int32), config, remat=remat)
        return (transformer.logits(params, hidden, config) * mix).sum()

    wanted = {n: p.grad.numpy() for n, p in reference.named_parameters()}
    for remat in transformer.REMAT_POLICIES:
        grads = jax.jit(jax.grad(loss), static_argnums=1)(params, remat)
        for ours, theirs in [("q", "q_proj.weight"), ("k", "k_proj.weight"), ("down", "down_proj.weight")]:
            got = np.asarray(grads["layers"][ours][1]).T
            want = next(g for n, g in wanted.items() if n.endswith("layers.1." + _module(ours) + theirs))
            np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=2e-4)
        np.testing.assert_allclose(
            np.asarray(grads["embed"]),
            wanted["model.embed_tokens.weight"],
            atol=2e-5 * np.abs(wanted["model.embed_tokens.weight"]).max(),
        )


def test_bfloat16_weights_have_gradients(tmp_path: Path) -> None:
    """Every one of them, and the same whether the layers are scanned or not."""
    tiny.make("llama3.1", tmp_path)
    config, params = load(tmp_path)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    tokens = jnp.arange(12, dtype=jnp.int32)[None]

    def loss(params, scan: bool) -> jax.Array:
        hidden = transformer.hidden_states(params, tokens, config, dtype=jnp.bfloat16, scan=scan)
        return (hidden.astype(jnp.float32) * jnp.linspace(-1, 1, config.width)[None, None]).sum()

    scanned, unrolled = (jax.jit(jax.grad(loss), static_argnums=1)(params, scan) for scan in (True, False))
    for a, b in zip(jax.tree.leaves(scanned["layers"]), jax.tree.leaves(unrolled["layers"]), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def _module(name: str) -> str:
    return "mlp." if name == "down" else "self_attn."
