"""One step of each method on meshes of one to eight simulated devices, as JSON: run by test_scale.py in
a process of its own, since the number of devices is said before JAX starts; or, given the address of the
first and an index, in two of them with two devices each."""

import json
import math
import os
import re
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

os.environ["JAX_NUM_CPU_DEVICES"] = "2" if sys.argv[1:] else "8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distillax.models import attention, layout, splash
from distillax.models.families import config_from_hf, param_specs
from distillax.models.layout import AXES
from distillax.models.quantize import Quantized, quantize, quantized_specs
from distillax.models.spec import init_params
from distillax.parallel.hosts import global_array
from distillax.parallel.mesh import batch_sharding, param_shardings
from distillax.plan.traffic import by_kind, collectives
from distillax.train import objectives, rows
from distillax.train.fused import chunked
from distillax.train.objectives import Compute, Features, Setup
from distillax.train.setup import trained_specs
from distillax.train.step import TrainState, make_step

MESHES = [
    {"fsdp": 2},
    {"tensor": 2, "context": 2},
    {"data": 8},
    {"fsdp": 4, "expert": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "context": 4},
    {"data": 2, "context": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2},
]
OF_CACHED = MESHES[:6]
OF_FEATURES = MESHES[3:6]
OF_REPLICATED_TEACHER = MESHES[3]
OF_FEW_HEADS = {"fsdp": 2, "tensor": 4}  # two key/value heads
OF_TWO_PROCESSES = {
    "sft": [{"data": 2, "fsdp": 2}],
    "online": [{"data": 2, "fsdp": 2}, {"context": 2, "tensor": 2}],
    "cached": [{"fsdp": 4}],
}
VOCABULARY, BATCH, TOKENS, IDS = 96, 8, 32, 5
REAL = 88  # ids of a text: the others are padding rows


def model(layers: int, width: int, **more: object):
    hf = {
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **more,
    }
    return config_from_hf(hf)


def weights(specs, layers: int, seed: int):
    """The initial ones; the matrices in 8 bits of which the table has two parts."""

    def plain(spec):
        return spec if not isinstance(spec, Quantized) else replace(spec.values, dtype=None)

    whole = lambda x: isinstance(x, Quantized)  # noqa: E731
    found = init_params(jax.tree.map(plain, specs, is_leaf=whole), layers, jax.random.key(seed))
    return jax.tree.map(
        lambda spec, w: quantize(w) if whole(spec) else w, specs, jax.device_get(found), is_leaf=whole
    )


def batch(method: str) -> dict[str, np.ndarray]:
    """Two microbatches of packed rows, with padding, and loss on some tokens."""
    rng = np.random.default_rng(0)
    shape = (2, BATCH, TOKENS)
    cut = rng.integers(8, 20, (2, BATCH, 1))
    at = np.broadcast_to(np.arange(TOKENS), shape)
    found = {
        "inputs": rng.integers(0, REAL, shape),
        "targets": rng.integers(0, REAL, shape),
        "segment_ids": np.where(at < cut, 1, np.where(at < 28, 2, 0)),
        "positions": np.where(at < cut, at, at - cut),
    }
    found = {name: x.astype(np.int32) for name, x in found.items()}
    found["weights"] = ((rng.random(shape) < 0.6) & (at < 28)).astype(np.float32)
    if method.startswith("cached"):
        found["target_ids"] = np.argsort(rng.random((*shape, REAL)), -1)[..., :IDS].astype(np.int32)
        found["target_weights"] = rng.dirichlet(np.ones(IDS + 1), shape)[..., :IDS].astype(np.float32)
        found["teacher_entropy"] = rng.random(shape).astype(np.float32)
    return found


STUDENT, TEACHER = model(2, 32), model(3, 48, tie_word_embeddings=True)
KNOBS = {name: np.float32(value) for name, value in {"alpha": 0.7, "temperature": 2.0, "beta": 0.5}.items()}
SETUPS = {
    "sft": Setup(STUDENT, Compute("float32", "full")),
    "online": Setup(
        STUDENT, Compute("float32", "minimal"), TEACHER, rows=rows.Online("jsd", 0.4), vocabulary=VOCABULARY
    ),
    "cached": Setup(STUDENT, rows=rows.TopK("reverse_kl"), vocabulary=VOCABULARY),
    "online, int8, hidden states": Setup(
        STUDENT,
        teacher=TEACHER,
        rows=rows.Online("forward_kl"),
        features=Features(((0, 1), (1, 2))),
        vocabulary=REAL,
    ),
    "cached, sampled": Setup(STUDENT, rows=rows.Sampled("forward_kl"), vocabulary=REAL),
}


def step(method: str, sizes: dict[str, int], teacher_sharding: str = "fsdp"):
    """(metrics, updated parameters, bytes that a device sends) of one step on a mesh of these sizes."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = (jax.devices() if sizes else jax.local_devices())[: math.prod(shape)]
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    optimizer = optax.sgd(10.0)  # so that an update is not lost among the digits of the weight

    def place(specs, layers: int, seed: int, rules=layout.RULES):
        shardings = param_shardings(specs, layers, mesh, rules)
        return jax.tree.map(global_array, shardings, weights(specs, layers, seed))

    student, teacher = place(trained_specs(SETUPS[method]), STUDENT.layers, 0), None
    if method.startswith("online"):
        specs = param_specs(TEACHER)
        specs = quantized_specs(specs) if "int8" in method else specs
        teacher = place(specs, TEACHER.layers, 1, layout.TEACHER_RULES[teacher_sharding])
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        placed = {name: global_array(batch_sharding(mesh, leading=1), x) for name, x in batch(method).items()}
        update = jax.jit(
            make_step(objectives.OBJECTIVES[method.partition(",")[0]], SETUPS[method], optimizer)
        )
        state = TrainState(student, optimizer.init(student))
        knobs = {name: global_array(whole, value) for name, value in KNOBS.items()}
        update = update.lower(state, teacher, placed, knobs).compile()
        state, metrics = update(state, teacher, placed, knobs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        before = student
        for key in path:
            before = before[key.key]
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim), (method, sizes, path)
    everywhere = jax.device_get if jax.process_count() == 1 or not sizes else gathered
    return *everywhere((metrics, state.params)), by_kind(collectives(update.as_text(), mesh.size))


def gathered(tree):
    """Of all processes' parts, on each."""
    return jax.tree.map(lambda x: process_allgather(x, tiled=True), tree)


def loss_collectives(sizes: dict[str, int], row: rows.Online | rows.CrossEntropy) -> dict[str, int]:
    """Collectives of the chunked loss and its gradient, against a teacher if `row` asks for one, by where XLA
    has put them: in the entry computation, or in another, which the loop over the chunks is."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    tokens = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32, sharding=batch_sharding(mesh))
    weight = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.float32, sharding=batch_sharding(mesh))
    hidden = jax.ShapeDtypeStruct((BATCH, TOKENS, 32), jnp.float32, sharding=batch_sharding(mesh))
    split = NamedSharding(mesh, layout.weight_spec(mesh, ("vocab", "embed"), (VOCABULARY, 32)))
    head = jax.ShapeDtypeStruct((VOCABULARY, 32), jnp.float32, sharding=split)
    knobs = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in ("alpha", "temperature")}

    def loss(hidden, head, weights, targets, teacher, teacher_head, knobs):
        tokens, constants = {"targets": targets, "teacher": teacher}, {**knobs, "teacher_head": teacher_head}
        return chunked(row, hidden, head, weights, tokens, constants, chunk=8)[0]

    with jax.set_mesh(mesh):
        arguments = hidden, head, weight, tokens, hidden, head, knobs
        program = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile().as_text()
    found: dict[str, int] = {}
    where = ""
    for line in program.splitlines():
        if line and not line.startswith(" "):
            where = "entry" if line.startswith("ENTRY") else "elsewhere"
        if kind := re.search(
            r" = \S+ (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", line
        ):
            name = f"{where} {kind[1]}"
            found[name] = found.get(name, 0) + 1
    return found


def attention_flops() -> list[float]:
    """Of attention and its gradient on one of four devices that split 8 query heads, with so many key/value
    heads as these, as shares of the whole on one device."""
    mesh = jax.make_mesh((1, 1, 4, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def flops(kv_heads: int) -> float:
        def total(q, k, v):
            return attention.causal_attention(q, k, v, 0.125).sum()

        q, k, v = (jax.ShapeDtypeStruct((2, 128, n, 16), jnp.float32) for n in (8, kv_heads, kv_heads))
        return jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v).compile().cost_analysis()["flops"]

    found = []
    for kv_heads in (8, 4, 2, 1):
        with jax.set_mesh(mesh):
            split = flops(kv_heads)
        found.append(split / flops(kv_heads))
    return found


def attention_of_tpus(window: int, tensor: int) -> dict[str, float]:
    """The largest errors of output and gradients, as shares of the largest values: the kernel of TPUs,
    interpreted, of packed rows that context 2 splits, and heads that tensor does, against our own blocks on
    one device, bfloat16."""
    rng = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(2, 768, n, 64)), jnp.bfloat16) for n in (4, 2, 2, 4))
    segments = jnp.asarray(np.repeat([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2]], 128, 1), jnp.int32)

    @jax.jit
    def run(q, k, v):
        def total(q, k, v):
            out = attention.causal_attention(q, k, v, 0.125, window, segments).astype(jnp.float32)
            return (out * weight.astype(jnp.float32)).sum(), out

        gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    wanted = run(q, k, v)
    made = mock.Mock(side_effect=partial(splash.make_kernel, interpret=True))
    mesh = jax.make_mesh((1, 4 // tensor, tensor, 2, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    with (
        jax.set_mesh(mesh),
        mock.patch.object(attention, "platform", lambda: "tpu"),
        mock.patch.object(splash, "make_kernel", made),
    ):
        found = jax.jit(run.__wrapped__)(q, k, v)
    assert made.call_args.args == (768, 4, window, 2)
    found, wanted = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(x)) for x in (found, wanted)
    )
    return {
        name: float(np.abs(a - b).max() / np.abs(b).max())
        for name, a, b in zip(("output", "q", "k", "v"), found, wanted, strict=True)
    }


def main() -> None:
    meshes = {"sft": [*MESHES, OF_FEW_HEADS], "online": MESHES, "cached": OF_CACHED}
    meshes |= {"online, int8, hidden states": OF_FEATURES, "cached, sampled": MESHES[4:5]}
    if sys.argv[1:]:
        meshes = OF_TWO_PROCESSES
        jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    else:
        of_losses = ({"fsdp": 8}, rows.CrossEntropy()), ({"fsdp": 4, "tensor": 2}, rows.Online())
        print(json.dumps([loss_collectives(*case) for case in of_losses]))
        print(json.dumps(attention_flops()))
        print(json.dumps([attention_of_tpus(*case) for case in ((0, 2), (60, 4))]))
    cases = [(method, sizes, "fsdp") for method in meshes for sizes in meshes[method]]
    cases += [] if sys.argv[1:] else [("online", OF_REPLICATED_TEACHER, "replicated")]
    at_once = layout.scattered_at_once
    alone = {method: step(method, {}) for method in meshes}
    for method, sizes, teacher_sharding in cases:
        # But for SFT axis after axis, and one of four in turns, as on large slices of TPUs.
        layout.scattered_at_once = at_once if method == "sft" else lambda kind: 2
        metrics, params, sent = step(method, sizes, teacher_sharding)
        reference, expected, _ = alone[method]
        before = weights(trained_specs(SETUPS[method]), STUDENT.layers, 0)
        errors = jax.tree.map(
            lambda a, b, start: float(np.abs(a - b).max() / np.abs(b - start).max()),
            params,
            expected,
            before,
        )
        moved = zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)
        row = {
            "method": method,
            "mesh": sizes,
            "teacher_sharding": teacher_sharding,
            "gathered": sent.get("all-gather", 0),
            "loss": abs(float(metrics["loss"]) / float(reference["loss"]) - 1),
            "update": max(jax.tree.leaves(errors)),
            "moved": min(float(jnp.abs(a - b).max()) for a, b in moved),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
