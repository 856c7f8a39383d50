"""What a plan can be made for: TPU slices, of which libtpu knows all but the price, and CPU devices."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from distillax.errors import UserError, first_line
from distillax.models.backend import from_jax

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What JAX calls a device. `hbm_bytes` is what a program may use, as its compiler reports it;
    `peak_flops` (bfloat16) and `link_bytes` (a second, sent over all links of the chip) are those of Google
    Cloud's pages on each kind of TPU. So is `network_bytes` (a second, sent to other slices: a chip's share
    of its host's) of v5e and v6e; that of the others is of the book "How to Scale Your Model"."""

    hbm_bytes: int
    peak_flops: float
    link_bytes: float
    network_bytes: float
    cores: int = 1  # of a chip, by which its slices are named
    libtpu: str = ""  # what libtpu calls its configuration, where that is not the usual one


CHIPS = {
    "v4": Chip(int(30.75 * _GIB), 275e12, 300e9, 6.25e9, cores=2, libtpu="megacore"),
    "v5e": Chip(int(15.75 * _GIB), 197e12, 200e9, 3.125e9),
    "v5p": Chip(int(95.74 * _GIB), 459e12, 600e9, 6.25e9, cores=2),
    "v6e": Chip(int(31.25 * _GIB), 918e12, 400e9, 12.5e9),
}
# Chips of a slice -> how they are wired.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8", 1024: "8x8x16",
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """Devices of one kind, in `slices` of equal size, `wiring` being libtpu's word for how those of a slice
    lie. `chip` is None for CPU devices."""

    name: str
    devices: int
    chip: Chip | None = None
    wiring: str = ""
    slices: int = 1

    @property
    def platform(self) -> str:
        return "cpu" if self.chip is None else "tpu"


def find_topology(name: str) -> Topology:
    """`v6e-8` and the like, by the names of Google Cloud; `2xv6e-8` is two slices of them, which the network
    of a data centre joins; `cpu-8` is eight devices of this machine.

    Raises UserError for a name that means nothing, with those that do.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+)-([1-9]\d*)", name)
    times, kind, number = match.groups() if match else (None, "", "")
    kind = {"v5litepod": "v5e"}.get(kind, kind)
    if kind not in (*CHIPS, "cpu") or (kind == "cpu" and times):
        known = ", ".join(f"{known}-N" for known in (*CHIPS, "cpu"))
        what = f"topology={name!r} is unknown" if name else "topology is not set"
        if kind == "cpu":
            what = f"topology={name}: CPU devices have no slices"
        elif near := re.fullmatch(rf"({'|'.join(CHIPS)}|cpu)[ _x:]?(\d+)", name.lower()):
            raise UserError(f"{what}; did you mean {near[1]}-{near[2]}?")
        raise UserError(f"{what}; give one of {known}, such as v6e-8, or 2xv6e-8 for two slices")
    if kind == "cpu":
        return Topology(name, int(number))
    chip, shapes = CHIPS[kind], _CUBES if CHIPS[kind].cores == 2 else _FLAT
    chips, rest = divmod(int(number), chip.cores)
    if rest or chips not in shapes:
        sizes = ", ".join(f"{kind}-{n * chip.cores}" for n in shapes)
        raise UserError(f"topology={name} is no slice that is known here; there are {sizes}")
    slices = int(times or 1)
    return Topology(name, slices * chips, chip, f"{kind}:{shapes[chips]}", slices)


def prepare(topology: Topology) -> None:
    """Sets what JAX and libtpu read when they start, which must not have happened yet."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # a plan runs nothing
    jax.config.update("jax_platforms", "cpu")
    if topology.chip is None:
        with contextlib.suppress(RuntimeError):  # too late: `find_devices` counts them
            jax.config.update("jax_num_cpu_devices", topology.devices)
        return
    jax.config.update("jax_enable_compilation_cache", False)  # which takes a device to read from
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # of the metadata server of a TPU VM, which this need not be
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": topology.name.split("x")[-1].replace("v5e", "v5litepod"),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ[key] = value


def find_devices(topology: Topology) -> Sequence[Any]:
    """The devices to compile for. Raises UserError if they cannot be described here."""
    if topology.chip is None:
        if len(jax.devices()) < topology.devices:
            raise UserError(
                f"topology={topology.name}, but JAX has started with {len(jax.devices())} CPU devices in "
                "this process; plan in a process of its own"
            )
        return jax.devices()[: topology.devices]
    describe = from_jax("jax.experimental.topologies", "get_topology_desc")
    alone = topology.devices == topology.slices
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if alone else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chip.libtpu:
        options["chip_config_name"] = topology.chip.libtpu
    try:
        found = describe(platform="tpu", topology_name=topology.wiring, **options)
    except Exception as error:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"topology={topology.name} takes libtpu, which is not installed, with or without a TPU; run "
                "`pip install '.[tpu]'` in the clone of distillax"
            ) from None
        raise UserError(
            f"topology={topology.name} cannot be compiled for here: {first_line(error)}; see to libtpu"
        ) from None
    return found.devices
