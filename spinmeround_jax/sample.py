"""Turn portraits into views all around the head: `python -m spinmeround_jax.sample --help`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import spinmeround_jax
from spinmeround_jax import cameras, checkpoints, jobs, likeness, outputs, page
from spinmeround_jax.config import SamplingConfig
from spinmeround_jax.jobs import Job
from spinmeround_jax.likeness import Likeness
from spinmeround_jax.models import Model
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.prepare import Models, Options
from spinmeround_jax.pipeline import Heads, Pipeline, sampling_defaults
from spinmeround_jax.portraits import PortraitError
from spinmeround_jax.samplers import SAMPLERS
from spinmeround_jax.view_groups import SAME_VIEW, angular_distance

DESCRIPTION = """Views all around a head, with normals, from one portrait and its identity.

A portrait is a square image of an upright head on a plain (or transparent: white) background,
with its ArcFace embedding beside it: alice.png and alice.npy (512 floats), or alice.json holding
{"id_embedding": [512 numbers]}. Views of one person are a folder with one or three such pictures and
views.json: [{"file": "front.png", "yaw": 0, "pitch": 0}, ...]. Angles are in degrees; the portrait
is yaw 0, pitch 0, positive yaw is towards the subject's left ear, positive pitch is up."""

EXAMPLES = """examples:
  # 48 views of every portrait in a folder, and a page to look at
  python -m spinmeround_jax.sample --checkpoint weights/quickstart --input portraits/ --out out/

  # chosen views; normals in each camera's space
  python -m spinmeround_jax.sample --checkpoint weights/quickstart --input alice.png \\
      --yaw-pitch "30,10 -30,10" --normals camera

  # 88 views; an ellipse before the face; a path of your own: [{"yaw": 30, "pitch": 10}, ...]
  ... --views 88        ... --trajectory sweep        ... --trajectory path.json

  # people who do not exist; and between two identities
  python -m spinmeround_jax.sample --checkpoint weights/quickstart --unconditional 4
  python -m spinmeround_jax.sample --checkpoint weights/quickstart --interpolate a.npy b.npy

  # three photos of one person
  python -m spinmeround_jax.sample --checkpoint weights/quickstart \\
      --observed front.png:0:0 left.png:45:0 right.png:-45:0

exit code: 0 all done, 1 some inputs failed (the others are done), 2 wrong usage"""

TURNTABLE_VIEWS, SWEEP_VIEWS = 48, 24


class UsageError(ValueError):
    """The command cannot be carried out as given."""


# --------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m spinmeround_jax.sample",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    path = pathlib.Path
    parser.add_argument("--checkpoint", type=path, required=True, help="folder with model.json")
    parser.add_argument("--out", type=path, default=path("out"), help="folder to write (out)")

    what = parser.add_argument_group("what to sample (one of these)")
    what = what.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--input", type=path, nargs="+", help="portraits, views of one person, or folders of them"
    )
    what.add_argument(
        "--observed", nargs="+", metavar="FILE:YAW:PITCH",
        help="1 or 3 views of one person, the first at 0:0; the identity is the first's",
    )  # fmt: skip
    what.add_argument("--unconditional", type=_positive, metavar="N", help="N new people")
    what.add_argument(
        "--interpolate", type=path, nargs=2, metavar=("A", "B"),
        help="from one identity to another (.npy, .json, or portraits with one beside them)",
    )  # fmt: skip
    parser.add_argument(
        "--steps-between", type=_not_negative, default=3, metavar="N",
        help="with --interpolate: identities between A and B (3)",
    )  # fmt: skip

    views = parser.add_argument_group("which views")
    views.add_argument("--views", type=_positive, help="how many: 48, 88 or any number (48)")
    views.add_argument("--trajectory", metavar="turntable|sweep|FILE.json", help="(turntable)")
    views.add_argument(
        "--yaw-pitch", metavar='"YAW,PITCH ..."', help="these only; --yaw-pitch=-30,0"
    )

    photos = parser.add_argument_group("photos: pictures without an identity beside them")
    photos.add_argument("--models", type=path, help="folder of the models (as of photo.fetch)")
    photos.add_argument(
        "--face", type=_positive, default=1, metavar="N", help="which one; 1 is the largest (1)"
    )
    photos.add_argument("--keep-background", action="store_true", help="do not make it white")

    how = parser.add_argument_group("how; the checkpoint knows its own defaults")
    how.add_argument("--steps", type=_positive, help="noise levels, at least 2")
    how.add_argument("--sampler", choices=sorted(SAMPLERS))
    how.add_argument("--guidance-scale", type=_finite, help="1 is no guidance, and twice as fast")
    how.add_argument(
        "--temperature", type=_finite, metavar="T",
        help="scale of the initial noise where there is a portrait, 0 to 1: less varies less",
    )  # fmt: skip
    how.add_argument("--seed", type=_not_negative, default=0, help="same seed, same result (0)")
    how.add_argument("--normals", choices=("world", "camera"), default="world", help="(world)")
    how.add_argument(
        "--max-batch", type=_positive, metavar="N",
        help="joint samples at once; lower it when memory runs out (2 on a CPU, else 8)",
    )  # fmt: skip
    how.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the networks; bfloat16 for GPUs and TPUs (float32)",
    )  # fmt: skip
    how.add_argument("--overwrite", action="store_true", help="make finished heads again")
    how.add_argument(
        "--no-compilation-cache", action="store_true",
        help="do not keep compiled programs for the next start",
    )  # fmt: skip
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to {2**31 - 1}")
    return value


def parse_trajectory(args: argparse.Namespace) -> np.ndarray:
    """(n, 2) angles of the views asked for.

    Raises:
        UsageError: options that exclude each other, or angles that cannot be read.
    """
    if args.yaw_pitch is not None:
        if args.trajectory or args.views:
            raise UsageError("--yaw-pitch says it all; leave out --trajectory and --views")
        try:
            pairs = [pair.split(",") for pair in args.yaw_pitch.split()]
            return _checked_angles([(float(yaw), float(pitch)) for yaw, pitch in pairs])
        except ValueError as error:
            raise UsageError(
                f'--yaw-pitch {args.yaw_pitch!r}: expected "YAW,PITCH YAW,PITCH ..." in degrees, '
                "pitch -90 to 90"
            ) from error
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


def parse_observed(items: list[str]) -> tuple[list[pathlib.Path], jobs.Angles]:
    """Files and their angles from FILE:YAW:PITCH.

    Raises:
        UsageError: naming the item.
    """
    files, angles = [], []
    for item in items:
        try:
            file, yaw, pitch = item.rsplit(":", 2)
            angles.append((float(yaw), float(pitch)))
        except ValueError as error:
            raise UsageError(
                f"--observed {item}: expected FILE:YAW:PITCH in degrees, such as left.png:45:0"
            ) from error
        files.append(pathlib.Path(file))
    try:
        jobs.check_angles(tuple(angles))
    except ValueError as error:
        raise UsageError(f"--observed {' '.join(items)}: {error}") from error
    return files, tuple(angles)


def _checked_angles(pairs: list[tuple[float, float]]) -> np.ndarray:
    angles = np.array(pairs, np.float32)
    if not angles.size or not np.isfinite(angles).all() or (abs(angles[:, 1]) > 90).any():
        raise ValueError("angles out of range")
    return angles


# --------------------------------------------------------------------------------------------------
# What to do


def plan(args: argparse.Namespace, size: int, photos: jobs.Photos) -> list[jobs.Plan]:
    """Every head that is wanted.

    Raises:
        UsageError, PortraitError: the command as a whole cannot be carried out.
    """
    if args.unconditional:
        return jobs.new_people(args.unconditional, args.seed, size)
    if args.interpolate:
        return jobs.interpolated(*args.interpolate, args.steps_between, args.seed, size)
    if args.observed:
        return [jobs.one_person(*parse_observed(args.observed), args.seed, size)]
    return jobs.from_inputs(args.input, args.seed, size, photos)


def photo_settings(args: argparse.Namespace) -> jobs.Photos:
    """How photos become portraits; models are loaded when the first one needs them."""
    # The released weights know heads as PanoHead crops them, others as data_prep places them.
    kind = checkpoints.read_provenance(args.checkpoint).get("kind")
    framing = "panohead" if kind == "released weights" else "canonical"
    return jobs.Photos(
        Models(args.models), Options(args.face, framing, "keep" if args.keep_background else "auto")
    )


def sampling_settings(args: argparse.Namespace, sampling: SamplingConfig) -> SamplingConfig:
    """The checkpoint's own, with what the command line changes."""
    names = ("steps", "sampler", "guidance_scale", "temperature")
    changed = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(sampling, **changed)


def settings_of(
    args: argparse.Namespace, model: Model, sampling: SamplingConfig, argv: list[str]
) -> dict[str, Any]:
    """What is common to all heads of a run, for settings.json."""
    return {
        "command": shlex.join(["python", "-m", "spinmeround_jax.sample", *argv]),
        "image_size": model.config.image_size,
        "sampling": dataclasses.asdict(sampling),
        "dtype": args.dtype,
        "max_batch": args.max_batch,
        "device": f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind})",
        "versions": {"spinmeround_jax": spinmeround_jax.__version__, "jax": jax.__version__},
        "checkpoint": str(args.checkpoint),
        "provenance": {
            name: value
            for name, value in checkpoints.read_provenance(args.checkpoint).items()
            if name != "config"
        },
    }


def use_compilation_cache() -> None:
    """Keep compiled programs between starts, in the user's cache folder."""
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "spinmeround_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# --------------------------------------------------------------------------------------------------
# The run


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Carry out the command; returns the exit code.

    Raises:
        UsageError, PortraitError, CheckpointError: before anything is done.
    """
    trajectory = parse_trajectory(args)
    if args.max_batch is None:
        # More gains a tenth on a CPU, and the progress bar moves once per batch.
        args.max_batch = 2 if jax.default_backend() == "cpu" else 8
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out}: a file is in the way; choose a folder")
    model = checkpoints.load_model(args.checkpoint, dtype=jnp.dtype(args.dtype))
    for origin in checkpoints.origins(args.checkpoint):
        print(f"weights converted from {origin}")
    try:
        defaults, ablation = sampling_defaults(checkpoints.read_provenance(args.checkpoint))
    except ValueError as error:
        raise UsageError(f"{args.checkpoint}: {error}") from error
    sampling = sampling_settings(args, defaults)
    photos = photo_settings(args)
    plans = plan(args, model.config.image_size, photos)
    common = settings_of(args, model, sampling, argv)
    # What decides the pictures: a head that was made with the same is left alone.
    same = {name: common[name] for name in ("sampling", "image_size", "dtype", "provenance")}
    same |= {"normals_space": args.normals, "trajectory": np.float32(trajectory).tolist()}
    wanted = [
        p
        for p in plans
        if args.overwrite
        or not outputs.is_finished(args.out / p.name, {**same, "request": p.request()})
    ]

    failed, unread = 0, []
    if wanted:
        with tqdm(desc="starting", unit="eval", dynamic_ncols=True) as bar:

            def progress(step: str, evaluations: int) -> None:
                bar.set_description(step, refresh=False)
                bar.update(evaluations)

            try:
                pipeline = Pipeline(model, sampling, ablation, args.max_batch, progress)
            except ValueError as error:
                raise UsageError(str(error)) from error
            has_identity = not args.unconditional

            def evaluations(batch: list[jobs.Plan]) -> int:
                angles = batch[0].observed_angles
                return pipeline.evaluations(len(batch), trajectory, angles, has_identity)

            batches = group(wanted, args.max_batch)
            bar.reset(sum(map(evaluations, batches)))
            for batch in batches:
                loaded, errors = load(batch)
                for error in errors:
                    tqdm.write(f"error: {error}", file=sys.stderr)
                failed += len(errors)
                unread += errors
                # What cannot be read will not be sampled.
                bar.total -= evaluations(batch[: len(errors)]) if errors else 0
                if loaded:
                    angles = batch[0].observed_angles
                    failed += make(
                        pipeline, loaded, trajectory, angles, common, args, photos.models
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


def group(plans: list[jobs.Plan], size: int) -> list[list[jobs.Plan]]:
    """At most `size` heads each, observed from the same angles: what one program can make."""
    alike: dict[jobs.Angles, list[jobs.Plan]] = {}
    for p in plans:
        alike.setdefault(p.observed_angles, []).append(p)
    return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]


def load(batch: list[jobs.Plan]) -> tuple[list[Job], list[str]]:
    """Those that can be read, and what is wrong with the others."""
    loaded, errors = [], []
    for p in batch:
        try:
            loaded.append(dataclasses.replace(p.load(), request=p.request()))
        except PortraitError as error:
            errors.append(str(error))
        except OSError as error:
            errors.append(f"{p.name}: cannot be read ({error})")
    return loaded, errors


def make(
    pipeline: Pipeline,
    batch: list[Job],
    trajectory: np.ndarray,
    observed_angles: jobs.Angles,
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
    )
    seconds = round((time.monotonic() - began) / len(batch), 1)
    failed = 0
    for i, job in enumerate(batch):
        about = {"source": job.source, "request": job.request, "seed": job.seed, "seconds": seconds}
        settings = {**about, **common}
        folder = args.out / job.name
        try:
            head = outputs.select(heads, i)
            measured = measure_likeness(head, job, models)
            outputs.write_head(folder, head, settings, args.normals, job.truth, measured)
        except (outputs.OutputError, OSError) as error:
            failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
    return failed


def measure_likeness(head: Heads, job: Job, models: Models) -> Likeness | None:
    """Where the identity is ArcFace's and its model is at hand."""
    if job.recognition is None or job.id_embedding is None:
        return None
    try:
        if models.recogniser.sha256 != job.recognition:
            return None
        measured = likeness.measure(head.images, job.id_embedding, models)
    except AssetError:
        return None  # portraits prepared elsewhere need no models here
    # A view that was given is shown as it is, and would only flatter the mean.
    given = [
        bool((angular_distance(head.observed_angles, pair) < SAME_VIEW).any())
        for pair in head.trajectory
    ]
    return dataclasses.replace(measured, similarity=np.where(given, np.nan, measured.similarity))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    if not args.no_compilation_cache:
        use_compilation_cache()
    try:
        return run(args, argv)
    except (UsageError, PortraitError, checkpoints.CheckpointError, outputs.OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the heads written so far are complete", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
