"""Parametric heads: determinism, geometry of cameras and normals, and the command line."""

import dataclasses

import numpy as np
import pytest

from data_prep import factory, render_heads, rendered_identity, workers
from data_prep.parametric import occlusion, people
from data_prep.parametric.head import build_head
from data_prep.parametric.subjects import build_scene
from data_prep.rendering import environments, render, shading, viewpoints
from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.photo.pose import FRAMINGS
from tests.support import (
    needs_heads,  # noqa: F401
    synthetic_shards,
)

SIZE = 48


@pytest.fixture(scope="module")
def bald():
    person = dataclasses.replace(
        people.sample_person(3),
        hair_style="bald",
        beard_style="none",
        glasses="none",
        hat="none",
        place="studio",
    )
    return build_scene(person, SIZE)


def sphere_scene(radius=0.2):
    steps = 48
    theta, phi = np.meshgrid(
        np.linspace(0, np.pi, steps), np.linspace(0, 2 * np.pi, 2 * steps), indexing="ij"
    )
    normals = np.stack(
        [np.sin(theta) * np.cos(phi), np.cos(theta), np.sin(theta) * np.sin(phi)], -1
    ).reshape(-1, 3)
    row = 2 * steps
    a = (np.arange(steps - 1)[:, None] * row + np.arange(row - 1)).reshape(-1)
    faces = np.concatenate(
        [np.stack([a, a + 1, a + row + 1], 1), np.stack([a, a + row + 1, a + row], 1)]
    )
    grey = np.full((len(normals), 3), 0.4)
    mesh = render.Mesh(radius * normals, faces, normals, grey, grey[:, 0], shading.CLOTH)
    return render.Scene([mesh], shading.make_light(30, 30, 1.0, 0.0))


def project(pose, points, size):
    """(n, 3) world points -> (n, 2) pixel coordinates (column, row), centres at +0.5."""
    camera = points @ pose[:3, :3].T + pose[:3, 3]
    scaled = cameras.FOCAL * size * camera[:, :2] / -camera[:, 2:]
    return scaled * [1, -1] + size / 2


def test_same_seed_same_person_and_pixels():
    first, second = people.sample_person(5), people.sample_person(5)
    assert first.hair_style == second.hair_style and np.array_equal(first.shape, second.shape)
    views = [
        render.render_view(build_scene(person, 32)[0], cameras.orbit(30, 10), 32)
        for person in (first, second)
    ]
    assert np.array_equal(views[0].rgba, views[1].rgba)
    assert np.array_equal(views[0].normals, views[1].normals)


def test_seeds_differ_and_all_are_adults():
    drawn = [people.sample_person(seed) for seed in range(60)]
    assert all(18 <= person.age <= 80 for person in drawn)
    assert all(person.beard_style == "none" for person in drawn if person.male < 0.5)
    assert len({person.hair_style for person in drawn}) >= 6


def test_colours_are_those_of_all_people():
    """Nothing but the picture tells the colours: not ancestry, age or sex."""
    drawn = [people.sample_person(seed) for seed in range(400)]
    ancestry = np.array([person.races for person in drawn])[:, :2]
    facts = np.column_stack([ancestry, [(p.male, p.age) for p in drawn]])
    colours = np.array(
        [
            [p.skin_tone, *p.hair_colour, *p.natural_hair_colour, *p.iris_colour, *p.cloth_colour]
            for p in drawn
        ]
    )
    both = np.corrcoef(facts, colours, rowvar=False)[: facts.shape[1], facts.shape[1] :]
    assert abs(both).max() < 0.2
    red, green, blue = np.array([p.hair_colour for p in drawn]).T
    assert np.quantile(red + green + blue, 0.1) < 0.6 and np.quantile(red + green + blue, 0.9) > 1.6
    assert (red > 1.8 * green).mean() > 0.1 and (blue > 1.2 * red).mean() > 0.02


def test_drawn_viewpoints_begin_with_anchors_and_front():
    views = viewpoints.viewpoints()
    chosen = [viewpoints.drawn(views, 24, np.random.default_rng(seed)) for seed in range(2)]
    assert all(len(set(numbers.tolist())) == 24 for numbers in chosen)
    assert chosen[0][:8].tolist() == list(viewpoints.ANCHOR_INDICES)
    frontal = np.flatnonzero((np.abs(views) <= viewpoints.FRONTAL).all(axis=1))
    assert set(frontal) <= set(chosen[0][: len(frontal) + 7])
    fixed = len(frontal) + 7
    np.testing.assert_array_equal(chosen[0][:fixed], chosen[1][:fixed])
    assert set(chosen[0][fixed:]) != set(chosen[1][fixed:])
    for count in (fixed - 1, 126):
        with pytest.raises(ValueError, match="can be drawn"):
            viewpoints.drawn(views, count, np.random.default_rng(0))


def test_viewpoints_hold_anchors_and_ring():
    views = viewpoints.viewpoints()
    assert views.shape == (125, 2)
    anchors = views[list(viewpoints.ANCHOR_INDICES)]
    assert anchors[:, 0].tolist() == [0, 45, 90, 135, 180, -135, -90, -45]
    assert not anchors[:, 1].any()
    np.testing.assert_allclose(np.sort(views[:48, 0] % 360), np.arange(48) * 7.5)
    assert views[:, 1].min() >= -25 and views[:, 1].max() <= 40
    assert (views[:, 0] > -180).all() and (views[:, 0] <= 180).all()
    assert len(np.unique(views.round(6), axis=0)) == 125


def test_sphere_normals_match_the_formula():
    pose = cameras.orbit(40, 20)
    view = render.render_view(sphere_scene(), pose, SIZE)
    inside = view.rgba[..., 3] == 255
    expected = view.positions[inside] / np.linalg.norm(
        view.positions[inside], axis=1, keepdims=True
    )
    assert (
        np.abs(view.normals[inside] - expected).max() < 0.1
    )  # mean over the pixel, not its centre
    assert np.abs(view.normals[inside] - expected).mean() < 0.01
    # Coverage is the disc's area: of angular radius asin(r / distance).
    radius = cameras.FOCAL * SIZE * np.tan(np.arcsin(0.2 / cameras.RADIUS))
    area = view.rgba[..., 3].sum() / 255
    assert area == pytest.approx(np.pi * radius**2, rel=0.01)


def test_head_normals_agree_with_depth(bald):
    scene, _ = bald
    view = render.render_view(scene, cameras.orbit(0, 0), 96)
    p = view.positions
    right, down = p[1:-1, 2:] - p[1:-1, :-2], p[2:, 1:-1] - p[:-2, 1:-1]
    expected = np.cross(down, right)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    flat = np.isfinite(expected).all(-1) & (np.abs(right[..., 2]) + np.abs(down[..., 2]) < 0.02)
    agreement = (view.normals[1:-1, 1:-1] * expected).sum(-1)[flat]
    assert flat.sum() > 500 and np.median(agreement) > 0.99
    hit = view.rgba[..., 3] > 0
    np.testing.assert_allclose(np.linalg.norm(view.normals[hit], axis=-1), 1, atol=1e-3)
    assert not view.normals[~hit].any()


def test_alpha_is_straight():
    view = render.render_view(sphere_scene(), cameras.orbit(0, 0), SIZE)
    alpha = view.rgba[..., 3]
    edge = (alpha > 0) & (alpha < 255)
    assert edge.any() and (view.rgba[alpha == 0, :3] == 255).all()
    # The edge's colour is the surface's, not mixed with the white background.
    assert view.rgba[edge, :3].max() < 235
    assert not view.soft_normals[alpha == 0].any()


@pytest.mark.parametrize("yaw,pitch", [(0, 0), (30, 20), (-45, -10)])
def test_nose_tip_is_where_the_camera_says(bald, yaw, pitch):
    scene, head = bald
    pose = cameras.orbit(yaw, pitch).astype(np.float64)
    nose = head.placement.to_world(head.landmarks[2:3])
    column, row = project(pose, nose, SIZE)[0].astype(int)
    view = render.render_view(scene, pose, SIZE)
    pixel = cameras.RADIUS / cameras.FOCAL / SIZE
    window = view.positions[row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3)
    assert np.nanmin(np.linalg.norm(window - nose, axis=1)) < 1.5 * pixel


def test_head_fills_the_frame_as_a_portrait(bald):
    scene, head = bald
    view = render.render_view(scene, cameras.orbit(0, 0), SIZE)
    rows = np.flatnonzero((view.rgba[..., 3] > 127).any(axis=1))
    assert 0.12 < rows[0] / SIZE < 0.3  # the bald crown; hair needs the room above
    assert rows[-1] == SIZE - 1  # neck and shoulders leave at the bottom
    eyes = head.placement.to_world(head.landmarks[:2])
    assert eyes[0, 0] < 0 < eyes[1, 0] and (eyes[:, 2] > 0.05).all()


@pytest.mark.parametrize("framing", ["close", "panohead"])
def test_framings_are_those_that_photos_are_prepared_with(bald, framing):
    _, head = bald
    zoom, shift = FRAMINGS[framing]
    moved = build_head(head.person, head.level, framing)
    expected = head.placement.to_world(head.skin) * zoom + shift
    np.testing.assert_allclose(moved.placement.to_world(moved.skin), expected, atol=1e-6)


def test_positive_yaw_shows_the_side_at_positive_x(bald):
    scene, _ = bald
    view = render.render_view(scene, cameras.orbit(90, 0), SIZE)
    hit = np.isfinite(view.positions[..., 0])
    # A camera at +x sees surfaces that look to +x, and +z (the face) on the picture's left.
    assert view.normals[hit][:, 0].mean() > 0.4
    half = SIZE // 2
    assert view.normals[:half, :half, 2].sum() > 0 > view.normals[:half, half:, 2].sum()


def test_a_rendered_subject_is_what_the_writer_takes(tmp_path):
    source = render_heads.ParametricHeads(8, 0, size=32, seed=0, views=2, samples=1)
    (job,) = factory.plan(source, tmp_path, 8)
    job = dataclasses.replace(job, subjects=job.subjects[7:])
    factory.write_shard(job, workers.made(source.records, job.subjects, workers=1))
    index = shards.read_index(job.path)
    assert index.subjects.tolist() == ["parametric-0-000007"]
    np.testing.assert_array_equal(
        index.world_to_camera[0], cameras.orbit(*viewpoints.viewpoints(2).T)
    )
    pixels = records.decode_image(index.read_views(0, [0])[0].image, 32, "here")
    assert 0.2 < (pixels[..., 3] > 127).mean() < 0.9


def test_subjects_have_views_of_their_own_and_held_out_ones_all():
    source = render_heads.ParametricHeads(2, 1, 32, seed=0, views=125, samples=1, train_views=16)
    train, other, held_out = (
        [(record.yaw, record.pitch) for record in source.records(name)]
        for name in (*source.subjects()["train"], *source.subjects()["held_out"])
    )
    assert len(train) == len(other) == 16 and train[:14] == other[:14] and train != other
    np.testing.assert_allclose(held_out, viewpoints.viewpoints(), atol=1e-5)
    assert source.manifest()["views"] == 16 and source.manifest()["split_views"] == {
        "held_out": 125
    }


def test_identity_is_of_the_person_not_of_the_light():
    bald = {"hair_style": "bald", "glasses": "none", "hat": "none", "expression": {}}
    one, two = (dataclasses.replace(people.sample_person(seed), **bald) for seed in (3, 4))
    lit = dataclasses.replace(one, place="city", light_side=70.0, smile=0.6)
    vectors = [rendered_identity.embed(build_scene(p, 64)[0]) for p in (one, lit, two)]
    assert all(records.is_identity(vector) and vector.any() for vector in vectors)
    assert vectors[0] @ vectors[1] > 0.6 > vectors[0] @ vectors[2] + 0.2


def test_who_shows_no_face_has_no_identity():
    vector = rendered_identity.embed(sphere_scene())
    assert records.is_identity(vector) and not vector.any()


def test_light_of_a_place_turns_and_is_exposed():
    place = environments.table()["sunset"]
    straight, turned = (shading.place_light(place, turn, 1.0, 0.0) for turn in (0.0, 90.0))
    directions = occlusion.sphere_directions(50)
    np.testing.assert_allclose(
        turned.ambient(environments.turn(directions, 90.0)) / straight.ambient(directions),
        np.broadcast_to(turned.key_colour / straight.key_colour, (50, 3)),
        rtol=1e-4,
    )
    np.testing.assert_allclose(turned.key, environments.turn(straight.key, 90.0), atol=1e-6)
    neutral = shading.place_light(place, 0.0, 1.0, 1.0)
    front = np.array([[0.0, 0.0, 1.0]])
    lit = [x.ambient(front)[0] + max(x.key[2], 0) * x.key_colour for x in (straight, neutral)]
    assert np.ptp(lit[1]) < 0.5 * np.ptp(lit[0])
    assert 0.5 < lit[1].mean() < 1.6


def test_light_from_a_map_is_where_the_map_is_bright():
    radiance = np.full((32, 64, 3), 0.2, np.float32)
    radiance[8, 16] = (400.0, 300.0, 200.0)  # 47 degrees up, from +x
    light = environments.derive(radiance)
    assert np.degrees(np.arccos(light.lamp @ shading.direction(92.8, 42.2))) < 3
    assert light.lamp_colour[0] > light.lamp_colour[1] > light.lamp_colour[2] > 0
    # What is left is the even grey of the rest.
    shares = environments.basis(occlusion.sphere_directions(20)) @ light.irradiance
    np.testing.assert_allclose(shares, shares.mean(), rtol=0.02)


def test_many_rays_and_few_agree():
    """Rays of one triangle and pixel are shaded once: that must not show."""
    scene, _ = build_scene(people.sample_person(11), SIZE)
    pose = cameras.orbit(20, 5)
    few, many = (render.on_white(render.render_view(scene, pose, SIZE, k).rgba) for k in (4, 12))
    error = np.mean((few.astype(float) - many) ** 2)
    assert 10 * np.log10(255**2 / error) > 35


def test_the_overview_lies_on_white():
    rgba = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    rgba[0, ..., 3], rgba[1, ..., 3] = 0, 255
    pixels = render.on_white(rgba)
    alpha = rgba[..., 3:] / 255.0
    np.testing.assert_allclose(pixels, rgba[..., :3] * alpha + 255 * (1 - alpha), atol=1.0)
    assert (pixels[0] == 255).all() and (pixels[1] == rgba[1, :, :3]).all()


# --------------------------------------------------------------------------------------------------
# The command, whose files do not depend on what is in the pictures


@pytest.fixture
def run_cli(monkeypatch):
    def subject_records(source, name):
        views = synthetic_shards.make_records(int(name[-1]), source.views, source.size)
        return [dataclasses.replace(view, subject=name) for view in views]

    monkeypatch.setattr(render_heads.ParametricHeads, "records", subject_records)

    def run(folder, *more):
        command = "--subjects 2 --held-out 1 --size 32 --views 2 --workers 1 --shard-subjects 1"
        return render_heads.main(["--out", str(folder), *command.split(), "--preview", "", *more])

    return run


def test_cli_writes_and_resumes(tmp_path, run_cli, capsys):
    run_cli(tmp_path)
    paths = sorted(tmp_path.glob("*.tfrecord"))
    assert [s.name.split("-")[0] for s in paths] == ["held_out", "train", "train"]
    manifest = read_manifest(tmp_path)
    assert manifest["views"] == 2 and manifest["image_size"] == 32
    kept, lost = paths[1], paths[2]
    subjects = [str(shards.read_index(s).subjects[0]) for s in paths]
    assert len(set(subjects)) == 3

    # As after a kill: one shard missing, a temporary file in its place.
    before = lost.read_bytes()
    stamp = kept.stat().st_mtime_ns
    lost.rename(lost.with_name(f".{lost.name}.tmp"))
    run_cli(tmp_path)
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == stamp
    assert run_cli(tmp_path, "--seed", "1") == 1
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff{", b"3", b"[1]", b"[" * 100_000])
def test_damaged_settings_are_named_and_left_alone(tmp_path, run_cli, capsys, content):
    path = tmp_path / "render_settings.json"
    path.write_bytes(content)
    assert run_cli(tmp_path) == 1
    error = capsys.readouterr().err
    assert "render_settings.json: " in error and "damaged: restore it" in error
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [content]


def test_too_few_training_views_are_wrong_usage(tmp_path, run_cli, capsys):
    assert run_cli(tmp_path, "--views", "125", "--train-views", "3") == 2
    assert "--train-views 3" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seed", "--held-out"])
def test_negative_numbers_are_wrong_usage(tmp_path, run_cli, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_cli(tmp_path, option, "-1")
    assert "'-1': expected a whole number, at least 0" in capsys.readouterr().err
