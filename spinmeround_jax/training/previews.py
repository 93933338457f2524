"""What training shows of itself: pictures of held-out subjects, as PNG files and in TensorBoard."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from PIL import Image

from spinmeround_jax import cameras
from spinmeround_jax.config import Config
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.data.subjects import HeldOut, Subject
from spinmeround_jax.diffusion import schedules
from spinmeround_jax.diffusion.denoiser import (
    condition,
    deny_normals,
    restore,
    standardise,
    unconditional,
)
from spinmeround_jax.diffusion.sampling import sample_jointly
from spinmeround_jax.models import parameters
from spinmeround_jax.models.attention import Execution
from spinmeround_jax.models.attention_kernels import best_for
from spinmeround_jax.photo.images import to_uint8

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

SAMPLING_STEPS = 16


def held_out(config: Config, count: int, views: int = 8) -> list[Subject]:
    """The first subjects of the split not trained on (where there is none, of the one that is).

    Each with the views that are drawn, as they are kept for the whole run: the most frontal one,
    then `views` spread over all; normals in the model's frame.
    """
    directory = config.data.directory
    splits = read_manifest(directory)["splits"]
    split = next((name for name in splits if name != "train" and splits[name]), "train")
    subjects = HeldOut(directory, split)
    chosen = []
    for i in range(min(count, len(subjects))):
        angles = subjects.angles(i)
        spread = np.linspace(0, len(angles) - 1, views).astype(int)
        subject = subjects.load(i, [most_frontal(angles), *spread])
        if config.model.normals_frame == "camera":
            normals = cameras.normals_to_camera(subject.normals, subject.world_to_camera)
            subject = dataclasses.replace(subject, normals=normals)
        chosen.append(subject)
    return chosen


def most_frontal(angles: np.ndarray) -> int:
    """Index of the view nearest to the front, of (n, 2) yaws and pitches."""
    yaw, pitch = np.deg2rad(angles).T
    return int(np.argmax(np.cos(yaw) * np.cos(pitch)))


@functools.partial(jax.jit, static_argnums=0)
def reconstruct(
    graphdef: nnx.GraphDef, params: parameters.Parameters, images: jax.Array
) -> jax.Array:
    """(n, h, w, 3) through the autoencoder."""
    autoencoder = parameters.merge(graphdef, params)
    return autoencoder.decode(autoencoder.encode(images))


def reconstructions(
    graphdef: nnx.GraphDef, params: parameters.Parameters, subjects: list[Subject]
) -> np.ndarray:
    """For each of `held_out` rows of images, their reconstructions, normals, and theirs: uint8."""
    rows = []
    for subject in subjects:
        for originals in (subject.images[1:], subject.normals[1:]):
            rows += [originals, np.asarray(reconstruct(graphdef, params, originals))]
    return grid(np.stack(rows))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(
    graphdefs: tuple[tuple[str, nnx.GraphDef], ...],
    config: Config,
    everywhere: jax.sharding.NamedSharding,
    params: dict[str, parameters.Parameters],
    empty_latent: jax.Array,
    images: jax.Array,
    normals: jax.Array,
    id_embedding: jax.Array,
    world_to_camera: jax.Array,
) -> jax.Array:
    """(b, 2, v, H, W, 3): images and normals of one observed view and those sampled around."""
    networks = {name: parameters.merge(graph, params[name]) for name, graph in graphdefs}
    autoencoder, identity = networks["autoencoder"], networks["identity"]
    b, v = world_to_camera.shape[:2]
    seen = jnp.concatenate([autoencoder.encode(images), autoencoder.encode(normals)], axis=-1)
    seen = empty_latent if config.ablation.no_image else standardise(seen, config.model)
    if config.ablation.no_normals:
        seen = deny_normals(seen)
    observed = jnp.zeros((b, v, *seen.shape[-3:])).at[:, 0].set(seen)
    context = identity.empty() if config.ablation.no_identity else identity(id_embedding)
    conditional = condition(
        jnp.broadcast_to(context, (b, *context.shape[1:])),
        jnp.broadcast_to(jnp.arange(v) == 0, (b, v)),
        observed,
        world_to_camera,
        config.model.rays,
    )
    sampling = config.sampling
    sigmas = jnp.asarray(
        schedules.karras_sigmas(
            SAMPLING_STEPS, sampling.sigma_min, sampling.sigma_max, sampling.rho
        )
    )
    shape = (b, 1 if sampling.shared_noise else v, *observed.shape[2:])
    noise = jnp.broadcast_to(jax.random.normal(jax.random.key(0), shape), observed.shape)
    without = unconditional(conditional, identity.empty(), empty_latent)
    how = Execution(
        kernel=best_for(
            everywhere.mesh.devices.flat[0], networks["unet"].dtype, config.model.attention_shapes
        )
    )

    def each(unet_params: parameters.Parameters, *examples: Any) -> jax.Array:
        """One subject after another: all at once need more memory than a training step."""
        network = functools.partial(parameters.merge(dict(graphdefs)["unet"], unet_params), how=how)

        def one(example: Any) -> jax.Array:
            noise, conditional, without = jax.tree.map(lambda x: x[None], example)
            return sample_jointly(
                network, noise, conditional, without, sigmas, sampling.guidance_scale,
                sampling.temperature, sampling.sampler,
            )[0]  # fmt: skip

        return jax.lax.map(one, examples)

    # Every device does the same: kernels cannot be partitioned.
    sampled = jax.shard_map(
        each, mesh=everywhere.mesh, in_specs=P(), out_specs=P(), check_vma=False
    )(params["unet"], noise, conditional, without)  # fmt: skip
    halves = jnp.stack(jnp.split(restore(sampled, config.model), 2, axis=-1), axis=1)
    decoded = autoencoder.decode(halves.reshape(-1, *halves.shape[3:]))
    decoded = decoded.reshape(b, 2, v, *decoded.shape[1:])
    return jax.lax.with_sharding_constraint(decoded, everywhere)  # so that every process has it all


def anchors(
    graphdefs: dict[str, nnx.GraphDef],
    params: dict[str, parameters.Parameters],
    empty_latent: jax.Array,
    config: Config,
    subjects: list[Subject],
) -> np.ndarray:
    """For each of `held_out` a row of images and one of normals: the frontal view, then a ring."""
    ring = cameras.turntable(config.model.views)
    if config.data.relative_cameras:
        angles = np.repeat(ring[None], len(subjects), axis=0)
    else:
        given = np.array([(s.yaw[0], s.pitch[0]) for s in subjects], np.float32)
        angles = ring + given[:, None]
    pictures = _sample(
        tuple(graphdefs.items()),
        config,
        empty_latent.sharding,
        params,
        empty_latent,
        np.stack([subject.images[0] for subject in subjects]),
        np.stack([subject.normals[0] for subject in subjects]),
        np.stack([subject.id_embedding for subject in subjects]),
        cameras.orbit(angles[..., 0], angles[..., 1]),
    )
    pictures = np.asarray(pictures)
    return grid(pictures.reshape(-1, *pictures.shape[2:]))


def grid(images: np.ndarray) -> np.ndarray:
    """(rows, columns, h, w, 3) in [-1, 1] -> (rows h, columns w, 3) uint8."""
    rows, columns, height, width, channels = images.shape
    joined = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    return to_uint8(joined)


def write(
    picture: np.ndarray, name: str, step: int, workdir: pathlib.Path, writer: SummaryWriter | None
) -> None:
    """Write a uint8 picture to `workdir/samples/<name>_<step>.png`, in the first process only."""
    if writer is None:
        return
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / f"{name}_{step:07d}.png")
    writer.add_image(name, picture, step, dataformats="HWC")
