"""On a GPU: attention, chunked loss, packing and online step (`JAX_PLATFORMS=cuda pytest -m gpu`; faster:
docs/benchmarks.md). On the CPU: that the GPU benchmark runs."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.append(str(REPO / "benchmarks"))

import gpu  # noqa: E402

from distillax.models import attention, backend, cudnn  # noqa: E402
from distillax.models.families import param_specs  # noqa: E402
from distillax.models.spec import init_params  # noqa: E402
from distillax.train import losses, rows  # noqa: E402
from distillax.train.fused import chunked  # noqa: E402
from distillax.train.objectives import Compute, Setup, online  # noqa: E402
from distillax.train.step import accumulate  # noqa: E402

ROW = {"kind": "online", "student": "tiny", "keep": [0, 3], "teacher": "tiny", "length": 512}
PARAMETERS = {"jsd": 0.3}


@pytest.fixture
def on_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, and JAX runs on {jax.default_backend()}; set JAX_PLATFORMS=cuda")


@pytest.mark.parametrize(
    ("capability", "dtype", "kernel"),
    [
        ("7.0", "float32", False),  # V100
        ("7.5", "float32", False),  # T4
        ("8.0", "bfloat16", True),  # A100
        ("9.0", "bfloat16", True),
        ("10.0", "bfloat16", True),
        ("gfx90a", "bfloat16", False),  # AMD's MI250: bfloat16, and no cuDNN
        (None, "bfloat16", False),
    ],
)
def test_generations_of_gpus(
    capability: str | None, dtype: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `auto` is there, and whether attention may be cuDNN's."""
    device = SimpleNamespace(**({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    assert backend.compute_dtype("auto") == dtype and backend.compute_dtype("bfloat16") == "bfloat16"
    assert cudnn.can_attend(jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16), 0) is kernel


def loss_gradients(divergence: str, dtype: str, chunk: int):
    """(value, gradients of hidden states and head) of the chunked loss in `dtype`, and of full logits in
    float32 from the same, rounded, numbers."""
    N, V, E, F = 1500, 5003, 256, 384
    h, w, ht, wt = jax.random.split(jax.random.key(0), 4)
    normal = jax.random.normal
    hidden, teacher = normal(h, (N, E)).astype(dtype), normal(ht, (N, F)).astype(dtype)
    head, teacher_head = (
        (normal(key, (V, width)) * np.float32(width**-0.5)).astype(dtype) for key, width in ((w, E), (wt, F))
    )
    weights = jnp.where(jnp.arange(N) % 3 == 0, 0.0, 1.0)
    parameter = PARAMETERS.get(divergence, 0.0)

    # The teacher is an argument: of constants XLA would compute the logits while it compiles, in minutes.
    def ours(hidden, head, teacher, teacher_head):
        constants = {name: jnp.float32(1) for name in ("alpha", "temperature")}
        constants["teacher_head"] = teacher_head
        tokens = {"targets": jnp.zeros(N, jnp.int32), "teacher": teacher}
        row = rows.Online(divergence, parameter, True)
        return chunked(row, hidden, head, weights, tokens, constants, chunk=chunk)[0]

    def logits(hidden, head):
        wide = hidden.astype(jnp.float32), head.astype(jnp.float32)
        return jnp.einsum("ne,ve->nv", *wide, precision=jax.lax.Precision.HIGHEST)

    def full(hidden, head, teacher, teacher_head):
        per_token = losses.DIVERGENCES[divergence](
            logits(hidden, head), logits(teacher, teacher_head), parameter, 1.0
        )
        return (weights * per_token).sum()

    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head, teacher, teacher_head)
    wide = hidden.astype(jnp.float32), head.astype(jnp.float32)
    return found, jax.jit(jax.value_and_grad(full, (0, 1)))(*wide, teacher, teacher_head)


def norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [256, 4096])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_chunked_loss_in_float32_equals_full_logits(on_gpu, divergence, chunk) -> None:
    (value, gradients), (wanted, wanted_gradients) = loss_gradients(divergence, "float32", chunk)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        if divergence == "tvd":
            # Where two probabilities are as good as equal, the last digit says which way its gradient points.
            assert norm(got - want) < 3e-3 * norm(want)
            continue
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_chunked_loss_in_bfloat16_is_within_one_percent(on_gpu, divergence) -> None:
    (value, gradients), (wanted, wanted_gradients) = loss_gradients(divergence, "bfloat16", 512)
    assert float(value) == pytest.approx(float(wanted), rel=0.01)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert norm(np.asarray(got, np.float32) - np.asarray(want)) < 0.01 * norm(want)


@pytest.mark.gpu
def test_packing_changes_nothing(on_gpu) -> None:
    """Loss and gradients of packed rows, and of the same documents a row each, in float32."""
    student, teacher = gpu.models(ROW)
    assert teacher is not None
    setup = Setup(student, Compute(), teacher, Compute(), rows.Online("forward_kl", 0.0, True))
    params, teacher_params = (
        init_params(param_specs(config), config.layers, jax.random.key(seed))
        for seed, config in enumerate((student, teacher))
    )

    @jax.jit
    def sums(params, teacher_params, batch):
        def objective(params, teacher, batch, knobs):
            return online(params, teacher, batch, knobs, setup)

        return accumulate(objective, params, teacher_params, batch, gpu.knobs())

    packed, lengths = gpu.packed_batch(student.vocab_size, 2, ROW["length"])
    assert len(lengths) > 3
    gradients, weight, terms = sums(params, teacher_params, packed)
    apart_gradients, apart_weight, apart_terms = sums(params, teacher_params, unpacked(packed, lengths))
    assert float(weight) == float(apart_weight) > 0
    for name, value in terms.items():
        np.testing.assert_allclose(value, apart_terms[name], rtol=1e-5, err_msg=name)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(apart_gradients), strict=True):
        assert norm(np.asarray(got) - np.asarray(want)) <= 1e-5 * norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 4, 128)])
def test_the_kernel_for_attention_equals_our_own(on_gpu, heads, window) -> None:
    """Packed documents, a window, groups of query heads; output and gradients, against float32."""
    (H, K, D), (B, T) = heads, (2, 512)
    q, k, v, dout = (
        jax.random.normal(key, (B, T, number, D), jnp.bfloat16)
        for key, number in zip(jax.random.split(jax.random.key(0), 4), (H, K, K, H), strict=True)
    )
    segments = jnp.cumsum(jnp.arange(T)[None] % jnp.array([[170], [300]]) == 0, 1, dtype=jnp.int32)
    assert cudnn.can_attend(q, window)

    @partial(jax.jit, static_argnums=0)
    def run(attend, q, k, v, dout):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    def kernel(q, k, v):
        return cudnn.attend(q, k, v, D**-0.5, window, segments)

    def own(q, k, v):
        return attention._attend(q, k, v, jnp.asarray(window), segments, segments, None, D**-0.5)

    found = run(kernel, q, k, v, dout)
    wanted = run(own, *(x.astype(jnp.float32) for x in (q, k, v, dout)))
    for got, want in zip(found, wanted, strict=True):
        assert norm(np.asarray(got, np.float32) - np.asarray(want)) < 0.01 * norm(want)


def unpacked(batch: dict[str, np.ndarray], lengths: list[int]) -> dict[str, np.ndarray]:
    """[1, documents, longest]: what was packed, a row each, with padding."""
    cuts = np.cumsum(lengths)[:-1]
    found = {}
    for name, array in batch.items():
        documents = np.split(array.reshape(-1), cuts)
        found[name] = np.stack([np.pad(x, (0, max(lengths) - len(x))) for x in documents])[None]
    found["segment_ids"] = np.minimum(found["segment_ids"], 1)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("remat", ["none", "minimal", "full"])
def test_online_step_runs_and_the_loss_falls(on_gpu, remat) -> None:
    figures = gpu.measure({**ROW, "name": "online", "remat": remat, "batches": [4]}, 30)
    assert "error" not in figures
    first, last = figures["loss"]
    assert last < 0.9 * first
    assert figures["peak_gb"] is None or figures["peak_gb"] > 0
    assert figures["device"] and figures["platform"] == "gpu" and figures["dtype"] == "bfloat16"


def test_the_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    words = [
        sys.executable,
        REPO / "benchmarks" / "gpu.py",
        "--sizes",
        "tiny",
        "--steps",
        "2",
        "--json",
        file,
    ]
    done = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["rows"]
    assert len(done.stdout.splitlines()) == len(found) + 2  # the device, the headings, a line a row
    *found, tests = found
    assert [row["name"].split(",")[0] for row in found] == ["gemm", "loss", "loss", "online", "online", "sft"]
    here = Path(__file__).read_text(encoding="utf-8").count("\n@pytest.mark.gpu\n")
    assert tests.pop("skipped") > here > 0  # no GPU is here, and most have parameters
    assert tests["passed"] == tests["failed"] == 0 and "error" not in tests
    for row in found:
        assert "error" not in row
        assert row["device"] == "cpu" and row["jax"] == jax.__version__ and row["dtype"]
        assert row["ms"] > 0 and row["tflops"] > 0 and row["gemm_tflops"] > 0
    for row in found[1:]:
        assert row["share_of_gemm"] == pytest.approx(row["tflops"] / row["gemm_tflops"])
    chunks, logits = found[1:3]
    assert 0 < chunks["xla_temp_bytes"] < logits["xla_temp_bytes"]
    for row in found[3:]:
        assert row["batch"] == 4 and row["refused"] == {}
        assert row["planned_gb"] > 0 and row["peak_gb"] is None  # a CPU has no allocator to ask
        assert row["tokens_per_second"] > row["loss_tokens_per_second"] > 0
        assert 0 < row["strict_share_of_gemm"] < row["share_of_gemm"]
        assert np.isfinite(row["loss"]).all()


def test_a_row_that_does_not_fit_says_so(monkeypatch, capsys) -> None:
    """No batch fits, and then every row fails: the command goes on, and tells by its exit code."""
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    monkeypatch.setattr(gpu, "compiled_step", lambda *_: (_ for _ in ()).throw(full))
    found = gpu.step_figures({**ROW, "remat": "full", "batches": [4, 2]}, 1)
    assert "every batch, down to 2" in found["error"]
    assert list(found["refused"]) == ["4", "2"] and "9 bytes" in found["refused"]["2"]

    monkeypatch.setattr(gpu, "in_a_process", lambda row, steps: {"name": row["name"], **found})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--sizes", "8b"])
    assert gpu.main() == 1
    assert capsys.readouterr().out.count("out of memory at every batch") == 10


def test_what_pytest_says_is_counted() -> None:
    said = (
        "FAILED tests/test_gpu.py::test_a[8-1] - assert 1 == 2\nERROR tests/test_gpu.py::test_b - OSError\n"
        "2 failed, 17 passed, 3 skipped, 4 deselected, 1 warning, 1 error in 3.21s\n"
    )
    counts = {"passed": 17, "failed": 3, "skipped": 3}
    found = gpu.counts_of_tests(said)
    assert found == counts | {"error": "failed: test_a[8-1], test_b"}
    line = gpu.line_of({"name": "tests", **found})
    assert line.endswith(" 17 passed, 3 failed, 3 skipped  failed: test_a[8-1], test_b")
    broken = "ERROR tests/test_gpu.py - ImportError: no\nERROR tests/test_b.py\n2 errors in 0.10s\n"
    assert gpu.counts_of_tests(broken)["error"] == "failed: tests/test_gpu.py, tests/test_b.py"
    assert gpu.counts_of_tests("20 passed in 19.00s\n") == {"passed": 20, "failed": 0, "skipped": 0}
    assert gpu.counts_of_tests("") == gpu.counts_of_tests("/usr/bin/python: No module named pytest") == {}
    assert (
        gpu.environment_of_tests("cpu") == {} and gpu.environment_of_tests("gpu")["JAX_PLATFORMS"] == "cuda"
    )


def test_flops_of_a_step_by_hand() -> None:
    """Two layers of width 64: N is all weights, the embedding being the head too."""
    student, teacher = gpu.models(ROW)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    small, large, head = 2 * layer + 64, 4 * layer + 64, 512 * 64
    everywhere, strict = gpu.step_flops(student, teacher, [30, 10], 20)
    context = (30 * 30 + 10 * 10) / 40
    per_token = 6 * (small + head) + 6 * 2 * context * 64 + 2 * (large + head) + 2 * 4 * context * 64
    assert everywhere == pytest.approx(40 * per_token)
    assert strict == pytest.approx(everywhere - 20 * 8 * head)
