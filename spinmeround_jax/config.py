"""The whole experiment as frozen dataclasses; a ConfigDict from `configs/` becomes one here, once.

Below this boundary nobody sees ml_collections. Every field must be given in the config file: a config
is complete and tells what it does; a missing, unknown or mistyped field is an error naming it.
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from spinmeround_jax.models import ModelConfig
from spinmeround_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    directory: str  # holds manifest.json and the TFRecord shards
    max_frontal_yaw: float  # degrees; an observed view within counts as showing the face
    max_frontal_pitch: float
    random_background: float  # probability of a random colour instead of white
    guidance_dropout: float  # probability that identity and observed images are dropped
    identity_dropout: float  # probability that the identity alone is: the image must do without it
    relative_cameras: bool  # cameras in the frame of the first observed view
    skip_corrupt: bool  # count and skip unreadable records instead of stopping
    workers: int  # Grain worker processes; 0 decodes in the training process
    prefetch: int  # batches held ready


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """Latents computed once instead of in every step, see `latent_cache`."""

    directory: str  # "" encodes the images in every step; train writes what is missing here
    backgrounds: int  # random colours per subject that the cache holds
    sample: bool  # draw from the autoencoder's posterior instead of taking its mean


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stretch of training with one way of drawing observed views; the paper has two."""

    steps: int
    observed: tuple[int, ...]  # number of observed views, drawn uniformly from these


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float
    warmup_steps: int
    schedule: str  # "constant" | "cosine" (to zero at the last step)
    weight_decay: float
    beta1: float
    beta2: float
    max_gradient_norm: float
    ema_decay: float
    batch_size: int  # examples over all devices


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """ln sigma ~ N(mean + ln(targets) / 2, std^2); open in the paper, our choice."""

    mean: float
    std: float


@dataclasses.dataclass(frozen=True)
class AutoencoderTrainingConfig:
    """Training of the autoencoder itself; steps = 0 where pretrained weights are loaded."""

    steps: int
    directory: str  # data to train it on where that is not data.directory; "" where it is
    crop: int  # pixels of the random crops trained on; image_size takes whole images
    lpips_weight: float
    kl_weight: float
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """What is measured on held-out heads while training, beside the same on as many training heads."""

    every: int  # steps
    heads: int  # 0 measures nothing
    sigmas: tuple[float, ...]  # of the diffusion loss, see `held_out_loss`


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """The paper's ablations: what the model is denied, in training and in sampling alike."""

    no_identity: bool
    no_normals: bool
    no_image: bool


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Defaults of `sample` and of the grids drawn while training."""

    steps: int
    sampler: str  # "euler" | "heun"
    sigma_min: float
    sigma_max: float
    rho: float
    guidance_scale: float
    shared_noise: bool  # one noise map for all target views of a sample, as released
    normals_steps: int
    normals_guidance: float  # x0 <- x0 - normals_guidance (x0 - known) on visible channels
    temperature: float = 1.0  # of the initial noise where a view is observed; 1 as released


# The released code's values; 6.1 is its in-painting weight, free of the resolution (diffusion/guidance.py).
RELEASED = SamplingConfig(
    steps=50,
    sampler="euler",
    sigma_min=0.002,
    sigma_max=700.0,
    rho=7.0,
    guidance_scale=3.5,
    shared_noise=True,
    normals_steps=50,
    normals_guidance=6.1,
    temperature=1.0,
)
NO_ABLATION = AblationConfig(no_identity=False, no_normals=False, no_image=False)


@dataclasses.dataclass(frozen=True)
class Config:
    name: str
    seed: int
    model: ModelConfig
    init_from: str  # directory written by `convert`, or "" to start from scratch
    train_identity_encoder: bool
    compute_dtype: str  # "float32" | "bfloat16"; master weights are float32
    mesh: MeshConfig
    remat: str  # what the backward pass computes again: "nothing" | "elementwise" | "blocks"
    accumulation: int  # parts of the batch whose gradients are added up, one after another
    data: DataConfig
    latents: LatentsConfig
    noise: NoiseConfig
    optimizer: OptimizerConfig
    stages: tuple[StageConfig, ...]
    autoencoder_training: AutoencoderTrainingConfig
    held_out: HeldOutConfig
    ablation: AblationConfig
    sampling: SamplingConfig
    log_every: int
    sample_every: int
    checkpoint_every: int
    keep_checkpoints: int


def from_mapping(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Build the dataclass `cls` (nested) from a mapping such as a ConfigDict or parsed JSON.

    Raises:
        ValueError: naming the field, when one is missing, unknown or of the wrong type.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ValueError(f"{where}: expected a mapping of fields, got {values!r}")
    values = dict(values.items())
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"{where}: unknown {', '.join(map(str, unknown))}")
    return cls(**{name: _convert(hints[name], values[name], f"{where}.{name}") for name in names})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise ValueError(f"{where}: expected a sequence, got {value!r}")
        element = typing.get_args(hint)[0]
        return tuple(_convert(element, item, f"{where}[{i}]") for i, item in enumerate(value))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        raise TypeError(f"{where}: config fields have one type")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def no_such_value(error: AttributeError) -> str:
    """ml_collections' words about an unknown name on one line, with what may have been meant."""
    words = str(error)
    while words[:1] in ("'", '"') and words[-1] == words[0]:  # it quotes what is quoted
        words = ast.literal_eval(words)
    return ". ".join(words.splitlines())
