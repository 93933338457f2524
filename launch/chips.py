"""What accelerators can do at best, per chip, from their makers' data sheets."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    Attributes:
        flops: bfloat16 matrix FLOP/s.
        memory: bytes of HBM.
        bandwidth: bytes/s of HBM.
        interconnect: bytes/s out of a chip over all its links to chips of the same slice or node.
        clock: cycles per second, of a core of a TPU.
        options: of `get_topology_desc` beside the name, so that a chip is one device.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    clock: float = 0.0
    options: tuple[tuple[str, object], ...] = ()


GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 1.05e9, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 1.5e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 1.75e9, (("chip_config_name", "megacore"),)),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, 1.75e9),
}

# By what a device calls itself (`jax.Device.device_kind`): for what runs, where `CHIPS` is for what is
# compiled ahead. NVIDIA's FLOP/s are those without sparsity; a GPU's interconnect is NVLink, one way.
_H100 = Chip(989e12, 80e9, 3350e9, 450e9)
DEVICES = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": dataclasses.replace(_H100, memory=141e9, bandwidth=4800e9),
}


def of_device(kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None of one that is not listed."""
    return DEVICES.get(kind)


def parse(topology: str) -> tuple[str, Chip]:
    """The chip of a topology such as "v4:2x2x2", and its name.

    Raises:
        ValueError: it is none of ours, or not of that form.
    """
    name, colon, shape = topology.partition(":")
    sides = shape.split("x")
    dimensions = 3 if name in ("v4", "v5p") else 2
    if name not in CHIPS or not colon or len(sides) != dimensions:
        raise ValueError(
            f"{topology!r}: expected CHIP:SHAPE, such as v4:2x2x2 or v5e:2x4, with a chip of "
            + ", ".join(CHIPS)
        )
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"{topology!r}: the shape must be whole numbers with x between")
    return name, CHIPS[name]
