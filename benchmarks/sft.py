"""Supervised fine-tuning against TRL's SFTTrainer: same student, same conversations, bfloat16.

    python benchmarks/sft.py

SmolLM2 cut to 12 layers; question-answer pairs, packed by each into rows of 512 tokens, four rows
a step, loss on the answers. Whole programs are timed, data pipeline included, in the order ours,
theirs, ours; loss-bearing tokens per second, median over the steps after the first four.
"""

import json
import subprocess

import common

STEPS, SKIP, ROWS, LENGTH = 14, 4, 4, 512


def main() -> None:
    python = common.peer_environment("trl")
    folder, _ = common.smollm2()
    student = common.cut(folder)
    pairs = common.pairs()
    data, peer_data = folder.parent / "pairs.jsonl", folder.parent / "peer-pairs.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    peer_data.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": [{"role": "user", "content": q}],
                    "completion": [{"role": "assistant", "content": a}],
                }
            )
            + "\n"
            for q, a in pairs
        )
    )

    def ours() -> dict[str, float]:
        return common.train(
            "sft.yml",
            "sft",
            SKIP,
            load_parameters_path=student,
            hf_path=data,
            train_data_columns="question,answer",
            steps=STEPS,
            per_device_batch_size=ROWS,
            max_target_length=LENGTH,
        )

    def theirs() -> dict[str, float]:
        words = [
            python,
            common.REPO / "benchmarks/peer_trl.py",
            student,
            peer_data,
            STEPS,
            SKIP,
            ROWS,
            LENGTH,
        ]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    first, peer, second = ours(), theirs(), ours()
    mean = (first["tokens_per_second"] + second["tokens_per_second"]) / 2
    common.report(
        "sft",
        {
            "loss_tokens_per_second": {"distillax": round(mean), "trl": round(peer["tokens_per_second"])},
            "ratio": round(mean / peer["tokens_per_second"], 2),
            "peak_gb": {"distillax": round(second["peak_gb"], 2), "trl": round(peer["peak_gb"], 2)},
        },
    )


if __name__ == "__main__":
    main()
