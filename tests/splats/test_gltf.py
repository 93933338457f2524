"""Gaussians as glTF, and splats.ply through PlayCanvas's converter, if it is there."""

import dataclasses
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trimesh

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError
from spinmeround_jax.splats import gltf
from spinmeround_jax.splats.gaussians import Gaussians
from spinmeround_jax.splats.ply import read_ply, write_ply
from spinmeround_jax.splats.rasterise import render
from tests.support.gltf import attributes, chunks
from tests.support.splat_scenes import random_gaussians

SPLAT = "KHR_gaussian_splatting:"
CONVERTER = shutil.which("splat-transform")  # npm install -g @playcanvas/splat-transform


def drawn(gaussians: Gaussians) -> np.ndarray:
    """(2, 48, 48, 3) pictures from two sides."""
    poses = [cameras.orbit(yaw, 10.0) for yaw in (20.0, 200.0)]
    return np.stack([render(gaussians, pose, cameras.FOCAL * 48, 48)["rgb"] for pose in poses])


def gaussians_of(values: dict[str, np.ndarray]) -> Gaussians:
    """By the extension's own text: x, y, z, w; linear scales and opacities; orders from -l to l."""
    sh = [
        values[name]
        for degree in range(4)
        for n in range(2 * degree + 1)
        if (name := f"{SPLAT}SH_DEGREE_{degree}_COEF_{n}") in values
    ]
    opacity = values[f"{SPLAT}OPACITY"].astype(np.float64)
    parts = (
        values["POSITION"],
        np.log(values[f"{SPLAT}SCALE"]),
        values[f"{SPLAT}ROTATION"][:, [3, 0, 1, 2]],
        np.log(opacity / (1 - opacity)),
        np.stack(sh, axis=1),
    )
    return Gaussians(*(jnp.asarray(part, jnp.float32) for part in parts))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_file_shows_the_same_head(tmp_path, degree):
    written = random_gaussians(20, degree)
    gltf.write_glb(tmp_path / "a.glb", written, metres_per_unit=1.0)
    primitive, values = attributes((tmp_path / "a.glb").read_bytes())
    assert len(values) == 5 + (degree + 1) ** 2 and primitive["mode"] == 0
    assert {len(array) for array in values.values()} == {20}
    np.testing.assert_allclose(np.linalg.norm(values[f"{SPLAT}ROTATION"], axis=-1), 1, atol=1e-6)
    assert abs(drawn(gaussians_of(values)) - drawn(written)).max() < 1e-3
    assert [p.name for p in tmp_path.iterdir()] == ["a.glb"]


def test_what_the_extension_asks_for(tmp_path):
    gltf.write_glb(tmp_path / "a.glb", random_gaussians(5, 1))
    tree, _ = chunks((tmp_path / "a.glb").read_bytes())
    (primitive,) = tree["meshes"][0]["primitives"]
    splatting = primitive["extensions"]["KHR_gaussian_splatting"]
    assert splatting == {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}
    assert tree["extensionsUsed"] == ["KHR_gaussian_splatting"]
    position = tree["accessors"][primitive["attributes"]["POSITION"]]
    assert {"min", "max"} <= set(position)


def test_other_readers_see_points_in_metres(tmp_path):
    written = random_gaussians(50, 1)
    gltf.write_glb(tmp_path / "a.glb", written)
    (cloud,) = trimesh.load(tmp_path / "a.glb").geometry.values()
    np.testing.assert_allclose(cloud.vertices, 0.6 * np.asarray(written.means), atol=1e-6)
    _, values = attributes((tmp_path / "a.glb").read_bytes())
    srgb = np.clip(0.5 + 0.5 / np.sqrt(np.pi) * np.asarray(written.sh[:, 0]), 0, 1)
    linear = values["COLOR_0"][:, :3]
    back = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(back, srgb, atol=1e-5)
    np.testing.assert_allclose(
        values["COLOR_0"][:, 3], jax.nn.sigmoid(written.opacity_logits), atol=1e-6
    )


def test_values_that_are_not_finite(tmp_path):
    broken = random_gaussians(5)
    broken = dataclasses.replace(broken, quaternions=broken.quaternions.at[2].set(0.0))
    with pytest.raises(InputError, match=r"a\.glb"):
        gltf.write_glb(tmp_path / "a.glb", broken)
    assert not list(tmp_path.iterdir())


def convert(source, target):
    subprocess.run([CONVERTER, "-q", "--gpu", "cpu", source, target], check=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(CONVERTER is None, reason="no splat-transform")
def test_the_converter_makes_the_same_gltf(tmp_path):
    written = random_gaussians(30, 3)
    write_ply(tmp_path / "a.ply", written)
    convert(tmp_path / "a.ply", tmp_path / "theirs.glb")
    gltf.write_glb(tmp_path / "ours.glb", written, metres_per_unit=1.0)
    _, theirs = attributes((tmp_path / "theirs.glb").read_bytes())
    _, ours = attributes((tmp_path / "ours.glb").read_bytes())
    assert set(theirs) == set(ours)
    for name in ours:
        if (
            name == f"{SPLAT}ROTATION"
        ):  # theirs are as in the .ply, of any length; q and -q are the same
            cosine = (theirs[name] * ours[name]).sum(-1) / np.linalg.norm(theirs[name], axis=-1)
            assert abs(cosine).min() > 1 - 1e-5
        elif name != "COLOR_0":  # theirs has 8 bits
            np.testing.assert_allclose(theirs[name], ours[name], atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(CONVERTER is None, reason="no splat-transform")
@pytest.mark.parametrize("suffix", ["spz", "sog", "compressed.ply"])
def test_converted_files_show_the_same_head(tmp_path, suffix):
    written = random_gaussians(300, 1, size=0.05)
    write_ply(tmp_path / "a.ply", written)
    convert(tmp_path / "a.ply", tmp_path / f"b.{suffix}")
    convert(tmp_path / f"b.{suffix}", tmp_path / "c.ply")
    assert (tmp_path / f"b.{suffix}").stat().st_size < (tmp_path / "a.ply").stat().st_size / 2
    difference = abs(drawn(read_ply(tmp_path / "c.ply")) - drawn(written))
    assert difference.mean() < 0.02
