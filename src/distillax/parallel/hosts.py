"""Many hosts: one program, started on each, that joins the others before it touches a device.

Every host knows which documents each row of a global batch holds, and reads those of its devices' rows, so
that neither the data's order nor a checkpoint depends on how many hosts there are. Files and lines are
written by the first.
"""

import importlib.util
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from distillax.config import TrainConfig
from distillax.errors import Stopped, UserError, first_line, out_of_memory, without_secrets
from distillax.models.backend import from_jax

_HEARTBEAT_S = 30  # a host that is silent for so long is dead, and ends the run on the others
_LOOK_S = 1  # how often a process looks whether another one has stopped
_PATIENCE_S = 2  # how long the main thread has to act on a signal by itself
_TOO_EARLY = "stopped by SIGTERM before the first step of this start; the same command begins it again"
_PART_MS = 10_000  # how long one that stops waits for the others to say that they know
_FAILURE, _PARTING = "distillax/failure", "distillax/parting"
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # where XLA says that one of the processes has got SIGTERM
_TERMINATED = 128 + signal.SIGTERM
_stepped = threading.Event()  # this process, of several, has made its first step, and can save what it learns
_calls = itertools.count(1)  # of `_agreed`, in all trainings of this process
# What a collective says whose other end is gone.
_GONE = re.compile(r"Connection (reset|closed) by peer|Broken pipe|Connection refused|Socket closed", re.I)
_KEYS = ("coordinator_address", "process_count", "process_index")


def join(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Starts `jax.distributed` where the keys or the environment speak of several processes.

    Raises UserError if the keys do not go together, or the others cannot be reached.
    """
    fields = TrainConfig.model_fields
    said = config.model_fields_set if config.coordinator_address else ()
    given = [key for key in _KEYS if key in said or getattr(config, key) != fields[key].default]
    if given and len(given) < len(_KEYS):
        missing = " and ".join(name for name in _KEYS if name not in given)
        raise UserError(f"{' and '.join(given)} without {missing}; set all three, or none")
    if given and not 0 <= config.process_index < config.process_count:
        raise UserError(
            f"process_index={config.process_index}, but process_count={config.process_count}; "
            f"give each process its own number from 0 to {config.process_count - 1}"
        )
    alone = given and config.process_count == 1
    if alone or jax.distributed.is_initialized() or not (given or _is_cluster(environment)):
        return
    explicit: dict[str, Any] = {}
    if given:
        explicit = {
            "coordinator_address": config.coordinator_address,
            "num_processes": config.process_count,
            "process_id": config.process_index,
        }
    try:
        jax.distributed.initialize(
            **explicit,
            local_device_ids=_local_gpus(environment),
            initialization_timeout=config.jax_distributed_initialization_timeout,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        where = config.coordinator_address or "the coordinator that the environment names"
        raise UserError(f"cannot join the other processes at {where}: {first_line(error)}") from None
    if jax.default_backend() == "gpu" and "JAX_ENABLE_COMPILATION_CACHE" not in environment:
        # Processes that compile a program for GPUs share its tuning out, and wait up to a day for what others
        # find (xla_gpu_shard_autotuning). One that has the program already finds nothing: the first, which
        # alone writes to the cache, where the others have folders of their own; or any, if another run wrote
        # it a moment ago. To tune each alone would be worse: programs that differ hang in their collectives.
        jax.config.update("jax_enable_compilation_cache", False)


@contextmanager
def joined(config: TrainConfig) -> Iterator[None]:
    """The processes of a run, together from `join` on. What one of them raises ends them all, and so does
    SIGTERM until their first step.

    The others end as processes, with its sentence on stderr and its exit code: who waits in a collective
    for a host that has stopped does not come back to Python.
    """
    join(config)
    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    _stepped.clear()
    watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
    watcher.start()
    try:
        yield
    except Stopped:
        raise  # on every process alike
    except BaseException as error:
        over.set()
        watcher.join()  # which does not return if another one has failed before: the process ends there
        lost = isinstance(error, jax.errors.JaxRuntimeError) and _GONE.search(str(error))
        if not lost:
            _tell(error, config)
            raise
        _end_if_told()  # it may have said why
        told = UserError(
            f"another process of this run is gone ({first_line(error)}); start them all again: the run goes "
            "on from its last checkpoint"
        )
        _tell(told, config)
        raise told from error
    finally:
        over.set()
        watcher.join()


def _coordinator() -> Any:
    """What the processes share before and beside any collective: a store of strings, and barriers. JAX
    has no public name for it."""
    return from_jax("jax._src.distributed", "global_state").client


def _tell(error: BaseException, config: TrainConfig) -> None:
    """Tells the other processes why this one stops, and parts from them."""
    code, text = 1, f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if isinstance(error, UserError):
        code, text = 2, str(error)
    elif memory := out_of_memory(error):
        code, text = 2, memory
    elif isinstance(error, KeyboardInterrupt):
        code, text = 130, "interrupted"
    token = config.hf_access_token.get_secret_value() if config.hf_access_token else ""
    said = json.dumps([jax.process_index(), code, without_secrets(text, [token])])
    with suppress(jax.errors.JaxRuntimeError):  # another one was first, or the coordinator is gone
        _coordinator().key_value_set(_FAILURE, said)
    _part()


def _watch(over: threading.Event) -> None:
    """Looks whether another process has stopped, or any has got SIGTERM while this one has not made a step,
    and then ends this one. None of them has learned anything that could be lost, and reading the data and
    compiling may take longer than they have."""
    while not over.wait(_LOOK_S):
        if not _stepped.is_set() and _said(_NOTICE) is not None:
            with suppress(jax.errors.JaxRuntimeError):  # another one was first
                _coordinator().key_value_set(_FAILURE, json.dumps([0, _TERMINATED, _TOO_EARLY]))
        _end_if_told()


def _said(key: str) -> str | None:
    """What a process has said to all under a name. None if nobody has, or the coordinator is gone, which JAX
    sees itself."""
    with suppress(jax.errors.JaxRuntimeError):
        return _coordinator().key_value_try_get(key)


def _end_if_told() -> None:
    """Ends this process if another one has said why it stops."""
    if (said := _said(_FAILURE)) is None:
        return
    index, code, text = json.loads(said)
    who = f"process {index}" if index else "the first process"
    line = text if code == _TERMINATED else f"error: {who} stopped: {text}"
    with suppress(OSError):  # nobody may read it any more
        print(f"distillax: {line}", file=sys.stderr, flush=True)
    _part()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _part() -> None:
    """Leaves the others in good order, all at once: JAX would take who goes first for dead, and end the
    rest in its own way. If one of them is dead already, that is what happens."""
    # A checkpoint that waits for the others in the background fails by this, and would say so at length.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with suppress(jax.errors.JaxRuntimeError):
        _coordinator().wait_at_barrier(_PARTING, _PART_MS)
        jax.distributed.shutdown()


def _is_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several processes, by what TPU slices, Slurm and JAX itself leave in the
    environment, or by the metadata of a TPU VM. jax.distributed then finds out the rest."""
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return True
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # started by srun, not by sbatch itself
        return True
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return True
    if "TPU_WORKER_HOSTNAMES" in environment:
        return "," in environment["TPU_WORKER_HOSTNAMES"]
    if "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu"):
        return False
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in environment:  # no TPU
        return False
    try:  # a TPU VM of Compute Engine, which JAX recognises; where there is no TPU it asks nobody
        cluster = from_jax("jax._src.clusters.cloud_tpu_cluster", "GceTpuCluster")
        return cluster.is_env_present() and cluster.get_process_count() > 1
    except OSError:  # a TPU without that server
        return False


def _local_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of a process that Slurm started, of those that it sees: JAX would take that of its number on
    the node, be it the only process there, or the only GPU that it sees. None leaves it to JAX."""
    visible = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("SLURM_STEP_GPUS", "")
    if "SLURM_LOCALID" not in environment or "JAX_LOCAL_DEVICE_IDS" in environment or not visible:
        return None
    number = len(visible.split(","))
    alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return list(range(number)) if alone or number == 1 else None


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def from_first(number: int) -> int:
    """The first process's number, on every process: what each finds on a shared disk may differ."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def same_for_all(
    name: str, what: str, advice: str = "the same: name a step, or download the model once"
) -> None:
    """Raises UserError if a name is not the same on every process."""
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.uint32(zlib.crc32(name.encode())))
    if len(set(np.asarray(found).tolist())) > 1:
        raise UserError(
            f"the processes read different versions of {what} (this one: {name}); every host needs {advice}"
        )


def from_all(part: np.ndarray, rows: int) -> np.ndarray:
    """[rows, ...] of which each of n processes has every n-th, from its own number on. All must have the same
    `rows`."""
    count, tail = jax.process_count(), part.shape[1:]
    padded = np.zeros((-(-rows // count), *tail), part.dtype)
    padded[: len(part)] = part
    parts = np.asarray(multihost_utils.process_allgather(padded)).reshape(count, -1, *tail)
    return np.moveaxis(parts, 0, 1).reshape(-1, *tail)[:rows]


def own_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    """bool, of `shape` less its last axis: the rows that this process's devices hold some of."""
    mine = np.zeros(shape[:-1], bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        assert index is not None
        mine[index[:-1]] = True
    return mine


def global_array(sharding: NamedSharding, whole: np.ndarray) -> jax.Array:
    """An array of which every process holds its own rows, in their places -> one split over all devices."""
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _listen(acted: Callable[[], bool]) -> Callable[[], None]:
    """Ends the process on SIGTERM if the main thread has not `acted` on it in time: Python's handlers wait
    for that thread, which may be in a compilation. Returns what ends the watch."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # gets the number of every signal

    def watch() -> None:
        while (number := os.read(reader, 1)) != b"":
            if number[0] == signal.SIGTERM and not acted():
                time.sleep(_PATIENCE_S)
                if not acted():
                    os.write(2, f"\ndistillax: {_TOO_EARLY}\n".encode())
                    os._exit(0)
        os.close(reader)

    def end() -> None:
        signal.set_wakeup_fd(before)
        os.close(writer)

    threading.Thread(target=watch, daemon=True).start()
    return end


def _agreed(step: int) -> int:
    """SIGTERM on every process after the same step, once any has got it; else 0.

    jax.distributed has a handler of its own, and lets them agree on the next call of the one that is ahead.
    Calls are counted, not steps, as it takes those without any to be at 0; and on from one training to the
    next, as it takes those to be where the last one ended."""
    _stepped.set()
    return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(next(_calls)) else 0


@contextmanager
def stopping() -> Iterator[Callable[[int], int]]:
    """Yields a function of the step, which gives the signal that asked to stop after it, or 0: SIGTERM, as a
    machine is sent that is about to be taken away, on every process alike; or, of one process alone and from
    the function's first call on, SIGINT (Ctrl-C), which before it and a second time does what it did before.

    Of one process, raises Stopped or KeyboardInterrupt at the end for a signal that came after the last call;
    and Stopped at once for SIGTERM before the first, which, where the main thread does not hear it, as it
    compiles, ends the process with code 0: nothing has been learned that could be lost. Several end before
    the first call with code 143 (`joined`), and do not heed what comes after the last."""
    if jax.process_count() > 1:
        yield _agreed
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: 0  # handlers belong to the main thread, and so to who called us
        return
    told: list[int] = []  # appending takes no lock, so that a second signal may come at any time
    asked = heard = interrupted = False
    interrupt = signal.getsignal(signal.SIGINT)

    def stop(step: int) -> int:
        nonlocal asked, heard
        asked, heard = True, bool(told)
        return told[0] if told else 0

    def handle(number: int, frame: Any) -> Any:
        nonlocal heard, interrupted
        if number == signal.SIGTERM and not (told or asked):
            told.append(number)
            heard = True
            raise Stopped(_TOO_EARLY)
        if number == signal.SIGINT and (told or not asked):  # before the first step there is nothing to save
            interrupted = True
            if callable(interrupt):
                return interrupt(number, frame)
            raise KeyboardInterrupt
        told.append(number)
        if number == signal.SIGINT:
            with suppress(OSError):  # a pipe whose reader was interrupted, too
                os.write(2, b"\ndistillax: stopping after this step, to save; Ctrl-C again stops at once\n")

    ignored = interrupt in (signal.SIG_IGN, None)  # as under nohup, or in a script's &
    numbers = [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGINT]
    before = [signal.signal(number, handle) for number in numbers]
    end = _listen(lambda: asked or heard)
    try:
        yield stop
    except Exception as error:  # what a library made of the one that a handler had raised in the midst of it
        if isinstance(error, Stopped) or not (interrupted or (told and not asked)):
            raise
        raise (KeyboardInterrupt if interrupted else Stopped(_TOO_EARLY)) from None
    finally:
        end()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)
    if told and not heard:  # after the last step, while its checkpoint was written
        raise (
            KeyboardInterrupt if signal.SIGINT in told else Stopped("stopped by SIGTERM after the last step")
        )
