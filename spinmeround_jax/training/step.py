"""One step of training the diffusion model, on any mesh.

The step is written for one device (`jax.shard_map`), so that all its collectives are written here:
parameters split over "fsdp" are gathered once, in the compute dtype, and their gradients summed and split once;
gradients are summed in float32 over the other axes; joint attention over split views gathers keys and values
(`models.attention`); the loss, its shares and the number of target views are summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spinmeround_jax import sharding
from spinmeround_jax.config import AblationConfig, Config
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.diffusion import schedules
from spinmeround_jax.diffusion.denoiser import condition, deny_normals, drop
from spinmeround_jax.diffusion.loss import consistency_loss, diffusion_loss
from spinmeround_jax.models import ModelConfig, parameters
from spinmeround_jax.models.attention import PLAIN, Execution
from spinmeround_jax.models.attention_kernels import best_for
from spinmeround_jax.training import latents, optim

Tree = Any
Metrics = dict[str, jax.Array]
Step = Callable[[optim.TrainState, Tree, Batch], tuple[optim.TrainState, Metrics]]


def make_step(
    config: Config,
    graphdefs: dict[str, nnx.GraphDef],
    transform: optax.GradientTransformation,
    mesh: Mesh,
) -> Step:
    """(state, frozen, batch) -> (state, metrics): one update on one global batch.

    Args:
        graphdefs: of all networks by name.

    The step's `frozen` is {"networks": parameters of those not trained, "empty_latent": (h, w, c)}.
    """
    execution = Execution(
        view_axis="views" if mesh.shape["views"] > 1 else None,
        remat=config.remat,
        kernel=best_for(
            mesh.devices.flat[0],
            jnp.dtype(config.compute_dtype),
            config.model.attention_shapes,
        ),
    )

    def step(
        state: optim.TrainState, frozen: Tree, batch: Batch
    ) -> tuple[optim.TrainState, Metrics]:
        # Drawn for the global batch: the same on every mesh.
        key = optim.step_key(config.seed, 1, state.step)
        sigma_key, noise_key, posterior_key = jax.random.split(key, 3)
        targets = jnp.sum(~batch.observed, axis=1)
        sigma = schedules.lognormal_sigmas(
            sigma_key, targets.shape, config.noise.mean, config.noise.std, targets
        )
        shape = (*batch.observed.shape, *frozen["empty_latent"].shape)
        noise = jax.random.normal(noise_key, shape)
        draw = jax.random.normal(posterior_key, shape) if config.latents.sample else None
        lower = None
        if config.consistency_halvings:
            share = state.step / sum(stage.steps for stage in config.stages)
            lower = schedules.consistency_pairs(sigma, share, config.consistency_halvings)

        split = jax.tree.map(lambda x: x.spec, sharding.state_shardings(mesh, state.params))
        views = P(sharding.EXAMPLES, "views")
        loss, shares, gradients = jax.shard_map(
            functools.partial(_on_one_device, config, graphdefs, split, execution),
            mesh=mesh,
            in_specs=(
                split, P(), sharding.batch_specs(batch), P(sharding.EXAMPLES), views,
                None if draw is None else views,
                None if lower is None else P(sharding.EXAMPLES),
            ),
            out_specs=(P(), P(), split),
            check_vma=False,  # all sums are explicit
        )(state.params, frozen, batch, sigma, noise, draw, lower)  # fmt: skip
        state, norm = optim.update(state, loss, gradients, transform, config.optimizer.ema_decay)
        return state, {"loss": loss, **shares, "gradient_norm": norm}

    return step


def _on_one_device(
    config: Config, graphdefs: dict[str, nnx.GraphDef], split: Tree, execution: Execution,
    params: Tree, frozen: Tree, batch: Batch,
    sigma: jax.Array, noise: jax.Array, draw: jax.Array | None, lower: jax.Array | None,
) -> tuple[jax.Array, Metrics, Tree]:  # fmt: skip
    """This device's examples, views and parameters -> global loss and shares, and its gradients."""
    targets = jax.lax.psum(jnp.sum(~batch.observed), sharding.AXES)
    gather = functools.partial(_gather, split=split, dtype=jnp.dtype(config.compute_dtype))
    gathered, scatter = jax.vjp(gather, params)

    def gradient(part: tuple) -> tuple[tuple[jax.Array, Metrics], Tree]:
        batch, sigma, noise, draw, lower = part
        clean = latents.of_batch(
            batch, config.model, graphdefs["autoencoder"], frozen["networks"].get("autoencoder"),
            draw,
        )  # fmt: skip

        def loss_fn(params: Tree) -> tuple[jax.Array, Metrics]:
            return batch_loss(
                config.model, config.ablation, graphdefs, {**frozen["networks"], **params},
                frozen["empty_latent"], clean, batch, sigma, noise, targets, execution, lower,
            )  # fmt: skip

        return jax.value_and_grad(loss_fn, has_aux=True)(gathered)

    (loss, shares), gradients = _accumulate(
        gradient, (batch, sigma, noise, draw, lower), config.accumulation
    )
    (gradients,) = scatter(jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, gathered))
    gradients = jax.tree.map(_sum_where_copied, gradients, split)
    loss, shares = jax.lax.psum((loss, shares), sharding.AXES)
    return loss, shares, gradients


def _gather(params: Tree, *, split: Tree, dtype: jnp.dtype) -> Tree:
    """Whole parameters from this device's shares; matrices in `dtype`, vectors in float32."""

    def one(value: jax.Array, spec: P) -> jax.Array:
        value = value.astype(dtype) if value.ndim > 1 else value
        if "fsdp" in spec:
            value = jax.lax.all_gather(value, "fsdp", axis=spec.index("fsdp"), tiled=True)
        return value

    return jax.tree.map(one, params, split)


def _sum_where_copied(gradient: jax.Array, spec: P) -> jax.Array:
    """The sum over the devices that hold the same part; the gather's transpose sums over "fsdp"."""
    axes = [axis for axis in sharding.AXES if axis not in spec]
    return jax.lax.psum(gradient.astype(jnp.float32), axes)


def _accumulate(gradient: Callable, parts: tuple, count: int) -> Tree:
    """The sum of `gradient` over `count` equal parts of the examples, one after another."""
    if count == 1:
        return gradient(parts)
    cut = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), parts)

    def add(total: Tree, part: tuple) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, gradient(part)), None

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, cut)[0]


def batch_loss(
    model: ModelConfig,
    ablation: AblationConfig,
    graphdefs: dict[str, nnx.GraphDef],
    params: Tree,
    empty_latent: jax.Array,
    clean: jax.Array,
    batch: Batch,
    sigma: jax.Array,
    noise: jax.Array,
    targets: jax.Array | None = None,
    execution: Execution = PLAIN,
    lower: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of a batch, with dropout of the conditioning and the paper's ablations.

    Args:
        params: of "unet" and "identity".
        empty_latent: (h, w, c).
        clean: (b, v, h, w, c) latents of all views.
        sigma, noise: (b,) and (b, v, h, w, c).
        targets: see `diffusion_loss`.
        execution: of the UNet.
        lower: (b,) second noise level of `consistency_loss`; None: `diffusion_loss`.
    """
    if ablation.no_normals:
        clean = deny_normals(clean)

    identity = parameters.merge(graphdefs["identity"], params["identity"])
    empty_context = identity.empty()
    without = ablation.no_identity | batch.identity_dropped
    context = jnp.where(without[:, None, None], empty_context, identity(batch.id_embedding))

    given = clean
    if ablation.no_image:
        given = jnp.broadcast_to(empty_latent, clean.shape)
    conditioning = condition(context, batch.observed, given, batch.world_to_camera, model.rays)
    conditioning = drop(conditioning, batch.dropped, empty_context, empty_latent)

    unet = functools.partial(
        parameters.merge(graphdefs["unet"], params["unet"]), execution=execution
    )
    if lower is not None:
        return consistency_loss(unet, clean, sigma, lower, noise, conditioning, targets)
    return diffusion_loss(unet, clean, sigma, noise, conditioning, targets)


def loss_per_head(
    model: ModelConfig,
    ablation: AblationConfig,
    graphdefs: dict[str, nnx.GraphDef],
    params: Tree,
    empty_latent: jax.Array,
    clean: jax.Array,
    batch: Batch,
    sigma: jax.Array,
    noise: jax.Array,
    execution: Execution = PLAIN,
) -> jax.Array:
    """(b,) losses of the examples of a batch at the () noise level, see `batch_loss`.

    Examples are computed one after another, in the memory of one.
    """

    def one(example: tuple[jax.Array, Batch, jax.Array]) -> jax.Array:
        clean, batch, noise = jax.tree.map(lambda x: x[None], example)
        return batch_loss(
            model, ablation, graphdefs, params, empty_latent, clean, batch, sigma[None], noise,
            execution=execution,
        )[0]  # fmt: skip

    return jax.lax.map(one, (clean, batch, noise))
