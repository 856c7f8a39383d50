"""Memory that loading, saving and restoring a model on a mesh take beside the arrays themselves.

    python benchmarks/restore_memory.py [MODEL_NAME] [--devices N] [--dtype float32] [--moments]

Writes a bfloat16 checkpoint of random numbers at the shape of a preset (default llama3.2-1b). Processes of
their own, with N simulated devices (default 4), load it over fsdp, save it as a run does, and restore that on
the same mesh and on another, of fsdp and tensor. `--moments` adds Adam's. Each figure is the peak of resident
memory, less what was resident before and less the bytes of the arrays that were made.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_name", nargs="?", default="llama3.2-1b")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", help="that the parameters have in memory")
    parser.add_argument("--moments", action="store_true", help="with Adam's moments, in the same dtype")
    parser.add_argument("--folder", help="where to write the checkpoints (default: a temporary folder)")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(PHASES[args.phase](args)))
        return
    from convert_memory import write_random

    args.folder = args.folder or tempfile.mkdtemp(prefix="distillax-restore-")
    try:
        figures: dict[str, Any] = {
            "largest_stacked_gb": write_random(Path(args.folder) / "hf", args.model_name)
        }
        for phase in PHASES:
            figures |= in_a_process(args, phase)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    figures = {name: round(x / 1e9 if name.endswith("_gb") else x, 2) for name, x in figures.items()}
    setting = {
        "model": args.model_name,
        "devices": args.devices,
        "dtype": args.dtype,
        "moments": args.moments,
    }
    common.report("restore_memory", setting | figures)


def in_a_process(args: argparse.Namespace, phase: str) -> dict[str, float]:
    words = [args.model_name, "--devices", args.devices, "--dtype", args.dtype, "--folder", args.folder]
    words += ["--phase", phase, *(["--moments"] if args.moments else [])]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={args.devices}"}
    command = [common.PYTHON, __file__, *map(str, words)]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | flags,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measured(make: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `make` gives, the bytes that it took at its peak beside that, and seconds."""
    import jax

    common.forget_peak()
    before, start = common.resident("VmRSS"), time.monotonic()
    made = jax.block_until_ready(make())
    arrays = [leaf for leaf in jax.tree.leaves(made) if isinstance(leaf, jax.Array)]
    held = sum(shard.data.nbytes for leaf in arrays for shard in leaf.addressable_shards)
    return made, common.resident("VmHWM") - before - held, time.monotonic() - start


def described(args: argparse.Namespace, **axes: int) -> tuple[Any, Any, Any]:
    """The mesh of these axes, and parameters and moments as they lie on it."""
    import jax

    from distillax.config import TrainConfig
    from distillax.models.families import preset
    from distillax.parallel.mesh import make_mesh
    from distillax.parallel.weights import abstract_weights

    keys = {f"ici_{axis}_parallelism": size for axis, size in axes.items()}
    mesh = make_mesh(TrainConfig.model_validate(keys))
    params = abstract_weights(preset(args.model_name), args.dtype, mesh)
    return mesh, params, (params, params) if args.moments else {"count": jax.numpy.zeros((), "int32")}


def load_and_save(args: argparse.Namespace) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from distillax.checkpoints.source import find
    from distillax.checkpoints.state import RunCheckpoints
    from distillax.parallel.weights import place

    folder = Path(args.folder)
    mesh, _, moments = described(args, fsdp=args.devices)
    with jax.set_mesh(mesh):
        source = find(folder / "hf")
        params, load, load_s = measured(lambda: place(source, args.dtype, mesh))
        if args.moments:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, moments)
            moments = jax.jit(lambda p: (p, jax.tree.map(jnp.square, p)), out_shardings=shardings)(params)

        def save() -> None:
            with RunCheckpoints(folder / "run", keep=1) as checkpoints:
                checkpoints.save(1, params, moments, {})

        _, saving, save_s = measured(save)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((params, moments)))
    figures = {"state_gb": held, "load_gb": load, "load_s": load_s, "save_gb": saving, "save_s": save_s}
    (folder / "check.json").write_text(json.dumps(check(params)))
    shutil.rmtree(folder / "hf")  # room on the disk
    return figures


def restore(args: argparse.Namespace, name: str, **axes: int) -> dict[str, float]:
    import jax

    from distillax.checkpoints.state import RunCheckpoints

    mesh, params, moments = described(args, **axes)
    with jax.set_mesh(mesh), RunCheckpoints(Path(args.folder) / "run", keep=1) as checkpoints:
        found, beside, seconds = measured(lambda: checkpoints.restore(1, params, moments))
    assert check(found[0]) == json.loads((Path(args.folder) / "check.json").read_text())
    return {f"{name}_gb": beside, f"{name}_s": seconds}


def check(params: Any) -> list[int]:
    """A number of each parameter that changes with its bits."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def bits(x: jax.Array) -> jax.Array:
        kind = jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32
        return jnp.sum(jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32), dtype=jnp.uint32)

    return [int(bits(leaf)) for leaf in jax.tree.leaves(params)]


PHASES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "load_and_save": load_and_save,
    "restore": lambda args: restore(args, "restore", fsdp=args.devices),
    "elsewhere": lambda args: restore(args, "restore_elsewhere", fsdp=args.devices // 2, tensor=2),
}

if __name__ == "__main__":
    main()
