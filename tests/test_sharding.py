"""Where arrays live, and that every mesh computes what one device does."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from spinmeround_jax import sharding
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.sharding import MeshConfig
from tests.support.paths import ROOT


class FakeDevice:
    device_kind = "fake"

    def __init__(self, index, slice_index=0, process_index=0, platform="cpu"):
        self.id, self.slice_index, self.process_index = index, slice_index, process_index
        self.platform = platform


def test_large_arrays_are_split_along_their_largest_divisible_axis():
    shapes = {"kernel": (3, 3, 512, 1024), "odd": (6, 262143), "even": (8, 262143), "small": (4, 4)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    split = sharding.state_shardings(AbstractMesh((2, 4, 1), sharding.AXES), tree)
    assert split["kernel"].spec == P(None, None, None, "fsdp")
    assert split["even"].spec == P("fsdp")
    assert split["odd"].spec == split["small"].spec == P()
    whole = sharding.state_shardings(AbstractMesh((8, 1, 1), sharding.AXES), tree)
    assert all(placement.spec == P() for placement in whole.values())


def test_parameters_may_be_split_over_nodes_with_gpus():
    """JAX gives each node a slice_index of its own."""
    nodes = [FakeDevice(i, i // 4, i // 4, "gpu") for i in range(8)]
    mesh = sharding.make_mesh(MeshConfig(fsdp=8, views=1), nodes)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "views": 1}
    assert {device.id for device in mesh.devices.flat} == set(range(8))
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, views=2), nodes)
    sharding.check_views(mesh, 8)  # views stay in their process


def test_mesh_takes_all_devices_and_keeps_groups_inside_a_slice():
    devices = [FakeDevice(i) for i in range(8)]
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, views=2), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "views": 2}
    assert dict(sharding.make_mesh(devices=devices).shape) == {"data": 8, "fsdp": 1, "views": 1}
    slices = [FakeDevice(i, slice_index=i // 4) for i in range(8)]
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, views=1), slices)
    for group in mesh.devices.reshape(2, 4):
        assert len({device.slice_index for device in group}) == 1
    for config in (MeshConfig(fsdp=3, views=1), MeshConfig(fsdp=8, views=1), MeshConfig(0, 1)):
        with pytest.raises(ValueError, match=r"does not divide 8 device\(s\) in 2 slice"):
            sharding.make_mesh(config, slices)


def test_batches_and_views_must_divide():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, views=2), [FakeDevice(i) for i in range(8)])
    sharding.check_batch_size(mesh, 8, accumulation=2)
    with pytest.raises(ValueError, match="batch_size 6 does not divide over 4 devices;"):
        sharding.check_batch_size(mesh, 6)
    with pytest.raises(ValueError, match="batch_size 4 does not divide over 4 devices in 2 parts"):
        sharding.check_batch_size(mesh, 4, accumulation=2)
    sharding.check_views(mesh, 8)
    with pytest.raises(ValueError, match="does not divide the model's 7 views"):
        sharding.check_views(mesh, 7)
    devices = [FakeDevice(i, process_index=i) for i in range(8)]
    with pytest.raises(ValueError, match="would be in several processes"):
        sharding.check_views(sharding.make_mesh(MeshConfig(fsdp=1, views=2), devices), 8)


@pytest.mark.parametrize(("fsdp", "views"), [(4, 2), (1, 4), (8, 2), (2, 4)])
def test_views_stay_in_a_process_where_its_neighbours_are_others(fsdp, views):
    """On a v4 pod a process has 2 x 2 chips of a cube, whose rows belong to several."""
    devices = [FakeDevice(i, process_index=i % 8) for i in range(32)]
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp, views=views), devices)
    assert dict(mesh.shape) == {"data": 32 // fsdp // views, "fsdp": fsdp, "views": views}
    assert {d.id for d in mesh.devices.flat} == set(range(32))
    sharding.check_views(mesh, 8)


def test_global_batch_is_the_local_one_on_one_process():
    batch = Batch(
        observed=np.eye(4, dtype=bool),
        dropped=np.ones(4, bool),
        identity_dropped=np.ones(4, bool),
        id_embedding=np.arange(8.0).reshape(4, 2),
        world_to_camera=np.zeros((4, 4, 4, 4), np.float32),
    )
    placed = sharding.global_batch(sharding.make_mesh(), batch)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert placed.observed.sharding.spec == P(sharding.EXAMPLES, "views")
    assert placed.id_embedding.sharding.spec == P(sharding.EXAMPLES)


MESHES = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
import optax
from spinmeround_jax import sharding, train
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.models import parameters
from spinmeround_jax.training import optim, step as diffusion_step
from tests.support.configs import micro_config
from tests.support.tiny_model import CONFIG, random_model
from spinmeround_jax.sharding import MeshConfig

sharding.FSDP_MIN_SIZE = 512
config = micro_config("unused", **{"latents.sample": True})
config = dataclasses.replace(config, model=CONFIG)
model = random_model()
networks = {"unet": model.unet, "identity": model.identity, "autoencoder": model.autoencoder}
graphdefs = {name: parameters.split(network)[0] for name, network in networks.items()}
params = {name: parameters.split(network)[1] for name, network in networks.items()}
frozen = {
    "networks": {"autoencoder": params.pop("autoencoder")}, "empty_latent": jnp.full((8, 8, 8), 0.1)
}
rng = np.random.default_rng(0)
pictures = rng.uniform(-1, 1, (2, 8, 8, 16, 16, 3)).astype(np.float32)
batch = Batch(
    observed=np.arange(8) < np.array([[0], [1], [3], [1], [1], [0], [3], [1]]),
    dropped=np.arange(8) == 1, identity_dropped=np.arange(8) == 2,
    id_embedding=np.eye(8, 512, dtype=np.float32),
    world_to_camera=np.eye(4, dtype=np.float32) + rng.normal(size=(8, 8, 4, 4)).astype(np.float32),
    images=pictures[0], normals=pictures[1],
)
# name: devices, (fsdp, views), changes of the config
MESHES = {
    "one": (1, (1, 1), {}),
    "all": (8, (2, 2), {"remat": "blocks"}),
    "data": (8, (1, 1), {}),
    "fsdp": (8, (4, 1), {}),
    "views": (8, (1, 4), {}),
    "accumulated": (4, (2, 1), {"accumulation": 2}),
    "elementwise": (1, (1, 1), {"remat": "elementwise"}),
}
results = {}
for name in sys.argv[1:]:
    devices, mesh, changes = MESHES[name]
    chosen = dataclasses.replace(config, mesh=MeshConfig(*mesh), **changes)
    where = sharding.make_mesh(chosen.mesh, jax.devices()[:devices])
    transform = optax.sgd(1.0)  # so that the update is the gradient
    state = optim.init(params, transform)
    placement = sharding.state_shardings(where, state)
    split = sum("fsdp" in x.spec for x in jax.tree.leaves(placement.params))
    step = diffusion_step.make_step(chosen, graphdefs, transform, where)
    step = jax.jit(step, out_shardings=(placement, None))
    state = jax.device_put(state, placement)
    fixed = jax.device_put(frozen, sharding.replicated(where))
    after, metrics = step(state, fixed, sharding.global_batch(where, batch))
    gradient = {
        f"{n}/{k}": np.asarray(params[n][k] - after.params[n][k]) for n in params for k in params[n]
    }
    if name == "one":
        expected, scale = gradient, max(abs(g).max() for g in gradient.values())
    off = max(abs(gradient[k] - expected[k]).max() for k in expected) / scale
    results[name] = {"off": float(off), "loss": float(metrics["loss"]), "split": split}
print(json.dumps(results))
"""


SAMPLING = """
import json
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 3)
jax.config.update("jax_disable_most_optimizations", True)
from spinmeround_jax.diffusion.pipeline import Pipeline
from tests.support.tiny_model import SAMPLING, TRAJECTORY, inputs, random_model

model = random_model()
one, three = (Pipeline(model, SAMPLING, max_batch=2, devices=jax.devices()[:n]) for n in (1, 3))
images, identities = inputs(4)
a, b = (p.spin(images, identities, TRAJECTORY, [0, 1, 2, 3]) for p in (one, three))
print(json.dumps({
    "off": float(max(abs(a.images - b.images).max(), abs(a.normals - b.normals).max())),
    "spread": float(a.images.std()), "devices": [p.networks.mesh.devices.size for p in (one, three)],
}))
"""


def result_of(script, *arguments):
    """What a script prints in the end, in a process of its own: devices are simulated at its start."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_meshes(*names):
    """Loss and gradients on these meshes of simulated devices are those of one device."""
    results = result_of(MESHES, "one", *names)
    one = results.pop("one")
    assert one["split"] == 0 and set(results) == set(names)
    for name, result in results.items():
        assert abs(result["loss"] / one["loss"] - 1) < 1e-5, name
        assert result["off"] < 2e-5, name
        assert (result["split"] > 5) == (name in ("all", "fsdp", "accumulated")), name


def test_a_mesh_of_all_axes_computes_what_one_device_does():
    check_meshes("all")


@pytest.mark.slow
def test_every_mesh_computes_what_one_device_does():
    check_meshes("data", "fsdp", "views", "accumulated", "elementwise")


def test_heads_are_sampled_alike_on_any_number_of_devices():
    result = result_of(SAMPLING)
    assert result["devices"] == [1, 3] and result["spread"] > 0.1
    assert result["off"] < 1e-4
