"""Which layers a cut model should keep: its KL to the teacher after a short training.

    python benchmarks/prune.py [--steps 200] [--layers 12] [--rate 1e-3]

SmolLM2 (30 layers), cut to so many, matches the whole model's logits on its answers (one packed row of 512
tokens a step): with the layers of `distillax prune --layers`, which are spread evenly, and with others that
the literature has. A run of 200 steps takes some minutes on two cores; what was measured is kept, as by
quality.py.
"""

import argparse

import common
import quality

from distillax.checkpoints.prune import layers_to_keep

TOTAL, ANSWERS = 30, 8


def choices(layers: int) -> dict[str, list[int]]:
    """The layers that are kept, by the name of the rule."""
    third = layers // 3
    return {
        "evenly spread": layers_to_keep(TOTAL, layers),
        "the first two, the last two, and evenly between": [
            *(0, 1),
            *(1 + i for i in layers_to_keep(TOTAL - 2, layers - 2)[1:-1]),
            *(TOTAL - 2, TOTAL - 1),
        ],
        "the first and the last two": [*range(layers - 2), TOTAL - 2, TOTAL - 1],
        "two thirds at the start, a third at the end": [*range(layers - third), *range(TOTAL - third, TOTAL)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rate", default="1e-3", help="learning rate")
    args = parser.parse_args()
    teacher, _, folder = quality.models()
    data, _ = quality.answers(teacher, folder, generations=ANSWERS)
    for name, kept in choices(args.layers).items():
        row = {"way": "online", "seed": 0, "learning_rate": args.rate, "cache": None, "data": str(data)}
        shape = {"steps": args.steps, "rows": 1, "length": 512, "student": str(common.cut(teacher, kept))}
        found = quality.in_a_process(row | shape)
        common.report("prune", {"kept": name, "kl_teacher_student": round(found["kl_teacher_student"], 3)})


if __name__ == "__main__":
    main()
