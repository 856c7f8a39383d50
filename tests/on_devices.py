"""What the commands of one process compute with all of its devices: test_devices.py runs it in a process with
several simulated ones, since their number is said before JAX starts. Prints what came of it as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import jax

import distillax
from distillax.evaluate import Expected, evaluate
from distillax.models.generate import Engine
from distillax.models.spec import Tree
from distillax.teachers import forward
from distillax.teachers.capture import CaptureConfig, capture


def largest_part(params: Tree) -> float:
    """Of the matrices, the greatest part that a device holds."""
    matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.size > 1000]
    return max(shard.data.size / leaf.size for leaf in matrices for shard in leaf.addressable_shards)


def main(world: Path, output: Path) -> dict[str, Any]:
    data, found = str(world / "data.jsonl"), {}
    models = [distillax.load(world / name) for name in ("student", "teacher")]
    found["parts"] = [largest_part(model.params) for model in models]
    chunk, kept = forward._chunk, []

    def watched(*arguments: Any) -> Any:
        kept.append(largest_part({"head": arguments[2]}))
        return chunk(*arguments)

    forward._chunk = watched
    scores = [
        evaluate(models[0], data, teacher=models[1], dtype="float32", show_progress=False, expected=expected)
        for expected in (None, Expected())
    ]
    found["scores"] = [one.as_dict() for one in scores]
    for model, format, quantization in (
        ("teacher", "sampled", ""),
        ("softcap", "topk", ""),
        ("teacher", "sampled", "int8"),
    ):
        folder = output / f"{model}-{format}{quantization}"
        config = CaptureConfig(format=format, k=12, dtype="float32", teacher_quantization=quantization)
        capture(str(world / model), data, folder, config, show_progress=False)
    forward._chunk = chunk
    questions = [f"What is {i} plus {i % 7}?" + " Really?" * (i % 9) for i in range(40)]
    found["answers"] = [model.generate(questions, max_new_tokens=16, dtype="float32") for model in models]
    found["head"] = max(kept)
    engine = Engine(models[0].params, models[0].config, batch_size=2, max_length=32, dtype="float32")
    found["engine"] = largest_part({"gate": [layer["gate"] for layer in engine._weights["layers"]]})
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
