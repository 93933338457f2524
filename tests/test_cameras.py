import json

import numpy as np
import pytest

from spinmeround_jax import cameras


def test_released_poses_and_raymaps_match_the_goldens(golden):
    reference = golden("cameras")
    poses = reference["world_to_camera"].copy()
    poses[:, :3, 3] *= -1  # our sign of the translation; see cameras.orbit
    pitch, yaw, roll = reference["angles_deg"].T
    level = (pitch == 0) & (roll == 0)  # the release composes pitch and roll otherwise than `orbit`
    assert level.sum() == 4
    np.testing.assert_allclose(cameras.orbit(yaw[level]), poses[level], atol=1e-6)

    kept = [1, 5]  # the golden file keeps two of the six 64x64 raymaps
    raymap = np.asarray(cameras.raymap(poses[kept], 64, "released"))
    error = abs(raymap - reference["raymap_64"]).reshape(-1, cameras.RAYMAP_CHANNELS).max(0)
    assert error.max() < 1e-2  # octave 14 in float32 carries 4e-3
    low_octaves = np.r_[0:24, 48:69, 93:144]
    assert error[low_octaves].max() < 5e-4

    raymap = np.asarray(cameras.raymap(poses[1], 16, "released"))
    np.testing.assert_allclose(raymap, reference["raymap_16_yaw45"], atol=1e-2)


@pytest.mark.parametrize("yaw, pitch", [(0, 0), (45, 0), (180, 20), (-100, -25), (30, 40)])
def test_orbit_stands_where_it_says_upright_and_looks_at_the_head(yaw, pitch):
    pose = cameras.camera_to_world(cameras.orbit(yaw, pitch))
    y, p = np.deg2rad([yaw, pitch])
    position = cameras.RADIUS * np.array([np.sin(y) * np.cos(p), np.sin(p), np.cos(y) * np.cos(p)])
    np.testing.assert_allclose(pose[:3, 3], position, atol=1e-5)
    np.testing.assert_allclose(-pose[:3, 2], -position / cameras.RADIUS, atol=1e-5)  # looks inward
    assert abs(pose[1, 0]) < 1e-6  # its x axis is level
    assert pose[1, 1] > 0  # its y axis points up
    np.testing.assert_allclose(
        cameras.yaw_pitch(cameras.orbit(yaw, pitch)), (yaw, pitch), atol=1e-3
    )


def test_true_rays_hit_the_projected_point():
    """A world point projects to the pixel whose ray passes through it."""
    pose, size = cameras.orbit(35.0, 15.0), 32
    raymap = np.asarray(cameras.raymap(pose, size, "true"))
    origins, directions = raymap[..., :3], raymap[..., 93:96]
    point = origins[10, 21] + 2.6 * directions[10, 21]
    x, y, z = pose[:3, :3] @ point + pose[:3, 3]
    column = size * (0.5 + cameras.FOCAL * x / -z)
    row = size * (0.5 - cameras.FOCAL * y / -z)
    np.testing.assert_allclose((row, column), (10.5, 21.5), atol=1e-3)
    assert np.linalg.norm(point) < 0.5  # near the head, not behind the camera


def test_relative_cameras_make_the_reference_frontal_and_keep_angles_between():
    poses = cameras.orbit([20.0, 65.0, -70.0], [10.0, -5.0, 0.0])
    relative = cameras.relative_to(poses[0], poses)
    np.testing.assert_allclose(relative[0], cameras.orbit(0.0), atol=1e-6)
    before = poses[1, :3, :3] @ poses[2, :3, :3].T
    after = relative[1, :3, :3] @ relative[2, :3, :3].T
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_trajectories():
    assert cameras.turntable(48).shape == (48, 2)
    np.testing.assert_array_equal(cameras.turntable(8)[1:], cameras.anchors())
    assert abs(cameras.sweep(24, 60, 15)).max() == pytest.approx(60)


def test_trajectory_file(tmp_path):
    path = tmp_path / "path.json"
    path.write_text(json.dumps([{"yaw": 30, "pitch": 10}, {"yaw": -5}]))
    np.testing.assert_array_equal(cameras.load_trajectory(path), [[30, 10], [-5, 0]])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "[1]",
        '[{"pitch": 1}]',
        '[{"yaw": "x"}]',
        '[{"yaw": NaN}]',
        '[{"yaw": 0, "pitch": 91}]',
        '[{"yaw": 1' + "0" * 400 + "}]",
        "[" * 100_000,
        "\udcff",
    ],
    ids=range(12),
)
def test_bad_trajectory_file_is_named(tmp_path, text):
    path = tmp_path / "path.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"path\.json: expected a JSON list"):
        cameras.load_trajectory(path)
