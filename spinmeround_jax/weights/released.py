"""Names of the released PyTorch checkpoint: latent diffusion's, from which SD 1.5 has its own too."""

from __future__ import annotations

from collections.abc import Iterator

from spinmeround_jax.models import Autoencoder, IdentityEncoder, MultiViewUNet
from spinmeround_jax.weights import mapping
from spinmeround_jax.weights.mapping import Row, Target, below

UNET_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
IDENTITY_PREFIX = "conditioner.embedders.0.encoder."

# Tensors that are in such files and that no network needs, and why.
UNUSED = {
    "model_ema.*": "moving average of the UNet; the released code samples with the UNet itself",
    "*.embeddings.position_ids": "the numbers 0 to 76, no weights",
}
# As above, in files of the whole Stable Diffusion 1.5, of which only the autoencoder is wanted.
UNUSED_BESIDE_AUTOENCODER = {
    "model.diffusion_model.*": "Stable Diffusion's UNet; Arc2Face's is used",
    "cond_stage_model.*": "Stable Diffusion's text encoder; Arc2Face's is used",
    "model_ema.*": "moving average of the UNet",
    "betas": "noise schedule",
    "*alphas_cumprod*": "noise schedule",
    "posterior_*": "noise schedule",
}

_RESIDUAL = (
    ("norm_1", "in_layers.0"),
    ("conv_1", "in_layers.2"),
    ("time", "emb_layers.1"),
    ("norm_2", "out_layers.0"),
    ("conv_2", "out_layers.3"),
    ("shortcut", "skip_connection"),
)

_TRANSFORMER = (("norm", "norm"), ("project_in", "proj_in"), ("project_out", "proj_out"))

_TRANSFORMER_BLOCK = (
    ("norm_1", "norm1"),
    ("self_attention.query", "attn1.to_q"),
    ("self_attention.key", "attn1.to_k"),
    ("self_attention.value", "attn1.to_v"),
    ("self_attention.out", "attn1.to_out.0"),
    ("norm_2", "norm2"),
    ("cross_attention.query", "attn2.to_q"),
    ("cross_attention.key", "attn2.to_k"),
    ("cross_attention.value", "attn2.to_v"),
    ("cross_attention.out", "attn2.to_out.0"),
    ("norm_3", "norm3"),
    ("feed_forward.project", "ff.net.0.proj"),
    ("feed_forward.out", "ff.net.2"),
)

_AUTOENCODER_RESIDUAL = (
    ("norm_1", "norm1"),
    ("conv_1", "conv1"),
    ("norm_2", "norm2"),
    ("conv_2", "conv2"),
    ("shortcut", "nin_shortcut"),
)

_AUTOENCODER_ATTENTION = (
    ("norm", "norm"),
    ("query", "q"),
    ("key", "k"),
    ("value", "v"),
    ("out", "proj_out"),
)

_TEXT_LAYER = (
    ("norm_1", "layer_norm1"),
    ("query", "self_attn.q_proj"),
    ("key", "self_attn.k_proj"),
    ("value", "self_attn.v_proj"),
    ("out", "self_attn.out_proj"),
    ("norm_2", "layer_norm2"),
    ("mlp_1", "mlp.fc1"),
    ("mlp_2", "mlp.fc2"),
)


def targets(module: MultiViewUNet | Autoencoder | IdentityEncoder) -> dict[str, Target]:
    """Name in the release -> target, for every parameter of the (perhaps abstract) `module`."""
    if isinstance(module, MultiViewUNet):
        return mapping.targets(module, _unet(module), UNET_PREFIX)
    if isinstance(module, Autoencoder):
        return mapping.targets(module, _autoencoder(module), AUTOENCODER_PREFIX)
    return mapping.targets(module, text_encoder(module), IDENTITY_PREFIX + "text_model.")


def transformer(module: MultiViewUNet, ours: str, theirs: str) -> Iterator[Row]:
    """Rows of a transformer of the UNet; diffusers kept these names."""
    yield from below(ours, theirs, _TRANSFORMER)
    for i in range(module.config.transformer_depth):
        yield from below(
            f"{ours}.blocks.{i}", f"{theirs}.transformer_blocks.{i}", _TRANSFORMER_BLOCK
        )


def text_encoder(module: IdentityEncoder) -> Iterator[Row]:
    """Rows of the text encoder; the names are transformers' and the release kept them."""
    yield Row("token_embedding", "embeddings.token_embedding")
    yield Row("position_embedding", "embeddings.position_embedding")
    for i in range(module.config.layers):
        yield from below(f"layers.{i}", f"encoder.layers.{i}", _TEXT_LAYER)
    yield Row("norm_out", "final_layer_norm")


def _unet(module: MultiViewUNet) -> Iterator[Row]:
    config = module.config
    levels = len(config.channel_mult)
    yield Row("time_embedding.linear_1", "time_embed.0")
    yield Row("time_embedding.linear_2", "time_embed.2")
    yield Row("conv_in", "input_blocks.0.0")
    # The release numbers the blocks of the way down and of the way up without regard to levels; a
    # downsampling is a block of its own, an upsampling the last part of its level's last block.
    block = 1
    for level in range(levels):
        for i in range(config.res_blocks):
            theirs = f"input_blocks.{block}"
            yield from below(f"down.{level}.blocks.{i}", f"{theirs}.0", _RESIDUAL)
            yield from transformer(module, f"down.{level}.transformers.{i}", f"{theirs}.1")
            block += 1
        yield Row(f"downsamples.{level}", f"input_blocks.{block}.0.op")
        block += 1
    yield from below("middle_1", "middle_block.0", _RESIDUAL)
    yield from transformer(module, "middle_transformer", "middle_block.1")
    yield from below("middle_2", "middle_block.2", _RESIDUAL)
    block = 0
    for step in range(levels):
        for i in range(config.res_blocks + 1):
            theirs = f"output_blocks.{block}"
            yield from below(f"up.{step}.blocks.{i}", f"{theirs}.0", _RESIDUAL)
            yield from transformer(module, f"up.{step}.transformers.{i}", f"{theirs}.1")
            block += 1
        part = 2 if levels - 1 - step in config.attention_levels else 1
        yield Row(f"upsamples.{step}", f"output_blocks.{block - 1}.{part}.conv")
    yield Row("norm_out", "out.0")
    yield Row("conv_out", "out.2")


def _autoencoder(module: Autoencoder) -> Iterator[Row]:
    config = module.config
    levels = len(config.channel_mult)
    residual = _AUTOENCODER_RESIDUAL
    for half in ("encoder", "decoder"):
        yield Row(f"{half}.conv_in", f"{half}.conv_in")
        for i in (1, 2):
            yield from below(f"{half}.middle.block_{i}", f"{half}.mid.block_{i}", residual)
        yield from below(f"{half}.middle.attention", f"{half}.mid.attn_1", _AUTOENCODER_ATTENTION)
        yield Row(f"{half}.norm_out", f"{half}.norm_out")
        yield Row(f"{half}.conv_out", f"{half}.conv_out")
    for level in range(levels):
        for i in range(config.res_blocks):
            yield from below(
                f"encoder.levels.{level}.{i}", f"encoder.down.{level}.block.{i}", residual
            )
        yield Row(f"encoder.downsamples.{level}", f"encoder.down.{level}.downsample.conv")
    for step in range(levels):
        level = levels - 1 - step  # the release numbers the decoder's levels from the finest
        for i in range(config.res_blocks + 1):
            yield from below(
                f"decoder.levels.{step}.{i}", f"decoder.up.{level}.block.{i}", residual
            )
        yield Row(f"decoder.upsamples.{step}", f"decoder.up.{level}.upsample.conv")
    yield Row("quantize_in", "quant_conv")
    yield Row("quantize_out", "post_quant_conv")
