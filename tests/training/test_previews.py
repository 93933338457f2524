"""What training shows of itself: which views, and the truth beside what was made."""

import dataclasses

import jax
import numpy as np
import pytest

from spinmeround_jax import train
from spinmeround_jax.models import parameters
from spinmeround_jax.photo.images import to_uint8
from spinmeround_jax.results import sheet
from spinmeround_jax.training import previews
from tests.support import synthetic_shards
from tests.support.configs import micro_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIDE = 16  # pixels


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a model with 4 views and data with 6: of its ring, 0 and 180 degrees are stored."""
    folder = synthetic_shards.write_rings(tmp_path_factory.mktemp("data") / "heads", views=6)
    config = micro_config(folder)
    model = dataclasses.replace(config.model, latent_mean=(0.0,) * 8, latent_std=(1.0,) * 8)
    return dataclasses.replace(config, model=model)


def tile(picture, row, column, rows, columns):
    """(SIDE, SIDE, 3) of a sheet."""
    x = picture.width - sheet.MARGIN - (columns - column) * SIDE
    y = picture.height - sheet.MARGIN - (rows - row) * (SIDE + sheet.GAP) + sheet.GAP
    return np.asarray(picture)[y : y + SIDE, x : x + SIDE]


def test_views_are_a_ring_that_begins_at_the_front(config):
    first, second = previews.held_out(config, count=9)  # all there are
    assert first.subject != second.subject
    for subject in (first, second):
        assert (subject.yaw[:2] == 0).all() and abs(subject.yaw[3]) == 180
        assert len(subject.yaw) == 1 + 4


def test_the_truth_stands_below_what_was_made(config):
    networks = train.new_model(config).networks
    split = {name: parameters.split(module) for name, module in networks.items()}
    graphdefs = {name: graphdef for name, (graphdef, _) in split.items()}
    params = jax.device_put(
        {name: tensors for name, (_, tensors) in split.items()}, jax.devices()[0]
    )
    (subject, _) = subjects = previews.held_out(config, count=2)
    picture = previews.anchors(graphdefs, params, config, subjects)
    for column, stored in enumerate((True, False, True, False)):
        true = tile(picture, 1, column, 8, 4)
        if stored:
            np.testing.assert_array_equal(true, to_uint8(subject.images[1 + column]))
        else:
            assert (true == sheet.EMPTY).all()
        assert not (tile(picture, 0, column, 8, 4) == sheet.EMPTY).all()

    picture = previews.reconstructions(graphdefs["autoencoder"], params["autoencoder"], subjects)
    np.testing.assert_array_equal(tile(picture, 0, 2, 8, 4), to_uint8(subject.images[3]))
    np.testing.assert_array_equal(tile(picture, 2, 2, 8, 4), to_uint8(subject.normals[3]))
