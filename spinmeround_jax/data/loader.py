"""Training batches from TFRecord shards, by Grain.

Example n of a run is a pure function of (data set, seed, n): its subject, views and background. Batches
therefore depend neither on the number of worker processes nor on interruptions, and the processes of a
multi-host run together read what a single one would have read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import threading
import types
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import grain
import jax
import numpy as np
from absl import flags

from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.data.latent_files import LatentSource
from spinmeround_jax.data.subjects import SubjectSource, composite_into
from spinmeround_jax.files import InputError

if TYPE_CHECKING:  # the config imports the networks, which worker processes do not need
    from spinmeround_jax.config import DataConfig, StageConfig

_MAX_SUBSTITUTES = 20
_logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------
# Examples


def draw_views(
    rng: np.random.Generator, frontal: np.ndarray, observed: int, views: int
) -> np.ndarray:
    """(views,) distinct indices: the observed views first, one that shows the face before all.

    The paper requires that one of the observed views shows the face.

    Args:
        frontal: (V,) bool, the views that show the face.
        observed: number of observed views; with 0 all views are drawn alike.
    """
    if not observed:
        return rng.choice(len(frontal), views, replace=False)
    first = rng.choice(np.flatnonzero(frontal))
    others = np.delete(np.arange(len(frontal)), first)
    return np.concatenate([[first], rng.choice(others, views - 1, replace=False)])


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """Example numbers -> the arrays of a batch. It is pickled for worker processes."""

    source: SubjectSource
    stage_ends: tuple[int, ...]  # examples, cumulative
    stage_observed: tuple[tuple[int, ...], ...]
    views: int
    seed: int
    config: types.SimpleNamespace  # the fields of DataConfig: its class would import the networks
    normals_frame: cameras.Frame
    latents: LatentSource | None

    def __call__(
        self, examples: Sequence[tuple[int, tuple[shards.ShardIndex, int]]]
    ) -> dict[str, Any]:
        """Fields of the `Batch`, and `faults`: messages about subjects that were replaced."""
        # Images are decoded into the batch: copying them takes as long as decoding at 512 pixels.
        buffers = self._buffers(len(examples))
        faults: list[str] = []
        rest = []
        for i, (n, subject) in enumerate(examples):
            own = {name: array[i] for name, array in buffers.items()}
            rest.append(self._example_or_substitute(n, subject, own, faults))
        fields = {name: np.stack([fields[name] for fields in rest]) for name in rest[0]}
        return {**fields, **buffers, "faults": faults}

    def _buffers(self, count: int) -> dict[str, np.ndarray]:
        if self.latents:
            height, width, channels = self.latents.description.latent_shape
            shape = (count, self.views, 2, height, width, 2 * channels)
            return {"moments": np.empty(shape, np.float32)}
        shape = (count, self.views, self.source.image_size, self.source.image_size, 3)
        return {"images": np.empty(shape, np.float32), "normals": np.empty(shape, np.float32)}

    def _example_or_substitute(
        self,
        n: int,
        subject: tuple[shards.ShardIndex, int],
        buffers: dict[str, np.ndarray],
        all_faults: list[str],
    ) -> dict[str, np.ndarray]:
        """`_example`; unreadable subjects are replaced if configured, and added to `all_faults`."""
        faults: list[str] = []
        while True:
            rng = np.random.default_rng([self.seed, n, len(faults)])
            if faults:
                subject = self.source[int(rng.integers(len(self.source)))]
            try:
                fields = self._example(n, subject, rng, buffers)
                all_faults += faults
                return fields
            except InputError as error:
                if not self.config.skip_corrupt:
                    raise
                faults.append(str(error))
                if len(faults) == _MAX_SUBSTITUTES:
                    raise InputError(
                        f"{len(faults)} unreadable subjects in a row, the last: {error}"
                    ) from error

    def frontal(self, world_to_camera: np.ndarray) -> np.ndarray:
        """(..., 4, 4) poses in the head's frame -> (...) bool, whether the camera sees the face."""
        yaw, pitch = cameras.yaw_pitch(world_to_camera)
        limits = self.config
        return (abs(yaw) <= limits.max_frontal_yaw) & (abs(pitch) <= limits.max_frontal_pitch)

    def _example(
        self,
        n: int,
        subject: tuple[shards.ShardIndex, int],
        rng: np.random.Generator,
        buffers: dict[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Example n: fills `buffers` with its images or moments, returns its other fields."""
        index, row = subject
        stage = int(np.searchsorted(self.stage_ends, n, side="right"))
        observed = int(rng.choice(self.stage_observed[stage]))
        chosen = draw_views(rng, self.frontal(index.world_to_camera[row]), observed, self.views)
        random_background = rng.random() < self.config.random_background
        colour = rng.random(3)
        dropped = rng.random() < self.config.guidance_dropout
        identity_dropped = rng.random() < self.config.identity_dropout

        if self.latents:
            stored = self.latents.description.backgrounds
            background = 1 + int(rng.integers(stored)) if random_background else 0
            id_embedding = self.latents.read(index, row, chosen, background, buffers["moments"])
        else:
            found = index.read_views(row, chosen.tolist())
            background = colour if random_background else np.ones(3)
            for record, image, normals in zip(found, *buffers.values(), strict=True):
                where = index.where(row, record.view)
                rgba, _ = records.decode_view(
                    record, self.source.image_size, where, normals, self.normals_frame
                )
                composite_into(image, rgba, background)
            id_embedding = found[0].id_embedding
        world_to_camera = index.world_to_camera[row, chosen]
        if self.config.relative_cameras and observed:
            world_to_camera = cameras.relative_to(world_to_camera[0], world_to_camera)
        return {
            "observed": np.arange(self.views) < observed,
            "dropped": np.bool_(dropped),
            "identity_dropped": np.bool_(identity_dropped),
            "id_embedding": id_embedding,
            "world_to_camera": world_to_camera,
        }


def _numbered(n: int, subject: Any) -> tuple[int, Any]:
    return n, subject


# --------------------------------------------------------------------------------------------------
# Loader


class Loader(grain.DatasetIterator[Batch]):
    """Iterator over a run's batches; Orbax saves its position by `get_state` and `set_state`.

    The state is the number of batches returned (and of subjects skipped): it can be restored with another
    number of workers or processes, and with more steps. Close the loader (`close()` or
    `with contextlib.closing(loader)`) to end its worker processes.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        identity: dict[str, Any],
        workers: int,
        prefetch: int,
        image_size: int,
    ):
        super().__init__()
        self._batches, self._identity = batches, identity
        self._workers, self._prefetch = workers, prefetch
        self._iterator: grain.DatasetIterator | None = None
        self._logged: set[str] = set()
        self.image_size = image_size  # pixels, of the stored images
        self.step = 0  # batches returned so far
        self.skipped = 0  # unreadable subjects replaced so far, in this process's share

    def __len__(self) -> int:
        """Batches of the whole run."""
        return len(self._batches)

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            StopIteration: after the steps of all stages.
            InputError: a damaged record, at every further call, too; or a worker was killed.
        """
        self._assert_not_closed()
        if self.step >= len(self):
            self._stop()
            raise StopIteration
        starts = self._iterator is None and self._workers > 0
        try:
            with _inherited_block() if starts else contextlib.nullcontext():
                element = next(self._start())
        except StopIteration as error:  # must not look like the end of the run
            self._stop()
            raise RuntimeError(f"the loader ended at step {self.step} of {len(self)}") from error
        except BaseException as error:
            self._stop()  # Grain's iterators are not consistent after an error
            if killed := re.search(r"Worker process .* exit code -(\d+)", str(error)):
                raise InputError(_killed(int(killed[1]))) from error
            raise
        self.step += 1
        for fault in element.pop("faults"):
            self.skipped += 1
            if fault not in self._logged:
                self._logged.add(fault)
                _logger.warning("skipped, another subject takes its place: %s", fault)
        return Batch(**element)

    def get_state(self) -> dict[str, Any]:
        return {"step": self.step, "skipped": self.skipped, "loader": dict(self._identity)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue after the batches that were returned before `state` was saved.

        Raises:
            ValueError: naming what differs, if the state is of a loader with other batches.
        """
        if changed := [
            f"{name} was {state['loader'].get(name)!r}, is {value!r}"
            for name, value in self._identity.items()
            if state["loader"].get(name) != value
        ]:
            raise ValueError(f"cannot resume the data loader: {'; '.join(changed)}")
        self._stop()
        self.step, self.skipped = int(state["step"]), int(state["skipped"])

    def start_prefetch(self) -> None:
        self._assert_not_closed()
        if self.step < len(self):
            self._start().start_prefetch()

    def close(self) -> None:
        super().close()
        self._stop()

    def _start(self) -> grain.DatasetIterator:
        if self._iterator is None:
            rest = self._batches.slice(slice(self.step, None))
            if self._workers:
                _default_profiling_flag()
                # Elements are whole batches: only the queues of the workers prefetch.
                dataset = rest.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
                    grain.MultiprocessingOptions(
                        num_workers=self._workers,
                        per_worker_buffer_size=max(1, -(-self._prefetch // self._workers)),
                    ),
                    worker_init_fn=_begin_worker,
                )
            else:
                threads = min(self._prefetch, 2)  # more would only wait for the GIL
                dataset = rest.to_iter_dataset(grain.ReadOptions(threads, self._prefetch))
            self._iterator = iter(dataset)
        return self._iterator

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _killed(number: int) -> str:
    """The message about a worker that ended by a signal."""
    if number == signal.SIGBUS:  # shared memory is full
        size = shutil.disk_usage("/dev/shm").total >> 20 if os.path.isdir("/dev/shm") else 0
        return (
            f"shared memory is too small for a worker process (/dev/shm has {size} MiB); enlarge it (docker "
            "run --shm-size=8g; in Kubernetes mount an emptyDir of medium Memory there), or set "
            "config.data.workers=0"
        )
    why = ", perhaps for lack of memory; try fewer config.data.workers" if number == 9 else ""
    return f"a worker process of the loader was killed by signal {number}{why}"


@contextlib.contextmanager
def _inherited_block() -> Iterator[None]:
    """Processes started inside do not end on SIGTERM or SIGINT, even before `_begin_worker` runs."""
    # It unblocks signals when it starts. At the end of every run it would warn of shared memory that Grain's
    # workers allocated and nobody read.
    warnings = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (warnings, "ignore:resource_tracker")))
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if warnings is not None:
            os.environ["PYTHONWARNINGS"] = warnings
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _default_profiling_flag() -> None:
    """Grain 0.2.18 reads this flag even if absl has parsed no flags, which is an error (grain#1355)."""
    name = "grain_enable_multiprocess_worker_profiling"
    if name in flags.FLAGS and not flags.FLAGS.is_parsed():
        flags.FLAGS[name].present = True


def _begin_worker(worker: int, workers: int) -> None:
    """Keep a worker off the accelerator, and end it only with the training process.

    Schedulers and terminals send SIGTERM and SIGINT to the whole process group, but the training process
    needs batches to finish its step. Grain ends workers by an event, and by SIGKILL if that fails.
    """
    jax.config.update("jax_platforms", "cpu")  # the package imports JAX
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # nothing else ends the workers of a killed process


def make_loader(
    config: DataConfig,
    stages: Sequence[StageConfig],
    batch_size: int,
    views: int,
    seed: int,
    normals_frame: cameras.Frame,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
    latents: str | pathlib.Path = "",
) -> Loader:
    """Batches of `views` views for all steps of all stages, in order.

    Args:
        batch_size: examples over all processes; each yields its contiguous share of every batch.
        seed: in [0, 2^32).
        normals_frame: frame of the batches' normals and latents.
        latents: a folder written by `latent_cache`; batches then hold moments instead of images.

    Raises:
        ValueError: arguments that contradict each other or the data, naming them.
        InputError: no usable data in `config.directory`, or no usable latents.
    """
    if not 0 <= process_index < process_count or batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must divide evenly over {process_count} processes, "
            f"of which process_index {process_index} must be one"
        )
    if min(config.workers, config.prefetch) < 0:
        raise ValueError(
            f"data.workers {config.workers} and prefetch {config.prefetch} must be >= 0"
        )
    for name in ("random_background", "guidance_dropout", "identity_dropout"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ValueError(f"data.{name} must be a probability, got {getattr(config, name)}")
    for stage in stages:
        if stage.steps < 0 or not stage.observed:
            raise ValueError(f"{stage}: needs steps >= 0 and at least one number of observed views")
        if not 0 <= min(stage.observed) <= max(stage.observed) < views:
            raise ValueError(f"{stage}: of {views} views, 0 to {views - 1} can be observed")
    source = SubjectSource(config.directory, split)
    if not 0 < views <= source.views:
        raise ValueError(f"views must be in 1..{source.views} (stored per subject), got {views}")
    latent_source = LatentSource(latents, source.indexes) if latents else None
    if latent_source and latent_source.description.normals_frame != normals_frame:
        raise ValueError(
            f"{latents} holds latents of normals in the {latent_source.description.normals_frame} "
            f"frame, the model uses the {normals_frame} frame; write them again"
        )
    if latent_source and config.random_background and not latent_source.description.backgrounds:
        raise ValueError(
            f"{latents} holds latents on white only: set data.random_background to 0, or write "
            "them again with latents.backgrounds of at least 1"
        )
    stage_ends = tuple(int(end) for end in np.cumsum([s.steps for s in stages]) * batch_size)
    if not stage_ends or not stage_ends[-1]:
        raise ValueError("the stages have no steps")
    sampler = _Sampler(
        source,
        stage_ends,
        tuple(stage.observed for stage in stages),
        views,
        seed,
        types.SimpleNamespace(**dataclasses.asdict(config)),
        normals_frame,
        latent_source,
    )
    if any(any(stage.observed) for stage in stages):
        _require_frontal_views(sampler)

    share = batch_size // process_count
    batches = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()  # differently in each epoch
        .repeat()
        .map_with_index(_numbered)  # before slicing: n counts over all processes
        .slice(slice(0, stage_ends[-1]))
        .batch(share, batch_fn=list)
        .slice(slice(process_index, None, process_count))
        .map(sampler)
    )
    identity = {
        "split": split,
        "seed": seed,
        "batch_size": batch_size,
        "views": views,
        "subjects": len(source),
        "latents": latent_source is not None,
    }
    return Loader(batches, identity, config.workers, config.prefetch, source.image_size)


def _require_frontal_views(sampler: _Sampler) -> None:
    limits = sampler.config
    for index in sampler.source.indexes:
        lacking = index.subjects[~sampler.frontal(index.world_to_camera).any(axis=1)]
        if len(lacking):
            raise ValueError(
                f"{index.path}: no view within data.max_frontal_yaw {limits.max_frontal_yaw} and "
                f"max_frontal_pitch {limits.max_frontal_pitch} for {', '.join(lacking[:5])}"
                f"{' ...' if len(lacking) > 5 else ''}; widen the limits or render frontal views"
            )
