"""Learning from a teacher's logits through the whole program: each number computed again in another way."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import distillax
from distillax.checkpoints.convert import to_orbax
from distillax.checkpoints.source import find
from distillax.checkpoints.state import open_params
from distillax.config import TrainConfig
from distillax.data.batches import Counts, make_batches
from distillax.data.examples import load_examples
from distillax.data.targets import TargetStore
from distillax.errors import UserError
from distillax.evaluate import evaluate
from distillax.models.families import param_specs
from distillax.models.spec import count_params, map_specs
from distillax.parallel.mesh import make_mesh
from distillax.settings import load_config
from distillax.teachers.capture import CaptureConfig, capture
from distillax.train import loop, objectives, rows
from distillax.train.loop import train
from distillax.train.method import knobs, matched_layers
from distillax.train.objectives import Compute, Features, Setup
from distillax.train.optimizer import make_optimizer
from distillax.train.setup import abstract_state, trained_specs
from distillax.train.step import accumulate, make_step

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
ROWS = 256 + len(SPECIAL)  # ids that the tokenizer has
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_model(name: str, folder: Path, seed: int = 0, rows: int = ROWS, **options) -> Path:
    """A random model of a family with a tokenizer of single bytes: small enough for many runs."""
    tiny.make(name, folder, seed=seed, vocab_size=rows, **options)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(SPECIAL + letters)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def with_more_rows(source: Path, target: Path, scale: float) -> Path:
    """The model with 24 padding rows in its vocabulary; at a scale of 1 it likes them best by far."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["vocab_size"] += 24
    (target / "config.json").write_text(json.dumps(config))
    tensors, rng = load_file(target / "model.safetensors"), np.random.default_rng(0)
    for name in sorted({"model.embed_tokens.weight", "lm_head.weight"} & set(tensors)):  # in one order
        more = scale * rng.normal(size=(24, tensors[name].shape[1]))
        tensors[name] = np.concatenate([tensors[name], more.astype(np.float32)])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student, a teacher of its width, and one of another family, width, depth and number of rows."""
    root = tmp_path_factory.mktemp("online")
    far = {"hidden_size": 48, "head_dim": 24}
    return {
        "root": root,
        "student": byte_model("qwen3", root / "student"),
        "near": byte_model("llama3.1", root / "near", seed=1),
        "far": byte_model("gemma3-softcap", root / "far", seed=2, rows=ROWS + 13, num_hidden_layers=4, **far),
        "data": small.questions(root / "data.jsonl", 60),
    }


def arguments(world: dict[str, Path], run_name: str, method: str = "online", **changes: object) -> list[str]:
    keys: dict[str, object] = dict(
        steps=1,
        per_device_batch_size=4,
        max_target_length=192,
        checkpoint_period=100,
        learning_rate=0,
    )
    if method == "online":
        keys["teacher_load_parameters_path"] = world["near"]
    return small.training(method, world, run_name, **(keys | changes))


def run(world: dict[str, Path], run_name: str, method: str = "online", **changes: object) -> Path:
    recipe, *overrides = arguments(world, run_name, method, **changes)
    return train(load_config(TrainConfig, recipe, overrides), say=lambda _: None).run


# ------------------------------------------------------------------ one batch, split in every way


def documents() -> list[dict[str, np.ndarray]]:
    """Random documents with prompts of unequal length, and cached targets of five ids."""
    rng = np.random.default_rng(0)
    made = []
    for length, prompt in [(30, 25), (9, 2), (20, 10), (14, 13), (26, 3), (5, 1), (11, 4), (18, 16)]:
        tokens, n = rng.integers(3, 160, length), length - 1
        made.append(
            {
                "inputs": tokens[:-1],
                "targets": tokens[1:],
                "weights": (np.arange(1, length) >= prompt).astype(np.float32),
                "target_ids": np.stack([rng.permutation(160)[:5] for _ in range(n)]),
                "target_weights": rng.dirichlet(np.ones(6), n)[:, :5].astype(np.float32),
                "teacher_entropy": rng.uniform(0, 5, n).astype(np.float32),
            }
        )
    return made


def batch_of(layout: list[list[list[int]]]) -> dict[str, jax.Array]:
    """[A, B, T, ...]: microbatches of rows that hold the numbered documents one after the other."""
    docs = documents()
    T = max(sum(len(docs[i]["inputs"]) for i in row) for rows in layout for row in rows)
    batch: dict[str, np.ndarray] = {}
    for a, rows_of_a in enumerate(layout):
        for b, row in enumerate(rows_of_a):
            at = 0
            for segment, number in enumerate(row, 1):
                n = len(docs[number]["inputs"])
                where = {"segment_ids": np.full(n, segment), "positions": np.arange(n)}
                for name, values in (docs[number] | where).items():
                    shape = (len(layout), len(rows_of_a), T, *values.shape[1:])
                    kind = np.float32 if values.dtype.kind == "f" else np.int32
                    batch.setdefault(name, np.zeros(shape, kind))[a, b, at : at + n] = values
                at += n
    return {name: jnp.asarray(values) for name, values in batch.items()}


LAYOUTS = {
    "padded, one batch": [[[i] for i in range(8)]],
    "padded, eight": [[[i]] for i in range(8)],
    "packed, two": [[[6, 2, 5], [1, 0]], [[7, 3], [4]]],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[distillax.Model, distillax.Model]:
    root = tmp_path_factory.mktemp("pair")
    options = {"hidden_size": 48, "head_dim": 24, "num_hidden_layers": 4, "vocab_size": 176}
    tiny.make("qwen2", root / "student", num_hidden_layers=2)
    tiny.make("gemma3-softcap", root / "teacher", seed=1, **options)
    return distillax.load(root / "student"), distillax.load(root / "teacher")


@pytest.mark.parametrize("method", ["sft", "online", "cached sampled", "cached topk"])
def test_gradients_do_not_depend_on_the_split(method, pair) -> None:
    """Pitfalls 1 and 2: microbatches, packing and padding change nothing, prompts being unequal."""
    student, teacher = pair
    setup = Setup(student.config, Compute(remat="full"), vocabulary=160)
    params, frozen = student.params, None
    values = {"alpha": 0.6, "temperature": 1.5, "beta": 0.3}
    if method == "online":
        row = rows.Online("jsd", 0.4, teacher_cap=teacher.config.logit_softcap)
        features = Features(((0, 1), (1, 3)), "l2")
        setup = replace(setup, teacher=teacher.config, rows=row, features=features)
        projection = jax.random.normal(jax.random.key(0), (2, 64, 48)) / 8
        params, frozen = {**params, objectives.PROJECTION: projection}, teacher.params
    elif method != "sft":
        setup = replace(setup, rows=rows.Sampled() if "sampled" in method else rows.TopK("reverse_kl"))
    objective = partial(objectives.OBJECTIVES[method.split()[0]], setup=setup)
    step = jax.jit(partial(accumulate, objective))
    scalars = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    found = {name: step(params, frozen, batch_of(layout), scalars) for name, layout in LAYOUTS.items()}

    base = found.pop("padded, one batch")
    assert float(base[1]) == sum(d["weights"].sum() for d in documents())
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(base[0]))
    for name, (gradients, weight, terms) in found.items():
        assert float(weight) == float(base[1]), name
        for term, value in terms.items():
            np.testing.assert_allclose(value, base[2][term], rtol=1e-5, err_msg=f"{name}: {term}")
        for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(base[0]), strict=True):
            scale = float(jnp.abs(want).max())
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def test_gradients_of_bfloat16_weights_add_up_in_float32(pair) -> None:
    config = load_config(TrainConfig, "recipes/sft.yml", ["steps=5", "weight_dtype=bfloat16"])
    setup = Setup(pair[0].config)
    optimizer = make_optimizer(config, trained_specs(setup))
    state = abstract_state(setup, optimizer, config, make_mesh(config))
    batch = batch_of(LAYOUTS["padded, eight"])
    gradients, _, _ = jax.eval_shape(
        partial(accumulate, partial(objectives.sft, setup=setup)), state.params, None, batch, None
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    # 0.999 of a bfloat16 number is that number: a second moment would never fall.
    moments = [leaf.dtype for leaf in jax.tree.leaves(state.optimizer_state) if leaf.ndim]
    assert set(moments) == {jnp.dtype("float32")} and len(moments) == 2 * len(jax.tree.leaves(state.params))
    after, _ = jax.eval_shape(make_step(objectives.sft, setup, optimizer), state, None, batch, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("bfloat16")}


# ------------------------------------------------------------------ a student that is its teacher


def test_a_student_that_is_its_teacher_is_at_distance_zero(world) -> None:
    """Pitfalls 9 and 23, and for hidden states too."""
    changes = {"distill_beta": 1.0, "distill_layer_indices": "0,2", "distill_temperature": 2.0}
    folder = run(world, "itself", teacher_load_parameters_path=world["student"], **changes)
    found = small.metrics(folder)[0]
    assert abs(found["forward_kl"]) <= 1e-6 and abs(found["features"]) <= 1e-6
    assert found["teacher_entropy"] == pytest.approx(found["student_entropy"], rel=1e-6)
    assert abs(found["loss"]) <= 1e-6 < found["cross_entropy"] and found["grad_norm"] < 1e-4


def cache_of(world, teacher: str, name: str, data: Path | None = None, **options) -> Path:
    folder = world["root"] / name
    config = CaptureConfig(dtype="float32", **options)
    capture(str(world[teacher]), str(data or world["data"]), folder, config, show_progress=False)
    return folder


@pytest.mark.parametrize(("overlong", "refused"), [("truncate", True), ("drop", False)])
def test_a_row_without_targets_is_told_before_the_first_step(world, tmp_path, overlong, refused) -> None:
    """Not when it is reached; a row that is left out needs none."""
    cache = cache_of(world, "student", f"lacks-{overlong}", k=2)
    answer = {"role": "assistant", "content": "new " * 100}
    more = json.dumps({"messages": [{"role": "user", "content": "q"}, answer]})
    data = tmp_path / "more.jsonl"
    data.write_text(world["data"].read_text() + more + "\n")
    keys = {"teacher_cache_path": cache, "hf_path": data, "overlong": overlong, "data_shuffle_seed": 1}
    if refused:
        with pytest.raises(UserError, match=r"more\.jsonl, line 61 .*has no targets for this example"):
            run(world, "lacks", "cached", **keys)
        assert not (world["root"] / "runs" / "lacks").exists()
    else:
        run(world, "needs-none", "cached", **keys)


def test_a_teacher_with_another_template_is_noted(world, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world["near"], other)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(other)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(other)
    for teacher, noted in ((world["near"], False), (other, True)):
        said: list[str] = []
        name = f"template-{teacher.name}"
        recipe, *overrides = arguments(world, name, teacher_load_parameters_path=teacher)
        train(load_config(TrainConfig, recipe, overrides), said.append)
        assert any(line.startswith("note: the teacher has another chat template") for line in said) is noted


def test_the_likeliest_ids_of_the_student_itself(world) -> None:
    """Pitfalls 8 and 9: zero but for the rounding of the stored numbers, which costs half a millinat."""
    cache = cache_of(world, "student", "itself-topk", format="topk", k=64, temperature=2.0)
    keys = {"distill_divergence": "jsd", "distill_jsd_beta": 0.0, "distill_temperature": 2.0}
    folder = run(world, "itself-topk", "cached", teacher_cache_path=cache, **keys)
    found = small.metrics(folder)[0]
    assert 0 < found["jsd"] <= 2.0**2 * 5e-4
    assert found["loss"] == found["jsd"] and found["grad_norm"] < 0.1


def test_samples_of_the_student_itself(world) -> None:
    """Pitfalls 8 and 9: zero in the mean over positions and seeds, though no single value is."""
    values, counts = [], []
    for seed in range(3):
        cache = cache_of(world, "student", f"itself-{seed}", seed=seed)
        folder = run(world, f"itself-sampled-{seed}", "cached", teacher_cache_path=cache, steps=8)
        values += [x["forward_kl"] for x in small.metrics(folder)]
        counts += [x["weight_sum"] for x in small.metrics(folder)]
    x, n = np.array(values), np.array(counts)
    mean = (x * n).sum() / n.sum()
    error = np.sqrt((n**2 * (x - mean) ** 2).sum()) / n.sum()  # of a ratio of sums over 24 batches
    assert 0 < error < 0.02
    assert abs(mean) < 4 * error


def test_data_that_is_read_too_often_for_its_draws(world) -> None:
    """100 rows of 30 tokens, two of them dropped, one without loss: 4 rows of 192 a step."""
    data = Counts(rows=100, truncated=0, dropped=2, empty=1, tokens=3000, loss_tokens=1500)
    few, many = (SimpleNamespace(format="sampled", k=k) for k in (19, 48))
    likeliest = SimpleNamespace(format="topk", k=19)

    def said(targets, steps, **keys) -> list[str]:
        recipe, *overrides = arguments(world, "often", "cached", teacher_cache_path="x", steps=steps, **keys)
        config = load_config(TrainConfig, recipe, overrides)
        return list(loop._times_over(config, make_mesh(config), data, targets))

    line, note = said(few, 1000)  # 4 x 192 x 1000 / 3000
    assert line == "steps: 1,000, which read the data up to 256.00 times" and "--k 48" in note
    assert len(said(few, 15)) == 1 and len(said(few, 16)) == 2  # 3.84 and 4.10 times
    assert said(few, 97, packing="false") == ["steps: 97, which read the data 4.00 times"]  # 388 of 97 rows
    assert len(said(few, 98, packing="false")) == 2
    assert len(said(many, 1000)) == len(said(likeliest, 1000)) == len(said(None, 1000)) == 1


# ------------------------------------------------------------------ the numbers of one step, by hand


def first_batch(world, **options) -> dict[str, np.ndarray]:
    examples = load_examples(str(world["data"]), find(world["student"]).tokenizer())
    options = {"packing": True, "shuffle_seed": 0, "overlong": "truncate", "batch_size": 4} | options
    batches = make_batches(examples, examples.encode, max_target_length=192, **options)
    found = next(batches)
    batches.close()
    return found


def by_transformers(folder: Path, batch: dict[str, np.ndarray], layers: list[int]):
    """(model, logits of the loss-bearing tokens [N, ROWS], hidden states [N, D] after the layers), in
    float64, each document read alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    logits, hidden = [], []
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            bears = torch.tensor(batch["weights"][row][here] > 0)
            tokens = torch.tensor(batch["inputs"][row][here][None], dtype=torch.long)
            out = model(tokens, output_hidden_states=True)
            logits.append(out.logits[0, bears, :ROWS])
            hidden.append(torch.stack([out.hidden_states[i + 1][0, bears] for i in layers]))
    return model, torch.cat(logits), torch.cat(hidden, 1)


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def compare(folder: Path, expected: dict[str, float]) -> None:
    """The run logged these numbers for its one step, and no others."""
    (found,) = small.metrics(folder)
    clock = {"step", "learning_rate", "step_seconds", "tokens_per_second"}
    assert set(found) - clock == set(expected)
    for term, value in expected.items():
        assert found[term] == pytest.approx(value, rel=1e-5), term


CASES = {
    "another width": (
        "far",
        dict(
            distill_divergence="jsd",
            distill_jsd_beta=0.3,
            distill_temperature=2.0,
            distill_alpha=0.7,
            distill_beta=0.25,
            distill_feature_loss_type="l2",
            distill_layer_indices="0,1",
            distill_teacher_layer_indices="1,2",
        ),
    ),
    "the same width": (
        "near",
        dict(
            distill_divergence="reverse_kl",
            distill_alpha=0.4,
            distill_beta=2.0,
            distill_layer_indices="1",
            gradient_accumulation_steps=2,
            per_device_batch_size=2,
        ),
    ),
}


def test_of_a_teacher_of_another_depth_the_layers_are_to_be_named() -> None:
    """The same numbers would be other layers: the last of a student, and one amid its teacher's."""
    config = TrainConfig(method="online", distill_beta=1.0, distill_layer_indices=(0, 2))
    assert matched_layers(config, 3, 3).layers == ((0, 0), (2, 2))
    with pytest.raises(UserError, match="distill_teacher_layer_indices"):
        matched_layers(config, 3, 4)
    named = config.model_copy(update={"distill_teacher_layer_indices": (0, 3)})
    assert matched_layers(named, 3, 4).layers == ((0, 0), (2, 3))


@pytest.mark.parametrize("case", CASES)
def test_one_step_by_hand(case, world) -> None:
    """Every term that is logged, and the norm of the gradient, from transformers' models."""
    name, keys = CASES[case]
    folder = run(world, f"by-hand-{name}", teacher_load_parameters_path=world[name], **keys)
    batch = first_batch(world)
    ours = [int(i) for i in keys["distill_layer_indices"].split(",")]
    theirs = [int(i) for i in str(keys.get("distill_teacher_layer_indices", "1")).split(",")]
    student, z, h = by_transformers(world["student"], batch, ours)
    with torch.no_grad():
        _, zt, ht = by_transformers(world[name], batch, theirs)
    T, alpha, beta = keys.get("distill_temperature", 1.0), keys["distill_alpha"], keys["distill_beta"]
    log_q, log_p = (torch.log_softmax(x / T, -1) for x in (z, zt))
    log_q1, log_p1 = (torch.log_softmax(x, -1) for x in (z, zt))
    trained = list(student.parameters())
    if name == "far":
        projection = open_params(folder / "checkpoints" / "1" / "optimizer_state")[("projection",)]
        weights = torch.tensor(projection.read().result(), dtype=torch.float64, requires_grad=True)
        assert weights.shape == (2, 64, 48) and weights.std().item() == pytest.approx(64**-0.5, rel=0.05)
        trained.append(weights)
        log_m = torch.log(0.3 * log_p.exp() + 0.7 * log_q.exp())
        divergence = 0.3 * kl(log_p, log_m) + 0.7 * kl(log_q, log_m)
        features = ((h @ weights - ht) ** 2).mean(-1).mean(0)
    else:
        divergence = kl(log_q, log_p)
        features = (1 - torch.cosine_similarity(h, ht, -1)).mean(0)
    targets = torch.tensor(batch["targets"][batch["weights"] > 0], dtype=torch.long)
    nll = -log_q1.gather(1, targets[:, None])[:, 0]
    loss = (alpha * T**2 * divergence + (1 - alpha) * nll + beta * features).mean()
    loss.backward()
    means = {
        "loss": loss,
        "cross_entropy": nll.mean(),
        keys["distill_divergence"]: T**2 * divergence.mean(),
        "student_entropy": -(log_q1.exp() * log_q1).sum(-1).mean(),
        "teacher_entropy": -(log_p1.exp() * log_p1).sum(-1).mean(),
        "features": features.mean(),
        "grad_norm": torch.sqrt(sum((p.grad**2).sum() for p in trained)),
    }
    counts = {"weight_sum": len(targets), "tokens": int(np.count_nonzero(batch["segment_ids"]))}
    compare(folder, {term: value.item() for term, value in means.items()} | counts)


@pytest.mark.parametrize("format", ["sampled", "topk"])
def test_one_cached_step_by_hand(format, world) -> None:
    """As above, of the student, with what the cache holds of the teacher."""
    T, alpha = 1.5, 0.7
    cache = cache_of(world, "near", f"by-hand-{format}", format=format, k=12, temperature=T)
    keys = {"distill_temperature": T, "distill_alpha": alpha, "teacher_cache_path": cache}
    divergence = {"sampled": "forward_kl", "topk": "reverse_kl"}[format]
    folder = run(world, f"by-hand-{format}", "cached", distill_divergence=divergence, **keys)
    batch = first_batch(world, targets=TargetStore.open(cache).lookup)
    student, z, _ = by_transformers(world["student"], batch, [0])
    with torch.no_grad():
        _, zt, _ = by_transformers(world["near"], batch, [0])
    bears = batch["weights"] > 0
    names = ("targets", "target_ids", "target_weights")
    targets, ids, weights = (torch.tensor(batch[name][bears]) for name in names)
    ids, log_q, log_q1 = ids.long(), torch.log_softmax(z / T, -1), torch.log_softmax(z, -1)
    means = {}
    if format == "sampled":
        entropy = torch.tensor(batch["teacher_entropy"][bears], dtype=torch.float64)
        log_p = torch.log_softmax(zt / T, -1)
        assert torch.allclose(entropy, -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1 / 1024)
        soft = -(weights * log_q.gather(1, ids)).sum(-1) - entropy
        means["teacher_entropy"] = entropy.mean()
    else:
        buckets = []
        for head in (weights.double(), log_q.exp().gather(1, ids)):
            buckets.append(torch.log(torch.cat([head, 1 - head.sum(-1, keepdim=True)], -1)))
        soft = kl(buckets[1], buckets[0])
    nll = -log_q1.gather(1, targets.long()[:, None])[:, 0]
    loss = (alpha * T**2 * soft + (1 - alpha) * nll).mean()
    loss.backward()
    means |= {
        "loss": loss,
        "cross_entropy": nll.mean(),
        divergence: T**2 * soft.mean(),
        "student_entropy": -(log_q1.exp() * log_q1).sum(-1).mean(),
        "grad_norm": torch.sqrt(sum((p.grad**2).sum() for p in student.parameters())),
    }
    counts = {"weight_sum": len(targets), "tokens": int(np.count_nonzero(batch["segment_ids"]))}
    compare(folder, {term: value.item() for term, value in means.items()} | counts)


# ------------------------------------------------------------------ what the teacher costs


@pytest.mark.optimised
def test_the_teacher_costs_its_weights_and_nothing_else(pair) -> None:
    """Pitfall 24, as XLA plans the step: nothing is run."""
    config = load_config(TrainConfig, "recipes/online.yml", ["steps=5"])
    mesh, student = make_mesh(config), pair[0].config
    floats, ints = (partial(jax.ShapeDtypeStruct, dtype=kind) for kind in (jnp.float32, jnp.int32))
    names = ("inputs", "targets", "segment_ids", "positions")
    batch = {"weights": floats((2, 2, 64)), **{name: ints((2, 2, 64)) for name in names}}
    scalars = {name: floats(()) for name in ("alpha", "temperature", "beta")}
    student_only = Setup(student)
    alone = abstract_state(student_only, make_optimizer(config, trained_specs(student_only)), config, mesh)

    def plan(layers: int, dtype: str):
        teacher = replace(student, layers=layers, windows=(0,) * layers)
        setup = Setup(student, Compute(remat="full"), teacher, Compute(dtype), rows.Online(), vocabulary=160)
        optimizer = make_optimizer(config, trained_specs(setup))
        state, specs = abstract_state(setup, optimizer, config, mesh), param_specs(teacher)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, alone)
        weights = map_specs(lambda s: jax.ShapeDtypeStruct(s.full_shape(layers), jnp.dtype(dtype)), specs)
        step = jax.jit(make_step(objectives.online, setup, optimizer), donate_argnums=0)
        compiled = step.lower(state, weights, batch, scalars).compile()
        return compiled.memory_analysis(), count_params(specs, layers)

    (few, fewer), (many, more), (halved, same) = plan(2, "float32"), plan(20, "float32"), plan(20, "bfloat16")
    assert same == more > 2 * fewer
    assert many.argument_size_in_bytes - few.argument_size_in_bytes == 4 * (more - fewer)
    assert many.argument_size_in_bytes - halved.argument_size_in_bytes == 2 * more
    assert few.output_size_in_bytes == many.output_size_in_bytes == halved.output_size_in_bytes
    # In bfloat16 XLA's CPU backend keeps float32 copies of weights, and no other backend does.
    assert many.temp_size_in_bytes == few.temp_size_in_bytes


# ------------------------------------------------------------------ ids that only one of the two has


LEARN = {"distill_alpha": 0.7, "learning_rate": 1e-2, "steps": 2}


@pytest.fixture(scope="module")
def padded(world) -> dict[str, Path]:
    root = world["root"]
    near, student = world["near"], world["student"]
    return world | {
        "likely": with_more_rows(near, root / "likely", 1.0),
        "probable": with_more_rows(near, root / "probable", 0.6),
        "possible": with_more_rows(near, root / "possible", 0.3),
        "wide": with_more_rows(student, root / "wide", 1.0),
    }


@pytest.fixture(scope="module")
def without(world) -> list[dict[str, float]]:
    """The numbers of two steps where no model has padding rows."""
    return small.metrics(run(world, "without", **LEARN))


def test_padding_rows_count_for_nothing(padded, without) -> None:
    """Contract C5, pitfall 11: as if the rows were not there, and they are left as they were."""
    teacher = run(padded, "likely", teacher_load_parameters_path=padded["likely"], **LEARN)
    student = run(padded, "wide", load_parameters_path=padded["wide"], **LEARN)
    for folder in (teacher, student):
        for found, wanted in zip(small.metrics(folder), without, strict=True):
            for name, value in wanted.items():
                if "second" not in name:
                    assert found[name] == pytest.approx(value, rel=1e-5), (folder.name, name)
    before, after = find(padded["wide"]).params(), find(student).params()
    for name in ("embed", "head"):
        np.testing.assert_array_equal(after[name][ROWS:], before[name][ROWS:])
        assert np.abs(after[name][:ROWS] - before[name][:ROWS]).max() > 1e-3


def lacking(cache: Path, world) -> float:
    """The share of ids that the student lacks in what a cache holds of the first example."""
    examples = load_examples(str(world["data"]), find(world["student"]).tokenizer())
    targets = TargetStore.open(cache).lookup(examples.encode(0))
    lacks, weights = targets["target_ids"] >= ROWS, targets["target_weights"]
    return float(weights[lacks].sum() / weights.sum())


def test_padding_rows_in_a_cache(padded, without) -> None:
    """Of all ids in a cache, those that the student lacks are taken out, however likely they were. Further
    below the likeliest than the format reaches, all others count alike, but count."""
    found, shares = {}, {}
    for name in ("possible", "probable", "likely"):
        cache = cache_of(padded, name, f"{name}-topk", format="topk", k=ROWS + 24)
        folder = run(padded, f"{name}-cached", "cached", teacher_cache_path=cache, distill_alpha=0.7)
        (found[name],) = small.metrics(folder)
        shares[name] = lacking(cache, padded)
    assert shares["likely"] > shares["probable"] > 0.99 > shares["possible"] > 0.5
    for term in ("forward_kl", "loss", "grad_norm"):
        assert found["possible"][term] == pytest.approx(without[0][term], rel=0.002), term
        assert found["probable"][term] == pytest.approx(without[0][term], rel=0.006), term
        assert np.isfinite(found["likely"][term])


# ------------------------------------------------------------------ schedules


def test_knobs_by_hand() -> None:
    keys = {
        "distill_alpha": 1,
        "distill_alpha_end": 0,
        "distill_alpha_schedule": "linear",
        "distill_temperature": 4,
        "distill_temperature_end": 1,
        "distill_temperature_schedule": "cosine",
        "distill_beta": 0.5,
    }
    config = load_config(TrainConfig, None, ["steps=4", *(f"{k}={v}" for k, v in keys.items())])
    found = [knobs(config, step) for step in (1, 2, 3, 4, 5, 9)]
    assert all(x.dtype == np.float32 and x.shape == () for at in found for x in at.values())
    half = 1.5 / math.sqrt(2)
    for name, wanted in {
        "alpha": [1, 0.75, 0.5, 0.25, 0, 0],
        "temperature": [4, 2.5 + half, 2.5, 2.5 - half, 1, 1],
        "beta": [0.5] * 6,
    }.items():
        np.testing.assert_allclose([at[name] for at in found], wanted, rtol=1e-6, atol=1e-7)


def test_a_run_follows_its_schedules(world) -> None:
    """alpha falls from 1 to 0, and the temperature, one at first, rises to 2 at the third step."""
    ways = {"alpha": ("1", "0"), "temperature": ("1", "3")}
    keys = {f"distill_{name}": start for name, (start, _) in ways.items()}
    keys |= {f"distill_{name}_end": end for name, (_, end) in ways.items()}
    keys |= {f"distill_{name}_schedule": "linear" for name in ways}
    found = small.metrics(run(world, "scheduled", steps=4, **keys))
    hot = small.metrics(run(world, "hot", steps=4, distill_temperature=2))
    for number, alpha in enumerate([1, 0.75, 0.5, 0.25]):
        at = found[number]
        mixture = alpha * at["forward_kl"] + (1 - alpha) * at["cross_entropy"]
        assert at["loss"] == pytest.approx(mixture, rel=1e-5)
        assert abs(at["forward_kl"] - at["cross_entropy"]) > 0.1
    assert found[2]["forward_kl"] == pytest.approx(hot[2]["forward_kl"], rel=1e-5)
    assert abs(found[0]["forward_kl"] - hot[0]["forward_kl"]) > 0.005
    assert found[0]["cross_entropy"] == pytest.approx(hot[0]["cross_entropy"], rel=1e-5)


# ------------------------------------------------------------------ whole runs


def bits(folder: Path) -> dict[tuple[str, ...], bytes]:
    return {path: np.asarray(x.read().result()).tobytes() for path, x in open_params(folder).items()}


def test_a_teacher_from_orbax_is_the_same(world) -> None:
    """As from its Hugging Face folder: one step, with hidden states to match, to the same bits."""
    folder = world["root"] / "far-orbax"
    to_orbax(world["far"], folder)
    keys = {"learning_rate": 1e-3, "distill_beta": 1.0, "distill_layer_indices": "0,1"}
    keys["distill_teacher_layer_indices"] = "1,3"
    one, other = (
        run(world, f"of-{path.name}", teacher_load_parameters_path=path, **keys)
        for path in (world["far"], folder)
    )
    (theirs,), (ours,) = (small.metrics(path) for path in (one, other))
    assert theirs["forward_kl"] > 0.1 and theirs["features"] > 0
    assert {k: v for k, v in ours.items() if "second" not in k} == {
        k: v for k, v in theirs.items() if "second" not in k
    }
    wanted, found = (bits(path / "checkpoints" / "1" / "model_params") for path in (one, other))
    assert found == wanted


def test_killed_and_resumed_ends_with_the_same_bits(world) -> None:
    """Pitfall 21: with hidden states of another width, so with projections, which are trained too."""
    keys: dict[str, object] = {
        "teacher_load_parameters_path": world["far"],
        "distill_beta": 1.0,
        "distill_layer_indices": "0,1",
        "distill_teacher_layer_indices": "1,3",
        "learning_rate": 1e-3,
        "steps": 5,
        "checkpoint_period": 1,
    }
    whole = run(world, "whole", **keys)
    small.run("train", *arguments(world, "killed", **keys), kill=("step", 4))
    assert "resuming after step" in small.run("train", *arguments(world, "killed", **keys))
    killed = whole.with_name("killed")
    ours, theirs = (small.metrics(folder) for folder in (whole, killed))
    assert [x["step"] for x in theirs] == [1, 2, 3, 4, 5]
    for one, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in one.items() if "second" not in k} == {
            k: v for k, v in other.items() if "second" not in k
        }
    for part in ("model_params", "optimizer_state"):
        wanted, found = (bits(folder / "checkpoints" / "5" / part) for folder in (whole, killed))
        assert found == wanted
    before = bits(whole / "checkpoints" / "4" / "optimizer_state")
    assert before[("projection",)] != wanted[("projection",)]
    # The student is a model of its own.
    alone = distillax.load(killed / "checkpoints" / "5" / "model_params")
    assert jax.tree.map(jnp.shape, alone.params) == jax.tree.map(np.shape, find(world["student"]).params())
    assert np.isfinite(alone.logits([[5, 6, 7]])).all()


def test_bfloat16_follows_float32_and_both_learn(world) -> None:
    keys = {"steps": 50, "learning_rate": 3e-3, "teacher_load_parameters_path": world["far"]}
    exact, rough = (small.metrics(run(world, f"in-{d}", dtype=d, **keys)) for d in ("float32", "bfloat16"))
    assert exact[-1]["loss"] < 0.5 * exact[0]["loss"]
    assert rough[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.01)
    assert rough[-1]["loss"] != exact[-1]["loss"]


def test_evaluation_while_training_is_that_of_the_command(world, tmp_path, capsys) -> None:
    """In the metrics, and from then on in the progress line and in TensorBoard."""
    held_out = small.questions(tmp_path / "held_out.jsonl", 23)
    files = {"hf_path": "json", "hf_train_files": world["data"], "hf_eval_files": held_out}
    keys = {"teacher_load_parameters_path": world["far"], "eval_interval": 2, "learning_rate": 1e-3}
    folder = run(world, "evaluated", steps=2, **files, **keys)
    (found,) = [x for x in small.metrics(folder) if "eval_loss" in x]
    assert found["step"] == 2
    student, teacher = distillax.load(folder), distillax.load(world["far"])
    scores = evaluate(
        student, str(held_out), teacher=teacher, max_target_length=192, dtype="float32", show_progress=False
    )
    assert found["eval_tokens"] == scores.tokens
    assert found["eval_loss"] == pytest.approx(scores.nll, rel=1e-4)
    assert found["eval_kl_teacher_student"] == pytest.approx(scores.kl_teacher_student, rel=1e-4)
    assert found["eval_top1_agreement"] == pytest.approx(scores.top1_agreement, abs=1e-9)
    assert scores.kl_teacher_student > 0.1 and 0 < scores.top1_agreement < 1
    last = capsys.readouterr().err.splitlines()[-1]
    (events,) = (folder / "tensorboard").glob("events.*")
    for name in ("eval_loss", "eval_kl_teacher_student", "eval_top1_agreement"):
        assert f"{name}={found[name]:.4g}" in last and name.encode() in events.read_bytes()


def test_evaluation_without_a_teacher_in_memory(world, tmp_path, capsys) -> None:
    """`method=cached` measures NLL, and the progress line shows it from then on."""
    held_out = small.questions(tmp_path / "held_out.jsonl", 23)
    files = {"hf_path": "json", "hf_train_files": world["data"], "hf_eval_files": held_out}
    keys = {"teacher_cache_path": cache_of(world, "near", "for-evaluation"), "eval_interval": 2}
    folder = run(world, "evaluated-cached", "cached", steps=2, learning_rate=1e-3, **files, **keys)
    (found,) = [x for x in small.metrics(folder) if "eval_loss" in x]
    assert set(found) == {"step", "eval_tokens", "eval_loss"} and found["step"] == 2
    settings = {"max_target_length": 192, "dtype": "float32", "show_progress": False}
    scores = evaluate(distillax.load(folder), str(held_out), **settings)
    assert found["eval_tokens"] == scores.tokens
    assert found["eval_loss"] == pytest.approx(scores.nll, rel=1e-4)
    assert f"eval_loss={found['eval_loss']:.4g}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("format", ["sampled", "topk"])
def test_evaluation_from_a_cache_of_the_held_out_data(format, world, tmp_path, capsys) -> None:
    """It is that of the command, and a row that the cache lacks is told before the first step."""
    held_out = small.questions(tmp_path / "held_out.jsonl", 23)
    files = {"hf_path": "json", "hf_train_files": world["data"], "hf_eval_files": held_out}
    options = {"format": format, "k": 8}
    cache = cache_of(world, "near", f"held-out-{format}", data=held_out, **options)
    targets = cache_of(world, "near", f"for-{format}", **options)
    keys = {"teacher_cache_path": targets, "eval_cache_path": cache, "eval_interval": 2, "steps": 2}
    folder = run(world, f"measured-{format}", "cached", learning_rate=1e-3, **files, **keys)
    (found,) = [x for x in small.metrics(folder) if "eval_loss" in x]
    settings = {"max_target_length": 192, "dtype": "float32", "show_progress": False}
    scores = evaluate(distillax.load(folder), str(held_out), teacher_cache=cache, **settings).as_dict()
    assert found.pop("eval_tokens") == scores["tokens"] and found.pop("step") == 2
    assert found.pop("eval_loss") == pytest.approx(scores["nll"], rel=1e-4)
    names = ["kl_teacher_student", *(["top1_agreement"] if format == "topk" else [])]
    assert found == {f"eval_{name}": pytest.approx(scores[name], rel=1e-4) for name in names}
    shown = f"eval_kl_teacher_student={found['eval_kl_teacher_student']:.4g}"
    assert shown in capsys.readouterr().err.splitlines()[-1]
    small.questions(held_out, 24)
    with pytest.raises(
        UserError, match=r"held_out\.jsonl, line 24 .*has no targets for this .*hf_eval_files"
    ):
        run(world, f"lacks-{format}", "cached", **files, **keys)
    with pytest.raises(UserError, match="eval_cache_path is set, but never used; set eval_interval, and"):
        run(world, f"never-{format}", "cached", **files, **keys | {"eval_interval": -1})
    other = cache_of(world, "student", f"of-another-{format}", data=held_out, **options)
    with pytest.raises(UserError, match="^eval_cache_path is of other weights .* than teacher_cache_path"):
        run(world, f"other-{format}", "cached", **files, **keys | {"eval_cache_path": other})
    warm = cache_of(world, "near", f"warm-{format}", data=held_out, temperature=2.0, **options)
    with pytest.raises(UserError, match="^eval_cache_path: .*was captured at temperature 2, and KL is"):
        run(world, f"warm-{format}", "cached", **files, **keys | {"eval_cache_path": warm})
