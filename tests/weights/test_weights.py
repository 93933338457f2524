"""Tables of names: the release's and diffusers' against our networks, strict both ways."""

import dataclasses
import gzip
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import tpu_v4
from spinmeround_jax import convert
from spinmeround_jax.config import from_mapping
from spinmeround_jax.models import (
    Autoencoder,
    AutoencoderConfig,
    ModelConfig,
    parameters,
)
from spinmeround_jax.weights import diffusers, mapping, released
from tests.support import reference_weights
from tests.support.loading import load
from tests.support.paths import GOLDENS

SMALL_AUTOENCODER = AutoencoderConfig(channels=8, channel_mult=(1, 2), res_blocks=1, norm_groups=4)


@pytest.fixture(scope="module")
def full_size():
    return convert.networks_of(ModelConfig.full_size())


def shapes(recorded):
    return {name: tuple(shape) for name, shape in recorded.items()}


def test_full_size_names_and_shapes_are_those_of_the_release(full_size):
    recorded = json.loads((GOLDENS / "released_checkpoint_shapes.json").read_text())
    found = {}
    for module in full_size.values():
        found |= mapping.source_shapes(released.targets(module))
    assert found == shapes(recorded)


@pytest.mark.parametrize(
    ("network", "theirs"), [("unet", "unet"), ("autoencoder", "vae"), ("identity", "text")]
)
def test_full_size_names_and_shapes_are_those_of_diffusers(full_size, network, theirs):
    """The golden is the state_dict of diffusers 0.42.1 and transformers 5.23.0 for SD 1.5."""
    with gzip.open(GOLDENS / "diffusers_shapes.json.gz") as file:
        recorded = shapes(json.load(file)[theirs])
    found = mapping.source_shapes(diffusers.targets(full_size[network], recorded))
    assert found == recorded
    if network == "identity":  # as transformers 4 wrote it
        prefixed = {f"text_model.{name}": shape for name, shape in recorded.items()}
        assert mapping.source_shapes(diffusers.targets(full_size[network], prefixed)) == prefixed


def test_full_size_unet_has_the_papers_parameter_count(full_size):
    leaves = jax.tree.leaves(nnx.state(full_size["unet"]))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 859_961_608
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_the_paper_config_has_the_released_model():
    ours = from_mapping(ModelConfig, tpu_v4.get_config().model)
    assert dataclasses.replace(ours, normals_frame="world") == ModelConfig.full_size()


@pytest.mark.parametrize(
    ("release", "theirs"),
    [  # pairs known from diffusers' documentation of latent diffusion's blocks
        ("input_blocks.4.0.emb_layers.1.bias", "down_blocks.1.resnets.0.time_emb_proj.bias"),
        ("input_blocks.6.0.op.weight", "down_blocks.1.downsamplers.0.conv.weight"),
        ("middle_block.2.out_layers.3.weight", "mid_block.resnets.1.conv2.weight"),
        ("output_blocks.2.1.conv.bias", "up_blocks.0.upsamplers.0.conv.bias"),
        ("output_blocks.5.2.conv.bias", "up_blocks.1.upsamplers.0.conv.bias"),
        ("output_blocks.9.0.skip_connection.weight", "up_blocks.3.resnets.0.conv_shortcut.weight"),
        ("out.0.weight", "conv_norm_out.weight"),
        ("decoder.up.3.block.1.conv1.weight", "decoder.up_blocks.0.resnets.1.conv1.weight"),
        ("decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
        ("encoder.mid.block_2.norm1.bias", "encoder.mid_block.resnets.1.norm1.bias"),
        ("encoder.mid.attn_1.proj_out.weight", "encoder.mid_block.attentions.0.to_out.0.weight"),
    ],
)
def test_the_two_formats_name_the_same_layer(full_size, release, theirs):
    network = "autoencoder" if "coder." in release else "unet"
    prefix = released.AUTOENCODER_PREFIX if network == "autoencoder" else released.UNET_PREFIX
    ours = released.targets(full_size[network])[prefix + release]
    assert diffusers.targets(full_size[network], ())[theirs].name == ours.name


@pytest.fixture
def checkpoint():
    """A small autoencoder, its targets in the release, and a complete set of tensors for it."""
    module = nnx.eval_shape(lambda: Autoencoder(SMALL_AUTOENCODER, rngs=nnx.Rngs(0)))
    targets = released.targets(module)
    return module, targets, reference_weights.state_dict(mapping.source_shapes(targets))


def test_weights_load_in_the_layout_of_the_release(checkpoint):
    module, targets, tensors = checkpoint
    load(module, targets, tensors)
    given = tensors["first_stage_model.encoder.conv_in.weight"]
    np.testing.assert_array_equal(module.encoder.conv_in.kernel[...], given.transpose(2, 3, 1, 0))
    given = tensors["first_stage_model.decoder.norm_out.weight"]
    np.testing.assert_array_equal(module.decoder.norm_out.scale[...], given)


def test_the_two_formats_load_the_same_weights(checkpoint):
    module, targets, tensors = checkpoint
    load(module, targets, tensors)
    expected = parameters.split(module)[1]
    by_our_name = {target.name: tensors[name] for name, target in targets.items()}
    for spelling in ("encoder.mid_block.attentions.0.proj_attn.bias", "to_out"):
        table = diffusers.targets(module, [spelling])
        assert any("proj_attn" in name for name in table) == ("proj_attn" in spelling)
        renamed = {
            name: by_our_name[target.name].reshape(target.source_shape)
            for name, target in table.items()
        }
        other = nnx.eval_shape(lambda: Autoencoder(SMALL_AUTOENCODER, rngs=nnx.Rngs(0)))
        load(other, table, renamed)
        jax.tree.map(np.testing.assert_array_equal, parameters.split(other)[1], expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("first_stage_model.quant_conv.bias"), "1 missing: .*quant_conv.bias"),
        (lambda t: t.update({"first_stage_model.stranger": np.zeros(3)}), "1 unknown: .*stranger"),
        (
            lambda t: t.update({"first_stage_model.quant_conv.bias": np.zeros(7)}),
            r"1 of the wrong shape: .*quant_conv.bias is \(7,\), expected \(8,\)",
        ),
        # Square, so that only the number of axes tells it from a linear layer's weight.
        (
            lambda t: t.update({"first_stage_model.quant_conv.weight": np.zeros((8, 8))}),
            r"1 of the wrong shape: .*quant_conv.weight is \(8, 8\)",
        ),
    ],
)
def test_a_wrong_tensor_is_named(checkpoint, damage, message):
    _, targets, tensors = checkpoint
    damage(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=message):
        mapping.check(mapping.source_shapes(targets), shapes)


def test_two_layers_may_not_claim_one_tensor(checkpoint):
    module, _, _ = checkpoint
    rows = [
        row._replace(theirs="one") if row.ours.startswith("quantize") else row
        for row in released._autoencoder(module)
    ]
    with pytest.raises(ValueError, match=r"one\.bias is claimed by both quantize_"):
        mapping.targets(module, rows)
