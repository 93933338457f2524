"""The networks against the released code's outputs, and how views mix in them."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from spinmeround_jax.models import (
    Autoencoder,
    AutoencoderConfig,
    IdentityEncoder,
    IdentityEncoderConfig,
    MultiViewUNet,
    UNetConfig,
)
from spinmeround_jax.models.attention import ViewTransformer, attention, attention_on_cpu
from spinmeround_jax.models.layers import Keys, conv, linear
from spinmeround_jax.weights import released
from tests.support import reference_weights
from tests.support.loading import load
from tests.support.paths import GOLDENS

TINY_SHAPES = json.loads((GOLDENS / "tiny_shapes.json").read_text())
TOLERANCE = 2e-4  # of float32 outputs, made by another framework

TINY_UNET = UNetConfig(model_channels=32, context_dim=576)
TINY_AUTOENCODER = AutoencoderConfig(channels=32)
TINY_IDENTITY = IdentityEncoderConfig(width=576, layers=3, heads=9, mlp_width=256)
# Two levels; the middle block has the one transformer.
SMALL_UNET = UNetConfig(
    in_channels=5,
    out_channels=2,
    model_channels=8,
    channel_mult=(1, 2),
    res_blocks=1,
    attention_levels=(),
    joint_levels=(),
    heads=2,
    context_dim=6,
    norm_groups=4,
)
SMALL_AUTOENCODER = AutoencoderConfig(channels=8, channel_mult=(1, 2), res_blocks=1, norm_groups=4)


def abstract(network, config, dtype=jnp.float32):
    """Shapes only: running the initializers one by one takes longer than the tests."""
    return nnx.eval_shape(lambda: network(config, dtype=dtype, rngs=nnx.Rngs(0)))


def randomised(module):
    """Fill every parameter of an abstract or new module with noise, so that nothing is zero."""
    rng = np.random.default_rng(0)

    def noise(leaf):
        spread = math.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.3
        return jnp.asarray(spread * rng.standard_normal(leaf.shape), leaf.dtype)

    nnx.update(module, jax.tree.map(noise, nnx.state(module, nnx.Param)))
    return module


def load_reference(module, shapes):
    weights = reference_weights.state_dict(TINY_SHAPES[shapes])
    load(module, released.targets(module), weights)


def channels_last(x):
    return np.moveaxis(x, 1, -1)


# Compiling takes most of the time here: LLVM's optimizations would double it.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@quick_jit
def run(module, *inputs):
    return module(*inputs)


# --------------------------------------------------------------------------------------------------
# Goldens


@pytest.fixture(scope="module")
def tiny_unet():
    unet = abstract(MultiViewUNet, TINY_UNET)
    load_reference(unet, "tiny_unet")
    return unet


def unet_inputs(golden):
    """x (16, h, w, c), c_noise (16,) and context (16, t, d), drawn in the golden's order."""
    recorded = golden("unet_tiny")
    rng = np.random.default_rng(0)
    rng.standard_normal(recorded["x"].shape, dtype=np.float32)
    rng.uniform(-1.5, 1.6, (2,))
    context = rng.standard_normal((16, 77, 576), dtype=np.float32)
    return channels_last(recorded["x"]), recorded["c_noise"], context


def test_unet_with_eight_views_matches_the_released_code(golden, tiny_unet):
    inputs = [value.reshape(2, 8, *value.shape[1:]) for value in unet_inputs(golden)]
    out = np.asarray(run(tiny_unet, *inputs))
    assert out.dtype == np.float32
    expected = channels_last(golden("unet_tiny")["out_views8"])
    np.testing.assert_allclose(out.reshape(expected.shape), expected, rtol=0, atol=TOLERANCE)


def test_unet_with_one_view_matches_the_released_code(golden, tiny_unet):
    x, c_noise, context = (value[:3] for value in unet_inputs(golden))
    out = np.asarray(run(tiny_unet, x[:, None], c_noise, context))[:, 0]
    expected = channels_last(golden("unet_tiny")["out_views1"])
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def tiny_autoencoder():
    autoencoder = abstract(Autoencoder, TINY_AUTOENCODER)
    load_reference(autoencoder, "tiny_vae")
    return autoencoder


def test_encoder_matches_the_released_code(golden, tiny_autoencoder):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 3, 128, 128)).astype(np.float32)
    moments = quick_jit(Autoencoder.moments)(tiny_autoencoder, channels_last(images))
    expected = channels_last(golden("vae_tiny")["moments"])
    np.testing.assert_allclose(np.concatenate(moments, -1), expected, rtol=0, atol=TOLERANCE)


def test_decoder_matches_the_released_code(golden, tiny_autoencoder):
    latents = np.random.default_rng(2).standard_normal((2, 4, 16, 16), dtype=np.float32)
    scaled = channels_last(latents) * TINY_AUTOENCODER.scale_factor
    images = quick_jit(Autoencoder.decode)(tiny_autoencoder, scaled)
    expected = channels_last(golden("vae_tiny")["decoded"])
    np.testing.assert_allclose(images, expected, rtol=0, atol=TOLERANCE)


def test_identity_encoder_matches_the_released_code(golden):
    recorded = golden("identity_tiny")
    encoder = abstract(IdentityEncoder, TINY_IDENTITY)
    load_reference(encoder, "tiny_text")
    with_identity = run(encoder, recorded["arcface"])
    empty = quick_jit(IdentityEncoder.empty)(encoder)
    np.testing.assert_allclose(with_identity, recorded["cond"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(empty, recorded["uncond"], rtol=0, atol=TOLERANCE)


# --------------------------------------------------------------------------------------------------
# Views


@pytest.fixture(scope="module")
def small():
    """The small UNet and its inputs: 2 examples of 3 views."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 4, 4, 5), dtype=np.float32)
    c_noise = rng.standard_normal(2, dtype=np.float32)
    context = rng.standard_normal((2, 7, 6), dtype=np.float32)
    return randomised(abstract(MultiViewUNet, SMALL_UNET)), x, c_noise, context


def test_every_view_sees_every_other_view_of_its_example_only(small):
    unet, x, c_noise, context = small
    changed = x.copy()
    changed[0, 1] += 0.5
    difference = np.abs(run(unet, changed, c_noise, context) - run(unet, x, c_noise, context))
    assert (difference[0].max((1, 2, 3)) > 1e-4).all()
    assert (difference[1] == 0).all()


@pytest.fixture(params=[True, False], ids=["joint", "per view"])
def transformer(request):
    """A transformer on (b, v, h, w, c) maps, with joint self-attention or not."""
    module = randomised(
        nnx.eval_shape(
            lambda: ViewTransformer(
                8,
                context_dim=6,
                heads=2,
                depth=1,
                joint=request.param,
                norm_groups=4,
                dtype=jnp.float32,
                rngs=Keys(nnx.Rngs(0)),
            )
        )
    )

    @quick_jit
    def apply(x, context):
        flat = rearrange(x, "b v h w c -> (b v) h w c")
        return module(flat, context, x.shape[1]).reshape(x.shape)

    return request.param, apply


def test_only_joint_self_attention_mixes_views(transformer):
    joint, apply = transformer
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 3, 2, 2, 8), dtype=np.float32)
    context = rng.standard_normal((2, 5, 6), dtype=np.float32)
    changed = x.copy()
    changed[0, 1] += rng.standard_normal((2, 2, 8), dtype=np.float32)
    difference = np.abs(apply(changed, context) - apply(x, context)).max((2, 3, 4))
    assert difference[0, 1] > 1e-3
    assert ((difference[0, [0, 2]] > 1e-5) == joint).all()
    assert (difference[1] == 0).all()


def test_a_context_shared_by_the_views_equals_one_repeated_per_view(transformer):
    _, apply = transformer
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 3, 2, 2, 8), dtype=np.float32)
    context = rng.standard_normal((2, 5, 6), dtype=np.float32)
    shared = apply(x, context)
    repeated = np.repeat(context[:, None], 3, axis=1)
    np.testing.assert_allclose(shared, apply(x, repeated), atol=1e-5)
    repeated[0, 1] *= -1.0
    assert np.abs(shared - apply(x, repeated))[0, 1].max() > 1e-3


def test_joint_levels_are_those_of_the_config(tiny_unet):
    down = [[t.blocks[0].joint for t in level.transformers] for level in tiny_unet.down]
    up = [[t.blocks[0].joint for t in level.transformers] for level in tiny_unet.up]
    assert down == [[False] * 2, [True] * 2, [True] * 2, []]
    assert up == [[], [True] * 3, [True] * 3, [False] * 3]
    assert tiny_unet.middle_transformer.blocks[0].joint


# --------------------------------------------------------------------------------------------------
# Training from scratch, and other sizes


def test_a_new_unet_starts_its_last_layers_at_zero_and_no_two_others_equal():
    @quick_jit
    def new_kernels():
        unet = MultiViewUNet(SMALL_UNET, rngs=nnx.Rngs(0))
        last = [unet.conv_out, unet.middle_1.conv_2, unet.middle_transformer.project_out]
        attention = unet.middle_transformer.blocks[0].self_attention
        others = [attention.query, attention.key, attention.value, attention.out]
        return [[layer.kernel[...] for layer in layers] for layers in (last, others)]

    last, others = new_kernels()
    assert all((kernel == 0).all() for kernel in last)
    assert len({np.asarray(kernel).tobytes() for kernel in others}) == 4


def test_every_parameter_of_a_unet_receives_a_gradient(small):
    unet, x, c_noise, context = small
    gradients = quick_jit(jax.grad(lambda unet: jnp.square(unet(x, c_noise, context)).mean()))(unet)
    for path, gradient in nnx.to_flat_state(nnx.state(gradients)):
        assert np.isfinite(gradient[...]).all() and np.abs(gradient[...]).max() > 0, path


def test_bfloat16_computes_near_float32_and_returns_float32(small):
    unet, x, c_noise, context = small
    half = abstract(MultiViewUNet, SMALL_UNET, dtype=jnp.bfloat16)
    nnx.update(half, nnx.state(unet))
    exact = np.asarray(run(unet, x, c_noise, context))
    out = run(half, x, c_noise, context)
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - exact).max() < 0.1 * np.abs(exact).max()


def test_autoencoder_scales_clips_and_halves_per_level():
    autoencoder = randomised(abstract(Autoencoder, SMALL_AUTOENCODER))
    images = np.random.default_rng(3).uniform(-1, 1, (2, 8, 6, 3)).astype(np.float32)

    @quick_jit
    def outcome(autoencoder, images):
        latents = autoencoder.encode(images)
        return *autoencoder.moments(images), latents, autoencoder.decode(latents)

    mean, log_variance, latents, decoded = outcome(autoencoder, images)
    assert mean.shape == log_variance.shape == (2, 4, 3, 4)
    assert decoded.shape == images.shape
    np.testing.assert_allclose(latents, mean * 0.18215, rtol=1e-5)
    autoencoder.quantize_in.bias[...] += 1000.0
    assert (np.asarray(outcome(autoencoder, images)[1]) == 20.0).all()


def test_identity_reaches_no_token_before_it():
    config = IdentityEncoderConfig(
        vocab_size=7, width=512, layers=1, heads=2, mlp_width=8, context_length=6,
        prompt_ids=(0, 1, 4, 6), empty_ids=(0, 6), id_token=4, pad_id=6,
    )  # fmt: skip
    encoder = randomised(abstract(IdentityEncoder, config))
    embeddings = np.eye(2, 512, dtype=np.float32)
    context = np.asarray(run(encoder, embeddings))
    assert context.shape == (2, 6, 512)
    difference = np.abs(context[0] - context[1]).max(-1)
    assert (difference[:2] == 0).all() and (difference[2:] > 0).all()


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (UNetConfig(), {"norm_groups": 7}, "norm_groups 7 does not divide width 320"),
        (UNetConfig(), {"heads": 6}, "heads 6 does not divide width 320"),
        (UNetConfig(), {"joint_levels": (3,)}, r"joint_levels \[3\]"),
        (UNetConfig(), {"attention_levels": (4,)}, "no level 4"),
        (AutoencoderConfig(), {"norm_groups": 5}, "norm_groups 5 does not divide width 128"),
        (IdentityEncoderConfig(), {"width": 384}, "width 384 cannot hold"),
        (IdentityEncoderConfig(), {"id_token": 7}, "id_token 7 must occur once"),
        (IdentityEncoderConfig(), {"vocab_size": 100}, "below vocab_size 100"),
        (IdentityEncoderConfig(), {"context_length": 5}, "longer than context_length 5"),
    ],
)
def test_configs_that_do_not_fit_together_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


# --------------------------------------------------------------------------------------------------
# Faster than XLA's own on a CPU, and equal


@pytest.mark.parametrize(
    ("size", "strides", "channels"),
    [(2, 1, 4), (1, 1, 4), (4, 2, 4), (2, 2, 4), (4, 1, 64), (5, 2, 64)],
)
def test_convolution_as_a_product_over_patches(size, strides, channels):
    layer = conv(3, channels, 3, strides=strides, dtype=jnp.float32, rngs=Keys(nnx.Rngs(0)))
    x = np.random.default_rng(4).standard_normal((2, size, size, 3), dtype=np.float32)

    def general(kernel, x):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (strides, strides),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    kernel = layer.kernel[...]
    assert "stablehlo.convolution" not in jax.jit(layer).lower(x).as_text()
    np.testing.assert_allclose(layer(x), general(kernel, x), atol=1e-5)
    got = jax.grad(lambda layer, x: jnp.sin(layer(x)).sum(), argnums=(0, 1))(layer, x)
    expected = jax.grad(lambda *args: jnp.sin(general(*args)).sum(), argnums=(0, 1))(kernel, x)
    np.testing.assert_allclose(got[0].kernel[...], expected[0], atol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


def test_gradients_of_linear_layers():
    layer = linear(3, 4, dtype=jnp.float32, rngs=Keys(nnx.Rngs(0)))
    x = np.random.default_rng(5).standard_normal((2, 3, 5, 3), dtype=np.float32)
    got = jax.grad(lambda layer, x: jnp.sin(layer(x)).sum(), argnums=(0, 1))(layer, x)
    kernel = layer.kernel[...]
    expected = jax.grad(lambda kernel, x: jnp.sin(x @ kernel).sum(), argnums=(0, 1))(kernel, x)
    np.testing.assert_allclose(got[0].kernel[...], expected[0], atol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_attention_equals_the_general_one(monkeypatch, causal, at_once):
    limit = 2**30 if at_once else 0
    monkeypatch.setattr("spinmeround_jax.models.attention._CPU_LOGITS_BYTES", limit)
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((2, 5, 3, 4), dtype=np.float32) for _ in range(3))

    def outcome(attend):
        def loss(q, k, v):
            return jnp.square(attend(q, k, v)).sum()

        return quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    expected = outcome(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal))
    for ours in (
        lambda q, k, v: attention_on_cpu(q, k, v, causal=causal),
        lambda q, k, v: attention(q, k, v, causal=causal),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), outcome(ours), expected
        )


@pytest.mark.parametrize(("channels", "error"), [(12, 1e-5), (3, 0.01)])
def test_linear_path_starts_as_the_cosine_transform(channels, error):
    """All 12 coefficients of 2 x 2 blocks are the picture; its 3 coarsest, nearly a smooth grey one."""
    config = dataclasses.replace(SMALL_AUTOENCODER, latent_channels=channels, linear_path=True)
    autoencoder = Autoencoder(config, rngs=nnx.Rngs(0))
    rows, columns = np.mgrid[:16, :16] / 16
    images = np.stack([rows * columns] * 3, axis=-1)[None].astype(np.float32)
    latents, log_variance = autoencoder.moments(images)
    assert latents.shape == (1, 8, 8, channels) and (log_variance == -4).all()
    assert abs(autoencoder.decode_unscaled(latents) - images).max() < error


def test_linear_path_has_no_more_channels_than_a_block():
    with pytest.raises(ValueError, match="13"):
        AutoencoderConfig(
            channels=8, channel_mult=(1, 2), norm_groups=4, latent_channels=13, linear_path=True
        )
