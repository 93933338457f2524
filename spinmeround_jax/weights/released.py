"""Names of the released PyTorch checkpoint <-> our modules, strict both ways.

Each table pairs the path of one of our layers with the name the release gives it; `_LEAVES` does so
for the tensors of a layer. Every parameter of the module and every tensor under the prefix must be
used exactly once and have the shape the other side expects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spinmeround_jax.models import Autoencoder, IdentityEncoder, Model, MultiViewUNet

UNET_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
IDENTITY_PREFIX = "conditioner.embedders.0.encoder."

Table = Iterator[tuple[str, str]]

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

_UNET_RESIDUAL = (
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

_IDENTITY_LAYER = (
    ("norm_1", "layer_norm1"),
    ("query", "self_attn.q_proj"),
    ("key", "self_attn.k_proj"),
    ("value", "self_attn.v_proj"),
    ("out", "self_attn.out_proj"),
    ("norm_2", "layer_norm2"),
    ("mlp_1", "mlp.fc1"),
    ("mlp_2", "mlp.fc2"),
)


def unet_from_released(
    module: MultiViewUNet, state_dict: Mapping[str, np.ndarray], prefix: str = UNET_PREFIX
) -> None:
    """Fill the UNet in place from the tensors (PyTorch layouts) named `prefix` + ...

    Raises:
        ValueError: naming every tensor that is missing, unknown or of the wrong shape.
    """
    _fill(module, state_dict, prefix)


def autoencoder_from_released(
    module: Autoencoder, state_dict: Mapping[str, np.ndarray], prefix: str = AUTOENCODER_PREFIX
) -> None:
    """As `unet_from_released`, for the autoencoder."""
    _fill(module, state_dict, prefix)


def identity_from_released(
    module: IdentityEncoder, state_dict: Mapping[str, np.ndarray], prefix: str = IDENTITY_PREFIX
) -> None:
    """As `unet_from_released`, for the text encoder."""
    _fill(module, state_dict, prefix)


def model_from_released(model: Model, state_dict: Mapping[str, np.ndarray]) -> None:
    """Fill the three networks in place from one whole checkpoint.

    Raises:
        ValueError: naming every tensor that is missing, unknown or of the wrong shape.
    """
    prefixes = (UNET_PREFIX, AUTOENCODER_PREFIX, IDENTITY_PREFIX)
    if strangers := [name for name in state_dict if not name.startswith(prefixes)]:
        raise ValueError(f"checkpoint: {_listed('unknown', strangers)}")
    unet_from_released(model.unet, state_dict)
    autoencoder_from_released(model.autoencoder, state_dict)
    identity_from_released(model.identity, state_dict)


def released_shapes(
    module: MultiViewUNet | Autoencoder | IdentityEncoder, prefix: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Name and PyTorch shape of every tensor the release holds for (perhaps abstract) `module`."""
    targets = _targets(module, _default_prefix(module) if prefix is None else prefix)
    return {name: _released_shape(*target) for name, target in targets.items()}


def _fill(module: nnx.Module, state_dict: Mapping[str, np.ndarray], prefix: str) -> None:
    targets = _targets(module, prefix)
    given = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    expected = {name: _released_shape(*target) for name, target in targets.items()}
    found = {name: tuple(tensor.shape) for name, tensor in given.items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of the wrong shape": [
            f"{name} is {found[name]}, expected {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(_listed(kind, tensors) for kind, tensors in problems.items() if tensors)
        raise ValueError(f"{type(module).__name__} from {prefix!r}: {listed}")
    filled = [
        (path, variable.replace(_our_value(path, variable, given[name])))
        for name, (path, variable) in targets.items()
    ]
    nnx.update(module, nnx.from_flat_state(filled))


def _listed(kind: str, tensors: list[str], limit: int = 20) -> str:
    more = f" and {len(tensors) - limit} more" if len(tensors) > limit else ""
    return f"{len(tensors)} {kind}: {', '.join(tensors[:limit])}{more}"


def _targets(module: nnx.Module, prefix: str) -> dict[str, tuple[tuple, nnx.Param]]:
    """Released name -> path and variable, for each of our parameters."""
    table = dict(_table(module))
    targets: dict[str, tuple[tuple, nnx.Param]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        *layer, leaf = path
        name = f"{prefix}{table['.'.join(map(str, layer))]}.{_LEAVES[leaf]}"
        if name in targets:
            raise ValueError(f"{name} is claimed by both {targets[name][0]} and {path}")
        targets[name] = path, variable
    return targets


def _released_axes(path: tuple, variable: nnx.Param) -> tuple[int, ...]:
    """Our axes in the release's order: convolutions HWIO -> OIHW, linear layers IO -> OI."""
    if path[-1] == "kernel":
        return {4: (3, 2, 0, 1), 2: (1, 0)}[len(variable.shape)]
    return tuple(range(len(variable.shape)))


def _released_shape(path: tuple, variable: nnx.Param) -> tuple[int, ...]:
    return tuple(variable.shape[axis] for axis in _released_axes(path, variable))


def _our_value(path: tuple, variable: nnx.Param, tensor: np.ndarray) -> jax.Array:
    back = np.argsort(_released_axes(path, variable))
    return jnp.asarray(np.transpose(np.asarray(tensor), back), variable.dtype)


def _default_prefix(module: nnx.Module) -> str:
    return {
        MultiViewUNet: UNET_PREFIX,
        Autoencoder: AUTOENCODER_PREFIX,
        IdentityEncoder: IDENTITY_PREFIX,
    }[type(module)]


def _table(module: nnx.Module) -> Table:
    if isinstance(module, MultiViewUNet):
        return _unet_table(module)
    if isinstance(module, Autoencoder):
        return _autoencoder_table(module)
    return _identity_table(module)


def _below(ours: str, theirs: str, parts: tuple[tuple[str, str], ...]) -> Table:
    for our_part, their_part in parts:
        yield f"{ours}.{our_part}", f"{theirs}.{their_part}"


def _unet_table(module: MultiViewUNet) -> Table:
    config = module.config
    levels = len(config.channel_mult)

    def transformer(ours: str, theirs: str) -> Table:
        yield from _below(ours, theirs, _TRANSFORMER)
        for i in range(config.transformer_depth):
            yield from _below(
                f"{ours}.blocks.{i}", f"{theirs}.transformer_blocks.{i}", _TRANSFORMER_BLOCK
            )

    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    yield "conv_in", "input_blocks.0.0"
    # The release numbers the blocks of the way down and of the way up without regard to levels; a
    # downsampling is a block of its own, an upsampling the last part of its level's last block.
    block = 1
    for level in range(levels):
        for i in range(config.res_blocks):
            theirs = f"input_blocks.{block}"
            yield from _below(f"down.{level}.blocks.{i}", f"{theirs}.0", _UNET_RESIDUAL)
            yield from transformer(f"down.{level}.transformers.{i}", f"{theirs}.1")
            block += 1
        yield f"downsamples.{level}", f"input_blocks.{block}.0.op"
        block += 1
    yield from _below("middle_1", "middle_block.0", _UNET_RESIDUAL)
    yield from transformer("middle_transformer", "middle_block.1")
    yield from _below("middle_2", "middle_block.2", _UNET_RESIDUAL)
    block = 0
    for step in range(levels):
        for i in range(config.res_blocks + 1):
            theirs = f"output_blocks.{block}"
            yield from _below(f"up.{step}.blocks.{i}", f"{theirs}.0", _UNET_RESIDUAL)
            yield from transformer(f"up.{step}.transformers.{i}", f"{theirs}.1")
            block += 1
        part = 2 if levels - 1 - step in config.attention_levels else 1
        yield f"upsamples.{step}", f"output_blocks.{block - 1}.{part}.conv"
    yield "norm_out", "out.0"
    yield "conv_out", "out.2"


def _autoencoder_table(module: Autoencoder) -> Table:
    config = module.config
    levels = len(config.channel_mult)
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in", f"{half}.conv_in"
        for i in (1, 2):
            yield from _below(
                f"{half}.middle.block_{i}", f"{half}.mid.block_{i}", _AUTOENCODER_RESIDUAL
            )
        yield from _below(f"{half}.middle.attention", f"{half}.mid.attn_1", _AUTOENCODER_ATTENTION)
        yield f"{half}.norm_out", f"{half}.norm_out"
        yield f"{half}.conv_out", f"{half}.conv_out"
    for level in range(levels):
        for i in range(config.res_blocks):
            yield from _below(
                f"encoder.levels.{level}.{i}",
                f"encoder.down.{level}.block.{i}",
                _AUTOENCODER_RESIDUAL,
            )
        yield f"encoder.downsamples.{level}", f"encoder.down.{level}.downsample.conv"
    for step in range(levels):
        level = levels - 1 - step  # the release numbers the decoder's levels from the finest
        for i in range(config.res_blocks + 1):
            yield from _below(
                f"decoder.levels.{step}.{i}", f"decoder.up.{level}.block.{i}", _AUTOENCODER_RESIDUAL
            )
        yield f"decoder.upsamples.{step}", f"decoder.up.{level}.upsample.conv"
    yield "quantize_in", "quant_conv"
    yield "quantize_out", "post_quant_conv"


def _identity_table(module: IdentityEncoder) -> Table:
    yield "token_embedding", "text_model.embeddings.token_embedding"
    yield "position_embedding", "text_model.embeddings.position_embedding"
    for i in range(module.config.layers):
        yield from _below(f"layers.{i}", f"text_model.encoder.layers.{i}", _IDENTITY_LAYER)
    yield "norm_out", "text_model.final_layer_norm"
