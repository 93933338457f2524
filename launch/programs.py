"""The jitted programs of training and sampling with the shapes of their arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from spinmeround_jax import sharding, train
from spinmeround_jax.config import Config
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.diffusion import sampling, schedules
from spinmeround_jax.models import parameters
from spinmeround_jax.models.attention_kernels import best_for
from spinmeround_jax.training import optim
from spinmeround_jax.training import step as diffusion_step

Shapes = jax.ShapeDtypeStruct


def with_batch(config: Config, devices: int, examples: float) -> Config:
    """The config with another batch size.

    Args:
        examples: per device; a fraction where the views of an example are split over devices.

    Raises:
        ValueError: the batch would not be a whole number of examples.
    """
    batch = examples * devices
    if batch != int(batch) or batch < 1:
        raise ValueError(
            f"{examples} examples on each of {devices} devices do not make a whole batch"
        )
    optimizer = dataclasses.replace(config.optimizer, batch_size=int(batch))
    return dataclasses.replace(config, optimizer=optimizer)


def networks(config: Config) -> dict[str, nnx.Module]:
    """The networks of a new model by name, without memory for their parameters."""
    return nnx.eval_shape(lambda: train.new_model(config).networks)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A training step and the shapes and placement of its arguments.

    Attributes:
        step: jitted (state, frozen, batch) -> (state, metrics); donates the state.
        state: `optim.TrainState` of ShapeDtypeStruct, like `frozen` and `batch`.
        frozen: "networks" that are not trained, and "empty_latent".
    """

    mesh: Mesh
    graphdefs: dict[str, nnx.GraphDef]
    transform: optax.GradientTransformation
    step: jax.stages.Wrapped
    state: optim.TrainState
    frozen: Any
    batch: Batch

    def held(self) -> dict[str, int]:
        """Bytes on each device of what exists between steps, and of a batch."""
        return {
            "parameters": local_bytes(self.state.params),
            "moving average": local_bytes(self.state.ema),
            "optimizer state": local_bytes(self.state.opt_state),
            "frozen networks": local_bytes(self.frozen),
            "batch": local_bytes(self.batch),
        }


def train_step(config: Config, devices: Sequence[jax.Device], cached: bool) -> TrainStep:
    """The training step of a config.

    Args:
        cached: latents were computed ahead; otherwise the step encodes images.

    Raises:
        ValueError: devices, mesh and batch do not fit together.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch_size(mesh, config.optimizer.batch_size, config.accumulation)
    sharding.check_views(mesh, config.model.views)
    split = {name: parameters.split(network) for name, network in networks(config).items()}
    graphdefs = {name: graphdef for name, (graphdef, _) in split.items()}
    shapes = {name: params for name, (_, params) in split.items()}
    trained = ("unet", "identity") if config.train_identity_encoder else ("unet",)
    transform = optim.optimizer(config.optimizer, sum(stage.steps for stage in config.stages))
    state = jax.eval_shape(
        lambda params: optim.init(params, transform), {name: shapes[name] for name in trained}
    )
    placement = sharding.state_shardings(mesh, state)
    kept = set(shapes) - set(trained) - ({"autoencoder"} if cached else set())
    size, channels = config.model.latent_size, config.model.latent_channels
    frozen = {
        "networks": {name: shapes[name] for name in sorted(kept)},
        "empty_latent": Shapes((size, size, channels), jnp.float32),
    }
    batch = abstract_batch(config, cached)
    step = jax.jit(
        diffusion_step.make_step(config, graphdefs, transform, mesh),
        donate_argnums=0,
        out_shardings=(placement, None),
    )
    return TrainStep(
        mesh, graphdefs, transform, step,
        sharding.abstract(state, placement),
        sharding.abstract(frozen, sharding.replicated(mesh)),
        jax.tree.map(
            lambda spec, x: Shapes(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            sharding.batch_specs(batch),
            batch,
        ),
    )  # fmt: skip


def abstract_batch(config: Config, cached: bool) -> Batch:
    """Shapes of a global batch."""
    b, v, size = config.optimizer.batch_size, config.model.views, config.model.image_size
    z, latent = config.model.autoencoder.latent_channels, config.model.latent_size
    images = Shapes((b, v, size, size, 3), jnp.float32)
    moments = Shapes((b, v, 2, latent, latent, 2 * z), jnp.float32)
    return Batch(
        observed=Shapes((b, v), jnp.bool),
        dropped=Shapes((b,), jnp.bool),
        identity_dropped=Shapes((b,), jnp.bool),
        id_embedding=Shapes((b, 512), jnp.float32),
        world_to_camera=Shapes((b, v, 4, 4), jnp.float32),
        images=None if cached else images,
        normals=None if cached else images,
        moments=moments if cached else None,
    )


def sampler(
    config: Config, devices: Sequence[jax.Device], examples: int
) -> tuple[jax.stages.Lowered, dict[str, int]]:
    """Joint sampling of one group of views per example with guidance, lowered; bytes on each device.

    Args:
        examples: per device.
    """
    mesh = sharding.make_mesh(devices=devices)
    model = config.model
    graphdef, state = nnx.split(networks(config)["unet"])
    state = sharding.abstract(state, sharding.replicated(mesh))
    b, v, size, c = examples * len(devices), model.views, model.latent_size, model.latent_channels
    tokens, width = model.identity.context_length, model.identity.width
    shapes = {
        "context": ((b, tokens, width), jnp.float32),
        "observed": ((b, v), jnp.bool),
        "observed_latents": ((b, v, size, size, c), jnp.float32),
        "world_to_camera": ((b, v, 4, 4), jnp.float32),
        "seed": ((b,), jnp.uint32),
        "stream": ((b, 2), jnp.int32),
    }
    split = sharding.batch_sharding(mesh)
    batch = {k: Shapes(shape, kind, sharding=split) for k, (shape, kind) in shapes.items()}
    chosen = config.sampling
    sigmas = schedules.karras_sigmas(chosen.steps, chosen.sigma_min, chosen.sigma_max, chosen.rho)
    lowered = sampling.joint_views.lower(
        state,
        batch,
        Shapes((1, tokens, width), jnp.float32),
        Shapes((size, size, c), jnp.float32),
        np.asarray(sigmas),
        np.float32(chosen.guidance_scale),
        np.float32(chosen.temperature),
        graphdef=graphdef,
        rays=model.rays,
        sampler=chosen.sampler,
        guided=True,
        shared_noise=chosen.shared_noise,
        kernel=best_for(mesh.devices.flat[0], jnp.dtype(config.compute_dtype)),
        mesh=mesh,
    )
    return lowered, {"parameters": local_bytes(state), "batch": local_bytes(batch)}


def local_bytes(tree: object) -> int:
    """Bytes on one device of arrays with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
