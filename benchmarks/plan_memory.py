"""Whether a plan is honest: the peak that it predicts for this machine, against the one that is measured.

    python benchmarks/plan_memory.py

The step of several recipes is compiled for one CPU device, its arguments are made, and it is run. What the
process then holds at its peak, less what it held once the program was compiled, is what was predicted.
Exits with 1 if planned over measured is beyond 0.85 to 1.15 in any case.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

CASES = {
    "sft, 4 rows of 512": ("sft", "per_device_batch_size=4", "max_target_length=512", "remat_policy=none"),
    "sft, remat": ("sft", "per_device_batch_size=16", "max_target_length=512", "remat_policy=full"),
    "online, 4 rows of 512": (
        *("online", "teacher_model_name=smollm2-135m", "per_device_batch_size=4", "max_target_length=512"),
        "remat_policy=none",
    ),
    "sft, 4 devices": ("sft", "topology=cpu-4", "ici_fsdp_parallelism=-1", "max_target_length=512"),
    "online, int8 teacher": (
        *("online", "teacher_model_name=smollm2-360m", "teacher_quantization=int8", "max_target_length=512"),
        *("per_device_batch_size=2", "gradient_accumulation_steps=2"),
    ),
}
LEAST, MOST = 0.85, 1.15  # planned over measured
USUAL = ("model_name=smollm2-135m", "topology=cpu-1", "dtype=bfloat16")


def main() -> int:
    honest = True
    for name, (method, *keys) in CASES.items():
        words = [str(common.REPO / f"recipes/{method}.yml"), *USUAL, *keys]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.json"
            command = [common.PYTHON, "-m", "distillax", "plan", *words, "--json", str(file)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            plan = json.loads(file.read_text(encoding="utf-8"))
            planned = plan["peak_bytes"] * plan["devices"]  # they share this machine's memory
        done = subprocess.run(
            [common.PYTHON, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
        )
        measured = int(done.stdout.splitlines()[-1])
        figures = {"case": name, "planned_gb": planned / 1e9, "measured_gb": measured / 1e9}
        ratio = planned / measured
        common.report("plan_memory", {**figures, "planned_over_measured": ratio})
        honest = honest and LEAST <= ratio <= MOST
    return 0 if honest else 1


def measure(words: list[str]) -> int:
    """Bytes that the steps of a run hold at their peak."""
    import jax
    import numpy as np

    from distillax.config import PlanConfig
    from distillax.plan.chips import find_topology, prepare
    from distillax.plan.program import trace_step
    from distillax.settings import load_config

    config = load_config(PlanConfig, words[0], words[1:])
    topology = find_topology(config.topology)
    prepare(topology)
    step = trace_step(config, topology)
    compiled = step.lowered.compile()
    before = common.resident("VmRSS")

    def make(x: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.ones(x.shape, x.dtype) if x.dtype == np.float32 else np.zeros(x.shape, x.dtype)
        return jax.device_put(values, x.sharding)

    state, teacher, batch, knobs = jax.tree.map(make, step.arguments)
    common.forget_peak()
    for _ in range(3):
        state, metrics = compiled(state, teacher, batch, knobs)
        jax.block_until_ready((state, metrics))
    return common.resident("VmHWM") - before


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(main())
    else:
        result: Any = measure(sys.argv[1:])
        print(result)
