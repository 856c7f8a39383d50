"""Plans: what they say against counts by hand, and against the programs themselves."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
from jax.sharding import AbstractMesh, PartitionSpec

from distillax.config import PlanConfig, TrainConfig
from distillax.data.batches import make_batches
from distillax.data.examples import load_examples
from distillax.data.targets import TargetStore
from distillax.errors import UserError
from distillax.models import splash
from distillax.models.attention import causal_attention
from distillax.models.families import param_specs, preset
from distillax.models.layout import AXES, RULES, TEACHER_RULES, weight_spec
from distillax.models.spec import iter_specs
from distillax.parallel.mesh import make_mesh
from distillax.plan import program
from distillax.plan.chips import CHIPS, find_devices, find_topology
from distillax.plan.plan import Plan, _changes, _with
from distillax.plan.plan import plan as make_plan
from distillax.plan.program import abstract_batch, architectures
from distillax.plan.traffic import Collective, a_turn, by_kind, collectives
from distillax.settings import load_config
from distillax.train import method as methods
from distillax.train.setup import student_source

REPO = Path(__file__).resolve().parents[1]


def plan(file: Path, *words: object) -> tuple[dict[str, Any], str]:
    """`distillax plan`: its figures, and its table."""
    command = [sys.executable, "-m", "distillax", "plan", *map(str, words), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text(encoding="utf-8")), done.stdout


def matrices(name: str) -> dict[bool, int]:
    """Weights of a model's matrices: {in its layers: how many, not in them: how many}."""
    config = preset(name)
    found = {True: 0, False: 0}
    for _, spec in iter_specs(param_specs(config)):
        if len(spec.shape) == 2:
            found[spec.stacked] += int(np.prod(spec.full_shape(config.layers)))
    return found


@pytest.mark.optimised
def test_four_devices_of_this_machine(tmp_path: Path) -> None:
    words = ("topology=cpu-4", "model_name=smollm2-135m", "teacher_model_name=smollm2-360m")
    keys = ("ici_fsdp_parallelism=-1", "max_target_length=128", "dtype=bfloat16", "remat_policy=full")
    found, table = plan(tmp_path / "plan.json", "recipes/online.yml", *words, *keys)
    weights = {name: sum(matrices(name).values()) for name in ("smollm2-135m", "smollm2-360m")}
    norms = 61 * 576  # float32, and whole on every device
    student = weights["smollm2-135m"] + 4 * norms
    assert found["parameter_bytes"] == student  # 4 bytes each, on 4 devices
    assert found["optimizer_bytes"] == 2 * student + 2 * 4  # and two counters of steps
    assert found["teacher_bytes"] == weights["smollm2-360m"] // 2 + 2 * 65 * 960
    assert found["fits"] and found["peak_bytes"] > found["parameter_bytes"] + found["optimizer_bytes"]
    assert found["temp_size_in_bytes"] == found["temporary_bytes"] > 0  # no compiler of CPUs says a peak
    assert found["devices"] == 4 and found["mesh"]["fsdp"] == 4 and found["tokens_per_step"] == 4 * 128
    # 6 N student + 2 N teacher, the look-up being none, and causal attention over 128 tokens.
    attention = 6 * 30 * 128 * 576 + 2 * 32 * 128 * 960
    by_hand = 512 * (6 * weights["smollm2-135m"] + 2 * weights["smollm2-360m"] + attention)
    assert found["flops_per_step"] == pytest.approx(by_hand, rel=1e-3)
    assert "fits                yes" in table and "reduce-scatter" in table


@pytest.mark.optimised
@pytest.mark.parametrize("topology", ["v5e-8", "v6e-8"])
def test_a_slice_that_is_not_here_sends_what_it_must(tmp_path: Path, topology: str) -> None:
    """Two gathers of the student's layers in bfloat16, one of the teacher's; one float32 reduce-scatter of
    the gradients; each head once. Nothing within the loss's loop. A v5e gathers while it multiplies, in
    chains of fusions. The vocabulary has a divisor that TPUs do not scatter by."""
    words = (f"topology={topology}", "model_name=qwen3-0.6b", "teacher_model_name=qwen3-0.6b")
    keys = ("ici_fsdp_parallelism=-1", "max_target_length=128", "per_device_batch_size=1")
    found, _ = plan(tmp_path / "plan.json", "recipes/online.yml", *words, *keys)
    n = matrices("qwen3-0.6b")
    gathers = 2 * (2 * n[True] + n[False]) + 2 * (n[True] + n[False])
    gradients = 4 * (n[True] + n[False])
    sent = found["collective_bytes"]
    assert found["bytes_a_chunk"] == 0
    assert sent["all-gather"] == pytest.approx(gathers * 7 / 8, rel=0.01)
    assert sent["all-reduce"] < 0.01 * gradients  # norms and sums alone
    assert sum(sent.values()) < 1.1 * (gathers + gradients) * 7 / 8, (sent, gathers, gradients)
    assert found["fits"] and 0 < found["mfu_bound"] < 1
    assert found["hbm_bytes"] == {"v5e-8": 15.75, "v6e-8": 31.25}[topology] * 2**30


@pytest.mark.optimised
@pytest.mark.parametrize(("topology", "fsdp", "expert"), [("v6e-8", 4, 2), ("v5p-16", 8, 1)])
def test_a_width_is_split_by_two_axes_or_in_turns(
    tmp_path: Path, topology: str, fsdp: int, expert: int
) -> None:
    """A small model on eight chips: on a v6e-8 split as its recipes have it, on a v5p-16, which scatters in
    turns, over one axis. Each matrix is gathered over all, those of the layers twice, in bfloat16, and its
    gradient is scattered over all, in float32. Nothing else is sent but a few vectors a token, for the
    look-up, and what the turns exchange at the edges of their parts."""
    width, mlp, layers, vocabulary = 1024, 2048, 4, 4096
    config = dict(
        tiny.SMALL,
        model_type="qwen3",
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        head_dim=128,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
    )
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = (f"topology={topology}", f"load_parameters_path={tmp_path}", "dtype=bfloat16")
    split = (f"ici_fsdp_parallelism={fsdp}", "ici_expert_parallelism=-1")
    split += ("max_target_length=128", "per_device_batch_size=1")
    found, _ = plan(tmp_path / "plan.json", "recipes/sft.yml", *words, *split)
    assert (found["mesh"]["fsdp"], found["mesh"]["expert"]) == (fsdp, expert) and found["bytes_a_chunk"] == 0
    inner, head = layers * width * ((4 + 2 + 2 + 4) * 128 + 3 * mlp), vocabulary * width
    sent = found["collective_bytes"]
    assert found["parameter_bytes"] == pytest.approx(4 * (inner + 2 * head) / 8, rel=0.01)
    assert sent["all-gather"] == pytest.approx(2 * (2 * inner + head) * 7 / 8, rel=0.01)
    assert sent["reduce-scatter"] == pytest.approx(4 * (inner + head) * 7 / 8, rel=0.01)
    assert sum(sent.values()) - sent["all-gather"] - sent["reduce-scatter"] < 2 * 128 * 4 * width
    assert found["temp_size_in_bytes"] > 0 and found["fits"]


SLICES = sorted((REPO / "recipes").glob("*-v[0-9]*-*.yml"))


@pytest.mark.parametrize("recipe", SLICES, ids=lambda path: path.stem)
def test_the_tables_of_the_recipes(recipe: Path) -> None:
    """What docs/scale.md says of each fits, and its step, all its microbatches together, sends hardly more
    than it must: the student's layers in bfloat16 twice, the teacher's once, each head once, and the
    gradients in float32."""
    text = (REPO / "docs" / "scale.md").read_text(encoding="utf-8")
    table = text.split(f"<!-- {recipe.stem} -->\n")[1].split("<!-- end -->")[0]
    found = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", table, re.M))
    config = load_config(TrainConfig, str(recipe), [])
    (head,) = (x for x in found if x.startswith(recipe.stem.split("-")[-2]))
    chips = math.prod(int(n) for n in re.findall(r" (\d+)", head.partition(",")[2]))
    sent = sum(float(x.split()[0]) for x in found.values() if " GB sent, " in x) * 1e9
    n = matrices(config.model_name)
    student = preset(config.model_name)
    heads = n[False] // (1 if student.tied else 2)
    must = 2 * (2 * n[True] + heads) + 4 * (n[True] + n[False])
    if config.teacher_model_name:
        t = matrices(config.teacher_model_name)
        kept = 1 if config.teacher_quantization else 2
        must += kept * t[True] + 2 * t[False] // (1 if preset(config.teacher_model_name).tied else 2)
    assert 0.95 < sent / (must * (chips - 1) / chips) < 1.04
    parameters = int(found["parameter"].replace(",", "").split()[0])
    assert parameters == pytest.approx(4 * (n[True] + n[False]) / chips, rel=2e-3)  # norms are whole
    peak, room = (int(x.replace(",", "")) for x in re.findall(r"[\d,]{6,}", found["peak: fits"]))
    assert peak <= room


SUM_OVER_SLICES = """
import json, sys, jax
from jax.sharding import NamedSharding, PartitionSpec as P
from distillax.config import TrainConfig
from distillax.models import layout
from distillax.models.backend import compile_for
from distillax.parallel.mesh import make_mesh
from distillax.plan.chips import find_devices, find_topology, prepare
from distillax.plan.traffic import by_kind, collectives

topology = find_topology("2xv5p-8")
prepare(topology)
found = []
for keys in ({"dcn_fsdp_parallelism": 2}, {"dcn_data_parallelism": 2}):
    mesh = make_mesh(TrainConfig(ici_fsdp_parallelism=4, **keys), find_devices(topology))
    axes = ("data", "fsdp")
    local = lambda x: layout.scatter_sum(x[0], axes, P("fsdp"))
    total = jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=P("fsdp"), check_vma=False)
    x = jax.ShapeDtypeStruct((8, 512, 2048), "float32", sharding=NamedSharding(mesh, P(axes)))
    with compile_for("tpu"), layout.on_mesh(mesh):
        program = jax.jit(total).lower(x).compile().as_text()
    found.append(by_kind(collectives(program, 8, 2))["between slices"] / (4 * 512 * 2048))
print(json.dumps(found))
"""


def test_a_sum_is_within_a_slice_before_it_goes_to_another() -> None:
    """Of an axis over two slices of four chips, or of two copies: a chip sends the other slice half of its
    quarter of the sum, or all of that. Over the slices first it would be more."""
    done = subprocess.run([sys.executable, "-c", SUM_OVER_SLICES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx([1 / 8, 1 / 4], rel=0.01)


@pytest.mark.optimised
def test_two_slices_send_each_other_the_gradients_of_a_chip(tmp_path: Path) -> None:
    """A sum of two shares, in float32: what a chip of four has of each gradient, that of the tied head and
    that of the look-up apart, and one of these in rows of 1,024 instead of 576."""
    words = ("topology=2xv6e-4", "model_name=smollm2-135m", "ici_fsdp_parallelism=-1")
    keys = ("max_target_length=128", "per_device_batch_size=1", "dtype=bfloat16")
    found, table = plan(tmp_path / "plan.json", "recipes/sft.yml", *words, *keys)
    n = matrices("smollm2-135m")
    assert found["devices"] == 8 and (found["mesh"]["data"], found["mesh"]["fsdp"]) == (2, 4)
    least = n[True] + n[False] * (1 + 1024 / 576)
    assert least < found["collective_bytes"]["between slices"] < 1.05 * least
    chip, each = CHIPS["v6e"], found["flops_per_step"] / 8
    busy = found["collective_bytes"]["between slices"] / chip.network_bytes / (each / chip.peak_flops)
    again = n[True] / (3 * sum(n.values()))  # of the layers, by remat
    assert busy / (1 + again) == pytest.approx(found["network_share"], rel=0.01)
    shares = dict(found["collective_shares"])
    assert shares.pop("between slices") == found["network_share"]
    assert set(shares) | {"between slices"} == set(found["collective_bytes"])
    each_way = found["collective_bytes"]["all-gather"] / chip.link_bytes / (each / chip.peak_flops)
    assert shares["all-gather"] == pytest.approx(each_way / (1 + again), rel=0.01)
    assert sum(shares.values()) == pytest.approx(found["interconnect_share"])
    assert "network             busy for" in table and f"MFU                 at most {1 / busy:.0%}" in table


@pytest.mark.optimised
def test_a_slice_that_is_too_small(tmp_path: Path) -> None:
    """The compiler refuses, and says what it would need; there is nothing left to save."""
    keys = ("model_name=llama3.2-3b", "per_device_batch_size=1")
    found, table = plan(tmp_path / "plan.json", "recipes/sft.yml", "topology=v5e-1", *keys)
    assert not found["fits"] and found["hbm_bytes"] == 15.75 * 2**30
    kept = found["parameter_bytes"] + found["optimizer_bytes"]
    assert kept + 2 * found["parameter_bytes"] > found["peak_bytes"] > kept > found["hbm_bytes"]
    assert found["tried"] == [] and found["change"] is None and found["collective_bytes"] is None
    assert "fits                no" in table and "nothing that was tried" in table


def test_what_would_make_it_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device of this machine, as if it had less memory: compilers of TPUs take a minute each time."""
    words = ["topology=cpu-1", f"load_parameters_path={small.chat_model('qwen3', tmp_path / 'model')}"]
    words += ["per_device_batch_size=4", "max_target_length=512", "dtype=float32"]

    def found(memory: float, remat: str) -> Plan:
        monkeypatch.setattr("distillax.plan.plan._own_memory", lambda: int(memory))
        return make_plan(load_config(PlanConfig, "recipes/sft.yml", [*words, f"remat_policy={remat}"]))

    most, less = (found(2**40, remat).peak_bytes for remat in ("none", "full"))
    assert less < 0.9 * most
    tight = found((most + less) / 2, "none")
    assert not tight.fits and tight.peak_bytes == most and tight.change == {"remat_policy": "full"}
    assert tight.tried == [{"remat_policy": "full", "fits": True, "peak_bytes": less}]
    assert "would fit           remat_policy=full" in tight.lines()
    tighter = found(0.9 * less, "none")
    halved = {"remat_policy": "full", "per_device_batch_size": 2, "gradient_accumulation_steps": 2}
    assert tighter.change == halved and [tried["fits"] for tried in tighter.tried] == [False, True]


HLO = """HloModule jit_step
%all-reduce-scatter.1 (p.0: f32[8,4]) -> f32[4,4] {
  %r.0 = f32[8,4] all-reduce(%p.0), replica_groups=[4,2]<=[8], to_apply=%add.1
  ROOT %d.0 = f32[4,4] dynamic-slice(%r.0, %i.0)
}
%cond.1 (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]) parameter(0)
  %c.1 = s32[]{:T(128)} constant(12)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt.1 = pred[] compare(%i.1, %c.1), direction=LT
}
%start.1 (p.5: bf16[2,4]) -> (bf16[2,4], bf16[8,4]) {
  %g.3 = bf16[8,4] all-gather(%p.5), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}
%step.1 (p.6: bf16[2,4]) -> (bf16[2,4], bf16[8,4]) {
  %g.4 = bf16[8,4] all-gather(%p.6), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}
%done.1 (p.7: bf16[2,4]) -> bf16[8,4] {
  %g.5 = bf16[8,4] all-gather(%p.7), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}
%body.1 (p.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %two.1 = s32[] constant(2)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %next.1 = s32[] add(%i.2, %two.1)
  %g.1 = bf16[16,4]{1,0} all-gather(%x.1), replica_groups=[2,4]<=[8], dimensions={0}
  %c.2 = (bf16[2,4], bf16[8,4]) fusion(%x.3), kind=kCustom, calls=%start.1
  %c.3 = (bf16[2,4], bf16[8,4]) fusion(%c.2), kind=kOutput, calls=%step.1
  %c.4 = bf16[8,4] fusion(%c.3), kind=kCustom, calls=%done.1
  %s.1 = (f32[8,4], f32[8,4], u32[]) collective-permute-start(%y.1), source_target_pairs={{0,1},{1,0}}
  %s.2 = (f32[3,4], u32[], token[]) send(%x.4), attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %t.1 = (s32[], f32[8]) tuple(%next.1, %z.1)
}
%cond.2 (p.3: (s32[], s32[])) -> pred[] {
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %n.3 = s32[] get-tuple-element(%p.3), index=1
  ROOT %lt.2 = pred[] compare(%i.3, %n.3), direction=LT
}
%body.2 (p.4: (s32[], s32[])) -> (s32[], s32[]) {
  %g.2 = (f32[2], f32[16], u32[], u32[]) all-gather-start(%x.2), replica_groups={}, dimensions={0}
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %w.1 = (s32[], f32[8]) while(%init.1), condition=%cond.1, body=%body.1, metadata={op_name="jit(step)/while"}
  %w.2 = (s32[], s32[]) while(%init.2), condition=%cond.2, body=%body.2, metadata={op_name="jit(step)/loss"}
  %s.3 = (bf16[8]{0}, u32[], token[]) send(%x.5), attributes={_xla_megascale_transfer_type="ALL_GATHER"}
  %s.4 = (f32[2]{0}, u32[], token[]) send(%x.6, %t.4), is_host_transfer=true
  %r.1 = f32[4,4]{1,0} reduce-scatter(%v.1), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add.1
  %f.1 = f32[4,4] fusion(%v.2), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"x":[]}
  %a.1 = (f32[10], f32[6]) all-reduce(%u.1, %k.1), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add.1
}
"""


def test_traffic_by_hand() -> None:
    """An unrolled loop of 12 in twos, groups in four notations, a scattered sum in two, a gather in a chain
    of three fusions, and a loop that the data ends; between four slices a sum in the first loop and a gather,
    and a word to the host that is neither."""
    found = collectives(HLO, 8, slices=4)
    assert found == [
        Collective("all-gather", 16 * 4 * 2 * 3 / 4, 6, "jit(step)/while"),
        Collective("all-gather", 8 * 4 * 2 * 3 / 4, 6, "jit(step)/while"),
        Collective("collective-permute", 8 * 4 * 4.0, 6, "jit(step)/while"),
        Collective("between slices", 12 * 4 * 2 * 3 / 4, 6, "jit(step)/while"),
        Collective("all-gather", 16 * 4 * 7 / 8, None, "jit(step)/loss"),
        Collective("between slices", 8 * 2 * 3, 1, ""),
        Collective("reduce-scatter", 4 * 4 * 4.0, 1, ""),
        Collective("reduce-scatter", 4 * 4 * 4.0, 1, ""),
        Collective("all-reduce", 16 * 4 * 2 * 3 / 4, 1, ""),
    ]
    assert by_kind(found)["all-gather"] == 576 + 288 + 56 and a_turn(found) == 56


def test_a_plan_knows_the_batches_of_a_run(tmp_path: Path) -> None:
    """Names, shapes and dtypes of the arrays that training would make."""
    teacher = small.chat_model("llama3.1", tmp_path / "teacher")
    data = small.questions(tmp_path / "data.jsonl", 12)
    for form in ("sampled", "topk"):
        words = ["capture", "--teacher-model", teacher, "--dataset", data, "--format", form, "--k", "4"]
        words += ["--output-dir", tmp_path / form]
        subprocess.run([sys.executable, "-m", "distillax", *map(str, words)], check=True, capture_output=True)
    for method, form in (("sft", ""), ("cached", "sampled"), ("cached", "topk")):
        words = [f"load_parameters_path={teacher}", "max_target_length=64", "gradient_accumulation_steps=2"]
        words += [f"teacher_cache_path={tmp_path / form}"] if form else []
        config = load_config(TrainConfig, f"recipes/{method}.yml", words)
        student, _, cache = architectures(config)
        examples = load_examples(str(data), student_source(config, None).tokenizer(), columns=("messages",))
        targets = TargetStore.open(str(tmp_path / form), student.vocab_size).lookup if form else None
        usual: dict[str, Any] = dict(packing=True, shuffle_seed=0, overlong="truncate", targets=targets)
        batch = next(make_batches(examples, examples.encode, batch_size=2, max_target_length=64, **usual))
        planned = abstract_batch(config, make_mesh(config), cache)
        assert {name: ((2, 1, *x.shape[1:]), x.dtype) for name, x in batch.items()} == {
            name: (x.shape, x.dtype) for name, x in planned.items()
        }


def test_rules_of_student_and_teacher() -> None:
    """By hand: a width is split over fsdp, expert and context as far as they divide it."""
    mesh: Any = AbstractMesh((2, 4, 2, 2, 1), AXES)
    logical = ("embed", "mlp")
    assert weight_spec(mesh, logical, (64, 96)) == PartitionSpec(("fsdp", "context"), ("tensor",))
    assert weight_spec(mesh, logical, (68, 96)) == PartitionSpec(("fsdp",), ("tensor",))
    assert weight_spec(mesh, logical, (66, 95)) == PartitionSpec(None, None)
    assert weight_spec(mesh, logical, (64, 96), TEACHER_RULES["replicated"]) == PartitionSpec(
        None, ("tensor",)
    )
    assert TEACHER_RULES["fsdp"] is RULES


def test_a_replicated_teacher_is_split_before_it_is_rounded() -> None:
    words = ["teacher_sharding=replicated", "per_device_batch_size=2"]
    config = load_config(PlanConfig, "recipes/online.yml", words)
    tried = list(_changes(config, devices=1))
    assert tried[0] == {"teacher_sharding": "fsdp"} and all("teacher_sharding" in keys for keys in tried)
    assert tried[-1]["teacher_quantization"] == "int8"


def test_weights_that_lie_whole_on_each_device_are_split_first() -> None:
    words = ["model_name=smollm2-135m", "per_device_batch_size=2"]
    tried = list(_changes(load_config(PlanConfig, "recipes/sft.yml", words), devices=8))
    assert tried and not any("ici_fsdp_parallelism" in keys for keys in tried)  # they are, if nobody asks
    config = load_config(PlanConfig, "recipes/sft.yml", [*words, "ici_data_parallelism=-1"])
    tried = list(_changes(config, devices=8))
    axes = [_with(config, keys) for keys in tried]
    assert {(a.ici_fsdp_parallelism, a.ici_data_parallelism) for a in axes} == {(-1, 1)}
    assert all("ici_fsdp_parallelism" in keys for keys in tried)
    advice = [f"{key}={value}" for key, value in tried[0].items()]
    load_config(PlanConfig, "recipes/sft.yml", [*words, "ici_data_parallelism=-1", *advice])
    words += ["ici_data_parallelism=-1", "ici_tensor_parallelism=8"]
    tried = list(_changes(load_config(PlanConfig, "recipes/sft.yml", words), devices=8))
    assert tried and not any("ici_fsdp_parallelism" in keys for keys in tried)


@pytest.mark.parametrize("teacher_sharding", ["fsdp", "replicated"])
def test_the_key_reaches_the_teacher(monkeypatch: pytest.MonkeyPatch, teacher_sharding: str) -> None:
    """Of a plan and of a training."""
    seen: list[Any] = []
    weights, place = program.abstract_weights, methods.place
    monkeypatch.setattr(program, "abstract_weights", lambda *a: seen.append(a[-1]) or weights(*a))
    words = ["model_name=smollm2-135m", "teacher_model_name=smollm2-135m", "max_target_length=64"]
    config = load_config(PlanConfig, "recipes/online.yml", [*words, f"teacher_sharding={teacher_sharding}"])
    program.trace_step(config, find_topology("cpu-1"))
    rules = {"fsdp": RULES, "replicated": TEACHER_RULES["replicated"]}[teacher_sharding]
    assert seen == [rules]
    found: Any = SimpleNamespace(
        chat_template=None,
        config=preset("smollm2-135m"),
        name="",
        version=lambda: "",
    )
    monkeypatch.setattr(methods, "find", lambda *_, **__: found)
    monkeypatch.setattr(methods, "check_tokenizer", lambda tokenizer, _: tokenizer)
    monkeypatch.setattr(methods, "check_name", lambda *_: None)
    made = methods.make_method(config, found, found, make_mesh(config))
    assert isinstance(made.load_teacher, partial)
    assert made.load_teacher.func is place and made.load_teacher.args[-1] == rules


@pytest.mark.parametrize("window", [0, 60])
def test_attention_of_tpus(window: int) -> None:
    """The kernel, interpreted, against our own blocks: outputs and gradients of packed rows, in bfloat16."""
    rng = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(2, 256, n, 64)), jnp.bfloat16) for n in (4, 2, 2, 4))
    segments = jnp.asarray(np.repeat([[1, 2], [1, 1]], 128, 1), jnp.int32)
    assert splash.can_attend(q, window) and not splash.can_attend(q[:, :100], window)

    def run(attend: Any) -> tuple[Any, ...]:
        def total(q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array]:
            out = attend(q, k, v, 0.125, window, segments).astype(jnp.float32)
            return (out * weight.astype(jnp.float32)).sum(), out

        gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return (out, *gradients)

    def interpreted(q: Any, k: Any, v: Any, scale: float, window: int, segments: Any) -> jax.Array:
        kernel = splash.make_kernel(256, 4, window, interpret=True)
        return splash.attend(kernel, q, k, v, scale, segments, segments)

    kernel = run(interpreted)
    for found, wanted in zip(kernel, run(causal_attention), strict=True):
        error = np.abs(np.asarray(found, np.float64) - np.asarray(wanted, np.float64)).max()
        assert error < 0.01 * np.abs(np.asarray(wanted, np.float64)).max()


def test_a_slice_without_libtpu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", nothing)
    with pytest.raises(UserError, match="cannot be compiled for here: JAX TPU support"):
        find_devices(find_topology("v6e-1"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"v6e-1 takes libtpu, which is not installed.*pip install '.\[tpu\]'"
    ):
        find_devices(find_topology("v6e-1"))


def test_slices_by_name() -> None:
    assert find_topology("v6e-8").devices == 8 and find_topology("v5litepod-16").devices == 16
    assert find_topology("v5p-64").devices == 32 and find_topology("cpu-3").platform == "cpu"
    assert find_topology("v5p-64").chip == CHIPS["v5p"]
    two = find_topology("2xv5p-64")
    assert (two.devices, two.slices, two.wiring) == (64, 2, find_topology("v5p-64").wiring)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["topology=h100-8"], "topology='h100-8' is unknown; give one of v4-N"),
        (["topology=2xcpu-8"], "topology=2xcpu-8: CPU devices have no slices; give one of v4-N"),
        (["topology=v6e8"], "topology='v6e8' is unknown; did you mean v6e-8?"),
        (["topology=0xv6e-8"], "topology='0xv6e-8' is unknown"),
        ([], "topology is not set"),
        (["topology=v6e-7"], "topology=v6e-7 is no slice that is known here; there are v6e-1, v6e-4"),
        (["topology=cpu-1", "model_name="], "set model_name or load_parameters_path"),
        (["topology=cpu-1", "model_name=lama"], "model_name='lama' is unknown"),
        (["topology=cpu-1", "method=online"], "set teacher_model_name or teacher_load_parameters_path"),
        (["topology=cpu-1", "ici_fsdp_parallelism=3"], "there are 1"),
        (["topology=cpu-1", "teacher_quantization=int8"], "teacher_quantization has no effect"),
        (["topology=cpu-1", "teacher_model_name=qwen3-8b"], "teacher_model_name has no effect"),
        (["topology=cpu-64"], "JAX has started with 1 CPU devices"),
    ],
)
def test_plans_that_cannot_be_made(words: list[str], said: str) -> None:
    jax.devices()  # JAX has started: a plan for more devices than it has found comes too late
    config = load_config(PlanConfig, "recipes/sft.yml", ["model_name=smollm2-135m", *words])
    heard: list[str] = []
    with pytest.raises(UserError) as error:
        make_plan(config, heard.append)
    assert said in str(error.value) and not heard  # nothing is said to be compiling


def test_the_time_of_a_compilation_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first one, and of those of what would fit."""
    shown: list[str] = []

    @contextmanager
    def clock(label: str) -> Iterator[None]:
        shown.append(f"{label} begins")
        yield
        shown.append(f"{label} ends")

    def compiled(step: program.Step, memory: int) -> program.Program:
        assert len(shown) % 2 == 1
        return program.Program(step.setup, step.mesh, False, memory + 1, 1, 1, 1, 1)

    monkeypatch.setattr("distillax.plan.plan.waiting", clock)
    monkeypatch.setattr("distillax.plan.plan.compile_step", compiled)
    words = ["topology=cpu-1", "model_name=smollm2-135m", "per_device_batch_size=1", "remat_policy=none"]
    assert make_plan(load_config(PlanConfig, "sft", [*words, "max_target_length=64"])).tried
    assert shown == ["compiling begins", "compiling ends"] * 2


def test_heads_that_devices_cannot_share_are_noted(tmp_path: Path) -> None:
    model = small.chat_model("qwen3", tmp_path / "model")
    words = ["recipes/sft.yml", "topology=cpu-3", f"load_parameters_path={model}", "ici_tensor_parallelism=3"]
    done = subprocess.run(
        [sys.executable, "-m", "distillax", "plan", *words, "max_target_length=96"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPO,
    )
    assert "note: the 4 heads of the student cannot be split over 3 devices" in done.stdout


def test_a_teacher_of_another_architecture_is_refused(tmp_path: Path) -> None:
    model = small.chat_model("llama3.1", tmp_path / "model")
    words = ["recipes/online.yml", f"load_parameters_path={model}", f"teacher_load_parameters_path={model}"]
    words += [f"hf_path={small.questions(tmp_path / 'data.jsonl', 4)}", "teacher_model_name=llama3.1-8b"]
    words += ["run_name=run", f"base_output_directory={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "distillax", "train", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "teacher_model_name=llama3.1-8b has layers 32" in done.stderr
