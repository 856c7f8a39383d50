"""Cached targets: the format, its rounding, its reader, and targets that travel with their examples."""

import hashlib
import itertools
import json
import math
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillax.data.batches import make_batches
from distillax.data.chat import Example
from distillax.data.shards import ShardStore, sha256_file
from distillax.data.targets import (
    CODE_BITS,
    DRAWN,
    SPREAD,
    VERSION,
    WEIGHT_BITS,
    Encoded,
    Layout,
    TargetStore,
    _sampled_weights,
    example_id,
    round_log_ratios,
    round_weights,
)
from distillax.errors import UserError
from distillax.teachers import cache_folder
from distillax.teachers.draws import Shares, sample, share
from distillax.teachers.forward import pack, uniforms

RNG = np.random.default_rng(0)

# ------------------------------------------------------------------ the bits


def even(ids: np.ndarray, codes: np.ndarray, numbers: np.ndarray) -> Encoded:
    """An example with as many ids at each position."""
    return Encoded(np.full(len(ids), ids.shape[1]), ids.ravel(), codes.ravel(), numbers)


def noise(layout: Layout, n: int, rng: np.random.Generator = RNG, most: int | None = None) -> Encoded:
    """Random ids: k at each position, or from 1 to `most`; a fourth of the sampled ones are kept."""
    counts = np.full(n, layout.k) if most is None else rng.integers(1, most + 1, n)
    ids = np.concatenate([np.sort(rng.integers(0, layout.vocab_size, count)) for count in counts])
    codes = rng.integers(0, 2 ** (WEIGHT_BITS if layout.format == "sampled" else CODE_BITS), len(ids))
    if layout.format == "sampled":
        codes = np.where(rng.random(len(ids)) < 1 / 4, codes, DRAWN)
    if layout.format == "topk":
        return Encoded(counts, ids, codes, rng.normal(size=(n, 3)).astype(np.float16))
    numbers = rng.normal(size=(n, 1)) * 20, rng.exponential(size=(n, 2)) * rng.choice([0, 1, 9], (n, 2))
    steps = np.array([16, 256, 1024])
    return Encoded(counts, ids, codes, np.rint(np.concatenate(numbers, 1) * steps) / steps)


def any_example(data, format):
    """A layout, a number of positions, a generator, and what to encode of so many."""
    vocab_size, n = data.draw(st.integers(1, 300_000)), data.draw(st.integers(1, 9))
    layout = Layout(format, min(data.draw(st.integers(1, 70)), vocab_size), vocab_size)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    return layout, n, rng, noise(layout, n, rng, layout.slots if format == "sampled" else None)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), format=st.sampled_from(["sampled", "topk"]))
def test_what_is_encoded_is_decoded(data, format):
    layout, n, _, example = any_example(data, format)
    for found, wanted in zip(layout.decode(layout.encode(example), n), example, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_data_that_are_not_of_the_example_are_damage():
    """Every cut and every other number of positions: never ids of one position under another."""
    for layout, most in ((Layout("sampled", 3, 900), 6), (Layout("topk", 4, 900), None)):
        for n in (1, 5):
            data = layout.encode(noise(layout, n, np.random.default_rng(n), most))
            cases = [(data[:end], n) for end in range(len(data))]
            cases += [(data + b"x", n), (b"\xff" * 4 + data[4:], n), (data, n + 1), (data, n - 1 or 3)]
            for wrong, positions in cases:
                with pytest.raises(ValueError):
                    layout.decode(wrong, positions)


def test_the_bits_of_one_example_by_hand():
    """V = 600, so ids are in three groups, of 256, 256 and 88. Of two positions, ids 2 and 300, then 5: two
    are in the first group, one in the second (10, 01). The first and the last are kept, at 5 and 200 / 255.

    Exponential Golomb coded, parameter first: the two codes (3: 13 and 208), log-sum-exp (3: in steps of 1/16
    16 and 12, or 16 and -4 from it, or 32 and 7: 40 and 15), NLL (0: 3 and 1), entropy (1: 5 and 3). Rice
    coded, in the first group 2 and 256 + 5, steps of 2 and 259, with seven low bits; in the second 44."""
    example = Encoded(
        np.array([2, 1]),
        np.array([2, 300, 5]),
        np.array([5, DRAWN, 200]),
        np.array([[1.0, 2 / 256, 3 / 1024], [0.75, 0, 1 / 1024]]),
    )
    encoded = Layout("sampled", 2, 600).encode(example)
    assert encoded[:4] == bytes.fromhex("03000000")
    codes, lse = "0011" + "1" + "00001" + "101" + "1010000", "0011" + "001" + "1" + "01000" + "111"
    nll, entropy = "0000" + "01" + "1" + "1", "0001" + "01" + "1" + "01" + "1"
    ids = "1001" + "1" + "001" + "1" + "0000010" + "0000011" + "00101100"
    bits = "101" + codes + lse + nll + entropy + ids
    assert bits_of(encoded[4:]) == bits + "0" * (-len(bits) % 8)
    likeliest = Layout("topk", 2, 8).encode(even(np.array([[2, 7]]), np.array([[1, 127]]), np.zeros((1, 3))))
    assert likeliest[:10] == bytes.fromhex("02000000" + 6 * "00")
    assert bits_of(likeliest[10:]) == "0000001" + "1111111" + "01" + "001" + "01" + "000"


def bits_of(data: bytes) -> str:
    return "".join(f"{byte:08b}" for byte in data)


def by_the_book(layout: Layout, data: bytes, n: int) -> tuple[list[list[int]], list[int], list[list[float]]]:
    """Ids of each position, codes of all, numbers of each position: bit by bit as docs/cached.md has it."""
    sampled, V, m = layout.format == "sampled", layout.vocab_size, int.from_bytes(data[:4], "little")
    text = iter(bits_of(data[4 if sampled else 4 + 6 * n :]))

    def number(width: int) -> int:
        return int("".join(itertools.islice(text, width)) or "0", 2)

    def unary() -> int:
        return len(list(itertools.takewhile("0".__eq__, text)))

    def listed(count: int) -> list[int]:
        low = number(4)
        more = [unary() for _ in range(count)]
        return [number(low + extra) + (1 << (low + extra)) - (1 << low) for extra in more]

    if sampled:
        kept = [number(1) for _ in range(m)]
        weights = iter(listed(sum(kept)))
        codes = [next(weights) if one else DRAWN for one in kept]
        turns, nll, entropy = (listed(n) for _ in range(3))
        steps = [-(turn + 1) // 2 if turn % 2 else turn // 2 for turn in turns]
        lse = itertools.accumulate(steps)
        numbers = [[a / 16, b / 256, c / 1024] for a, b, c in zip(lse, nll, entropy, strict=True)]
    else:
        codes = [number(7) for _ in range(m)]
        numbers = [list(struct.unpack("<3e", data[at : at + 6])) for at in range(4, 4 + 6 * n, 6)]
    edges = [0, *(size for size in (256 << i for i in range(24)) if size < V), V]
    each = [number(m.bit_length()) for _ in edges[2:]]
    each.append(m - sum(each))
    high = [unary() for _ in range(m)]
    ids: list[list[int]] = [[] for _ in range(n)]
    for (first, end), count in zip(itertools.pairwise(edges), each, strict=True):
        size, place = end - first, 0
        for _ in range(count):
            low = (31 * n * size // (64 * count)).bit_length()
            place += (high.pop(0) << low) + number(low)
            ids[place // size].append(first + place % size)
    assert not high and set(text) <= {"0"}
    return [sorted(some) for some in ids], codes, numbers


@settings(max_examples=60, deadline=None)
@given(data=st.data(), format=st.sampled_from(["sampled", "topk"]))
def test_a_look_up_is_what_the_format_says(data, format):
    """Against a reader that knows nothing but docs/cached.md, and Python's numbers."""
    layout, n, rng, encoded = any_example(data, format)
    encoded.numbers[:, 2] *= 1 if format == "sampled" else -np.sign(encoded.numbers[:, 2])  # log of the tail
    mask = np.zeros(n + data.draw(st.integers(1, 5)), bool)
    mask[1 + rng.permutation(len(mask) - 1)[:n]] = True
    one = Example(rng.integers(0, layout.vocab_size, len(mask)).astype(np.int32), mask)
    bits = layout.encode(encoded)
    found = in_memory(layout, [one], [bits]).lookup(one)
    rows, codes, numbers = by_the_book(layout, bits, n)
    assert not any(values[~mask[1:]].any() for values in found.values())
    found = {name: values[mask[1:]] for name, values in found.items()}
    np.testing.assert_array_equal(found["teacher_nll"], np.array(numbers, np.float32)[:, 1])
    if format == "sampled":
        np.testing.assert_array_equal(found["teacher_entropy"], np.array(numbers, np.float32)[:, 2])
    for i, ids in enumerate(rows):
        own, codes = codes[: len(ids)], codes[len(ids) :]
        drawn, kept = own.count(DRAWN), sum(code for code in own if code != DRAWN)
        if format == "topk":
            ratio = [math.exp(-20 * (code / 127) ** 2) for code in own]
            ratio = [r if j == 0 or ids[j] != ids[j - 1] else 0 for j, r in enumerate(ratio)]
            weights = [r / sum(ratio) * -math.expm1(numbers[i][2]) for r in ratio]
        elif drawn:
            weights = [(1 - kept / 255) / drawn if code == DRAWN else code / 255 for code in own]
        else:
            weights = [code / max(kept, 1) for code in own]
        spare = layout.slots - len(ids)
        assert found["target_ids"][i].tolist() == ids + ids[:1] * spare
        np.testing.assert_allclose(found["target_weights"][i], weights + [0] * spare, rtol=2e-5, atol=1e-7)


def in_memory(layout: Layout, examples: list[Example], encoded: list[bytes]) -> TargetStore:
    keys = pa.array([example_id(one) for one in examples], pa.binary(16))
    table = pa.table({"id": keys, "data": pa.array(encoded, pa.large_binary())})
    names = {"format": layout.format, "k": layout.k, "vocab_size": layout.vocab_size}
    return TargetStore(Path("c"), {**names, "max_target_length": 2048}, table, None)


def common_first(vocab_size: int, number: int) -> np.ndarray:
    """Ids as tokenizers give them: id v about as often as 1 / (v + 150)."""
    return (150 * ((vocab_size + 150) / 150) ** RNG.random(number) - 150).astype(np.int64)


@pytest.mark.parametrize(
    ("format", "k", "vocab_size", "most"),
    [("sampled", 19, 49_152, 38), ("sampled", 19, 151_936, 40), ("topk", 64, 151_936, 170)],
)
def test_bytes_a_position_with_all_that_parquet_adds(format, k, vocab_size, most, tmp_path):
    """Answers of 10 to 200 tokens; of sampled ids a fourth kept; ids of the likeliest all alike, which is the
    longest they can be."""
    layout = Layout(format, k, vocab_size)
    lengths = RNG.integers(10, 200, 300)
    encoded = {}
    for n in lengths:
        found = noise(layout, n)
        if format == "sampled":
            ids = np.sort(common_first(vocab_size, n * k).reshape(n, k), 1).ravel()
            halved = 255 >> RNG.integers(1, 8, n * k)
            numbers = np.stack([RNG.normal(18, 3, n), RNG.exponential(1, n), RNG.exponential(1.3, n)], 1)
            found = Encoded(found.counts, ids, np.where(found.codes == DRAWN, DRAWN, halved), numbers)
        encoded[RNG.bytes(16).hex()] = layout.encode(found)
    write(tmp_path, layout, encoded, int(sum(lengths)))
    size = (tmp_path / "targets.parquet").stat().st_size
    assert size / sum(lengths) <= most
    store = TargetStore.open(tmp_path)
    assert len(store) == 300


def write(folder: Path, layout: Layout, encoded: dict[str, bytes], positions: int, **changes) -> None:
    """A cache as `distillax capture` writes it."""
    kept = {
        **{"version": VERSION, "format": layout.format, "k": layout.k, "vocab_size": layout.vocab_size},
        **{"temperature": 1.0, "seed": 0, "max_target_length": 2048, "tokenizer": "t", "teacher": "big"},
        **{"teacher_identity": [["w", 1, 2]], "data": {"path": "answers.parquet", "rows": 1}},
        **changes,
    }
    keys = [(key, 0) for key in encoded]
    with ShardStore(
        folder / "targets.parquet.shards", keys=keys, schema=cache_folder.SHARD, config=kept
    ) as store:
        for key, data in encoded.items():
            store.add({"prompt_id": key, "generation": 0, "data": data, "error": None})
        counts = cache_folder.Summary(len(keys), len(keys), positions, 0, kept.get("longest", 200), 0)
        cache_folder.publish(store, folder, kept, counts)


# ------------------------------------------------------------------ rounding


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 70), scale=st.floats(0, 20))
def test_rounded_weights_keep_their_sum(seed, k, scale):
    rng = np.random.default_rng(seed)
    weights = np.exp(scale * rng.normal(size=(50, k)))
    weights /= weights.sum(1, keepdims=True) * rng.choice([1, 2], (50, 1))  # half of it, or all, is kept
    codes = round_weights(weights, np.r_[0, 1 - 2**-24, rng.random(48)].astype(np.float32))
    assert codes.min() >= 0 and (np.abs(codes.sum(1) - 255 * weights.sum(1)) < 1 + 1e-9).all()
    assert np.abs(codes / 255 - weights).max() < 1 / 255 + 1e-9


def test_rounded_weights_are_unbiased():
    weights = np.array([0.5, 1e-4, 0.25, 0.0, 0.13])
    u = (np.arange(2**16) + 0.5).astype(np.float32) / 2**16
    codes = round_weights(np.tile(weights, (len(u), 1)), u)
    np.testing.assert_allclose(codes.mean(0) / 255, weights, atol=2 / 2**16 / 255 * 4)


def stored_head(log_p: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k likeliest ids of each row, and their probabilities as a cache gives them back."""
    from distillax.data.targets import _head_probabilities

    ids = np.argsort(-log_p, 1, kind="stable")[:, :k]
    top = np.take_along_axis(log_p, ids, 1)
    p = np.exp(log_p)
    np.put_along_axis(p, ids, 0, 1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(p.sum(1)).astype(np.float16).astype(np.float32)
    return ids, _head_probabilities(ids, round_log_ratios(top - top[:, :1]), log_tail)


def kl_with_tail(log_p: np.ndarray, ids: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats, all ids beyond the stored ones being one."""
    top = np.take_along_axis(log_p, ids, 1)
    tail = 1 - np.exp(top).sum(1)
    q_tail = 1 - q.astype(np.float64).sum(1)
    rest = np.where(tail > 1e-9, tail * np.log(np.maximum(tail, 1e-12) / np.maximum(q_tail, 1e-12)), 0)
    return (np.exp(top) * (top - np.log(q.astype(np.float64)))).sum(1) + rest


@pytest.mark.parametrize("scale", [0.1, 1, 2, 4, 8, 16])
def test_top_k_rounding_costs_less_than_half_a_millinat(scale):
    """The figure of docs/cached.md, for logits that are normal with this deviation."""
    z = RNG.normal(size=(200, 5000)) * scale
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    kl = kl_with_tail(log_p, *stored_head(log_p, 64))
    assert kl.min() > -1e-6 and kl.max() < 1e-3 and kl.mean() < 5e-4


def test_top_k_rounding_at_its_worst():
    """One id and 63 equal ones below it, by as much as the codes are coarse: all are off the same way."""
    below = np.linspace(0, 19, 2000)[:, None]
    z = np.concatenate([np.zeros_like(below), np.repeat(-below, 63, 1)], 1)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    assert kl_with_tail(log_p, *stored_head(log_p, 64)).max() < 1e-3


def test_a_server_does_not_say_whose_weights_it_has(tmp_path):
    for engine, name in (("server", "big"), ("server", None), ("embedded", [["w", 1, 2]])):
        cache(tmp_path / "c", [example(0)], engine=engine, teacher_identity=name)
        store, how = TargetStore.open(tmp_path / "c"), {"tokenizer_fingerprint": "t", "temperature": 1.0}
        store.check(**how, teacher_identity=[["w", 1, 2]])
        if engine == "embedded":
            with pytest.raises(UserError, match="captured from other weights"):
                store.check(**how, teacher_identity=[["w", 1, 3]])
        shutil.rmtree(tmp_path / "c")


def test_a_repeated_id_is_a_spare_slot():
    """What a server says of ids that are none leaves slots free: their code cannot say zero."""
    from distillax.data.targets import _head_probabilities

    ids, codes = np.asarray([[3, 7, 7, 7]]), np.asarray([[40, 0, 127, 127]])
    weights = _head_probabilities(ids, codes, np.log(np.asarray([0.25])))
    assert weights[0, 2:].tolist() == [0, 0] and weights.sum() == pytest.approx(0.75, abs=1e-6)


def test_head_and_tail_sum_to_one():
    z = RNG.normal(size=(50, 1000)) * 2
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    ids, q = stored_head(log_p, 16)
    np.testing.assert_allclose(q.sum(1), np.exp(np.take_along_axis(log_p, ids, 1)).sum(1), atol=2e-3)
    whole = stored_head(log_p[:, :16] - np.log(np.exp(log_p[:, :16]).sum(1, keepdims=True)), 16)[1]
    np.testing.assert_allclose(whole.sum(1), 1, atol=1e-6)


# ------------------------------------------------------------------ draws


def fearnhead_clifford(p: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """(which ids are kept, c), in float64, by bisection of sum(min(p / c, 1)) = k."""
    low, high = 0.0, 1.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(p / c, 1).sum() > k else (low, c)
    return p >= c, c


def distributions(vocab_size: int = 700) -> list[np.ndarray]:
    logits = [RNG.normal(size=vocab_size) * scale for scale in (0.0, 0.5, 2, 6)]
    logits.append(-1.1 * np.log(np.arange(1, vocab_size + 1)))
    return [np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in logits]


def variance(p: np.ndarray, k: int) -> float:
    kept, c = fearnhead_clifford(p, k)
    return float((p * (c - p))[~kept].sum())


def draw(p: np.ndarray, k: int, u: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids, weights, how many are kept for sure) of one distribution with k ids, once for each u."""
    p_CV = jnp.broadcast_to(jnp.asarray(p, jnp.float32)[None], (len(u), len(p)))
    kept = int(fearnhead_clifford(p, k)[0].sum())
    top = jax.lax.top_k(p_CV, slots)[1]
    counts, sure = (jnp.full(len(u), x) for x in (k, kept))
    ids, weights = map(np.asarray, jax.jit(sample)(p_CV, top, counts, sure, jnp.asarray(u)))
    return ids, weights, kept


@pytest.mark.parametrize("k", [1, 4, 10])
def test_draws_are_those_of_fearnhead_and_clifford(k):
    """Over a grid of the uniform number, an id is drawn p / c of the time, up to one point of the grid."""
    points = 4096
    u = (np.arange(points, dtype=np.float32) + np.float32(0.5)) / np.float32(points)
    for p in distributions():
        ids, weights, _ = draw(p, k, u, slots=12)
        assert (weights[:, k:] == 0).all()
        ids, weights = ids[:, :k], weights[:, :k]
        kept, c = fearnhead_clifford(p, k)
        np.testing.assert_allclose(weights.sum(1), 1, atol=2e-6)
        mean = np.zeros_like(p)
        np.add.at(mean, ids.ravel(), weights.ravel() / points)
        np.testing.assert_allclose(mean, p, atol=2 * c / points + 1e-6)
        for v in np.flatnonzero(kept):
            assert (ids == v).any(1).all()
            np.testing.assert_allclose(weights[ids == v], p[v], rtol=1e-5)
        drawn = ~np.isin(ids, np.flatnonzero(kept))
        np.testing.assert_allclose(weights[drawn], c, rtol=2e-5)
        assert all(len(set(row)) == k for row in ids)


def test_the_mean_of_many_stored_draws_is_the_distribution():
    """Draws and rounding together, with the numbers that a capture takes: within 4 sigma."""
    draws, k = 20_000, 10
    for i, p in enumerate(distributions()):
        u = uniforms(i + 1, "00", draws)
        ids, weights, kept = draw(p, k, u[:, 0], slots=k)
        codes = np.full((draws, k), DRAWN)
        codes[:, :kept] = round_weights(weights[:, :kept], u[:, 1])
        stored = _sampled_weights(np.full(draws, k), codes.ravel()).reshape(draws, k)
        mean = np.zeros_like(p)
        np.add.at(mean, ids.ravel(), stored.astype(np.float64).ravel() / draws)
        _, c = fearnhead_clifford(p, k)
        rounding = np.minimum(p, 0.25 / 255) / 255
        variance = np.maximum(p * c - p * p, 0) + rounding
        rare = draws * p / c * min(1, 255 * c) < 30  # too few to be normal: taken together
        mean, p, variance = (np.append(x[~rare], x[rare].sum()) for x in (mean, p, variance))
        assert (np.abs(mean - p) < 4 * np.sqrt(variance / draws + 1e-14)).all()


def shares_of(ps: list[np.ndarray], slots: int, mean: int) -> Shares:
    ordered = -np.sort(-np.stack(ps), 1)
    top, rest = ordered[:, :slots], ordered[:, slots:]
    return share(top.astype(np.float32), rest.sum(1), (rest**2).sum(1), mean)


@pytest.mark.parametrize("mean", [1, 4, 10])
def test_ids_are_shared_out_where_they_help_most(mean):
    """By hand: one after the other to the position whose variance falls most, in float64."""
    ps, slots = [p for p in distributions() for _ in range(3)], SPREAD * mean
    found = shares_of(ps, slots, mean)
    greedy = np.ones(len(ps), int)
    while greedy.sum() < mean * len(ps):
        gains = [
            variance(p, k) - variance(p, k + 1) if k < slots else -1.0
            for p, k in zip(ps, greedy, strict=True)
        ]
        greedy[int(np.argmax(gains))] += 1
    assert found.counts.sum() == mean * len(ps)
    assert np.abs(found.counts - greedy).max() <= 1
    assert sum(map(variance, ps, found.counts)) == pytest.approx(sum(map(variance, ps, greedy)), rel=1e-5)
    for p, k, kept in zip(ps, *found, strict=True):
        assert kept == fearnhead_clifford(p, k)[0].sum()


def test_a_sure_position_leaves_its_ids_to_others():
    sure, flat = np.zeros(100), np.full(100, 0.01)
    sure[3] = 1
    assert shares_of([sure, flat], 8, 4).counts.tolist() == [1, 7]
    assert shares_of([sure, flat], 5, 4).counts.tolist() == [1, 5]
    assert shares_of([sure] * 3, 8, 4).counts.tolist() == [1, 1, 1]
    assert shares_of([flat], 8, 4).counts.tolist() == [4]
    assert sorted(shares_of([flat, flat, flat, sure], 8, 4).counts.tolist()) == [1, 5, 5, 5]
    assert sorted(shares_of([flat, flat, flat], 8, 1).counts.tolist()) == [1, 1, 1]


@pytest.mark.parametrize("positive", [0, 1, 3, 9, 10, 11])
def test_fewer_ids_than_slots(positive):
    """Slots that are left over weigh nothing, and ids are valid ones."""
    p = np.zeros(50)
    p[5 : 5 + positive] = 1 / max(positive, 1)
    if not positive:
        p[49] = 1
    (k,), _ = shares_of([p], 20, 10)
    assert k <= max(positive, 1)
    u = np.array([0.99], np.float32)
    ids, weights, _ = draw(p, int(k), u, slots=20)
    assert ids.min() >= 0 and ids.max() < 50
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    assert (p[ids[0]] > 0)[weights[0] > 0].all()


def test_a_draw_depends_on_seed_and_example_alone():
    assert uniforms(0, "aa", 9)[:5].tolist() == uniforms(0, "aa", 5).tolist()
    assert uniforms(0, "aa", 5).tolist() != uniforms(1, "aa", 5).tolist()
    assert uniforms(0, "aa", 5).tolist() != uniforms(0, "ab", 5).tolist()


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_packing_loses_nothing(lengths):
    rows = pack(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 50


# ------------------------------------------------------------------ the reader


def example(seed: int, n: int = 12) -> Example:
    rng = np.random.default_rng(seed)
    mask = rng.random(n) < 0.6
    mask[0], mask[-1] = False, True
    return Example(rng.integers(0, 900, n).astype(np.int32), mask)


def targets_of(layout: Layout, one: Example, limit: int = 2048) -> Encoded:
    """Targets that tell where they belong: the ids of a position start at its target token. There are three
    of the likeliest; of sampled ones one, two or three, in turn, and the last is drawn."""
    at = np.flatnonzero(one.loss_mask[1 : limit + 1])
    counts = np.arange(len(at)) % 3 + 1 if layout.format == "sampled" else np.full(len(at), 3)
    ids = np.concatenate([one.tokens[1:][t] + np.arange(count) for t, count in zip(at, counts, strict=True)])
    last = np.cumsum(counts) - 1
    codes = np.full(len(ids), 64 if layout.format == "sampled" else 0)
    codes[last] = DRAWN if layout.format == "sampled" else 0
    last = 1.0 if layout.format == "sampled" else -1.0  # entropy, or log of the tail
    return Encoded(counts, ids, codes, np.stack([at, one.tokens[1:][at] / 8, np.full(len(at), last)], 1))


def cache(folder: Path, examples: list[Example], format="sampled", **changes) -> TargetStore:
    layout = Layout(format, 2 if format == "sampled" else 3, 1000)
    limit = changes.get("max_target_length", 2048)
    encoded = {example_id(one).hex(): layout.encode(targets_of(layout, one, limit)) for one in examples}
    positions = sum(int(one.loss_mask[1 : limit + 1].sum()) for one in examples)
    write(folder, layout, encoded, positions, **changes)
    return TargetStore.open(folder)


def test_an_id_is_that_of_the_content():
    tokens, mask = np.array([1, 2, 3]), np.array([False, False, True])
    one = example_id(Example(tokens.astype(np.int32), mask))
    assert one == hashlib.sha256(bytes.fromhex("010000000200000003000000" + "000001")).digest()[:16]
    assert one == example_id(Example(tokens.astype(np.int64), mask.copy()))
    assert one != example_id(Example(tokens.astype(np.int32), ~mask))
    assert one != example_id(Example(tokens[::-1].astype(np.int32), mask))


@pytest.mark.parametrize("format", ["sampled", "topk"])
def test_a_look_up_is_aligned_with_the_shifted_targets(format, tmp_path):
    examples = [example(i, n) for i, n in enumerate((2, 12, 40))]
    store = cache(tmp_path, examples, format)
    assert (len(store), store.slots, store.format) == (3, 4 if format == "sampled" else 3, format)
    for one in examples:
        found = store.lookup(one)
        n, mask = len(one.tokens), one.loss_mask[1:]
        names = {"target_ids", "target_weights", "teacher_nll"}
        assert found.keys() == names | ({"teacher_entropy"} if format == "sampled" else set())
        assert (found["target_ids"].shape, found["target_ids"].dtype) == ((n - 1, store.slots), np.int32)
        assert (
            found["target_weights"].shape == (n - 1, store.slots)
            and found["target_weights"].dtype == np.float32
        )
        assert (found["teacher_nll"].shape, found["teacher_nll"].dtype) == ((n - 1,), np.float32)
        assert (found["target_ids"][mask, 0] == one.tokens[1:][mask]).all()
        np.testing.assert_allclose(found["teacher_nll"], one.tokens[1:] / 8 * mask, rtol=1e-3)
        wanted = 1.0 if format == "sampled" else 1 - np.exp(-1)
        np.testing.assert_allclose(found["target_weights"].sum(1), wanted * mask, atol=1e-6)
        assert not found["target_ids"][~mask].any()
        if format == "sampled":  # one id, two, and three; what the first ones leave is the last one's
            stored = np.array([[255, 0, 0, 0], [64, 191, 0, 0], [64, 64, 127, 0]]) / 255
            wanted = stored[np.arange(mask.sum()) % 3]
            np.testing.assert_allclose(found["target_weights"][mask], wanted, atol=1e-6)


def test_an_example_that_is_not_there(tmp_path):
    store = cache(tmp_path, [example(0)])
    other = Example(example(0).tokens, np.ones(12, bool))
    assert example(0) in store and other not in store and store.row(example(0)) == 0
    with pytest.raises(UserError, match="no targets for this example"):
        store.row(other)
    with pytest.raises(UserError, match="no targets for this example.*answers.parquet.*train_on.*capture"):
        store.lookup(other)


def test_a_longer_example_has_the_targets_that_were_captured(tmp_path):
    one = example(5, 40)
    found = cache(tmp_path, [one], max_target_length=16).lookup(one)
    assert len(found["target_ids"]) == 16
    mask = one.loss_mask[1:17]
    assert (found["target_ids"][mask, 0] == one.tokens[1:17][mask]).all()


def test_ids_that_the_student_lacks(tmp_path):
    """Pitfall 11: what the student cannot say has no weight, and the rest is what is left, given that."""
    one = Example(np.array([1, 5, 899, 898], np.int32), np.array([False, True, True, True]))
    cache(tmp_path, [one])
    found = TargetStore.open(tmp_path, vocab_size=900).lookup(one)
    assert found["target_ids"].tolist() == [[5, 5, 5, 5], [899, 0, 899, 899], [898, 899, 0, 898]]
    np.testing.assert_allclose(
        found["target_weights"], [[1, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0]], atol=1e-6
    )
    same = TargetStore.open(tmp_path, vocab_size=5000).lookup(one)
    assert same["target_ids"].tolist() == [[5, 5, 5, 5], [899, 900, 899, 899], [898, 899, 900, 898]]


def test_caches_that_are_missing_unfinished_damaged_or_of_another_version(tmp_path):
    with pytest.raises(UserError, match="no captured targets: run `distillax capture"):
        TargetStore.open(tmp_path / "nowhere")
    (tmp_path / "half" / "targets.parquet.shards").mkdir(parents=True)
    with pytest.raises(UserError, match="unfinished capture: run the same"):
        TargetStore.open(tmp_path / "half")
    cache(tmp_path / "c", [example(0)])
    manifest, file = tmp_path / "c" / "manifest.json", tmp_path / "c" / "targets.parquet"
    good, data = manifest.read_text(), file.read_bytes()
    for bad, words in (
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps(json.loads(good) | {"version": 1}), "is of version 1, and .* reads version 3; capture"),
        (json.dumps({k: v for k, v in json.loads(good).items() if k != "k"}), "damaged"),
    ):
        manifest.write_text(bad)
        with pytest.raises(UserError, match=words):
            TargetStore.open(tmp_path / "c")
    manifest.write_text(good)
    for change in (data[:-1] + b"x", data[: len(data) // 2]):
        file.write_bytes(change)
        with pytest.raises(UserError, match="has changed since it was captured"):
            TargetStore.open(tmp_path / "c")
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        TargetStore.open(tmp_path / "c")


def test_a_row_of_the_wrong_length_is_damage(tmp_path):
    one = example(0)
    cache(tmp_path, [one])
    path = tmp_path / "targets.parquet"
    table = pq.read_table(path)
    short = pa.array([table["data"][0].as_py()[:-1]], pa.large_binary())
    pq.write_table(table.set_column(1, "data", short), path)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | {"sha256": sha256_file(path)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="row 0 is damaged"):
        TargetStore.open(tmp_path).lookup(one)


def test_a_cache_that_does_not_fit_the_training(tmp_path):
    store = cache(tmp_path, [example(0, 40)], max_target_length=16)
    good = {"tokenizer_fingerprint": "t", "temperature": 1.0}
    store.check(**good, teacher_identity=[("w", 1, 2)], max_target_length=16)
    for change, words in (
        ({"tokenizer_fingerprint": "x"}, "tokenizer of big, which is not the student's"),
        ({"temperature": 2.0}, "at temperature 1, not 2; set distill_temperature=1, or"),
        ({"teacher_identity": [("w", 1, 3)]}, "other weights than those of the teacher"),
        ({"max_target_length": 32}, "first 16 targets.*set max_target_length=16"),
    ):
        with pytest.raises(UserError, match=words):
            store.check(**good | change)


# ------------------------------------------------------------------ targets in batches


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("limit", [16, 64])
def test_targets_travel_with_their_examples(packing, limit, tmp_path):
    """Pitfall 6: shuffled, packed, cut, over two epochs, each position has the targets made for it."""
    examples = [example(i, 3 + i % 37) for i in range(120)]
    store = cache(tmp_path, examples)
    batches = make_batches(
        range(120),
        lambda i: examples[i],
        batch_size=4,
        max_target_length=limit,
        packing=packing,
        shuffle_seed=3,
        overlong="truncate",
        num_epochs=2,
        targets=store.lookup,
    )
    seen = 0
    for batch in batches:
        assert batch["target_ids"].shape == batch["target_weights"].shape == (4, limit, 4)
        assert batch["teacher_nll"].shape == batch["teacher_entropy"].shape == (4, limit)
        bears = batch["weights"] > 0
        seen += int(bears.sum())
        wanted = batch["targets"][bears][:, None] + np.arange(4)[None]
        there = batch["target_weights"][bears] > 0
        np.testing.assert_array_equal(batch["target_ids"][bears][there], wanted[there])
        assert there[:, 0].all() and 0.2 < there[:, 2].mean() < 0.4
        np.testing.assert_allclose(batch["teacher_nll"][bears], batch["targets"][bears] / 8, rtol=1e-3)
        np.testing.assert_allclose(batch["target_weights"].sum(-1), bears, atol=1e-6)
        assert not batch["target_ids"][~bears].any()
    batches.close()
    assert seen == 2 * sum(int(one.loss_mask[1 : limit + 1].sum()) for one in examples)


def test_batches_are_the_same_with_and_without_targets(tmp_path):
    examples = [example(i, 3 + i % 20) for i in range(50)]
    store = cache(tmp_path, examples)

    def first(targets):
        options = {"batch_size": 2, "max_target_length": 32, "packing": True, "shuffle_seed": 0}
        batches = make_batches(range(50), lambda i: examples[i], overlong="drop", targets=targets, **options)
        found = [next(batches) for _ in range(4)]
        batches.close()
        return found

    for plain, more in zip(first(None), first(store.lookup), strict=True):
        for name, values in plain.items():
            np.testing.assert_array_equal(values, more[name])


def test_rows_without_targets_stop_the_run_with_their_number(tmp_path):
    """Pitfall 22."""
    store = cache(tmp_path, [example(i) for i in range(9)])
    options = {"batch_size": 2, "max_target_length": 32, "packing": True, "shuffle_seed": None}
    options |= {"overlong": "truncate", "num_epochs": 1, "targets": store.lookup}
    batches = make_batches(range(10), example, **options)
    with pytest.raises(UserError, match="row 9 .*no targets for this example"):
        list(batches)
    batches.close()
    short = cache(tmp_path / "short", [example(0, 40)], max_target_length=16)
    with pytest.raises(UserError, match="row 0 .*has 32 targets, but only 16 were captured; set max_target"):
        make_batches([0], lambda _: example(0, 40), **options | {"targets": short.lookup})
