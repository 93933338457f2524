"""What a compiled program (HLO text) sends between devices."""

from __future__ import annotations

import collections
import dataclasses
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.-]+ = (.+?) ({'|'.join(KINDS)})(-start)?\((.*)$", re.MULTILINE
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_RESULT = re.compile(r"^\s*(?:ROOT )?%[\w.-]+ = ([a-z]+[0-9]*)\[([0-9,]*)\](.*)$", re.MULTILINE)
_SOURCE = re.compile(r'op_name="([^"]*)"')
_GROUPS = re.compile(r"replica_groups=(\{\{[0-9, ]+\}|\[[0-9]+,([0-9]+)\])")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Collectives of one kind, in one run of the program on each device.

    Attributes:
        bytes: of the whole arrays: of what a gather gives, of what a reduction takes.
        sent: bytes that a device sends in a ring: (n - 1) / n of them in groups of n devices, twice
            that for an all-reduce.
    """

    count: int
    bytes: int
    sent: int


def collectives(text: str, devices: int) -> dict[str, Collectives]:
    """By kind, of a program for so many devices. Those in the body of a loop count once."""
    found: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for result, kind, started, rest in _INSTRUCTION.findall(text):
        arrays = [array_bytes(*array) for array in _ARRAY.findall(result)]
        group = _group_size(rest, devices)
        if started and kind in ("all-gather", "reduce-scatter"):
            # It gives (operands..., results...): of a gather the results, else the operands are whole.
            half = len(arrays) // 2
            size = sum(arrays[half:] if kind == "all-gather" else arrays[:half])
        elif started and kind == "collective-permute":
            size = arrays[0]
        else:
            size = sum(arrays)
            if kind == "reduce-scatter":
                size *= group  # its result is a share of what it takes
        share = (group - 1) / group if kind != "collective-permute" else 1.0
        found[kind].append((size, round(size * share * (2 if kind == "all-reduce" else 1))))
    return {
        kind: Collectives(
            len(found[kind]), sum(size for size, _ in found[kind]), sum(s for _, s in found[kind])
        )
        for kind in KINDS
        if kind in found
    }


def largest(text: str, count: int = 5) -> list[str]:
    """Lines with the largest arrays of a program, and where they come from."""
    found: dict[tuple[int, str], str] = {}
    for kind, shape, rest in _RESULT.findall(text):
        source = _SOURCE.search(rest)
        key = array_bytes(kind, shape), f"{kind}[{shape}]"
        found[key] = found.get(key) or (source[1] if source else "")
    lines = sorted(found.items(), reverse=True)[:count]
    return [f"{size / 2**30:.2f} GiB {array} {source}".strip() for (size, array), source in lines]


def array_bytes(kind: str, shape: str) -> int:
    """Of an array such as ("bf16", "8,128"); 0 for what is not an array."""
    count = 1
    for side in filter(None, shape.split(",")):
        count *= int(side)
    return count * _BITS.get(kind, 0) // 8


def _group_size(rest: str, devices: int) -> int:
    found = _GROUPS.search(rest)
    if not found:
        return devices
    if found[2]:
        return int(found[2])
    return found[1].count(",") + 1
