"""Losses at fixed noise levels: what they are of, and that they are the same each time."""

import dataclasses

import jax
import numpy as np
import pytest

from spinmeround_jax import sharding
from spinmeround_jax.config import AblationConfig, Config, DataConfig, HeldOutConfig
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.data.manifest import read_manifest, write_manifest
from spinmeround_jax.models import parameters
from spinmeround_jax.training import held_out_loss, step
from tests.support.synthetic_shards import write_dataset
from tests.support.tiny_model import CONFIG, NETWORKS, random_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

EVERYTHING = AblationConfig(no_identity=False, no_normals=False, no_image=False)
SIGMAS = (0.5, 4.0)


def write_splits(folder, train, held_out):
    """Two splits of as many subjects each; the same ones if the numbers are the same."""
    splits = {}
    for split, subjects in (("train", train), ("held_out", held_out)):
        write_dataset(folder, subjects=subjects, shards=1, split=split)
        splits |= read_manifest(folder)["splits"]
    write_manifest(folder, {**read_manifest(folder), "splits": splits})
    return folder


@dataclasses.dataclass
class Settings:
    """The part of a `Config` that is asked for."""

    data: DataConfig
    held_out: HeldOutConfig
    model: object = CONFIG
    ablation: AblationConfig = EVERYTHING
    seed: int = 0
    compute_dtype: str = "float32"


def settings(folder, heads=3) -> Config:
    dropping = DataConfig(
        directory=str(folder), max_frontal_yaw=50.0, max_frontal_pitch=20.0, random_background=1.0,
        guidance_dropout=1.0, identity_dropout=1.0, relative_cameras=True, skip_corrupt=False,
        workers=2, prefetch=2,
    )  # fmt: skip
    return Settings(dropping, HeldOutConfig(every=1, heads=heads, sigmas=SIGMAS))


@pytest.fixture(scope="module")
def networks():
    model = random_model()
    split = {name: parameters.split(getattr(model, name)) for name in NETWORKS}
    return {name: pair[0] for name, pair in split.items()}, {n: p[1] for n, p in split.items()}


def measured(folder, networks, heads=3):
    graphdefs, params = networks
    frozen = {"networks": params, "empty_latent": np.zeros((8, 8, 8), np.float32)}
    measure = held_out_loss.fixed_losses(
        settings(folder, heads), graphdefs, frozen, sharding.make_mesh()
    )
    first = measure(params)
    assert measure(params) == first
    return first


def test_the_gap_is_between_heads_that_differ(tmp_path, networks):
    same = measured(write_splits(tmp_path / "same", 4, 4), networks)
    names = {f"{kind}_{sigma:g}" for kind in ("train", "held_out", "gap") for sigma in SIGMAS}
    assert set(same) == names
    assert same["gap_4"] == 0.0 and same["held_out_4"] == same["train_4"] > 0.0
    other = measured(write_splits(tmp_path / "other", 4, 6), networks)
    ratio = other["held_out_4"] / other["train_4"]
    assert other["gap_4"] == pytest.approx(ratio - 1.0, abs=1e-6) != 0.0


def test_without_held_out_heads_there_is_no_gap(tmp_path, networks):
    write_dataset(tmp_path, subjects=4)
    assert set(measured(tmp_path, networks)) == {f"train_{sigma:g}" for sigma in SIGMAS}
    assert measured(tmp_path, networks, heads=0) == {}


def test_heads_are_as_they_are_whatever_training_drops(tmp_path):
    heads = held_out_loss.fixed_heads(settings(write_splits(tmp_path, 4, 4)))
    for batch in heads.values():
        assert not batch.dropped.any() and not batch.identity_dropped.any()
        assert batch.observed.sum(1).tolist() == [1, 1, 1]
        np.testing.assert_array_equal(
            batch.images[:, :, :, 0], 1.0
        )  # the first column is background


def test_the_loss_of_a_network_that_says_nothing(networks):
    """F = 0 leaves D(x) = c_skip x, so that each head's loss can be written down."""
    graphdefs, params = networks
    params = {**params, "unet": jax.tree.map(np.zeros_like, params["unet"])}
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 3, 4, 8, 8, 8)).astype(np.float32)
    batch = Batch(
        observed=np.tile(np.arange(4) < 1, (3, 1)),
        dropped=np.zeros(3, bool),
        identity_dropped=np.zeros(3, bool),
        id_embedding=np.eye(3, 512, dtype=np.float32),
        world_to_camera=np.tile(np.eye(4, dtype=np.float32), (3, 4, 1, 1)),
    )
    sigma = np.float32(2.0)
    found = step.loss_per_head(
        CONFIG, EVERYTHING, graphdefs, params, np.zeros((8, 8, 8), np.float32),
        clean, batch, sigma, noise,
    )  # fmt: skip
    error = (clean + sigma * noise) / (sigma**2 + 1) - clean
    expected = (error**2)[:, 1:].mean((1, 2, 3, 4)) * (sigma**2 + 1) / sigma**2
    np.testing.assert_allclose(found, expected, rtol=1e-5)
