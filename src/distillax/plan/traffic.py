"""What a compiled program sends between devices, read from its text (XLA's HLO)."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\((.*)")
_ACROSS = re.compile(r'= \((.*?), u32\[\].* send\(.*_xla_megascale_transfer_type="(\w+)"')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALL = re.compile(r"\b(body|condition|calls|to_apply|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
_CONSTANT = re.compile(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_CHAIN = re.compile(r'chain_id="?(\w+)')
BETWEEN = "between slices"
_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)')


@dataclass(frozen=True)
class Collective:
    """One kind of exchange in one place: `bytes` that a device sends each time, and how many `times` a step,
    which is None within a loop that the data ends. `loop` says what it happens in: "" for nothing, else the
    source of the innermost loop. All that goes over the network between slices is of the kind BETWEEN."""

    kind: str
    bytes: float
    times: int | None
    loop: str


def collectives(hlo: str, devices: int, slices: int = 1) -> list[Collective]:
    """Every collective of a program for so many devices, by the minimum that its algorithm sends: a gather of
    n parts is n - 1 of them, and so is the scatter of a sum; a reduction is both. What spans `slices`, the
    TPU's compiler has split: a collective within each slice, and a send to the others."""
    bodies, entry = _computations(hlo)
    found: list[Collective] = []

    def visit(name: str, times: int | None, loop: str, chains: set[str]) -> None:
        for line in bodies.get(name, ()):
            if across := _ACROSS.search(line):
                found.append(Collective(BETWEEN, _sent_across(across[2], across[1], slices), times, loop))
                continue
            match = _COLLECTIVE.search(line)
            if match:
                # TPUs send while they compute: the fusions that start, carry on and end one exchange each
                # name it, as links of a chain.
                chain = _CHAIN.search(line)
                if chain and chain[1] in chains:
                    continue
                chains |= {chain[1]} if chain else set()
                kind, sent = match[2], _sent(match[2], match[1], bool(match[3]), _group_size(line, devices))
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    # TPUs do so in one: what is written as a reduction whose result is cut is never whole.
                    kind, sent = "reduce-scatter", sent / 2
                found.append(Collective(kind, sent, times, loop))
                continue
            for word, callees in _CALL.findall(line):
                inner = " while(" in line and word == "body"
                turns = _times(times, _trips(line, bodies)) if inner else times
                for callee in callees.split(", "):
                    within = chains if word == "calls" else set[str]()
                    visit(callee.lstrip("%"), turns, _source(line) if inner else loop, within)

    visit(entry, 1, "", set())
    return [one for one in found if one.bytes]


def by_kind(found: list[Collective]) -> dict[str, float]:
    """Bytes that a device sends in a step; a loop that the data ends is counted as one turn."""
    total: dict[str, float] = defaultdict(float)
    for one in found:
        total[one.kind] += one.bytes * (1 if one.times is None else one.times)
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def a_turn(found: list[Collective]) -> float:
    """Bytes that a device sends in each turn of the loops that the data ends, such as the loss's."""
    return sum(one.bytes for one in found if one.times is None)


def _times(outer: int | None, inner: int | None) -> int | None:
    return None if outer is None or inner is None else outer * inner


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
    """How often a loop turns: as the compiler notes, or from what its condition compares with and what its
    body adds; None for a number that only the data knows."""
    if match := _TRIPS.search(line):
        return int(match[1])
    names = [re.search(rf"{part}=%?([\w.\-]+)", line) for part in ("condition", "body")]
    condition, body = ("\n".join(bodies.get(name[1], ())) if name else "" for name in names)
    limits, counter = _CONSTANT.findall(condition), re.findall(r"get-tuple-element\(.*index=(\d+)", condition)
    if len(limits) != 1 or len(counter) != 1:
        return None
    return -(-int(limits[0][1]) // _stride(body, int(counter[0])))


def _stride(body: str, counter: int) -> int:
    """What a loop's body adds to its counter, the so manieth of what it carries: more than one, where the
    compiler has unrolled it."""
    root = re.search(r"ROOT \S+ = .*? tuple\((.*?)\)", body)
    if not root:
        return 1
    carried = re.findall(r"%([\w.\-]+)", root[1])
    added = re.search(rf"%{re.escape(carried[counter])} = \S+ add\((.*?)\)", body)
    constants = dict(_CONSTANT.findall(body))
    operands = re.findall(r"%([\w.\-]+)", added[1]) if added else []
    return next((int(constants[name]) for name in operands if name in constants), 1) or 1


def _source(line: str) -> str:
    match = re.search(r'op_name="([^"]*)"', line)
    return match[1] if match else "loop"


def _sent(kind: str, result: str, started: bool, n: int) -> float:
    sizes = [
        _size(dtype, shape)
        for dtype, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", result))
        if shape or not started  # words of the runtime, beside what is sent
    ]
    if kind == "collective-permute":
        return float(sizes[0])
    if started and kind in ("all-gather", "reduce-scatter"):
        sizes = sizes[len(sizes) // 2 :]  # operands, then results
    whole = sum(sizes)
    if kind == "reduce-scatter":
        return float(whole * (n - 1))
    return whole * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _size(dtype: str, shape: str) -> int:
    return _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)


def _sent_across(kind: str, sent: str, n: int) -> float:
    """Of what each of n slices hands to the network, as if all of them were in one group."""
    size = sum(_size(*array) for array in _ARRAY.findall(sent))
    part = (n - 1) / n
    times = {"ALL_REDUCE": 2 * part, "REDUCE_SCATTER": part, "ALL_GATHER": n - 1, "ALL_TO_ALL": part}
    return size * times.get(kind, 1)  # the rest is "ONE_TO_ONE"


def _group_size(line: str, devices: int) -> int:
    """Devices of a group, in any of the ways in which XLA writes groups."""
    if match := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    return devices  # all in one group, which goes without saying
