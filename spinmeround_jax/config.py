"""The whole experiment as frozen dataclasses; the only module that uses ml_collections.

A file of `configs/` builds a `Config` from the values that differ from the defaults. Its ConfigDict holds all
values: each can be overridden, and runs record all of them.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from spinmeround_jax.files import InputError
from spinmeround_jax.models import ModelConfig
from spinmeround_jax.sharding import ALL_ON_DATA, MeshConfig


def added(default: Any) -> Any:
    """A field younger than saved configs, which `from_mapping` reads as if they had the default."""
    return dataclasses.field(default=default, metadata={"added": True})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    directory: str  # holds manifest.json and the TFRecord shards
    # Degrees; views within these limits show "at least part of the frontal face" (limits: our choice).
    max_frontal_yaw: float = 45.0
    max_frontal_pitch: float = 30.0
    random_background: float = 0.5  # probability of a random colour instead of white
    guidance_dropout: float = 0.15  # probability that identity and observed images are dropped
    identity_dropout: float = 0.1  # probability that the identity alone is dropped; our choice
    relative_cameras: bool = True  # cameras in the frame of the first observed view
    skip_corrupt: bool = False  # count and skip unreadable records instead of stopping
    workers: int = 0  # Grain worker processes; 0 decodes in the training process
    prefetch: int = 2  # batches prepared in advance


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """Latents computed once instead of in every step, see `latent_cache`; train writes missing ones."""

    directory: str = ""  # "" encodes the images in every step
    backgrounds: int = 2  # random colours per subject in the cache
    sample: bool = True  # draw from the autoencoder's posterior instead of taking its mean


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stage of training with its numbers of observed views; the paper has two stages."""

    steps: int
    observed: tuple[int, ...]  # number of observed views, drawn uniformly from these


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the paper gives no values, those for the full-size model are our choice."""

    learning_rate: float = 5e-5
    warmup_steps: int = 5000
    schedule: str = "constant"  # "constant" | "cosine" (to zero at the last step)
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.9999
    batch_size: int = 32  # examples over all devices


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """ln sigma ~ N(mean + ln(targets) / 2, std^2); the paper gives no values, these are our choice.

    With SVD's spread and 7 targets 98 % of the noise levels lie between 0.06 and 110.
    """

    mean: float = 0.0
    std: float = 1.6


@dataclasses.dataclass(frozen=True)
class AutoencoderTrainingConfig:
    """Training of the autoencoder; steps = 0 if pretrained weights are loaded."""

    steps: int = 0
    directory: str = ""  # its training data; "" is data.directory
    crop: int = 512  # pixels of random crops; image_size means whole images
    lpips_weight: float = 0.5
    kl_weight: float = 1e-6
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, warmup_steps=1000, weight_decay=0.0, beta2=0.99, ema_decay=0.999
    )


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """Evaluation during training, on held-out heads and on as many training heads."""

    every: int = 10_000  # steps
    heads: int = 8  # 0 turns it off
    sigmas: tuple[float, ...] = (1.0, 10.0, 40.0)  # of the diffusion loss, see `held_out_loss`


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """The paper's ablations: inputs that the model lacks, in training and in sampling."""

    no_identity: bool = False
    no_normals: bool = False
    no_image: bool = False


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Defaults of `sample` and of previews during training; the values are the paper's."""

    steps: int = 50
    sampler: str = "euler"  # of `samplers.SAMPLERS`
    sigma_min: float = 0.002
    sigma_max: float = 700.0
    rho: float = 7.0
    guidance_scale: float = 3.0
    guidance_sigma_min: float = added(0.0)  # guidance acts between these two: everywhere by default
    guidance_sigma_max: float = added(1e6)
    shared_noise: bool = True  # one noise map for all target views of a sample, as released
    normals_steps: int = 50
    normals_guidance: float = 6.1  # x0 <- x0 - normals_guidance (x0 - known) on visible channels
    temperature: float = 1.0  # of the initial noise if a view is observed; released: 1


# The released code has stronger guidance than the paper.
RELEASED = SamplingConfig(guidance_scale=3.5)
NO_ABLATION = AblationConfig()


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment. Defaults are the paper's, or our choice if the paper gives none."""

    name: str
    model: ModelConfig
    data: DataConfig
    stages: tuple[StageConfig, ...]
    seed: int = 0
    init_from: str = ""  # model folder or name (hf://..., gs://...); "" to start from scratch
    train_identity_encoder: bool = False
    compute_dtype: str = "bfloat16"  # "float32" | "bfloat16"; master weights are float32
    mesh: MeshConfig = ALL_ON_DATA
    remat: str = "nothing"  # recomputed in the backward pass: "nothing" | "elementwise" | "blocks"
    accumulation: int = 1  # parts of the batch whose gradients are accumulated
    latents: LatentsConfig = LatentsConfig()
    noise: NoiseConfig = NoiseConfig()
    # Consistency tuning of trained weights, see `loss.consistency_loss`: how often the distance of the two
    # noise levels is halved, in equal parts of the run; 0 trains by diffusion.
    consistency_halvings: int = added(0)
    optimizer: OptimizerConfig = OptimizerConfig()
    autoencoder_training: AutoencoderTrainingConfig = AutoencoderTrainingConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    ablation: AblationConfig = AblationConfig()
    sampling: SamplingConfig = SamplingConfig()
    log_every: int = 100
    sample_every: int = 5000
    checkpoint_every: int = 2500
    keep_checkpoints: int = 3


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The `Config` of a file of configs/ (FILE.py, or FILE.py:ARGUMENT).

    Args:
        overrides: such as "--config.optimizer.batch_size=4", "--config.stages[0].steps=10".

    Raises:
        InputError: no such file or value, or a value of the wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    words = ["spinmeround_jax", f"--config={path}", *overrides]
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=words)
    try:
        values(words)
        return from_mapping(Config, holder.value)
    except OSError as error:  # ml_collections adds several lines
        reason = str(error.__cause__ or error).splitlines()[-1].strip()
        raise InputError(
            f"--config: {reason}; give a file such as configs/quickstart.py"
        ) from error
    except AttributeError as error:
        raise InputError(f"{path} has no such value: {_unquoted(error)}") from error
    except Exception as error:  # from the file, or from ml_collections' parser of overrides
        raise InputError(
            f"{path}: {error}; values are overridden as --config.NAME=VALUE, elements of a tuple as "
            "--config.stages[0].steps=10"
        ) from error


def from_mapping(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Build the dataclass `cls` (nested) from a mapping such as a ConfigDict or parsed JSON.

    Raises:
        ValueError: naming a field that is missing, unknown or of the wrong type.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ValueError(f"{where}: expected a mapping of fields, got {values!r}")
    values = with_added(cls, dict(values.items()))
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"{where}: unknown {', '.join(map(str, unknown))}")
    return cls(**{name: _convert(hints[name], values[name], f"{where}.{name}") for name in names})


def with_added(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a saved `cls` with the fields that are younger, see `added`."""
    younger = {f.name: f.default for f in dataclasses.fields(cls) if f.metadata.get("added")}
    return {**younger, **values}


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise ValueError(f"{where}: expected a sequence, got {value!r}")
        element = typing.get_args(hint)[0]
        return tuple(_convert(element, item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _unquoted(error: AttributeError) -> str:
    """ml_collections' message on one line, with the names that it suggests."""
    text = str(error)
    while text[:1] in ("'", '"') and text[-1] == text[0]:  # quotes are nested
        text = ast.literal_eval(text)
    return ". ".join(text.splitlines())
