"""The three steps of sampling: which views go together, and all of it with a tiny random model."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.config import NO_ABLATION
from spinmeround_jax.diffusion import view_groups
from spinmeround_jax.diffusion.networks import unit_normals
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.requests import slerp
from tests.support.tiny_model import SAMPLING, TRAJECTORY, inputs, random_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

FRONT = np.zeros((1, 2), np.float32)


# --------------------------------------------------------------------------------------------------
# Groups


def known_views(observed=FRONT, views=8):
    return np.concatenate([observed, view_groups.anchor_angles(observed, views)])


def test_anchors_are_the_paper_s():
    angles = view_groups.anchor_angles(FRONT, 8)
    np.testing.assert_allclose(angles, cameras.anchors())
    assert len(view_groups.anchor_angles(np.zeros((0, 2)), 8)) == 8


def test_further_observed_views_take_the_place_of_their_nearest_anchors():
    observed = np.array([[0, 0], [40, 10], [-100, 0]], np.float32)
    angles = view_groups.anchor_angles(observed, 8)
    np.testing.assert_allclose(angles[:, 0], [90, 135, 180, -135, -45])


@pytest.mark.parametrize(("views", "groups"), [(48, 10), (88, 16)])
def test_every_view_of_a_turntable_is_reused_or_sampled_once(views, groups):
    known, trajectory = known_views(), cameras.turntable(views)
    plan = view_groups.plan_views(known, trajectory, 5)
    assert (plan.reused >= 0).sum() == 8
    np.testing.assert_allclose(
        cameras.angular_distance(known[plan.reused], trajectory)[plan.reused >= 0], 0, atol=1e-3
    )
    assert plan.targets.shape == (groups, 5)
    sampled = [target for group in plan.targets.tolist() for target in dict.fromkeys(group)]
    assert sorted(sampled) == np.flatnonzero(plan.reused < 0).tolist()
    assert (plan.triplets[:, 0] == 0).all()


@pytest.mark.parametrize("pitch", [0.0, 20.0, -35.0])
@pytest.mark.parametrize("views", [48, 88])
def test_targets_see_their_two_nearest_anchors(views, pitch):
    known, trajectory = known_views(), cameras.turntable(views)
    trajectory[:, 1] = pitch
    plan = view_groups.plan_views(known, trajectory, 5)
    for triplet, targets in zip(plan.triplets, plan.targets, strict=True):
        for angles in trajectory[targets]:
            distance = cameras.angular_distance(known[1:], angles)
            chosen = cameras.angular_distance(known[triplet[1:]], angles)
            np.testing.assert_allclose(sorted(chosen), sorted(distance)[:2], atol=1e-2)
        yaws = trajectory[targets][:, 0]
        assert np.ptp((yaws - yaws[0] + 180) % 360) <= 45  # neighbours


@pytest.mark.parametrize(("yaw", "anchors"), [(20, {45, -45}), (30, {45, 90}), (-30, {-45, -90})])
def test_beside_the_input_the_nearest_anchors_are_on_one_side(yaw, anchors):
    trajectory = np.array([[yaw, 0]], np.float32)
    plan = view_groups.plan_views(known_views(), trajectory, 5)
    assert set(known_views()[plan.triplets[0, 1:], 0]) == anchors


def test_any_views_are_grouped_and_padded():
    trajectory = np.array([[30, 10], [-30, 20], [0, 0], [100, -40], [45, 5], [405, 0]], np.float32)
    plan = view_groups.plan_views(known_views(), trajectory, 5)
    assert plan.reused.tolist() == [-1, -1, 0, -1, -1, 1]  # 405 is the anchor at 45
    assert sorted(set(plan.targets.ravel())) == [0, 1, 3, 4]
    assert plan.targets.shape[1] == 5
    for group in plan.targets:
        unique = list(dict.fromkeys(group))
        assert group.tolist() == unique + [unique[-1]] * (5 - len(unique))


def test_observed_views_are_sampled_on_request():
    known, trajectory = known_views(), cameras.turntable(48)
    plan = view_groups.plan_views(known, trajectory, 5, resampled=1)
    assert plan.reused[0] == -1 and (plan.reused >= 0).sum() == 7
    assert 0 in plan.targets and plan.targets.shape == (10, 5)  # which costs no group


def test_nothing_to_sample():
    plan = view_groups.plan_views(known_views(), cameras.anchors(), 5)
    assert plan.triplets.shape == (0, 3)
    assert plan.targets.shape == (0, 5)
    assert (plan.reused > 0).all()


def test_angular_distance():
    assert cameras.angular_distance(np.array([0, 0]), np.array([0, 90])) == pytest.approx(90)
    assert cameras.angular_distance(np.array([179, 0]), np.array([-179, 0])) == pytest.approx(2)
    assert cameras.angular_distance(np.array([10, 90]), np.array([80, 90])) == pytest.approx(
        0, abs=1e-3
    )


# --------------------------------------------------------------------------------------------------
# Pipeline


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def pipeline(model):
    return Pipeline(model, SAMPLING, max_batch=2)


@contextlib.contextmanager
def compilations():
    """Count what XLA compiles meanwhile."""
    events = []

    def listen(name, seconds, **extra):
        if "backend_compile" in name:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_from_portraits_to_views(pipeline):
    images, identities = inputs(2)
    heads = pipeline.spin(images, identities, TRAJECTORY, np.array([1, 2]))
    assert heads.images.shape == heads.normals.shape == (2, 5, 16, 16, 3)
    assert heads.anchor_images.shape == heads.anchor_normals.shape == (2, 7, 16, 16, 3)
    assert heads.observed_normals.shape == (2, 1, 16, 16, 3)
    for picture in (heads.images, heads.normals, heads.anchor_images):
        assert np.isfinite(picture).all()
        assert np.abs(picture).max() <= 1.0 + 1e-6
    lengths = np.linalg.norm(heads.normals, axis=-1)
    assert ((lengths < 1e-6) | (np.abs(lengths - 1) < 1e-4)).all()
    # The input is shown as given, an anchor as sampled, and the heads are not one.
    np.testing.assert_array_equal(heads.images[:, 0], images[:, 0])
    np.testing.assert_array_equal(heads.observed_images, images)
    np.testing.assert_allclose(heads.images[:, 3], heads.anchor_images[:, 0], atol=1e-5)
    assert np.abs(heads.images[0, 1] - heads.images[1, 1]).max() > 1e-2
    assert np.abs(heads.images[0, 1] - heads.images[0, 2]).max() > 1e-3


def test_heads_together_equal_heads_alone(pipeline):
    images, identities = inputs(3)
    seeds = np.array([5, 6, 7])
    together = pipeline.spin(images, identities, TRAJECTORY, seeds)
    for i in range(3):
        alone = pipeline.spin(
            images[i : i + 1], identities[i : i + 1], TRAJECTORY, seeds[i : i + 1]
        )
        np.testing.assert_allclose(alone.images[0], together.images[i], atol=2e-4)
        np.testing.assert_allclose(alone.anchor_images[0], together.anchor_images[i], atol=2e-4)


def test_chunks_make_no_difference(model, pipeline):
    images, identities = inputs(2)
    small = Pipeline(model, SAMPLING, max_batch=1)
    one = small.spin(images, identities, TRAJECTORY, np.array([1, 2]))
    many = pipeline.spin(images, identities, TRAJECTORY, np.array([1, 2]))
    np.testing.assert_allclose(one.images, many.images, atol=2e-4)


def test_same_seed_same_result(pipeline):
    images, identities = inputs(1)
    first, again, other = (
        pipeline.spin(images, identities, TRAJECTORY, np.array([seed])) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.images, again.images)
    assert np.abs(first.images[:, 1] - other.images[:, 1]).max() > 1e-2


def test_a_second_call_compiles_nothing(model):
    images, identities = inputs(2)
    sampling = dataclasses.replace(SAMPLING, steps=2)  # no other test has these programs
    with compilations() as first:
        Pipeline(model, sampling, max_batch=2).spin(
            images, identities, TRAJECTORY, np.array([1, 2])
        )
    assert first
    other_images, other_identities = inputs(2, size=16)
    with compilations() as second:
        Pipeline(
            model, dataclasses.replace(sampling, guidance_scale=2.0, sigma_max=4.0), max_batch=2
        ).spin(other_images[::-1], other_identities, TRAJECTORY + 1, np.array([8, 9]))
    assert not second


def test_progress_adds_up(model):
    images, identities = inputs(2)
    done = []
    pipeline = Pipeline(
        model,
        SAMPLING,
        max_batch=2,
        progress=lambda step, *counts: done.append((step, counts)),
    )
    pipeline.spin(images, identities, TRAJECTORY, np.array([1, 2]))
    assert list(dict.fromkeys(step for step, _ in done)) == ["normals", "anchors", "views"]
    last = dict(done)
    assert last["normals"] == last["anchors"] == (2, 2)
    assert last["views"][0] == last["views"][1] > 2


def test_other_settings_load_nothing_and_compile_nothing(model, pipeline):
    images, identities = inputs(1)
    given = (images, identities, TRAJECTORY, np.array([1]))
    before = pipeline.spin(*given)
    built = Pipeline(model, dataclasses.replace(SAMPLING, guidance_scale=2.0), max_batch=2)
    done = []
    with compilations() as compiled:
        other = pipeline.replace(lambda *told: done.append(told), guidance_scale=2.0)
        replaced = other.spin(*given)
    assert not compiled
    np.testing.assert_array_equal(replaced.images, built.spin(*given).images)
    assert np.abs(replaced.images - before.images).max() > 1e-3
    np.testing.assert_array_equal(pipeline.spin(*given).images, before.images)
    assert other.settings["sampling"]["guidance_scale"] == 2.0
    assert {step: count for step, _, count in done} == other.examples(TRAJECTORY)
    with pytest.raises(ValueError, match="steps"):
        pipeline.replace(steps=1)


def test_new_people_and_identities_alone(pipeline):
    _, identities = inputs(2)
    people = pipeline.spin(None, None, TRAJECTORY, np.array([1, 2]))
    assert people.anchor_images.shape[1] == 8
    assert people.observed_images.shape[1] == 0
    np.testing.assert_allclose(people.images[:, 0], people.anchor_images[:, 0], atol=1e-5)
    assert np.abs(people.images[0] - people.images[1]).max() > 1e-2
    known = pipeline.spin(None, identities, TRAJECTORY, np.array([1, 1]))
    assert np.abs(known.images[0] - known.images[1]).max() > 1e-3  # same noise, other identity


def test_three_observed_views(pipeline):
    images, identities = inputs(1, observed=3)
    angles = np.array([[0, 0], [40, 0], [-100, 0]], np.float32)
    heads = pipeline.spin(images, identities, np.append(TRAJECTORY, angles[1:], 0), [3], angles)
    assert heads.anchor_images.shape[1] == 5
    np.testing.assert_array_equal(heads.images[:, -2:], images[:, 1:])
    one = pipeline.spin(images[:, :1], identities, TRAJECTORY, [3])
    assert np.abs(heads.images[:, 1] - one.images[:, 1]).max() > 1e-3


def test_shared_noise_starts_all_views_alike(model):
    def anchors(shared):
        sampling = dataclasses.replace(SAMPLING, sigma_max=500.0, shared_noise=shared)
        heads = Pipeline(model, sampling, max_batch=1).sample_anchors(
            np.zeros((1, 0, 8, 8, 8), np.float32),
            np.zeros((0, 2), np.float32),
            np.zeros((1, *model_context(model)), np.float32),
            np.array([1], np.uint32),
        )
        return heads[1][0]

    # Three steps from sigma 500 keep a trace of the noise: views that share it are more alike.
    spread = [np.abs(latents - latents[:1]).mean() for latents in (anchors(True), anchors(False))]
    assert spread[0] < spread[1]


def test_temperature_0_leaves_nothing_to_chance_where_a_view_is_observed(model):
    images, identities = inputs(1)

    def spread(temperature, *given):
        sampling = dataclasses.replace(SAMPLING, temperature=temperature)
        pipeline = Pipeline(model, sampling, max_batch=1)
        first, second = (pipeline.spin(*given, TRAJECTORY, [seed]).images for seed in (1, 2))
        return np.abs(first - second).max()

    assert spread(0.0, images, identities) == 0.0
    assert 0.0 < spread(0.25, images, identities) < spread(1.0, images, identities)
    # Without one, the noise alone makes people differ: it is never reduced.
    assert spread(0.0, None, None) > 0.0


@pytest.mark.parametrize("temperature", [-0.1, 1.5, float("nan")])
def test_temperatures_out_of_range_are_refused(model, temperature):
    with pytest.raises(ValueError, match="temperature must be in"):
        Pipeline(model, dataclasses.replace(SAMPLING, temperature=temperature))


def model_context(model):
    return model.config.identity.context_length, model.config.identity.width


def test_heun_is_a_sampler_too(model):
    images, identities = inputs(1)
    heun = dataclasses.replace(SAMPLING, sampler="heun", steps=2)
    heads = Pipeline(model, heun, max_batch=1).spin(images, identities, TRAJECTORY, [0])
    assert np.isfinite(heads.images).all()


@pytest.mark.parametrize("denied", ["no_identity", "no_image"])
def test_ablations_deny_what_they_say(model, denied):
    images, identities = inputs(1)
    ablation = dataclasses.replace(NO_ABLATION, **{denied: True})
    pipeline = Pipeline(model, SAMPLING, ablation, max_batch=2)

    def view(images, identities):
        return pipeline.spin(images, identities, TRAJECTORY, [0]).images[:, 1]

    result = view(images, identities)
    no_effect = {"no_identity": (images, -identities), "no_image": (-images, identities)}
    an_effect = {"no_identity": (-images, identities), "no_image": (images, -identities)}
    np.testing.assert_allclose(view(*no_effect[denied]), result, atol=1e-5)
    assert np.abs(view(*an_effect[denied]) - result).max() > 1e-4


def test_the_ablation_without_normals_observes_none(model, pipeline):
    images, identities = inputs(1)
    denied = Pipeline(model, SAMPLING, dataclasses.replace(NO_ABLATION, no_normals=True), 2)
    image_latents = pipeline.networks.encode(images[:, 0], "image")
    context, seeds = pipeline.networks.contexts(identities, 1), np.array([0], np.uint32)
    for chosen in (pipeline, denied):
        latents = chosen.networks.estimate_normals(
            image_latents, FRONT, context, seeds, np.zeros(1, int)
        )
        np.testing.assert_array_equal(latents[..., :4], image_latents)
        assert latents[..., 4:].any() == (chosen is pipeline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((1, 1, 8, 8, 3))}, "expected images"),
        ({"images": np.zeros((1, 2, 16, 16, 3)), "observed_angles": [[0, 0], [9, 0]]}, "1 or 3"),
        ({"observed_angles": [[10, 0]]}, "first at yaw 0"),
        ({"id_embeddings": np.zeros((1, 100))}, "identities of 512"),
    ],
)
def test_wrong_shapes_are_refused(pipeline, change, message):
    images, identities = inputs(1)
    arguments = {"images": images, "id_embeddings": identities, "observed_angles": [[0, 0]]}
    with pytest.raises(ValueError, match=message):
        pipeline.spin(trajectory=TRAJECTORY, seeds=[0], **{**arguments, **change})


@pytest.mark.parametrize("change", [{"sampler": "ddim"}, {"steps": 1}, {"normals_steps": 0}])
def test_wrong_settings_are_refused(model, change):
    with pytest.raises(ValueError, match=r"must be|at least"):
        Pipeline(model, dataclasses.replace(SAMPLING, **change))


# --------------------------------------------------------------------------------------------------
# Small parts


def test_unit_normals_and_background():
    decoded = np.array([[0, 0, 0.8], [0.3, 0.3, 0.1], [3, 4, 0]], np.float32)
    np.testing.assert_allclose(unit_normals(decoded), [[0, 0, 1], [0, 0, 0], [0.6, 0.8, 0]])


def test_slerp_walks_the_arc_evenly():
    a, b = np.eye(512)[0], np.eye(512)[1]
    arc = slerp(a, 5 * b, 2)
    np.testing.assert_allclose(np.linalg.norm(arc, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(arc[[0, -1]], [a, b], atol=1e-6)
    angles = np.rad2deg(np.arccos((arc[:-1] * arc[1:]).sum(1)))
    np.testing.assert_allclose(angles, 30, atol=1e-3)
    np.testing.assert_allclose(slerp(a, a, 1), [a, a, a])
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, 1)


def test_standardised_latents_decode_to_the_same_pictures(model, pipeline):
    mean, std = tuple(np.linspace(-1, 1, 8).tolist()), tuple(np.linspace(0.5, 2, 8).tolist())
    config = dataclasses.replace(model.config, latent_mean=mean, latent_std=std)
    scaled = Pipeline(dataclasses.replace(model, config=config), SAMPLING, NO_ABLATION, 2)
    images = inputs(2)[0][:, 0]
    halves = [
        [p.networks.encode(images, kind) for kind in ("image", "normals")]
        for p in (scaled, pipeline)
    ]
    for half, (ours, plain) in enumerate(zip(*halves, strict=True)):
        channels = slice(4 * half, 4 * half + 4)
        np.testing.assert_allclose(ours * std[channels] + mean[channels], plain, atol=1e-5)
    decoded = [
        p.networks.decode(np.concatenate(h, axis=-1), np.zeros((len(images), 2)))
        for p, h in zip((scaled, pipeline), halves, strict=True)
    ]
    for ours, plain in zip(*decoded, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4)


def test_an_interval_of_no_step_is_no_guidance_and_one_of_all_is_full_guidance(model, pipeline):
    images, identities = inputs(1)
    given = (images, identities, TRAJECTORY[1:2], np.array([1]))
    plain = pipeline.replace(guidance_scale=1.0).spin(*given).images
    full = pipeline.replace(guidance_scale=2.0).spin(*given).images
    sigmas = SAMPLING.sigma_min, SAMPLING.sigma_max

    def between(low, high):
        limits = {"guidance_sigma_min": low, "guidance_sigma_max": high}
        return pipeline.replace(guidance_scale=2.0, **limits).spin(*given).images

    np.testing.assert_allclose(between(sigmas[0] / 3, sigmas[0] / 2), plain, atol=1e-5)
    np.testing.assert_allclose(between(0.0, sigmas[1]), full, atol=1e-5)
    half = between(0.0, sigmas[1] / 2)
    assert min(np.abs(half - plain).max(), np.abs(half - full).max()) > 1e-3
    with pytest.raises(ValueError, match="guidance_sigma_min"):
        between(2.0, 1.0)


def test_a_guide_leads_away_from_itself(model):
    images, identities = inputs(1)
    given = (images, identities, TRAJECTORY[1:2], np.array([1]))
    sampling = dataclasses.replace(SAMPLING, guidance_scale=2.0)
    alone = Pipeline(model, dataclasses.replace(sampling, guidance_scale=1.0), max_batch=2)
    by_itself = Pipeline(model, sampling, max_batch=2, guide=model)
    np.testing.assert_allclose(by_itself.spin(*given).images, alone.spin(*given).images, atol=1e-4)
    other = dataclasses.replace(model, unet=random_model(seed=1).unet)
    assert (
        np.abs(
            Pipeline(model, sampling, max_batch=2, guide=other).spin(*given).images
            - alone.spin(*given).images
        ).max()
        > 1e-3
    )
    wrong = dataclasses.replace(
        model, config=dataclasses.replace(model.config, normals_frame="camera")
    )
    with pytest.raises(ValueError, match="normals_frame"):
        Pipeline(model, sampling, max_batch=2, guide=wrong)
