"""The geometry of aligning photos: proved on heads whose landmarks and cameras are known."""

import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import align, landmarks, pose
from spinmeround_jax.photo.landmarks import FaceError
from spinmeround_jax.photo.pose import Correction, Square


def mean_head(yaw=0.0, pitch=0.0, framing="canonical"):
    """(68, 2) canonical positions of the mean head's landmarks."""
    head = landmarks.load_model().moved(*pose.FRAMINGS[framing])
    return pose.project(head.mean, yaw, pitch)


# --------------------------------------------------------------------------------------------------
# Heads nobody made the model from


@pytest.fixture(scope="module")
def heads():
    """(24, 68, 3) world landmarks of held-out people."""
    pytest.importorskip("embreex", reason="heads need embreex: pip install embreex")
    from data_prep.parametric import assets
    from data_prep.parametric.landmarks import draw_landmarks
    from data_prep.render_heads import HELD_OUT_OFFSET

    try:
        assets.assets_dir()
    except InputError as error:
        pytest.skip(str(error))
    return draw_landmarks(0, range(HELD_OUT_OFFSET, HELD_OUT_OFFSET + 24))


def measure(heads, yaw, points=68, depth=False):
    """(people, 68) pixels of 512 by which crops are off, and (people, 2) degrees of yaw and pitch.

    Each head is seen by a known camera at `yaw` to one side or the other and put into a larger photo with
    random shift, size and roll, of which the aligner gets the landmarks alone.
    """
    rng = np.random.default_rng(0)
    errors, turns = [], []
    for head in heads:
        turn = np.array([yaw * rng.choice([-1, 1]), rng.uniform(-10.0, 10.0)])
        seen = pose.project(head, *turn)
        placed = Square(rng.uniform(400, 1600, 2), rng.uniform(300, 1500), rng.uniform(-35, 35))
        found = placed.to_photo(seen)
        if depth:  # as insightface's 1k3d68 gives it
            found = np.column_stack([found, placed.side * (head @ cameras.orbit(*turn)[2, :3])])
        fit = pose.fit(found if points == 68 else landmarks.FIVE_OF_68 @ found)
        there = fit.square.from_photo(placed.to_photo(seen))
        errors.append(align.SIZE * np.linalg.norm(there - seen, axis=1))
        turns.append(np.array([fit.yaw, fit.pitch]) - turn)
    return np.array(errors), np.array(turns)


def test_crops_return_to_the_canonical_framing(heads):
    assert np.median(measure(heads, yaw=0.0, depth=True)[0]) < 2.0
    for depth in (True, False):
        errors, turns = measure(heads[:12], yaw=45.0, depth=depth)
        assert np.median(errors) < 8.0
        assert np.abs(turns).mean() < 2.0
    # Without depth, how far a head is tilted and how high it sits are told apart less well.
    assert np.median(measure(heads, yaw=0.0)[0]) < 3.5


def test_five_landmarks_do(heads):
    errors, turns = measure(heads[:12], yaw=20.0, points=5)
    assert np.median(errors) < 20.0
    # Better than not looking: the mean head in FFHQ's square, at its mean size and place.
    assert np.abs(turns).mean() < 6.0


def test_landmarks_are_where_the_renderer_draws_them(heads):
    """The tip of the nose of a rendered head is where project() puts it: one camera convention."""
    from data_prep.parametric.head import build_head
    from data_prep.parametric.landmarks import world_landmarks
    from data_prep.parametric.people import sample_person
    from data_prep.parametric.template import part
    from data_prep.rendering import render, shading

    head = build_head(sample_person(3), 0)
    faces = part("skin", 0).faces
    grey = np.full((len(head.skin), 3), 0.4)
    mesh = render.Mesh(
        head.placement.to_world(head.skin), faces, head.normals, grey, grey[:, 0], shading.CLOTH
    )
    scene = render.Scene([mesh], shading.make_light(30, 30, 1.0, 0.0))
    points = world_landmarks(head)[[30, 8, 36, 45, 48, 54]]
    for yaw, pitch in ((0, 0), (30, 10)):
        view = render.render_view(scene, cameras.orbit(yaw, pitch), 128)
        columns, rows = (pose.project(points, yaw, pitch) * 128).astype(int).T
        distances = np.linalg.norm(view.positions[rows, columns] - points, axis=1)
        assert np.nanmedian(distances) < 0.01
        assert distances[0] < 0.01


# --------------------------------------------------------------------------------------------------
# The fit


@pytest.mark.parametrize(("yaw", "pitch"), [(0, 0), (25, -8), (-45, 10), (60, 0)])
@pytest.mark.parametrize("framing", list(pose.FRAMINGS))
def test_the_mean_head_is_found(yaw, pitch, framing):
    placed = Square(np.array([700.0, 420.0]), 380.0, -27.0)
    head = pose.fit(placed.to_photo(mean_head(yaw, pitch, framing)), framing)
    assert head.yaw == pytest.approx(yaw, abs=1.0)
    assert head.pitch == pytest.approx(pitch, abs=1.5)
    assert head.square.side == pytest.approx(380.0, rel=0.01)
    assert head.square.roll == pytest.approx(-27.0, abs=0.5)
    np.testing.assert_allclose(head.square.centre, placed.centre, atol=4.0)
    assert head.error < 0.002


def test_roll_of_any_angle_and_bad_points():
    for roll in (90.0, 180.0, -120.0):
        placed = Square(np.array([300.0, 300.0]), 500.0, roll)
        found = placed.to_photo(mean_head(10))
        found[40] += 60.0  # a landmark gone astray
        head = pose.fit(found)
        assert abs((head.square.roll - roll + 180) % 360 - 180) < 4.0
        assert abs(head.yaw - 10) < 6.0


@pytest.mark.parametrize(
    "points", [np.zeros((5, 2)), np.full((68, 2), np.nan), np.zeros((7, 2)), np.zeros(10)]
)
def test_no_landmarks(points):
    with pytest.raises(FaceError):
        pose.fit(points)


def test_square_there_and_back():
    square = Square(np.array([10.0, 20.0]), 8.0, 90.0)
    # A quarter clockwise: the upper side of the square is on the right in the photo.
    np.testing.assert_allclose(square.corners, [[14, 16], [14, 24], [6, 24], [6, 16]], atol=1e-9)
    points = np.random.default_rng(0).uniform(-1, 2, (5, 2))
    np.testing.assert_allclose(square.from_photo(square.to_photo(points)), points)


def test_a_correction_centred_on_a_point_of_the_crop():
    square, by = Square(np.array([10.0, 20.0]), 8.0, 30.0), Correction(0.1, -0.2, 1.5, -70.0)
    clicked = square.corrected(by).to_photo(np.array([0.9, 0.3]))
    moved = square.corrected(by.centred(0.9, 0.3))
    np.testing.assert_allclose(moved.centre, clicked)
    assert (moved.side, moved.roll) == (12.0, -40.0)


def test_ffhq_square():
    """The example by hand: eyes 10 apart, mouth 12 below them."""
    face = np.array([[45, 50], [55, 50], [50, 56], [46, 62], [54, 62]], float)
    square = pose.ffhq_square(face)
    np.testing.assert_allclose(square.centre, [50, 50 + 1.2])
    assert square.side == pytest.approx(2 * 1.8 * 12)
    assert square.roll == 0.0


# --------------------------------------------------------------------------------------------------
# The crop


def pattern(width, height):
    """A smooth picture whose value says where it is."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    planes = [255 * x / width, 255 * y / height, np.full_like(x, 60), np.full_like(x, 255)]
    return np.rint(np.stack(planes, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize("side", [40.0, 64.0, 150.0, 700.0])
def test_the_crop_shows_the_square(side):
    photo = pattern(1000, 1000)
    square = Square(np.array([480.0, 520.0]), side, 20.0)
    crop = align.crop(photo, square, 64)
    steps = (np.arange(64) + 0.5) / 64
    grid = np.stack(np.meshgrid(steps, steps), axis=-1)
    inside = (square.corners > 0).all() and (square.corners < [1000, 1000]).all()
    assert inside
    expected = square.to_photo(grid) / [1000, 1000]
    np.testing.assert_allclose(crop[..., :2], expected, atol=0.006)
    np.testing.assert_allclose(
        crop[..., 2:], np.broadcast_to([60 / 255, 1.0], (64, 64, 2)), atol=2e-3
    )


def test_shrinking_does_not_alias():
    photo = np.full((1024, 1024, 4), 255, np.uint8)
    photo[:, ::2, :3] = 0  # stripes one pixel wide
    crop = align.crop(photo, Square(np.array([512.0, 512.0]), 1000.0, 0.0), 100)
    np.testing.assert_allclose(crop[..., 0], 0.5, atol=0.03)


def test_outside_is_mirrored_and_blurred():
    photo = pattern(200, 200)
    photo[:, ::2, :3] //= 2
    crop = align.crop(photo, Square(np.array([0.0, 100.0]), 200.0, 0.0), 200)
    left, right = crop[:, :100], crop[:, 100:]
    np.testing.assert_allclose(right[..., :3], photo[:, :100, :3] / 255, atol=3e-3)
    mirrored = right[:, ::-1]
    assert np.abs(left[:, :90] - mirrored[:, :90]).mean() < 0.1
    steps = np.abs(np.diff(left[:, :80, 0], axis=1)).mean()
    assert steps < 0.2 * np.abs(np.diff(mirrored[:, :80, 0], axis=1)).mean()


def test_transparent_pixels_have_no_colour():
    photo = np.zeros((100, 100, 4), np.uint8)
    photo[..., 1] = 255  # transparent green
    photo[30:70, 30:70] = (200, 0, 0, 255)
    crop = align.crop(photo, Square(np.array([50.0, 50.0]), 64.0, 10.0), 128)
    solid = crop[..., 3] > 0.02
    assert crop[solid][:, 1].max() < 0.05
    assert 0.3 < solid.mean() < 0.6


# --------------------------------------------------------------------------------------------------
# Which photos are refused


def found_at(centre, side, photo=(1000, 1000), yaw=0.0, points=68, framing="canonical"):
    square = Square(np.array(centre, float), side, 5.0)
    seen = square.to_photo(mean_head(yaw, framing=framing))
    return align.align(seen if points == 68 else landmarks.FIVE_OF_68 @ seen, photo, framing)


def test_a_good_photo_has_no_notes():
    alignment = found_at((500, 500), 600)
    assert alignment.notes == ()
    assert alignment.head_pixels == pytest.approx(0.58 * 600, rel=0.02)
    assert alignment.padded == 0.0
    assert found_at((500, 500), 420, framing="panohead").notes == ()


@pytest.mark.parametrize("points", [5, 68])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"centre": (80, 500), "side": 600}, "cut by the border"),
        ({"centre": (500, 930), "side": 600}, "cut by the border"),
        ({"centre": (500, 500), "side": 90}, "only 52 pixels tall"),
        ({"centre": (500, 500), "side": 600, "yaw": 84.0}, "turned by"),
    ],
)
def test_refused(arguments, message, points):
    with pytest.raises(FaceError, match=message):
        found_at(**arguments, points=points)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"centre": (500, 100), "side": 600}, "% of the head is outside"),
        ({"centre": (500, 500), "side": 200}, "only 116 pixels"),
        ({"centre": (500, 500), "side": 600, "yaw": 55.0}, "frontal photo works better"),
    ],
)
def test_remarked_upon(arguments, message):
    (note,) = found_at(**arguments).notes
    assert message in note


def test_points_that_are_no_face():
    rng = np.random.default_rng(0)
    with pytest.raises(FaceError, match="not those of a face"):
        align.align(rng.uniform(300, 700, (68, 2)), (1000, 1000))
    five = landmarks.FIVE_OF_68 @ Square(np.array([500.0, 500.0]), 600.0, 0.0).to_photo(mean_head())
    for order in ([1, 0, 2, 3, 4], [3, 4, 2, 0, 1]):
        with pytest.raises(FaceError, match="in order"):
            align.align(five[order], (1000, 1000))


def test_a_correction_moves_along_the_sides_of_the_square():
    points = 200.0 + 400.0 * mean_head()[:, :2]
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])  # the photo lies on its side
    points = (points - 400.0) @ turn + 400.0
    fitted = align.align(points, (800, 800)).head.square
    by = pose.Correction(right=0.1, down=-0.2, size=1.5, roll=10.0)
    square = align.align(points, (800, 800), correction=by).head.square
    assert square.side == pytest.approx(1.5 * fitted.side)
    assert square.roll == pytest.approx(fitted.roll + 10.0)
    np.testing.assert_allclose(fitted.from_photo(square.centre), [0.6, 0.3])
