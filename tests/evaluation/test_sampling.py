"""Ways to sample that are compared, and batches split over devices."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.config import NO_ABLATION, RELEASED
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.evaluation import sampling
from spinmeround_jax.evaluation.sampling import Variant, variants
from tests.support.paths import ROOT
from tests.support.tiny_model import random_model

pytestmark = pytest.mark.usefixtures("quick_compilation")
SAMPLING = dataclasses.replace(RELEASED, steps=2, sigma_max=5.0, normals_steps=1)
DIRECT = Variant("anchors false", SAMPLING, anchors=False)


def direct(devices=None, told=None):
    """Two heads at nine views, in two groups; what `progress` was told goes to `told`."""
    model = random_model()
    progress = (lambda step, *counts: told.append((step, counts))) if told is not None else None
    pipeline = Pipeline(model, SAMPLING, NO_ABLATION, 4, progress, devices=devices)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 1, 16, 16, 3)).astype(np.float32)
    identities = np.eye(2, 512, dtype=np.float32)
    trajectory = cameras.turntable(9)
    heads = sampling.spin(pipeline, DIRECT, images, identities, trajectory, [3, 4])
    return pipeline, images, heads


def repeated_on_four_devices():  # in a process of its own
    assert jax.device_count() == 4
    pictures = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 16, 3)).astype(np.float32)
    results = []
    for devices in (None, jax.devices()[:1]):
        pipeline = Pipeline(random_model(), SAMPLING, NO_ABLATION, 4, devices=devices)
        results.append(sampling.repeat(pipeline, pictures, pictures, np.zeros((3, 2))))
        placed = jax.tree.leaves(pipeline.networks._networks["autoencoder"][1])[
            0
        ].sharding.device_set
        assert len(placed) == (1 if devices else 4)
    np.testing.assert_allclose(results[0], results[1], atol=2e-4)
    print("the same on four devices")


def sampled_on_four_devices():  # in a process of its own
    _, _, split = direct()
    _, _, alone = direct(jax.devices()[:1])
    np.testing.assert_allclose(split.images, alone.images, atol=2e-4)
    np.testing.assert_allclose(split.normals, alone.normals, atol=2e-4)
    print("the same on four devices")


def test_direct_views_are_of_the_input_and_of_their_group_alone():
    told = []
    pipeline, images, heads = direct(told=told)
    assert heads.images.shape == (2, 9, 16, 16, 3)
    np.testing.assert_array_equal(heads.images[:, 0], images[:, 0])  # shown as given
    assert np.isfinite(heads.images).all() and heads.images[:, 1:].std() > 0.01
    assert told == [("normals", (2, 2)), ("views", (4, 4))]
    groups = sampling._groups(cameras.turntable(9), pipeline.networks.config.views)
    assert groups.tolist() == [[1, 2, 3, 4, 4, 4, 4], [5, 6, 7, 8, 8, 8, 8]]


@pytest.mark.parametrize(
    "what", ["repeated", pytest.param("sampled", marks=pytest.mark.slow)]
)  # fmt: skip
def test_batches_are_split_over_all_devices(what):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # nearly all of the time is compilation
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    script = f"from tests.evaluation import test_sampling as t; t.{what}_on_four_devices()"
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert "the same on four devices" in run.stdout


def test_each_value_of_a_sweep_changes_one_setting():
    own = Variant("", SAMPLING)
    found = variants(own, ["steps=12,24", "anchors=false", "shared_noise=false", "sampler=heun"])
    assert [v.label for v in found] == [
        "", "steps 12", "steps 24", "anchors false", "shared noise false", "sampler heun",
    ]  # fmt: skip
    assert found[1].sampling == dataclasses.replace(SAMPLING, steps=12) and found[1].anchors
    assert found[3] == Variant("anchors false", SAMPLING, anchors=False)
    assert found[4].sampling.shared_noise is False
    both = variants(own, ["steps=4,8:sampler=euler,unipc"])
    assert [v.label for v in both[1:]] == [
        "steps 4, sampler euler", "steps 4, sampler unipc",
        "steps 8, sampler euler", "steps 8, sampler unipc",
    ]  # fmt: skip
    assert both[4].sampling == dataclasses.replace(SAMPLING, steps=8, sampler="unipc")
    for bad in ("steps", "colour=1", "guidance_scale=nan", "steps=", "sampler=ddim", "steps=4:"):
        with pytest.raises(ValueError, match=f"--sweep {bad}"):
            variants(own, [bad])
