"""Training checkpoints to resume from, and finished models, written by Orbax.

A training checkpoint holds the whole `TrainState`, the loader's position and the config. A model
folder holds `model.json` (the config of the networks, and the provenance of their weights),
`weights/`, and `SHA256SUMS` of all files, in the format of `sha256sum -c`. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
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
    Config,
    OptimizerConfig,
    SamplingConfig,
    from_mapping,
)
from spinmeround_jax.files import InputError
from spinmeround_jax.models import Autoencoder, AutoencoderConfig, Model, ModelConfig, parameters

SCHEMA_VERSION = 1
SUMS = "SHA256SUMS"

Path = str | os.PathLike[str]

# A run may be resumed with other values of these. They do not change the course of training or, like those of
# the optimizer, change it on purpose: then the change is added to the run's history.
FREE_FIELDS = (
    *(f"optimizer.{f.name}" for f in dataclasses.fields(OptimizerConfig) if f.name != "batch_size"),
    "name",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "held_out",
    "sampling",
    "mesh",
    "remat",
    "accumulation",
    "data.directory",
    "data.workers",
    "data.prefetch",
    "latents.directory",
)

# --------------------------------------------------------------------------------------------------
# Training checkpoints


class Checkpoints:
    """The checkpoints of one run: `directory/<step>/`, written in the background, the newest kept.

    A step's folder gets its name only when it is complete: a kill during writing loses that step only.

    Attributes:
        history: changes during the run, {"step": ..., "change": ...}, oldest first; saved with each
            checkpoint.
    """

    def __init__(self, directory: Path, *, keep: int, config: Any):
        """`config`: the run's frozen dataclass, with which checkpoints are compared before resuming."""
        self.directory = pathlib.Path(directory).absolute()
        self._config = dataclasses.asdict(config)
        self.history: list[dict[str, Any]] = []
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True
            ),
            item_names=("state", "config", "loader"),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def note(self, step: int, change: str) -> None:
        """Add a change to the history, once."""
        entry = {"step": step, "change": change}
        if entry not in self.history:
            self.history.append(entry)

    def go_back(self, step: int) -> None:
        """Delete the checkpoints after `step`; only once in a run, so that the same command resumes.

        Raises:
            InputError: there is no checkpoint of that step.
        """
        latest = self.latest()
        entry = {"step": step, "change": _WENT_BACK}
        if latest is not None and entry in self._read_config(latest)[1]:
            return
        if step not in self.steps():
            raise _no_such_step(self.directory, step, self.steps())
        for later in self.steps():
            if later > step:
                self._manager.delete(later)
        self.history.append(entry)

    def save(self, step: int, state: Any, loader: Any) -> None:
        """Copy the state now and write it in the background; does nothing if the step is on disk.

        Args:
            loader: has `get_state` and `set_state`, like Grain's iterators, with JSON values.

        Raises:
            InputError: this checkpoint or the one before could not be written; see `wait`.
        """
        if step == self.latest():
            return
        with self._one_line_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    config=ocp.args.JsonSave({**self._config, _HISTORY: self.history}),
                    # Only the first process writes JSON; all have returned as many batches.
                    loader=ocp.args.JsonSave({"state": {"json": loader.get_state()}}),
                ),
                force=True,
            )

    def restore(self, abstract_state: Any, loader: Any) -> Any:
        """The newest state, sharded as `abstract_state`; also restores the position of `loader`.

        Args:
            abstract_state: ShapeDtypeStructs with shardings.

        Raises:
            InputError: the config differs, or the files cannot be read.
        """
        step = self.latest()
        folder = self.directory / str(step)
        saved, history = self._read_config(step)
        if changes := config_changes(saved, self._config, step):
            raise InputError(
                f"{folder} was written with another config: {'; '.join(changes)}. Set these back, "
                "or start a new run with another --workdir"
            )
        self.history = history + self.history
        for change in schema.differences(saved, self._config):
            if change.startswith(("optimizer.", "stages")):
                self.note(step, change)
        with _readable(folder):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state),
                    loader=ocp.args.JsonRestore(),
                ),
            )
            position = restored["loader"]["state"]["json"]
        if position.get("step", step) != step:
            raise InputError(
                f"{folder}: its data loader stood at step {position['step']!r}. {_UNREADABLE}"
            )
        loader.set_state(position)
        return restored["state"]

    def _read_config(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The config of a checkpoint, and the history up to it."""
        with _readable(self.directory / str(step)):
            saved = self._manager.restore(
                step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
            )["config"]
            return saved, saved.pop(_HISTORY, [])

    def wait(self) -> None:
        """Return when everything saved is on disk.

        Raises:
            InputError: it could not be written; names the newest checkpoint that is kept.
        """
        with self._one_line_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._one_line_errors():
            self._manager.close()

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # from Orbax, tensorstore or the system, in any of their threads
            reason = " ".join(str(error).split())
            if "No space left" in reason or "quota" in reason.lower():
                reason = "no space left on device, free some"
            try:
                kept = f"The newest that is kept is of step {self.latest()}"
            except Exception:
                kept = "Earlier ones are kept"
            raise InputError(
                f"{self.directory}: a checkpoint could not be written: {reason[:500]}. {kept}; the "
                "same command resumes from there"
            ) from error


_HISTORY = "history"
_WENT_BACK = "went back to this step"
_UNREADABLE = (
    "The checkpoint could not be read and was left as it is; if its files are damaged, delete this "
    "folder to resume from the one before"
)


@contextlib.contextmanager
def _readable(folder: pathlib.Path) -> Iterator[None]:
    """Errors of reading a checkpoint become InputErrors that name its folder."""
    try:
        yield
    except Exception as error:  # Orbax, tensorstore, JSON and the config each have their own
        raise InputError(f"{folder}: {error}. {_UNREADABLE}") from error


def _no_such_step(folder: pathlib.Path, step: int | None, steps: Sequence[int]) -> InputError:
    which, kept = "" if step is None else f" of step {step}", ", ".join(map(str, steps)) or "none"
    return InputError(f"{folder}: no checkpoint{which}; there are: {kept}")


def config_changes(saved: Mapping[str, Any], current: Mapping[str, Any], step: int) -> list[str]:
    """Fields that differ although they must not, as "name: saved -> current".

    FREE_FIELDS may differ, and the stages may in steps that are still to come.
    """
    saved, current = (
        {**values, "stages": _until(values["stages"], step)} if values.get("stages") else values
        for values in (saved, current)
    )
    return [
        change
        for change in schema.differences(saved, current)
        if not any(change.startswith((f"{free}:", f"{free}.")) for free in FREE_FIELDS)
    ]


def _until(stages: Sequence[Mapping[str, Any]], step: int) -> list[dict[str, Any]]:
    """The stages before `step`; neighbours that differ in their lengths only are joined."""
    past: list[dict[str, Any]] = []
    for stage in stages:
        steps = min(stage["steps"], step)
        step -= steps
        if past and {**past[-1], "steps": 0} == {**stage, "steps": 0}:
            past[-1]["steps"] += steps
        elif steps:
            past.append({**stage, "steps": steps})
    return past


def load_trained(
    run: Path, step: int | None, average: bool
) -> tuple[int, Config, list[dict[str, Any]], Model]:
    """The step, config, history and model of a checkpoint of a run.

    Args:
        run: its --workdir.
        step: of one of its checkpoints; None takes the newest.
        average: take the moving average of the weights, as a finished run does.

    Raises:
        InputError: no such checkpoint, a damaged one, or the networks that were not trained are missing.
    """
    run = pathlib.Path(run)
    folder = (run / "checkpoints").absolute()
    steps = sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdecimal())
    if not steps or (step is not None and step not in steps):
        raise _no_such_step(folder, step, steps)
    step = steps[-1] if step is None else step
    folder /= str(step)
    with _readable(folder):
        saved = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "config")
        history = saved.pop(_HISTORY, [])
        config = from_mapping(Config, saved)
    if (run / "autoencoder" / "model.json").is_file():
        fixed = {"autoencoder": load_autoencoder(run / "autoencoder")}
    else:
        pretrained = load_model(config.init_from)
        fixed = {"autoencoder": pretrained.autoencoder, "identity": pretrained.identity}
    names = ("unet", "identity") if config.train_identity_encoder else ("unet",)
    networks = nnx.eval_shape(lambda: models.build(config.model, rngs=nnx.Rngs(0)).networks)
    split = {name: parameters.split(networks[name]) for name in names}
    part = "ema" if average else "params"
    target = {part: _on_first_device({name: shapes for name, (_, shapes) in split.items()})}
    with _readable(folder), ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,  # the rest of the state is three times as large
            ),
        )
    trained = {name: parameters.merge(split[name][0], restored[part][name]) for name in names}
    return step, config, history, Model(config.model, **{**fixed, **trained})


def _on_first_device(shapes: Any) -> Any:
    """ShapeDtypeStructs, to restore float32 arrays of these shapes on this process's first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here), shapes)


# --------------------------------------------------------------------------------------------------
# Finished models


def save_model(
    directory: Path, model: Model, provenance: Mapping[str, Any], dtype: Any = np.float16
) -> None:
    """Write a model folder, see the module.

    Args:
        provenance: where the weights come from (command, seed, steps, date, hardware, data); JSON.
        dtype: of the stored weights.

    Raises:
        ValueError: a weight is not finite in `dtype`.
    """
    weights = {name: parameters.split(module)[1] for name, module in model.networks.items()}
    save_weights(directory, model.config, _finite_as(weights, dtype), provenance)


def save_weights(
    directory: Path,
    config: ModelConfig,
    weights: Mapping[str, parameters.Parameters],
    provenance: Mapping[str, Any],
) -> None:
    """As `save_model`, from parameters by network, in the dtypes that they have."""
    _write(directory, "model", config, provenance, weights)


def save_autoencoder(
    directory: Path, autoencoder: Autoencoder, provenance: Mapping[str, Any]
) -> None:
    """As `save_model`, for an autoencoder alone, in float32."""
    weights = _finite_as({"autoencoder": parameters.split(autoencoder)[1]}, np.float32)
    _write(directory, "autoencoder", autoencoder.config, provenance, weights)


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
    """

    config: ModelConfig
    sampling: SamplingConfig
    ablation: AblationConfig
    provenance: Mapping[str, Any]


def describe(directory: Path) -> Description:
    """The description of the model in `directory`; InputError, naming the field, if it is damaged."""
    config, provenance = _read_config(directory, "model", ModelConfig), read_provenance(directory)
    found = []
    for name, default in (("sampling", RELEASED), ("ablation", NO_ABLATION)):
        values = provenance.get(name, dataclasses.asdict(default))
        where = f"{pathlib.Path(directory) / 'model.json'}: provenance.{name}"
        try:
            found.append(from_mapping(type(default), values, where))
        except ValueError as error:
            raise InputError(str(error)) from error
    return Description(config, *found, provenance)


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
        path = pathlib.Path(directory) / "model.json"
        raise InputError(f"{path}: damaged, provenance ({error!r})") from error


def _write(
    directory: Path,
    kind: str,
    config: ModelConfig | AutoencoderConfig,
    provenance: Mapping[str, Any],
    weights: Mapping[str, parameters.Parameters],
) -> None:
    directory = pathlib.Path(directory).absolute()
    description = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "config": dataclasses.asdict(config),
        "provenance": dict(provenance),
    }
    text = json.dumps(description, indent=2) + "\n"  # may raise: before anything is written
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
        files.write_atomically(directory / "model.json", text.encode())


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
    path = pathlib.Path(directory) / "model.json"
    try:
        description = schema.read(path, _DESCRIPTION, max_bytes=16 << 20)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path}: no such file; give a folder written by training (<workdir>/model) or by "
            "spinmeround_jax.convert"
        ) from error
    except OSError as error:
        raise InputError(files.explain(error)) from error
    except ValueError as error:
        raise InputError(f"{error}; damaged, restore it from a copy") from error
    if (version := description["schema_version"]) != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema version {version!r}, this code reads {SCHEMA_VERSION}; convert the "
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
    path = pathlib.Path(directory) / "model.json"
    description = _read_json(directory)
    if description["kind"] != kind:
        raise InputError(f"{path}: holds {description['kind']!r}, expected {kind!r}")
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
        raise InputError(f"{path}: {error}") from error


def _read_weights(directory: Path, networks: dict[str, nnx.Module]) -> dict[str, nnx.Module]:
    path = pathlib.Path(directory).absolute() / "weights"
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
            weights = {} if problems else checkpointer.restore(path, _on_first_device(expected))
        except Exception as error:
            raise InputError(f"{path}: damaged, restore it from a copy ({error})") from error
    if problems:
        raise InputError(f"{path} does not fit the config in model.json: {'; '.join(problems)}")
    return {name: parameters.merge(graph, weights[name]) for name, (graph, _) in split.items()}


def _check_sums(directory: pathlib.Path) -> None:
    """Raises InputError if a file is not the one that was saved; folders without sums pass."""
    path = directory / SUMS
    try:
        for line in files.read_bytes(path, 16 << 20).decode().splitlines():
            if not (match := re.fullmatch("([0-9a-f]{64})  ([^/].*)", line)) or ".." in line:
                raise InputError(f"{path}: damaged; restore it from a copy ({line[:80]!a})")
            if files.sha256(directory / match[2]) != match[1]:
                raise InputError(
                    f"{directory / match[2]}: damaged or edited, its SHA-256 is not that in {SUMS}; "
                    f"restore it from a copy (or delete {SUMS} if you edited it on purpose)"
                )
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise InputError(f"{error.filename}: missing; copy the whole folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be checked ({error})") from error
