"""A teacher in 8 bits: how far each weight is from its own, and that all else is as before."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parts
import pytest
import small
import tiny
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file, save_file

import distillax
from distillax.checkpoints.source import find
from distillax.cli import main
from distillax.config import TrainConfig
from distillax.data.targets import TargetStore
from distillax.errors import UserError
from distillax.evaluate import evaluate
from distillax.models.families import param_specs, preset
from distillax.models.layout import AXES
from distillax.models.quantize import Quantized, quantize
from distillax.models.spec import iter_specs
from distillax.models.transformer import hidden_states, logits
from distillax.parallel.mesh import make_mesh
from distillax.parallel.weights import abstract_weights, place
from distillax.settings import load_config
from distillax.teachers.capture_config import CaptureConfig
from distillax.train.loop import train
from distillax.train.method import refuse_idle_keys

MATRICES = {"q", "k", "v", "o", "gate", "up", "down"}


def dequantized(w: Quantized) -> np.ndarray:
    return np.asarray(w.values, np.float64) * np.asarray(w.scale, np.float64)


# ------------------------------------------------------------------ the weights


@settings(deadline=None)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_no_weight_is_moved_by_more_than_half_a_step(w_IO: np.ndarray, dtype) -> None:
    w_IO = w_IO.astype(dtype)
    found = quantize(w_IO)
    exact = w_IO.astype(np.float64)
    assert found.values.dtype == np.int8 and found.values.min() >= -127
    assert found.scale.dtype == np.float32 and found.scale.shape == (1, w_IO.shape[1])
    # Where a weight lies right between two steps, the rounding of float32 may choose the other one.
    assert (np.abs(exact - dequantized(found)) <= found.scale * (0.5 + 1e-5)).all()
    # As fine as it can be: the largest weight of each channel is the last step, and is kept.
    peak = np.abs(exact).max(0)
    used = peak > 127 * float(np.finfo(np.float32).tiny)
    assert (np.abs(found.values).max(0)[used] == 127).all() and not found.values[:, peak == 0].any()
    np.testing.assert_allclose(np.abs(dequantized(found)).max(0)[used], peak[used], rtol=1e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantize")
    tiny.make("llama2-bias", root / "biased")
    return {
        "root": root,
        "biased": root / "biased",
        "student": small.chat_model("qwen3", root / "student"),
        "teacher": small.chat_model("llama3.1", root / "teacher", seed=1),
        "data": small.questions(root / "data.jsonl", 60),
    }


def test_only_the_matrices_of_the_layers_are_quantised_and_from_the_stored_numbers(folders) -> None:
    source = find(folders["biased"])
    stored, found = source.params(), source.params("bfloat16", quantization="int8")
    for path, _ in iter_specs(param_specs(source.config)):
        mine, whole = found, stored
        for name in path:
            mine, whole = mine[name], whole[name]
        assert isinstance(mine, Quantized) == (path[-1] in MATRICES), path
        if isinstance(mine, Quantized):
            for i in range(source.config.layers):
                expected = quantize(whole[i])
                np.testing.assert_array_equal(mine.values[i], expected.values)
                np.testing.assert_array_equal(mine.scale[i], expected.scale)
        else:
            np.testing.assert_array_equal(mine, whole.astype("bfloat16"))


def test_a_weight_that_is_no_number_is_refused_by_name(folders, tmp_path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folders["biased"] / "model.safetensors")
    tensors[name][3, 5] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["biased"] / "config.json").read_text())
    with pytest.raises(UserError, match=rf"{name} cannot be quantised: a weight is not a finite number"):
        find(tmp_path).params(quantization="int8")


# ------------------------------------------------------------------ the forward pass


def reference(params, tokens_T: np.ndarray, config) -> np.ndarray:
    """float64[T, V]: Llama with biases, from matrices that are multiplied out."""
    D, groups = config.head_dim, config.heads // config.kv_heads

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_eps) * weight

    def linear(x, layer, name):
        w = dequantized(Quantized(layer[name].values[i], layer[name].scale[i]))
        return x @ w + (np.float64(layer[f"{name}_bias"][i]) if f"{name}_bias" in layer else 0.0)

    angles = np.arange(len(tokens_T))[:, None] * config.rope_theta ** (-np.arange(0, D, 2) / D)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rotate(x):
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    params = jax.tree.map(np.asarray, params)
    layer, x = params["layers"], np.float64(params["embed"])[tokens_T]
    for i in range(config.layers):
        h = norm(x, np.float64(layer["attention_norm"][i]))
        q, k, v = (linear(h, layer, name).reshape(len(x), -1, D) for name in "qkv")
        q, k, v = rotate(q), rotate(k).repeat(groups, 1), v.repeat(groups, 1)
        scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(D)
        scores[:, np.triu_indices(len(x), 1)[0], np.triu_indices(len(x), 1)[1]] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v).reshape(len(x), -1)
        x = x + linear(out, layer, "o")
        h = norm(x, np.float64(layer["mlp_norm"][i]))
        gate = linear(h, layer, "gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, layer, "up"), layer, "down")
    return norm(x, np.float64(params["final_norm"])) @ np.float64(params["head"]).T


def test_logits_are_those_of_the_dequantised_weights(folders) -> None:
    model = distillax.load(folders["biased"])
    params = jax.tree.map(jnp.asarray, find(folders["biased"]).params(quantization="int8"))
    tokens = np.random.default_rng(0).integers(0, 160, (2, 23))
    expected = np.stack([reference(params, row, model.config) for row in tokens])
    for scan in (True, False):
        hidden = hidden_states(params, jnp.asarray(tokens), model.config, scan=scan, frozen=True)
        found = np.asarray(logits(params, hidden, model.config))
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    # And it is not the teacher's own: the test would see a scale that is left out, or applied twice.
    assert np.abs(np.asarray(model.logits(tokens)) - expected).max() > 1e-3 * np.abs(expected).max()


# ------------------------------------------------------------------ where it lies, and what it costs


def test_a_teacher_s_layers_cost_a_byte_a_weight(folders) -> None:
    source = find(folders["teacher"])
    mesh = make_mesh(TrainConfig())
    placed = place(source, jnp.bfloat16, mesh, "int8")
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed)
    assert described == abstract_weights(source.config, jnp.bfloat16, mesh, "int8")
    specs = {
        path: spec.full_shape(source.config.layers) for path, spec in iter_specs(param_specs(source.config))
    }
    matrices = {path: shape for path, shape in specs.items() if path[-1] in MATRICES}
    expected = sum(math.prod(shape) + 4 * shape[0] * shape[2] for shape in matrices.values())
    expected += 2 * sum(math.prod(shape) for path, shape in specs.items() if path not in matrices)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(placed)) == expected


def test_scales_are_split_as_their_outputs() -> None:
    sizes = {"fsdp": 4, "tensor": 2}
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    config = preset("llama3.1-8b")
    weights = abstract_weights(config, jnp.bfloat16, mesh, "int8")
    whole = abstract_weights(config, jnp.bfloat16, mesh)
    for name in MATRICES:
        values, scale = weights["layers"][name]
        assert values.sharding == whole["layers"][name].sharding and values.dtype == jnp.int8
        assert values.shape == whole["layers"][name].shape and scale.dtype == jnp.float32
        assert scale.shape == (values.shape[0], 1, values.shape[2])
        split_I, split_O = values.sharding.spec[1:]
        assert scale.sharding.spec[1] is None and scale.sharding.spec[2] == split_O and split_I and split_O
    assert weights["head"] == whole["head"] and weights["embed"] == whole["embed"]


PLACED = """
import json, sys
import jax, jax.numpy as jnp
from distillax.checkpoints.source import find
from distillax.config import TrainConfig
from distillax.parallel.mesh import make_mesh
from distillax.parallel.weights import abstract_weights, place
mesh = make_mesh(TrainConfig(ici_fsdp_parallelism=2, ici_tensor_parallelism=2))
source = find(sys.argv[1])
placed = place(source, jnp.bfloat16, mesh, "int8")["layers"]
described = abstract_weights(source.config, jnp.bfloat16, mesh, "int8")["layers"]
same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), placed, described)
sizes = [[x.nbytes, *(s.data.nbytes for s in x.addressable_shards)] for x in (*placed["q"], *placed["down"])]
print(json.dumps([all(jax.tree.leaves(same)), sizes]))
"""


def on_devices(number: int, *words: object) -> str:
    devices = {"JAX_NUM_CPU_DEVICES": str(number)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | devices, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_four_devices_share_the_weights_of_a_matrix_and_its_scales(folders) -> None:
    same, sizes = json.loads(on_devices(4, "-c", PLACED, folders["teacher"]))
    assert same
    for values, scale in (sizes[:2], sizes[2:]):
        assert [4 * part for part in values[1:]] == values[:1] * 4
        assert [2 * part for part in scale[1:]] == scale[:1] * 4  # inputs have no part in them


PLANNED = r"""
import json, re, sys
import jax, jax.numpy as jnp
from dataclasses import replace
from distillax.config import TrainConfig
from distillax.models import transformer
from distillax.models.families import preset
from distillax.parallel.mesh import batch_sharding, make_mesh
from distillax.parallel.weights import abstract_weights
axes = {"fsdp": 4} if sys.argv[1] == "fsdp" else {"fsdp": 2, "tensor": 2}
mesh = make_mesh(TrainConfig(**{f"ici_{axis}_parallelism": size for axis, size in axes.items()}))
small = {"width": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp_width": 768, "vocab_size": 512}
tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32, sharding=batch_sharding(mesh))
found = []
for layers in (2, 20):
    config = replace(preset("llama3.1-8b"), layers=layers, windows=(0,) * layers, **small)
    def forward(params, tokens):
        return transformer.hidden_states(params, tokens, config, dtype=jnp.bfloat16, frozen=True)
    with jax.set_mesh(mesh):
        planned = abstract_weights(config, jnp.bfloat16, mesh, "int8")
        program = jax.jit(forward).lower(planned, tokens).compile()
    found.append(program.memory_analysis().temp_size_in_bytes)
gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(.*dimensions={(?:0|1)}", program.as_text())
print(json.dumps([found, gathered]))
"""


@pytest.mark.optimised
@pytest.mark.parametrize("axes", ["fsdp", "fsdp and tensor"])
def test_layers_are_gathered_in_8_bits_and_one_at_a_time(axes: str) -> None:
    (few, many), gathered = json.loads(on_devices(4, "-c", PLANNED, axes))
    norms = 18 * 2 * 256 * 2  # which XLA's CPU backend keeps copies of, in bfloat16
    assert many - few <= norms
    assert gathered.count("s8") == len(MATRICES)


def arguments(folders: dict[str, Path], run_name: str, **changes: object) -> list[str]:
    keys: dict[str, object] = dict(
        teacher_load_parameters_path=folders["teacher"],
        teacher_quantization="int8",
        steps=2,
        max_target_length=64,
        learning_rate="1e-3",
    )
    return small.training("online", folders, run_name, **(keys | changes))


def lines(folders: dict[str, Path], run_name: str) -> list[dict[str, float]]:
    return small.metrics(folders["root"] / "runs" / run_name)


def weights(folders: dict[str, Path], run_name: str) -> np.ndarray:
    params = find(folders["root"] / "runs" / run_name).params()
    return np.concatenate([np.asarray(params["layers"][name], np.float32).ravel() for name in ("q", "down")])


def test_a_run_is_the_same_on_one_device_and_on_four(folders) -> None:
    words = "-m", "distillax", "train"
    said = on_devices(1, *words, *arguments(folders, "one", per_device_batch_size=2))
    assert "float32, layers in int8)" in said
    split = {"ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 2, "per_device_batch_size": 1}
    on_devices(4, *words, *arguments(folders, "four", **split))
    for one, four in zip(lines(folders, "one"), lines(folders, "four"), strict=True):
        assert one["weight_sum"] == four["weight_sum"]
        for name in ("loss", "forward_kl", "teacher_entropy"):
            assert four[name] == pytest.approx(one[name], rel=1e-5), name
    np.testing.assert_allclose(weights(folders, "four"), weights(folders, "one"), atol=1e-5)


def test_in_bfloat16_it_is_a_little_off_the_teacher_itself(folders) -> None:
    """The first step of the same run, by a teacher as it is and by one in 8 bits."""
    found = []
    for kind in ("int8", ""):
        keys = {"teacher_quantization": kind, "dtype": "bfloat16", "steps": 1}
        name = f"bfloat16-{kind}"
        recipe, *overrides = arguments(folders, name, **keys)
        train(load_config(TrainConfig, recipe, overrides), say=lambda _: None)
        found.append(lines(folders, name)[0])
    quantised, plain = found
    assert quantised["cross_entropy"] == plain["cross_entropy"]
    assert quantised["forward_kl"] != plain["forward_kl"]
    assert quantised["forward_kl"] == pytest.approx(plain["forward_kl"], rel=0.02)


# ------------------------------------------------------------------ capture


def test_a_cache_of_it_and_no_other_is_gone_on_with(folders, tmp_path, capsys) -> None:
    def capture(*flags: str) -> int:
        words = [
            "--teacher-model",
            folders["teacher"],
            "--dataset",
            folders["data"],
            "--output-dir",
            tmp_path / "c",
        ]
        return main(
            ["capture", *map(str, words), "--format", "topk", "--k", "4", "--dtype", "float32", *flags]
        )

    assert capture("--teacher-quantization", "int8") == 0
    assert TargetStore.open(tmp_path / "c").manifest["teacher_quantization"] == "int8"
    assert capture("--teacher-quantization", "int8") == 0
    assert capture() == 2
    assert "configuration: teacher_quantization=" in capsys.readouterr().err
    said: list[str] = []
    changes = {"teacher_quantization": "", "teacher_cache_path": tmp_path / "c"}
    recipe, *overrides = arguments(folders, "cached", steps=1, **changes)
    train(load_config(TrainConfig, recipe.replace("online", "cached"), overrides), say=said.append)
    assert any(line.endswith(f"from {folders['teacher']}, layers in int8") for line in said)
    assert any(line.startswith("steps: 1, which read the data up to ") for line in said)


# ------------------------------------------------------------------ mistakes


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="teacher_quantization"):
        load_config(TrainConfig, "recipes/online.yml", ["teacher_quantization=int4"])
    for method in ("sft", "cached"):
        config = load_config(TrainConfig, f"recipes/{method}.yml", ["teacher_quantization=int8"])
        with pytest.raises(
            UserError, match=f"teacher_quantization has no effect with method={method}.*online"
        ):
            refuse_idle_keys(config)
    with pytest.raises(UserError, match="--teacher-quantization int4 is not known; give int8"):
        CaptureConfig(teacher_quantization="int4")
    for engine in ("vllm", "server"):
        with pytest.raises(UserError, match=f"--teacher-quantization has no effect with --engine {engine}"):
            CaptureConfig(engine=engine, format="topk", teacher_quantization="int8")


# ------------------------------------------------------------------ a real model


def test_the_error_of_a_real_teacher(smollm2_folder: Path, tmp_path: Path) -> None:
    """KL(the teacher || itself in 8 bits) on real conversations, by the same products."""
    conversations = [
        [
            {"role": role, "content": str(text)}
            for role, text in zip(("user", "assistant"), turns, strict=False)
        ]
        for file in parts.chatterbot_yaml()
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        if len(turns) > 1
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations[::20]))
    model = distillax.load(smollm2_folder)
    params = jax.tree.map(jnp.asarray, find(smollm2_folder).params(quantization="int8"))
    options = {"teacher": model, "dtype": "float32", "max_target_length": 256, "show_progress": False}
    scores = evaluate(replace(model, params=params), str(data), **options)
    assert scores.tokens > 1000  # measured: 0.0042 nats a token, and 95.6%
    assert 0.001 < scores.kl_teacher_student < 0.008 and scores.top1_agreement > 0.94
