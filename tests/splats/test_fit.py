"""Losses, relocation, and whole fits of a small ellipsoid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax.files import InputError
from spinmeround_jax.splats import fit as fitting
from spinmeround_jax.splats import nvidia, rasterise, relocation, views
from spinmeround_jax.splats.fit import FitSettings, fit
from tests.support.splat_scenes import random_gaussians
from tests.support.splat_views import ellipsoid, ring

SIZE = 24
SMALL = FitSettings(
    steps=60, count=300, degree=0, lpips=0.0, normals=0.05, capacity=128, opacity_cost=0.01
)


@pytest.fixture(scope="module")
def scene():
    return ellipsoid(ring(12), SIZE)


@pytest.fixture(scope="module")
def whole(scene):
    """An uninterrupted fit, and what it told on the way."""
    told = []
    gaussians, counts = fit(scene, SMALL, progress=lambda *what: told.append(what))
    return gaussians, counts, told


def test_unseen_views_of_an_ellipsoid(scene, whole):
    gaussians, counts, told = whole
    unseen = ellipsoid(ring(6, start=15.0), SIZE)
    distances = views.measure(views.draw_views(gaussians, unseen), unseen)
    start = fitting._begin(scene, SMALL).gaussians
    before = views.measure(views.draw_views(start, unseen), unseen)
    assert distances["psnr"].min() > 20.0
    assert distances["psnr"].mean() > before["psnr"].mean() + 7.0
    assert distances["normals"].mean() < before["normals"].mean() - 3.0
    assert "lpips" not in distances  # too small
    assert [step for step, _, _ in told] == [20, 40, 60] and told[-1][2] > told[0][2]
    assert counts == {"resumed_at": 0, "faults": 0, "overflow": counts["overflow"]}


def test_a_killed_fit_goes_on_bit_for_bit(scene, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "CHECKPOINT_EVERY", 30)

    def kill(step, loss, psnr):
        if step == 40:
            raise KeyboardInterrupt

    resumed = []

    def at_once(step, loss, psnr):
        resumed.append(step)
        raise KeyboardInterrupt

    file = tmp_path / "fit.npz"
    with pytest.raises(KeyboardInterrupt):
        fit(scene, SMALL, file, kill)
    gaussians, counts = fit(scene, SMALL, file)
    assert counts["resumed_at"] == 30
    for one, other in zip(jax.tree.leaves(gaussians), jax.tree.leaves(whole[0]), strict=True):
        np.testing.assert_array_equal(one, other)
    # Of other settings, or with a flipped bit, it is begun anew.
    kept = bytearray(file.read_bytes())
    file.write_bytes(kept)
    _, counts = fit(scene, dataclasses.replace(SMALL, seed=1, steps=1), file)
    assert counts["resumed_at"] == 0
    for place in (len(kept) // 3, len(kept) // 2, len(kept) - 1):
        damaged = kept.copy()
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(KeyboardInterrupt):
            fit(scene, SMALL, file, at_once)
    assert resumed == [20] * 3


def test_views_that_are_not_finite(scene):
    """One bad view is stepped over; with nothing else the fit ends with an error."""
    normals = scene.normals.copy()
    normals[3] = np.nan
    settings = dataclasses.replace(SMALL, steps=24, dssim=0.0)
    gaussians, counts = fit(dataclasses.replace(scene, normals=normals), settings)
    assert counts["faults"] == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gaussians))
    normals[:] = np.nan
    with pytest.raises(InputError, match="has not been finite for 20 steps"):
        fit(dataclasses.replace(scene, normals=normals), settings)


def test_too_small_for_the_loss(scene):
    with pytest.raises(InputError, match="24x24 pixels; this loss needs 32"):
        fit(scene, dataclasses.replace(SMALL, lpips=0.1))


def test_relocation_keeps_the_picture_and_leaves_nobody_dead():
    scene = random_gaussians(60, 1, 4)
    dead = np.arange(60) % 6 == 0
    scene = dataclasses.replace(
        scene, opacity_logits=jnp.where(dead, -9.0, scene.opacity_logits.clip(-1.0, 0.0))
    )
    moved, changed = relocation.relocate(scene, jax.random.key(0))
    assert np.asarray(changed)[dead].all()
    assert (jax.nn.sigmoid(moved.opacity_logits) > relocation.DEAD).all()
    same = ~np.asarray(changed)
    np.testing.assert_array_equal(moved.means[same], scene.means[same])
    pose, focal = ring(1)[0], 4.26 * 64
    before, after = (rasterise.render(g, pose, focal, 64, tile=8) for g in (scene, moved))
    change = abs(np.asarray(before["rgb"] - after["rgb"])).mean()
    # Without the correction of opacity and scale, the copies change the picture several times as much.
    plain = jax.tree.map(
        lambda old, new: jnp.where(dead.reshape(-1, *[1] * (old.ndim - 1)), new, old), scene, moved
    )
    plain = dataclasses.replace(
        plain,
        opacity_logits=jnp.where(dead, 0.0, scene.opacity_logits),
    )
    copied = abs(
        np.asarray(before["rgb"] - rasterise.render(plain, pose, focal, 64, tile=8)["rgb"])
    )
    assert change < 0.004 and change < copied.mean() / 2


def test_two_that_share_a_place_blend_as_one():
    """Kheradmand et al., eq. 9: equal opacity in the middle, equal integral of alpha."""
    whole, share = jnp.array([0.8]), jnp.array([2.0])
    part = 1 - jnp.sqrt(1 - whole)
    factor = float(relocation._shrink(whole, part, share)[0])
    x = np.linspace(-8, 8, 4001)
    one = 0.8 * np.exp(-0.5 * x**2)
    half = float(part[0]) * np.exp(-0.5 * (x / factor) ** 2)
    both = 1 - (1 - half) ** 2
    assert both.max() == pytest.approx(0.8, abs=1e-6)
    assert both.sum() == pytest.approx(one.sum(), rel=1e-4)


def test_nothing_to_relocate_to():
    scene = random_gaussians(5)
    scene = dataclasses.replace(scene, opacity_logits=jnp.full(5, -9.0))
    moved, changed = relocation.relocate(scene, jax.random.key(0))
    assert not changed.any()
    np.testing.assert_array_equal(moved.means, scene.means)


def test_without_a_gpu_the_jax_rasteriser_draws(caplog, monkeypatch):
    monkeypatch.setattr(nvidia.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        assert nvidia.choose() is rasterise.render
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="splax cannot run"):
        nvidia.choose("splax")
    with pytest.raises(ValueError, match="must be one of"):
        nvidia.choose("fast")
