"""The checkpoints of a training run, written by Orbax: to resume from, and to make a model of.

Each holds the whole `TrainState`, the loader's position, the config and the run's history. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx

from spinmeround_jax import checkpoints, models, schema
from spinmeround_jax.checkpoints import Path
from spinmeround_jax.config import Config, OptimizerConfig, from_mapping, with_added
from spinmeround_jax.files import InputError
from spinmeround_jax.models import Model, parameters

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
        self._type, self._config = type(config), dataclasses.asdict(config)
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
            history = saved.pop(_HISTORY, [])
            return with_added(self._type, saved), history

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
        fixed = {"autoencoder": checkpoints.load_autoencoder(run / "autoencoder")}
    else:
        pretrained = checkpoints.load_model(config.init_from)
        fixed = {"autoencoder": pretrained.autoencoder, "identity": pretrained.identity}
    names = ("unet", "identity") if config.train_identity_encoder else ("unet",)
    networks = nnx.eval_shape(lambda: models.build(config.model, rngs=nnx.Rngs(0)).networks)
    split = {name: parameters.split(networks[name]) for name in names}
    part = "ema" if average else "params"
    target = {
        part: checkpoints.on_first_device({name: shapes for name, (_, shapes) in split.items()})
    }
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
