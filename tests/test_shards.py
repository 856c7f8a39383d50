"""data/shards.py: killed anywhere and started again, the merged file is the same."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillax.data import shards
from distillax.data.shards import ShardStore, differences, fingerprint, write_json
from distillax.errors import UserError

SCHEMA = pa.schema(
    [("prompt_id", pa.string()), ("generation", pa.int32()), ("text", pa.string()), ("error", pa.string())]
)
KEYS = [(f"p{i}", g) for i in range(5) for g in range(2)]
CONFIG = {"teacher": "t", "sampling": {"temperature": 0.5, "stop": (1, 2)}}


def open_store(folder: Path, config=CONFIG, keys=KEYS) -> ShardStore:
    return ShardStore(folder / "out.shards", keys=keys, schema=SCHEMA, config=config, block_size=4)


def make_row(key, error=None):
    return {"prompt_id": key[0], "generation": key[1], "text": f"{key[0]}/{key[1]}", "error": error}


def finish(folder: Path) -> bytes:
    """Does what is missing, and returns the merged file."""
    with open_store(folder) as store:
        for key in store.missing()[::-1]:
            store.add(make_row(key))
        store.merge(folder / "out.parquet", lambda table: table.drop_columns(["error"]))
    return (folder / "out.parquet").read_bytes()


@pytest.fixture
def expected(tmp_path) -> bytes:
    (tmp_path / "uninterrupted").mkdir()
    return finish(tmp_path / "uninterrupted")


def test_rows_in_any_order_come_out_in_key_order(tmp_path, expected):
    rows = pq.read_table(tmp_path / "uninterrupted" / "out.parquet").to_pylist()
    assert [(row["prompt_id"], row["generation"]) for row in rows] == KEYS
    assert [row["text"] for row in rows] == [f"{p}/{g}" for p, g in KEYS]
    names = sorted(path.name for path in (tmp_path / "uninterrupted" / "out.shards").iterdir())
    assert names == [
        "lock",
        "manifest.json",
        *(f"shard-0000{i}.{x}" for i in range(3) for x in ("json", "parquet")),
    ]
    assert finish(tmp_path / "uninterrupted") == expected  # merging again changes nothing


def test_a_row_that_cannot_be_written_costs_no_other_block(tmp_path):
    with pytest.raises(UnicodeEncodeError), open_store(tmp_path) as store:
        for key in (KEYS[0], KEYS[4], KEYS[8]):
            store.add(make_row(key) | ({"text": "\ud83d"} if key == KEYS[4] else {}))
    with open_store(tmp_path) as store:
        assert store.missing() == [key for key in KEYS if key not in (KEYS[0], KEYS[8])]


def test_a_shard_is_written_when_its_block_is_complete(tmp_path):
    with open_store(tmp_path) as store:
        path = tmp_path / "out.shards" / "shard-00001.parquet"
        for key in KEYS[4:7]:
            store.add(make_row(key))
        assert not path.exists()
        store.add(make_row(KEYS[7]))
        assert path.exists()
        assert store.missing() == KEYS[:4] + KEYS[8:]
        with pytest.raises(ValueError, match="came twice"):
            store.add(make_row(KEYS[7]))
        with pytest.raises(KeyError):
            store.add(make_row(("stranger", 0)))
        with pytest.raises(RuntimeError, match="missing or damaged"):
            store.merge(tmp_path / "out.parquet", lambda table: table)
    assert not (tmp_path / "out.parquet").exists()


def test_an_orderly_stop_keeps_unfinished_blocks(tmp_path, expected):
    """And says how much that is, without rows that failed, which are made again."""
    kept = [KEYS[i] for i in (1, 4, 6, 7, 9)]
    note = f"5 of 10 rows are kept in {tmp_path / 'out.shards'}, and the same command goes on from there"
    with pytest.raises(KeyboardInterrupt) as stopped, open_store(tmp_path) as store:
        for key in [*kept, KEYS[5]]:
            store.add(make_row(key, error=None if key in kept else "boom"))
        raise KeyboardInterrupt
    assert stopped.value.__notes__ == [note]
    with pytest.raises(KeyboardInterrupt) as stopped, open_store(tmp_path) as store:
        assert store.missing() == [key for key in KEYS if key not in kept]
        raise KeyboardInterrupt
    assert stopped.value.__notes__ == [note]
    with pytest.raises(OSError) as broken, open_store(tmp_path):
        raise OSError
    assert not hasattr(broken.value, "__notes__")
    assert finish(tmp_path) == expected


def test_failed_rows_are_stored_and_missing_at_the_next_start(tmp_path, expected):
    with open_store(tmp_path) as store:
        for key in KEYS:
            store.add(make_row(key, error="boom" if key == KEYS[2] else None))
        assert store.missing() == []
        assert next(store.tables())["error"].to_pylist() == [None, None, "boom", None]
    with open_store(tmp_path) as store:
        assert store.missing() == [KEYS[2]]
    assert finish(tmp_path) == expected


@pytest.mark.parametrize("damage", ["flip", "cut", "no checksum", "bad checksum", "gone", "swapped"])
def test_a_damaged_shard_is_noticed_and_redone(tmp_path, expected, damage):
    finish(tmp_path)
    shard = tmp_path / "out.shards" / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[len(content) // 3] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-7])
    elif damage == "no checksum":
        shard.with_suffix(".json").unlink()
    elif damage == "bad checksum":
        shard.with_suffix(".json").write_text("{")
    elif damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes((shard.with_name("shard-00000.parquet")).read_bytes())
    with open_store(tmp_path) as store:
        assert store.missing() == KEYS[4:8]
    assert finish(tmp_path) == expected


def test_another_configuration_is_refused_by_the_names_of_its_keys(tmp_path):
    finish(tmp_path)
    other = {"teacher": "u", "sampling": {"temperature": 0.5, "stop": (1, 3)}, "new": 1}
    with pytest.raises(
        UserError,
        match=r"configuration: new=null \(now .+\), stop=.+ \(now .+\), teacher=.*delete it",
    ):
        open_store(tmp_path, config=other).__enter__()
    with pytest.raises(UserError, match="list of prompts differs"):
        open_store(tmp_path, keys=KEYS[:-1]).__enter__()
    with open_store(tmp_path) as store:  # and the lock was let go
        assert store.missing() == []


def test_a_configuration_that_was_given_no_row_gives_way(tmp_path, expected):
    with open_store(tmp_path, config={"teacher": "mistyped"}):
        pass
    assert finish(tmp_path) == expected


def test_shards_of_nobody_are_refused(tmp_path):
    finish(tmp_path)
    manifest = tmp_path / "out.shards" / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_store(tmp_path).__enter__()
    manifest.unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        open_store(tmp_path).__enter__()


def test_only_one_process_writes(tmp_path):
    with open_store(tmp_path):
        out = run_worker(tmp_path, 0)
        assert out.returncode == 2 and "another process is writing" in out.stdout
    assert run_worker(tmp_path, 0).returncode == 0


def test_the_lock_of_a_folder_that_was_just_deleted_is_worth_nothing(tmp_path, monkeypatch):
    """Another process ends between our opening of the lock file and our locking it."""
    store = open_store(tmp_path)
    flock, calls = shards.fcntl.flock, []

    def delete_first(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            shards.shutil.rmtree(tmp_path / "out.shards")
        flock(descriptor, operation)

    monkeypatch.setattr(shards.fcntl, "flock", delete_first)
    with store:
        assert len(calls) == 2
        with pytest.raises(UserError, match="another process"):
            open_store(tmp_path).__enter__()


# Calls of os.replace: 1 the manifest; 2, 3 the first shard and its checksum; ...; 8 the merged file.
@pytest.mark.parametrize("kill_at", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write(tmp_path, expected, kill_at, after):
    out = run_worker(tmp_path, kill_at, after)
    assert out.returncode == -signal.SIGKILL
    assert (tmp_path / "out.parquet").exists() == (kill_at == 8 and after)
    assert finish(tmp_path) == expected
    assert not list((tmp_path / "out.shards").glob("*.tmp"))


def run_worker(folder, kill_at, after=False):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(folder), str(kill_at), str(int(after))]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def worker(folder: Path, kill_at: int, after: bool) -> int:
    """Does the work, but dies by SIGKILL just before, or after, its `kill_at`-th file is put in place."""
    replace, calls = os.replace, 0

    def counted(source, target):
        nonlocal calls
        calls += 1
        if calls == kill_at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    try:
        finish(folder)
    except UserError as error:
        print(error)
        return 2
    return 0


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_and_any_stops_give_the_same_bytes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    for _ in range(data.draw(st.integers(0, 3))):
        with open_store(folder) as store:
            missing = store.missing()
            for key in data.draw(st.permutations(missing))[: data.draw(st.integers(0, len(missing)))]:
                store.add(make_row(key, error=data.draw(st.sampled_from([None, None, "boom"]))))
    reference = tmp_path_factory.getbasetemp() / "reference"
    if not reference.exists():
        reference.mkdir()
        finish(reference)
    assert finish(folder) == (reference / "out.parquet").read_bytes()


def test_row_groups_are_fixed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 3)
    finish(tmp_path)
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 3, 3, 1]
    assert [row["prompt_id"] for row in file.read().to_pylist()] == [key[0] for key in KEYS]


def test_fingerprints_and_differences():
    assert fingerprint({"a": 1, "b": {"c": (2, 3)}}) == fingerprint({"b": {"c": [2, 3]}, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4}, "e": None}) == [
        "b.c",
        "b.d",
        "e",
    ]


def test_json_is_replaced_whole(tmp_path):
    """A reader beside the writer sees one of the values, never a part of one."""
    path = tmp_path / "a.json"
    write_json(path, ["a"] * 1000)
    writer = threading.Thread(target=lambda: [write_json(path, [c] * 1000) for c in "bcdef"])
    writer.start()
    while writer.is_alive():
        assert len(set(json.loads(path.read_text()))) == 1
    writer.join()
    assert json.loads(path.read_text()) == ["f"] * 1000


if __name__ == "__main__":
    sys.exit(worker(Path(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3]))))
