"""The programs of training and sampling, for devices that need not be there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from spinmeround_jax import sharding, train
from spinmeround_jax.config import Config
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.diffusion import sampling, schedules
from spinmeround_jax.models import ModelConfig, parameters
from spinmeround_jax.models.attention_kernels import best_for
from spinmeround_jax.training import optim
from spinmeround_jax.training import step as diffusion_step

Shapes = jax.ShapeDtypeStruct


def with_batch(config: Config, devices: int, examples: float) -> Config:
    """The same experiment with so many examples per device (a fraction where views are split).

    Raises:
        ValueError: that is no whole number of examples.
    """
    batch = examples * devices
    if batch != int(batch) or batch < 1:
        raise ValueError(f"{examples} examples on each of {devices} devices are no whole batch")
    optimizer = dataclasses.replace(config.optimizer, batch_size=int(batch))
    return dataclasses.replace(config, optimizer=optimizer)


def train_step(
    config: Config, devices: Sequence[jax.Device], cached: bool
) -> tuple[jax.stages.Lowered, dict[str, int]]:
    """One training step, lowered, and the bytes per device of what it holds.

    Args:
        cached: latents come computed ahead; otherwise the step encodes pictures.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch_size(mesh, config.optimizer.batch_size, config.accumulation)
    sharding.check_views(mesh, config.model.views)
    if config.accumulation > 1:
        raise ValueError(
            "the compiler counts one pass of a loop, here one part of the batch: give "
            "--config.accumulation=1 and the --examples of a part"
        )
    networks = nnx.eval_shape(lambda: train.new_model(config).networks)
    graphdefs = {name: parameters.split(module)[0] for name, module in networks.items()}
    shapes = {name: parameters.split(module)[1] for name, module in networks.items()}
    trained = ("unet", "identity") if config.train_identity_encoder else ("unet",)
    transform = optim.optimizer(config.optimizer, sum(stage.steps for stage in config.stages))
    state = jax.eval_shape(
        lambda params: optim.init(params, transform), {name: shapes[name] for name in trained}
    )
    placement = sharding.state_shardings(mesh, state)
    size, channels = config.model.latent_size, config.model.latent_channels
    kept = [
        name for name in shapes if name not in trained and not (cached and name == "autoencoder")
    ]
    frozen = {
        "networks": {name: shapes[name] for name in kept},
        "empty_latent": Shapes((size, size, channels), jnp.float32),
    }
    batch = abstract_batch(config, cached)
    arguments = (
        sharding.abstract(state, placement),
        sharding.abstract(frozen, sharding.replicated(mesh)),
        jax.tree.map(
            lambda spec, x: Shapes(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            sharding.batch_specs(batch),
            batch,
        ),
    )
    step = diffusion_step.make_step(config, graphdefs, transform, mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
    held = {
        "parameters": local_bytes(arguments[0].params),
        "moving average": local_bytes(arguments[0].ema),
        "optimizer state": local_bytes(arguments[0].opt_state),
        "frozen networks": local_bytes(arguments[1]),
        "batch": local_bytes(arguments[2]),
    }
    return jitted.lower(*arguments), held


def abstract_batch(config: Config, cached: bool) -> Batch:
    """The shapes of a global batch."""
    b, v, size = config.optimizer.batch_size, config.model.views, config.model.image_size
    z, latent = config.model.autoencoder.latent_channels, config.model.latent_size
    pictures = Shapes((b, v, size, size, 3), jnp.float32)
    moments = Shapes((b, v, 2, latent, latent, 2 * z), jnp.float32)
    return Batch(
        observed=Shapes((b, v), jnp.bool),
        dropped=Shapes((b,), jnp.bool),
        identity_dropped=Shapes((b,), jnp.bool),
        id_embedding=Shapes((b, 512), jnp.float32),
        world_to_camera=Shapes((b, v, 4, 4), jnp.float32),
        images=None if cached else pictures,
        normals=None if cached else pictures,
        moments=moments if cached else None,
    )


def sampler(
    config: Config, devices: Sequence[jax.Device], examples: int
) -> tuple[jax.stages.Lowered, dict[str, int]]:
    """Joint sampling of `examples` groups of views per device, with guidance, lowered."""
    mesh = sharding.make_mesh(devices=devices)
    model: ModelConfig = config.model
    unet = nnx.eval_shape(lambda: train.new_model(config).unet)
    graphdef, state = nnx.split(unet)
    state = sharding.abstract(state, sharding.replicated(mesh))
    b, v, size, c = (
        examples * mesh.devices.size,
        model.views,
        model.latent_size,
        model.latent_channels,
    )
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
    """On one device, of arrays with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def forward_flops(config: Config) -> float:
    """Of the UNet for one example of all views: matrix products and convolutions, from the jaxpr."""
    model = config.model
    unet = nnx.eval_shape(lambda: train.new_model(config).unet)
    graphdef, params = parameters.split(unet)
    size, v = model.latent_size, model.views
    jaxpr = jax.make_jaxpr(lambda p, *a: parameters.merge(graphdef, p)(*a))(
        params,
        Shapes((1, v, size, size, model.unet.in_channels), jnp.float32),
        Shapes((1,), jnp.float32),
        Shapes((1, model.identity.context_length, model.unet.context_dim), jnp.float32),
    )
    return _flops(jaxpr.jaxpr)


def encoder_flops(config: Config) -> float:
    """Of the autoencoder for images and normals of one example's views."""
    autoencoder = nnx.eval_shape(lambda: train.new_model(config).autoencoder)
    graphdef, params = parameters.split(autoencoder)
    size = config.model.image_size
    jaxpr = jax.make_jaxpr(lambda p, x: parameters.merge(graphdef, p).posterior(x))(
        params, Shapes((1, size, size, 3), jnp.float32)
    )
    return 2 * config.model.views * _flops(jaxpr.jaxpr)


def _flops(jaxpr: jax.extend.core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * np.prod(out.shape) * np.prod([shape[axis] for axis in contracted])
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * np.prod(out.shape) * np.prod(kernel) / kernel[features]
        elif equation.primitive.name == "cond":  # by platform: all do the same
            total += max(_flops(branch.jaxpr) for branch in equation.params["branches"])
        else:
            times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            inner = (equation.params.get(name) for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
            for found in filter(None, inner):
                total += times * _flops(getattr(found, "jaxpr", found))
    return total
