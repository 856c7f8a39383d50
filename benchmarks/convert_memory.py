"""Peak memory of Hugging Face -> Orbax -> Hugging Face, against the largest stacked tensor.

    python benchmarks/convert_memory.py [MODEL_NAME] [--folder DIR]

Writes a checkpoint of random bytes at the shape of a preset (default llama3.2-1b, bfloat16),
converts it there and back in processes of their own, compares every byte, and prints the peak
resident memory of each. Exits with 1 if one goes beyond the largest stacked tensor plus 2 GB.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from distillax.checkpoints.huggingface import FolderSource, write_folder
from distillax.models.families import param_specs, preset
from distillax.models.spec import iter_specs

ALLOWANCE = 2_000_000_000


def write_random(folder: Path, model_name: str) -> int:
    """A checkpoint of random bfloat16 numbers. Returns the bytes of the largest stacked tensor."""
    config = preset(model_name)
    shapes = {path: spec.full_shape(config.layers) for path, spec in iter_specs(param_specs(config))}
    block = np.random.default_rng(0).normal(size=1_000_003).astype(ml_dtypes.bfloat16)

    def read(path: tuple[str, ...], layer: int | None) -> np.ndarray:
        shape = shapes[path] if layer is None else shapes[path][1:]
        return np.resize(np.roll(block, len("".join(path)) + 101 * (layer or 0)), shape)

    write_folder(folder, config, read, lambda path: np.dtype(ml_dtypes.bfloat16))
    return max(math.prod(shape) * 2 for shape in shapes.values())


def peak_of(code: str) -> tuple[int, float]:
    """Runs Python code in a process of its own; its peak resident bytes and seconds."""
    report = "\nfrom resource import *; print(getrusage(RUSAGE_SELF).ru_maxrss * 1024)"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code + report], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1]), time.monotonic() - start


def measure(model_name: str, root: Path) -> dict[str, float]:
    source, orbax, back = root / "source", root / "orbax", root / "back"
    largest = write_random(source, model_name)
    call = "from distillax.checkpoints import convert; convert.{}({!r}, {!r})"
    there, there_s = peak_of(call.format("to_orbax", str(source), str(orbax)))
    again, again_s = peak_of(call.format("to_hf", str(orbax), str(back)))
    before, after = FolderSource(source), FolderSource(back)
    assert set(before.names()) == set(after.names())
    for name in before.names():
        a, b = before.read(name), after.read(name)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), f"{name} differs"
    return {
        "largest_stacked_gb": largest / 1e9,
        "to_orbax_peak_gb": there / 1e9,
        "to_orbax_s": there_s,
        "to_hf_peak_gb": again / 1e9,
        "to_hf_s": again_s,
        "bound_gb": (largest + ALLOWANCE) / 1e9,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_name", nargs="?", default="llama3.2-1b")
    parser.add_argument("--folder", help="where to write the checkpoints (default: a temporary folder)")
    args = parser.parse_args()
    root = Path(args.folder or tempfile.mkdtemp(prefix="distillax-convert-"))
    try:
        figures = measure(args.model_name, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps({"model": args.model_name, **{k: round(v, 2) for k, v in figures.items()}}))
    return int(max(figures["to_orbax_peak_gb"], figures["to_hf_peak_gb"]) > figures["bound_gb"])


if __name__ == "__main__":
    sys.exit(main())
