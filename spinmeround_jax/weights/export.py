"""Our models in the formats of others: the release's names, or folders of diffusers and transformers.

The tables are those by which such files are read. Every safetensors file holds our config and provenance
in its metadata, so that what these formats have no field for is not lost.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from spinmeround_jax.files import InputError
from spinmeround_jax.models import Model, ModelConfig, parameters
from spinmeround_jax.models.unet import NORM_EPSILON as UNET_NORM_EPSILON
from spinmeround_jax.weights import diffusers, released
from spinmeround_jax.weights.mapping import Target

FORMATS = ("released", "diffusers")
METADATA = "spinmeround_jax"  # the entry of a file's metadata, with the content of model.json
RELEASED_FILE = "spmr.safetensors"
CONTENT = {"released": {RELEASED_FILE}, "diffusers": {"unet", "vae", "text_encoder"}}

Save = Callable[[dict[str, np.ndarray], pathlib.Path, dict[str, str]], None]


def check(config: ModelConfig, format_: str) -> None:
    """Raises ValueError naming a part of the model that the format has no place for."""
    if config.autoencoder.linear_path:
        raise ValueError(
            "autoencoder.linear_path is on, which neither the release nor diffusers' AutoencoderKL has: "
            "they would compute other images. Such a model cannot be exported; its weights/ are read "
            "by spinmeround_jax.load_model"
        )
    for name in ("unet", "autoencoder") if format_ == "diffusers" else ():
        if (first := getattr(config, name).channel_mult[0]) != 1:
            raise ValueError(f"{name}.channel_mult begins with {first}, in diffusers always with 1")


def write(
    folder: pathlib.Path,
    model: Model,
    format_: str,
    dtype: np.dtype,
    description: str,
    save: Save,
) -> None:
    """Write `model` into `folder`.

    Args:
        dtype: of the tensors, float32 or float16.
        description: JSON as in model.json.
        save: `sources.saver`.

    Raises:
        InputError: a weight is not finite in `dtype`.
    """
    metadata = {"format": "pt", METADATA: description}
    if format_ == "released":
        tensors: dict[str, np.ndarray] = {}
        for module in model.networks.values():
            tensors |= _tensors(module, released.targets(module), dtype)
        save(tensors, folder / RELEASED_FILE, metadata)
        return
    config = model.config
    parts = {
        "unet/diffusion_pytorch_model": (model.unet, _unet(config)),
        "vae/diffusion_pytorch_model": (model.autoencoder, _autoencoder(config)),
        "text_encoder/model": (model.identity, _text_encoder(config, dtype)),
    }
    for name, (module, theirs) in parts.items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir()
        (path.parent / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
        save(_tensors(module, diffusers.exported(module), dtype), path, metadata)


def _tensors(
    module: nnx.Module, targets: Mapping[str, Target], dtype: np.dtype
) -> dict[str, np.ndarray]:
    values = parameters.split(module)[1]
    tensors = {name: t.tensor(np.asarray(values[t.name]), dtype) for name, t in targets.items()}
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise InputError(f"{', '.join(broken[:5])}: not finite as {dtype.name}")
    return tensors


# --------------------------------------------------------------------------------------------------
# Their configs


def _unet(config: ModelConfig) -> dict[str, Any]:
    """Of UNet2DConditionModel, whose attention sees one view."""
    unet = config.unet
    levels = range(len(unet.channel_mult))
    crossed = ["CrossAttn" if level in unet.attention_levels else "" for level in levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.latent_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": unet.widths,
        "down_block_types": [f"{cross}DownBlock2D" for cross in crossed],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": [f"{cross}UpBlock2D" for cross in reversed(crossed)],
        "layers_per_block": unet.res_blocks,
        "cross_attention_dim": unet.context_dim,
        "attention_head_dim": unet.heads,  # diffusers' name for the number of heads
        "transformer_layers_per_block": unet.transformer_depth,
        "norm_num_groups": unet.norm_groups,
        "norm_eps": UNET_NORM_EPSILON,
    }


def _autoencoder(config: ModelConfig) -> dict[str, Any]:
    autoencoder = config.autoencoder
    levels, z = len(autoencoder.channel_mult), autoencoder.latent_channels
    statistics = {}
    if config.latent_std:  # diffusers' mean is of latents before the scaling, ours of those after
        mean = np.divide(config.latent_mean[:z], autoencoder.scale_factor)
        statistics = {"latents_mean": mean.tolist(), "latents_std": config.latent_std[:z]}
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": config.image_size,
        "latent_channels": z,
        "block_out_channels": autoencoder.widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": autoencoder.res_blocks,
        "norm_num_groups": autoencoder.norm_groups,
        "scaling_factor": autoencoder.scale_factor,
        **statistics,
    }


def _text_encoder(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    identity = config.identity
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": identity.vocab_size,
        "hidden_size": identity.width,
        "intermediate_size": identity.mlp_width,
        "num_hidden_layers": identity.layers,
        "num_attention_heads": identity.heads,
        "max_position_embeddings": identity.context_length,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": identity.prompt_ids[0],
        "eos_token_id": identity.prompt_ids[-1],
        "pad_token_id": identity.pad_id,
        "dtype": dtype.name,
    }
