"""Training the autoencoder itself, where no pretrained one is loaded; images and normal maps alike.

L1 + LPIPS + KL, without the adversarial loss of Stable Diffusion's (arXiv 2112.10752): at 64 pixels
LPIPS alone keeps edges sharp. At the end the latents' statistics are folded into the weights, so
that the diffusion model finds latents of zero mean and unit deviation, as sigma_data = 1 wants.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh

from spinmeround_jax import (
    checkpoints,
    data,
    loop,
    metrics,
    optim,
    parameters,
    previews,
    sharding,
)
from spinmeround_jax.config import AutoencoderTrainingConfig, Config, StageConfig
from spinmeround_jax.manifest import read_manifest
from spinmeround_jax.models import Autoencoder

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

STATISTICS_BATCHES = 32


def train_autoencoder(
    config: Config, workdir: pathlib.Path, mesh: Mesh, writer: SummaryWriter | None
) -> Autoencoder:
    """The trained autoencoder, from `workdir/autoencoder` if it is finished there.

    Raises:
        loop.NotFiniteError, loop.Preempted: see `loop.run`.
    """
    finished = workdir / "autoencoder"
    settings = made_with(config)
    dtype = jnp.dtype(config.compute_dtype)
    if (finished / "model.json").is_file():
        autoencoder = checkpoints.load_autoencoder(finished, dtype)
        made = checkpoints.read_provenance(finished)
        if autoencoder.config != config.model.autoencoder or made.get("made_with") != settings:
            raise checkpoints.CheckpointError(
                f"{finished}: was trained with other settings of the autoencoder, its training or "
                "the data; delete the folder to train it again, or start a new run with another "
                "--workdir"
            )
        return autoencoder

    # -- Data: single views, so that a batch shows as many subjects as it can
    training = config.autoencoder_training
    batch_size = training.optimizer.batch_size
    sharding.check_batch_size(mesh, batch_size)
    loader = _loader(config, config.seed)

    # -- State
    def new() -> Autoencoder:
        rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(config.seed), 1))
        return Autoencoder(config.model.autoencoder, dtype=dtype, rngs=rngs)

    graphdef, _ = parameters.split(nnx.eval_shape(new))
    transform = optim.optimizer(training.optimizer, training.steps)

    def init() -> optim.TrainState:
        return optim.init(parameters.split(new())[1], transform)

    placement = sharding.replicated(mesh)
    saved = checkpoints.Checkpoints(
        workdir / "autoencoder_checkpoints", keep=config.keep_checkpoints, config=config
    )
    if saved.latest() is None:
        state = jax.jit(init, out_shardings=placement)()
    else:
        state = saved.restore(sharding.abstract(jax.eval_shape(init), placement), loader)

    # -- Step
    @jax.jit(donate_argnums=0)
    def step_fn(
        state: optim.TrainState, batch: data.Batch
    ) -> tuple[optim.TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss_fn(params: parameters.Parameters) -> tuple[jax.Array, dict[str, jax.Array]]:
            return autoencoder_loss(
                parameters.merge(graphdef, params), pictures(batch), key, training
            )

        (loss, terms), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state, norm = optim.update(state, loss, gradients, transform, training.optimizer.ema_decay)
        return state, {"loss": loss, **terms, "gradient_norm": norm}

    # -- Loop
    examples = previews.held_out(config.data, count=2)

    def on_sample(state: optim.TrainState, step: int) -> None:
        grid = previews.reconstructions(graphdef, state.ema, examples)
        previews.write(grid, "autoencoder", step, workdir, writer)

    state = loop.run(
        "autoencoder",
        step_fn,
        state,
        loader,
        saved,
        mesh=mesh,
        steps=training.steps,
        batch_size=batch_size,
        cadence=loop.Cadence(config.log_every, config.sample_every, config.checkpoint_every),
        writer=writer,
        on_sample=on_sample,
    )
    loader.close()
    saved.close()

    # -- Statistics of the latents, folded in
    autoencoder = parameters.merge(graphdef, state.ema)
    with_other_draws = _loader(config, config.seed + 1)
    batches = (next(with_other_draws) for _ in range(min(training.steps, STATISTICS_BATCHES)))
    mean, std = latent_statistics(autoencoder, (pictures(batch) for batch in batches))
    with_other_draws.close()
    autoencoder = fold_statistics(autoencoder, mean, std)
    checkpoints.save_autoencoder(
        finished,
        autoencoder,
        {
            "made_with": settings,
            "latent_mean": mean.tolist(),
            "latent_std": std.tolist(),
        },
    )
    return autoencoder


def made_with(config: Config) -> dict[str, Any]:
    """What the autoencoder depends on beside its own config, as JSON gives it back."""
    settings = {
        "seed": config.seed,
        "training": dataclasses.asdict(config.autoencoder_training),
        "random_background": config.data.random_background,
        "data": {
            name: read_manifest(config.data.directory)[name]
            for name in ("source", "seed", "image_size", "views", "splits")
        },
    }
    return json.loads(json.dumps(settings))


def _loader(config: Config, seed: int) -> data.Loader:
    training = config.autoencoder_training
    return data.make_loader(
        config.data,
        (StageConfig(steps=training.steps, observed=(0,)),),
        training.optimizer.batch_size,
        1,
        seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def pictures(batch: data.Batch) -> jax.Array:
    """Images, then normal maps, of all views of each example: (b 2 v, h, w, 3) in [-1, 1]."""
    both = jnp.stack([jnp.asarray(batch.images), jnp.asarray(batch.normals)], axis=1)
    return both.reshape(-1, *both.shape[3:])


def autoencoder_loss(
    autoencoder: Autoencoder, images: jax.Array, key: jax.Array, config: AutoencoderTrainingConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L1 + LPIPS + KL of (n, h, w, 3) images, through a draw from the posterior.

    Returns:
        The scalar loss, and its terms before weighting: "l1" (mean over pixels and channels),
        "lpips" (mean over images), "kl" (mean over latent elements, nats).
    """
    mean, log_variance = autoencoder.moments(images)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    decoded = autoencoder.decode_unscaled(latents)
    terms = {
        "l1": jnp.mean(jnp.abs(decoded - images)),
        "kl": 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance),
    }
    loss = terms["l1"] + config.kl_weight * terms["kl"]
    if config.lpips_weight:
        terms["lpips"] = jnp.mean(metrics.lpips()(decoded, images))
        loss += config.lpips_weight * terms["lpips"]
    return loss, terms


def latent_statistics(
    autoencoder: Autoencoder, batches: Iterable[jax.Array]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, each (latent_channels,), of many images' scaled latents."""
    graphdef, params = parameters.split(autoencoder)

    @jax.jit
    def sums(params: parameters.Parameters, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        latents = parameters.merge(graphdef, params).encode(images)
        return jnp.mean(latents, (0, 1, 2)), jnp.mean(latents**2, (0, 1, 2))

    moments = [[np.asarray(x, np.float64) for x in sums(params, images)] for images in batches]
    mean, square = np.mean(moments, axis=0)
    return mean, np.sqrt(square - mean**2)


def fold_statistics(autoencoder: Autoencoder, mean: np.ndarray, std: np.ndarray) -> Autoencoder:
    """The same autoencoder with scaled latents (z - mean) / std, by changing its 1x1 convolutions.

    `decode(encode(x))` stays what it was, and so do posterior draws: the log-variance moves by
    -2 ln std.
    """
    graphdef, params = parameters.split(autoencoder)
    scale = autoencoder.config.scale_factor
    shift = jnp.asarray(mean / scale, jnp.float32)
    spread = jnp.asarray(std, jnp.float32)
    z = spread.size

    kernel, bias = params["quantize_in/kernel"], params["quantize_in/bias"]
    kernel = kernel.at[..., :z].divide(spread)
    bias = jnp.concatenate([(bias[:z] - shift) / spread, bias[z:] - 2.0 * jnp.log(spread)])
    kernel_out, bias_out = params["quantize_out/kernel"], params["quantize_out/bias"]
    return parameters.merge(
        graphdef,
        {
            **params,
            "quantize_in/kernel": kernel,
            "quantize_in/bias": bias,
            "quantize_out/kernel": kernel_out * spread[:, None],
            "quantize_out/bias": bias_out + shift @ kernel_out[0, 0],
        },
    )


def latents_of(
    batch: data.Batch,
    graphdef: Any,
    params: parameters.Parameters,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled latents (b, v, h, w, 2 z) of a batch, RGB half first; no gradient.

    Args:
        graphdef, params: of the autoencoder, which a batch that holds moments does not need.
        key: to draw from the posterior; None takes its mean.
    """
    v = batch.observed.shape[1]
    if batch.moments is not None:
        mean, std = jnp.split(batch.moments, 2, axis=-1)  # (b, v, 2, h, w, z)
    else:
        moments = parameters.merge(graphdef, params).posterior(pictures(batch))
        mean, std = (rearrange(x, "(b two v) h w z -> b v two h w z", two=2, v=v) for x in moments)
    latents = mean if key is None else mean + std * jax.random.normal(key, mean.shape)
    return jax.lax.stop_gradient(rearrange(latents, "b v two h w z -> b v h w (two z)"))
