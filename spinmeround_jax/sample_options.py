"""The words of `python -m spinmeround_jax.sample`: its options, and the views they ask for."""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from spinmeround_jax import cameras, cli, requests
from spinmeround_jax.cli import UsageError
from spinmeround_jax.diffusion.samplers import SAMPLERS

DESCRIPTION = """Views all around a head, with normals, from one portrait and its identity.

A portrait is a square image of an upright head on a plain (or transparent: white) background,
with its identity beside it: alice.png and alice.npy (512 floats), or alice.json holding
{"id_embedding": [512 numbers]}. Any other picture is taken for a photo, and
prepared on the way. Views of one person are a folder with one or three portraits and views.json:
[{"file": "front.png", "yaw": 0, "pitch": 0}, ...]. Angles are in degrees; the portrait
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
      --observed front.png:0:0 left.png:45:0 right.png:-45:0"""

TURNTABLE_VIEWS, SWEEP_VIEWS = 48, 24


# --------------------------------------------------------------------------------------------------
# The parser


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("spinmeround_jax.sample", DESCRIPTION, EXAMPLES)
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
    views.add_argument(
        "--views", type=cli.integer(1, 10_000), help="how many: 48, 88 or any number (48)"
    )
    views.add_argument("--trajectory", metavar="turntable|sweep|FILE.json", help="(turntable)")
    views.add_argument(
        "--yaw-pitch", metavar='"YAW,PITCH ..."', help="these only; --yaw-pitch=-30,0"
    )

    views.add_argument(
        "--resample-observed", action="store_true",
        help="make the views at the angles of the given ones, too: a spin without a jump there",
    )  # fmt: skip

    photos = parser.add_argument_group("photos: pictures without an identity beside them")
    photos.add_argument("--models", type=path, help="insightface's folder (as of photo.fetch)")
    photos.add_argument(
        "--face",
        type=cli.integer(1),
        default=1,
        metavar="N",
        help="which one; 1 is the largest (1)",
    )
    photos.add_argument(
        "--no-identity", action="store_true", help="the empty identity, also for portraits with one"
    )
    photos.add_argument("--keep-background", action="store_true", help="do not make it white")

    how = parser.add_argument_group("how; the checkpoint knows its own defaults")
    how.add_argument("--steps", type=cli.integer(2), help="noise levels, at least 2")
    how.add_argument("--sampler", choices=sorted(SAMPLERS))
    how.add_argument(
        "--guidance-scale", type=cli.real(), help="1 is no guidance, and twice as fast"
    )
    how.add_argument(
        "--temperature", type=cli.real(0, 1), metavar="T",
        help="scale of the initial noise where there is a portrait, 0 to 1: less varies less",
    )  # fmt: skip
    how.add_argument("--seed", type=cli.integer(), default=0, help="same seed, same result (0)")
    how.add_argument("--normals", choices=("world", "camera"), default="world", help="(world)")
    how.add_argument(
        "--max-batch", type=cli.integer(1), metavar="N",
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


# --------------------------------------------------------------------------------------------------
# Views in words


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


def parse_observed(items: list[str]) -> tuple[list[pathlib.Path], requests.Angles]:
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
        requests.check_angles(tuple(angles))
    except ValueError as error:
        raise UsageError(f"--observed {' '.join(items)}: {error}") from error
    return files, tuple(angles)


def _checked_angles(pairs: list[tuple[float, float]]) -> np.ndarray:
    angles = np.array(pairs, np.float32)
    if not angles.size or not np.isfinite(angles).all() or (abs(angles[:, 1]) > 90).any():
        raise ValueError("angles out of range")
    return angles
