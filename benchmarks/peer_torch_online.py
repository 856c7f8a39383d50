"""Logit matching as a torch expert writes it by hand, in TRL's environment: prints JSON.

    python benchmarks/peer_torch_online.py STUDENT TEACHER DATA.jsonl STEPS SKIP ROWS LENGTH

Documents ({input_ids, completion_mask} a line) are packed into rows that they do not see each other
in. transformers' decoders, compiled, under bfloat16 autocast over float32 weights; the teacher in
bfloat16 without gradients; both heads only where there is loss, CHUNK tokens at a time, each chunk's
backward pass before the next chunk (so [tokens, vocabulary] is never held); KL in float32; fused AdamW.
"""

import ctypes
import json
import math
import random
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

CHUNK = 512


def batches(data: str, rows: int, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Packed rows for ever: each document goes to the fullest of the open rows that has room."""
    with open(data) as file:
        documents = [json.loads(line) for line in file]
    shuffle = random.Random(0)
    bins: list[list[dict[str, Any]]] = [[] for _ in range(64)]
    used = [0] * len(bins)
    while True:
        shuffle.shuffle(documents)
        for document in documents:
            size = len(document["input_ids"]) - 1
            fitting = [i for i in range(len(bins)) if used[i] + size <= length]
            if not fitting:
                shuffle.shuffle(bins)
                for start in range(0, len(bins), rows):
                    yield collate(bins[start : start + rows], length)
                bins = [[] for _ in bins]
                used, fitting = [0] * len(bins), [0]
            place = max(fitting, key=used.__getitem__)
            bins[place].append(document)
            used[place] += size


def collate(rows: list[list[dict[str, Any]]], length: int) -> dict[str, torch.Tensor]:
    """Tensors [B, T]; `mask` [B, 1, T, T] is there if a row holds more than one document."""
    inputs, positions, segments = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    loss = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row, 1):
            n = len(document["input_ids"]) - 1
            inputs[i, at : at + n] = torch.tensor(document["input_ids"][:-1])
            loss[i, at : at + n] = torch.tensor(document["completion_mask"][1:]) != 0
            positions[i, at : at + n] = torch.arange(n)
            segments[i, at : at + n] = number
            at += n
    batch = {"inputs": inputs, "positions": positions, "loss": loss}
    if any(len(row) > 1 for row in rows):
        same = segments[:, None, :, None] == segments[:, None, None, :]
        batch["mask"] = same & torch.ones(length, length, dtype=torch.bool).tril()
    return batch


def divergence(
    hidden: torch.Tensor, teacher_hidden: torch.Tensor, head: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    """Sum of KL(teacher || student) over the tokens, in nats."""
    student = functional.log_softmax(functional.linear(hidden, head).float(), dim=-1)
    with torch.no_grad():
        teacher = functional.log_softmax(functional.linear(teacher_hidden, teacher_head).float(), dim=-1)
    return (teacher.exp() * (teacher - student)).sum()


def main(student_path: str, teacher_path: str, data: str, *numbers: int) -> None:
    steps, skip, rows, length = numbers
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 30)  # keep freed memory, which is worth 30-55% to torch
    libc.mallopt(-1, (1 << 31) - 1)
    torch.set_num_threads(2)
    student = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path, dtype=torch.bfloat16).eval()
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, weight_decay=0.0, fused=True)
    body, teacher_body = torch.compile(student.model), torch.compile(teacher.model)
    kl = torch.compile(divergence, dynamic=True)
    head, teacher_head = student.lm_head.weight, teacher.lm_head.weight
    speeds, stream = [], batches(data, rows, length)
    clock = time.perf_counter()
    for _ in range(steps):
        batch = next(stream)
        chosen = batch["loss"].flatten().nonzero().squeeze(1)
        tokens = len(chosen)
        arguments = {
            "input_ids": batch["inputs"],
            "position_ids": batch["positions"],
            "attention_mask": batch.get("mask"),
            "use_cache": False,
        }
        with torch.no_grad():
            seen = teacher_body(**arguments).last_hidden_state.flatten(0, 1)[chosen]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(**arguments).last_hidden_state.flatten(0, 1)[chosen]
            head16 = head.detach().to(torch.bfloat16).requires_grad_()
            parts = []
            for group in torch.arange(tokens).chunk(math.ceil(tokens / CHUNK)):
                part = hidden[group].detach().to(torch.bfloat16).requires_grad_()
                (kl(part, seen[group], head16, teacher_head) / tokens).backward()
                parts.append(part.grad)
                grad = head16.grad if head.grad is None else head.grad.add_(head16.grad)
                head.grad = grad.float()
                head16.grad = None
        hidden.backward(torch.cat(parts).to(hidden.dtype))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        speeds.append(tokens / (now - clock))
        clock = now
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_second": statistics.median(speeds[skip:]), "peak_gb": peak / 1e9}))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:8]))
