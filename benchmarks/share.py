"""What the data costs a host that reads its share of a batch, against one that reads the whole.

    python benchmarks/share.py

Batches of 64 packed rows of 2,048 tokens, from conversations of some 400 tokens (answers of SmolLM2, four in
each): milliseconds of a core a batch takes a process alone, one of eight, and one without any row, which only
packs; while they are tokenised, as in a first epoch, and where they have been.
"""

import json
import time
from pathlib import Path

import common
import numpy as np
import pyarrow.parquet as pq
from quality import answers, models

import distillax
from distillax.data.batches import Share, make_batches, row_sizes
from distillax.data.examples import load_examples

ROWS, LENGTH, WARM, BATCHES, TURNS = 64, 2048, 2, 5, 4


def conversations(data: Path, file: Path) -> None:
    rows = pq.read_table(data)["messages"].to_pylist()
    whole = [[m for row in rows[i : i + TURNS] for m in row] for i in range(0, len(rows) - TURNS + 1, TURNS)]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in whole), "utf-8")


def main() -> None:
    teacher, _, folder = models()
    data, _ = answers(teacher, folder, generations=2)
    conversations(data, folder / "turns.jsonl")
    examples = load_examples(str(folder / "turns.jsonl"), distillax.load(teacher).tokenizer)
    sizes = row_sizes(examples, examples.encode, LENGTH)
    rows = np.arange(ROWS)
    shares = {"alone": None, "one of 8": Share(sizes, rows < ROWS // 8), "none": Share(sizes, rows < 0)}
    for how, encode in (("tokenised", examples._encode), ("kept", examples.encode)):
        for name, share in shares.items():
            batches = make_batches(
                examples,
                encode,
                batch_size=ROWS,
                max_target_length=LENGTH,
                packing=True,
                shuffle_seed=0,
                overlong="truncate",
                share=share,
            )
            for _ in range(WARM):
                next(batches)
            start = time.process_time()
            for _ in range(BATCHES):
                next(batches)
            spent = (time.process_time() - start) / BATCHES
            batches.close()
            report = {"host": name, "rows": how, "tokens": ROWS * LENGTH, "ms": round(1000 * spent)}
            common.report("share", report)


if __name__ == "__main__":
    main()
