"""Names of diffusers (UNet2DConditionModel, AutoencoderKL) and transformers (CLIPTextModel).

Arc2Face's UNet has 4 channels in and 4 out: the latent of an RGB image. Ours has 153 in (RGB latent
4, normals latent 4, raymap 144, mask 1) and 8 out (RGB, normals). The RGB channels keep the
pretrained weights, every new one starts at zero:

- in: normals, rays and mask are not seen at first, so the network begins as Arc2Face on every view,
  whatever they hold. Their kernels still get a gradient from the first step on, as it depends on the
  layers behind, which are not zero. The mask separates observed from target views from then on.
- out: F = 0 for the normals gives D(x; sigma) = c_skip x = x / (1 + sigma^2), which is the best guess
  for latents of unit variance that one knows nothing else about. A copy of the RGB rows would
  predict the noise of other channels.

The paper says that the UNet is initialised from Arc2Face and not how it grew: this is our choice.
What is inherited are features, not a working denoiser: Arc2Face predicts the noise and reads a
timestep 0 to 999, where F predicts v and reads ln(sigma) / 4.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from spinmeround_jax.models import Autoencoder, IdentityEncoder, MultiViewUNet
from spinmeround_jax.weights import mapping, released
from spinmeround_jax.weights.mapping import Row, Target, below

PRETRAINED_CHANNELS = 4  # of Stable Diffusion's latents

UNUSED = {"*embeddings.position_ids": released.UNUSED["*.embeddings.position_ids"]}

_RESIDUAL = (
    ("norm_1", "norm1"),
    ("conv_1", "conv1"),
    ("time", "time_emb_proj"),
    ("norm_2", "norm2"),
    ("conv_2", "conv2"),
    ("shortcut", "conv_shortcut"),
)

_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0"))
# Before diffusers 0.18; Stable Diffusion 1.5's own files are that old.
_OLD_ATTENTION = (("query", "query"), ("key", "key"), ("value", "value"), ("out", "proj_attn"))


def targets(
    module: MultiViewUNet | Autoencoder | IdentityEncoder, names: Collection[str]
) -> dict[str, Target]:
    """Name in diffusers or transformers -> target, for every parameter of `module`.

    Args:
        names: those of the file, which tell older spellings from newer ones.
    """
    if isinstance(module, MultiViewUNet):
        return mapping.targets(module, _unet(module))
    if isinstance(module, Autoencoder):
        old = any(".proj_attn." in name for name in names)
        return mapping.targets(module, _autoencoder(module, _OLD_ATTENTION if old else _ATTENTION))
    # transformers 5 writes no prefix.
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    return mapping.targets(module, released.text_encoder(module), prefix)


def exported(module: MultiViewUNet | Autoencoder | IdentityEncoder) -> dict[str, Target]:
    """As `targets`, for writing: today's names, and all channels of the UNet."""
    if isinstance(module, MultiViewUNet):
        rows = (row._replace(channels_in=None, channels_out=None) for row in _unet(module))
        return mapping.targets(module, rows)
    return targets(module, ("text_model.",))  # the prefix, which transformers 4 needs and 5 reads


def _unet(module: MultiViewUNet) -> Iterator[Row]:
    config = module.config

    def block(ours: str, theirs: str, count: int) -> Iterator[Row]:
        for i in range(count):
            yield from below(f"{ours}.blocks.{i}", f"{theirs}.resnets.{i}", _RESIDUAL)
            yield from released.transformer(
                module, f"{ours}.transformers.{i}", f"{theirs}.attentions.{i}"
            )

    for layer in ("linear_1", "linear_2"):
        yield Row(f"time_embedding.{layer}", f"time_embedding.{layer}")
    yield Row("conv_in", "conv_in", channels_in=PRETRAINED_CHANNELS)
    for level in range(len(config.channel_mult)):
        yield from block(f"down.{level}", f"down_blocks.{level}", config.res_blocks)
        yield Row(f"downsamples.{level}", f"down_blocks.{level}.downsamplers.0.conv")
        yield from block(f"up.{level}", f"up_blocks.{level}", config.res_blocks + 1)
        yield Row(f"upsamples.{level}", f"up_blocks.{level}.upsamplers.0.conv")
    yield from below("middle_1", "mid_block.resnets.0", _RESIDUAL)
    yield from released.transformer(module, "middle_transformer", "mid_block.attentions.0")
    yield from below("middle_2", "mid_block.resnets.1", _RESIDUAL)
    yield Row("norm_out", "conv_norm_out")
    yield Row("conv_out", "conv_out", channels_out=PRETRAINED_CHANNELS)


def _autoencoder(module: Autoencoder, attention: tuple[tuple[str, str], ...]) -> Iterator[Row]:
    config = module.config
    for half in ("encoder", "decoder"):
        yield Row(f"{half}.conv_in", f"{half}.conv_in")
        for i in (0, 1):
            theirs = f"{half}.mid_block.resnets.{i}"
            yield from below(f"{half}.middle.block_{i + 1}", theirs, _RESIDUAL)
        ours, theirs = f"{half}.middle.attention", f"{half}.mid_block.attentions.0"
        yield Row(f"{ours}.norm", f"{theirs}.group_norm")
        yield from below(ours, theirs, attention, matrix=True)
        yield Row(f"{half}.norm_out", f"{half}.conv_norm_out")
        yield Row(f"{half}.conv_out", f"{half}.conv_out")
    for level in range(len(config.channel_mult)):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        for i in range(config.res_blocks + 1):
            yield from below(f"encoder.levels.{level}.{i}", f"{down}.resnets.{i}", _RESIDUAL)
            yield from below(f"decoder.levels.{level}.{i}", f"{up}.resnets.{i}", _RESIDUAL)
        yield Row(f"encoder.downsamples.{level}", f"{down}.downsamplers.0.conv")
        yield Row(f"decoder.upsamples.{level}", f"{up}.upsamplers.0.conv")
    yield Row("quantize_in", "quant_conv")
    yield Row("quantize_out", "post_quant_conv")
