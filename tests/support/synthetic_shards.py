"""A tiny data set written by the project's own writer; every view's pixels tell whose it is."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from spinmeround_jax import cameras
from spinmeround_jax.data import records
from spinmeround_jax.data.manifest import read_manifest, shard_name, write_manifest
from spinmeround_jax.data.shards import ShardWriter

SIZE = 16


def angles(views: int) -> tuple[np.ndarray, np.ndarray]:
    """Yaws all around from -180 and zig-zag pitches, degrees; with 8 views two face the camera."""
    yaw = -180.0 + 360.0 * np.arange(views) / views
    pitch = np.where(np.arange(views) % 2, 15.0, -10.0)
    return yaw, pitch


def pixels(subject: int, view: int, size: int = SIZE) -> np.ndarray:
    """(size, size, 4) uint8: red tells the subject, green the view, alpha ramps over x."""
    rgba = np.zeros((size, size, 4), np.uint8)
    rgba[..., 0] = 20 * subject
    rgba[..., 1] = 20 * view % 256
    rgba[..., 2] = np.arange(size)[:, None] * 255 // (size - 1)
    rgba[..., 3] = np.arange(size) * 255 // (size - 1)
    return rgba


def unit_normals(view: int, size: int = SIZE) -> np.ndarray:
    """(size, size, 3) float64: background in the first column, elsewhere unit vectors."""
    x, y = np.meshgrid(np.linspace(-0.7, 0.7, size), np.linspace(-0.7, 0.7, size))
    normals = np.stack([x, y, np.sqrt(1.0 - np.minimum(x * x + y * y, 1.0))], -1)
    normals[..., 2] *= -1 if view % 2 else 1
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[:, 0] = 0.0
    return normals


def make_records(subject: int, views: int, size: int = SIZE) -> list[records.ViewRecord]:
    rng = np.random.default_rng(subject)
    id_embedding = rng.standard_normal(512).astype(np.float32)
    id_embedding /= np.linalg.norm(id_embedding)
    yaws, pitches = angles(views)
    return [
        records.ViewRecord(
            subject=f"person-{subject}",
            view=view,
            image=records.encode_image(pixels(subject, view, size)),
            normals=records.encode_normals(unit_normals(view, size)),
            world_to_camera=cameras.orbit(yaws[view], pitches[view]),
            yaw=float(yaws[view]),
            pitch=float(pitches[view]),
            id_embedding=id_embedding,
            source="synthetic",
            license="CC0-1.0",
        )
        for view in range(views)
    ]


def write_dataset(
    directory: pathlib.Path,
    subjects: int = 6,
    views: int = 8,
    shards: int = 2,
    size: int = SIZE,
    split: str = "train",
) -> list[pathlib.Path]:
    """Write `subjects` spread over `shards`, and the manifest; returns the shards' paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths, entries = [], []
    for shard, share in enumerate(np.array_split(np.arange(subjects), shards)):
        path = directory / shard_name(split, shard, shards)
        with ShardWriter(path) as writer:
            for subject in share:
                writer.write_subject(make_records(int(subject), views, size))
        paths.append(path)
        entries.append({"file": path.name, "subjects": len(share)})
    write_manifest(
        directory,
        {
            "image_size": size,
            "views": views,
            "seed": 0,
            "source": "synthetic",
            "license": "CC0-1.0",
            "splits": {split: entries},
        },
    )
    return paths


def write_two_splits(
    directory: pathlib.Path, train_views: int = 4, held_out_views: int = 8
) -> pathlib.Path:
    """Splits `train` and `held_out` with different numbers of views; three subjects each."""
    write_dataset(directory, 3, held_out_views, 1, split="held_out")
    held_out = read_manifest(directory)["splits"]
    write_dataset(directory, 3, train_views, 1)
    manifest = read_manifest(directory)
    manifest["splits"] |= held_out
    write_manifest(directory, {**manifest, "split_views": {"held_out": held_out_views}})
    return directory


def ring_records(subject: int, views: int) -> list[records.ViewRecord]:
    """`views` of one subject standing on the turntable."""
    return [
        dataclasses.replace(
            record, world_to_camera=cameras.orbit(yaw, pitch), yaw=float(yaw), pitch=float(pitch)
        )
        for record, (yaw, pitch) in zip(
            make_records(subject, views), cameras.turntable(views), strict=True
        )
    ]


def write_rings(directory: pathlib.Path, views: int = 48) -> pathlib.Path:
    """Train (0, 2, 4) and held-out (1, 5) subjects on the turntable, as data_prep renders them."""
    directory.mkdir()
    splits = {}
    for split, subjects in (("train", (0, 2, 4)), ("held_out", (1, 5))):
        name = shard_name(split, 0, 1)
        with ShardWriter(directory / name) as writer:
            for subject in subjects:
                writer.write_subject(ring_records(subject, views))
        splits[split] = [{"file": name, "subjects": len(subjects)}]
    manifest = {"image_size": SIZE, "views": views, "seed": 0, "splits": splits}
    write_manifest(directory, manifest | {"source": "test", "license": "CC0-1.0"})
    return directory


def ball(size: int, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A shaded ball with a soft edge, and its world-space normals as a renderer gives them."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2.4 - 1.2
    x, y = x, -y
    radius = np.hypot(x, y)
    alpha = np.rint(255 * np.clip((1 - radius) * size / 4, 0, 1)).astype(np.uint8)
    facing = np.stack([x, y, np.sqrt(np.clip(1 - radius**2, 1e-4, 1))], -1)
    facing /= np.linalg.norm(facing, axis=-1, keepdims=True)
    rgba = np.full(
        (size, size, 4), 255, np.uint8
    )  # white where nothing is, as the renderer leaves it
    shown = alpha > 0
    shade = (0.2 + 0.6 * facing[..., 2:]) * (150, 100, 80) + 20 * np.sin(9 * x)[..., None]
    rgba[shown, :3] = np.clip(shade, 0, 255).astype(np.uint8)[shown]
    rgba[..., 3] = alpha
    return rgba, facing @ pose[:3, :3] * (alpha[..., None] / 255.0)
