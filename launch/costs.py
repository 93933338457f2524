"""Where a compiled TPU program's bytes and cycles go, from its HLO text.

The compiler writes its estimate of the cycles beside most instructions. It means something at its own
default effort (`--effort=O2`) only: at the lowest, products are not tuned. It is right for products, 2.5
to 4 times too slow for plain additions, and knows nothing of Pallas kernels, whose time is counted
here from their products.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from launch.chips import Chip
from launch.hlo import KINDS, array_bytes

LANES = 128  # a head's channels are padded to these where they are summed or written
# Products of (s, t, channels) in a kernel for attention, by a part of its name: q k and p v; of the backward
# pass q k, g v, p g, ds q and ds k.
KERNELS = {"flash_forward": 2, "flash_backward": 5, "splash_mha_fwd": 2, "splash_mha_dkv": 5}
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "after-all",
    "while", "conditional", "call", "iota",
}  # fmt: skip
_SLICES = {"slice", "dynamic-slice", "gather"}
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|branch_computations|true_computation|false_computation)="
    r"\{?(%[\w.-]+(?:, %[\w.-]+)*)"
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CALLS = {  # Pallas on a TPU; cuDNN and cuBLAS on a GPU
    "kernels": re.compile("tpu_custom_call|fmha"),
    "products": re.compile("gemm|matmul|conv"),
}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NOT_KNOWN = 2**62  # the compiler writes the largest integer


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of all instructions of one kind, in one run of the program on each device.

    Attributes:
        bytes: of operands and results in HBM, with the padding of their layout.
        cycles: as the compiler estimates them; 0 where it does not say.
        flops: of Pallas kernels, with heads padded to the lanes.
    """

    count: int = 0
    bytes: int = 0
    cycles: int = 0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))

    def seconds(self, chip: Chip) -> float:
        """By the cycles; of kernels by their products; at least what the bytes take where neither is."""
        if self.flops:
            return self.flops / chip.flops
        return self.cycles / chip.clock if self.cycles else self.bytes / chip.bandwidth


def costs(text: str) -> dict[str, Cost]:
    """By kind: products, reductions, elementwise, copies, kernels, collectives and prefetches.

    Prefetches are copies between HBM and the core's memory beside other work; what they bring is not
    counted again where it is used. Bodies of loops count once.
    """
    computations, entry = _read(text)
    sizes = {name: _hbm_bytes(kind) for body in computations.values() for name, kind, *_ in body}
    found: dict[str, Cost] = collections.defaultdict(Cost)
    for name, result, operation, rest in _executed(computations, entry):
        if operation in ("copy-done", "slice-done", "dynamic-slice-done"):
            found["prefetches"] += Cost(1, _hbm_bytes(result, everywhere=True))
        if operation in _FREE or operation.endswith(("-start", "-done", "-update")):
            continue
        operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
        cycles = _CYCLES.search(rest)
        kernel = next((k for k in KERNELS if k in name), None)
        found[_kind(operation, rest, computations)] += Cost(
            1,
            _hbm_bytes(result) + _bytes_read(operands, rest, sizes, computations),
            int(cycles[1]) if cycles and int(cycles[1]) < _NOT_KNOWN else 0,
            _attention_flops(rest, kernel) if kernel else 0.0,
        )
    return dict(found)


def _read(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """Instructions (name, result, operation, rest of the line) by computation; the entry's name."""
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    body: list[tuple[str, str, str, str]] = []
    entry = ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            body = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            body.append(instruction.groups())
    return computations, entry


def _executed(
    computations: dict[str, list[tuple[str, str, str, str]]], entry: str
) -> Iterator[tuple[str, str, str, str]]:
    """Of the entry, and of loops, branches and calls; not what is inside of a fusion."""
    waiting, seen = [entry], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for instruction in computations.get(name, []):
            yield instruction
            if instruction[2] in ("while", "conditional", "call"):
                for called in _CALLED.findall(instruction[3]):
                    waiting += re.findall(r"%([\w.-]+)", called)


def _bytes_read(
    operands: list[str],
    rest: str,
    sizes: dict[str, int],
    computations: dict[str, list[tuple[str, str, str, str]]],
) -> int:
    """Of an instruction's operands; of those that a fusion takes slices of, these."""
    called = re.search(r"calls=%([\w.-]+)", rest)
    body = computations.get(called[1], []) if called else []
    numbers = {
        name: int(inner.partition(")")[0]) for name, _, op, inner in body if op == "parameter"
    }
    uses: dict[int, list[tuple[str, str]]] = collections.defaultdict(list)
    for _, result, operation, inner in body:
        for name in re.findall(r"%([\w.-]+)", inner.split("), ")[0]):
            if name in numbers:
                uses[numbers[name]].append((operation, result))
    total = 0
    for number, operand in enumerate(operands):
        size = sizes.get(operand, 0)
        used = uses.get(number, [])
        if used and all(operation in _SLICES for operation, _ in used):
            size = min(size, sum(_hbm_bytes(result, everywhere=True) for _, result in used))
        total += size
    return total


def _kind(
    operation: str, rest: str, computations: dict[str, list[tuple[str, str, str, str]]]
) -> str:
    if operation in KINDS:
        return "collectives"
    if operation == "custom-call":
        target = _TARGET.search(rest)
        return next(
            (k for k, words in _CALLS.items() if target and words.search(target[1])), "elementwise"
        )
    inside = {operation}
    if operation == "fusion" and (called := re.search(r"calls=%([\w.-]+)", rest)):
        inside = {what for _, _, what, _ in computations.get(called[1], [])}
    if inside & {"convolution", "dot"}:  # the TPU's compiler makes convolutions of all products
        return "products"
    if inside & set(KINDS):
        return "collectives"
    if inside & {"reduce", "reduce-window"}:
        return "reductions"
    if inside <= {"copy", "transpose", "bitcast", "parameter", "reshape", "tuple"}:
        return "copies"
    return "elementwise"


def _hbm_bytes(result: str, everywhere: bool = False) -> int:
    """Of the arrays in a type; what lies in the memory of the core is left out, if not `everywhere`."""
    return sum(
        _padded_bytes(kind, shape, layout)
        for kind, shape, layout in _ARRAY.findall(result)
        if everywhere or "S(" not in layout
    )


def _padded_bytes(kind: str, shape: str, layout: str) -> int:
    """Of ("bf16", "24,40", "1,0:T(8,128)(2,1)"): the last axes of the layout in whole tiles."""
    sides = [int(side) for side in filter(None, shape.split(","))]
    order, _, tiles = layout.partition(":")
    if sides and (tiled := re.match(r"T\(([0-9,]+)\)", tiles)):
        minor_first = [int(axis) for axis in order.split(",")]
        for axis, tile in zip(minor_first, reversed(tiled[1].split(",")), strict=False):
            sides[axis] += -sides[axis] % int(tile)
    return array_bytes(kind, ",".join(map(str, sides)))


def _attention_flops(rest: str, kernel: str) -> float:
    """From the shapes of q and k, the first two floating operands.

    Those of flash are (..., channels, tokens), those of splash (..., tokens, channels).
    """
    operands = rest.partition("operand_layout_constraints={")[2]
    shapes = re.findall(r"\b(?:bf16|f32)\[([0-9,]+)\]", operands)[:2]
    (*lead, s, d), (*_, t, _) = ([int(side) for side in shape.split(",")] for shape in shapes)
    if kernel.startswith("flash"):
        (s, d), t = (d, s), int(shapes[1].split(",")[-1])
    return KERNELS[kernel] * 2.0 * math.prod(lead) * s * t * LANES * math.ceil(d / LANES)
