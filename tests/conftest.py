"""What every test shares: strict JAX on the CPU, a compilation cache, and the real models.

The settings are environment variables, set before anything imports JAX, so that programs that tests start
have them too.
"""

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
PARTS = REPO / ".cache" / "parts"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(REPO / ".cache" / "jax-tests")
# Of programs that tests start, many compile the same: all is kept for them, and in the tests what is slow.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["HF_HUB_OFFLINE"] = "1"
# torch's threads would spin while they wait, on cores that the other worker's tests need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO / "src"), os.environ.get("PYTHONPATH")]))

# Where a shell started the tests in the background, Ctrl-C is ignored, and would be by all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import parts  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# A program of a tiny model takes longer to compile than to run, so it is compiled at the least cost, here and
# in programs that tests start. `optimised` is for tests of which that is not true, or to which it matters.
LEAST = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
get_compile_options = compiler.get_compile_options


def at_least_cost(*arguments: Any, backend: Any = None, **more: Any) -> Any:
    options = get_compile_options(*arguments, backend=backend, **more)
    if (
        jax.config.read("jax_disable_most_optimizations")
        and backend is not None
        and backend.platform == "cpu"
    ):
        options.env_option_overrides = [
            *options.env_option_overrides,
            ("xla_cpu_use_fusion_emitters", "False"),
        ]
    return options


if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_disable_most_optimizations", True)
    compiler.get_compile_options = at_least_cost
    jax.devices()  # XLA reads its flags once: these are for the programs that tests start
    os.environ |= LEAST

# Files that take minutes. They go first, so that no worker is left alone with one at the end.
LONG = (
    "scale",
    "pipeline",
    "real_models",
    "offline",
    "train",
    "plan",
    "online",
    "generate",
    "quantize",
    "capture",
    "readme",
    "evaluate",
    "gpu",
    "vllm",
    "convert",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def optimised(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests of a real model, and those marked so, have programs compiled as users have them."""
    real = {"smollm2_gguf", "smollm2_folder", "gemma3_gguf"}.intersection(request.fixturenames)
    if not real and not request.node.get_closest_marker("optimised"):
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    for name in LEAST:
        monkeypatch.delenv(name, raising=False)
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: a real chat model."""
    return parts.smollm2_gguf()


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma 3 270M, Q4_K_M: a real base model, without a chat template."""
    return parts.gemma3_gguf()


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16, converted once per state of the code."""
    from distillax.checkpoints.convert import to_hf

    source = REPO / "src" / "distillax"
    code = sorted([*source.glob("checkpoints/*.py"), *source.glob("models/*.py")])
    fingerprint = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:12]
    folder = PARTS / f"smollm2-135m-instruct-{fingerprint}"
    if folder.is_dir():
        return folder
    for old in PARTS.glob("smollm2-135m-instruct-*"):
        if time.time() - old.stat().st_mtime > 3600:  # younger: another run may be reading it
            shutil.rmtree(old, ignore_errors=True)
    unfinished = PARTS / f"smollm2-135m-instruct-unfinished-{os.getpid()}"
    to_hf(str(smollm2_gguf), str(unfinished), dtype="bfloat16")
    try:
        os.replace(unfinished, folder)
    except OSError:  # another run was faster
        shutil.rmtree(unfinished)
    return folder
