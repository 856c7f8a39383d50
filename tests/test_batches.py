"""The input pipeline: shifting, packing, coverage, order, state, and errors that stop the run."""

import json
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillax.data import batches
from distillax.data.batches import Counts, Share, count_rows, make_batches, row_sizes
from distillax.data.chat import Example
from distillax.errors import UserError

KEYS = {"inputs", "targets", "segment_ids", "positions", "weights"}
T = 16

# A row: the loss mask of its tokens. Its tokens are row * 1000 + 1, + 2, ...: each occurs once.
rows_strategy = st.lists(st.lists(st.booleans(), min_size=0, max_size=T + 4), min_size=1, max_size=40)


def with_ids(masks):
    return list(enumerate(masks))


def encode(row):
    index, mask = row
    return Example(np.arange(1, len(mask) + 1, dtype=np.int32) + 1000 * index, np.array(mask, bool))


def expected_targets(rows, overlong):
    """The loss-bearing (input, target) pairs of one epoch."""
    pairs = Counter()
    for row in rows:
        example = encode(row)
        if overlong == "drop" and len(example.tokens) > T + 1:
            continue
        for i in range(1, min(len(example.tokens), T + 1)):
            if example.loss_mask[i]:
                pairs[int(example.tokens[i - 1]), int(example.tokens[i])] += 1
    return pairs


def bearing(batches):
    pairs = Counter()
    for batch in batches:
        at = batch["weights"] > 0
        pairs.update(zip(batch["inputs"][at].tolist(), batch["targets"][at].tolist(), strict=True))
    return pairs


def batches_of(rows, n=None, state=None, **options):
    settings_ = {
        "batch_size": 3,
        "max_target_length": T,
        "packing": True,
        "shuffle_seed": 0,
        "overlong": "truncate",
        "num_threads": 0,
    }
    iterator = make_batches(rows, encode, **{**settings_, **options})
    if state is not None:
        iterator.set_state(state)
    try:
        return list(iterator) if n is None else [next(iterator) for _ in range(n)]
    finally:
        iterator.close()


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("packing", [False, True])
def test_three_tokens_by_hand(packing):
    """Pitfall 5: tokens 7 8 9, loss on 9 alone: one weight, where 8 goes in and 9 is the target."""
    example = Example(np.array([7, 8, 9], np.int32), np.array([False, False, True]))
    iterator = make_batches(
        [0],
        lambda _: example,
        batch_size=2,
        max_target_length=4,
        packing=packing,
        shuffle_seed=None,
        overlong="drop",
        num_epochs=1,
    )
    (batch,) = list(iterator)
    iterator.close()
    assert batch["inputs"].tolist() == [[7, 8, 0, 0], [0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[8, 9, 0, 0], [0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["weights"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert {k: v.dtype.name for k, v in batch.items()} == {
        "inputs": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "weights": "float32",
    }


def test_two_documents_share_a_row():
    rows = with_ids([[False, True, True], [False, False, True]])
    (batch,) = batches_of(rows, batch_size=1, max_target_length=5, shuffle_seed=None, num_epochs=1)
    assert batch["inputs"].tolist() == [[1, 2, 1001, 1002, 0]]
    assert batch["targets"].tolist() == [[2, 3, 1002, 1003, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 2, 0]]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 0]]
    assert batch["weights"].tolist() == [[1, 1, 0, 1, 0]]


@settings(max_examples=60, deadline=None)
@given(
    masks=rows_strategy,
    packing=st.booleans(),
    seed=st.none() | st.integers(0, 2**32 - 1),
    overlong=st.sampled_from(["truncate", "drop"]),
    threads=st.sampled_from([0, 2]),
    epochs=st.integers(1, 2),
)
def test_every_target_once_an_epoch(masks, packing, seed, overlong, threads, epochs):
    rows = with_ids(masks)
    expected = expected_targets(rows, overlong)
    options = {"packing": packing, "shuffle_seed": seed, "overlong": overlong, "num_threads": threads}
    if not expected:
        with pytest.raises(UserError):
            batches_of(rows, num_epochs=epochs, **options)
        return
    batches = batches_of(rows, num_epochs=epochs, **options)
    assert bearing(batches) == Counter({pair: n * epochs for pair, n in expected.items()})
    for batch in batches:
        assert batch.keys() == KEYS
        assert all(v.shape == (3, T) for v in batch.values())
        for r in range(3):
            check_row({k: v[r] for k, v in batch.items()}, packing)


def check_row(row, packing):
    """Segments are whole, in order, one after the other; padding is all zeros and at the end."""
    ids = row["segment_ids"]
    used = int((ids > 0).sum())
    segments = int(ids.max())
    assert not any(row[k][used:].any() for k in KEYS)
    assert packing or segments <= 1
    lengths = [int((ids == k + 1).sum()) for k in range(segments)]
    assert min(lengths, default=1) > 0
    assert ids[:used].tolist() == np.repeat(np.arange(segments) + 1, lengths).tolist()
    for stop, length in zip(np.cumsum(lengths), lengths, strict=True):
        start = stop - length
        assert row["positions"][start:stop].tolist() == list(range(stop - start))
        assert len({v // 1000 for v in row["inputs"][start:stop]}) == 1  # one document
        assert row["inputs"][start] % 1000 == 1  # from its first token
        assert (row["targets"][start:stop] == row["inputs"][start:stop] + 1).all()


@settings(max_examples=25, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=5, max_size=T + 4), min_size=1, max_size=40),
    packing=st.booleans(),
    seed=st.none() | st.integers(0, 99),
    before=st.integers(0, 12),
    batch_size=st.integers(1, 4),
)
def test_state_gives_the_same_batches_again(masks, packing, seed, before, batch_size):
    rows = with_ids([*masks, [False] * 5 + [True] * 5])
    options = {"packing": packing, "shuffle_seed": seed, "batch_size": batch_size}
    whole = batches_of(rows, before + 6, **options)
    iterator = make_batches(rows, encode, max_target_length=T, overlong="truncate", num_threads=2, **options)
    for _ in range(before):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    assert same([next(iterator) for _ in range(6)], whole[before:])
    assert json.loads(json.dumps(iterator.get_state())) != state
    iterator.set_state(state)  # back in time
    assert same([next(iterator) for _ in range(6)], whole[before:])
    iterator.close()
    assert same(batches_of(rows, 6, state, **options), whole[before:])


def test_state_in_the_middle_of_packed_rows():
    rows = with_ids([[True] * (4 + i % 9) for i in range(300)])
    whole = batches_of(rows, num_epochs=1)
    middle = 0
    for k in range(0, len(whole), 5):
        iterator = make_batches(
            rows,
            encode,
            batch_size=3,
            max_target_length=T,
            packing=True,
            shuffle_seed=0,
            overlong="truncate",
            num_epochs=1,
        )
        for _ in range(k):
            next(iterator)
        state = iterator.get_state()
        iterator.close()
        middle += state["next_row"] > 0
        assert same(batches_of(rows, state=state, num_epochs=1), whole[k:])
    assert middle > 5


@pytest.mark.parametrize("packing", [False, True])
def test_the_number_of_threads_changes_nothing(packing):
    rows = with_ids([[True] * (3 + i * 7 % 13) for i in range(80)])
    runs = [batches_of(rows, 20, packing=packing, num_threads=n) for n in (0, 1, 8)]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_each_epoch_has_its_own_order():
    rows = with_ids([[False, True]] * 50)
    options = {"batch_size": 50, "packing": False, "max_target_length": 1}

    def orders(n, **more):
        return [batch["inputs"][:, 0].tolist() for batch in batches_of(rows, n, **{**options, **more})]

    first, second = orders(2)
    assert first != second
    assert sorted(first) == sorted(second) == [1 + 1000 * i for i in range(50)]
    assert orders(1, shuffle_seed=7)[0] != first
    assert orders(2, shuffle_seed=None) == [sorted(first)] * 2


def test_packing_is_dense():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.7, 4000), 8, 1024).astype(int)
    rows = with_ids([[True] * n for n in lengths])
    batches = batches_of(rows, 20, batch_size=8, max_target_length=1024)
    assert np.mean([batch["segment_ids"] > 0 for batch in batches]) > 0.95


@pytest.mark.timeout(20)
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("masks", "overlong", "words"),
    [
        ([[True] * 30, [True] * 40, [False] * 9], "drop", "2 are longer than max_target_length=16 and 1"),
        ([[False] * 5, [], [True]], "truncate", "none of the 3 rows has a token to learn"),
        ([[False] * 20 + [True]], "truncate", "none of the 1 rows has a token to learn"),
        ([], "truncate", "none of the 0 rows"),
    ],
)
def test_nothing_left_is_an_error_not_an_endless_loop(packing, masks, overlong, words):
    with pytest.raises(UserError, match=words):
        batches_of(with_ids(masks), 1, packing=packing, overlong=overlong)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("data.jsonl, row 13: it has no user turn."), "row 13: it has no user turn"),
        (KeyError("messages"), "row 13 .* cannot be encoded"),
        (StopIteration(), "row 13 .* cannot be encoded"),
    ],
)
def test_a_bad_row_stops_the_run_by_name(packing, threads, error, words):
    """Pitfall 22: neither swallowed nor taken for the end of the data."""

    def encode_or_fail(row):
        if row[0] == 13:
            raise error
        return encode(row)

    iterator = make_batches(
        with_ids([[False, True, True]] * 40),
        encode_or_fail,
        batch_size=2,
        max_target_length=T,
        packing=packing,
        shuffle_seed=3,
        overlong="drop",
        num_threads=threads,
    )
    with pytest.raises(UserError if isinstance(error, UserError) else RuntimeError, match=words):
        for _ in range(40):
            next(iterator)
    iterator.close()


@pytest.mark.parametrize("change", [1, -1])
def test_a_host_with_other_documents_is_told(change):
    rows = with_ids([[True] * 9, [True] * 8])
    share = Share(row_sizes(rows, encode, T) + np.array([[change, 0]]), np.ones(2, bool))
    with pytest.raises(UserError, match=r"row \d .* is not as long here .* same files"):
        batches_of(rows, 1, share=share, batch_size=2)


@settings(max_examples=25, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=5, max_size=T + 4), min_size=1, max_size=40),
    packing=st.booleans(),
    seed=st.none() | st.integers(0, 99),
    overlong=st.sampled_from(["truncate", "drop"]),
    hosts=st.integers(1, 4),
)
def test_hosts_that_share_a_batch_out_have_the_rows_of_the_whole(masks, packing, seed, overlong, hosts):
    """Each reads documents of its own rows alone, and can go on from what any other number of hosts saved."""
    rows = with_ids([*masks, [False] * 5 + [True] * 5])
    options = {"packing": packing, "shuffle_seed": seed, "overlong": overlong, "batch_size": 4}
    options["targets"] = lambda example: {"ids": np.tile(example.tokens[1:, None], 3)}
    whole = batches_of(rows, 6, **options)
    sizes = np.concatenate([row_sizes(rows, encode, T, range(h, len(rows), hosts)) for h in range(hosts)])
    sizes = sizes[np.argsort(np.concatenate([np.arange(h, len(rows), hosts) for h in range(hosts)]))]
    one = make_batches(rows, encode, max_target_length=T, **options)
    for _ in range(3):
        next(one)
    state = one.get_state()
    one.close()
    for host in range(hosts):
        mine, read = np.arange(4) % hosts == host, []

        def tell(row, read=read):
            read.append(row)
            return encode(row)

        iterator = make_batches(rows, tell, max_target_length=T, share=Share(sizes, mine), **options)
        read.clear()
        found = [next(iterator) for _ in range(6)]
        for batch, of_all in zip(found, whole, strict=True):
            assert batch.keys() == of_all.keys()
            for name, values in batch.items():
                assert values.dtype == of_all[name].dtype
                np.testing.assert_array_equal(values[mine], of_all[name][mine])
        assert len(read) == sum(int(batch["segment_ids"][mine].max(1).sum()) for batch in found)
        iterator.set_state(state)
        after = [next(iterator) for _ in range(3)]
        iterator.close()
        assert all(np.array_equal(a["inputs"], b["inputs"]) for a, b in zip(after, found[3:], strict=True))


def test_rows_are_counted():
    rows = with_ids([[False, True, True], [True] * 30, [False] * 4, [False] * 20 + [True], [True]])
    assert count_rows(row_sizes(rows, encode, T), T, "truncate") == Counts(
        rows=5, truncated=1, dropped=0, empty=3, tokens=2 + T, loss_tokens=2 + T
    )
    assert count_rows(row_sizes(rows, encode, T), T, "drop") == Counts(
        rows=5, truncated=0, dropped=2, empty=2, tokens=2, loss_tokens=2
    )
    with pytest.raises(RuntimeError, match=r"row 1 .* cannot be encoded"):
        row_sizes([(0, [True]), ()], lambda row: (row[0], encode(row))[1], T)


def test_of_bad_rows_the_first_is_told_however_the_threads_take_turns(monkeypatch):
    monkeypatch.setattr(batches, "_THREADS", 4)
    later = threading.Event()

    def encode_or_fail(row):
        if row[0] == 5:
            later.set()
        elif row[0] == 3:
            assert later.wait(20)
        if row[0] in (3, 5):
            raise UserError(f"row {row[0]}")
        return encode(row)

    rows = with_ids([[True]] * 9)
    with pytest.raises(UserError, match="row 3"):
        row_sizes(rows, encode_or_fail, T)
    rows = with_ids([[True] * (i % 7) for i in range(300)])  # more than are handed out at once
    assert row_sizes(rows, encode, T, range(1, 300, 2))[:, 0].tolist() == [
        i % 7 - 1 for i in range(1, 300, 2)
    ]


@settings(max_examples=40, deadline=None)
@given(masks=rows_strategy, overlong=st.sampled_from(["truncate", "drop"]))
def test_the_counts_agree_with_the_batches(masks, overlong):
    rows = with_ids([*masks, [False, True]])
    counts = count_rows(row_sizes(rows, encode, T), T, overlong)
    batches = batches_of(rows, num_epochs=1, overlong=overlong)
    assert counts.loss_tokens == sum(batch["weights"].sum() for batch in batches)
    assert counts.tokens == sum((batch["segment_ids"] > 0).sum() for batch in batches)
    documents = sum(((b["positions"] == 0) & (b["segment_ids"] > 0)).sum() for b in batches)
    assert documents == counts.rows - counts.dropped - counts.empty
