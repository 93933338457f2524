"""Memory of accelerators, and how to compile for them without having them."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, from its maker's data sheet.

    Attributes:
        memory: bytes of HBM.
        axes: numbers in the shape of a topology, such as 3 for "2x2x2".
        options: arguments of `get_topology_desc`; they make one chip one device.
        target: GPUs only: XLA's GpuTargetConfigProto as text.
    """

    memory: float
    axes: int
    options: tuple[tuple[str, object], ...] = ()
    target: str = ""


# NVIDIA's data sheet, and the limits of compute capability 9.0.
_H100_TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" }
"""
_MEGACORE = (("chip_config_name", "megacore"),)  # the two cores of a chip are one device
CHIPS = {
    "v4": Chip(32 * GIB, 3, _MEGACORE),
    "v5e": Chip(16 * GIB, 2),
    "v5p": Chip(95 * GIB, 3, _MEGACORE),
    "v6e": Chip(32 * GIB, 2),
    "h100": Chip(80e9, 2, target=_H100_TARGET),
}


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
    """The chip's name and the shape of a topology such as "v4:2x2x2" or "h100:1x8" (nodes x GPUs).

    Raises:
        ValueError: the chip is unknown or the shape malformed.
    """
    name, _, shape = topology.partition(":")
    sides = shape.split("x")
    known = name in CHIPS and len(sides) == CHIPS[name].axes
    if not known or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(
            f"{topology!r}: expected CHIP:SHAPE, such as v4:2x2x2, v5e:2x4 or h100:1x8 (nodes x GPUs), "
            f"with a chip of {', '.join(CHIPS)}"
        )
    return name, tuple(map(int, sides))
