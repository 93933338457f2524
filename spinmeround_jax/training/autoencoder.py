"""Training of the autoencoder, if no pretrained one is loaded, on images and normal maps alike.

The loss is L1 + LPIPS + KL, without the adversarial loss of Stable Diffusion's (arXiv 2112.10752): at 64
pixels LPIPS alone keeps edges sharp. At the end the statistics of the latents are measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from spinmeround_jax import checkpoints, metrics, sharding
from spinmeround_jax.config import AutoencoderTrainingConfig, Config, StageConfig
from spinmeround_jax.data import loader as data_loader
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.files import InputError
from spinmeround_jax.models import Autoencoder, parameters
from spinmeround_jax.training import held_out_loss, latents, loop, optim, previews
from spinmeround_jax.training.run_checkpoints import Checkpoints

if TYPE_CHECKING:
    from spinmeround_jax.training.run_log import RunLog

STATISTICS_BATCHES = 32


def train_autoencoder(
    config: Config, workdir: pathlib.Path, mesh: Mesh, log: RunLog | None
) -> tuple[Autoencoder, tuple[float, ...], tuple[float, ...]]:
    """Train the autoencoder, or load it from `workdir/autoencoder` if it is finished.

    Returns:
        The autoencoder, and `latent_mean` and `latent_std` of `ModelConfig`.

    Raises:
        loop.NotFiniteError, loop.Preempted: see `loop.run`.
    """
    directory = config.autoencoder_training.directory or config.data.directory
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, directory=directory))
    finished = workdir / "autoencoder"
    settings = settings_of(config)
    dtype = jnp.dtype(config.compute_dtype)
    if (finished / "model.json").is_file():
        autoencoder = checkpoints.load_autoencoder(finished, dtype)
        provenance = checkpoints.read_provenance(finished)
        if (
            autoencoder.config != config.model.autoencoder
            or provenance.get("made_with") != settings
        ):
            raise InputError(
                f"{finished}: was trained with other settings of the autoencoder, its training or "
                "the data; delete the folder to train it again, or start a new run with another "
                "--workdir"
            )
        return autoencoder, tuple(provenance["latent_mean"]), tuple(provenance["latent_std"])

    # -- Data: single views, so that a batch has many subjects
    training = config.autoencoder_training
    batch_size = training.optimizer.batch_size
    mesh = sharding.make_mesh(
        devices=mesh.devices.flatten()
    )  # one view per example: nothing to split
    sharding.check_batch_size(mesh, batch_size)
    loader = _loader(config, config.seed, jax.process_index(), jax.process_count())

    # -- State
    def new() -> Autoencoder:
        rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(config.seed), 1))
        return Autoencoder(config.model.autoencoder, dtype=dtype, rngs=rngs)

    graphdef, _ = parameters.split(nnx.eval_shape(new))
    transform = optim.optimizer(training.optimizer, training.steps)

    def init() -> optim.TrainState:
        return optim.init(parameters.split(new())[1], transform)

    placement = sharding.replicated(mesh)
    saved = Checkpoints(
        workdir / "autoencoder_checkpoints", keep=config.keep_checkpoints, config=config
    )
    if saved.latest() is None:
        state = jax.jit(init, out_shardings=placement)()
    else:
        state = saved.restore(sharding.abstract(jax.eval_shape(init), placement), loader)

    # -- Step
    @jax.jit(donate_argnums=0)
    def step_fn(
        state: optim.TrainState, batch: Batch
    ) -> tuple[optim.TrainState, dict[str, jax.Array]]:
        crop_key, posterior_key = jax.random.split(optim.step_key(config.seed, 0, state.step))

        def loss_fn(params: parameters.Parameters) -> tuple[jax.Array, dict[str, jax.Array]]:
            images = random_crops(latents.images_and_normals(batch), training.crop, crop_key)
            return autoencoder_loss(
                parameters.merge(graphdef, params), images, posterior_key, training
            )

        (loss, terms), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state, norm = optim.update(state, loss, gradients, transform, training.optimizer.ema_decay)
        return state, {"loss": loss, **terms, "gradient_norm": norm}

    # -- Loop
    examples = previews.held_out(config, count=2)

    def on_sample(state: optim.TrainState, step: int) -> None:
        grid = previews.reconstructions(graphdef, state.ema, examples)  # in all processes
        if log is not None:
            log.image("autoencoder", step, grid)

    heads = held_out_loss.fixed_heads(config)

    def on_evaluate(state: optim.TrainState) -> dict[str, float]:
        return {
            f"{kind}_psnr_{name}": value
            for name, batch in heads.items()
            for kind, value in reconstruction_psnr(graphdef, state.ema, batch).items()
        }

    with contextlib.closing(loader):
        state = loop.run(
            "autoencoder",
            step_fn,
            state,
            loader,
            saved,
            mesh=mesh,
            steps=training.steps,
            batch_size=batch_size,
            cadence=loop.Cadence.of(config),
            log=log,
            on_evaluate=on_evaluate,
            on_sample=on_sample,
            learning_rate=optim.learning_rate(training.optimizer, training.steps),
        )
    saved.close()

    # -- Statistics of the latents
    autoencoder = parameters.merge(graphdef, state.ema)
    with_other_draws = _loader(config, config.seed + 1, 0, 1)  # equal in all processes
    with contextlib.closing(with_other_draws):
        batches = (next(with_other_draws) for _ in range(min(training.steps, STATISTICS_BATCHES)))
        mean, std = latents.statistics(autoencoder, batches)
    about = {"made_with": settings, "latent_mean": mean, "latent_std": std}
    checkpoints.save_autoencoder(finished, autoencoder, about, overwrite=True)
    return autoencoder, mean, std


def settings_of(config: Config) -> dict[str, Any]:
    """What decides the autoencoder besides its own config, as parsed JSON."""
    settings = {
        "seed": config.seed,
        "training": dataclasses.asdict(config.autoencoder_training),
        "random_background": config.data.random_background,
        "normals_frame": config.model.normals_frame,
        "data": {
            name: read_manifest(config.data.directory)[name]
            for name in ("source", "seed", "image_size", "views", "splits")
        },
    }
    return json.loads(json.dumps(settings))


def _loader(
    config: Config, seed: int, process_index: int, process_count: int
) -> data_loader.Loader:
    training = config.autoencoder_training
    return data_loader.make_loader(
        config.data,
        (StageConfig(steps=training.steps, observed=(0,)),),
        training.optimizer.batch_size,
        1,
        seed,
        config.model.normals_frame,
        process_index=process_index,
        process_count=process_count,
    )


def random_crops(images: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """(n, h, w, c) -> (n, size, size, c) at independent positions."""
    n, height, width, channels = images.shape
    if size == height == width:
        return images
    corners = jax.random.randint(key, (n, 2), 0, jnp.array([height - size, width - size]) + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (size, size, channels))

    return jax.vmap(crop)(images, corners)


def reconstruction_psnr(
    graphdef: nnx.GraphDef, params: parameters.Parameters, batch: Batch
) -> dict[str, float]:
    """PSNR in dB of {"image", "normals"} through the autoencoder, mean over views."""
    found = {}
    for kind, originals in (("image", batch.images), ("normals", batch.normals)):
        decoded = np.stack([previews.reconstruct(graphdef, params, views) for views in originals])
        found[kind] = float(metrics.psnr(decoded, originals).mean())
    return found


def autoencoder_loss(
    autoencoder: Autoencoder, images: jax.Array, key: jax.Array, config: AutoencoderTrainingConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L1 + LPIPS + KL of (n, h, w, 3) images, through a draw from the posterior.

    Returns:
        The scalar loss, and its terms before weighting: "l1" (mean over pixels and channels),
        "lpips" (mean over images), "kl" (mean over latent elements, nats).
    """
    mean, log_variance = autoencoder.moments(images)
    draw = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    decoded = autoencoder.decode_unscaled(draw)
    terms = {
        "l1": jnp.mean(jnp.abs(decoded - images)),
        "kl": 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance),
    }
    loss = terms["l1"] + config.kl_weight * terms["kl"]
    if config.lpips_weight:
        terms["lpips"] = jnp.mean(metrics.lpips(precision=None)(decoded, images))
        loss += config.lpips_weight * terms["lpips"]
    return loss, terms
