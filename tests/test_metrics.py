import jax
import numpy as np
import pytest

from spinmeround_jax import metrics


def test_psnr_of_a_known_error():
    truth = np.zeros((2, 3, 4, 4, 3))
    images = truth + 0.2  # of a range of 2: 20 dB
    np.testing.assert_allclose(metrics.psnr(images, truth), np.full((2, 3), 20.0))


def test_angular_error_is_the_angle_inside_the_mask():
    truth = np.zeros((1, 2, 2, 3))
    truth[..., 2] = 1.0
    tilted = truth.copy()
    tilted[0, 0, 0] = [0.0, np.sin(np.pi / 6), np.cos(np.pi / 6)]
    tilted[0, 1] = [1.0, 0.0, 0.0]  # outside the mask
    mask = np.array([[[True, True], [False, False]]])
    np.testing.assert_allclose(metrics.angular_error(3.0 * tilted, truth, mask), [15.0])
    np.testing.assert_allclose(metrics.angular_error(0.0 * truth, truth, mask), [90.0])
    assert np.isnan(metrics.angular_error(truth, truth, ~mask & mask)).all()


def test_lpips_is_zero_on_itself_grows_with_noise_and_has_gradients():
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    truth = np.cumsum(np.cumsum(truth, 1), 2) / 40.0  # smooth, like a picture
    noise = rng.standard_normal(truth.shape).astype(np.float32)
    distance = jax.jit(metrics.lpips())
    same, little, much = (distance(truth + s * noise, truth) for s in (0.0, 0.05, 0.3))
    np.testing.assert_allclose(same, 0.0, atol=1e-6)
    assert (little > 0.001).all() and (much > 2 * little).all()
    gradient = jax.grad(lambda x: metrics.lpips()(x, truth).sum())(truth + 0.1 * noise)
    assert np.isfinite(gradient).all() and abs(gradient).max() > 0


def test_unknown_lpips_network():
    with pytest.raises(ValueError, match="resnet"):
        metrics.lpips("resnet")
