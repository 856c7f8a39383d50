"""The memory of a step of Llama-3.1-8B on a v6e-8, ours and MaxText's, compiled by the same JAX and libtpu.

    python benchmarks/plan_maxtext.py [ROWS ...]

Two minutes a program on one core. Nothing runs. MaxText is measured as it is, and with its loss cut into
eight parts (`num_vocab_tiling=8`); it is installed into .venv-maxtext at the first use.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common

RECIPE = common.REPO / "recipes" / "llama3.1-8b-sft-v6e-8.yml"
TOPOLOGY = "v6e-8"
SHARED = (  # what both call by one name; the rest is as MaxText has it
    "model_name",
    "max_target_length",
    "ici_fsdp_parallelism",
    "ici_expert_parallelism",
    "remat_policy",
)
PEERS = {"maxtext": (), "maxtext_tiled": ("num_vocab_tiling=8",)}


def ours(rows: str) -> dict[str, int]:
    """Bytes of a chip: at the peak, of the arguments, and what XLA calls the size of the temporaries."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        words = ["plan", RECIPE, f"topology={TOPOLOGY}", f"per_device_batch_size={rows}", "--json", file]
        command = [common.PYTHON, "-m", "distillax", *map(str, words)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        found = json.loads(file.read_text(encoding="utf-8"))
    if not found["fits"]:
        return {}
    peak, temporaries = found["peak_bytes"], found["temporary_bytes"]
    return {"peak": peak, "temporaries": temporaries, "temp_size_in_bytes": found["temp_size_in_bytes"]}


def peers(folder: Path, *keys: str) -> dict[str, int]:
    """The same of MaxText; empty if it does not fit."""
    command = [common.PYTHON, str(common.REPO / "benchmarks" / "peer_maxtext.py"), *keys]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["fits"]:
        return {}
    peak, count = found["peak_memory_in_bytes"], found["temp_size_in_bytes"]
    return {
        "peak": peak,
        "temporaries": peak - found["argument_size_in_bytes"],
        "temp_size_in_bytes": count,
    }


def environment() -> Path:
    """A folder with MaxText and what it lacks beside our own packages, JAX and libtpu among them."""
    folder = common.REPO / ".venv-maxtext"
    if not (folder / ".done").exists():
        # The release asks for Python 3.12; the modules that it compiles this step with take 3.11 too.
        options = ["--quiet", "--no-deps", "--ignore-requires-python", "--target", str(folder)]
        listed = str(common.REPO / "benchmarks" / "maxtext.txt")
        subprocess.run([common.PYTHON, "-m", "pip", "install", *options, "-r", listed], check=True)
        (folder / ".done").touch()
    return folder


def main(*numbers: str) -> None:
    from distillax.config import PlanConfig
    from distillax.plan.chips import find_topology, prepare
    from distillax.settings import load_config

    prepare(find_topology(TOPOLOGY))  # the environment of all that is started here
    config = load_config(PlanConfig, str(RECIPE), [f"topology={TOPOLOGY}"])
    shared = [f"compile_topology={TOPOLOGY}", *(f"{key}={getattr(config, key)}" for key in SHARED)]
    folder = environment()
    for rows in numbers or ("2", "8", "12", "16"):
        own = ours(rows)
        common.report("plan_maxtext", {"rows": int(rows), "distillax": own or "does not fit"})
        for name, keys in PEERS.items():
            peer = peers(folder, f"per_device_batch_size={rows}", *shared, *keys)
            ratios = {key: round(own[key] / peer[key], 3) for key in own if peer}
            figures = {"rows": int(rows), name: peer or "does not fit", "distillax_over_it": ratios}
            common.report("plan_maxtext", figures)


if __name__ == "__main__":
    main(*sys.argv[1:])
