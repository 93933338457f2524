"""Previews during training: images of held-out subjects, as PNG files and in TensorBoard."""

from __future__ import annotations

import dataclasses
import functools

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
from spinmeround_jax.results.sheet import degrees, sheet

SAMPLING_STEPS = 16
NEAR = 4.0  # degrees within which a stored view is the truth of a sampled one


def held_out(config: Config, count: int) -> list[Subject]:
    """The first subjects of a held-out split (of the training split if there is none).

    Each with its most frontal view, then those nearest to a turntable that starts there; normals in the
    model's frame.
    """
    directory = config.data.directory
    splits = read_manifest(directory)["splits"]
    split = next((name for name in splits if name != "train" and splits[name]), "train")
    subjects = HeldOut(directory, split)
    ring = cameras.turntable(config.model.views)
    chosen = []
    for i in range(min(count, len(subjects))):
        angles = subjects.angles(i)
        front = most_frontal(angles)
        around = cameras.angular_distance(angles, (ring + angles[front])[:, None]).argmin(1)
        subject = subjects.load(i, [front, *around])
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
) -> Image.Image:
    """For each subject rows of images, their reconstructions, normals, and their reconstructions."""
    rows, labels = [], []
    for subject in subjects:
        for name, originals in (("images", subject.images[1:]), ("normals", subject.normals[1:])):
            rows += [originals, np.asarray(reconstruct(graphdef, params, originals))]
            labels += [name, "reconstructed"]
    columns = [""] * len(rows[0])
    tiles = [list(to_uint8(row)) for row in rows]
    return sheet(tiles, labels, [("", len(columns))], columns, rows[0].shape[1])


def anchors(
    graphdefs: dict[str, nnx.GraphDef],
    params: dict[str, parameters.Parameters],
    config: Config,
    subjects: list[Subject],
) -> Image.Image:
    """For each subject rows of images and normals around it, sampled and true.

    The truth is blank where no stored view is near enough.

    Args:
        params: complete, on one device of this process, see `sharding.gathered`.
    """
    model = Model(
        config.model,
        **{name: parameters.merge(graphdefs[name], params[name]) for name in graphdefs},
    )
    (device,) = jax.tree.leaves(params)[0].devices()
    sampling = config.sampling
    if sampling.sampler != "consistency":  # which is as quick, and made for its own steps
        sampling = dataclasses.replace(sampling, steps=SAMPLING_STEPS)
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
    rows, labels = [], []
    for i, subject in enumerate(subjects):
        sampled = networks.decode(latents[i], angles[i])
        truth = subject.images[1:], _true_normals(angles[i], subject, config)
        stored = np.stack([subject.yaw, subject.pitch], axis=-1)
        wanted = cameras.turntable(config.model.views) + stored[0]
        near = cameras.angular_distance(stored[1:], wanted) < NEAR
        for name, made, true in zip(("images", "normals"), sampled, truth, strict=True):
            rows.append(list(to_uint8(made)))
            rows.append(
                [
                    tile if is_near else None
                    for tile, is_near in zip(to_uint8(true), near, strict=True)
                ]
            )
            labels += [name, "true"]
    columns = [degrees(yaw) for yaw in cameras.turntable(config.model.views)[:, 0]]
    return sheet(rows, labels, [("", len(columns))], columns, config.model.image_size)


def _true_normals(angles: np.ndarray, subject: Subject, config: Config) -> np.ndarray:
    """(n, h, w, 3) true normals of the stored views, in the frame of the (n, 2) angles."""
    normals, poses = subject.normals[1:], subject.world_to_camera[1:]
    if config.model.normals_frame == "world":
        normals = cameras.normals_to_camera(normals, poses)
    return cameras.normals_to_world(normals, cameras.orbit(*angles.T))
