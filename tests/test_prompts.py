"""data/rows.py and data/prompts.py: any data set -> rows, prompts, conversations."""

import json
import re
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillax.cli import parsing
from distillax.config import PromptsConfig, TrainConfig
from distillax.data.prompts import (
    CONVERSATION_COLUMNS,
    PROMPT_COLUMNS,
    load_conversations,
    load_prompts,
)
from distillax.data.rows import read_rows
from distillax.errors import UserError

DOCS = Path(__file__).parents[1] / "docs"


def turns(*contents):
    """A conversation that alternates, user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


ROWS = [{"prompt": f"question {i}", "n": i} for i in range(5)]


# Rows


def test_every_kind_of_local_source_gives_the_same_rows(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "spaced.jsonl").write_text("\n" + "\n\n".join(json.dumps(row) for row in ROWS))
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(str(tmp_path / "splits"))
    sources = [
        write_jsonl(tmp_path / "a.jsonl", ROWS),
        write_parquet(tmp_path / "a.parquet", ROWS),
        str(tmp_path / "list.json"),
        str(tmp_path / "spaced.jsonl"),
        str(tmp_path / "saved"),
        str(tmp_path / "splits"),
    ]
    for source in sources:
        rows = read_rows(source)
        assert list(rows) == ROWS, source
        assert rows[-1] == ROWS[-1] and rows[1:3] == ROWS[1:3] and rows.columns == ["prompt", "n"]
    assert len(read_rows(str(tmp_path / "splits"), "test")) == 1


def test_the_lines_of_the_docs_that_save_a_data_set(tmp_path, monkeypatch):
    (lines,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "data.md").read_text(), re.M | re.S)
    write_parquet(tmp_path / "big" / "a.parquet", ROWS)
    load = datasets.load_dataset
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **how: load(*a, **how, cache_dir=cache))
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert list(read_rows("saved")) == ROWS


def test_selected_rows_of_a_saved_data_set_keep_their_order(tmp_path):
    datasets.Dataset.from_list(ROWS).select([4, 0, 2]).save_to_disk(str(tmp_path / "saved"))
    assert [row["n"] for row in read_rows(str(tmp_path / "saved"))] == [4, 0, 2]


def test_a_builder_name_takes_files_patterns_and_lists(tmp_path):
    first = write_parquet(tmp_path / "train-0.parquet", ROWS[:3])
    second = write_parquet(tmp_path / "train-1.parquet", ROWS[3:])
    assert list(read_rows("parquet", files=[first, second])) == ROWS
    assert list(read_rows("parquet", files=str(tmp_path / "train-*.parquet"))) == ROWS
    assert list(read_rows(str(tmp_path), files="train-1.parquet")) == ROWS[3:]
    assert list(read_rows("json", files=write_jsonl(tmp_path / "a.jsonl", ROWS))) == ROWS
    with pytest.raises(UserError, match=r"needs files.*hf_train_files"):
        read_rows("parquet")
    with pytest.raises(UserError, match=r"no file .*nothing-\*"):
        read_rows("parquet", files=str(tmp_path / "nothing-*.parquet"))


def test_the_splits_of_a_folder(tmp_path):
    write_parquet(tmp_path / "hub" / "data" / "train_sft-00000-of-00002.parquet", ROWS[:2])
    write_parquet(tmp_path / "hub" / "data" / "train_sft-00001-of-00002.parquet", ROWS[2:])
    write_parquet(tmp_path / "hub" / "data" / "test_sft-00000-of-00001.parquet", ROWS[:1])
    (tmp_path / "hub" / "dataset_info.json").write_text("{}")  # metadata, not rows
    assert list(read_rows(str(tmp_path / "hub"), "train_sft")) == ROWS
    assert list(read_rows(str(tmp_path / "hub"), "test_sft")) == ROWS[:1]
    with pytest.raises(UserError, match=r"no split 'train'.*test_sft, train_sft"):
        read_rows(str(tmp_path / "hub"), "train")
    with pytest.raises(UserError, match=r"several splits"):
        read_rows(str(tmp_path / "hub"), None)

    write_jsonl(tmp_path / "folders" / "test" / "a.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "folders" / "train" / "a.jsonl", ROWS)
    assert list(read_rows(str(tmp_path / "folders"), "train")) == ROWS

    write_jsonl(tmp_path / "plain" / "a.jsonl", ROWS)
    assert list(read_rows(str(tmp_path / "plain"), "train")) == ROWS
    with pytest.raises(UserError, match=r"no split 'nope'"):
        read_rows(str(tmp_path / "plain"), "nope")


def test_bad_sources_are_named(tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 this is not Parquet")
    bad_line = tmp_path / "bad.jsonl"
    bad_line.write_text('{"prompt": "a"}\n{"prompt": \n')
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{"prompt": "a"}, {"prompt": 3}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "numbers.json").write_text("[1, 2]")
    (tmp_path / "bare.jsonl").write_text("{}\n{}\n")
    (tmp_path / "bare.json").write_text('[{"prompt": "a"}, {}]')
    (tmp_path / "long.jsonl").write_text('{"n": 1}\n{"n": %s}\n' % ("9" * 5000))
    (tmp_path / "deep.jsonl").write_text('{"n": %s\n' % ("[" * 100_000))
    (tmp_path / "other.txt").write_text("text")
    (tmp_path / "nothing").mkdir()
    for source, message in [
        (tmp_path / "missing.jsonl", "there is no file or folder .*missing.jsonl"),
        (tmp_path / "missing", "there is no file or folder"),
        (broken, "broken.parquet is not a readable Parquet file"),
        (bad_line, "bad.jsonl, line 2: not valid JSON"),
        (
            mixed,
            r"mixed.jsonl, line 2 \(row 1, counted from 0\): 'prompt' is a number, but a string in line 1 ",
        ),
        (tmp_path / "empty.jsonl", "empty.jsonl has no rows"),
        (tmp_path / "numbers.json", r"numbers.json, row 0 \(counted from 0\): a number, not a JSON object"),
        (
            tmp_path / "bare.jsonl",
            r"bare.jsonl, line 1 \(row 0, counted from 0\): an object without keys; rem",
        ),
        (tmp_path / "bare.json", r"bare.json, row 1 \(counted from 0\): an object without keys; remove it"),
        (
            tmp_path / "long.jsonl",
            r"line 2: not valid JSON \(a number of too many digits, column 7\); correct",
        ),
        (
            tmp_path / "deep.jsonl",
            r"deep.jsonl, line 1: not valid JSON \(nested too deep, column 1\); correct",
        ),
        (tmp_path / "other.txt", "other.txt has an unknown type"),
        (tmp_path / "nothing", "nothing has no data files"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            read_rows(str(source))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([None, "s", ["a"]], "{2}: 'x' is a list, but a string in {1}; give all one type"),
        ([{}, 2.5], "{1}: 'x' is a number, but an object in {0}; give all one type"),
        (
            [{"a": None}, {"a": "s"}, {"a": {}}],
            "{2}: 'a' in 'x' is an object, but a string in {1}; give all one type",
        ),
        (
            [turns("q"), [{"role": "user", "content": 3}]],
            "{1}: 'content' in an item of 'x' is a number, but a string in {0}; give all one type",
        ),
        (
            [[], [1, "s"]],
            "{1}: an item of 'x' is a string, but a number elsewhere in that row; give all one type",
        ),
        ([1, 2**70], "{1}: 'x' has a number that is too large; correct it"),
        (
            ["s", "\ud800"],
            "{1}: 'x' has half a character ('utf-8' codec can't encode character '\\ud800' in position 0: "
            "surrogates not allowed); correct it",
        ),
    ],
)
def test_a_column_of_two_types_is_told_where_it_changes(tmp_path, monkeypatch, rows, message):
    """In the words of neither Arrow nor Python, and the same within what is read at once and from one to the
    next. An empty line counts as a line, not as a row."""
    texts = [json.dumps({"x": row, "other": i}) for i, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("\n".join([texts[0], " ", "", *texts[1:]]))
    (tmp_path / "a.json").write_text(f"[{', '.join(texts)}]")
    lines = [f"line {(1, 4, 5)[row]} (row {row}, counted from 0)" for row in range(3)]
    for at_once in (10, 1):
        monkeypatch.setattr("distillax.data.files._JSON_BATCH", at_once)
        for source, places in (
            (tmp_path / "a.jsonl", lines),
            (tmp_path / "a.json", [f"row {row} (counted from 0)" for row in range(3)]),
        ):
            with pytest.raises(UserError) as caught:
                read_rows(str(source))
            assert str(caught.value) == f"{source}, {message.format(*places)}"


def test_a_number_that_goes_with_no_fraction(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"x": 0.5}, {"x": 2**60 + 1}])
    with pytest.raises(
        UserError, match=r"a\.jsonl: the values of 'x' don't have one type \(Integer value 11529"
    ):
        read_rows(source)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_files_of_two_types_are_both_named(tmp_path, write):
    suffix = write.__name__.removeprefix("write_")
    first = write(tmp_path / f"a.{suffix}", [{"prompt": None}, {"prompt": "s"}])
    second = write(tmp_path / f"b.{suffix}", [{"prompt": None}, {"prompt": ["s"]}])
    at = "line 2 (row 1, counted from 0)" if suffix == "jsonl" else "row 1 (counted from 0)"
    with pytest.raises(UserError) as caught:
        read_rows(str(tmp_path))
    said = f"{second}, {at}: 'prompt' is a list, but a string in {first}, {at}; give all one type"
    assert str(caught.value) == said


def test_files_of_two_types_that_no_value_shows(tmp_path):
    for name, kind in (("c", pa.string()), ("d", pa.list_(pa.string()))):
        pq.write_table(pa.table({"prompt": pa.array([], kind)}), tmp_path / f"{name}.parquet")
    with pytest.raises(
        UserError, match=r"c\.parquet, .*d\.parquet: the values of 'prompt' don't have one type \("
    ):
        read_rows(str(tmp_path))


def test_json_that_is_not_valid_is_told_by_line_and_column(tmp_path):
    """The line of the file, once, in a list and line by line."""
    for name, text, line, column in (
        ("a.jsonl", '{"x": 1}\n\n{"x": \n', 3, 6),
        ("a.json", '[{"x": 1},\n {"x": ]', 2, 8),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as caught:
            read_rows(str(tmp_path / name))
        at = f"{tmp_path / name}, line {line}: not valid JSON (Expecting value, column {column}); correct it"
        assert str(caught.value) == at


def test_columns_that_nobody_reads_are_not_read(tmp_path, monkeypatch):
    """They take no room, and may hold values of any types, in a file or from file to file."""
    rows = [
        {"id": 1, "messages": turns("q", "a"), "x": [1]},
        {"id": "x2", "messages": turns("r", "b"), "x": "y"},
    ]
    mixed = write_jsonl(tmp_path / "a.jsonl", rows)
    assert [p.messages for p in load_prompts(mixed)] == [turns("q"), turns("r")]
    assert list(load_conversations(mixed)) == [turns("q", "a"), turns("r", "b")]
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 .*: 'id' is a string, but a number in line 1"):
        load_prompts(mixed, column="id")
    inputs = write_jsonl(tmp_path / "b.jsonl", [{"q": "q", "a": "a", "input": i} for i in (1, "x")])
    assert list(load_conversations(inputs, columns=["q", "a"])) == [turns("q", "a")] * 2
    with pytest.raises(UserError, match="no column 'ids'; did you mean 'id'"):
        load_prompts(mixed, column="ids")

    for i, row in enumerate(rows):
        write_parquet(tmp_path / "parquet" / f"train-{i}.parquet", [row])
    read, asked = pq.read_table, []
    monkeypatch.setattr(
        pq, "read_table", lambda path, **how: asked.append(how["columns"]) or read(path, **how)
    )
    assert list(load_conversations(str(tmp_path / "parquet"))) == [turns("q", "a"), turns("r", "b")]
    assert load_prompts(str(tmp_path / "parquet"))[1].messages == turns("r")
    with pytest.raises(UserError, match="no column 'nope'; the columns there are: id, messages, x"):
        load_prompts(str(tmp_path / "parquet"), column="nope")
    assert asked == [["messages"]] * 4 + [[]] * 2


def test_a_saved_data_set_without_the_split(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    assert list(read_rows(str(tmp_path / "saved"), None)) == ROWS
    with pytest.raises(UserError, match=r"no split 'test'.*train"):
        read_rows(str(tmp_path / "saved"), "test")


def test_a_saved_data_set_without_splits_has_none(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert list(read_rows(str(tmp_path / "saved"))) == ROWS
    with pytest.raises(UserError, match="saved is one data set, without splits, so there is no 'test'"):
        read_rows(str(tmp_path / "saved"), "test")


def test_a_hub_id_is_asked_for_with_the_token_and_the_token_stays_out_of_errors(monkeypatch):
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        if options["split"] == "nope":
            raise ValueError(f"Unknown split nope for {options['token']}")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows("org/name", "train_sft", hf_access_token="hf_secret")) == ROWS
    at = {"name": "org/name", "config": None, "split": "train_sft", "data_files": None}
    assert asked == at | {"token": "hf_secret"}
    read_rows("org/name", "train", hf_name="main")
    assert asked["config"] == "main"
    with pytest.raises(UserError, match=r"org/name .*'nope'") as caught:
        read_rows("org/name", "nope", hf_access_token="hf_secret")
    assert "hf_secret" not in str(caught.value)


def test_the_configurations_of_a_data_set_on_the_hub(monkeypatch, tmp_path):
    """One of several must be named; the errors are those of `datasets`."""
    for name in "abcdefghij":
        write_jsonl(tmp_path / name / "train.jsonl", ROWS)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in "abcdefghij")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    load = datasets.load_dataset
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda _, *config, **how: load(str(tmp_path), *config, **how, cache_dir=cache),
    )
    assert list(read_rows("org/name", "train", hf_name="c")) == ROWS
    named = r"\(--data-name, or in a recipe hf_name or prompts\.name\) of a, b, c, d, e, f, g, h and 2 more$"
    with pytest.raises(UserError, match=f"^org/name has several configurations; name one {named}"):
        read_rows("org/name")
    with pytest.raises(UserError, match=f"^org/name has no configuration 'x'; name one {named}"):
        read_rows("org/name", hf_name="x")


def test_a_configuration_is_of_the_hub_alone(tmp_path):
    local = write_jsonl(tmp_path / "a.jsonl", ROWS)
    for source, files in ((local, None), (str(tmp_path), None), ("json", local), ("org/name", "a.jsonl")):
        with pytest.raises(UserError, match=r"the configuration 'main' \(--data-name, or .*; leave it out"):
            read_rows(source, files=files, hf_name="main")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """What `datasets` keeps of it is read, as where offline mode is set."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", nobody)
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it was asked again"))
    with pytest.raises(UserError, match=r"split 'train' \(the hub does not answer: .*refused\); check"):
        read_rows("someone/nothing")
    assert not datasets.config.HF_HUB_OFFLINE

    def load(*_, **__):
        assert datasets.config.HF_HUB_OFFLINE
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows("someone/nothing")) == ROWS


def test_a_hub_id_that_cannot_be_had_is_one_sentence():
    code = (
        "from distillax.data.rows import read_rows\nfrom distillax.errors import UserError\n"
        "try: read_rows('org/nothing')\nexcept UserError as e: print(e)"
    )
    env = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.startswith("org/nothing is neither here nor readable on the Hugging Face hub")
    assert out.stdout.count("\n") == 1


# Prompts


def test_prompt_ends_at_the_last_user_turn(tmp_path):
    """Pitfall 18: what follows the last user turn, gold answers included, is left away."""
    talk = [{"role": "system", "content": "be brief"}, *turns("a", "b", "c", "gold")]
    (prompt,) = load_prompts(write_jsonl(tmp_path / "a.jsonl", [{"messages": talk}]))
    assert prompt.messages == talk[:-1] and prompt.row == 0
    # A file that already has the fault in its tail can still be read.
    talk.append({"role": "assistant", "content": "appended"})
    assert load_prompts(write_jsonl(tmp_path / "b.jsonl", [{"messages": talk}]))[0].messages == talk[:-2]


def test_which_column_is_read(tmp_path):
    both = {"question": "q", "prompt": "p", "messages": turns("m"), "other": "o"}
    source = write_parquet(tmp_path / "a.parquet", [both])
    text = lambda *args: load_prompts(source, "train", *args)[0].messages  # noqa: E731
    assert text() == turns("m")
    assert text("prompt") == turns("p")
    assert text("other") == turns("o")
    with pytest.raises(UserError, match=r"no column 'nope'.*question, prompt, messages, other"):
        text("nope")
    with pytest.raises(UserError, match=r"no column 'promt'; did you mean 'prompt'\? The columns"):
        text("promt")
    assert load_prompts(write_jsonl(tmp_path / "q.jsonl", [{"question": "q"}]))[0].messages == turns("q")
    with pytest.raises(UserError, match=r"none of the columns messages, prompt, question, conv.*: text"):
        load_prompts(write_jsonl(tmp_path / "t.jsonl", [{"text": "q"}]))


def test_the_help_names_the_columns_that_are_looked_for():
    pairs = [" ".join(names) for names in CONVERSATION_COLUMNS]
    assert f"default: {', '.join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]}" == parsing.PROMPTS
    assert f"default: {'; '.join(pairs[:-1])}; or {pairs[-1]}" == parsing.PAIRS
    for config, key, columns in (
        (TrainConfig, "train_data_columns", ["messages", "or conversations"]),
        (PromptsConfig, "column", PROMPT_COLUMNS),
    ):
        assert f"default: {', '.join(columns)}" in (config.model_fields[key].description or "")


def test_what_is_measured_and_what_is_answered_are_the_same_column(tmp_path):
    for row in (
        {"prompt": "p", "question": "q", "answer": "a"},
        {"prompt": "p", "instruction": "q", "output": "a"},
        {"prompt": "q", "response": "a"},
        {"instruction": "q", "response": "a"},
        {"input": "q", "output": "a"},
    ):
        source = write_jsonl(tmp_path / "a.jsonl", [row])
        assert load_conversations(source)[0] == turns("q", "a")
        assert load_prompts(source)[0].messages == turns("q")


@pytest.mark.parametrize(("question", "answer"), [("question", "answer"), ("instruction", "output")])
def test_a_question_does_not_lose_its_context(tmp_path, question, answer):
    """SQuAD and Dolly have the text that a question is about in a column of its own."""
    row = {question: "Summarise this.", "context": "A long text.", answer: "a"}
    source = write_jsonl(tmp_path / "a.jsonl", [row])
    message = (
        rf"a\.jsonl, line 1 \(row 0, counted from 0\): 'context', beside '{question}', would be left out, "
        rf"in 1 of 1 rows; join .*name {question}"
    )
    for load in (load_prompts, load_conversations):
        with pytest.raises(UserError, match=message):
            load(source)
    assert load_prompts(source, column=question)[0].messages == turns("Summarise this.")
    assert load_conversations(source, columns=[question, answer])[0] == turns("Summarise this.", "a")


def test_a_context_that_is_empty_is_no_loss(tmp_path):
    rows = [{"question": f"q{i}", "context": more, "answer": "a"} for i, more in enumerate(("", " \n", None))]
    for write, name in ((write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")):
        source = write(tmp_path / name, rows)
        assert [prompt.messages for prompt in load_prompts(source)] == [turns(f"q{i}") for i in range(3)]
        assert load_conversations(source)[2] == turns("q2", "a")
        source = write(tmp_path / name, [*rows, *({**rows[0], "context": more} for more in ("x", "", "y"))])
        for load in (load_prompts, load_conversations):
            with pytest.raises(
                UserError, match=r"row 3\b.*: 'context', .* in 2 of 6 rows; join .*name question"
            ):
                load(source)
        assert len(load_prompts(source, num_prompts=3)) == 3
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "saved"))
    assert len(load_prompts(str(tmp_path / "saved"))) == 3
    # SQuAD's kin have lists, and one of conversations may have any, as it says all by itself.
    lists = [{"prompt": "q", "context": more, "response": "a"} for more in ([], None)]
    assert len(load_conversations(write_jsonl(tmp_path / "b.jsonl", lists))) == 2
    mixed = [{"messages": turns("q", "a"), "context": more} for more in ("x", 1)]
    assert len(load_conversations(write_jsonl(tmp_path / "c.jsonl", mixed))) == 2


def test_sharegpt_turns(tmp_path):
    talk = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "ho"},
        {"from": "human", "value": "ha"},
        {"from": "chatgpt", "value": "hum"},
    ]
    mixed = [{"role": "user", "content": "hi"}, *talk[1:]]
    source = write_jsonl(tmp_path / "a.jsonl", [{"conversations": talk}, {"conversations": mixed}])
    for row in (0, 1):
        prompts = load_prompts(source, column="conversations")
        assert prompts[row].messages == turns("hi", "ho", "ha")
        assert load_conversations(source)[row] == turns("hi", "ho", "ha", "hum")


def test_openai_s_developer_and_parts(tmp_path, monkeypatch):
    """Parts of text are lines of one, also where other rows of the file, or of another, hold strings."""

    def row(role, *parts):
        content = [{"type": "text", "text": part} for part in parts]
        return {"messages": [{"role": role, "content": content}, *turns("q", "a")]}

    rows = [row("system", "be", "kind"), row("developer", "be kind")]
    wanted = [
        [{"role": role, "content": text}, *turns("q", "a")]
        for role, text in (("system", "be\nkind"), ("developer", "be kind"))
    ]
    assert list(load_conversations(write_jsonl(tmp_path / "a.jsonl", rows))) == wanted
    rows = [{"messages": turns("q", "a")}, *rows[:1]]
    with monkeypatch.context() as patched:
        patched.setattr("distillax.data.files._JSON_BATCH", 1)
        assert list(load_conversations(write_jsonl(tmp_path / "c.jsonl", rows)))[1] == wanted[0]
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
    alike = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    source = write_parquet(tmp_path / "a.parquet", [{"messages": alike}])
    assert list(load_conversations(source)) == [turns("q\nr", "q")]
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for others in ([], turns("q", "a")):  # of one type, and of several
        messages = [*others, {"role": "user", "content": [*parts, image]}]
        source = write_jsonl(tmp_path / "b.jsonl", [{"messages": messages[-1:]}, {"messages": messages}])
        with pytest.raises(
            UserError,
            match=r"b\.jsonl, line 1 \(row 0, counted from 0\): .* a part of type 'image_url', not a string",
        ):
            load_prompts(source)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "robot", "content": "x"}], "unknown role 'robot'"),
        ([{"role": "system", "content": "x"}], "no user turn"),
        ([], "no user turn"),
        ([{"role": "user", "content": None}], r"content of a user turn is empty \(null\)"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "two user turns in a row"),
        (None, r"'messages' is empty \(null\)"),
    ],
)
def test_a_bad_row_is_named(tmp_path, messages, message):
    rows = [{"messages": turns("fine")}, {"messages": messages}]
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2 \(row 1, counted from 0\): .*{message}"):
        load_prompts(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_a_role_that_is_a_list(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [{"role": ["user"], "content": "x"}]}])
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1 .*: unknown role \['user'\]"):
        load_prompts(source)


def test_the_row_of_the_second_file_is_named(tmp_path):
    files = [
        write_jsonl(tmp_path / "a.jsonl", [{"messages": turns("a")}] * 3),
        write_jsonl(tmp_path / "b.jsonl", [{"messages": turns("a")}, {"messages": []}]),
    ]
    with pytest.raises(UserError, match=r"b\.jsonl, line 2 \(row 1, counted from 0\): "):
        load_prompts("json", files=files)


def test_ids_of_repeated_prompts_and_of_fewer_prompts(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": p} for p in "abaca"])
    ids = [prompt.prompt_id for prompt in load_prompts(source)]
    assert len(set(ids)) == 5
    assert ids[2] == ids[0] + "-2" and ids[4] == ids[0] + "-3"
    assert [prompt.prompt_id for prompt in load_prompts(source, num_prompts=3)] == ids[:3]
    assert len(load_prompts(source, num_prompts=99)) == 5
    # The id is that of the content: the same from another column, file and position.
    as_messages = write_jsonl(tmp_path / "b.jsonl", [{"messages": turns("c", "gold")}])
    assert load_prompts(as_messages)[0].prompt_id == ids[3]
    assert ids[3] == "1bd17c8ee4463781"  # kept for ever: data sets refer to it
    with pytest.raises(UserError, match="at least 1"):
        load_prompts(source, num_prompts=0)


@settings(deadline=None)
@given(
    roles=st.lists(st.sampled_from(["system", "assistant", "user", "tool"]), max_size=8),
    text=st.text(max_size=5),
)
def test_cutting_any_conversation(tmp_path_factory, roles, text):
    kept = roles[: len(roles) - roles[::-1].index("user")] if "user" in roles else []
    repeated = any(a == b and a in ("user", "assistant") for a, b in pairwise(kept))
    messages = [{"role": role, "content": f"{text}{i}"} for i, role in enumerate(roles)]
    source = write_jsonl(tmp_path_factory.getbasetemp() / "any.jsonl", [{"messages": messages}])
    if repeated or not kept:
        with pytest.raises(UserError, match="in a row" if repeated else "no user turn"):
            load_prompts(source)
    else:
        (prompt,) = load_prompts(source)
        assert prompt.messages == messages[: len(kept)]
        assert prompt.messages[-1]["role"] == "user"


# Conversations


def test_conversations_of_each_kind(tmp_path):
    talk = turns("q", "a")
    for name, row in {
        "messages": {"messages": talk},
        "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "completion": {"prompt": "q", "completion": "a"},
        "answer": {"question": "q", "answer": "a"},
        "lists": {"prompt": talk[:1], "completion": talk[1:]},
    }.items():
        assert list(load_conversations(write_jsonl(tmp_path / f"{name}.jsonl", [row]))) == [talk], name
    named = write_jsonl(tmp_path / "named.jsonl", [{"in": "q", "out": "a", "talk": talk, "prompt": "x"}])
    assert load_conversations(named, columns=["in", "out"])[0] == talk
    assert load_conversations(named, columns="talk")[-1] == talk
    with pytest.raises(UserError, match=r"messages, prompt \+ completion, .*question \+ answer"):
        load_conversations(named)
    with pytest.raises(UserError, match="no column 'nope'"):
        load_conversations(named, columns=["in", "nope"])
    with pytest.raises(UserError, match="at most two"):
        load_conversations(named, columns=["in", "out", "talk"])
    with pytest.raises(
        UserError, match=r"line 1 \(row 0, counted from 0\): 'in' is text, and holds no answer.*two columns"
    ):
        load_conversations(named, columns="in")[0]
    with pytest.raises(UserError, match=r"or, in `distillax train`, with train_data_columns=, or"):
        load_conversations(named)


def test_alpaca(tmp_path):
    """Also where its columns are named: an input is never lost."""
    rows = [{"instruction": "sum", "input": more, "output": "3"} for more in ("1 2", "", " ", None)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    wanted = [turns("sum\n\n1 2", "3"), *[turns("sum", "3")] * 3]
    for columns in (None, ("instruction", "output"), ("instruction", "input", "output")):
        assert list(load_conversations(source, columns=columns)) == wanted
    for column in (None, "instruction"):
        assert [p.messages for p in load_prompts(source, column=column)] == [talk[:1] for talk in wanted]
    without = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "sum", "output": "3"}])
    assert list(load_conversations(without)) == wanted[1:2]
    listed = write_jsonl(tmp_path / "c.jsonl", [{"instruction": "sum", "input": [1], "output": "3"}])
    with pytest.raises(
        UserError, match=r"c\.jsonl, line 1 \(row 0, counted from 0\): 'input' is a list, not a string"
    ):
        load_prompts(listed)


def test_what_a_prompt_leaves_out_may_have_what_nothing_reads(tmp_path):
    """The thoughts of the answer that is cut off, and of those before it, as templates drop them."""
    thought = {"role": "assistant", "content": "a", "thinking": "hm"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"f": 1}]}
    messages = [*turns("q"), thought, {"role": "user", "content": "r"}, call]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    assert load_prompts(source)[0].messages == turns("q", "a", "r")
    messages[1] = thought | {"tool_calls": [{"f": 1}]}
    with pytest.raises(UserError, match=r"line 1 \(row 0, counted from 0\): a turn has 'tool_calls'"):
        load_prompts(write_jsonl(tmp_path / "b.jsonl", [{"messages": messages}]))


def test_the_fingerprint_is_of_the_rows(tmp_path):
    rows = [{"messages": turns("q", str(i))} for i in range(3)]
    texts = [rows, rows[:2], [*rows[:2], {"messages": turns("q", "x")}], rows]
    found = [
        load_conversations(write_jsonl(tmp_path / f"{i}.jsonl", text)).fingerprint()
        for i, text in enumerate(texts)
    ]
    assert found[0] == found[3] and len(set(found)) == 3


def test_the_fingerprint_is_of_what_was_sampled_too(tmp_path):
    """The end of a cut-off answer is not learnt, and sampled ids are learnt instead of the text."""
    row = {"messages": turns("q", "a"), "finish_reason": "stop", "completion_token_ids": [1, 2]}
    changes = [{}, {"finish_reason": "length"}, {"completion_token_ids": [1, 3]}, {"prompt_id": "x"}]
    same, cut_off, other_ids, other_prompt = (
        load_conversations(write_jsonl(tmp_path / f"{i}.jsonl", [row | change])).fingerprint()
        for i, change in enumerate(changes)
    )
    assert len({same, cut_off, other_ids}) == 3
    assert other_prompt == same


def test_extras_are_those_there_are(tmp_path):
    row = {"messages": turns("q", "a"), "prompt_id": "x", "completion_token_ids": [5, 6]}
    other = row | {"completion_token_ids": [7]}
    conversations = load_conversations(write_parquet(tmp_path / "a.parquet", [row, other]))
    assert conversations.extras(1) == {"completion_token_ids": [7]}
    assert (
        load_conversations(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a"}])).extras(0)
        == {}
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (turns("q"), "no assistant turn"),
        (
            [*turns("q", "a"), {"role": "assistant", "content": "b"}],
            "two assistant turns in a row",
        ),  # pitfall 18
        ([*turns("q", "a"), {"role": "robot", "content": "b"}], "unknown role 'robot'"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": None}], "not a string"),
        (
            [*turns("q"), {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}],
            "a turn has 'tool_calls', which would be lost",
        ),
        (
            [*turns("q"), {"role": "assistant", "content": "a", "reasoning_content": "hm"}],
            "a turn has 'reasoning_content', which would be lost",
        ),
    ],
)
def test_a_bad_conversation_is_named_when_it_is_read(tmp_path, messages, message):
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns("q", "a")}, {"messages": messages}])
    conversations = load_conversations(source)
    assert len(conversations) == 2 and conversations[0] == turns("q", "a")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2 \(row 1, counted from 0\): .*{message}"):
        conversations[1]


def test_dates_stay_text(tmp_path):
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "2024-01-01", "completion": "2024-01-02T03:04:05"}]
    )
    assert load_conversations(source)[0] == turns("2024-01-01", "2024-01-02T03:04:05")


def test_what_cannot_be_trained_on_is_told_so(tmp_path):
    """Columns that no name would make conversations of; and ShareGPT's roles under the key of others."""
    file = tmp_path / "data.jsonl"
    for row, advice in (
        ({"prompt": "q"}, "have prompts without answers answered by `distillax generate`; the columns there"),
        ({"text": "words"}, r"train_data_columns= \(plain text is not trained on\); the columns there"),
        (
            {"q": "x", "a": "y"},
            "name its own with --data-columns, or, in `distillax train`, with train_data_columns=;",
        ),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(UserError, match=advice):
            load_conversations(str(file))
    talk = [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]
    file.write_text(json.dumps({"messages": talk}))
    assert [turn["role"] for turn in load_conversations(str(file))[0]] == ["user", "assistant"]
