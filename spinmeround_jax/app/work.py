"""Jobs of the page: photos to heads to Gaussians, one at a time, with progress. No Gradio here."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import jax
import numpy as np

from spinmeround_jax import cameras, checkpoints, cli, reconstruct, requests, sample
from spinmeround_jax.config import SamplingConfig
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.files import InputError
from spinmeround_jax.photo.pose import Correction
from spinmeround_jax.requests import Job
from spinmeround_jax.results import head_folder, page
from spinmeround_jax.splats import nvidia, scene
from spinmeround_jax.splats.fit import FitSettings
from spinmeround_jax.splats.folder import write_video
from spinmeround_jax.video import mp4
from spinmeround_jax.weights import remote

T = TypeVar("T")
Report = Callable[[str, float], None]
"""Called by a job with its current step and the finished fraction. Raises Stopped."""

ANGLES = {
    "Turntable, 48 views": cameras.turntable(48),
    "Turntable, 24 views": cameras.turntable(24),
    "Turntable, 88 views": cameras.turntable(88),
    "Ellipse before the face, 24 views": cameras.sweep(24),
}
NOT_CORRECTED = Correction()
TICK = 0.4  # seconds between two looks at a job

# Error messages name options of the commands; here is what to say on the page instead.
WORDS = (
    ("or give landmarks with --landmarks", "or crop it to a square around the head"),
    ("--face 2 is the next", "choose another under Face"),
    ("use --background rembg or --keep-background, or", "tick Keep the background, or"),
    (", or allow it with --one-sided", ": choose angles all around"),
    (" (python -m spinmeround_jax.photo prepares photos with more options)", ""),
    ("--face ", "face "),
    ("add --no-identity", "tick Without the identity"),
)


class Stopped(Exception):
    """The job was stopped, or its page was closed."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """A photo or a portrait, and what was corrected by hand; `face` as in `photo.prepare.Options`."""

    path: pathlib.Path
    face: int = 1
    correction: Correction = NOT_CORRECTED


@dataclasses.dataclass(frozen=True)
class PageSettings:
    """The settings of the page; `angles` is a name of ANGLES."""

    angles: str
    seed: int
    steps: int
    guidance_scale: float
    keep_background: bool
    no_identity: bool


@dataclasses.dataclass(frozen=True)
class SavedHead:
    """A finished head: its folder, all of it as a .zip file, and the page of results."""

    folder: pathlib.Path
    archive: pathlib.Path
    page: str

    @property
    def splats(self) -> pathlib.Path:
        """The folder of its Gaussians, there or not."""
        return self.folder.parents[1] / "splats" / self.folder.name


@dataclasses.dataclass(frozen=True)
class Splats:
    """Gaussians of a head: the folder that `reconstruct` writes, and what was left out of it."""

    folder: pathlib.Path
    left_out: dict[str, str]


def has_encoder() -> bool:
    """Whether videos can be written."""
    try:
        mp4.check()
    except InputError:
        return False
    return True


class Weights:
    """A model, and how photos become portraits for it.

    Raises:
        InputError: the model cannot be read.
    """

    def __init__(self, checkpoint: str, models: pathlib.Path | None, **options: object):
        self.name = remote.locate(checkpoint).name
        self.pipeline = Pipeline.load(checkpoint, **options)
        self.size = self.pipeline.networks.config.image_size
        self.photo_warning = sample.photo_warning(checkpoints.describe(checkpoint))
        provenance = self.pipeline.settings["provenance"]
        self._photos = sample.photo_settings(provenance, models=models)
        # Likeness is measured while others prepare their photos, and no model serves two at once.
        self.measuring = sample.photo_settings(provenance, models=models).models

    @property
    def sampling(self) -> SamplingConfig:
        """The model's own settings."""
        return self.pipeline.networks.sampling

    def photos(self, upload: Upload, chosen: PageSettings) -> requests.Photos:
        background = "keep" if chosen.keep_background else "auto"
        identity = self._photos.options.identity and not chosen.no_identity
        options = dataclasses.replace(
            self._photos.options, face=upload.face, background=background, identity=identity
        )
        return dataclasses.replace(
            self._photos,
            options=options,
            no_identity=chosen.no_identity,
            correction=upload.correction,
        )

    def compile(self) -> None:
        """Sample once for each program that the model's own settings need."""
        grey = np.zeros((1, 1, self.size, self.size, 3), np.float32)
        trajectory = next(iter(ANGLES.values()))
        self.pipeline.spin(grey, None, trajectory, [0])
        if self.sampling.guidance_scale != 1.0:  # new people are sampled without
            self.pipeline.spin(None, None, trajectory, [0])


class Studio:
    """The loaded weights, the device, and a folder for everything that jobs write."""

    def __init__(self, weights: Sequence[Weights], root: pathlib.Path):
        self.weights = {w.name: w for w in weights}
        self.root = root
        self._photo, self._device = threading.Lock(), threading.Lock()

    def look(self, name: str, uploads: Sequence[Upload], chosen: PageSettings) -> list[Job]:
        """Prepare photos; `Job.prepared` holds what was found in them.

        Raises:
            InputError: one cannot be used.
        """
        weights = self.weights[name]
        with self._photo:
            return [
                requests.from_inputs(
                    [upload.path],
                    chosen.seed,
                    weights.size,
                    weights.photos(upload, chosen),
                )[0].load()
                for upload in uploads
            ]

    def spin(
        self, name: str, uploads: Sequence[Upload], chosen: PageSettings, report: Report
    ) -> SavedHead:
        """Sample the head of one photo, of three, or without any a new person.

        Raises:
            InputError, ValueError: something cannot be used.
            Stopped: see `follow`.
        """
        weights = self.weights[name]
        if uploads:
            report("Preparing", 0.0)
            job, angles = requests.joined(self.look(name, uploads, chosen))
        else:
            (request,) = requests.new_people(1, chosen.seed, weights.size)
            job, angles = request.load(), request.observed_angles
        trajectory = ANGLES[chosen.angles]
        changed = {"steps": chosen.steps, "guidance_scale": chosen.guidance_scale}
        pipeline = weights.pipeline.replace(**changed)
        examples = pipeline.examples(trajectory, angles)
        # Evaluations of the UNet on one view: normals are estimated one by one and without guidance.
        views = pipeline.networks.config.views * (1 if chosen.guidance_scale == 1.0 else 2)
        cost = dict.fromkeys(examples, chosen.steps * views)
        cost["normals"] = pipeline.networks.sampling.normals_steps
        total = sum(cost[step] * count for step, count in examples.items())
        order = list(examples)

        def progress(step: str, done: int, count: int) -> None:
            before = sum(cost[s] * examples[s] for s in order[: order.index(step)])
            text = step.capitalize() if count == 1 else f"{step.capitalize()}, {done} of {count}"
            report(text, (before + cost[step] * done) / total)

        with self._device:
            report("Starting", 0.0)
            began = time.monotonic()
            pipeline = pipeline.replace(progress)
            identity = job.id_embedding
            heads = pipeline.spin(
                job.images[None] if len(angles) else None,
                None if identity is None else identity[None],
                trajectory,
                [job.seed],
                angles,
            )
            head = heads.head(0)
            report("Writing", 1.0)
            likeness = sample.measure_likeness(head, job, weights.measuring)
        settings = {
            **self._settings(name, job, pipeline),
            "seconds": round(time.monotonic() - began, 1),
        }
        out = self._new_folder()
        folder = out / "heads" / (re.sub(r"[^\w.-]", "_", job.name).lstrip(".")[:80] or "head")
        try:
            head_folder.write_head(
                folder, head, settings, truth=job.truth, likeness=likeness, photo=job.preview
            )
            if has_encoder():
                mp4.write_views(folder / mp4.NAME, folder, mp4.DEFAULT)
            document = page.head_page(folder)
            archive = shutil.make_archive(str(out / folder.name), "zip", folder.parent, folder.name)
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise
        return SavedHead(folder, pathlib.Path(archive), document)

    def _settings(self, name: str, job: Job, pipeline: Pipeline) -> dict[str, object]:
        """For settings.json, without paths of this machine."""
        source = {"input": job.name} if len(job.images) else {}
        if job.prepared:
            source["photo"] = job.source.get("photo")
        about = {"checkpoint": name, "source": source, "seed": job.seed, "identity": job.identity}
        return {**about, **pipeline.settings}

    def reconstruct(self, head: SavedHead, report: Report) -> Splats:
        """Fit Gaussians to the views of a head, beside its folder.

        Raises:
            InputError: the views cannot be used, or the fit fails.
            Stopped: see `follow`.
        """
        with self._device:
            report("Reading the views, compiling", 0.0)
            given = scene.load(head.folder)
            settings = FitSettings(count=reconstruct.default_count(given.size))

            def on_step(step: int) -> None:
                report(f"Fitting, step {step} of {settings.steps}", step / settings.steps)

            made = reconstruct.fit_and_draw(
                given, head.folder.name, settings, hold_out=0, on_step=on_step
            )
            report("Writing splats and mesh", 1.0)
            folder = head.splats
            folder.parent.mkdir(exist_ok=True)
            made.save(folder, overwrite=True)
        return Splats(folder, made.report["left_out"])

    def film(self, head: SavedHead, report: Report) -> pathlib.Path:
        """A smooth video of the Gaussians that `reconstruct` made, in their folder.

        Raises:
            InputError: there is no encoder, or the folder cannot be read.
            Stopped: see `follow`.
        """
        mp4.check()
        path, draw = head.splats / mp4.NAME, nvidia.choose()
        count = len(mp4.DEFAULT.phases())
        frames = iter(range(count))

        def drawn(*args: object) -> dict[str, jax.Array]:
            # A frame is drawn again where tiles were full.
            done = next(frames, count)
            report(f"Drawing the video, frame {done} of {count}", done / count)
            return draw(*args)

        with self._device:
            write_video(path, head.splats, mp4.DEFAULT, drawn)
        return path

    def remove(self, head: SavedHead | None) -> None:
        """Delete everything that was written for a head."""
        if head is not None:
            shutil.rmtree(head.folder.parents[1], ignore_errors=True)

    def _new_folder(self) -> pathlib.Path:
        folder = pathlib.Path(tempfile.mkdtemp(dir=self.root, prefix="head-"))
        (folder / "heads").mkdir()
        return folder

    def sentence(self, error: BaseException) -> str:
        """An error message for the page, without paths of this machine."""
        text = re.sub(re.escape(str(self.root)) + r"/(?:[^/\s]+/)*", "", cli.message(error))
        for command, here in WORDS:
            text = text.replace(command, here)
        return text


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """Progress of a job; `left` seconds remain, None if unknown."""

    text: str
    fraction: float
    left: float | None


def follow(job: Callable[[Report], T]) -> Generator[JobStatus, None, T]:
    """Run a job in a thread and yield its status now and then; returns its result.

    When the generator is closed, as when its reader has gone, the job ends with its next report.
    """
    closed = threading.Event()
    began = at = time.monotonic()
    text, fraction = "Waiting for the device", 0.0

    def report(now: str, done: float) -> None:
        nonlocal text, fraction, at, began
        if closed.is_set():
            raise Stopped
        if fraction == 0.0 and done == 0.0:
            began = time.monotonic()  # of the work itself
        text, fraction, at = now, done, time.monotonic()

    pool = ThreadPoolExecutor(1)
    try:
        future = pool.submit(job, report)
        while not future.done():
            left = None
            if 0.0 < fraction < 1.0:
                left = (at - began) * (1.0 / fraction - 1.0) - (time.monotonic() - at)
            yield JobStatus(text, fraction, left and max(left, 1.0))
            wait([future], TICK)
        return future.result()
    finally:
        closed.set()
        pool.shutdown(wait=False)
