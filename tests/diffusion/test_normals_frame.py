"""Cameras and normals share one frame: every normal of a sphere is known, whichever view is the input."""

import dataclasses
import json

import numpy as np
import pytest

from spinmeround_jax import cameras, checkpoints
from spinmeround_jax.config import RELEASED, DataConfig, StageConfig
from spinmeround_jax.data import latent_cache, records
from spinmeround_jax.data.loader import make_loader
from spinmeround_jax.data.manifest import shard_name
from spinmeround_jax.data.shards import ShardWriter
from spinmeround_jax.diffusion import sampling
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.evaluation import view_folders
from spinmeround_jax.models import AutoencoderConfig
from spinmeround_jax.results import head_folder
from tests.support.synthetic_shards import write_manifest
from tests.support.tiny_model import random_autoencoder, random_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE, RADIUS = 16, 0.25
ANGLES = [(30.0, 10.0), (-30.0, 0.0), (0.0, 0.0), (100.0, -20.0), (180.0, 0.0), (-80.0, 15.0)]


def sphere(world_to_camera, size=SIZE):
    """(size, size, 3) unit normals of the sphere at the origin, in the frame of the pose; 0 beside it."""
    to_world = cameras.camera_to_world(np.asarray(world_to_camera)).astype(np.float64)
    rays = cameras.camera_directions(size) @ to_world[:3, :3].T
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    towards = rays @ to_world[:3, 3]
    inside = towards**2 - cameras.RADIUS**2 + RADIUS**2
    distance = -towards - np.sqrt(np.maximum(inside, 0.0))
    points = to_world[:3, 3] + distance[..., None] * rays
    return np.where(inside[..., None] > 0.0, points / RADIUS, 0.0)


def soft(size):
    """(size, size) uint8 alpha: half transparent in the left third of the sphere, as at a silhouette."""
    inside = np.linalg.norm(sphere(cameras.orbit(0, 0), size), axis=-1) > 0.5
    alpha = np.where(inside, 255, 0).astype(np.uint8)
    alpha[:, : 2 * size // 5] //= 2
    return alpha


def view(number, size):
    """The sphere as data_prep stores it: normals in the head's frame, as long as alpha is high."""
    pose, alpha = cameras.orbit(*ANGLES[number]), soft(size)
    normals = sphere(pose, size) * (alpha[..., None] / 255.0)
    rgba = np.full((size, size, 4), 100, np.uint8)
    rgba[..., 3] = alpha
    yaw, pitch = ANGLES[number]
    return records.ViewRecord(
        subject="sphere", view=number, world_to_camera=pose, yaw=yaw, pitch=pitch,
        id_embedding=np.eye(1, 512, dtype=np.float32)[0], source="test", license="CC0-1.0",
        **records.encode_view(rgba, normals, pose),
    )  # fmt: skip


def write_spheres(folder, size):
    with ShardWriter(folder / shard_name("train", 0, 1)) as writer:
        writer.write_subject([view(number, size) for number in range(len(ANGLES))])
    splits = {"train": [{"file": shard_name("train", 0, 1), "subjects": 1}]}
    about = {"image_size": size, "views": len(ANGLES), "seed": 0, "splits": splits}
    write_manifest(folder, about | {"source": "test", "license": "CC0-1.0"})
    return folder


def batches(folder, frame, latents=""):
    config = DataConfig(
        directory=str(folder), max_frontal_yaw=35.0, max_frontal_pitch=15.0, random_background=0.0,
        guidance_dropout=0.0, identity_dropout=0.0, relative_cameras=True, skip_corrupt=False,
        workers=0, prefetch=0,
    )  # fmt: skip
    stages = (StageConfig(steps=8, observed=(1,)),)
    return list(make_loader(config, stages, 1, len(ANGLES), 0, frame, latents=latents))


@pytest.mark.parametrize("size", [SIZE, records.COMPACT_FROM])
def test_a_batchs_normals_and_cameras_agree_whichever_view_is_observed(tmp_path, size):
    expected = sphere(cameras.orbit(0, 0), size) * (soft(size)[..., None] / 255.0)
    references = set()
    for batch in batches(write_spheres(tmp_path, size), "camera"):
        # All cameras see the sphere alike, so in camera space all maps are one.
        tolerance = 0.02 if size < records.COMPACT_FROM else 0.05  # as they are stored
        np.testing.assert_allclose(batch.normals[0], [expected] * len(ANGLES), atol=tolerance)
        turned = cameras.normals_to_world(batch.normals[0], batch.world_to_camera[0])
        known = np.stack([sphere(pose, size) for pose in batch.world_to_camera[0]])
        inside = soft(size) == 255
        np.testing.assert_allclose(turned[:, inside], known[:, inside], atol=tolerance)
        assert not turned[:, soft(size) == 0].any()  # mid-grey
        references.add(round(float(batch.world_to_camera[0, 1, 0, 0]), 4))
    assert len(references) > 2  # views at yaw 30, -30 and 0 were each the input


def test_latents_of_normals_do_not_depend_on_the_reference(tmp_path):
    autoencoder = random_autoencoder(
        AutoencoderConfig(channels=8, channel_mult=(1, 2), res_blocks=1, norm_groups=8)
    )
    (tmp_path / "data").mkdir()
    data = write_spheres(tmp_path / "data", SIZE)
    cached = latent_cache.folder(tmp_path, autoencoder, "camera")
    latent_cache.cache_latents(autoencoder, cached, data, backgrounds=0, normals_frame="camera")
    for batch in batches(data, "camera", cached):
        normals = batch.moments[0, :, 1]
        spread = abs(normals - normals[:1]).max()
        assert spread < 0.05 * abs(normals).max()  # views differ by the rounding of stored normals


class Sphere:
    """In place of the networks' sampling: every view shows the sphere, in its own camera's frame."""

    def __init__(self, pipeline, monkeypatch):
        # The first three channels of each half of a latent are the picture itself.
        local = sphere(cameras.orbit(0, 0)).astype(np.float32)
        self.latent = np.concatenate([local, local], axis=-1)
        networks = pipeline.networks
        monkeypatch.setattr(networks, "observed_latents", self.observed)
        monkeypatch.setattr(networks, "sample_jointly", self.jointly)
        monkeypatch.setattr(sampling, "decode", lambda state, batch, **_: batch["latents"])

    def observed(self, images, observed_angles, context, seeds):
        return np.broadcast_to(self.latent, (*images.shape[:2], *self.latent.shape))

    def jointly(self, step, observed_latents, angles, *rest):
        return np.broadcast_to(self.latent, (*angles.shape[:2], *self.latent.shape))


@pytest.mark.parametrize("space", ["world", "camera"])
def test_what_is_written_for_a_model_of_camera_space_normals_agrees(tmp_path, monkeypatch, space):
    model = random_model()
    config = dataclasses.replace(model.config, normals_frame="camera")
    pipeline = Pipeline(dataclasses.replace(model, config=config), RELEASED)
    Sphere(pipeline, monkeypatch)
    trajectory = np.array([[0, 0], [20, 15], [110, 0], [-150, -10]], np.float32)
    images = np.zeros((1, 1, SIZE, SIZE, 3), np.float32)
    heads = pipeline.spin(images, None, trajectory, [0])
    head_folder.write_head(tmp_path / "a", heads.head(0), {}, space)

    about = json.loads((tmp_path / "a" / "transforms.json").read_text())
    assert about["normals_space"] == space
    frames = view_folders.read_frames(tmp_path / "a")
    assert len(frames) == len(trajectory)
    for frame in frames:
        known = sphere(frame.world_to_camera)
        _, normals, _ = view_folders.load(frame, SIZE)
        np.testing.assert_allclose(normals, known, atol=0.02)
    # The anchors and the input, in memory.
    for angles, normals in (
        (heads.anchor_angles, heads.anchor_normals[0]),
        (heads.observed_angles, heads.observed_normals[0]),
    ):
        known = np.stack([sphere(pose) for pose in cameras.orbit(*angles.T)])
        np.testing.assert_allclose(normals, known, atol=2e-5)
        assert not normals[known == 0.0].any()


def test_a_folder_that_does_not_tell_has_the_releases_frame(tmp_path):
    checkpoints.save_model(tmp_path, random_model(), {})
    path = tmp_path / "model.json"
    about = json.loads(path.read_text())
    assert about["config"].pop("normals_frame") == "world"
    path.write_text(json.dumps(about))
    (tmp_path / checkpoints.SUMS).unlink()  # folders of that time have none
    assert checkpoints.load_model(tmp_path).config.normals_frame == "world"
