"""The chunked loss against the full one in float64, and gradients that do not depend on the split."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import load

from distillax.train import fused
from distillax.train.objectives import Compute, sft
from distillax.train.step import accumulate

E, V = 16, 50


def reference(hidden, head, targets, weights, cap):
    """float64 logits, log-softmax and the analytic gradient, with numpy."""
    h, w = hidden.astype(np.float64), head.astype(np.float64)
    raw = h @ w.T
    z = cap * np.tanh(raw / cap) if cap else raw
    lse = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)
    loss = (weights * (lse - z[np.arange(len(z)), targets])).sum()
    g = (np.exp(z - lse[:, None]) - np.eye(w.shape[0])[targets]) * weights[:, None]
    if cap:
        g *= 1 - (z / cap) ** 2
    return loss, g @ w, g.T @ h


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.sampled_from([1, 7, 24]),
    chunk=st.sampled_from([1, 5, 8, 64]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    cap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 5),
)
def test_equals_the_reference(tokens, chunk, share, cap, seed) -> None:
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(tokens, E)).astype(np.float32)
    head = rng.normal(size=(V, E)).astype(np.float32)
    targets = rng.integers(0, V, tokens)
    weights = ((rng.random(tokens) < share) * rng.uniform(0.5, 2, tokens)).astype(np.float32)

    def loss(hidden, head):
        return 3 * fused.cross_entropy(hidden, head, jnp.asarray(targets), jnp.asarray(weights), cap, chunk)

    value, grads = jax.value_and_grad(loss, (0, 1))(jnp.asarray(hidden), jnp.asarray(head))
    wanted, dhidden, dhead = reference(hidden, head, targets, weights, cap)
    np.testing.assert_allclose(value / 3, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(grads[0]) / 3, dhidden, rtol=1e-5, atol=1e-5 * (abs(dhidden).max() + 1e-9)
    )
    np.testing.assert_allclose(
        np.asarray(grads[1]) / 3, dhead, rtol=1e-5, atol=1e-5 * (abs(dhead).max() + 1e-9)
    )
    assert float(loss(jnp.asarray(hidden), jnp.asarray(head))) == pytest.approx(float(value), rel=1e-6)


def test_three_tokens_by_hand() -> None:
    """p = (1/2, 1/4, 1/4) and uniform: losses log 2 and log 3; the third token bears none."""
    hidden = jnp.asarray([[1.0], [0.0], [5.0]])
    head = jnp.asarray([[np.log(2.0)], [0.0], [0.0]], jnp.float32)
    loss = fused.cross_entropy(hidden, head, jnp.asarray([0, 2, 1]), jnp.asarray([1.0, 1.0, 0.0]))
    assert float(loss) == pytest.approx(np.log(2) + np.log(3), rel=1e-6)


def test_bfloat16_is_close_and_head_gradient_keeps_its_dtype() -> None:
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(40, E)).astype(np.float32), rng.normal(size=(V, E)).astype(np.float32)
    targets, weights = rng.integers(0, V, 40), np.ones(40, np.float32)

    def loss(hidden, head):
        return fused.cross_entropy(
            hidden.astype(jnp.bfloat16), head, jnp.asarray(targets), jnp.asarray(weights)
        )

    value, grads = jax.value_and_grad(loss, (0, 1))(jnp.asarray(hidden), jnp.asarray(head))
    wanted, _, dhead = reference(hidden, head, targets, weights, None)
    assert float(value) == pytest.approx(wanted, rel=0.01)
    assert grads[1].dtype == jnp.float32
    assert np.abs(np.asarray(grads[1]) - dhead).max() < 0.03 * np.abs(dhead).max()


def rows_of(documents: list[tuple[np.ndarray, np.ndarray]], layout: list[list[int]], T: int):
    """Rows that hold the given documents one after the other, padded to T."""
    names = ("inputs", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((len(layout), T), np.int32) for name in names}
    batch["weights"] = np.zeros((len(layout), T), np.float32)
    for row, chosen in enumerate(layout):
        at = 0
        for number, document in enumerate(chosen, 1):
            tokens, mask = documents[document]
            n = len(tokens) - 1
            here = (row, slice(at, at + n))
            batch["inputs"][here], batch["targets"][here] = tokens[:-1], tokens[1:]
            batch["segment_ids"][here], batch["positions"][here] = number, np.arange(n)
            batch["weights"][here] = mask[1:]
            at += n
    return batch


def test_gradients_do_not_depend_on_the_split(tmp_path: Path) -> None:
    """Pitfalls 1 and 2: microbatches, packing and padding change nothing, prompts being unequal."""
    tiny.make("qwen2", tmp_path)
    config, params = load(tmp_path)
    rng = np.random.default_rng(0)
    documents = []
    for length, prompt in [(30, 25), (9, 2), (20, 10), (14, 13), (26, 3), (5, 1), (11, 4), (18, 16)]:
        documents.append((rng.integers(3, 160, length), np.arange(length) >= prompt))
    layouts = {
        "padded, one batch": [[[i] for i in range(8)]],
        "padded, two microbatches": [[[i] for i in range(4)], [[i] for i in range(4, 8)]],
        "padded, eight": [[[i]] for i in range(8)],
        "packed, two": [[[0, 1, 5], [2, 3]], [[4, 6], [7]]],
        "packed, one long row": [[[6, 2, 5, 1, 0, 7, 3, 4]]],
    }
    results = {}
    for name, microbatches in layouts.items():
        T = max(sum(len(documents[i][0]) - 1 for i in row) for m in microbatches for row in m)
        T = max(T, 30)
        batches = [rows_of(documents, m, T) for m in microbatches]
        batch = {k: jnp.asarray(np.stack([b[k] for b in batches])) for k in batches[0]}
        compute = Compute(remat="full")
        run = jax.jit(lambda p, b, c=compute: accumulate(lambda *a: sft(*a, config, c), p, None, b))
        results[name] = run(params, batch)
    base = results.pop("padded, one batch")
    assert float(base[1]) == sum(mask[1:].sum() for _, mask in documents)
    for name, (gradients, weight, terms) in results.items():
        assert float(weight) == float(base[1]), name
        np.testing.assert_allclose(terms["loss"], base[2]["loss"], rtol=1e-5, err_msg=name)
        for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(base[0]), strict=True):
            np.testing.assert_allclose(
                got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()), err_msg=name
            )
