"""Sharding: one mesh over all devices, batches split over it, parameters replicated or split.

The mesh has three axes. Examples are split over "data" and "fsdp"; parameters, their moving average and their
optimizer state over "fsdp" (fully sharded data parallelism); the views of an example over "views". One device
is a mesh of 1 x 1 x 1. `training.step` holds the collectives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along two axes of the mesh; "data" has the others (see `sharding`)."""

    fsdp: int = 1  # parameters, optimizer state and examples; 1 replicates parameters
    views: int = 1  # the views of one example


Tree = Any
AXES = ("data", "fsdp", "views")
EXAMPLES = ("data", "fsdp")
FSDP_MIN_SIZE = 2**18  # elements; below it, gathering costs more than the memory saved
ALL_ON_DATA = MeshConfig()
_PER_EXAMPLE = {"dropped", "identity_dropped", "id_embedding"}  # fields of Batch without views


def make_mesh(
    config: MeshConfig = ALL_ON_DATA, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """All devices (of all processes) as "data" x "fsdp" x "views".

    Devices close in the network are neighbours on the last axes, which communicate most. Each of several TPU
    slices holds whole groups of "fsdp" x "views": only gradients pass between slices.

    Raises:
        ValueError: the number of devices is not divisible.
    """
    devices = jax.devices() if devices is None else devices
    # JAX calls a node with GPUs a slice, too, but groups may span nodes there.
    apart = devices[0].platform not in ("gpu", "cuda", "rocm")
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if apart else 1
    group = config.fsdp * config.views
    if group < 1 or len(devices) % (slices * group):
        raise ValueError(
            f"config.mesh: fsdp {config.fsdp} x views {config.views} does not divide "
            f"{len(devices)} device(s) in {slices} slice(s)"
        )
    shape = (len(devices) // group, config.fsdp, config.views)
    if slices > 1:
        inner = (shape[0] // slices, *shape[1:])
        array = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    processes = len({device.process_index for device in devices})
    here, left_over = divmod(len(devices) // processes, config.views)
    if _views_leave_their_process(array) and not left_over:
        # Each process loads whole examples: their views must be on its devices, whatever the links.
        of_fsdp = math.gcd(config.fsdp, here)
        inside = (here // of_fsdp, of_fsdp, config.views)
        across = tuple(whole // part for whole, part in zip(shape, inside, strict=True))
        array = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, process_is_granule=True, allow_split_physical_axes=True
        )
    return Mesh(array, AXES)


def _views_leave_their_process(array: np.ndarray) -> bool:
    groups = array.reshape(-1, array.shape[-1])
    return any(len({device.process_index for device in group}) > 1 for group in groups)


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def gathered(tree: Tree, mesh: Mesh) -> Tree:
    """Complete arrays on the first device of each process; collective."""
    return jax.tree.map(lambda x: x.addressable_data(0), jax.device_put(tree, replicated(mesh)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first axis, the examples."""
    return NamedSharding(mesh, P(EXAMPLES))


def batch_specs(batch: Any) -> Any:
    """PartitionSpecs of the fields of a `data.Batch`: by example, and by view if they have views."""

    def spec(field: dataclasses.Field) -> P | None:
        if getattr(batch, field.name) is None:
            return None
        return P(EXAMPLES) if field.name in _PER_EXAMPLE else P(EXAMPLES, "views")

    return type(batch)(**{field.name: spec(field) for field in dataclasses.fields(batch)})


def state_shardings(mesh: Mesh, tree: Tree) -> Tree:
    """A sharding for every array of `tree` (arrays or ShapeDtypeStructs).

    Each array of at least FSDP_MIN_SIZE elements is split over "fsdp" along its largest axis that
    is divisible (big_vision's rule: by shape, so that networks need no axis names). Optimizer state and moving
    average have the shapes of their parameters and are split alike.
    """
    devices = mesh.shape["fsdp"]

    def rule(x: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        if devices > 1 and x.size >= FSDP_MIN_SIZE:
            for axis in sorted(range(x.ndim), key=lambda axis: -x.shape[axis]):
                if x.shape[axis] % devices == 0:
                    return NamedSharding(mesh, P(*[None] * axis, "fsdp"))
        return replicated(mesh)

    return jax.tree.map(rule, tree)


def check_batch_size(mesh: Mesh, batch_size: int, accumulation: int = 1) -> None:
    """Raises ValueError unless devices and accumulated parts divide the global batch."""
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (groups * accumulation):
        parts = f" in {accumulation} parts each" if accumulation > 1 else ""
        raise ValueError(
            f"batch_size {batch_size} does not divide over {groups} devices{parts}; "
            "change config.optimizer.batch_size"
        )


def check_views(mesh: Mesh, views: int) -> None:
    """Raises ValueError unless the views of an example are divisible, within one process."""
    devices = mesh.shape["views"]
    if views % devices:
        raise ValueError(f"config.mesh.views {devices} does not divide the model's {views} views")
    if _views_leave_their_process(mesh.devices):
        raise ValueError(
            f"config.mesh.views {devices}: the views of an example would be in several processes, "
            "each of which loads whole examples; choose at most the devices of one process"
        )


def global_batch(mesh: Mesh, batch: Tree) -> Tree:
    """Global arrays, split by `batch_specs`, from the examples that this process loaded."""
    return jax.tree.map(
        lambda spec, x: jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x),
        batch_specs(batch),
        batch,
    )


def abstract(tree: Tree, shardings: Tree | NamedSharding) -> Tree:
    """ShapeDtypeStructs of `tree` with shardings, to restore into."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )
