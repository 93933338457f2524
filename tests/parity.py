"""Our networks at full size against diffusers' and transformers', with the same stand-in weights.

    python -m tests.parity                  # about 12 GiB of memory and 13 GB of disk, minutes
    python -m tests.parity --size tiny      # the same on small networks, seconds

needs the extra [parity]. A checkpoint with every tensor of the released one (each a function of its
name, `reference_weights.py`), and with what Lightning leaves beside them, goes through
`spinmeround_jax.convert`; the model that comes out is compared with

- diffusers' UNet2DConditionModel. One view makes joint attention plain; for eight views, an attention
  processor of our own hands the tokens of all views to diffusers' attention at once;
- diffusers' AutoencoderKL, posterior and decoder;
- transformers' CLIPTextModel, with the ArcFace vector put in the place of the token "id" by a hook.

The tensors are renamed by diffusers' own converter of latent diffusion checkpoints, not by our tables.
The model is then exported with `convert --export diffusers`, and what these libraries load from there is
compared, too. Prints the table of docs/conversion.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel

from spinmeround_jax import cameras, checkpoints, convert
from spinmeround_jax.models import (
    Autoencoder,
    AutoencoderConfig,
    IdentityEncoder,
    IdentityEncoderConfig,
    Model,
    ModelConfig,
    UNetConfig,
    parameters,
)
from spinmeround_jax.weights import released
from tests.support import reference_weights
from tests.support.paths import GOLDENS

VIEWS = 8
JOINT_BLOCKS = ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2")
LIMIT = 1e-3  # of the output's standard deviation, in float32

Outputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the latents it is tried on; images are 8 times as large."""

    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    latent_size: int


def full() -> Size:
    shapes = json.loads((GOLDENS / "released_checkpoint_shapes.json").read_text())
    return Size(ModelConfig.full_size(), shapes, latent_size=32)


def tiny() -> Size:
    recorded = json.loads((GOLDENS / "tiny_shapes.json").read_text())
    config = dataclasses.replace(
        ModelConfig.full_size(),
        unet=UNetConfig(model_channels=32, context_dim=576),
        autoencoder=AutoencoderConfig(channels=32),
        identity=IdentityEncoderConfig(width=576, layers=3, heads=9, mlp_width=256),
    )
    shapes = {name: shape for part in recorded.values() for name, shape in part.items()}
    return Size(config, shapes, latent_size=16)


@dataclasses.dataclass(frozen=True)
class Row:
    """Errors of one output, in units of its standard deviation."""

    name: str
    shape: tuple[int, ...]
    std: float
    float32: float  # largest
    exported: float  # largest, of the exported model in their libraries, against ours
    float16_weights: float  # largest, computing in float32 with weights stored in float16
    bfloat16: float  # largest
    bfloat16_rms: float


@dataclasses.dataclass(frozen=True)
class Report:
    rows: list[Row]
    convert_seconds: float
    convert_gib: float  # largest resident set of the converting process
    seconds: float
    processor_seconds: float  # of both processes, on all cores
    gib: float  # largest resident set of the comparing process


def compare(size: Size, folder: pathlib.Path) -> Report:
    """Build a checkpoint in `folder`, convert it, and compare what the networks put out."""
    began = time.monotonic()
    checkpoint, model = folder / "spmr.ckpt", folder / "model"
    tell("writing the checkpoint")
    write_checkpoint(checkpoint, size.shapes)
    tell(f"converting its {checkpoint.stat().st_size / 2**30:.1f} GiB")
    convert_seconds, convert_gib = converted(checkpoint, model, size.config)
    inputs = draw_inputs(size)
    expected = reference_outputs(checkpoint, inputs, size.config)
    checkpoint.unlink()
    gc.collect()

    tell("ours, float32")
    ours = checkpoints.load_model(model)
    found = {"float32": our_outputs(ours, inputs)}
    tell("exporting")
    arguments = [
        "--export",
        "diffusers",
        "--checkpoint",
        str(model),
        "--out",
        str(folder / "theirs"),
    ]
    if convert.main(arguments):
        raise RuntimeError(f"{model} could not be exported")
    exported = their_outputs(exported_networks(folder / "theirs"), inputs, size.config)
    tell("ours, float16 weights")
    found["float16"] = our_outputs(with_float16_weights(ours), inputs)
    del ours
    gc.collect()
    tell("ours, bfloat16")
    found["bfloat16"] = our_outputs(checkpoints.load_model(model, jnp.bfloat16), inputs)

    rows = []
    for name, reference in expected.items():
        std = float(reference.std())
        errors = {kind: (out[name] - reference) / std for kind, out in found.items()}
        largest = {kind: float(np.abs(error).max()) for kind, error in errors.items()}
        back = float(np.abs(exported[name] - found["float32"][name]).max()) / std
        rms = float(np.sqrt((errors["bfloat16"] ** 2).mean()))
        rows.append(
            Row(
                name, reference.shape, std,
                largest["float32"], back, largest["float16"], largest["bfloat16"], rms,
            )
        )  # fmt: skip
    usage = resource.getrusage(resource.RUSAGE_SELF)
    both = usage, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Report(
        rows=rows,
        convert_seconds=convert_seconds,
        convert_gib=convert_gib,
        seconds=time.monotonic() - began,
        processor_seconds=sum(one.ru_utime + one.ru_stime for one in both),
        gib=usage.ru_maxrss / 2**20,
    )


def tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# The checkpoint


def write_checkpoint(path: pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """All tensors under `state_dict`, a moving average of the UNet, and Lightning's bookkeeping."""
    state = {
        name: torch.from_numpy(reference_weights.tensor(name, tuple(shape)))
        for name, shape in shapes.items()
    }
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): torch.zeros(shape)
        for name, shape in shapes.items()
        if name.startswith(released.UNET_PREFIX)
    }
    averages |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(0)}
    content = {
        "epoch": 7,
        "global_step": 1_600_000,
        "pytorch-lightning_version": "2.0.1",
        "state_dict": {**state, **averages},
        "callbacks": {"ModelCheckpoint": {"best_model_score": np.float64(0.1)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(64)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hyper_parameters": {"path": pathlib.PurePosixPath("configs/train.yaml")},
    }
    torch.save(content, path)


def converted(
    checkpoint: pathlib.Path, model: pathlib.Path, config: ModelConfig
) -> tuple[float, float]:
    """Convert as a user would; seconds and GiB of memory that it took."""
    began = time.monotonic()
    arguments = ["--released", str(checkpoint), "--out", str(model)]
    if config == ModelConfig.full_size():
        subprocess.run(
            [sys.executable, "-m", "spinmeround_jax.convert", *arguments],
            check=True,
            stdout=sys.stderr,
        )
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    else:  # the command knows the full size only
        if convert.main(arguments, config):
            raise RuntimeError(f"{checkpoint} could not be converted")
        usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic() - began, usage.ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------
# Inputs


def draw_inputs(size: Size) -> dict[str, np.ndarray]:
    """Channels last; the eight views are those of the anchors, with their rays and mask."""
    rng, s = np.random.default_rng(0), size.latent_size
    poses = cameras.orbit(np.array([0.0, *cameras.ANCHOR_YAWS]))
    raymap = np.asarray(cameras.raymap(poses, s, "released"))
    mask = np.broadcast_to((np.arange(VIEWS) > 0)[:, None, None, None], (VIEWS, s, s, 1))
    latents = rng.standard_normal((VIEWS, s, s, size.config.latent_channels), dtype=np.float32)
    arcface = rng.standard_normal((2, 512), dtype=np.float32)
    return {
        "x": np.concatenate([latents, raymap, mask], axis=-1).astype(np.float32),
        "c_noise": np.array([np.log(5.0) / 4], np.float32),
        "context": rng.standard_normal((1, 77, size.config.unet.context_dim), dtype=np.float32),
        "images": rng.uniform(-1, 1, (1, 8 * s, 8 * s, 3)).astype(np.float32),
        "latents": rng.standard_normal((1, s, s, 4), dtype=np.float32),
        "arcface": arcface / np.linalg.norm(arcface, axis=-1, keepdims=True),
    }


# --------------------------------------------------------------------------------------------------
# Theirs


def reference_outputs(
    checkpoint: pathlib.Path, inputs: dict[str, np.ndarray], config: ModelConfig
) -> Outputs:
    """What diffusers and transformers make of `inputs` with the weights of `checkpoint`."""
    with torch.serialization.safe_globals([pathlib.PurePosixPath, *numpy_scalar()]):
        state = torch.load(checkpoint, mmap=True, weights_only=True)["state_dict"]
    state = {name: tensor for name, tensor in state.items() if not name.startswith("model_ema.")}
    networks = Networks(
        lambda: reference_unet(state, config),
        lambda: reference_autoencoder(state, config),
        lambda: reference_text_encoder(state, config),
    )
    return their_outputs(networks, inputs, config)


class Networks(NamedTuple):
    """Functions that load them, one at a time for the sake of memory."""

    unet: Callable[[], UNet2DConditionModel]
    autoencoder: Callable[[], AutoencoderKL]
    text_encoder: Callable[[], CLIPTextModel]


def exported_networks(folder: pathlib.Path) -> Networks:
    """Of the folders that `convert --export diffusers` wrote; every tensor has to have its place."""

    def load(cls, subfolder: str) -> torch.nn.Module:
        network, info = cls.from_pretrained(folder, subfolder=subfolder, output_loading_info=True)
        if any(info.values()):
            raise RuntimeError(f"{subfolder}: {info}")
        return network.eval()

    return Networks(
        lambda: load(UNet2DConditionModel, "unet"),
        lambda: load(AutoencoderKL, "vae"),
        lambda: load(CLIPTextModel, "text_encoder"),
    )


@torch.no_grad()
def their_outputs(
    networks: Networks, inputs: dict[str, np.ndarray], config: ModelConfig
) -> Outputs:
    """What networks of diffusers and transformers make of `inputs` in float32, channels last."""
    outputs: Outputs = {}

    tell("diffusers, UNet")
    unet = networks.unet()
    x, context = channels_first(inputs["x"]), torch.from_numpy(inputs["context"])
    c_noise = torch.from_numpy(inputs["c_noise"])

    def run(unet: UNet2DConditionModel, views: slice) -> np.ndarray:
        count = len(x[views])
        out = unet(x[views], c_noise.expand(count), context.expand(count, -1, -1)).sample
        return channels_last(out)

    outputs["UNet, 1 view"] = run(unet, slice(3, 4))
    share_attention(unet)
    outputs["UNet, 8 views"] = run(unet, slice(None))
    del unet

    tell("diffusers, autoencoder")
    autoencoder = networks.autoencoder()
    posterior = autoencoder.encode(channels_first(inputs["images"])).latent_dist
    outputs["autoencoder, mean"] = channels_last(posterior.mean)
    outputs["autoencoder, log-variance"] = channels_last(posterior.logvar)
    decoded = autoencoder.decode(channels_first(inputs["latents"])).sample
    outputs["autoencoder, decoder"] = channels_last(decoded)
    del autoencoder

    tell("transformers, text encoder")
    text = networks.text_encoder()
    outputs["text encoder, identity"] = read_prompt(text, config, inputs["arcface"])
    outputs["text encoder, empty"] = read_prompt(text, config, None)
    return outputs


def numpy_scalar() -> list:
    """What weights_only asks for to read a numpy number."""
    scalar = np.float64(0.0).__reduce__()[0]
    return [scalar, np.dtype, np.dtypes.Float64DType]


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1).copy()


def reference_unet(state: dict[str, torch.Tensor], config: ModelConfig) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            in_channels=config.unet.in_channels,
            out_channels=config.unet.out_channels,
            block_out_channels=config.unet.widths,
            cross_attention_dim=config.unet.context_dim,
            attention_head_dim=config.unet.heads,  # diffusers' name for the number of heads
        )
    unet.load_state_dict(convert_ldm_unet_checkpoint(state, unet.config), assign=True)
    return unet.eval()


class AllViews(AttnProcessor2_0):
    """diffusers' attention over the tokens of all views together."""

    def __call__(self, attn, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        views, tokens, width = hidden_states.shape
        together = hidden_states.reshape(views // VIEWS, VIEWS * tokens, width)
        return super().__call__(attn, together, *args, **kwargs).reshape(views, tokens, width)


def share_attention(unet: UNet2DConditionModel) -> None:
    """Joint self-attention where the released model has it: at /2, /4 and in the middle block."""
    unet.set_attn_processor(
        {
            name: AllViews() if name.startswith(JOINT_BLOCKS) and ".attn1." in name else processor
            for name, processor in unet.attn_processors.items()
        }
    )


def reference_autoencoder(state: dict[str, torch.Tensor], config: ModelConfig) -> AutoencoderKL:
    levels = len(config.autoencoder.channel_mult)
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            block_out_channels=config.autoencoder.widths,
            layers_per_block=config.autoencoder.res_blocks,
            latent_channels=config.autoencoder.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
    renamed = convert_ldm_vae_checkpoint(state, autoencoder.config)
    autoencoder.load_state_dict(renamed, assign=True)
    return autoencoder.eval()


def reference_text_encoder(state: dict[str, torch.Tensor], config: ModelConfig) -> CLIPTextModel:
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.identity.vocab_size,
            hidden_size=config.identity.width,
            intermediate_size=config.identity.mlp_width,
            num_hidden_layers=config.identity.layers,
            num_attention_heads=config.identity.heads,
            max_position_embeddings=config.identity.context_length,
        )
    )
    prefix = released.IDENTITY_PREFIX + "text_model."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    encoder.load_state_dict(weights)
    return encoder.eval()


def read_prompt(
    encoder: CLIPTextModel, config: ModelConfig, arcface: np.ndarray | None
) -> np.ndarray:
    """Last hidden state of Arc2Face's prompt with `arcface` (n, 512) in it, or of the empty one."""
    identity = config.identity
    ids = identity.empty_ids if arcface is None else identity.prompt_ids
    ids = torch.tensor([ids + (identity.pad_id,) * (identity.context_length - len(ids))])
    if arcface is None:
        return encoder(ids).last_hidden_state.numpy()
    padded = torch.zeros(len(arcface), identity.width)
    padded[:, : arcface.shape[1]] = torch.from_numpy(arcface)

    def put_face(module, arguments, embeddings: torch.Tensor) -> torch.Tensor:
        embeddings = embeddings.clone()
        embeddings[:, identity.prompt_ids.index(identity.id_token)] = padded
        return embeddings

    hook = encoder.embeddings.token_embedding.register_forward_hook(put_face)
    out = encoder(ids.expand(len(arcface), -1)).last_hidden_state.numpy()
    hook.remove()
    return out


# --------------------------------------------------------------------------------------------------
# Ours


# Compiled once for all models of one dtype.
_unet = jax.jit(lambda unet, *arguments: unet(*arguments)[0])
_moments = jax.jit(Autoencoder.moments)
_decode = jax.jit(Autoencoder.decode_unscaled)
_identity = jax.jit(IdentityEncoder.__call__)
_empty = jax.jit(IdentityEncoder.empty)


def our_outputs(model: Model, inputs: dict[str, np.ndarray]) -> Outputs:
    """As `reference_outputs`, of the converted model."""
    x = inputs["x"][None]
    conditions = inputs["c_noise"], inputs["context"]
    mean, log_variance = _moments(model.autoencoder, inputs["images"])
    outputs = {
        "UNet, 1 view": _unet(model.unet, x[:, 3:4], *conditions),
        "UNet, 8 views": _unet(model.unet, x, *conditions),
        "autoencoder, mean": mean,
        "autoencoder, log-variance": log_variance,
        "autoencoder, decoder": _decode(model.autoencoder, inputs["latents"]),
        "text encoder, identity": _identity(model.identity, inputs["arcface"]),
        "text encoder, empty": _empty(model.identity),
    }
    return {name: np.asarray(value) for name, value in outputs.items()}


def with_float16_weights(model: Model) -> Model:
    """The model after its weights were stored with `convert --dtype float16`."""

    def rounded(module):
        graphdef, values = parameters.split(module)
        halves = {
            name: value.astype(jnp.float16).astype(jnp.float32) for name, value in values.items()
        }
        return parameters.merge(graphdef, halves)

    return Model(
        model.config, rounded(model.unet), rounded(model.autoencoder), rounded(model.identity)
    )


# --------------------------------------------------------------------------------------------------
# The table


def table(report: Report) -> str:
    lines = [
        "| output (shape) | std | float32 | exported | float16 weights | bfloat16 | bfloat16, rms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        shape = " x ".join(map(str, row.shape))
        lines.append(
            f"| {row.name} ({shape}) | {row.std:.3f} | {row.float32:.1e} | "
            f"{row.exported:.1e} | {row.float16_weights:.1e} | {row.bfloat16:.1e} | {row.bfloat16_rms:.1e} |"
        )
    lines += [
        "",
        f"Conversion: {report.convert_seconds:.0f} s, {report.convert_gib:.1f} GiB at most. "
        f"Everything: {report.seconds / 60:.0f} min ({report.processor_seconds / 60:.0f} min of "
        f"processor time), {report.gib:.1f} GiB at most.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = compare(full() if args.size == "full" else tiny(), pathlib.Path(folder))
    print(table(report))
    return int(any(max(row.float32, row.exported) >= LIMIT for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
