"""Turn portraits into views all around the head: `python -m spinmeround_jax.sample --help`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import contextlib
import dataclasses
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from spinmeround_jax import cameras, checkpoints, cli, files, requests
from spinmeround_jax.diffusion.pipeline import Pipeline, default_batch, run_settings
from spinmeround_jax.files import InputError, name_inside
from spinmeround_jax.photo import assets, face_resnet, likeness
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.likeness import Likeness
from spinmeround_jax.photo.pose import FRAMINGS
from spinmeround_jax.photo.prepare import Models, Options
from spinmeround_jax.requests import Job
from spinmeround_jax.results import head_folder, layout, page
from spinmeround_jax.results.head_folder import Heads
from spinmeround_jax.sample_options import build_parser, parse_observed, parse_trajectory

# --------------------------------------------------------------------------------------------------
# What to do


def plan(args: argparse.Namespace, size: int, photos: requests.Photos) -> list[requests.Plan]:
    """Every head that is wanted.

    Raises:
        InputError: the command as a whole cannot be carried out.
    """
    if args.unconditional:
        return requests.new_people(args.unconditional, args.seed, size)
    if args.interpolate:
        return requests.interpolated(*args.interpolate, args.steps_between, args.seed, size)
    if args.observed:
        return [requests.one_person(*parse_observed(args.observed), args.seed, size, photos)]
    return requests.from_inputs(args.input, args.seed, size, photos)


def photo_settings(
    provenance: Mapping[str, Any],
    face: int = 1,
    keep_background: bool = False,
    no_identity: bool = False,
    models: pathlib.Path | None = None,
) -> requests.Photos:
    """How photos become portraits for weights of this provenance; models are loaded when first needed.

    Args:
        models: insightface's folder, for weights that know ArcFace.

    Raises:
        InputError: the weights know heads in an unknown framing.
    """
    # The released weights know ArcFace, and heads as PanoHead crops them; others record what they know.
    released = provenance.get("kind") == "released weights"
    framing = "panohead" if released else provenance.get("framing", "canonical")
    if framing not in FRAMINGS:
        raise InputError(
            f"the weights know heads framed as {framing!r}, of which nothing is known here"
        )
    known = _recogniser_of(provenance)
    if no_identity:
        loaded, why_not = Models(), "none was asked for"
    else:
        loaded, why_not = _front_end(models, known)
    options = Options(face, framing, "keep" if keep_background else "auto", why_not is None)
    return requests.Photos(loaded, options, known.get("sha256"), no_identity, why_not)


def little_of_photos(description: checkpoints.Description) -> str | None:
    """What to know before a photo is given to these weights, if all they have seen are rendered heads."""
    data = description.provenance.get("data")
    source = str(data.get("source")) if isinstance(data, dict) else ""
    if not source.startswith("data_prep.render_heads"):
        return None
    size = description.config.image_size
    return f"the weights know rendered heads of {size} pixels only; expect little of photographs"


def _recogniser_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Name and SHA-256 of what made the identities that these weights were trained with, {} if unknown."""
    if provenance.get("kind") == "released weights":
        return {"name": "ArcFace", "sha256": assets.RECOGNITION.sha256}
    recogniser = provenance.get("recogniser")
    return recogniser if isinstance(recogniser, dict) else {}


def _front_end(folder: pathlib.Path | None, known: dict[str, Any]) -> tuple[Models, str | None]:
    """What looks at photos for weights that know this recogniser, and why it makes no identities."""
    if known.get("name") == "ArcFace":
        arcface = Models(folder, front_end="insightface")
        try:
            arcface.check()
        except AssetError as error:
            return Models(), f"the weights know ArcFace's, and {error}"
        return arcface, None
    if not known:
        return Models(), "the weights do not say whose they know"
    if known.get("sha256") != face_resnet.sha256():
        return Models(), f"the weights know those of {known.get('name')}, another recogniser"
    return Models(), None


def use_compilation_cache() -> None:
    """Keep compiled programs between starts, in the user's cache folder."""
    try:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    except RuntimeError:  # no home folder, as of an unknown user in a container
        return
    jax.config.update("jax_compilation_cache_dir", str(root / "spinmeround_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# --------------------------------------------------------------------------------------------------
# The run


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Carry out the command; returns the exit code.

    Raises:
        InputError: before anything is done.
    """
    if not args.no_compilation_cache:
        use_compilation_cache()
    trajectory = parse_trajectory(args)
    files.check_writable(args.out)
    description = checkpoints.describe(args.checkpoint)
    names = ("steps", "sampler", "guidance_scale", "temperature")
    changed = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sampling = dataclasses.replace(description.sampling, **changed)
    args.max_batch = args.max_batch or default_batch()
    common = {
        "command": shlex.join(["python", "-m", "spinmeround_jax.sample", *argv]),
        "checkpoint": str(args.checkpoint),
        **run_settings(description, sampling, args.dtype, args.max_batch),
    }
    photos = photo_settings(
        description.provenance, args.face, args.keep_background, args.no_identity, args.models
    )
    plans = plan(args, description.config.image_size, photos)
    if args.resample_observed:
        plans = [
            dataclasses.replace(p, options={**p.options, "resample_observed": True}) for p in plans
        ]
    # What decides the pictures: a head that was made with the same is left alone.
    same = {name: common[name] for name in ("sampling", "image_size", "dtype", "provenance")}
    same |= {"normals_space": args.normals, "trajectory": np.float32(trajectory).tolist()}

    def is_wanted(p: requests.Plan) -> bool:
        settings = {**same, "request": p.request()}
        return args.overwrite or not layout.is_finished(args.out / p.name, settings)

    wanted = []
    for p in plans:
        name_inside(p.name)
        layout.check_ours(args.out / p.name)
        if is_wanted(p):
            wanted.append(p)

    if any(p.of_photo for p in wanted) and (note := little_of_photos(description)):
        print(f"note: {args.checkpoint}: {note}", file=sys.stderr)
    failed, unread = 0, []
    for origin in checkpoints.origins(args.checkpoint):
        print(f"weights converted from {origin}")
    if wanted:
        with tqdm(desc="loading", unit="example", dynamic_ncols=True) as bar:

            def progress(step: str, done: int, examples: int) -> None:
                if done < bar.n or examples != bar.total:
                    bar.reset(examples)
                bar.set_description(step, refresh=False)
                bar.update(done - bar.n)

            pipeline = Pipeline.load(
                args.checkpoint,
                dtype=args.dtype,
                max_batch=args.max_batch,
                progress=progress,
                **changed,
            )
            failed, unread = make_all(
                pipeline, wanted, is_wanted, trajectory, common, args, photos.models
            )

    skipped = len(plans) - len(wanted)
    print(f"{len(wanted) - failed} written, {skipped} skipped, {failed} failed")
    for error in unread:  # again, as the first may have scrolled away
        print(f"failed: {error}")
    if skipped:
        print(f"skipped: in {args.out}, made with the same; --overwrite makes them again")
    if args.out.is_dir():
        print(f"Open {page.write_page(args.out).resolve()}")
    return 1 if failed else 0


def make_all(
    pipeline: Pipeline,
    plans: list[requests.Plan],
    is_wanted: Callable[[requests.Plan], bool],
    trajectory: np.ndarray,
    common: dict[str, Any],
    args: argparse.Namespace,
    models: Models,
) -> tuple[int, list[str]]:
    """Batch by batch; returns how many failed, and what is wrong with those that cannot be begun."""
    failed, unread = 0, []
    args.out.mkdir(parents=True, exist_ok=True)
    for batch in group(plans, args.max_batch):
        with contextlib.ExitStack() as locks:
            mine, taken = claim(batch, is_wanted, args.out, locks)
            loaded, errors = load(mine)
            errors += taken
            for error in errors:
                tqdm.write(f"error: {error}", file=sys.stderr)
            for note in (note for job in loaded for note in job.notes):
                tqdm.write(f"note: {note}", file=sys.stderr)
            unread += errors
            angles = batch[0].observed_angles
            for known in (True, False):
                same = [job for job in loaded if (job.id_embedding is not None) == known]
                if same:
                    failed += make(pipeline, same, trajectory, angles, common, args, models)
    return failed + len(unread), unread


def claim(
    batch: list[requests.Plan],
    is_wanted: Callable[[requests.Plan], bool],
    out: pathlib.Path,
    locks: contextlib.ExitStack,
) -> tuple[list[requests.Plan], list[str]]:
    """Those that no other process is making, or has made since, locked; why not the others."""
    mine, errors = [], []
    for p in batch:
        try:
            locks.enter_context(files.lock(out / p.name, suffix="sample.lock"))
            if is_wanted(p):
                mine.append(p)
        except (InputError, OSError) as error:
            errors.append(cli.message(error))
    return mine, errors


def group(plans: list[requests.Plan], size: int) -> list[list[requests.Plan]]:
    """At most `size` heads each, observed from the same angles: what one program can make."""
    alike: dict[requests.Angles, list[requests.Plan]] = {}
    for p in plans:
        alike.setdefault(p.observed_angles, []).append(p)
    return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]


def load(batch: list[requests.Plan]) -> tuple[list[Job], list[str]]:
    """Those that can be read, and what is wrong with the others."""
    loaded, errors = [], []
    for p in batch:
        try:
            loaded.append(dataclasses.replace(p.load(), request=p.request()))
        except InputError as error:
            errors.append(cli.message(error))
        except OSError as error:
            errors.append(f"{p.name}: cannot be read ({cli.message(error)})")
    return loaded, errors


def make(
    pipeline: Pipeline,
    batch: list[Job],
    trajectory: np.ndarray,
    observed_angles: requests.Angles,
    common: dict[str, Any],
    args: argparse.Namespace,
    models: Models,
) -> int:
    """Sample a batch of heads and write each; returns how many could not be written."""
    identities = [job.id_embedding for job in batch]
    began = time.monotonic()
    heads = pipeline.spin(
        np.stack([job.images for job in batch]) if len(observed_angles) else None,
        None if identities[0] is None else np.stack(identities),
        trajectory,
        np.array([job.seed for job in batch]),
        observed_angles,
        args.resample_observed,
    )
    seconds = round((time.monotonic() - began) / len(batch), 1)
    failed = 0
    for i, job in enumerate(batch):
        about = {"source": job.source, "request": job.request, "seed": job.seed, "seconds": seconds}
        about["identity"] = job.identity
        settings = {**about, **common}
        folder = args.out / job.name
        try:
            head = heads.head(i)
            measured = measure_likeness(head, job, models)
            head_folder.write_head(
                folder, head, settings, args.normals, job.truth, measured, job.shown
            )
        except (InputError, OSError) as error:
            failed += 1
            tqdm.write(f"error: {cli.message(error)}", file=sys.stderr)
    return failed


def measure_likeness(head: Heads, job: Job, models: Models) -> Likeness | None:
    """Where the recogniser that made the identity is at hand."""
    if job.recognition is None or job.id_embedding is None:
        return None
    try:
        if models.recognition["sha256"] != job.recognition:
            return None
        measured = likeness.measure(head.images, job.id_embedding, models)
    except AssetError:
        return None  # portraits prepared elsewhere need no models here
    # A view that was given is shown as it is, and would only flatter the mean.
    given = [
        bool((cameras.angular_distance(head.observed_angles, pair) < cameras.SAME_VIEW).any())
        for pair in head.trajectory
    ]
    return dataclasses.replace(measured, similarity=np.where(given, np.nan, measured.similarity))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    stopped = "the heads written so far are complete"
    return cli.main(build_parser().parse_args, lambda args: run(args, argv), argv, stopped)


if __name__ == "__main__":
    cli.end(main())
