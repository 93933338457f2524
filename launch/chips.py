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
        target: of a GPU, what its compiler is told of it (XLA's GpuTargetConfigProto, as text).
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    clock: float = 0.0
    options: tuple[tuple[str, object], ...] = ()
    target: str = ""


GIB = 2**30

# NVIDIA's data sheet and the limits of compute capability 9.0, as XLA's compiler asks for them.
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
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
"""
# NVIDIA's FLOP/s are those without sparsity; a GPU's interconnect is NVLink, one way.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, 1.05e9, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 1.5e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 1.75e9, (("chip_config_name", "megacore"),)),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, 1.75e9),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, target=_H100_TARGET),
}
_SIDES = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2, "h100": 2}  # of a topology

# By what a device calls itself (`jax.Device.device_kind`): for what runs, where `CHIPS` is for what is
# compiled ahead.
DEVICES = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "NVIDIA H100 80GB HBM3": CHIPS["h100"],
    "NVIDIA H200": dataclasses.replace(CHIPS["h100"], memory=141e9, bandwidth=4800e9, target=""),
}


def of_device(kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None of one that is not listed."""
    return DEVICES.get(kind)


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
    """The chip's name and the shape of a topology such as "v4:2x2x2", or "h100:1x8" (nodes x GPUs).

    Raises:
        ValueError: it is none of ours, or not of that form.
    """
    name, _, shape = topology.partition(":")
    sides = shape.split("x")
    if len(sides) != _SIDES.get(name):
        raise ValueError(
            f"{topology!r}: expected CHIP:SHAPE, such as v4:2x2x2, v5e:2x4 or h100:1x8 (nodes x GPUs), "
            f"with a chip of {', '.join(CHIPS)}"
        )
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"{topology!r}: the shape must be whole numbers with x between")
    return name, tuple(map(int, sides))
