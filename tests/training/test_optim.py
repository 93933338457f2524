"""Optimizer and moving average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax.config import OptimizerConfig
from spinmeround_jax.training import optim

CONFIG = OptimizerConfig(
    learning_rate=0.1, warmup_steps=10, schedule="cosine", weight_decay=0.5, beta1=0.9,
    beta2=0.99, max_gradient_norm=1.0, ema_decay=0.9, batch_size=1,
)  # fmt: skip


def test_schedule():
    rate = optim.learning_rate(CONFIG, 110)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(60), rate(110)], [0, 0.05, 0.1, 0.05, 0], atol=1e-8
    )
    constant = optim.learning_rate(dataclasses.replace(CONFIG, schedule="constant"), 110)
    np.testing.assert_allclose([constant(5), constant(10), constant(1000)], [0.05, 0.1, 0.1])
    with pytest.raises(ValueError, match="'linear'"):
        optim.learning_rate(dataclasses.replace(CONFIG, schedule="linear"), 110)


def test_only_matrices_decay():
    transform = optim.optimizer(dataclasses.replace(CONFIG, warmup_steps=0), 100)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    state = optim.init(params, transform)
    state, norm = optim.update(
        state, jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), transform, 0.9
    )
    np.testing.assert_allclose(state.params["kernel"], 1.0 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(state.params["bias"], 1.0)
    assert float(norm) == 0.0


def test_clipping_makes_large_gradients_alike():
    transform = optim.optimizer(CONFIG, 100)
    params = {"w": jnp.zeros(3)}

    def moments(scale):
        gradients = {"w": scale * jnp.array([3.0, 0.0, 4.0])}
        return transform.update(gradients, transform.init(params), params)[1]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moments(1.0), moments(1e4)
    )
    small, larger = (moments(scale)[1][0].mu["w"][0] for scale in (0.01, 0.02))
    np.testing.assert_allclose(larger, 2 * small, rtol=1e-5)


def test_moving_average_follows_its_recurrence():
    transform = optim.optimizer(dataclasses.replace(CONFIG, warmup_steps=0), 100)
    state = optim.init({"w": jnp.ones(2)}, transform)
    expected = np.ones(2)
    for step in range(20):
        state, _ = optim.update(state, jnp.ones(()), {"w": state.params["w"]}, transform, 0.6)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-5)
    assert abs(expected - np.asarray(state.params["w"])).max() > 1e-3


def test_first_bad_step_is_remembered():
    transform = optim.optimizer(CONFIG, 100)
    state = optim.init({"w": jnp.ones(2)}, transform)
    for loss, gradient in ((1.0, 1.0), (1.0, np.nan), (np.inf, 1.0)):
        state, _ = optim.update(
            state, jnp.float32(loss), {"w": jnp.full(2, gradient)}, transform, 0.9
        )
    assert int(state.bad_step) == 1 and int(state.step) == 3
