"""The embedded engine: greedy equals transformers, and a row does not depend on its neighbours."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from test_parity import load

from distillax.errors import UserError
from distillax.models import generate, schedule
from distillax.models.generate import Engine, Prompt
from distillax.models.sampling import Sampler, cut, sample

LENGTHS = [3, 40, 17, 90, 5, 33, 64, 70, 12, 9, 31, 28, 8]


def prompts(new_tokens: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(rng.integers(3, 160, n).tolist(), new_tokens - i % 5, (i, 7 * i))
        for i, n in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("name", ["llama3.1", "mistral-window", "gemma3"])
def test_greedy_equals_transformers(name: str, tmp_path: Path) -> None:
    reference = tiny.make(name, tmp_path)
    config, params = load(tmp_path)
    work = prompts(20)
    engine = Engine(params, config, batch_size=4, max_length=128, dtype=jnp.float32)
    told: list[int] = []
    answers = {
        a.index: a for a in engine.run(work, Sampler(stop_token_ids=(5, 6), logprobs=True), told.append)
    }
    assert sorted(answers) == list(range(len(work)))
    assert 0 < max(told) < 4 * 20 and told[-1] == 0
    for i, prompt in enumerate(work):
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt.tokens]),
                max_new_tokens=prompt.max_new_tokens,
                do_sample=False,
                eos_token_id=[5, 6],
                output_logits=True,
                return_dict_in_generate=True,
            )
        wanted = out.sequences[0, len(prompt.tokens) :].tolist()
        stopped = wanted[-1] in (5, 6)
        wanted = wanted[:-1] if stopped else wanted
        assert answers[i].tokens == wanted and answers[i].stopped == stopped
        scores = [torch.log_softmax(z[0], -1)[t].item() for z, t in zip(out.logits, wanted, strict=False)]
        np.testing.assert_allclose(answers[i].logprobs, scores, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_depends_on_the_row_alone(dtype: str, tmp_path: Path) -> None:
    """Alone, in other company, in another order and with a longer cache: the same bits."""
    tiny.make("qwen3", tmp_path)
    config, params = load(tmp_path)
    sampler = Sampler(temperature=1.3, top_p=0.9, top_k=50, stop_token_ids=(5,), logprobs=True)
    work = prompts(20)

    def run(chosen: list[int]) -> dict[int, tuple[list[int], list[float] | None]]:
        engine = Engine(params, config, batch_size=4, max_length=1024, dtype=dtype)
        out = engine.run([work[i] for i in chosen], sampler)
        return {chosen[a.index]: (a.tokens, a.logprobs) for a in out}

    everyone = run(list(range(len(work))))
    assert len({tuple(tokens) for tokens, _ in everyone.values()}) > 8
    assert run([3]) == {3: everyone[3]}
    some = [7, 2, 11]
    for length in (300, 700):  # a neighbour that makes the cache longer for all
        work.append(Prompt(np.random.default_rng(1).integers(3, 160, length).tolist(), 40, (9, 9)))
        found = run([*some, len(work) - 1])
        assert {i: found[i] for i in some} == {i: everyone[i] for i in some}


def test_the_end_and_another_limit_compile_nothing(tmp_path: Path) -> None:
    """The last rows, for which none waits, and answers of another length run in programs that are there."""
    tiny.make("qwen3", tmp_path)
    config, params = load(tmp_path)
    engine = Engine(params, config, batch_size=4, max_length=200, dtype=jnp.float32)
    before = generate._decode._cache_size(), generate._prefill._cache_size()
    for new_tokens in (20, 30):
        answers = list(engine.run(prompts(new_tokens), Sampler()))
        assert max(len(answer.tokens) for answer in answers) == new_tokens
    after = generate._decode._cache_size(), generate._prefill._cache_size()
    assert np.subtract(after, before).tolist() == [1, 1]  # all fits into one page


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_beginning_changes_nothing(dtype: str, tmp_path: Path) -> None:
    """Prompts that begin alike, whose keys and values are copied from a row that has them, get the bits
    that each gets alone: whole prompts that repeat, beginnings within and beyond a segment and a page."""
    tiny.make("qwen3", tmp_path)
    config, params = load(tmp_path)
    rng = np.random.default_rng(2)
    turns = [rng.integers(3, 160, n).tolist() for n in (24, 61, 150)]
    turns.append(turns[1][:37])
    work = [
        Prompt(turns[i % 4] + rng.integers(3, 160, 1 + 5 * i % 23).tolist(), 12, (i, 5)) for i in range(16)
    ]
    work += [Prompt(work[i].tokens, 12, (i, 6)) for i in (1, 2)]
    sampler = Sampler(temperature=1.0, top_p=0.9, stop_token_ids=(5,), logprobs=True)
    copied: list[int] = []

    def run(chosen: list[int]) -> dict[int, tuple[list[int], list[float] | None]]:
        engine = Engine(params, config, batch_size=4, max_length=256, dtype=dtype)
        out = engine.run([work[i] for i in chosen], sampler)
        return {chosen[a.index]: (a.tokens, a.logprobs) for a in out}

    with pytest.MonkeyPatch.context() as patch:
        pack = schedule.Table._pack
        patch.setattr(
            schedule.Table,
            "_pack",
            lambda table, call: copied.extend(c[2] for c in call) or pack(table, call),
        )
        together = run(list(range(len(work))))
    segments_alone = sum(-(-len(prompt.tokens) // 16) for prompt in work)
    assert len(copied) < 0.6 * segments_alone
    for i in range(len(work)):
        assert run([i]) == {i: together[i]}
    assert run([13, 2, 8]) == {i: together[i] for i in (13, 2, 8)}


def test_cut_keeps_the_nucleus() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 300)).astype(np.float32) * 3
    got = np.asarray(cut(jnp.asarray(logits), Sampler(top_k=40, top_p=0.8)))
    for row, kept in zip(logits.astype(np.float64), np.isfinite(got), strict=True):
        best = np.argsort(-row)[:40]
        p = np.exp(row[best]) / np.exp(row[best]).sum()
        count = int(np.searchsorted(np.cumsum(p), 0.8)) + 1
        assert set(np.flatnonzero(kept)) == set(best[:count])


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 40,000 draws over 700 tokens, a third of which are cut."""
    rng = np.random.default_rng(0)
    logits = np.where(rng.random(700) < 0.33, -np.inf, rng.normal(size=700)).astype(np.float32)
    n = 40_000
    keys = rng.integers(0, 2**32, (n, 2), dtype=np.uint32)
    sampler = Sampler(temperature=1.0)
    draw = jax.jit(
        jax.vmap(lambda key, c: sample(jnp.asarray(logits)[:, None], key[None], c[None], sampler)[0])
    )
    counts = np.bincount(np.asarray(draw(jnp.asarray(keys), jnp.arange(n))), minlength=700)
    p = np.exp(logits.astype(np.float64))
    expected = n * p / p.sum()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    degrees = kept.sum() - 1
    assert abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees)


def test_a_context_shorter_than_the_settings(tmp_path: Path) -> None:
    """The model's own context ends an answer, as `length`, and nothing is computed past it."""
    import small

    import distillax

    small.chat_model("qwen3", tmp_path, max_position_embeddings=64)
    model = distillax.load(tmp_path)
    short = model.generate(["Hi"], max_new_tokens=200, max_length=2048, dtype="float32")
    same = model.generate(["Hi"], max_new_tokens=200, max_length=64, dtype="float32")
    assert short == same and len(short[0]) > 0
    with pytest.raises(UserError, match="generate takes no max_tokens; did you mean max_new_tokens?"):
        model.generate(["Hi"], max_tokens=4)
