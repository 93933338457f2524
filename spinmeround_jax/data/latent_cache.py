"""Encoding a data set once, so that training skips the autoencoder; `latent_files` describes the files."""

from __future__ import annotations

import hashlib
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from spinmeround_jax import sharding
from spinmeround_jax.cameras import Frame
from spinmeround_jax.data import latent_files, shards
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.data.subjects import SubjectSource, composite, read_views
from spinmeround_jax.files import as_path
from spinmeround_jax.models import Autoencoder, parameters


def fingerprint(autoencoder: Autoencoder) -> str:
    """SHA-256 of the config and the float32 weights, in hexadecimal."""
    digest = hashlib.sha256(repr(autoencoder.config).encode())
    for name, value in sorted(parameters.split(autoencoder)[1].items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(np.asarray(value, np.float32)))
    return digest.hexdigest()


def folder(
    directory: str | pathlib.Path, autoencoder: Autoencoder, normals_frame: Frame
) -> pathlib.Path:
    """The folder in `directory` for latents of this autoencoder, so that runs can share `directory`."""
    name = fingerprint(autoencoder)[:12]
    return as_path(directory) / (name if normals_frame == "world" else f"{name}_{normals_frame}")


def cache_latents(
    autoencoder: Autoencoder,
    directory: str | pathlib.Path,
    data_directory: str | pathlib.Path,
    *,
    backgrounds: int,
    normals_frame: Frame,
    split: str = "train",
    part: tuple[int, int] = (0, 1),
    batch_size: int = 32,
) -> None:
    """Write the missing latents of one split into `directory`, with a progress bar.

    Every shard is written completely or not at all: after a kill the same call continues.

    Args:
        backgrounds: random colours per subject, each the same in all its views, besides white.
        normals_frame: of the model that will be trained on them.
        part: (i, n) writes every n-th shard from the i-th on, so that n machines share the work.
        batch_size: images encoded at once, rounded up to the number of devices.

    Raises:
        InputError: damaged data, or `directory` holds latents of another description.
    """
    directory, (first, step) = as_path(directory), part
    if not 0 <= first < step or backgrounds < 0:
        raise ValueError(f"part {first}/{step} needs 0 <= i < n, backgrounds {backgrounds} >= 0")
    source = SubjectSource(data_directory, split)
    description = describe(autoencoder, data_directory, backgrounds, normals_frame)
    latent_files.write_description(directory, description)
    encode = _encoder(autoencoder, batch_size)
    todo = [
        index
        for index in source.indexes[first::step]
        if not latent_files.is_complete(directory, index.path)
    ]
    with tqdm(total=sum(len(index.subjects) for index in todo), desc="latents", unit="subject",
              disable=not todo) as bar:  # fmt: skip
        for index in todo:
            _cache_shard(directory, index, description, encode, bar)


def check_cache(
    autoencoder: Autoencoder,
    directory: str | pathlib.Path,
    data_directory: str | pathlib.Path,
    *,
    backgrounds: int,
    normals_frame: Frame,
) -> None:
    """Raises InputError unless `cache_latents` wrote `directory` with the same arguments."""
    directory = as_path(directory)
    wanted = describe(autoencoder, data_directory, backgrounds, normals_frame)
    latent_files.check_same(directory, latent_files.read_description(directory), wanted)


def describe(
    autoencoder: Autoencoder,
    data_directory: str | pathlib.Path,
    backgrounds: int,
    normals_frame: Frame,
) -> latent_files.Description:
    """The description of the latents of a data set."""
    manifest = read_manifest(data_directory)
    size = manifest["image_size"] // autoencoder.config.downsampling
    return latent_files.Description(
        autoencoder=fingerprint(autoencoder),
        image_size=manifest["image_size"],
        views=manifest["views"],
        latent_shape=(size, size, autoencoder.config.latent_channels),
        backgrounds=backgrounds,
        seed=manifest["seed"],
        normals_frame=normals_frame,
    )


def _cache_shard(
    directory: pathlib.Path,
    index: shards.ShardIndex,
    description: latent_files.Description,
    encode,
    bar: tqdm,
) -> None:
    colours = np.stack([_colours(name, description) for name in map(str, index.subjects)])
    firsts = [index.read_views(row, [0])[0] for row in range(len(index.subjects))]
    id_embedding = np.stack([record.id_embedding for record in firsts])
    with latent_files.shard_writer(directory, index, description, id_embedding, colours) as moments:
        for row in range(len(index.subjects)):
            views, size = range(index.offsets.shape[1]), description.image_size
            _, rgba, normals = read_views(index, row, views, size, description.normals_frame)
            on_colours = [composite(rgba, c)[0] for c in (np.ones(3), *colours[row])]
            images = np.stack([normals, *on_colours], axis=1)  # latent_files.NORMALS, ON_WHITE
            encoded = encode(images.reshape(-1, *images.shape[2:]))
            moments[row] = encoded.reshape(moments.shape[1:])
            bar.update()


def _colours(subject: str, description: latent_files.Description) -> np.ndarray:
    """(k, 3) float32 in [0, 1]; depends on the seed of the data set and the subject only."""
    rng = np.random.default_rng([description.seed, zlib.crc32(subject.encode())])
    return rng.random((description.backgrounds, 3)).astype(np.float32)


def _encoder(autoencoder: Autoencoder, batch_size: int):
    """(n, H, W, 3) in [-1, 1] -> (n, h, w, 2z) float16 moments, over all devices of the process."""
    mesh = sharding.make_mesh(devices=jax.local_devices())
    batch_size += -batch_size % mesh.devices.size
    graphdef, params = parameters.split(autoencoder)
    params = jax.device_put(params, sharding.replicated(mesh))

    @jax.jit
    def moments(params: parameters.Parameters, images: jax.Array) -> jax.Array:
        mean, std = parameters.merge(graphdef, params).posterior(images)
        return jnp.concatenate([mean, std], axis=-1).astype(jnp.float16)

    def encode(images: np.ndarray) -> np.ndarray:
        results = []
        for start in range(0, len(images), batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), len(images) - 1)
            chunk = jax.device_put(images[rows], sharding.batch_sharding(mesh))
            results.append(np.asarray(moments(params, chunk))[: len(images) - start])
        return np.concatenate(results)

    return encode
