"""What one GPU makes of the loss kernel and of whole training steps, as a share of its own matrix products.

    python benchmarks/gpu.py [--sizes tiny,1b,8b] [--steps N] [--json FILE]

Every row is measured in a process of its own, so that its peak of memory is its own and its failure leaves
the others alone: a row that runs out of memory, or breaks, says so. Weights are random, made on the device.
Times are medians after two warm-up steps, each waited for.

gemm    the fastest that this process multiplies: 8192^3 (1024^3 on a CPU), operands and result in the compute
        dtype, a chain of products in one program. Measured in the process of every other row as well.
attention
        output and gradients of causal attention, by the kernel that steps use and in blocks by XLA. Useful
        FLOPs: six products of queries and keys, causal, as if a row were one document.
loss    value and gradient of forward KL from hidden states and heads, chunked and with full logits, which do
        not compute the entropies and the cross entropy of the chunked form. Useful FLOPs: three products with
        the student's head, one with the teacher's.
online  the step of online distillation, AdamW included: packed rows, float32 master weights.
sft     the step of supervised fine-tuning.
tests   no times: how many of the tests that need a GPU passed, failed and were skipped (`pytest -m gpu`).

FLOPs of a step, a token: 6 N + 6 L T H D of the student (causal attention) and 2 N + 2 L T H D of the
teacher, N without the embedding look-up, T = sum(len^2) / sum(len) of the packed documents, and no credit
for what remat computes again. `mfu` is the rate of these over the datasheet's, `share_of_gemm` over the
row's own gemm; `strict_share_of_gemm` counts the heads only where there is loss, as the step computes them.
The batch is the largest of a list that fits. `planned_gb` is what XLA says that the step needs, `peak_gb` the
most that was allocated.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "src"))
if importlib.util.find_spec("pydantic") is None:
    # A host with JAX and optax alone: the optimizer's module names the configuration's type, no more.
    sys.modules["distillax.config"] = types.SimpleNamespace(TrainConfig=Any)  # type: ignore[assignment]

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # before JAX: 0.75 is its default

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from distillax.models import attention, transformer  # noqa: E402
from distillax.models.backend import compute_dtype, product  # noqa: E402
from distillax.models.families import (  # noqa: E402
    ModelConfig,
    config_from_hf,
    param_specs,
    preset,
    with_layers,
)
from distillax.models.spec import init_params  # noqa: E402
from distillax.plan.flops import step_flops  # noqa: E402
from distillax.train import losses, rows  # noqa: E402
from distillax.train.fused import chunked  # noqa: E402
from distillax.train.objectives import OBJECTIVES, Compute, Setup  # noqa: E402
from distillax.train.optimizer import make_optimizer  # noqa: E402
from distillax.train.step import TrainState, make_step  # noqa: E402

WARM_UP, ROW_TIMEOUT = 2, 900
# bfloat16, dense, TFLOP/s, from the datasheets; the first that is in the device's name.
DATASHEET = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
}
BIG_LOSS = {
    "kind": "loss",
    "tokens": 8192,
    "vocabulary": 128_256,
    "student_width": 2048,
    "teacher_width": 4096,
}
TINY_LOSS = {"kind": "loss", "tokens": 256, "vocabulary": 2048, "student_width": 64, "teacher_width": 128}
ATTENTION = {"kind": "attention", "rows": 8, "length": 2048, "heads": 32, "kv_heads": 8, "width": 64}
# Rows of 2,048 tokens, largest first.
SHAPE = {"length": 2048, "batches": [32, 16, 8, 4, 2, 1], "remats": ["full", "minimal"]}
TINY_SHAPE = {"length": 128, "batches": [4, 2], "remats": ["full", "minimal"]}
STEPS_OF_SIZE: dict[str, list[dict[str, Any]]] = {
    "tiny": [
        {"kind": "online", "student": "tiny", "keep": [0, 3], "teacher": "tiny", **TINY_SHAPE},
        {"kind": "sft", "student": "tiny", **TINY_SHAPE, "remats": ["full"]},
    ],
    "1b": [
        {
            "kind": "online",
            "student": "llama3.2-1b",
            "keep": list(range(0, 16, 2)),
            "teacher": "llama3.2-1b",
            **SHAPE,
        },
        {"kind": "sft", "student": "llama3.2-1b", **SHAPE},
    ],
    "8b": [{"kind": "online", "student": "llama3.2-1b", "teacher": "llama3.1-8b", **SHAPE}],
}


def wanted_rows(sizes: list[str], platform: str | None) -> list[dict[str, Any]]:
    """All rows but the first, which is the gemm, as they are wanted where JAX runs on `platform`."""
    found = []
    if set(sizes) & {"1b", "8b"}:
        found += [{**ATTENTION, "name": f"attention, {how}", "how": how} for how in ("kernel", "blocks")]
    for loss, chunks, asked in (
        (TINY_LOSS, (64,), "tiny" in sizes),
        (BIG_LOSS, (2048, 4096, 8192), set(sizes) & {"1b", "8b"}),
    ):
        if asked:
            found += [{**loss, "name": f"loss, chunks of {chunk}", "chunk": chunk} for chunk in chunks]
            found.append({**loss, "name": "loss, full logits", "chunk": None})
    for size in sizes:
        for row in STEPS_OF_SIZE[size]:
            cut = f" cut to {len(row['keep'])} layers" if "keep" in row else ""
            taught = f"{row['teacher']} -> " if "teacher" in row else ""
            name = f"{row['kind']}, {taught}{row['student']}{cut}"
            found += [{**row, "name": f"{name}, remat {remat}", "remat": remat} for remat in row["remats"]]
    return [*found, {"kind": "tests", "name": "tests, pytest -m gpu", "platform": platform}]


# One row, in a process of its own.


def measure(row: dict[str, Any], steps: int) -> dict[str, Any]:
    """The figures of one row, or `error`; and on what they were measured."""
    device = jax.devices()[0]
    found = {
        "name": row["name"],
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "dtype": compute_dtype("auto"),
    }
    size = 1024 if device.platform == "cpu" else 8192
    try:
        gemm = gemm_flops(size, steps)
        found["gemm_tflops"] = gemm / 1e12
        if row["kind"] == "gemm":
            return found | {"name": f"gemm, {size}^3", "ms": 2e3 * size**3 / gemm, "tflops": gemm / 1e12}
        figures = {"loss": loss_figures, "attention": attention_figures}.get(row["kind"], step_figures)(
            row, steps
        )
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return found | {"error": f"out of memory: {brief(str(error))}"}
    if "flops" in figures:
        rate = figures.pop("flops") / figures["ms"] * 1e3
        figures |= {"tflops": rate / 1e12, "share_of_gemm": rate / gemm}
        peaks = (peak for name, peak in DATASHEET.items() if name in device.device_kind)
        if (peak := next(peaks, None)) and row["kind"] not in ("loss", "attention"):
            figures["mfu"] = rate / 1e12 / peak
    if "strict_flops" in figures:
        figures["strict_share_of_gemm"] = figures.pop("strict_flops") / figures["ms"] * 1e3 / gemm
    return found | figures


def gemm_flops(size: int, steps: int, chain: int = 8) -> float:
    """FLOP/s of x <- x @ w, [size, size], both in the compute dtype and accumulated in float32."""
    dtype = jnp.dtype(compute_dtype("auto"))
    w = (jax.random.normal(random_key(0), (size, size)) / math.sqrt(size)).astype(dtype)

    def many(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, chain, lambda _, x: product("ik,kj->ij", x, w).astype(dtype), x)

    run = jax.jit(many)
    return chain * 2 * size**3 / seconds(lambda: run(w, w), steps)


def attention_figures(row: dict[str, Any], steps: int) -> dict[str, Any]:
    """Of output and gradients, for packed documents."""
    B, T, H, K, D = (row[name] for name in ("rows", "length", "heads", "kv_heads", "width"))
    dtype = jnp.dtype(compute_dtype("auto"))
    packed, _ = packed_batch(1, B, T)
    segments = jnp.asarray(packed["segment_ids"][0])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if row["how"] == "kernel":
            return attention.causal_attention(q, k, v, D**-0.5, 0, segments)
        zero = jnp.zeros((), jnp.int32)
        return attention._attend(q, k, v, zero, segments, segments, None, D**-0.5)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    keys = jax.random.split(random_key(0), 4)
    arrays = [jax.random.normal(key, (B, T, n, D), dtype) for key, n in zip(keys, (H, K, K, H), strict=True)]
    compiled = run.lower(*arrays).compile()
    took = seconds(lambda: compiled(*arrays), steps)
    temp = compiled.memory_analysis().temp_size_in_bytes
    return {"ms": took * 1e3, "flops": 6 * B * H * T * T * D, "xla_temp_bytes": temp}


def loss_figures(row: dict[str, Any], steps: int) -> dict[str, Any]:
    """Of the gradient of the loss with respect to hidden states and head; without a chunk, from full
    logits."""
    dtype = jnp.dtype(compute_dtype("auto"))
    N, V, E, F = (row[name] for name in ("tokens", "vocabulary", "student_width", "teacher_width"))

    def of_chunks(hidden: jax.Array, head: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
        knobs = {"alpha": np.float32(1), "temperature": np.float32(1), "teacher_head": data["teacher_head"]}
        tokens = {"targets": data["targets"], "teacher": data["teacher"]}
        online = rows.Online("forward_kl", 0.0, True)
        return chunked(online, hidden, head, data["weights"], tokens, knobs, chunk=row["chunk"])[0]

    def of_logits(hidden: jax.Array, head: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
        # As fast as full logits get: the products of the backward pass are in the compute dtype too.
        student = transformer.matmul(hidden, head.T, (None, None)).astype(jnp.float32)
        teacher = product("nf,vf->nv", data["teacher"], data["teacher_head"])
        return (data["weights"] * losses.forward_kl(student, teacher)).sum()

    def made() -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        h, w, ht, wt, t = jax.random.split(random_key(0), 5)
        data = {
            "teacher": jax.random.normal(ht, (N, F), dtype),
            "teacher_head": jax.random.normal(wt, (V, F), dtype) / np.asarray(math.sqrt(F), dtype),
            "targets": jax.random.randint(t, (N,), 0, V),
            "weights": jnp.ones(N, jnp.float32),
        }
        head = jax.random.normal(w, (V, E), jnp.float32) / np.float32(math.sqrt(E))  # the master weights
        return jax.random.normal(h, (N, E), dtype), head, data

    loss = of_chunks if row["chunk"] else of_logits
    shapes = jax.eval_shape(made)
    run = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    found: dict[str, Any] = {"xla_temp_bytes": run.memory_analysis().temp_size_in_bytes}
    try:
        arguments = jax.jit(made)()
        took = seconds(lambda: run(*arguments), steps)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return found | {"error": f"out of memory: {brief(str(error))}"}
    return found | {"ms": took * 1e3, "flops": 2 * N * V * (3 * E + F)}


def step_figures(row: dict[str, Any], steps: int) -> dict[str, Any]:
    """Of the largest batch that fits."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    refused: dict[str, str] = {}
    for batch in row["batches"]:
        try:
            compiled, planned, make = compiled_step(row, batch, steps)
            if limit is None or planned < limit:
                figures = run_step(compiled, make, row, batch, steps)
                return {"batch": batch, "planned_gb": planned / 1e9, "refused": refused, **figures}
            refused[str(batch)] = f"needs {planned / 1e9:.1f} GB of {limit / 1e9:.1f} GB"
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            refused[str(batch)] = brief(str(error))
    return {"refused": refused, "error": f"out of memory at every batch, down to {row['batches'][-1]}"}


def models(row: dict[str, Any]) -> tuple[ModelConfig, ModelConfig | None]:
    def config(name: str) -> ModelConfig:
        return config_from_hf(preset("llama3.2-1b").hf | TINY) if name == "tiny" else preset(name)

    student = config(row["student"])
    if "keep" in row:
        student = with_layers(student, row["keep"])
    return student, config(row["teacher"]) if "teacher" in row else None


def compiled_step(row: dict[str, Any], batch: int, steps: int) -> tuple[Callable[..., Any], int, Any]:
    """(the step, the bytes that it needs, a function that makes state and teacher). Nothing is run."""
    student, teacher = models(row)
    dtype = compute_dtype("auto")
    setup = Setup(
        student,
        Compute(dtype, row["remat"]),
        teacher,
        Compute(dtype),
        rows.Online("forward_kl", 0.0, True) if teacher else rows.CrossEntropy(),
    )
    specs = param_specs(student)
    optimizer = make_optimizer(optimizer_config(steps + WARM_UP), specs)  # type: ignore[arg-type]

    def state() -> TrainState:
        params = init_params(specs, student.layers, random_key(0), jnp.float32)
        return TrainState(params, optimizer.init(params))

    def frozen() -> Any:
        if teacher is None:
            return None
        return init_params(param_specs(teacher), teacher.layers, random_key(1), jnp.dtype(dtype))

    step = make_step(OBJECTIVES[row["kind"]], setup, optimizer)
    data, _ = packed_batch(student.vocab_size, batch, row["length"])
    shapes = (jax.eval_shape(state), jax.eval_shape(frozen), data, knobs())
    compiled = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    plan = compiled.memory_analysis()
    needed = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes

    def make() -> tuple[TrainState, Any]:
        teacher_params = jax.block_until_ready(jax.jit(frozen)())  # first: the random bits take the most room
        return jax.jit(state)(), teacher_params

    return compiled, needed + plan.temp_size_in_bytes, make


def run_step(
    compiled: Callable[..., Any], make: Any, row: dict[str, Any], batch: int, steps: int
) -> dict[str, Any]:
    student, teacher = models(row)
    arrays, lengths = packed_batch(student.vocab_size, batch, row["length"])
    data = jax.device_put(arrays)
    state, frozen = jax.block_until_ready(make())
    before = peak_bytes()
    times, seen = [], []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, frozen, data, knobs()))
        times.append(time.perf_counter() - start)
        seen.append(float(metrics["loss"]))
    if not np.isfinite(seen).all():
        return {"error": f"the loss is not finite: {seen}"}
    took, peak = statistics.median(times[WARM_UP:]), peak_bytes()
    loss_tokens = int(arrays["weights"].sum())
    flops, strict = step_flops(student, teacher, lengths, loss_tokens)
    return {
        "ms": took * 1e3,
        "tokens_per_second": sum(lengths) / took,
        "loss_tokens_per_second": loss_tokens / took,
        # The allocator's peak is that of the process: where making the weights took more, it says nothing.
        "peak_gb": peak / 1e9 if peak > before else None,
        "loss": [seen[0], seen[-1]],
        "flops": flops,
        "strict_flops": strict,
    }


def packed_batch(vocabulary: int, batch: int, length: int) -> tuple[dict[str, np.ndarray], list[int]]:
    """One microbatch of random tokens [1, batch, length] without padding, and the lengths of the
    documents in it. A document's first quarter is its prompt and bears no loss."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (batch, length + 1), dtype=np.int32)
    segments, positions = (np.zeros((batch, length), np.int32) for _ in range(2))
    weights = np.zeros((batch, length), np.float32)
    lengths = []
    for i in range(batch):
        start, number = 0, 0
        while start < length:
            number += 1
            n = min(int(rng.integers(length // 16, length // 2 + 1)), length - start)
            segments[i, start : start + n] = number
            positions[i, start : start + n] = np.arange(n)
            weights[i, start + n // 4 : start + n - 1] = 1  # the last token's target is another document's
            lengths.append(n)
            start += n
    arrays = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    arrays |= {"segment_ids": segments, "positions": positions}
    return {name: array[None] for name, array in arrays.items()}, lengths


def optimizer_config(steps: int) -> types.SimpleNamespace:
    """What `make_optimizer` reads."""
    return types.SimpleNamespace(
        steps=steps,
        learning_rate=1e-4,
        learning_rate_schedule="constant",
        warmup_steps_fraction=0.0,
        adam_b1=0.9,
        adam_b2=0.95,
        adam_eps=1e-8,
        adam_weight_decay=0.1,
        gradient_clipping_threshold=1.0,
    )


def knobs() -> dict[str, np.ndarray]:
    return {
        name: np.asarray(value, np.float32) for name, value in (("alpha", 1), ("temperature", 1), ("beta", 0))
    }


def random_key(seed: int) -> jax.Array:
    """Of the generator that compiles and runs fastest: billions of numbers are drawn."""
    return jax.random.key(seed, impl="rbg")


def seconds(run: Callable[[], Any], steps: int) -> float:
    times = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def peak_bytes() -> int:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def out_of_memory(error: Exception) -> bool:
    return any(words in str(error).lower() for words in ("resource_exhausted", "out of memory"))


def brief(message: str) -> str:
    return message.strip().splitlines()[0][:200] if message.strip() else "no reason given"


# All rows.


def in_a_process(row: dict[str, Any], steps: int) -> dict[str, Any]:
    words, environment = [__file__, "--steps", str(steps), "--row", json.dumps(row)], os.environ
    if row["kind"] == "tests":
        words = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(REPO / "tests/test_gpu.py")]
        environment = os.environ | environment_of_tests(row["platform"])
    try:
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            timeout=ROW_TIMEOUT,
            cwd=REPO,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"name": row["name"], "error": f"no end within {ROW_TIMEOUT} s"}
    if row["kind"] == "tests" and (counts := counts_of_tests(done.stdout)):
        return {"name": row["name"], **counts}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(done.stderr)
    last = [
        line for line in done.stderr.splitlines() if line and not line.startswith(("-", " ", "For simpl"))
    ]
    return {"name": row["name"], "error": f"exit {done.returncode}: {brief(last[-1] if last else '')}"}


def environment_of_tests(platform: str | None) -> dict[str, str]:
    """What the tests need on a GPU: without the flag, choosing kernels takes longer than they run."""
    if platform != "gpu":
        return {}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    return {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": flags.strip()}


def counts_of_tests(said: str) -> dict[str, Any]:
    """{"passed": n, "failed": n, "skipped": n} of pytest's last line, and an error if any failed; nothing
    if that line has no counts. A test whose set-up broke has failed; so has a file that cannot be read."""
    last = next(reversed(said.splitlines()), "")
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if not found:
        return {}
    failed = found.get("failed", 0) + found.get("error", 0)
    counts = {"passed": found.get("passed", 0), "failed": failed, "skipped": found.get("skipped", 0)}
    names = re.findall(r"^(?:FAILED|ERROR) (?:\S+?::)?(\S+)", said, re.M)
    return counts | ({"error": f"failed: {brief(', '.join(names))}"} if failed else {})


# Heading, key, factor, format.
COLUMNS = (
    ("batch", "batch", 1, "{:.0f}"),
    ("ms", "ms", 1, "{:.2f}"),
    ("TFLOP/s", "tflops", 1, "{:.2f}"),
    ("% of gemm", "share_of_gemm", 100, "{:.1f}"),
    ("% strict", "strict_share_of_gemm", 100, "{:.1f}"),
    ("% MFU", "mfu", 100, "{:.1f}"),
    ("tokens/s", "tokens_per_second", 1, "{:.0f}"),
    ("with loss", "loss_tokens_per_second", 1, "{:.0f}"),
    ("temp GB", "xla_temp_bytes", 1e-9, "{:.3f}"),
    ("planned GB", "planned_gb", 1, "{:.3f}"),
    ("peak GB", "peak_gb", 1, "{:.3f}"),
)


def line_of(row: dict[str, Any]) -> str:
    cells = []
    for heading, key, factor, form in COLUMNS:
        value = row.get(key)
        cells.append(("-" if value is None else form.format(value * factor)).rjust(len(heading) + 1))
    figures = " ".join(cells)
    if "passed" in row:
        figures = ", ".join(f"{row[key]} {key}" for key in ("passed", "failed", "skipped"))
    return f"{row['name']:<58}{figures}  {row.get('error', '')}".rstrip()


def save(file: Path, found: list[dict[str, Any]]) -> None:
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(json.dumps({"benchmark": "gpu", "rows": found}, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", help="of tiny, 1b, 8b (default: 1b,8b; on a CPU: tiny)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a row")
    parser.add_argument("--json", type=Path, help="file for the rows, written anew after each")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if args.row:
        print(json.dumps(measure(json.loads(args.row), args.steps)))
        return 0
    sizes = args.sizes.split(",") if args.sizes else []
    if wrong := [size for size in sizes if size not in STEPS_OF_SIZE]:
        parser.error(f"--sizes: there is no {wrong[0]}; there are {', '.join(STEPS_OF_SIZE)}")

    found = [in_a_process({"kind": "gemm", "name": "gemm"}, args.steps)]
    here = {key: found[0].get(key) for key in ("device", "platform", "jax", "dtype")}
    print(
        f"{here['device']} ({here['platform']}), jax {here['jax']}, {here['dtype']}, medians of {args.steps}"
    )
    print(" " * 58 + " ".join(heading.rjust(len(heading) + 1) for heading, *_ in COLUMNS))
    print(line_of(found[0]), flush=True)
    sizes = sizes or (["tiny"] if here["platform"] == "cpu" else ["1b", "8b"])
    for row in wanted_rows(sizes, here["platform"]):
        found.append(here | in_a_process(row, args.steps))
        print(line_of(found[-1]), flush=True)
        if args.json:
            save(args.json, found)
    return int(all("error" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
