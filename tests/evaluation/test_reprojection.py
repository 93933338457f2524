"""Reprojection on scenes whose answer is known: spheres, ray-traced with our cameras."""

import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.evaluation import reprojection, surface

# (centre, radii): a head, and a nose that hides parts of it from one view and not from the next.
HEAD = (np.array([0.0, 0.0, 0.0]), np.array([0.18, 0.25, 0.21]))
NOSE = (np.array([0.0, -0.02, 0.27]), np.array([0.05, 0.05, 0.05]))


def trace(pose, size, solids, shift=0.0):
    """Image (h, w, 3) in [-1, 1], world normals, depth (NaN: none) of ellipsoids.

    The texture is a smooth function of the point, turned about the vertical by `shift` degrees; the
    second solid is black, the background white.
    """
    rotation, translation = pose[:3, :3].astype(np.float64), pose[:3, 3].astype(np.float64)
    origin = -rotation.T @ translation
    directions = cameras.camera_directions(size).astype(np.float64) @ rotation
    depth = np.full((size, size), np.inf)
    normals = np.zeros((size, size, 3))
    image = np.ones((size, size, 3))
    for index, (centre, radii) in enumerate(solids):
        o, d = (origin - centre) / radii, directions / radii
        a, b, c = (d * d).sum(-1), 2 * (d @ o), o @ o - 1
        root = b * b - 4 * a * c
        t = (-b - np.sqrt(np.maximum(root, 0))) / (2 * a)
        hit = (root > 0) & (t > 0) & (t < depth)
        depth = np.where(hit, t, depth)  # directions have z = -1: t is the depth
        points = origin + t[..., None] * directions
        normal = (points - centre) / radii**2
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        c, s = np.cos(np.deg2rad(shift)), np.sin(np.deg2rad(shift))
        x, y, z = points[..., 0] * c + points[..., 2] * s, points[..., 1], points[..., 2] * c
        z = z - points[..., 0] * s
        texture = 0.8 * np.stack(
            [np.sin(20 * x + 9 * y), np.sin(15 * z), np.cos(25 * y + 8 * x)], -1
        )
        image = np.where(hit[..., None], texture if index == 0 else -1.0, image)
        normals = np.where(hit[..., None], normal, normals)
    return image, normals, np.where(np.isfinite(depth), depth, np.nan)


def ring(views, size, solids=(HEAD,), drift=0.0):
    """(images, normals, depth, poses); view i has its texture turned by i * drift degrees."""
    poses = cameras.orbit(np.arange(views) * 360.0 / views, 5.0)
    # Back and forth, so that the ring's closing pair drifts like any other.
    shifts = drift * (np.arange(views) % 2)
    traced = [trace(p, size, solids, s) for p, s in zip(poses, shifts, strict=True)]
    return *(np.stack(x) for x in zip(*traced, strict=True)), poses


def test_points_and_pixels_are_inverse():
    _, _, depth = trace(cameras.orbit(30.0, 10.0), 48, (HEAD,))
    pose = cameras.orbit(30.0, 10.0)
    points = surface.unproject(depth, pose)
    hit = np.isfinite(depth)
    np.testing.assert_allclose(((points[hit] / HEAD[1]) ** 2).sum(-1), 1.0, atol=1e-5)
    column, row, z = surface.project(points[hit], pose, depth.shape)
    rows, columns = np.nonzero(hit)
    np.testing.assert_allclose(column, columns, atol=1e-3)
    np.testing.assert_allclose(row, rows, atol=1e-3)
    np.testing.assert_allclose(z, depth[hit], atol=1e-6)


def test_consistent_renders_agree():
    images, normals, depth, poses = ring(24, 96)
    found = reprojection.reprojection(images, normals, poses, depth)
    assert found["pairs"].tolist() == [[i, (i + 1) % 24] for i in range(24)]
    assert (found["l1"] < 2e-3).all()  # what bilinear sampling leaves
    assert (found["psnr"] > 48).all()
    assert (found["normals"] < 0.15).all()
    assert ((found["valid"] > 0.7) & (found["valid"] < 1)).all()


def test_drifting_texture_is_seen_in_its_measure():
    measured = []
    for drift in (0.0, 0.5, 1.0, 2.0, 4.0):
        images, normals, depth, poses = ring(24, 64, drift=drift)
        measured.append(reprojection.reprojection(images, normals, poses, depth))
    l1 = np.array([found["l1"] for found in measured])
    psnr = np.array([found["psnr"] for found in measured])
    assert (np.diff(l1, axis=0) > 0).all() and (np.diff(psnr, axis=0) < 0).all()
    assert (l1[-1] > 10 * l1[0]).all()
    # Geometry is what it was.
    for found in measured:
        np.testing.assert_array_equal(found["valid"], measured[0]["valid"])
        np.testing.assert_array_equal(found["normals"], measured[0]["normals"])


def test_turned_normals_are_seen_as_their_angle():
    images, normals, depth, poses = ring(24, 64)
    tangent = np.cross(normals, [0.0, 1.0, 0.0])
    tangent /= np.maximum(np.linalg.norm(tangent, axis=-1, keepdims=True), 1e-9)
    c, s = np.cos(np.deg2rad(10.0)), np.sin(np.deg2rad(10.0))
    normals[1::2] = 0.7 * (c * normals + s * tangent)[1::2]  # of any length
    found = reprojection.reprojection(images, normals, poses, depth)
    np.testing.assert_allclose(found["normals"], 10.0, atol=0.1)
    assert (found["l1"] < 3e-3).all()


def test_what_is_hidden_is_not_compared():
    images, normals, depth, poses = ring(24, 96, (HEAD, NOSE))
    found = reprojection.reprojection(images, normals, poses, depth)
    blind = reprojection.reprojection(images, normals, poses, depth, tolerance=1.0)
    assert (found["psnr"] > 48).all()
    assert (found["valid"] > 0.7).all()
    # From the front the nose hides what the next view shows; there is no nose behind.
    assert (blind["psnr"][[0, 1, 22, 23]] < 30).all()
    np.testing.assert_allclose(blind["psnr"][11:13], found["psnr"][11:13])


def test_another_head_is_not_valid():
    images, normals, depth, poses = ring(8, 48)
    smaller = ring(8, 48, ((HEAD[0], 0.8 * HEAD[1]),))
    for mine, other in zip((images, normals, depth), smaller, strict=False):
        mine[1::2] = other[1::2]
    found = reprojection.reprojection(images, normals, poses, depth)
    same = reprojection.reprojection(*ring(8, 48)[:2], poses, ring(8, 48)[2])
    assert (found["valid"] < 0.5 * same["valid"]).all()


def test_pairs_and_too_little_to_compare():
    images, normals, depth, poses = ring(4, 48)
    found = reprojection.reprojection(images, normals, poses, depth, pairs=[[0, 2], [0, 1]])
    assert np.isnan(found["l1"][0]) and found["valid"][0] == 0  # front and back share nothing
    assert found["valid"][1] > 0.1
    assert reprojection.ring_pairs(2).tolist() == [[0, 1]]


def test_shapes_are_checked():
    images, normals, depth, poses = ring(4, 16)
    with pytest.raises(ValueError, match="normals"):
        reprojection.reprojection(images, normals[:, :8], poses, depth)
    with pytest.raises(ValueError, match="cameras"):
        reprojection.reprojection(images, normals, poses[:3], depth)
    with pytest.raises(ValueError, match="depth"):
        reprojection.reprojection(images, normals, poses, depth[:3])


# --------------------------------------------------------------------------------------------------
# Depth that nobody gives

# Hair on both sides of a face: seen from the front the face lies in a hollow, no silhouette shows it.
FLAT = (HEAD[0], np.array([0.18, 0.25, 0.13]))
CURTAINS = [(np.array([x, 0.0, 0.14]), np.array([0.05, 0.2, 0.07])) for x in (-0.14, 0.14)]


@pytest.fixture(scope="module")
def hollow():
    """24 views of 48 pixels: images, normals, depth, poses."""
    return ring(24, 48, (FLAT, *CURTAINS))


@pytest.fixture
def small_hull(monkeypatch):
    monkeypatch.setattr(surface, "HULL_CELLS", 64)


def errors(found, truth):
    """Of depth, where both know it, in world units; a pixel is 0.013."""
    return abs(found - truth)[np.isfinite(found) & np.isfinite(truth)]


def test_depth_is_found_from_silhouettes_and_normals(hollow, small_hull, monkeypatch):
    _, normals, depth, poses = hollow
    mask = np.isfinite(depth)
    found = surface.depth_from_views(normals, mask, poses)
    assert np.isnan(found[~mask]).all()
    assert np.isnan(found[mask]).mean() < 0.02
    assert np.median(errors(found, depth)) < 0.006
    # The hull alone is too near where the scene is hollow: on the face.
    monkeypatch.setattr(surface, "OFFSETS", np.zeros(1))
    hull = surface.depth_from_views(normals, mask, poses)
    face = (slice(0, 1), slice(16, 32), slice(20, 28))
    assert np.median((hull - depth)[face]) < -0.05
    assert np.median(errors(found[face], depth[face])) < 0.03
    # In fewer places and interpolated between them it is about the same.
    monkeypatch.setattr(surface, "FINEST", 16)
    coarse = surface.depth_from_views(normals, mask, poses)
    assert np.median(errors(coarse, hull)) < 0.01


def test_a_few_wrong_silhouettes_are_outvoted(hollow, small_hull):
    _, normals, depth, poses = hollow
    mask = np.isfinite(depth)
    mask[3, :, :24] = False  # half the head is missing in one of 24 views
    found = surface.depth_from_views(normals, mask, poses)
    assert np.isnan(found[10:20][mask[10:20]]).mean() < 0.02
    assert np.median(errors(found, depth)) < 0.006


def test_drift_is_seen_without_depth_too(small_hull):
    measured = []
    for drift in (0.0, 2.0, 6.0):
        images, normals, _, poses = ring(24, 48, (FLAT, *CURTAINS), drift=drift)
        measured.append(reprojection.reprojection(images, normals, poses))
    l1 = np.array([found["l1"] for found in measured])
    assert l1[0].mean() < 0.02
    assert (np.diff(l1.mean(1)) > 0).all() and (l1[-1] > l1[0]).all()
    for found in measured:
        assert found["normals"].mean() < 4 and found["valid"].mean() > 0.5


def test_views_that_do_not_surround_the_head(hollow, small_hull):
    images, normals, _, poses = hollow
    with pytest.raises(ValueError, match="do not surround it: give their depth"):
        reprojection.reprojection(images[:6], normals[:6], poses[:6])
    with pytest.raises(ValueError, match="these 3 views"):
        reprojection.reprojection(images[::8], normals[::8], poses[::8])
    empty = reprojection.reprojection(images, 0 * normals, poses)
    assert np.isnan(empty["l1"]).all() and (empty["valid"] == 0).all()
