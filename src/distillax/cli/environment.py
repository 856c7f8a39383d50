"""What must be set before JAX and its friends are imported: quiet third parties, kept compilations."""

import glob
import hashlib
import logging
import os
import platform
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia*", "kfd")  # TPUs, and GPUs of either make
_HEAVY = {"train", "run", "generate", "capture", "evaluate"}  # commands worth a start of 20 ms more
_WITH_TOKENIZERS = _HEAVY | {"convert", "prune"}


def prepare() -> None:
    """Sets the environment of this process; what the user has set wins."""
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA: errors only
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # such as that there is no PyTorch
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    if not sys.stderr.isatty():
        defaults |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := cache_folder()):
        # Without JAX's limit of its size: with one, no more is kept beside what was kept without one.
        defaults["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    if find_spec("libtpu") and not any(glob.glob(f"/dev/{name}") for name in _ACCELERATORS):
        defaults["JAX_PLATFORMS"] = "cpu"  # it is here for plans; without a TPU it complains, at length
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax and Grain


def say_warnings_once() -> None:
    """The hub's library prints its warnings itself, and a handler at the root would again. For a process
    of ours alone."""
    logging.getLogger("huggingface_hub").propagate = False


def leave_torch_out(command: str) -> None:
    """Imports what would import PyTorch, where it is installed, as if it were not: transformers does to read
    a tokenizer, which takes seconds, and nothing here uses it. For a process of ours alone."""
    if command not in _WITH_TOKENIZERS or "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from transformers.utils.import_utils import is_torch_available

        is_torch_available()  # which keeps its answer
        if command in ("train", "run"):
            import tensorboardX  # noqa: F401
    finally:
        del sys.modules["torch"]  # others, such as datasets, import it where it is in sys.modules


def use_huge_pages(command: list[str]) -> None:
    """Starts this process anew with glibc asking for huge pages, which must be said before it starts.

    They make a training step faster on a CPU. Where the kernel gives them unasked, or not at all, or
    the user has settings of their own, nothing happens; what this process starts does not inherit it.
    """
    if os.environ.get("GLIBC_TUNABLES") == _HUGE_PAGES:
        del os.environ["GLIBC_TUNABLES"]
        return
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not command or command[0] not in _HEAVY or "GLIBC_TUNABLES" in os.environ or not setting.is_file():
        return
    if "[madvise]" in setting.read_text(encoding="ascii"):
        os.environ["GLIBC_TUNABLES"] = _HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cache_folder() -> Path | None:
    """Where compiled programs are kept, or None if they cannot be.

    One folder a jaxlib and a kind of CPU: a program compiled for another CPU may crash on this one.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="ignore").splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    cpu = hashlib.sha256(f"{platform.machine()} {platform.processor()} {flags}".encode()).hexdigest()[:8]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "distillax" / "jax" / f"{version('jaxlib')}-{cpu}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder
