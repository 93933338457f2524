"""Reading transforms.json, its faults, and the visual hull."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax.files import InputError
from spinmeround_jax.splats import hull, views
from spinmeround_jax.splats import scene as scenes
from spinmeround_jax.splats.scene import check, load, middle_and_radius, rotation_to_y
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
    assert set(read.masks_from) == {"normals"}
    check(read, "here")


def test_masks_come_from_alpha_then_normals_then_the_background(tmp_path, scene):
    write(tmp_path, scene, alpha=True)
    read = load(tmp_path)
    assert set(read.masks_from) == {"alpha"}
    np.testing.assert_array_equal(read.masks, scene.masks)
    black = load(tmp_path, background=np.zeros(3))
    assert black.images[black.masks == 0].max() == 0.0
    write(tmp_path, dataclasses.replace(scene, normals=None))
    read = load(tmp_path)
    assert set(read.masks_from) == {"background"} and read.normals is None
    assert abs(read.masks - scene.masks).mean() < 0.01


def test_normals_of_the_camera_are_turned_to_the_world(tmp_path, scene):
    local = np.einsum("vij,vhwj->vhwi", scene.world_to_camera[:, :3, :3], scene.normals)
    about = write(tmp_path, dataclasses.replace(scene, normals=local))
    about["normals_space"] = "camera"
    (tmp_path / "transforms.json").write_text(json.dumps(about))
    np.testing.assert_allclose(load(tmp_path).normals, scene.normals, atol=0.015)


def test_masks_come_from_mask_files_where_there_are_any(tmp_path, scene):
    """nerfstudio's mask_path, of photographs with a room behind; one view has none."""
    room = np.random.default_rng(0).random(scene.images.shape, np.float32)
    images = np.where(scene.masks[..., None] > 0, scene.images, room)
    about = write(tmp_path, dataclasses.replace(scene, images=images, normals=None))
    for i, frame in enumerate(about["frames"][1:], start=1):
        Image.fromarray(np.uint8(255 * scene.masks[i])).save(tmp_path / f"mask{i}.png")
        frame["mask_path"] = f"mask{i}.png"
    (tmp_path / "transforms.json").write_text(json.dumps(about))
    read = load(tmp_path)
    assert read.masks_from == ("background", *("mask",) * 15)
    np.testing.assert_array_equal(read.masks[1:], scene.masks[1:])
    # The room is not fitted: it gives way to the background, except in the view without a mask.
    np.testing.assert_allclose(read.images[1:], scene.images[1:], atol=0.5 / 255 + 2.5e-4)
    assert abs(read.images[0] - scene.images[0].astype(np.float32)).max() > 0.5


def test_a_stray_transparent_pixel_and_a_view_without_normals(tmp_path, scene):
    about = write(tmp_path, scene)
    path = tmp_path / about["frames"][0]["file_path"]
    pixels = np.array(Image.open(path).convert("RGBA"))
    pixels[0, 0, 3] = 254
    Image.fromarray(pixels).save(path)
    del about["frames"][3]["normals_file_path"]
    (tmp_path / "transforms.json").write_text(json.dumps(about))
    read = load(tmp_path)
    assert read.masks_from.count("normals") == 15 and read.masks_from[3] == "background"
    assert abs(read.masks - scene.masks).mean() < 0.001
    np.testing.assert_array_equal(read.has_normals, np.arange(16) != 3)
    # It is fitted and measured like a view of a scene without normals.
    drawn = views.Drawn(read.images, read.masks, read.masks, scene.normals, 0)
    angles = views.measure(drawn, read)["normals"]
    assert np.isnan(angles[3]) and np.nanmax(angles) < 3.0


def turned(about, rotation, offset=(0.0, 0.0, 0.0), roll=None):
    """The same views in another world, world normals left out."""
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = rotation, offset
    frames = []
    for i, frame in enumerate(about["frames"]):
        own = np.eye(4)
        if roll is not None:
            c, s = np.cos(roll[i]), np.sin(roll[i])
            own[:2, :2] = [[c, -s], [s, c]]
        frames.append(
            {
                "file_path": frame["file_path"],
                "transform_matrix": (motion @ np.array(frame["transform_matrix"]) @ own).tolist(),
            }
        )
    return {**about, "frames": frames}


@pytest.mark.parametrize("axis", list(scenes.AXES))
@pytest.mark.parametrize("pitch", [0.0, 35.0])
def test_up_is_seen_from_the_cameras(tmp_path, axis, pitch):
    """A ring in a world with another axis up, as of Blender or nerfstudio (z) or COLMAP (-y)."""
    given = ellipsoid(ring(12, pitch), SIZE)
    about = write(tmp_path, given)
    to_y = rotation_to_y(scenes.AXES[axis])
    np.testing.assert_allclose(to_y @ scenes.AXES[axis], [0.0, 1.0, 0.0], atol=1e-12)
    (tmp_path / "transforms.json").write_text(json.dumps(turned(about, to_y.T)))
    read = load(tmp_path)
    assert read.up == f"{axis}, as the cameras are held"
    np.testing.assert_allclose(read.world_to_camera, given.world_to_camera, atol=1e-5)
    np.testing.assert_allclose(read.applied_transform[:3, :3], to_y, atol=1e-12)
    check(read, "here")
    assert load(tmp_path, up=axis).up == f"{axis}, as given"


def test_up_of_cameras_held_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    given = ellipsoid(ring(24), SIZE)
    about = write(tmp_path, given)
    tilt = np.deg2rad(30.0)
    rotation = np.array(
        [[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]]
    )
    shaken = turned(about, rotation, roll=np.deg2rad(rng.normal(0.0, 3.0, 24)))
    (tmp_path / "transforms.json").write_text(json.dumps(shaken))
    up = load(tmp_path).applied_transform[:3, :3].T @ [0.0, 1.0, 0.0]
    assert np.rad2deg(np.arccos(up @ rotation[:, 1])) < 3.0
    # What the file says goes first.
    (tmp_path / "transforms.json").write_text(json.dumps({**shaken, "up": [0, 0, 2]}))
    assert load(tmp_path).up == "z, as transforms.json says"


def test_up_of_photos_that_are_stored_on_their_side(tmp_path):
    """A telephone held upright stores landscape images; only EXIF knows."""
    about = write(tmp_path, ellipsoid(ring(12), SIZE, normals=False))
    sideways = turned(about, np.eye(3), roll=np.full(12, -np.pi / 2))
    (tmp_path / "transforms.json").write_text(json.dumps(sideways))
    with pytest.raises(InputError, match=r"which way is up.*--up z"):
        load(tmp_path)
    for frame in about["frames"]:
        exif = Image.Exif()
        exif[274] = 6
        Image.open(tmp_path / frame["file_path"]).save(tmp_path / frame["file_path"], exif=exif)
    assert load(tmp_path).up.startswith("y")


def test_a_world_far_from_its_origin_is_moved(tmp_path, scene):
    """Coordinates of a map: float32 would be off by a quarter of a unit."""
    about = write(tmp_path, scene)
    offset = np.array([500_000.0, 30.0, 4_000_000.0])
    (tmp_path / "transforms.json").write_text(json.dumps(turned(about, np.eye(3), offset)))
    read = load(tmp_path)
    np.testing.assert_allclose(read.world_to_camera, scene.world_to_camera, atol=1e-5)
    np.testing.assert_allclose(read.applied_transform[:3, 3], -offset, rtol=1e-9)


def test_views_that_do_not_fit_together(tmp_path, scene, monkeypatch):
    about = write(tmp_path, scene)
    Image.new("RGB", (SIZE, SIZE + 1)).save(tmp_path / "taller.png")
    Image.new("1", (4000, 4000)).save(tmp_path / "huge.png")
    first = about["frames"][0]
    for changes, told in [
        ({"file_path": "taller.png", "h": SIZE + 1}, "all views must be of one size"),
        ({"file_path": "huge.png"}, "4000x4000"),
        ({"fl_x": 900}, "different intrinsics"),
        ({"k1": 0.1}, "undistort"),
        ({"normals_file_path": "taller.png"}, "taller.png"),
    ]:
        changed = {**about, "frames": [first | changes, *about["frames"][1:]]}
        (tmp_path / "transforms.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=str(tmp_path)) as raised:
            load(tmp_path)
        assert told in str(raised.value)
    monkeypatch.setattr(scenes, "MAX_VIEWS", 15)
    (tmp_path / "transforms.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="at most 15"):
        load(tmp_path)


def test_views_that_are_not_enough(scene):
    with pytest.raises(InputError, match=r"here: 7 views.*at least 8"):
        check(scene.take(np.arange(7)), "here")
    front = ellipsoid(ring(8)[[0, 1, 7, 0, 1, 7, 0, 1]], SIZE)
    with pytest.raises(InputError, match="one side is never seen"):
        check(front, "here")
    check(front, "here", one_sided=True)
    masks = scene.masks.copy()
    masks[3] = 0
    with pytest.raises(InputError, match=r"nothing but background in 3\.png"):
        check(dataclasses.replace(scene, masks=masks), "here")
    parallel = np.tile(ring(1), (8, 1, 1))
    parallel[:, 0, 3] = np.arange(8)
    with pytest.raises(InputError, match="do not look at one place"):
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
    with pytest.raises(InputError, match="no common inside"):
        hull.surface(dataclasses.replace(scene, masks=masks), 100)
