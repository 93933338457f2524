"""What a run leaves on disk, through Orbax: checkpoints to resume from, and finished models.

A training checkpoint holds the whole `TrainState`, the loader's position and the config. A model
folder holds `model.json` (what the networks are, and where they come from), `weights/`, and
`SHA256SUMS` of all their files, as `sha256sum -c` reads it. Nothing is pickled.
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
from typing import Any, Protocol

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

# A run may be resumed with other values of these: they leave the course of training as it is, or, those of
# the optimizer, steer it; a change of them is kept in the history of the run.
OPTIMIZER_FIELDS = tuple(
    f"optimizer.{field.name}"
    for field in dataclasses.fields(OptimizerConfig)
    if field.name != "batch_size"  # examples are counted in batches
)
FREE_FIELDS = (
    *OPTIMIZER_FIELDS,
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


class Loader(Protocol):
    """What checkpoints ask of a data iterator, as Grain's; states are JSON values or bytes."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


# --------------------------------------------------------------------------------------------------
# Training checkpoints


class Checkpoints:
    """The checkpoints of one run: `directory/<step>/`, written in the background, the newest kept.

    A step's folder gets its name only when complete, so a kill while writing costs that step.

    Attributes:
        history: what was changed on the way, {"step": ..., "change": ...}, oldest first; saved with each
            checkpoint.
    """

    def __init__(self, directory: Path, *, keep: int, config: Any):
        """`config`: the run's frozen dataclass; a run with another one is not resumed."""
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
        """Add to the history, once."""
        entry = {"step": step, "change": change}
        if entry not in self.history:
            self.history.append(entry)

    def go_back(self, step: int) -> None:
        """Delete the checkpoints after `step`, unless the run went back there before: then do nothing.

        So the same command can be given again after an interruption.

        Raises:
            InputError: there is no checkpoint of that step.
        """
        entry = {"step": step, "change": _WENT_BACK}
        latest = self.latest()
        if latest is not None and entry in self._read_config(latest)[1]:
            return
        if step not in self.steps():
            kept = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"{self.directory}: no checkpoint of step {step}; there are: {kept}")
        for later in self.steps():
            if later > step:
                self._manager.delete(later)
        self.history.append(entry)

    def save(self, step: int, state: Any, loader: Loader) -> None:
        """Copy the state now, write it in the background; a step already on disk is left alone.

        Raises:
            InputError: this one or the one before could not be written; see `wait`.
        """
        if step == self.latest():
            return
        with self._told():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    config=ocp.args.JsonSave({**self._config, _HISTORY: self.history}),
                    # The first process's: all have returned as many batches, JSON is written once.
                    loader=ocp.args.JsonSave({"state": _to_json(loader.get_state())}),
                ),
                force=True,
            )

    def restore(self, abstract_state: Any, loader: Loader) -> Any:
        """The newest state, placed as `abstract_state` says; `loader` is moved to where it stood.

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
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state),
                    loader=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            raise InputError(f"{folder}: {error}. {_UNREADABLE}") from error
        position = _from_json(restored["loader"]["state"])
        if isinstance(position, dict) and position.get("step", step) != step:
            raise InputError(
                f"{folder}: its data loader stood at step {position['step']!r}. {_UNREADABLE}"
            )
        loader.set_state(position)
        return restored["state"]

    def _read_config(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The config of a checkpoint, and the history up to it."""
        try:
            saved = self._manager.restore(
                step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
            )["config"]
            return saved, saved.pop(_HISTORY, [])
        except Exception as error:  # Orbax, tensorstore and JSON each have their own
            raise InputError(f"{self.directory / str(step)}: {error}. {_UNREADABLE}") from error

    def wait(self) -> None:
        """Return when everything saved is on disk.

        Raises:
            InputError: it could not be written, and which earlier one is kept.
        """
        with self._told():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._told():
            self._manager.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of Orbax, tensorstore or the system, from threads of theirs
            reason = " ".join(str(error).split())
            if "No space left" in reason or "quota" in reason.lower():
                reason = "no space left on device, free some"
            try:
                kept = f"The newest that is kept is of step {self.latest()}"
            except Exception:
                kept = "Those of before are kept"
            raise InputError(
                f"{self.directory}: a checkpoint could not be written: {reason[:500]}. {kept}; the "
                "same command resumes from there"
            ) from error


_UNREADABLE = (
    "The checkpoint could not be read and was left as it is; if its files are damaged, delete this "
    "folder to resume from the one before"
)


_HISTORY = "history"
_WENT_BACK = "went back to this step"


def config_changes(saved: Mapping[str, Any], current: Mapping[str, Any], step: int) -> list[str]:
    """Fields whose values differ and may not, as "name: saved -> current".

    Free are FREE_FIELDS, and what the stages say of steps that are still to come.
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
    """The stages before `step`; those that are equal but for their length are one."""
    past: list[dict[str, Any]] = []
    for stage in stages:
        steps = min(stage["steps"], step)
        step -= steps
        rest = {name: value for name, value in stage.items() if name != "steps"}
        if past and {**past[-1], "steps": 0} == {**rest, "steps": 0}:
            past[-1]["steps"] += steps
        elif steps:
            past.append({**rest, "steps": steps})
    return past


def load_trained(
    run: Path, step: int | None, average: bool
) -> tuple[int, Config, list[dict[str, Any]], Model]:
    """The model that a run had at a checkpoint, with its step, config and history.

    Args:
        run: the --workdir.
        step: of one of its checkpoints; None takes the newest.
        average: take the moving average of the weights, as a finished run does.

    Raises:
        InputError: no such checkpoint, damaged, or the networks that were not trained are gone.
    """
    run = pathlib.Path(run)
    folder = run / "checkpoints"
    steps = sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdecimal())
    if not steps or (step is not None and step not in steps):
        kept = ", ".join(map(str, steps)) or "none"
        raise InputError(
            f"{folder}: no checkpoint{'' if step is None else f' of step {step}'}; there are: {kept}"
        )
    step = steps[-1] if step is None else step
    folder = (folder / str(step)).absolute()
    try:
        saved = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "config")
        history = saved.pop(_HISTORY, [])
        config = from_mapping(Config, saved)
    except Exception as error:  # Orbax, JSON and the schema each have their own
        raise InputError(f"{folder}: {error}. {_UNREADABLE}") from error
    if (run / "autoencoder" / "model.json").is_file():
        fixed = {"autoencoder": load_autoencoder(run / "autoencoder")}
    else:
        pretrained = load_model(config.init_from)
        fixed = {"autoencoder": pretrained.autoencoder, "identity": pretrained.identity}
    trained = ("unet", "identity") if config.train_identity_encoder else ("unet",)
    shapes = nnx.eval_shape(lambda: models.build(config.model, rngs=nnx.Rngs(0)).networks)
    split = {name: parameters.split(shapes[name]) for name in trained}
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    part = "ema" if average else "params"
    target = {part: {name: tensors for name, (_, tensors) in split.items()}}
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here), target
    )
    try:
        # The rest of the state, three times as large, is not read.
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
    except Exception as error:
        raise InputError(f"{folder}: {error}. {_UNREADABLE}") from error
    learnt = {name: parameters.merge(split[name][0], restored[part][name]) for name in trained}
    return step, config, history, Model(config.model, **{**fixed, **learnt})


def _to_json(state: Any) -> Any:
    return {"bytes": state.decode("latin-1")} if isinstance(state, bytes) else {"json": state}


def _from_json(stored: Mapping[str, Any]) -> Any:
    return stored["bytes"].encode("latin-1") if "bytes" in stored else stored["json"]


# --------------------------------------------------------------------------------------------------
# Finished models


def save_model(
    directory: Path, model: Model, provenance: Mapping[str, Any], dtype: Any = np.float16
) -> None:
    """Write `directory/model.json` and `directory/weights/`.

    Args:
        provenance: where the weights come from (command, seed, steps, date, hardware, data); JSON.
        dtype: of the stored weights.

    Raises:
        ValueError: a weight that is not finite in `dtype`.
    """
    save_weights(directory, model.config, _finite_as(_weights(model), dtype), provenance)


def save_weights(
    directory: Path,
    config: ModelConfig,
    weights: Mapping[str, parameters.Parameters],
    provenance: Mapping[str, Any],
) -> None:
    """As `save_model`, of parameters by network, each in the dtype it has."""
    _write(directory, "model", dataclasses.asdict(config), provenance, weights)


def load_model(directory: Path, dtype: Any = jnp.float32) -> Model:
    """The model in `directory`, with float32 parameters, computing in `dtype`.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
    """
    config = _read_config(directory, "model", ModelConfig)
    model = nnx.eval_shape(lambda: models.build(config, dtype=dtype, rngs=nnx.Rngs(0)).networks)
    return Model(config, **_read_weights(directory, model))


def save_autoencoder(
    directory: Path, autoencoder: Autoencoder, provenance: Mapping[str, Any]
) -> None:
    """As `save_model`, for an autoencoder alone, in float32."""
    _write(
        directory,
        "autoencoder",
        dataclasses.asdict(autoencoder.config),
        provenance,
        _finite_as({"autoencoder": parameters.split(autoencoder)[1]}, np.float32),
    )


def load_autoencoder(directory: Path, dtype: Any = jnp.float32) -> Autoencoder:
    """As `load_model`, for `save_autoencoder`; of a whole model, its autoencoder."""
    if _read_json(directory)["kind"] == "model":
        return load_model(directory, dtype).autoencoder
    config = _read_config(directory, "autoencoder", AutoencoderConfig)
    module = nnx.eval_shape(lambda: Autoencoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return _read_weights(directory, {"autoencoder": module})["autoencoder"]


@dataclasses.dataclass(frozen=True)
class Description:
    """What `model.json` says of a model: enough to plan with, before any weights are read.

    Attributes:
        sampling, ablation: how it is sampled; as released, where it does not say.
    """

    config: ModelConfig
    sampling: SamplingConfig
    ablation: AblationConfig
    provenance: Mapping[str, Any]


def describe(directory: Path) -> Description:
    """The description of the model in `directory`.

    Raises:
        InputError: there is none, or one that is damaged; the message names the field.
    """
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
    """A line for each file the weights were converted from; none where they were trained here."""
    try:
        return [
            f"{source['file']}, SHA-256 {source['sha256']}"
            for source in read_provenance(directory).get("sources", [])
        ]
    except (AttributeError, KeyError, TypeError) as error:
        path = pathlib.Path(directory) / "model.json"
        raise InputError(f"{path}: damaged, provenance ({error!r})") from error


def _weights(model: Model) -> dict[str, parameters.Parameters]:
    return {name: parameters.split(module)[1] for name, module in model.networks.items()}


def _write(
    directory: Path,
    kind: str,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    weights: Mapping[str, parameters.Parameters],
) -> None:
    directory = pathlib.Path(directory).absolute()
    description = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "config": config,
        "provenance": dict(provenance),
    }
    text = json.dumps(description, indent=2) + "\n"  # before anything is written: may raise
    if jax.process_index() == 0:
        (directory / "model.json").unlink(missing_ok=True)  # the folder is complete when it is back
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "weights", weights, force=True)
    if jax.process_index() == 0:
        marker = directory / "weights" / "commit_success.txt"
        if marker.exists():  # Orbax writes where it was; a model that is passed on need not tell
            marker.write_text("Checkpoint commit was successful.")
        sums = {"model.json": hashlib.sha256(text.encode()).hexdigest()}
        for path in sorted(p for p in (directory / "weights").rglob("*") if p.is_file()):
            sums[path.relative_to(directory).as_posix()] = files.sha256(path)
        lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        files.write_atomically(directory / SUMS, lines.encode())
        # Last, so that a folder with a model.json is complete.
        files.write_atomically(directory / "model.json", text.encode())


def _finite_as(
    weights: dict[str, parameters.Parameters], dtype: Any
) -> dict[str, parameters.Parameters]:
    weights, finite = _cast(weights, np.dtype(dtype))
    for network, tensors in jax.device_get(finite).items():
        if broken := [f"{network}/{name}" for name, sound in tensors.items() if not sound]:
            raise ValueError(f"{', '.join(broken)}: not finite as {np.dtype(dtype).name}")
    return weights


@functools.partial(jax.jit, static_argnums=1)
def _cast(weights: Any, dtype: np.dtype) -> tuple[Any, Any]:
    """`weights` as `dtype`, and whether each is finite as such."""
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
# Ranges within which building the networks' shapes takes no time; `from_mapping` checks the rest.
_COUNT, _WIDTH = schema.integer(1, 256), schema.integer(1, 1 << 16)
_LEVELS = schema.array(schema.integer(0, 15), 0, 16)
_AUTOENCODER = schema.record(
    {},
    {
        "channels": _WIDTH,
        "channel_mult": schema.array(_COUNT, 1, 16),
        "res_blocks": _COUNT,
        "latent_channels": _COUNT,
        "scale_factor": schema.number(1e-6, 1e6),
        "norm_groups": _WIDTH,
        "linear_path": schema.boolean,
    },
)
_CONFIGS = {
    "autoencoder": _AUTOENCODER,
    "model": schema.record(
        {},
        {
            "image_size": _WIDTH,
            "views": _COUNT,
            "unet": schema.record(
                {},
                {
                    **dict.fromkeys(("in_channels", "out_channels", "model_channels"), _WIDTH),
                    **dict.fromkeys(("context_dim", "norm_groups"), _WIDTH),
                    **dict.fromkeys(("res_blocks", "heads", "transformer_depth"), _COUNT),
                    "channel_mult": schema.array(_COUNT, 1, 16),
                    "attention_levels": _LEVELS,
                    "joint_levels": _LEVELS,
                },
            ),
            "autoencoder": _AUTOENCODER,
            "identity": schema.record(
                {},
                {
                    **dict.fromkeys(("layers", "heads"), _COUNT),
                    **dict.fromkeys(("width", "mlp_width", "context_length"), _WIDTH),
                    **dict.fromkeys(("vocab_size",), schema.integer(1, 1 << 24)),
                    **dict.fromkeys(("id_token", "pad_id"), schema.integer(0, 1 << 24)),
                    "prompt_ids": schema.array(schema.integer(0, 1 << 24), 1, 4096),
                    "empty_ids": schema.array(schema.integer(0, 1 << 24), 1, 4096),
                },
            ),
            "latent_mean": schema.array(schema.number(), 0, 512),
            "latent_std": schema.array(schema.number(1e-9), 0, 512),
        },
    ),
}


def check_config(config: ModelConfig) -> None:
    """Raises InputError naming a field out of the range in which networks can be built."""
    _CONFIGS["model"](json.loads(json.dumps(dataclasses.asdict(config))), "config.model")


def _read_config(directory: Path, kind: str, cls: type) -> Any:
    path = pathlib.Path(directory) / "model.json"
    description = _read_json(directory)
    if description["kind"] != kind:
        raise InputError(f"{path}: holds {description['kind']!r}, expected {kind!r}")
    values = description["config"]
    if cls is ModelConfig and isinstance(values, dict):
        values = {"normals_frame": "world", **values}  # of folders from before there was a choice
    try:
        return from_mapping(cls, _CONFIGS[kind](values, "config"))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _read_weights(directory: Path, networks: dict[str, nnx.Module]) -> dict[str, nnx.Module]:
    path = pathlib.Path(directory).absolute() / "weights"
    if not path.is_dir():
        raise InputError(f"{path}: no such folder, though model.json is there; copy it too")
    _check_sums(path.parent)
    graphs, expected = {}, {}
    for name, module in networks.items():
        graphs[name], expected[name] = parameters.split(module)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            found = checkpointer.metadata(path).item_metadata
            found = {name: dict(found[name]) for name in found}
        except Exception as error:
            raise InputError(f"{path}: damaged, restore it from a copy ({error})") from error
        problems = [
            f"{name}: {problem}"
            for name in sorted(expected.keys() | found.keys())
            for problem in parameters.mismatches(expected.get(name, {}), found.get(name, {}))
        ]
        if problems:
            raise InputError(f"{path} does not fit the config in model.json: {'; '.join(problems)}")
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here), expected
        )
        try:
            weights = checkpointer.restore(path, target)
        except Exception as error:
            raise InputError(f"{path}: damaged, restore it from a copy ({error})") from error
    return {name: parameters.merge(graphs[name], weights[name]) for name in networks}


def _check_sums(directory: pathlib.Path) -> None:
    """Raises InputError where a file is not the one that was saved; folders without sums pass."""
    path = directory / SUMS
    try:
        lines = files.read_bytes(path, 16 << 20).decode().splitlines()
        for line in lines:
            if not (match := re.fullmatch("([0-9a-f]{64})  ([^/].*)", line)) or ".." in line:
                raise InputError(f"{path}: damaged; restore it from a copy ({line[:80]!a})")
            if files.sha256(directory / match[2]) != match[1]:
                raise InputError(
                    f"{directory / match[2]}: damaged or edited, its SHA-256 is not that in {SUMS}; "
                    f"restore it from a copy (or delete {SUMS} if it is as you want it)"
                )
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise InputError(f"{error.filename}: missing; copy the whole folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be checked ({error})") from error
