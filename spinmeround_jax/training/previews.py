"""Previews during training: images of held-out subjects, as PNG files and in TensorBoard."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from PIL import Image

from spinmeround_jax import cameras
from spinmeround_jax.config import Config
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.data.subjects import HeldOut, Subject
from spinmeround_jax.diffusion.networks import Networks
from spinmeround_jax.models import Model, parameters
from spinmeround_jax.photo.images import to_uint8

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

SAMPLING_STEPS = 16


def held_out(config: Config, count: int, views: int = 8) -> list[Subject]:
    """The first subjects of a held-out split (of the training split if there is none).

    Each with its most frontal view, then `views` evenly spread ones; normals in the model's frame.
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
    """uint8 grid: for each subject rows of images, normals, and the reconstructions of both."""
    rows = []
    for subject in subjects:
        for originals in (subject.images[1:], subject.normals[1:]):
            rows += [originals, np.asarray(reconstruct(graphdef, params, originals))]
    return grid(np.stack(rows))


def anchors(
    graphdefs: dict[str, nnx.GraphDef],
    params: dict[str, parameters.Parameters],
    config: Config,
    subjects: list[Subject],
) -> np.ndarray:
    """uint8 grid: for each subject a row of images and one of normals, the frontal view and a turntable.

    Args:
        params: complete, on one device of this process, see `sharding.gathered`.
    """
    model = Model(
        config.model,
        **{name: parameters.merge(graphdefs[name], params[name]) for name in graphdefs},
    )
    (device,) = jax.tree.leaves(params)[0].devices()
    sampling = dataclasses.replace(config.sampling, steps=SAMPLING_STEPS)
    # One subject at a time: all together need more memory than a training step.
    networks = Networks(model, sampling, config.ablation, 1, None, [device])
    images, normals = (
        networks.encode(np.stack([getattr(subject, name)[0] for subject in subjects]), kind)
        for name, kind in (("images", "image"), ("normals", "normals"))
    )
    if config.ablation.no_normals:
        normals = np.zeros_like(normals)
    count = len(subjects)
    angles = np.tile(cameras.turntable(config.model.views), (count, 1, 1))
    if not config.data.relative_cameras:
        angles += np.array([[(s.yaw[0], s.pitch[0])] for s in subjects], np.float32)
    latents = networks.sample_jointly(
        "anchors",
        np.concatenate([images, normals], axis=-1)[:, None],
        angles,
        networks.contexts(np.stack([subject.id_embedding for subject in subjects]), count),
        np.arange(count),
        np.zeros((count, 2), int),
    )
    rows = [row for i in range(count) for row in networks.decode(latents[i], angles[i])]
    return grid(np.stack(rows))


def grid(images: np.ndarray) -> np.ndarray:
    """(rows, columns, h, w, 3) in [-1, 1] -> (rows h, columns w, 3) uint8."""
    rows, columns, height, width, channels = images.shape
    joined = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    return to_uint8(joined)


def write(
    image: np.ndarray, name: str, step: int, workdir: pathlib.Path, writer: SummaryWriter | None
) -> None:
    """Write a uint8 image to `workdir/samples/<name>_<step>.png`, in the first process only."""
    if writer is None:
        return
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{name}_{step:07d}.png")
    writer.add_image(name, image, step, dataformats="HWC")
