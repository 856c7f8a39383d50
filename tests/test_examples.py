"""Examples of a data set: each row is tokenised once, and gives the same whenever it is asked for."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import small

from distillax.checkpoints.source import load_tokenizer_folder
from distillax.data import chat, examples
from distillax.data.batches import make_batches, row_sizes
from distillax.data.examples import Examples, load_examples
from distillax.errors import UserError

ROWS = 40


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder = tmp_path_factory.mktemp("examples")
    small.save_tokenizer(folder)
    data = small.questions(folder / "rows.jsonl", ROWS)
    return load_examples(str(data), load_tokenizer_folder(folder))


@pytest.fixture
def encoded(monkeypatch) -> Counter[str]:
    """How often each conversation was tokenised."""
    count: Counter[str] = Counter()
    really = chat.encode_conversation

    def counting(tokenizer, messages, **options):
        count[str(messages)] += 1
        return really(tokenizer, messages, **options)

    monkeypatch.setattr(chat, "encode_conversation", counting)
    return count


def epochs(data: Examples) -> list[dict[str, np.ndarray]]:
    options = {"batch_size": 2, "max_target_length": 64, "packing": True, "overlong": "truncate"}
    batches = make_batches(data, data.encode, shuffle_seed=3, num_epochs=3, **options)
    found = list(batches)
    batches.close()
    return found


@pytest.mark.parametrize("room", [0, 2_000, 2**30])
def test_rows_are_tokenised_once_while_there_is_room(rows, encoded, room, monkeypatch):
    monkeypatch.setattr(examples, "_KEPT_BYTES", room)
    data, plain = replace(rows), Examples._encode
    row_sizes(data, data.encode, 64)
    found = epochs(data)
    most = sum(encoded.values())
    if room == 2**30:
        assert set(encoded.values()) == {1} and len(encoded) == ROWS
    else:
        assert most == 4 * ROWS + 1 if not room else ROWS < most < 4 * ROWS
    for row in range(ROWS):
        kept, anew = data.encode(row), plain(data, row)
        for one, other in ((kept.tokens, anew.tokens), (kept.loss_mask, anew.loss_mask)):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(examples, "_KEPT_BYTES", 0)
    for one, other in zip(found, epochs(replace(rows)), strict=True):
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name])


def test_a_model_with_fewer_rows_sees_no_row_that_was_kept_for_another(rows):
    highest = int(rows.encode(0).tokens.max())
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1 \(row 0, counted from 0\): .* has the id"):
        replace(rows, ids=highest).encode(0)


def test_a_row_without_targets_is_named_by_its_file(rows):
    def refuse(_):
        raise UserError("there are no targets")

    options = {"batch_size": 1, "max_target_length": 64, "packing": False, "overlong": "truncate"}
    named = r"rows\.jsonl, line 1 \(row 0, counted from 0\): there are no targets"
    with pytest.raises(UserError, match=named):
        make_batches(rows, rows.encode, shuffle_seed=None, targets=refuse, **options)
