"""The run directory: its lock, its effective config, and the metrics of its steps.

<base_output_directory>/<run_name>/
    config.yml       the effective config, secrets out
    metrics.jsonl    a line a step
    tensorboard/     the same numbers for TensorBoard
    checkpoints/     <step>/ with model_params, optimizer_state, iter
    report.html
"""

import errno
import fcntl
import glob
import json
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, SupportsFloat, TextIO

import yaml

from distillax.errors import UserError, changed_values

REPORT = "report.html"
_LEASE_S = 150  # for which a file server may keep the lock of a machine that was lost
_LEFT_S = 60  # after which a temporary file has no writer any more
_SHARED_S = 90  # for which a network's files may be unseen: NFS and gcsfuse ask for news once a minute
# Keys that may change when a run goes on: none of them changes what the next step computes. Those of the data
# may be said otherwise: a checkpoint knows what they were.
MAY_CHANGE = {
    "train_split",
    "train_data_columns",
    "run_name",
    "base_output_directory",
    "profiler",
    "profiler_steps",
    "skip_first_n_steps_for_profiler",
    "checkpoint_period",
    "max_num_checkpoints_to_keep",
    "eval_interval",
    "eval_steps",
    "eval_split",
    "eval_cache_path",
    "hf_eval_files",
    "coordinator_address",
    "process_count",
    "process_index",
    "jax_distributed_initialization_timeout",
}

# Keys that may change together, as long as a step reads as many rows (`parallel.mesh.check_rows`): how
# they are shared out, and where the teacher lies. What is finished by a `distillax run` is still not what
# other values would give.
_SHARES = {"per_device_batch_size", "gradient_accumulation_steps", "teacher_sharding"} | {
    f"{group}_{axis}_parallelism"
    for group in ("ici", "dcn")
    for axis in ("data", "fsdp", "tensor", "context", "expert")
}


def check_name(name: str) -> None:
    """Raises UserError for a run_name that is no folder's."""
    if not name or name in (".", "..") or "/" in name:
        raise UserError(f"run_name is {name!r}, but must be a folder name; give run_name=NAME.")


class RunDir:
    """The folder of one run, held by one process: a context manager, free again on exit or death.

    `config_yaml` is the effective config as `settings.dump` writes it. Raises UserError for an unusable
    name, a run that another process is training, and, once there is a checkpoint, a config that differs
    from the saved one in keys that change the numbers (unless `check` is false). A key that the saved one
    lacks, which is younger than the run, had the value that it has in `defaults`, another dump.

    Where several processes train one run, the `leader` holds and writes it for all. With `wait`, which is
    told so, a run that is held is waited for: a file server frees what a lost machine held after a while.
    """

    def __init__(
        self,
        base: str | Path,
        name: str,
        config_yaml: str,
        check: bool = True,
        leader: bool = True,
        wait: Callable[[str], None] | None = None,
        defaults: str = "",
    ) -> None:
        check_name(name)
        if "://" in str(base):
            raise UserError(
                f"base_output_directory is {str(base)!r}, but remote storage is not written to directly; "
                "mount it and give the path of the mounted folder."
            )
        self.path = Path(base).expanduser() / name
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.config = self.path / "config.yml"
        self.report = self.path / REPORT
        self._lock: TextIO | None = None
        # The others must not look before the leader has made it: on NFS they would not see it for a while.
        self._new = leader and not self.path.exists()
        self.token = secrets.randbits(31)  # what the leader writes, and the others must find
        if not leader:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"cannot create the run directory {self.path}: {reason}; give another base_output_directory"
            ) from None
        self._lock = self._take(wait)
        try:
            self._lock.truncate(0)
            self._lock.write(f"{self.token}\n")
            self._lock.flush()
            os.fsync(self._lock.fileno())
            self._save_config(config_yaml, check, defaults)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        mistake = kind is not None and issubclass(kind, UserError)
        nothing = self._lock is not None and self._new and mistake and not self._begun()
        if nothing:  # a mistake that came out before anything was done leaves no run behind
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()
        if nothing:  # on NFS what is open stays until it is closed
            with suppress(OSError):
                self.path.rmdir()

    def _begun(self) -> bool:
        """Whether there is anything in the folder that is not written at every start."""
        empty = (self.metrics, self.checkpoints)
        names = {path.name for path in self.path.iterdir()}
        names -= {".lock", self.config.name, "huggingface", self.tensorboard.name}
        names -= {path.name for path in empty if path.is_file() and not path.stat().st_size}
        names -= {path.name for path in empty if path.is_dir() and not any(path.iterdir())}
        return bool(names)

    def close(self) -> None:
        """Lets go of the run; what was written stays."""
        if self._lock is not None:
            self._lock.close()

    def check_shared(self, token: int) -> None:
        """Raises UserError unless the leader's token is in this folder, or soon comes: else this is another
        machine's folder of the same name."""
        until = time.monotonic() + _SHARED_S
        while True:
            with suppress(OSError):
                if (self.path / ".lock").read_text(encoding="ascii").strip() == str(token):
                    return
            if time.monotonic() > until:
                raise UserError(
                    f"{self.path} is not the folder that the first process has under that name; give a "
                    "base_output_directory that all hosts see"
                )
            time.sleep(0.1)

    def _take(self, wait: Callable[[str], None] | None) -> TextIO:
        until = time.monotonic() + (_LEASE_S if wait else 0)
        while (lock := _locked(self.path / ".lock")) is None:
            if time.monotonic() >= until:
                raise UserError(
                    f"{self.path}: another process is at work in this run; wait for it, or give another "
                    "run_name."
                )
            if wait:
                wait(f"{self.path} is held by another process, or by a machine that is gone; waiting for it")
                wait = None
            time.sleep(1)
            self._new = self._new or not self.path.exists()  # who held it may have removed it
            self.path.mkdir(parents=True, exist_ok=True)
        return lock

    def _save_config(self, config_yaml: str, check: bool, defaults: str) -> None:
        if self.config.is_file() and self._begun():
            saved = self.config.read_text(encoding="utf-8")
            theirs, ours = (re.search("^prompts:", text, re.M) is not None for text in (saved, config_yaml))
            if theirs != ours:
                command = f"distillax {'run' if theirs else 'train'}"
                raise UserError(
                    f"{self.path} holds a `{command}`, which this would overwrite; give another run_name"
                )
        begun = any(path.name.isdigit() for path in self.checkpoints.glob("*"))
        if check and begun and self.config.is_file():
            changed = changed_keys(self.config.read_text(encoding="utf-8"), config_yaml, defaults)
            if changed:
                raise UserError(
                    f"{self.config}: this run was started with {changed_values(changed)}; give the old "
                    "values to go on with it, or another run_name to start a new run "
                    f"(load_parameters_path={self.path}/latest starts it from what this one has learned)."
                )
        write_atomically(self.config, config_yaml)


def changed_keys(saved_yaml: str, new_yaml: str, defaults: str = "") -> list[tuple[str, Any, Any]]:
    """The keys, sorted, whose values differ between two dumped configs and that change the numbers: each
    with both values, None where there is none. What the saved one lacks is taken from `defaults`."""
    saved, new, default = (yaml.safe_load(text) or {} for text in (saved_yaml, new_yaml, defaults))
    saved = default | saved
    missing = object()
    names = (saved.keys() | new.keys()) - MAY_CHANGE - _SHARES
    both = {name: (saved.get(name, missing), new.get(name, missing)) for name in sorted(names)}
    changed = [name for name, (old, now) in both.items() if _meant(name, old) != _meant(name, now)]
    return [(name, saved.get(name), new.get(name)) for name in changed]


def _meant(name: str, value: object) -> object:
    """One place is one value, however its path is written."""
    is_path = name.endswith(("_path", "_files", "_directory"))
    return os.path.abspath(value) if is_path and isinstance(value, str) and value else value


def _locked(path: Path) -> TextIO | None:
    """The file, open and locked, or None if another process has it, or has just removed its
    folder. A file system without locks has none."""
    try:
        lock = path.open("a")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = not os.fstat(lock.fileno()).st_nlink  # it was removed just now, with the run
    except BlockingIOError:
        held = True
    except OSError as error:
        lock.close()
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserError(f"{path} cannot be locked: {error.strerror}; see to the file server") from None
        return path.open("a")
    if held:
        lock.close()
    return None if held else lock


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that is whole: of a run that this process has, or had just now."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader, or a crash, sees the old file or the new one whole. It is on
    the disk when this returns, and what kills have left of earlier writes is gone."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two may write at one time
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        written = temporary.stat().st_mtime  # by the clock of the disk, which may be another machine's
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):
            if written - left.stat().st_mtime > _LEFT_S:
                left.unlink()
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise  # some shared disks know nothing of this for folders
    finally:
        os.close(descriptor)


def parse_json(text: str) -> Any:
    """As json.loads, but what is too large for Python's reader is a JSONDecodeError, too."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", text, 0) from None
    except ValueError:  # of integers alone
        digits = re.search(rf"\d{{{sys.get_int_max_str_digits() + 1}}}", text)
        at = digits.start() if digits else 0
        raise json.JSONDecodeError("a number of too many digits", text, at) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if there is none in the file."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes atomically, so that a reader never sees half a file, with the keys in their order."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class Metrics:
    """Writes the numbers of each step to metrics.jsonl and TensorBoard.

    A run that goes on after step `resume_step` loses the lines of later steps, which it will do again;
    so no step appears twice. A new run has `resume_step` 0 (steps count from 1).
    """

    def __init__(self, run: RunDir, resume_step: int = 0) -> None:
        from tensorboardX import SummaryWriter  # here: a library's user may have torch, which it imports

        _drop_lines_after(run.metrics, resume_step)
        self._file = run.metrics.open("a", encoding="utf-8")
        purge = resume_step + 1 if any(run.tensorboard.glob("events.*")) else None
        # The suffix keeps apart the files of two starts within one second, which else have one name.
        self._tensorboard = SummaryWriter(
            str(run.tensorboard), purge_step=purge, flush_secs=5, filename_suffix=f".from{resume_step}"
        )

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """One step's numbers. NaN and infinity, which JSON lacks, become null in metrics.jsonl."""
        numbers = {name: _number(value) for name, value in values.items()}
        line = {"step": step} | {name: v if math.isfinite(v) else None for name, v in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, step)

    def sync(self) -> None:
        """metrics.jsonl stays if the machine goes: a mounted bucket else gets a file when it is closed."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _number(value: Any) -> int | float:
    """A Python number of a Python, numpy or JAX scalar."""
    return value if isinstance(value, int) else value.item() if hasattr(value, "item") else float(value)


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break  # the last line of a killed process, cut off while it was written
        try:
            line_step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a line of metrics; remove the line.") from None
        if line_step <= step:
            kept.append(line)
    write_atomically(path, "".join(kept))
