import jax
import jax.numpy as jnp
import numpy as np

from spinmeround_jax.diffusion import preconditioning, schedules


def test_sigmas_match_the_goldens(golden):
    reference = golden("schedules")
    for ours, name in [
        (schedules.karras_sigmas(50), "edm_50_sigma_max_700"),
        (schedules.karras_sigmas(18, sigma_max=80.0), "edm_18_sigma_max_80"),
        (schedules.ddpm_sigmas(50), "ddpm_50"),
        (schedules.ddpm_sigmas(1000), "ddpm_1000"),
    ]:
        np.testing.assert_allclose(ours, reference[name], rtol=1e-5, err_msg=name)


def test_preconditioning_matches_the_goldens(golden):
    reference = golden("schedules")
    sigma = jnp.asarray(reference["sigma"])
    for name in ("c_skip", "c_out", "c_in", "c_noise"):
        ours = getattr(preconditioning, name)(sigma)
        np.testing.assert_allclose(ours, reference[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_training_sigmas_are_lognormal_and_shifted_by_the_number_of_targets():
    targets = jnp.array([1, 7, 5])
    sigma = schedules.lognormal_sigmas(jax.random.key(0), (20_000, 3), -0.5, 1.3, targets)
    logs = np.log(np.asarray(sigma, np.float64))
    np.testing.assert_allclose(logs.mean(0), -0.5 + 0.5 * np.log([1, 7, 5]), atol=0.04)
    np.testing.assert_allclose(logs.std(0), 1.3, atol=0.03)
