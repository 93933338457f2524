"""FLOPs: closed forms, and an independent count of the paper's model."""

import dataclasses

import pytest

from spinmeround_jax.training import flops
from tests.support.configs import full_config


def test_the_papers_model():
    """7.30 TFLOP for 8 views, 1.86 of them attention: an independent count, see docs/scale.md."""
    assert flops.of_unet(full_config("tpu_v4")) == pytest.approx(7.30e12, rel=0.01)


def test_a_step_is_three_passes_for_each_example_and_the_encoder_where_it_runs():
    config = full_config("quickstart")
    batch = config.optimizer.batch_size
    cached = flops.of_step(config, images=False)
    assert cached == 3 * batch * flops.of_unet(config)
    assert flops.of_step(config, images=True) == cached + batch * flops.of_encoder(config)
    # What is computed twice is not counted twice.
    again = dataclasses.replace(config, remat="blocks")
    assert flops.of_step(again, images=False) == cached
