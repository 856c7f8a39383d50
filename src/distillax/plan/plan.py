"""A recipe and a topology -> what fits, what it costs, and what would make it fit."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from distillax.config import PlanConfig
from distillax.parallel.mesh import notes_on_heads, rows_a_step
from distillax.plan.chips import Topology, find_topology, prepare
from distillax.plan.flops import remat_flops, step_flops
from distillax.plan.program import Program, architectures, compile_step, trace_step
from distillax.plan.traffic import BETWEEN, a_turn, by_kind, collectives
from distillax.progress import waiting
from distillax.train.method import refuse_idle_keys

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """All of it is of one device and one optimizer step, but `tokens_per_step` and `flops_per_step`, which
    are of all devices. What is not known is None: on CPU devices the rates, and of a program that does not
    fit its traffic and `temp_size_in_bytes`. `temporary_bytes` is what there is at the peak besides the
    arguments; `temp_size_in_bytes` is what XLA's `memory_analysis()` calls by that name, which on TPUs counts
    some temporaries that share their room. `bytes_a_chunk` is sent in every turn of the loss's loop. Shares
    are of the time of the products, `collective_shares` for each kind; `network_share` is that of what goes
    between slices, 0 for a single one, and `interconnect_share` that of all else."""

    topology: str
    devices: int
    mesh: dict[str, int]
    fits: bool
    hbm_bytes: int
    peak_bytes: int
    parameter_bytes: int
    optimizer_bytes: int
    teacher_bytes: int
    temporary_bytes: int
    temp_size_in_bytes: int | None
    tokens_per_step: int
    flops_per_step: float
    mfu_bound: float | None
    collective_bytes: dict[str, float] | None
    collective_shares: dict[str, float] | None
    interconnect_share: float | None
    network_share: float | None
    bytes_a_chunk: float | None
    change: dict[str, Any] | None = None
    tried: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan as a table."""
        split = ", ".join(f"{axis} {n}" for axis, n in self.mesh.items() if n > 1)
        devices = f"{self.devices} devices, {split}" if self.devices > 1 else "one device"
        rows = [
            ("topology", f"{self.topology}: {devices}"),
            ("parameters", _gb(self.parameter_bytes)),
            ("optimizer", _gb(self.optimizer_bytes)),
            ("teacher", _gb(self.teacher_bytes)),
            ("temporaries", _gb(self.temporary_bytes)),
            ("peak", f"{_gb(self.peak_bytes)} of {_gb(self.hbm_bytes)} usable"),
            ("fits", "yes" if self.fits else "no"),
            ("tokens a step", f"{self.tokens_per_step:,} on all devices"),
            ("FLOPs a step", f"{self.flops_per_step:.3e}"),
        ]
        if self.mfu_bound is not None:
            rows.append(("MFU", f"at most {self.mfu_bound:.0%}"))
        for kind, sent in (self.collective_bytes or {}).items():
            share = f", {self.collective_shares[kind]:.0%}" if self.collective_shares else ""
            rows.append((kind, f"{_gb(sent)} sent{share}"))
        for name, share in (("interconnect", self.interconnect_share), ("network", self.network_share)):
            if share is not None and (name == "interconnect" or BETWEEN in (self.collective_bytes or {})):
                rows.append((name, f"busy for {share:.0%} of the time of the products"))
        if not self.fits:
            rows.append(("would fit", _words(self.change) if self.change else "nothing that was tried"))
        return [f"{name:<20}{value}" for name, value in rows]


def plan(config: PlanConfig, say: Say = lambda _: None) -> Plan:
    """Compiles the step of a recipe for `config.topology`, and, if it does not fit, for what would.

    Raises UserError for a recipe that could not be trained, or a topology that is not known.
    """
    refuse_idle_keys(config)
    topology = find_topology(config.topology)
    prepare(topology)
    memory = topology.chip.hbm_bytes if topology.chip else _own_memory() // topology.devices
    architectures(config)
    step = trace_step(config, topology)
    for line in notes_on_heads(step.mesh, step.setup.student, step.setup.teacher):
        say(line)
    say(f"compiling for {topology.name}; a large model takes minutes")
    with waiting("compiling"):
        program = compile_step(step, memory)
    tried: list[dict[str, Any]] = []
    change = None
    for keys in [] if program.fits else _changes(config, topology.devices // topology.slices):
        say(f"it does not fit; compiling with {_words(keys)}")
        with waiting("compiling"):
            other = compile_step(trace_step(_with(config, keys), topology), memory)
        tried.append({**keys, "fits": other.fits, "peak_bytes": other.peak_bytes})
        if other.fits:
            change = keys
            break
    return _describe(config, topology, memory, program, change, tried)


def _describe(
    config: PlanConfig,
    topology: Topology,
    memory: int,
    program: Program,
    change: dict[str, Any] | None,
    tried: list[dict[str, Any]],
) -> Plan:
    mesh, setup = dict(program.mesh.shape), program.setup
    lengths = [config.max_target_length] * rows_a_step(config, program.mesh)
    flops, _ = step_flops(setup.student, setup.teacher, lengths, sum(lengths))
    spent = flops + (remat_flops(setup.student, lengths) if config.remat_policy == "full" else 0)
    found = collectives(program.hlo, topology.devices, topology.slices)
    sent = by_kind(found) if program.hlo else None
    bound = share = network = shares = None
    if topology.chip is not None and sent is not None and setup.compute.dtype == "bfloat16":
        products = spent / topology.devices / topology.chip.peak_flops
        rates = {BETWEEN: topology.chip.network_bytes}
        shares = {
            kind: size / rates.get(kind, topology.chip.link_bytes) / products for kind, size in sent.items()
        }
        network = shares.get(BETWEEN, 0.0)
        share = sum(shares.values()) - network
        bound = flops / spent / max(share, network, 1)
        if topology.slices > 1 and not network:  # a compiler that writes them in a way that is not known here
            bound = network = None
    return Plan(
        topology=topology.name,
        devices=topology.devices,
        mesh=mesh,
        fits=program.fits,
        hbm_bytes=memory,
        peak_bytes=program.peak_bytes,
        parameter_bytes=program.parameter_bytes,
        optimizer_bytes=program.optimizer_bytes,
        teacher_bytes=program.teacher_bytes,
        temporary_bytes=program.temporary_bytes,
        temp_size_in_bytes=program.temp_size_in_bytes,
        tokens_per_step=sum(lengths),
        flops_per_step=flops,
        mfu_bound=bound,
        collective_bytes=sent,
        collective_shares=shares,
        interconnect_share=share,
        network_share=network,
        bytes_a_chunk=a_turn(found) if program.hlo else None,
        change=change,
        tried=tried,
    )


def _changes(config: PlanConfig, devices: int) -> Iterator[dict[str, Any]]:
    """Keys that need less memory, those first that change the run least: none changes what is learnt, but for
    the last ones, which round the teacher."""
    keys: dict[str, Any] = {}
    split = config.ici_fsdp_parallelism, config.ici_tensor_parallelism, config.ici_expert_parallelism
    if devices > 1 and config.ici_data_parallelism == -1 and split == (1, 1, 1):
        keys |= {"ici_fsdp_parallelism": -1, "ici_data_parallelism": 1}
        yield dict(keys)
    if config.remat_policy != "full":
        keys["remat_policy"] = "full"
        yield dict(keys)
    if config.teacher_sharding != "fsdp":
        keys["teacher_sharding"] = "fsdp"
        yield dict(keys)
    eight = {"teacher_quantization": "int8"}
    may_round = config.method == "online" and not config.teacher_quantization
    whole, steps = config.per_device_batch_size, config.gradient_accumulation_steps
    for size in (n for n in range(whole // 2, 0, -1) if whole % n == 0):
        keys |= {"per_device_batch_size": size, "gradient_accumulation_steps": steps * (whole // size)}
        yield dict(keys)
    if may_round:
        first = {name: value for name, value in keys.items() if "batch" not in name and "grad" not in name}
        yield first | eight
        if whole > 1:
            yield keys | eight


def _with(config: PlanConfig, keys: dict[str, Any]) -> PlanConfig:
    """As if they were given."""
    given = config.model_dump() | {"hf_access_token": config.hf_access_token}
    return PlanConfig.model_validate(given | keys)


def _own_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _words(keys: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in keys.items())
