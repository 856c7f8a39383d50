"""What a teacher in 8 bits costs: KL to itself as it is, on held-out answers, and the bytes of its weights.

    python benchmarks/int8.py

SmolLM2 on its own answers to real questions. KL(bfloat16 || int8) is by how much a student's teacher
changes. For scale, KL(float32 || bfloat16) is what computing in bfloat16 costs (the weights are bfloat16 in
all three), and KL(float32 || int8) has both errors.
"""

from collections import Counter
from typing import Any

import common
import quality

LENGTH, ROWS = 256, 4


def main() -> None:
    import jax
    import jax.numpy as jnp

    from distillax.checkpoints.source import find
    from distillax.data.batches import make_batches
    from distillax.data.examples import load_examples
    from distillax.train.objectives import Compute, Setup, measure_batch

    folder, tokenizer = common.smollm2()
    root = folder.parent / "quality"
    root.mkdir(exist_ok=True)
    (held_out,) = quality.answers(folder, root, ("held_out",))
    examples = load_examples(str(held_out), tokenizer)
    source = find(folder)
    weights: dict[str, Any] = {
        "float32": source.params("float32"),
        "bfloat16": source.params("bfloat16"),
        "int8": source.params("bfloat16", quantization="int8"),
    }
    weights = {name: jax.tree.map(jnp.asarray, params) for name, params in weights.items()}
    compute = {name: Compute("float32" if name == "float32" else "bfloat16") for name in weights}

    def distance(one: str, other: str) -> dict[str, float]:
        """KL(one || other) in nats a token, and the share of tokens whose likeliest id they agree on."""
        setup = Setup(source.config, compute[other], source.config, compute[one])
        total: Counter[str] = Counter()
        batches = make_batches(
            examples,
            examples.encode,
            batch_size=ROWS,
            max_target_length=LENGTH,
            packing=True,
            shuffle_seed=None,
            overlong="drop",
            num_epochs=1,
        )
        for batch in batches:
            arrays = {name: jnp.asarray(value) for name, value in batch.items()}
            _, tokens, terms = measure_batch(weights[other], weights[one], arrays, None, setup=setup)
            total.update({name: float(value) for name, value in {**terms, "tokens": tokens}.items()})
        batches.close()
        tokens = total["tokens"]
        return {
            "tokens": int(tokens),
            "nll": round(total["nll"] / tokens, 5),
            "kl": round(total["kl_teacher_student"] / tokens, 6),
            "top1_agreement": round(total["top1_agreement"] / tokens, 4),
        }

    for one, other in (("float32", "bfloat16"), ("float32", "int8"), ("bfloat16", "int8")):
        common.report("int8", {"of": f"{one} || {other}", **distance(one, other)})
    sizes = {name: sum(x.nbytes for x in jax.tree.leaves(params)) for name, params in weights.items()}
    layers = {name: sum(x.nbytes for x in jax.tree.leaves(p["layers"])) for name, p in weights.items()}
    common.report("int8", {"bytes": sizes, "bytes_of_layers": layers})


if __name__ == "__main__":
    main()
