"""Read the collectives of a compiled program from its HLO text; XLA's cost analysis omits them."""

from __future__ import annotations

import collections
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
_GROUPS = re.compile(r"replica_groups=(\{\{[0-9, ]+\}|\[[0-9]+,([0-9]+)\])")


def collectives(text: str, devices: int) -> dict[str, dict[str, int]]:
    """ "count" and "bytes" by kind, of one run of a program for `devices` devices.

    Bytes are those of the whole arrays on each device: the result of a gather, the input of a reduction. The
    body of a loop counts once.
    """
    sizes: dict[str, list[int]] = collections.defaultdict(list)
    for result, kind, started, rest in _INSTRUCTION.findall(text):
        arrays = [_array_bytes(*array) for array in _ARRAY.findall(result)]
        half = len(arrays) // 2  # an asynchronous start returns (operands..., results...)
        if started and kind == "all-gather":
            size = sum(arrays[half:])
        elif started and kind == "reduce-scatter":
            size = sum(arrays[:half])
        elif started and kind == "collective-permute":
            size = arrays[0]
        elif kind == "reduce-scatter":  # the result is one device's share
            size = sum(arrays) * _group_size(rest, devices)
        else:
            size = sum(arrays)
        sizes[kind].append(size)
    return {
        kind: {"count": len(sizes[kind]), "bytes": sum(sizes[kind])}
        for kind in KINDS
        if kind in sizes
    }


def _array_bytes(kind: str, shape: str) -> int:
    count = 1
    for side in filter(None, shape.split(",")):
        count *= int(side)
    return count * _BITS.get(kind, 0) // 8


def _group_size(rest: str, devices: int) -> int:
    if found := _GROUPS.search(rest):
        return int(found[2]) if found[2] else found[1].count(",") + 1
    return devices
