"""Samplers, guidance and the jitted steps, against closed forms and the released code's outputs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spinmeround_jax import cameras
from spinmeround_jax.diffusion import denoiser, guidance, samplers, schedules
from spinmeround_jax.diffusion.sampling import sample_jointly, sample_normals
from spinmeround_jax.models import MultiViewUNet, UNetConfig
from spinmeround_jax.weights import released
from tests.support import reference_weights
from tests.support.loading import load
from tests.support.paths import GOLDENS

pytestmark = pytest.mark.usefixtures("quick_compilation")


def gaussian(x, sigma):
    """D(x; sigma) where the data are standard normal: the ODE's solution is then known."""
    return x / (1.0 + sigma**2)


def exact(x, sigmas):
    return x * np.sqrt((1.0 + sigmas[-1] ** 2) / (1.0 + sigmas[0] ** 2))


@pytest.mark.parametrize(
    ("name", "factor"), [("euler", 2.0), ("heun", 4.0), ("dpm_solver", 4.0), ("unipc", 8.0)]
)
def test_order_of_convergence(name, factor):
    x = jnp.array([3.0, -1.0, 0.2])

    def error(steps):
        sigmas = schedules.karras_sigmas(steps, 0.01, 10.0)[:-1]  # the last step is first-order
        if name == "heun":  # `heun` makes its last step an Euler one: give it one of no length
            sigmas = np.append(sigmas, sigmas[-1])
        return np.abs(samplers.SAMPLERS[name](gaussian, x, sigmas) - exact(x, sigmas)).max()

    assert error(40) / error(80) == pytest.approx(factor, rel=0.1)
    assert error(80) / error(160) == pytest.approx(factor, rel=0.1)


def test_samplers_turn_noise_into_the_data():
    x = jax.random.normal(jax.random.key(0), (20_000,))
    sigmas = schedules.karras_sigmas(200)
    for name in ("euler", "heun", "dpm_solver", "unipc"):
        sampler = samplers.SAMPLERS[name]
        result = sampler(gaussian, samplers.initial_noise(x, sigmas), sigmas)
        assert float(np.std(result)) == pytest.approx(float(np.std(x)), rel=0.05)
        assert np.corrcoef(result, x)[0, 1] > 0.9999


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_sampling_turns_noise_into_the_data(steps):
    """With the exact function, by which every point of the ODE's path leads to its end."""
    x = jax.random.normal(jax.random.key(0), (2, 10_000))
    sigmas = schedules.consistency_sigmas(steps)
    assert len(sigmas) == steps + 1 and sigmas[0] == 700.0 and (steps == 1 or sigmas[-2] > 0.1)
    result = samplers.consistency(
        lambda x, sigma: x / jnp.sqrt(1.0 + sigma**2), samplers.initial_noise(x, sigmas), sigmas
    )
    np.testing.assert_allclose(np.std(result, axis=1), 1.0, atol=0.03)
    alone = samplers.consistency(
        lambda x, sigma: x / jnp.sqrt(1.0 + sigma**2), samplers.initial_noise(x[1:], sigmas), sigmas
    )
    np.testing.assert_allclose(alone[0], result[1], rtol=1e-6)


def test_evaluations_of_each_sampler():
    for name, expected in (("euler", 10), ("heun", 19), ("dpm_solver", 10), ("unipc", 10)):
        calls = []

        def denoise(x, sigma, calls=calls):
            jax.debug.callback(lambda s: calls.append(float(s)), sigma)
            return gaussian(x, sigma)

        samplers.SAMPLERS[name](denoise, jnp.ones(2), schedules.karras_sigmas(10))
        jax.effects_barrier()
        assert len(calls) == expected
        assert min(calls) > 0.0


def test_guidance_scales():
    def denoise(x, sigma, conditioning):
        return x * conditioning["c"]

    conditional, unconditional = {"c": jnp.full((2, 1), 5.0)}, {"c": jnp.full((2, 1), 2.0)}
    x = jnp.array([[1.0], [-1.0]])
    for scale, slope in ((0.0, 2.0), (1.0, 5.0), (3.5, 2.0 + 3.5 * 3.0)):
        guided = guidance.classifier_free(denoise, conditional, unconditional, scale)
        np.testing.assert_allclose(guided(x, 1.0), slope * x)


def test_autoguidance_leads_away_from_the_weaker_model():
    guided = guidance.autoguidance(lambda x, sigma: 5.0 * x, lambda x, sigma: 2.0 * x, 1.5)
    np.testing.assert_allclose(guided(jnp.ones(2), 1.0), 6.5)


def test_guidance_acts_within_its_interval_only():
    chosen = guidance.on_interval(
        lambda x, sigma: x + 10.0, lambda x, sigma: x, jnp.array([0.5, 2.0])
    )
    for sigma, expected in ((0.4, 0.0), (0.5, 10.0), (2.0, 10.0), (2.1, 0.0)):
        np.testing.assert_allclose(chosen(jnp.zeros(2), jnp.asarray(sigma)), expected)


def test_inpainting_moves_only_what_is_visible():
    known, visible = jnp.array([4.0, 4.0]), jnp.array([1.0, 0.0])

    def towards(strength):
        inpaint = guidance.inpaint_channels(lambda x, sigma: x, known, visible, strength)
        return inpaint(jnp.zeros(2), 1.0)

    np.testing.assert_allclose(towards(0.0), [0.0, 0.0])
    np.testing.assert_allclose(towards(0.25), [1.0, 0.0])
    np.testing.assert_allclose(towards(1.0), [4.0, 0.0])


def test_guidance_1_equals_no_guidance():
    observed = jnp.array([[True, False]])
    conditioning = denoiser.condition(
        jnp.ones((1, 2, 3)),
        observed,
        jnp.ones((1, 2, 4, 4, 2)),
        cameras.orbit([[0.0, 45.0]]),
        "true",
    )
    without = denoiser.unconditional(conditioning, jnp.zeros((1, 2, 3)), jnp.zeros((4, 4, 2)))

    def network(x, c_noise, context):
        return jnp.tanh(x[..., :2] + x[..., -1:] + context[:, :1, :1, None, None] + c_noise[0])

    noise = jax.random.normal(jax.random.key(1), (1, 2, 4, 4, 2))
    sigmas = schedules.karras_sigmas(4, 0.1, 5.0)
    with_, alone, strong = (
        sample_jointly(network, noise, conditioning, branch, sigmas, scale, 1.0, "euler")
        for branch, scale in ((without, 1.0), (None, 9.0), (without, 3.0))
    )
    np.testing.assert_allclose(with_, alone, atol=1e-5)
    assert np.abs(strong - alone).max() > 1e-2
    for result in (with_, alone, strong):
        np.testing.assert_array_equal(result[:, 0], conditioning.observed_latents[:, 0])


# --------------------------------------------------------------------------------------------------
# The released code's outputs


@pytest.fixture(scope="module")
def tiny_unet():
    path = GOLDENS / "tiny_shapes.json"
    shapes = json.loads(path.read_text())["tiny_unet"]
    config = UNetConfig(model_channels=32, context_dim=576)
    unet = nnx.eval_shape(lambda: MultiViewUNet(config, rngs=nnx.Rngs(0)))
    load(unet, released.targets(unet), reference_weights.state_dict(shapes))
    return nnx.split(unet)


def channels_last(array):
    return jnp.moveaxis(jnp.asarray(array), -3, -1)


def test_anchors_are_the_released_code_s(golden, tiny_unet):
    gold, identity = golden("samplers_tiny"), golden("identity_tiny")
    graphdef, state = tiny_unet
    observed = jnp.asarray(gold["is_target"] == 0)[None]
    latent = channels_last(gold["z_input"])[:, None]
    conditional = denoiser.condition(
        jnp.asarray(identity["cond"][:1]),
        observed,
        jnp.broadcast_to(latent, (1, 8, 16, 16, 8)),
        cameras.orbit(gold["yaws_deg"])[None],
        "released",
    )
    grey = channels_last(gold["empty_latent"])[0]
    empty_latent = jnp.concatenate([grey, grey], axis=-1)
    unconditional = denoiser.unconditional(
        conditional, jnp.asarray(identity["uncond"]), empty_latent
    )
    noise = jnp.broadcast_to(channels_last(gold["anchor_noise"])[:, None], (1, 8, 16, 16, 8))
    sigmas = schedules.karras_sigmas(int(gold["num_steps"]), sigma_max=float(gold["sigma_max"]))

    @functools.partial(jax.jit, static_argnums=(7,))
    def sample(state, *arguments):
        return sample_jointly(nnx.merge(graphdef, state), *arguments)

    scale = jnp.asarray(gold["guidance_scale"])
    result = sample(
        state, noise, conditional, unconditional, jnp.asarray(sigmas), scale, 1.0, "euler"
    )
    np.testing.assert_allclose(result[0], channels_last(gold["anchors_out"]), atol=1e-2)


def test_normals_are_the_released_code_s(golden, tiny_unet):
    gold, identity = golden("samplers_tiny"), golden("identity_tiny")
    graphdef, state = tiny_unet
    nothing = jnp.zeros((1, 1, 16, 16, 8))
    conditioning = denoiser.condition(
        jnp.asarray(identity["cond"][:1]),
        jnp.zeros((1, 1), bool),
        nothing,
        cameras.orbit([[0.0]]),
        "released",
    )
    sigmas = schedules.ddpm_sigmas(int(gold["num_steps"]))
    noise = channels_last(gold["normals_noise"])[:, None]
    image_latents = channels_last(gold["z_input"])[:, None, ..., :4]

    @jax.jit
    def sample(state, *arguments):
        return sample_normals(nnx.merge(graphdef, state), *arguments)

    for weight in (1000, 6250):
        strength = jnp.float32(2.0 * weight / nothing.size)
        result = sample(
            state, noise, conditioning, image_latents, jnp.asarray(sigmas), strength, 1.0
        )
        expected = channels_last(gold[f"normals_out_weight{weight}"])
        np.testing.assert_allclose(result[:, 0], expected, atol=1e-3)
