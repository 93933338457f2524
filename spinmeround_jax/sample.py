"""Sample views all around a head: `python -m spinmeround_jax.sample --help`."""

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
from spinmeround_jax.cli import UsageError
from spinmeround_jax.config import SamplingConfig
from spinmeround_jax.diffusion.pipeline import Pipeline, default_batch, run_settings
from spinmeround_jax.diffusion.samplers import SAMPLERS
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import face_resnet, likeness, portraits
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.likeness import Likeness
from spinmeround_jax.photo.pose import FRAMINGS
from spinmeround_jax.photo.prepare import Models, Options
from spinmeround_jax.requests import Job, Request
from spinmeround_jax.results import head_folder, layout, page
from spinmeround_jax.results.head_folder import Heads
from spinmeround_jax.video import mp4
from spinmeround_jax.weights import remote

DESCRIPTION = """Views all around a head, with normals, from one portrait and its identity.

A portrait is a square image of an upright head on a plain (or transparent: white) background,
with its identity beside it: alice.png and alice.npy (512 floats), or alice.json holding
{"id_embedding": [512 numbers]}. Any other image is treated as a photo: it is aligned first.
Several views of one person are a folder with one or three portraits and views.json:
[{"file": "front.png", "yaw": 0, "pitch": 0}, ...]. Angles are in degrees; the portrait
is yaw 0, pitch 0, positive yaw is towards the subject's left ear, positive pitch is up."""

EXAMPLES = """examples:
  # 48 views of every portrait in a folder, and a page that shows them
  python -m spinmeround_jax.sample --checkpoint weights/quickstart --input portraits/ --out out/

  # weights of the Hugging Face Hub, downloaded once (pip install 'spinmeround_jax[hub]')
  python -m spinmeround_jax.sample --checkpoint hf://owner/name@v1.0 --input portraits/ --out out/

  # chosen views; normals in each camera's space
  python -m spinmeround_jax.sample --checkpoint weights/quickstart --input alice.png \\
      --yaw-pitch "30,10 -30,10" --normals camera

  # 88 views; an ellipse in front of the face; your own path: [{"yaw": 30, "pitch": 10}, ...]
  ... --views 88        ... --trajectory sweep        ... --trajectory path.json

  # new people; people between two identities
  python -m spinmeround_jax.sample --checkpoint weights/quickstart --unconditional 4
  python -m spinmeround_jax.sample --checkpoint weights/quickstart --interpolate a.npy b.npy

  # turntable.mp4 in every head's folder, finished heads too; python -m spinmeround_jax.video makes others
  ... --video

  # three photos of one person
  python -m spinmeround_jax.sample --checkpoint weights/quickstart \\
      --observed front.png:0:0 left.png:45:0 right.png:-45:0"""

TURNTABLE_VIEWS, SWEEP_VIEWS = 48, 24

# --------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("spinmeround_jax.sample", DESCRIPTION, EXAMPLES)
    path = pathlib.Path
    parser.add_argument(
        "--checkpoint", required=True, metavar="MODEL",
        help="folder with model.json, hf://owner/name[@revision] or gs://bucket/folder",
    )  # fmt: skip
    parser.add_argument("--out", type=path, default=path("out"), help="folder to write (out)")

    what = parser.add_argument_group("what to sample (one of these)")
    what = what.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--input", type=path, nargs="+", help="portraits, photos, sets of views, or folders of them"
    )
    what.add_argument(
        "--observed", nargs="+", metavar="FILE:YAW:PITCH",
        help="1 or 3 views of one person, the first at 0:0 with the identity beside it",
    )  # fmt: skip
    what.add_argument(
        "--unconditional", type=cli.integer(1, 1_000_000), metavar="N", help="N new people"
    )
    what.add_argument(
        "--interpolate", type=path, nargs=2, metavar=("A", "B"),
        help="from one identity to another (.npy, .json, or portraits with one beside them)",
    )  # fmt: skip
    parser.add_argument(
        "--steps-between", type=cli.integer(), default=3, metavar="N",
        help="with --interpolate: identities between A and B (3)",
    )  # fmt: skip

    views = parser.add_argument_group("which views")
    views.add_argument("--views", type=cli.integer(1, 10_000), help="number of views (48)")
    views.add_argument("--trajectory", metavar="turntable|sweep|FILE.json", help="(turntable)")
    views.add_argument(
        "--yaw-pitch", metavar='"YAW,PITCH ..."', help="these views only; --yaw-pitch=-30,0"
    )
    views.add_argument(
        "--resample-observed", action="store_true",
        help="sample the views at the angles of the inputs, too: a turntable without jumps",
    )  # fmt: skip

    photos = parser.add_argument_group("photos: images without an identity beside them")
    photos.add_argument("--models", type=path, help="insightface's folder (see photo.fetch)")
    photos.add_argument(
        "--face", type=cli.integer(1), default=1, metavar="N",
        help="which face, 1 being the largest (1)",
    )  # fmt: skip
    photos.add_argument(
        "--no-identity", action="store_true", help="the empty identity, also for portraits with one"
    )
    photos.add_argument("--keep-background", action="store_true", help="do not make it white")

    how = parser.add_argument_group("sampling (defaults: those of the checkpoint)")
    how.add_argument(
        "--steps", type=cli.integer(1), help="noise levels; at least 2, 1 for consistency"
    )
    how.add_argument("--sampler", choices=sorted(SAMPLERS))
    how.add_argument("--guidance-scale", type=cli.real(), help="1: no guidance, twice as fast")
    how.add_argument(
        "--guidance-sigma-min", type=cli.real(0), metavar="SIGMA", help="no guidance below this"
    )
    how.add_argument(
        "--guidance-sigma-max", type=cli.real(0), metavar="SIGMA", help="no guidance above this"
    )
    how.add_argument(
        "--guide", metavar="MODEL",
        help="guide away from this smaller or less trained model, instead of from no conditioning",
    )  # fmt: skip
    how.add_argument(
        "--temperature", type=cli.real(0, 1), metavar="T",
        help="scale of the initial noise if a view is observed, 0 to 1; lower: less variation",
    )  # fmt: skip
    how.add_argument("--seed", type=cli.integer(), default=0, help="same seed, same result (0)")
    how.add_argument("--normals", choices=("world", "camera"), default="world", help="(world)")
    how.add_argument(
        "--max-batch", type=cli.integer(1), metavar="N",
        help="joint samples at once; lower it if memory runs out (2 on a CPU, else 8)",
    )  # fmt: skip
    how.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the networks; bfloat16 for GPUs and TPUs (float32)",
    )  # fmt: skip
    how.add_argument("--video", action="store_true", help="write turntable.mp4, too (720 pixels)")
    how.add_argument("--overwrite", action="store_true", help="sample finished heads again")
    how.add_argument(
        "--no-compilation-cache", action="store_true", help="do not store compiled programs"
    )
    return parser


def parse_trajectory(args: argparse.Namespace) -> np.ndarray:
    """(n, 2) float32 angles, in degrees, of the requested views.

    Raises:
        UsageError: options that exclude each other, or angles that cannot be read.
    """
    if args.yaw_pitch is not None:
        if args.trajectory or args.views:
            raise UsageError("--yaw-pitch lists all views; leave out --trajectory and --views")
        try:
            pairs = [pair.split(",") for pair in args.yaw_pitch.split()]
            angles = np.array([(float(yaw), float(pitch)) for yaw, pitch in pairs], np.float32)
            if not angles.size or not np.isfinite(angles).all() or abs(angles[:, 1]).max() > 90:
                raise ValueError("angles out of range")
        except ValueError as error:
            raise UsageError(
                f'--yaw-pitch {args.yaw_pitch!r}: expected "YAW,PITCH YAW,PITCH ..." in degrees, '
                "pitch -90 to 90"
            ) from error
        return angles
    if args.trajectory in (None, "turntable"):
        return cameras.turntable(args.views or TURNTABLE_VIEWS)
    if args.trajectory == "sweep":
        return cameras.sweep(args.views or SWEEP_VIEWS)
    if not args.trajectory.endswith(".json"):
        raise UsageError(
            f"--trajectory {args.trajectory}: expected turntable, sweep or a .json file"
        )
    if args.views:
        raise UsageError("--views: a trajectory file has its own number of views; leave it out")
    try:
        return cameras.load_trajectory(args.trajectory)
    except (OSError, ValueError) as error:
        raise UsageError(f"--trajectory {error}") from error


def parse_observed(items: list[str]) -> tuple[list[pathlib.Path], requests.Angles]:
    """Files and their angles from FILE:YAW:PITCH; UsageError naming the item otherwise."""
    paths, angles = [], []
    for item in items:
        try:
            file, yaw, pitch = item.rsplit(":", 2)
            angles.append((float(yaw), float(pitch)))
        except ValueError as error:
            raise UsageError(
                f"--observed {item}: expected FILE:YAW:PITCH in degrees, such as left.png:45:0"
            ) from error
        paths.append(pathlib.Path(file))
    try:
        if items:
            requests.check_angles(tuple(angles))
    except ValueError as error:
        raise UsageError(f"--observed {' '.join(items)}: {error}") from error
    return paths, tuple(angles)


# --------------------------------------------------------------------------------------------------
# What to sample


def requested(args: argparse.Namespace, size: int, photos: requests.Photos) -> list[Request]:
    """Every requested head; InputError if the whole command cannot be carried out."""
    observed = parse_observed(args.observed or [])
    for path in (*(args.input or ()), *observed[0]):
        if not os.path.lexists(path):  # a link to nothing is an error of that input alone
            raise UsageError(f"{path}: no such file or folder; check the path")
    if args.unconditional:
        return requests.new_people(args.unconditional, args.seed, size)
    if args.interpolate:
        return requests.interpolated(*args.interpolate, args.steps_between, args.seed, size, photos)
    if args.observed:
        return [requests.one_person(*observed, args.seed, size, photos)]
    return requests.from_inputs(args.input, args.seed, size, photos)


def photo_settings(
    provenance: Mapping[str, Any],
    face: int = 1,
    keep_background: bool = False,
    no_identity: bool = False,
    models: pathlib.Path | None = None,
) -> requests.Photos:
    """How photos become portraits for weights of this provenance; models are loaded when first used.

    Args:
        models: insightface's folder, for weights that were trained with ArcFace.

    Raises:
        InputError: the weights were trained on heads framed in an unknown way.
    """
    released = provenance.get("kind") == "released weights"
    framing = "panohead" if released else provenance.get("framing", "canonical")
    known = portraits.recogniser_of(provenance)
    if framing not in list(FRAMINGS):  # model.json can hold anything, unhashable values too
        raise InputError(
            f"the weights were trained on heads framed as {framing!r}, which this code does not know"
        )
    front_end, why_not = Models(), None
    if no_identity:
        why_not = "none was requested"
    elif known.get("name") == "ArcFace":
        arcface = Models(models, front_end="insightface")
        try:
            arcface.check()
            front_end = arcface
        except AssetError as error:
            why_not = f"the weights were trained with ArcFace, and {error}"
    elif not known:
        why_not = "the weights do not record the recogniser that they were trained with"
    elif known.get("sha256") != face_resnet.sha256():
        why_not = f"the weights were trained with another recogniser, {known.get('name')}"
    background = "keep" if keep_background else "auto"
    options = Options(face, framing, background, identity=why_not is None)
    return requests.Photos(front_end, options, known.get("sha256"), no_identity, why_not)


def photo_warning(description: checkpoints.Description) -> str | None:
    """A warning for photos, if the weights were trained on rendered heads only."""
    data = description.provenance.get("data")
    source = str(data.get("source")) if isinstance(data, dict) else ""
    if not source.startswith("data_prep.render_heads"):
        return None
    size = description.config.image_size
    return f"the weights were trained on rendered heads of {size} pixels only; expect little of photographs"


def use_compilation_cache() -> None:
    """Store compiled programs in the user's cache folder, for the next start."""
    try:
        cache = files.user_cache()
    except RuntimeError:  # no home folder, as of an unknown user in a container
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# --------------------------------------------------------------------------------------------------
# The run


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Carry out the command; returns the exit code. InputError before anything is written."""
    if not args.no_compilation_cache:
        use_compilation_cache()
    trajectory = parse_trajectory(args)
    files.check_writable(args.out)
    if args.video:
        mp4.check()
    description = checkpoints.describe(args.checkpoint)
    guide = None if args.guide is None else checkpoints.describe(args.guide)
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    changed = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    sampling = dataclasses.replace(description.sampling, **changed)
    args.max_batch = args.max_batch or default_batch()
    common = {
        "command": shlex.join(["python", "-m", "spinmeround_jax.sample", *argv]),
        "checkpoint": remote.locate(args.checkpoint).origin,
        **run_settings(description, sampling, args.dtype, args.max_batch, guide),
    }
    photos = photo_settings(
        description.provenance, args.face, args.keep_background, args.no_identity, args.models
    )
    wanted = requested(args, description.config.image_size, photos)
    if args.resample_observed:  # only then: heads finished before the option existed stay valid
        resampled = {"resample_observed": True}
        wanted = [dataclasses.replace(r, options={**r.options, **resampled}) for r in wanted]
    # The settings that decide the images: a finished head with the same ones is skipped.
    deciding = ("sampling", "image_size", "dtype", "provenance", "guide", "weights_sha256")
    deciding = {name: common[name] for name in deciding}
    deciding |= {"normals_space": args.normals, "trajectory": np.float32(trajectory).tolist()}

    def is_missing(request: Request) -> bool:
        folder, settings = args.out / request.name, {**deciding, "request": request.description}
        recorded = layout.read_settings(folder) or {}
        # Heads that were finished before a setting existed have its default.
        for name, default in (("guide", None), ("weights_sha256", settings["weights_sha256"])):
            if name not in recorded and settings[name] == default:
                del settings[name]
        if isinstance(then := recorded.get("sampling"), dict):
            defaults, now = dataclasses.asdict(SamplingConfig()), settings["sampling"]
            settings["sampling"] = {k: v for k, v in now.items() if k in then or v != defaults[k]}
        return args.overwrite or not layout.is_finished(folder, settings)

    for request in wanted:
        layout.check_ours(args.out / files.name_inside(request.name))
    missing = [request for request in wanted if is_missing(request)]
    if any(r.of_photo for r in missing) and (warning := photo_warning(description)):
        print(f"note: {args.checkpoint}: {warning}", file=sys.stderr)

    errors: list[str] = []
    for origin in checkpoints.origins(args.checkpoint):
        print(f"weights converted from {origin}")
    if missing:
        with tqdm(desc="loading", unit="example", dynamic_ncols=True) as bar:

            def progress(step: str, done: int, examples: int) -> None:
                if done < bar.n or examples != bar.total:
                    bar.reset(examples)
                bar.set_description(step, refresh=False)
                bar.update(done - bar.n)

            pipeline = Pipeline.load(
                args.checkpoint, dtype=args.dtype, max_batch=args.max_batch, progress=progress,
                guide=args.guide, **changed,
            )  # fmt: skip
            args.out.mkdir(parents=True, exist_ok=True)
            for batch in batches(missing, args.max_batch):
                errors += sample_batch(
                    pipeline, batch, is_missing, trajectory, common, args, photos.models
                )

    unwritten = len(errors)
    for folder in (args.out / request.name for request in wanted if args.video):
        if folder.is_dir() and not (video := folder / mp4.NAME).exists():
            try:
                mp4.write_views(video, folder, mp4.DEFAULT)
            except (InputError, OSError) as error:
                errors.append(cli.message(error))
                print(f"error: {errors[-1]}", file=sys.stderr)

    skipped = len(wanted) - len(missing)
    print(f"{len(missing) - unwritten} written, {skipped} skipped, {len(errors)} failed")
    for error in errors:  # again: the first may have scrolled away
        print(f"failed: {error}")
    if skipped:
        print(f"skipped: already in {args.out} with these settings; --overwrite samples them again")
    if args.out.is_dir():
        print(f"Open {page.write_page(args.out).resolve()}")
    return 1 if errors else 0


def batches(wanted: list[Request], size: int) -> list[list[Request]]:
    """Batches of at most `size` heads with the same observed angles: one program samples them."""
    alike: dict[requests.Angles, list[Request]] = {}
    for request in wanted:
        alike.setdefault(request.observed_angles, []).append(request)
    return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]


def sample_batch(
    pipeline: Pipeline,
    batch: list[Request],
    is_missing: Callable[[Request], bool],
    trajectory: np.ndarray,
    common: dict[str, Any],
    args: argparse.Namespace,
    models: Models,
) -> list[str]:
    """Read, sample and write a batch of heads; returns an error message for each that failed.

    Heads are locked. Those that another process writes, or has written in the meantime, are left out.
    """
    errors: list[str] = []

    def failed(error: Exception) -> None:
        errors.append(cli.message(error))
        tqdm.write(f"error: {errors[-1]}", file=sys.stderr)

    with contextlib.ExitStack() as locks:
        loaded: list[tuple[Request, Job]] = []
        for request in batch:
            try:
                locks.enter_context(files.lock(args.out / request.name, suffix="sample.lock"))
                if is_missing(request):
                    loaded.append((request, request.load()))
            except (InputError, OSError) as error:
                failed(error)
        for note in (note for _, job in loaded for note in job.notes):
            tqdm.write(f"note: {note}", file=sys.stderr)
        angles = batch[0].observed_angles
        for known in (True, False):
            same = [pair for pair in loaded if (pair[1].id_embedding is not None) == known]
            if not same:
                continue
            started = time.monotonic()
            heads = pipeline.spin(
                np.stack([job.images for _, job in same]) if angles else None,
                np.stack([job.id_embedding for _, job in same]) if known else None,
                trajectory,
                np.array([job.seed for _, job in same]),
                angles,
                args.resample_observed,
            )
            seconds = round((time.monotonic() - started) / len(same), 1)
            for i, (request, job) in enumerate(same):
                settings = {
                    "source": job.source,
                    "request": request.description,
                    "seed": job.seed,
                    "seconds": seconds,
                    "identity": job.identity,
                    **common,
                }
                try:
                    head = heads.head(i)
                    head_folder.write_head(
                        args.out / job.name, head, settings, args.normals, job.truth,
                        measure_likeness(head, job, models), job.preview,
                    )  # fmt: skip
                except (InputError, OSError) as error:
                    failed(error)
    return errors


def measure_likeness(head: Heads, job: Job, models: Models) -> Likeness | None:
    """Similarity of the views' faces to the identity; None without its recogniser."""
    if job.recognition is None or job.id_embedding is None:
        return None
    try:
        if models.recognition["sha256"] != job.recognition:
            return None
        measured = likeness.measure(head.images, job.id_embedding, models)
    except AssetError:
        return None  # portraits that were prepared elsewhere need no models here
    # Observed views are shown as given, and would only raise the mean.
    observed = [
        bool((cameras.angular_distance(head.observed_angles, pair) < cameras.SAME_VIEW).any())
        for pair in head.trajectory
    ]
    return dataclasses.replace(measured, similarity=np.where(observed, np.nan, measured.similarity))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    stopped = "the heads written so far are complete"
    return cli.main(build_parser().parse_args, lambda args: run(args, argv), argv, stopped)


if __name__ == "__main__":
    cli.end(main())
