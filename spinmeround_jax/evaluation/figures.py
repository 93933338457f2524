"""The paper's figures from folders of views: `python -m spinmeround_jax.evaluation.figures --help`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from spinmeround_jax import cameras, cli, files, reconstruct, sample
from spinmeround_jax.cli import UsageError
from spinmeround_jax.evaluation import view_folders
from spinmeround_jax.evaluation.models import named
from spinmeround_jax.evaluation.view_folders import Frame
from spinmeround_jax.files import InputError, write_atomically
from spinmeround_jax.photo.images import encoded, to_uint8
from spinmeround_jax.results.sheet import Tile, degrees, sheet

DESCRIPTION = """The paper's figures as PNG.

compare        fig. 4: what several methods made of the same heads, side by side
splats         fig. 5: views, and what the Gaussians that `reconstruct` fits to them show there
unconditional  fig. 6: people who do not exist

A head is a folder with transforms.json, such as `sample` writes; a method is a head or a folder of them.
Views that a folder does not have stay empty."""

EXAMPLES = """examples:
  python -m spinmeround_jax.evaluation.figures compare --truth truth/ --method ours=out/ \\
      --method theirs=theirs/ --out compare.png
  python -m spinmeround_jax.evaluation.figures compare --method ours=out/demo --heads 2 --normals --yaws=-45,45

  # the rest of the command goes to reconstruct, or to sample
  python -m spinmeround_jax.evaluation.figures splats out/demo/parametric-* --work out/splats --out splats.png
  python -m spinmeround_jax.evaluation.figures unconditional --checkpoint weights/quickstart --count 6 \\
      --work out/new --out new.png -- --guidance-scale 1.5"""

YAWS = (-45.0, 45.0, 180.0)  # degrees, of fig. 4
ALL_AROUND = (0.0, 45.0, 90.0, 135.0, 180.0, -135.0, -90.0, -45.0)
NEAR = 4.0  # degrees from the angle asked for


def at_yaw(frames: Sequence[Frame], yaw: float) -> Frame | None:
    """The view nearest to this yaw at pitch 0, if there is one within a few degrees.

    Raises:
        InputError: the frames have no cameras.
    """
    angles = [frame.yaw_pitch for frame in frames]
    if None in angles:
        raise InputError(
            f"{frames[0].image.parent}: no transforms.json with the cameras of its views"
        )
    distance = cameras.angular_distance(np.array(angles), np.array([yaw, 0.0]))
    return frames[int(distance.argmin())] if distance.min() < NEAR else None


def tile(frame: Frame | None, normals: bool = False) -> Tile:
    """A view's image, or its normals."""
    if frame is None or (normals and not frame.has_normals):
        return None
    image, its_normals, _ = view_folders.load(frame, None)
    return to_uint8(its_normals if normals else image)


# --------------------------------------------------------------------------------------------------
# The figures


def compare(args: argparse.Namespace) -> Image.Image:
    """A row for the truth and for every method (fig. 4)."""
    methods = dict(named(item) for item in args.method)
    if args.truth:
        methods = {"true": args.truth, **methods}
    heads = {name: view_folders.find_heads(folder) for name, folder in methods.items()}
    if all(len(its) == 1 for its in heads.values()):
        shared = [""]
        heads = {name: {"": next(iter(its.values()))} for name, its in heads.items()}
    else:
        shared = [n for n in next(iter(heads.values())) if all(n in its for its in heads.values())]
    if not shared:
        raise InputError(f"{', '.join(map(str, methods.values()))}: no head is in all of them")
    shared = shared[: args.heads]
    rows, labels = [], []
    for method, its in heads.items():
        frames = [view_folders.read_frames(its[name]) for name in shared]
        views = [at_yaw(one, yaw) for one in frames for yaw in (0.0, *args.yaws)]
        rows.append([tile(view) for view in views])
        labels.append(method)
        if args.normals:
            rows.append([tile(view, normals=True) for view in views])
            labels.append("")
    columns = [degrees(yaw) for yaw in (0.0, *args.yaws)]
    headings = [(name, len(columns)) for name in shared]
    return sheet(rows, labels, headings, columns * len(shared), args.side)


def splats(args: argparse.Namespace) -> Image.Image:
    """The views, what the fitted Gaussians show, and their normals (fig. 5)."""
    names = reconstruct.name_inputs(args.input)
    command = [*map(str, args.input), "--out", str(args.work), *args.rest]
    if code := reconstruct.main(command):
        raise InputError(f"reconstruct ended with exit code {code}; its messages are above")
    rows, labels = [], []
    for name, given in names.items():
        folder = given.parent if given.is_file() else given
        before = view_folders.read_frames(folder)
        after = view_folders.read_frames(args.work / name)
        rows.append([tile(at_yaw(before, yaw)) for yaw in args.yaws])
        rows.append([tile(at_yaw(after, yaw)) for yaw in args.yaws])
        rows.append([tile(at_yaw(after, yaw), normals=True) for yaw in args.yaws])
        labels += ["views", "splats", "their normals"]
    columns = [degrees(yaw) for yaw in args.yaws]
    return sheet(rows, labels, [("", len(columns))], columns, args.side)


def unconditional(args: argparse.Namespace) -> Image.Image:
    """New people all around, and their normals (fig. 6)."""
    angles = " ".join(f"{yaw:g},0" for yaw in args.yaws)
    command = ["--checkpoint", args.checkpoint, "--unconditional", str(args.count)]
    command += [f"--yaw-pitch={angles}", "--seed", str(args.seed), "--out", str(args.work)]
    if code := sample.main([*command, *args.rest]):
        raise InputError(f"sample ended with exit code {code}; its messages are above")
    rows, labels = [], []
    for number in range(args.seed, args.seed + args.count):
        frames = view_folders.read_frames(args.work / f"new_{number:04d}")
        rows.append([tile(at_yaw(frames, yaw)) for yaw in args.yaws])
        rows.append([tile(at_yaw(frames, yaw), normals=True) for yaw in args.yaws])
        labels += [f"seed {number}", ""]
    columns = [degrees(yaw) for yaw in args.yaws]
    return sheet(rows, labels, [("", len(columns))], columns, args.side)


# --------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = cli.build_parser("spinmeround_jax.evaluation.figures", DESCRIPTION, EXAMPLES)
    figures = parser.add_subparsers(dest="figure", required=True)
    path = pathlib.Path

    def figure(name: str, make, yaws: tuple[float, ...]) -> argparse.ArgumentParser:
        one = figures.add_parser(name, help=make.__doc__)
        one.set_defaults(make=make)
        one.add_argument("--out", type=path, default=path(f"out/{name}.png"), help="PNG to write")
        one.add_argument("--yaws", type=_yaws, default=yaws, metavar="YAW,YAW", help="degrees")
        one.add_argument(
            "--side", type=cli.integer(16, 1024), default=128, help="pixels of a view (128)"
        )
        return one

    one = figure("compare", compare, YAWS)
    one.add_argument("--truth", type=path, help="true heads, for the first row")
    one.add_argument("--method", action="append", required=True, metavar="[NAME=]DIR")
    one.add_argument("--heads", type=cli.integer(1, 100), default=3, help="how many at most (3)")
    one.add_argument("--normals", action="store_true", help="their normals too")
    one = figure("splats", splats, ALL_AROUND)
    one.add_argument("input", type=path, nargs="+", help="as of reconstruct")
    one.add_argument("--work", type=path, default=path("out/splats"), help="reconstruct's --out")
    one = figure("unconditional", unconditional, ALL_AROUND)
    one.add_argument("--checkpoint", metavar="MODEL", required=True)
    one.add_argument("--count", type=cli.integer(1, 100), default=4, help="people (4)")
    one.add_argument("--seed", type=cli.integer(), default=0)
    one.add_argument("--work", type=path, default=path("out/unconditional"), help="sample's --out")
    own, rest = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    args = parser.parse_args(own)
    if rest and args.figure == "compare":
        raise UsageError("compare passes nothing on; leave out --")
    if args.figure == "compare":
        names = [named(item)[0] for item in args.method]
        if len(set(names)) < len(names) or "true" in names:
            raise UsageError(f"--method: rows would be {names}; name each method: NAME=DIR")
    args.rest = rest
    return args


def _yaws(text: str) -> tuple[float, ...]:
    try:
        yaws = tuple(float(part) for part in text.split(","))
    except ValueError:
        yaws = ()
    if not yaws or not np.isfinite(yaws).all() or len(yaws) > 48:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to 48 angles, such as -45,45,180")
    return yaws


def run(args: argparse.Namespace) -> None:
    if not args.out.suffix:
        args.out = args.out.with_suffix(".png")
    files.check_writable(args.out.parent)
    picture = args.make(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, encoded(picture, "PNG", optimize=True))
    print(f"{args.out}: {picture.width} x {picture.height} pixels")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


if __name__ == "__main__":
    cli.end(main())
