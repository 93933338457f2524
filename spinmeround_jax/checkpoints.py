"""Finished models, written by Orbax; what a run resumes from is in `training.run_checkpoints`.

A model folder holds `model.json` (the config of the networks, and the provenance of their weights),
`weights/`, `SHA256SUMS` of these files, in the format of `sha256sum -c`, and a model card. Nothing is pickled.
Folders to read may be remote, see `weights.remote`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from spinmeround_jax import files, models, schema
from spinmeround_jax.config import (
    NO_ABLATION,
    RELEASED,
    AblationConfig,
    SamplingConfig,
    from_mapping,
)
from spinmeround_jax.files import InputError
from spinmeround_jax.models import Autoencoder, AutoencoderConfig, Model, ModelConfig, parameters
from spinmeround_jax.weights import card, remote
from spinmeround_jax.weights.remote import SUMS, Path

SCHEMA_VERSION = 1
CARD = "README.md"


def save_model(
    directory: Path,
    model: Model,
    provenance: Mapping[str, Any],
    dtype: Any = np.float16,
    overwrite: bool = False,
) -> None:
    """Write a model folder, see the module.

    Args:
        provenance: where the weights come from (command, seed, steps, date, hardware, data); JSON.
        dtype: of the stored weights.
        overwrite: replace a model that is there; after a kill in between there is none.

    Raises:
        InputError: the folder holds a model or other weights, and `overwrite` is False.
        ValueError: a weight is not finite in `dtype`.
    """
    weights = {name: parameters.split(module)[1] for name, module in model.networks.items()}
    weights = _finite_as(weights, dtype)
    _write(directory, "model", model.config, provenance, weights, overwrite)


def save_weights(
    directory: Path,
    config: ModelConfig,
    weights: Mapping[str, parameters.Parameters],
    provenance: Mapping[str, Any],
) -> None:
    """As `save_model`, from parameters by network, in the dtypes that they have."""
    _write(directory, "model", config, provenance, weights)


def save_autoencoder(
    directory: Path,
    autoencoder: Autoencoder,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """As `save_model`, for an autoencoder alone, in float32."""
    weights = _finite_as({"autoencoder": parameters.split(autoencoder)[1]}, np.float32)
    _write(directory, "autoencoder", autoencoder.config, provenance, weights, overwrite)


def load_model(directory: Path, dtype: Any = jnp.float32) -> Model:
    """The model in `directory`, with float32 parameters, computing in `dtype`.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
    """
    config = _read_config(directory, "model", ModelConfig)
    networks = nnx.eval_shape(lambda: models.build(config, dtype=dtype, rngs=nnx.Rngs(0)).networks)
    return Model(config, **_read_weights(directory, networks))


def load_autoencoder(directory: Path, dtype: Any = jnp.float32) -> Autoencoder:
    """The autoencoder of a folder written by `save_autoencoder` or `save_model`."""
    if _read_json(directory)["kind"] == "model":
        return load_model(directory, dtype).autoencoder
    config = _read_config(directory, "autoencoder", AutoencoderConfig)
    module = nnx.eval_shape(lambda: Autoencoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return _read_weights(directory, {"autoencoder": module})["autoencoder"]


@dataclasses.dataclass(frozen=True)
class Description:
    """The content of `model.json`: enough to plan with before any weights are read.

    Attributes:
        sampling, ablation: how the model is sampled; the release's where the file does not say.
        sha256: of SHA256SUMS, which identifies the weights; None in folders without it.
    """

    config: ModelConfig
    sampling: SamplingConfig
    ablation: AblationConfig
    provenance: Mapping[str, Any]
    sha256: str | None


def describe(directory: Path) -> Description:
    """The description of the model in `directory`; InputError, naming the field, if it is damaged."""
    config, provenance = _read_config(directory, "model", ModelConfig), read_provenance(directory)
    found = []
    for name, default in (("sampling", RELEASED), ("ablation", NO_ABLATION)):
        values = provenance.get(name, dataclasses.asdict(default))
        where = f"{remote.locate(directory).path / 'model.json'}: provenance.{name}"
        try:
            found.append(from_mapping(type(default), values, where))
        except ValueError as error:
            raise InputError(str(error)) from error
    sums = remote.locate(directory).path / SUMS
    return Description(config, *found, provenance, files.sha256(sums) if sums.exists() else None)


def read_provenance(directory: Path) -> dict[str, Any]:
    """Where a model's weights come from, as given to `save_model`."""
    return _read_json(directory)["provenance"]


def origins(directory: Path) -> list[str]:
    """A line for each file the weights were converted from; none if they were trained here."""
    try:
        return [
            f"{source['file']}, SHA-256 {source['sha256']}"
            for source in read_provenance(directory).get("sources", [])
        ]
    except (AttributeError, KeyError, TypeError) as error:
        path = remote.locate(directory).path / "model.json"
        raise InputError(f"{path}: damaged, provenance ({error!r})") from error


def _write(
    directory: Path,
    kind: str,
    config: ModelConfig | AutoencoderConfig,
    provenance: Mapping[str, Any],
    weights: Mapping[str, parameters.Parameters],
    overwrite: bool = False,
) -> None:
    directory = pathlib.Path(directory).absolute()
    if not overwrite and any((directory / name).exists() for name in ("model.json", "weights")):
        raise InputError(f"{directory}: holds weights; save elsewhere, or with overwrite=True")
    text = description_text(config, provenance, kind)  # may raise: before anything is written
    first = jax.process_index() == 0
    if first:
        (directory / "model.json").unlink(missing_ok=True)  # written last: then all is complete
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "weights", weights, force=True)
    if first:
        marker = directory / "weights" / "commit_success.txt"
        if (
            marker.exists()
        ):  # Orbax writes the path of the folder, which a shared model should not show
            marker.write_text("Checkpoint commit was successful.")
        sums = {"model.json": hashlib.sha256(text.encode()).hexdigest()}
        for path in sorted(p for p in (directory / "weights").rglob("*") if p.is_file()):
            sums[path.relative_to(directory).as_posix()] = files.sha256(path)
        lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        files.write_atomically(directory / SUMS, lines.encode())
        # Without a sum: it is for people, who may edit it.
        if kind == "model" and (overwrite or not (directory / CARD).exists()):
            sizes = {name: parameters.count(values) for name, values in weights.items()}
            readme = card.text(config, provenance, sizes, "model")
            files.write_atomically(directory / CARD, readme.encode())
        files.write_atomically(directory / "model.json", text.encode())


def description_text(
    config: ModelConfig | AutoencoderConfig, provenance: Mapping[str, Any], kind: str = "model"
) -> str:
    """The content of model.json."""
    description = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "config": dataclasses.asdict(config),
        "provenance": dict(provenance),
    }
    return json.dumps(description, indent=2) + "\n"


def parse_description(content: bytes, where: str) -> tuple[ModelConfig, dict[str, Any]]:
    """Config and provenance from `description_text`; InputError, beginning with `where`, if damaged."""
    description = _parse(content, where)
    return _config(description, where, "model", ModelConfig), description["provenance"]


def _finite_as(
    weights: dict[str, parameters.Parameters], dtype: Any
) -> dict[str, parameters.Parameters]:
    weights, finite = _cast(weights, np.dtype(dtype))
    for network, tensors in jax.device_get(finite).items():
        if broken := [f"{network}/{name}" for name, ok in tensors.items() if not ok]:
            raise ValueError(f"{', '.join(broken)}: not finite as {np.dtype(dtype).name}")
    return weights


@functools.partial(jax.jit, static_argnums=1)
def _cast(weights: Any, dtype: np.dtype) -> tuple[Any, Any]:
    """`weights` as `dtype`, and whether each is finite then."""
    weights = jax.tree.map(lambda x: x.astype(dtype), weights)
    return weights, jax.tree.map(lambda x: jnp.isfinite(x).all(), weights)


def _read_json(directory: Path) -> dict[str, Any]:
    path = remote.locate(directory).path / "model.json"
    if not path.exists():
        files.recover(path.parent)
    try:
        return _parse(files.read_bytes(path, 16 << 20), str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path}: no such file; give a folder written by training (<workdir>/model) or by "
            "spinmeround_jax.convert"
        ) from error
    except OSError as error:
        raise InputError(files.explain(error)) from error


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        description = schema.parse(content, _DESCRIPTION, where)
    except ValueError as error:
        raise InputError(f"{error}; damaged, restore it from a copy") from error
    if (version := description["schema_version"]) != SCHEMA_VERSION:
        raise InputError(
            f"{where}: schema version {version!r}, this code reads {SCHEMA_VERSION}; convert the "
            "weights again, or use the code that wrote them"
        )
    return description


_DESCRIPTION = schema.record(
    {
        "schema_version": schema.integer(),
        "kind": schema.text(),
        "config": schema.record({}),
        "provenance": schema.record({}),
    }
)
# Ranges within which the shapes of the networks are computed in seconds; a field means the same in all
# networks, and `from_mapping` checks the rest.
_COUNT, _WIDTH, _ID = schema.integer(1, 256), schema.integer(1, 1 << 16), schema.integer(0, 1 << 24)
_RANGES = {
    **dict.fromkeys(("views", "res_blocks", "latent_channels", "heads"), _COUNT),
    **dict.fromkeys(("transformer_depth", "layers"), _COUNT),
    **dict.fromkeys(("image_size", "in_channels", "out_channels", "channels"), _WIDTH),
    **dict.fromkeys(("model_channels", "context_dim", "norm_groups"), _WIDTH),
    **dict.fromkeys(("width", "mlp_width", "context_length"), _WIDTH),
    **dict.fromkeys(("id_token", "pad_id"), _ID),
    **dict.fromkeys(("prompt_ids", "empty_ids"), schema.array(_ID, 1, 4096)),
    **dict.fromkeys(
        ("attention_levels", "joint_levels"), schema.array(schema.integer(0, 15), 0, 16)
    ),
    "vocab_size": schema.integer(1, 1 << 24),
    "channel_mult": schema.array(_COUNT, 1, 16),
    "scale_factor": schema.number(1e-6, 1e6),
    "linear_path": schema.boolean,
    "latent_mean": schema.array(schema.number(), 0, 512),
    "latent_std": schema.array(schema.number(1e-9), 0, 512),
}
_NETWORKS = dict.fromkeys(("unet", "autoencoder", "identity"), schema.record({}, _RANGES))
_CONFIG = schema.record({}, {**_RANGES, **_NETWORKS})


def check_config(config: ModelConfig) -> None:
    """Raises ValueError naming a field outside the range in which networks can be built."""
    _CONFIG(json.loads(json.dumps(dataclasses.asdict(config))), "config.model")


def _read_config(directory: Path, kind: str, cls: type) -> Any:
    path = remote.locate(directory).path / "model.json"
    return _config(_read_json(directory), str(path), kind, cls)


def _config(description: Mapping[str, Any], where: str, kind: str, cls: type) -> Any:
    if description["kind"] != kind:
        raise InputError(f"{where}: holds {description['kind']!r}, expected {kind!r}")
    values = description["config"]
    # Fields that folders from before there was a choice do not have.
    if cls is ModelConfig:
        values = {"normals_frame": "world", **values}
        if isinstance(values.get("autoencoder"), dict):
            values["autoencoder"] = {"linear_path": False, **values["autoencoder"]}
    else:
        values = {"linear_path": False, **values}
    try:
        return from_mapping(cls, _CONFIG(values, "config"))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _read_weights(directory: Path, networks: dict[str, nnx.Module]) -> dict[str, nnx.Module]:
    path = remote.locate(directory).path.absolute() / "weights"
    if not path.is_dir():
        raise InputError(f"{path}: no such folder, though model.json is there; copy it too")
    _check_sums(path.parent)
    split = {name: parameters.split(module) for name, module in networks.items()}
    expected = {name: shapes for name, (_, shapes) in split.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            found = checkpointer.metadata(path).item_metadata
            found = {name: dict(found[name]) for name in found}
            problems = [
                f"{name}: {problem}"
                for name in sorted(expected.keys() | found.keys())
                for problem in parameters.mismatches(expected.get(name, {}), found.get(name, {}))
            ]
            weights = {} if problems else checkpointer.restore(path, on_first_device(expected))
        except Exception as error:
            raise InputError(f"{path}: damaged, restore it from a copy ({error})") from error
    if problems:
        raise InputError(f"{path} does not fit the config in model.json: {'; '.join(problems)}")
    return {name: parameters.merge(graph, weights[name]) for name, (graph, _) in split.items()}


def _check_sums(directory: pathlib.Path) -> None:
    """Raises InputError if a file is not the one that was saved; folders without sums pass."""
    path = directory / SUMS
    try:
        sums = remote.parse_sums(files.read_bytes(path, remote.MAX_SUMS_BYTES), path)
        for name, digest in sums.items():
            if files.sha256(directory / name) != digest:
                raise InputError(
                    f"{directory / name}: damaged or edited, its SHA-256 is not that in {SUMS}; "
                    f"restore it from a copy (or delete {SUMS} if you edited it on purpose)"
                )
        found = [p for p in (directory / "weights").rglob("*") if p.is_file() and p.name[0] != "."]
        if missing := {directory / "model.json", *found} - {directory / name for name in sums}:
            raise InputError(f"{path}: cut short, {min(missing).name} is not in it; restore it")
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise InputError(f"{error.filename}: missing; copy the whole folder") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be checked ({error})") from error


def on_first_device(shapes: Any) -> Any:
    """ShapeDtypeStructs, to restore float32 arrays of these shapes on this process's first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here), shapes)
