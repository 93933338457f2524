"""Reading transforms.json, its faults, and the visual hull."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax.splats import hull
from spinmeround_jax.splats.scene import check, load, middle_and_radius
from tests.support.splat_views import AXES, ellipsoid, ring, write

SIZE = 32


@pytest.fixture(scope="module")
def scene():
    return ellipsoid(ring(16), SIZE)


def test_reads_what_sampling_writes(tmp_path, scene):
    write(tmp_path, scene)
    read = load(tmp_path)
    np.testing.assert_allclose(
        read.images, scene.images, atol=0.5 / 255 + 2.5e-4
    )  # kept as float16
    np.testing.assert_allclose(read.normals, scene.normals, atol=0.012)
    np.testing.assert_array_equal(read.masks, scene.masks)
    np.testing.assert_allclose(read.world_to_camera, scene.world_to_camera, atol=1e-6)
    np.testing.assert_allclose(read.focal, scene.focal)
    assert read.masks_from == "normals"
    check(read, "here")


def test_masks_come_from_alpha_then_normals_then_the_background(tmp_path, scene):
    write(tmp_path, scene, alpha=True)
    read = load(tmp_path)
    assert read.masks_from == "alpha"
    np.testing.assert_array_equal(read.masks, scene.masks)
    black = load(tmp_path, background=np.zeros(3))
    assert black.images[black.masks == 0].max() == 0.0
    write(tmp_path, dataclasses.replace(scene, normals=None))
    read = load(tmp_path)
    assert read.masks_from == "background" and read.normals is None
    assert abs(read.masks - scene.masks).mean() < 0.01


def test_normals_of_the_camera_are_turned_to_the_world(tmp_path, scene):
    local = np.einsum("vij,vhwj->vhwi", scene.world_to_camera[:, :3, :3], scene.normals)
    about = write(tmp_path, dataclasses.replace(scene, normals=local))
    about["normals_space"] = "camera"
    (tmp_path / "transforms.json").write_text(json.dumps(about))
    np.testing.assert_allclose(load(tmp_path).normals, scene.normals, atol=0.015)


def test_faults_are_named(tmp_path, scene):
    about = write(tmp_path, scene)
    outside = tmp_path.parent / "outside.png"
    Image.new("RGB", (SIZE, SIZE)).save(outside)
    Image.new("RGB", (SIZE, SIZE + 1)).save(tmp_path / "taller.png")
    Image.new("1", (4000, 4000)).save(tmp_path / "huge.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "link.png").symlink_to(outside)

    def with_frame(**changes):
        return {**about, "frames": [about["frames"][0] | changes, *about["frames"][1:]]}

    skewed = np.eye(4)
    skewed[0, 1] = 0.1
    for content, told in [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ({**about, "frames": []}, "no list of frames"),
        ({**about, "frames": [3]}, "no list of frames"),
        ({**about, "frames": about["frames"] * 200}, "at most"),
        ({**about, "frames": about["frames"][:1] * 9}, "names a picture twice"),
        (with_frame(file_path="../outside.png"), "outside of"),
        (with_frame(file_path=str(outside)), "outside of"),
        (with_frame(file_path="link.png"), "outside of"),
        (with_frame(file_path=None), "without file_path"),
        (with_frame(normals_file_path="../../x.png"), "outside of"),
        (with_frame(file_path="taller.png"), "all views must be of one size"),
        (with_frame(normals_file_path="taller.png"), "taller.png"),
        (with_frame(file_path="huge.png"), "4000x4000"),
        (with_frame(file_path="text.png"), "not a PNG"),
        (with_frame(fl_x=900), "different intrinsics"),
        (with_frame(transform_matrix=[[1]]), "4 x 4"),
        (with_frame(transform_matrix="x"), "missing or not numbers"),
        (with_frame(transform_matrix=skewed.tolist()), "not a rotation"),
        ({**about, "fl_x": "wide"}, "fl_x"),
        ({**about, "fl_x": float("nan")}, "fl_x"),
        ({**about, "fl_x": 0}, "cannot be right"),
        ({**about, "k1": 0.1}, "distortion"),
        ({**about, "w": 64}, "says 64"),
        ({k: v for k, v in about.items() if k != "fl_x"}, "focal length is needed"),
        ({**about, "normals_space": "mine"}, "normals_space"),
    ]:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "transforms.json").write_text(text)
        with pytest.raises(match=str(tmp_path)) as raised:
            load(tmp_path)
        assert told in str(raised.value), f"{told}: {raised.value}"
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        (tmp_path / "transforms.json").write_text(json.dumps(with_frame(file_path="missing.png")))
        load(tmp_path)


def test_views_that_are_not_enough(scene):
    with pytest.raises(match=r"here: 7 views.*at least 8"):
        check(scene.take(np.arange(7)), "here")
    front = ellipsoid(ring(8)[[0, 1, 7, 0, 1, 7, 0, 1]], SIZE)
    with pytest.raises(match="one side is never seen"):
        check(front, "here")
    check(front, "here", one_sided=True)
    masks = scene.masks.copy()
    masks[3] = 0
    with pytest.raises(match=r"nothing but background in 3\.png"):
        check(dataclasses.replace(scene, masks=masks), "here")
    parallel = np.tile(ring(1), (8, 1, 1))
    parallel[:, 0, 3] = np.arange(8)
    with pytest.raises(match="do not look at one place"):
        check(dataclasses.replace(scene.take(np.arange(8)), world_to_camera=parallel), "here")


def test_the_hull_of_an_ellipsoid(scene):
    middle, radius = middle_and_radius(scene)
    np.testing.assert_allclose(middle, 0.0, atol=1e-5)
    assert radius > AXES.max()
    points, normals, colours, spacing = hull.surface(scene, 2000)
    relative = np.linalg.norm(points / AXES, axis=-1)
    side = abs(points[:, 1]) < 0.2  # the ring does not see the poles
    assert abs(np.median(relative[side]) - 1.0) < 0.06
    true_normals = points / AXES**2
    true_normals /= np.linalg.norm(true_normals, axis=-1, keepdims=True)
    assert np.median(np.sum(normals * true_normals, -1)[side]) > 0.97
    true_colours = 0.5 + 0.4 * np.sin(9.0 * points + [0, 1, 2])
    assert np.median(abs(colours - true_colours)[side]) < 0.1
    assert 0.3 < spacing / np.sqrt(4 * np.pi * 0.25**2 / 2000) < 2.0
    again = hull.surface(scene, 2000)[0]
    np.testing.assert_array_equal(points, again)


def test_masks_without_a_common_inside(scene):
    size = scene.size[0]
    masks = np.zeros_like(scene.masks)
    masks[::2, :, : size // 3] = 1
    masks[1::2, :, -size // 3 :] = 1
    masks[:, size // 2 :] = 0
    masks[::2, : size // 4] = 0
    masks[1::2, size // 4 :] = 0
    with pytest.raises(match="no common inside"):
        hull.surface(dataclasses.replace(scene, masks=masks), 100)
