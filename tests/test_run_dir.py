import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from distillax.config import TrainConfig
from distillax.errors import UserError
from distillax.run_dir import Metrics, RunDir, write_atomically
from distillax.settings import dump, load_config


def config(*overrides: str) -> str:
    return dump(load_config(TrainConfig, None, ["run_name=r", *overrides]))


def rows(run: RunDir) -> list[dict]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def events(run: RunDir) -> list[Event]:
    """Every TensorBoard event, oldest file first: records of length, checksum, data, checksum."""
    found = []
    for path in sorted(run.tensorboard.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_a_run_leaves_its_config_without_secrets(tmp_path):
    with RunDir(tmp_path / "deep" / "er", "r", config("hf_access_token=hf_hidden", "steps=7")) as run:
        saved = run.config.read_text()
    assert "steps: 7" in saved and "hf_" + "hidden" not in saved and "hf_access_token" not in saved
    assert load_config(TrainConfig, str(run.config)).steps == 7
    assert run.path == tmp_path / "deep" / "er" / "r"


def test_a_second_trainer_on_the_same_run_is_refused_and_a_later_one_is_not(tmp_path):
    with RunDir(tmp_path, "r", config()):
        with pytest.raises(UserError, match="another process is at work in this run"):
            RunDir(tmp_path, "r", config())
        RunDir(tmp_path, "other", config()).close()
    RunDir(tmp_path, "r", config()).close()


def test_the_lock_of_a_killed_process_is_free_again(tmp_path):
    program = textwrap.dedent("""
        import sys, time
        from distillax.run_dir import RunDir
        run = RunDir(sys.argv[1], "r", "{}")
        print("held", flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process"):
            RunDir(tmp_path, "r", "{}")
        holder.send_signal(signal.SIGKILL)
    RunDir(tmp_path, "r", "{}").close()


def test_a_config_that_changes_the_numbers_is_refused_by_the_names_of_its_keys(tmp_path):
    RunDir(tmp_path, "r", config("steps=30")).close()
    RunDir(tmp_path, "r", config("steps=10")).close()  # nothing was trained yet, so nothing is lost
    (tmp_path / "r" / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"learning_rate=\S+ \(now 0.001\), steps=10 \(now 20\);.*r/latest"):
        RunDir(tmp_path, "r", config("steps=20", "learning_rate=1e-3"))
    assert "steps: 10" in (tmp_path / "r" / "config.yml").read_text()
    RunDir(tmp_path, "r", config("steps=10")).close()  # and the refusal left no lock


def test_a_key_that_is_younger_than_the_run_had_its_default(tmp_path):
    RunDir(tmp_path, "r", "".join(x for x in config().splitlines(True) if "distill_skew" not in x)).close()
    (tmp_path / "r" / "checkpoints" / "5").mkdir(parents=True)
    defaults = dump(TrainConfig())
    with pytest.raises(UserError, match=r"with distill_skew=0.1 \(now 0.2\); give"):
        RunDir(tmp_path, "r", config("distill_skew=0.2"), defaults=defaults)
    RunDir(tmp_path, "r", config(), defaults=defaults).close()


def test_keys_that_leave_the_numbers_alone_may_change(tmp_path):
    RunDir(tmp_path, "r", config("hf_train_files=./a.parquet")).close()
    overrides = [
        "profiler=xplane",
        "checkpoint_period=5",
        "hf_access_token=x",
        "eval_interval=2",
        "per_device_batch_size=2",  # as long as a step reads as many rows, which the mesh knows
        "ici_fsdp_parallelism=4",
        f"hf_train_files={Path.cwd() / 'a.parquet'}",  # the same place
    ]
    (tmp_path / "r" / "checkpoints" / "5").mkdir(parents=True)
    with RunDir(tmp_path, "r", config(*overrides)) as run:
        assert "checkpoint_period: 5" in run.config.read_text()


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="run_name"):
        RunDir(tmp_path, name, config())


def test_a_base_that_is_remote_or_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="mount it"):
        RunDir("gs://bucket/runs", "r", config())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create the run directory .*file"):
        RunDir(tmp_path / "file", "r", config())


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        ({}, False),
        ({"metrics.jsonl": "", "huggingface/config.json": "{}", "tensorboard/events.1": "x"}, False),
        ({"metrics.jsonl": '{"step": 1}\n'}, True),
        ({"checkpoints/1/_METADATA": "{}"}, True),
        ({"notes.txt": "mine"}, True),
    ],
)
def test_a_mistake_before_anything_was_done_leaves_no_run(tmp_path, left, kept):
    (tmp_path / "old").mkdir()
    for name, error in (("new", UserError), ("old", UserError), ("fault", RuntimeError)):
        with pytest.raises(error), RunDir(tmp_path, name, "{}") as run:
            for file, text in left.items():
                (run.path / file).parent.mkdir(parents=True, exist_ok=True)
                (run.path / file).write_text(text)
            raise error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fault", *(["new"] if kept else []), "old"]


@pytest.mark.parametrize(
    ("old", "new", "word"), [("prompts: {}", "steps: 1", "run"), ("a: 1", "prompts:", "train")]
)
def test_a_folder_of_another_command_is_refused(tmp_path, old, new, word):
    with RunDir(tmp_path, "r", old, check=False) as run:
        (run.path / "answers").mkdir()
    with pytest.raises(UserError, match=f"holds a `distillax {word}`, which this would overwrite"):
        RunDir(tmp_path, "r", new, check=False)
    assert (tmp_path / "r" / "config.yml").read_text() == old
    RunDir(tmp_path, "r", old, check=False).close()


def test_a_run_that_is_held_is_waited_for(tmp_path, monkeypatch):
    held = RunDir(tmp_path, "r", config())
    monkeypatch.setattr("distillax.run_dir.time.sleep", lambda _: held.close())
    said = []
    RunDir(tmp_path, "r", config(), wait=said.append).close()
    assert len(said) == 1 and "waiting for it" in said[0]


def test_a_held_run_that_was_removed_is_made_anew(tmp_path, monkeypatch):
    held = RunDir(tmp_path, "r", config())

    def removed(_):
        held.__exit__(UserError)

    monkeypatch.setattr("distillax.run_dir.time.sleep", removed)
    with pytest.raises(UserError), RunDir(tmp_path, "r", config(), wait=lambda _: None) as run:
        assert run.config.is_file()
        raise UserError("a mistake")
    assert not run.path.exists()  # it was new, so the mistake leaves nothing behind


def test_a_run_that_vanishes_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    made, mkdir = [], Path.mkdir

    def vanishing(path, *args, **kwargs):
        mkdir(path, *args, **kwargs)
        made.append(path)
        if len(made) == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", vanishing)
    monkeypatch.setattr("distillax.run_dir.time.sleep", lambda _: None)
    with RunDir(tmp_path, "r", config(), wait=lambda _: None) as run:
        assert run.config.is_file() and made == [run.path] * 2


def test_a_file_system_without_locks_has_none(tmp_path, monkeypatch):
    number = errno.ENOLCK

    def flock(*_):
        raise OSError(number, "No locks available")

    monkeypatch.setattr("distillax.run_dir.fcntl.flock", flock)
    with pytest.raises(UserError, match="cannot be locked: No locks available; see to the file server"):
        RunDir(tmp_path, "r", config())
    number = errno.EOPNOTSUPP
    monkeypatch.setattr("distillax.run_dir.fcntl.flock", flock)
    monkeypatch.setattr("distillax.run_dir._SHARED_S", 0)
    with RunDir(tmp_path, "r", config()) as run:
        run.check_shared(run.token)
        with pytest.raises(UserError, match="is not the folder that the first process has"):
            run.check_shared(run.token + 1)


def test_metrics_are_a_line_a_step_at_once(tmp_path):
    with RunDir(tmp_path, "r", config()) as run, Metrics(run) as metrics:
        metrics.write(1, {"loss": np.float32(0.5), "weight_sum": 12, "grad_norm": math.nan})
        # Read before anything is closed: a killed run keeps the steps that it did.
        assert rows(run) == [{"step": 1, "loss": 0.5, "weight_sum": 12, "grad_norm": None}]


def test_metrics_take_jax_scalars(tmp_path):
    import jax.numpy as jnp

    with RunDir(tmp_path, "r", config()) as run, Metrics(run) as metrics:
        metrics.write(1, {"loss": jnp.float32(0.25), "tokens": jnp.int32(3), "coarse": jnp.bfloat16(1.5)})
        assert rows(run) == [{"step": 1, "loss": 0.25, "tokens": 3, "coarse": 1.5}]


def test_a_resumed_run_has_every_step_once(tmp_path):
    with RunDir(tmp_path, "r", config()) as run:
        with Metrics(run) as metrics:
            for step in range(1, 6):
                metrics.write(step, {"loss": float(step)})
        with run.metrics.open("a") as file:
            file.write('{"step": 6, "lo')  # killed while writing
        with Metrics(run, resume_step=3) as metrics:
            for step in range(4, 7):
                metrics.write(step, {"loss": 10.0 * step})
        assert [(row["step"], row["loss"]) for row in rows(run)] == [
            (1, 1.0),
            (2, 2.0),
            (3, 3.0),
            (4, 40.0),
            (5, 50.0),
            (6, 60.0),
        ]


def test_tensorboard_has_the_numbers_and_purges_the_steps_done_again(tmp_path):
    with RunDir(tmp_path, "r", config()) as run:
        with Metrics(run) as metrics:
            metrics.write(1, {"loss": 0.5})
            metrics.write(2, {"loss": 0.25})
        with Metrics(run, resume_step=1) as metrics:
            metrics.write(2, {"loss": 0.125})
        scalars = [(e.step, v.tag, v.simple_value) for e in events(run) for v in e.summary.value]
        assert scalars == [(1, "loss", 0.5), (2, "loss", 0.25), (2, "loss", 0.125)]
        # TensorBoard drops what a file before this mark says about steps from 2 on.
        assert [e.step for e in events(run) if e.HasField("session_log")] == [2]


def test_a_run_that_starts_again_from_the_beginning_keeps_no_old_line(tmp_path):
    with RunDir(tmp_path, "r", config()) as run:
        with Metrics(run) as metrics:
            metrics.write(1, {"loss": 1.0})
        Metrics(run, resume_step=0).close()
        assert rows(run) == []


def test_a_foreign_line_among_the_metrics_is_named(tmp_path):
    with RunDir(tmp_path, "r", config()) as run:
        run.metrics.write_text('{"step": 1}\nhello\n{"step": 2}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of metrics"):
            Metrics(run, resume_step=2)
        assert run.metrics.read_text() == '{"step": 1}\nhello\n{"step": 2}\n'


def test_what_a_kill_has_left_goes_with_the_next_write(tmp_path):
    """But not what another writer is at just now, nor the files of others."""
    write_atomically(tmp_path / "config.yml", "old")
    old, now = "0123abcd.tmp", "0123ffff.tmp"
    names = [f".config.yml.{old}", f".config.yml.{now}", f".config.yml.b.{old}", f"config.yml.{old}"]
    for name in names:
        (tmp_path / name).touch()
        if now not in name:
            os.utime(tmp_path / name, (1e9, 1e9))
    write_atomically(tmp_path / "config.yml", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["config.yml", *names[1:]])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "config.yml", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "config.yml").stat().st_mode & 0o777 == mode


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "config.yml"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["config.yml"]
