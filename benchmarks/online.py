"""Online distillation (matching a teacher's logits) against TRL's GKDTrainer and a torch expert's own loop.

    python benchmarks/online.py [--only ours|peers] [--setting short|full]

SmolLM2-135M-Instruct teaches its cut to 12 layers: forward KL at temperature 1 and nothing else,
bfloat16 over float32 weights, AdamW, the same tokens with the same loss mask for everybody.

short: conversations of the chatterbot corpus as they come, 54 tokens on average, loss on the answers.
    Two packed rows of 512 a step, which hold 19 of them; TRL, which pads instead of packing, takes 20,
    four at a time (faster than all at once, since less is padded, and with less memory).
full: conversations set end to end into rows of 512 tokens that all bear loss, four a step.

Whole programs are timed, data pipeline included, in the order ours, TRL, torch, ours: loss-bearing
tokens per second, median over the steps after the first four. `share_of_gemm` sets the FLOPs that the
step cannot do without (no padding, no recomputation, heads only where there is loss) against a plain
bfloat16 matrix product of 2048^3, measured in the same minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import common

STEPS, SKIP, LENGTH = 14, 4, 512
ROWS = {"short": 2, "full": 4}
MICROBATCHES = {"short": 5, "full": 1}  # of four rows, for TRL
TRAIN_ON = {"short": "assistant", "full": "all"}


def conversations(setting: str, tokenizer: Any) -> list[tuple[list[dict[str, str]], Any]]:
    """(messages, example) a row; the examples have at most LENGTH targets."""
    from distillax.data import chat

    found, messages = [], []
    for question, answer in common.pairs():
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        example = chat.encode_conversation(tokenizer, messages, train_on=TRAIN_ON[setting])
        if setting == "short" or len(example.tokens) > LENGTH:
            tokens, mask = example.tokens[: LENGTH + 1], example.loss_mask[: LENGTH + 1]
            found.append((messages, chat.Example(tokens, mask)))
            messages = []
    return found


def write(rows: list[Any], ours: Path, theirs: Path) -> None:
    """The conversations as messages for us, and as the tokens we make of them for the peers."""
    ours.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages, _ in rows))
    lines = []
    for _, example in rows:
        ids, mask = example.tokens.tolist(), example.loss_mask.astype(int).tolist()
        lines.append({"input_ids": ids, "completion_mask": mask, "prompt": "", "length": len(ids)})
    theirs.write_text("".join(json.dumps(line) + "\n" for line in lines))


def flops_per_loss_token(rows: list[Any], student: Any, teacher: Any) -> float:
    """Useful FLOPs of forward and backward pass, embedding look-up and optimizer left out."""
    from distillax.models.families import param_specs
    from distillax.models.spec import count_params

    lengths = [len(example.tokens) - 1 for _, example in rows]
    loss_tokens = sum(int(example.loss_mask.sum()) for _, example in rows)
    context = sum(n * n for n in lengths) / sum(lengths)
    total = 0.0
    for config, passes in ((student, 3), (teacher, 1)):  # the backward pass is two forward ones
        head = config.vocab_size * config.width
        layers = count_params(param_specs(config), config.layers) - head * (1 if config.tied else 2)
        attention = config.layers * context * config.heads * config.head_dim
        total += passes * 2 * ((layers + attention) * sum(lengths) / loss_tokens + head)
    return total


def gemm_flops() -> float:
    """FLOP/s of bfloat16[2048, 2048] @ bfloat16[2048, 2048] -> float32 in this process."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (2048, 2048), jnp.bfloat16)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    times = []
    for _ in range(23):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / statistics.median(times[3:])


def run_ours(setting: str, student: Path, teacher: Path, data: Path) -> dict[str, float]:
    return common.train(
        "online.yml",
        f"online-{setting}",
        SKIP,
        load_parameters_path=student,
        teacher_load_parameters_path=teacher,
        hf_path=data,
        train_on=TRAIN_ON[setting],
        steps=STEPS,
        per_device_batch_size=ROWS[setting],
        max_target_length=LENGTH,
    )


def run_peer(script: str, student: Path, teacher: Path, data: Path, *numbers: int) -> dict[str, float]:
    python = common.peer_environment("trl")
    words = [python, common.REPO / "benchmarks" / script, student, teacher, data, STEPS, SKIP, *numbers]
    # Threads that sleep while they wait: where other work shares the cores, spinning ones double the
    # processor time of a step.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(setting: str, only: str) -> None:
    from distillax.checkpoints.source import find

    teacher, tokenizer = common.smollm2()
    student = common.cut(teacher)
    rows = conversations(setting, tokenizer)
    data, peer_data = (teacher.parent / f"online-{setting}{end}.jsonl" for end in ("", "-peers"))
    write(rows, data, peer_data)

    gemm = [gemm_flops()]
    found: dict[str, list[dict[str, float]]] = {}
    for name in ("distillax", "trl", "torch", "distillax"):
        if only == ("peers" if name == "distillax" else "ours"):
            continue
        if name == "distillax":
            figures = run_ours(setting, student, teacher, data)
        elif name == "trl":
            numbers = 4, MICROBATCHES[setting], LENGTH + 1
            figures = run_peer("peer_trl_online.py", student, teacher, peer_data, *numbers)
        else:
            numbers = ROWS[setting], LENGTH
            figures = run_peer("peer_torch_online.py", student, teacher, peer_data, *numbers)
        found.setdefault(name, []).append(figures)
        gemm.append(gemm_flops())

    flops = flops_per_loss_token(rows, find(student).config, find(teacher).config)
    speeds = {k: statistics.mean(f["tokens_per_second"] for f in runs) for k, runs in found.items()}
    rate = statistics.median(gemm)
    ours = speeds.get("distillax")
    report = {
        "setting": setting,
        "loss_tokens_per_second": {name: round(speed) for name, speed in speeds.items()},
        "ratio": {k: round(ours / v, 2) for k, v in speeds.items() if k != "distillax"} if ours else {},
        "peak_gb": {name: round(max(f["peak_gb"] for f in runs), 2) for name, runs in found.items()},
        "gemm_gflops": round(rate / 1e9),
        "share_of_gemm": {name: round(speed * flops / rate, 2) for name, speed in speeds.items()},
    }
    common.report("online", report)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("ours", "peers"), default="")
    parser.add_argument("--setting", choices=tuple(ROWS))
    args = parser.parse_args()
    for setting in (args.setting,) if args.setting else ROWS:
        measure(setting, args.only)


if __name__ == "__main__":
    main()
