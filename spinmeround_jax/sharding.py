"""Where arrays live: a mesh over all devices, batches split over it, parameters copied or split.

One device is the same code with a mesh of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = Any
FSDP_MIN_SIZE = 2**18  # elements; below it, gathering costs more than the memory saved


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (of all processes) along one axis, "data"."""
    return Mesh(np.array(jax.devices() if devices is None else devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first axis, the examples."""
    return NamedSharding(mesh, P("data"))


def state_shardings(mesh: Mesh, tree: Tree, *, fsdp: bool) -> Tree:
    """A sharding for every array of `tree` (arrays or ShapeDtypeStructs).

    With `fsdp`, each array of at least FSDP_MIN_SIZE elements is split along its largest axis that
    the mesh divides (big_vision's rule: by shape, so that the networks know no axis names).
    Optimizer state and moving average have the shapes of their parameters, so they are split alike.
    """
    devices = mesh.shape["data"]

    def rule(x: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        if fsdp and devices > 1 and x.size >= FSDP_MIN_SIZE:
            for axis in sorted(range(x.ndim), key=lambda axis: -x.shape[axis]):
                if x.shape[axis] % devices == 0:
                    return NamedSharding(mesh, P(*[None] * axis, "data"))
        return replicated(mesh)

    return jax.tree.map(rule, tree)


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Raises ValueError unless the global batch divides over the devices."""
    if batch_size % mesh.devices.size:
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of the {mesh.devices.size} devices; "
            "change config.optimizer.batch_size"
        )


def global_batch(mesh: Mesh, batch: Tree) -> Tree:
    """Global arrays, split over "data", from the examples this process loaded."""
    placement = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(placement, x), batch)


def abstract(tree: Tree, shardings: Tree | NamedSharding) -> Tree:
    """ShapeDtypeStructs of `tree` that say where each array shall live: what to restore into."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )
