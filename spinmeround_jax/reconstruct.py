"""Views with cameras -> 3D Gaussians of a head: `python -m spinmeround_jax.reconstruct --help`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import collections
import dataclasses
import logging
import pathlib
import shlex
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import spinmeround_jax
from spinmeround_jax import cli, files
from spinmeround_jax.cli import UsageError
from spinmeround_jax.files import InputError
from spinmeround_jax.results import layout
from spinmeround_jax.results.head_folder import Heads
from spinmeround_jax.splats import nvidia, scene, views
from spinmeround_jax.splats.fit import FitSettings, fit, views_sha256
from spinmeround_jax.splats.folder import GENERATOR, REPORT, Reconstruction, write_video
from spinmeround_jax.splats.gaussians import MAX_DEGREE
from spinmeround_jax.splats.scene import Scene
from spinmeround_jax.video import mp4

DESCRIPTION = """3D Gaussians of a head from views with cameras: those of sample, or any transforms.json
in nerfstudio's convention with images of one size, 32 to 2048 pixels, and masks or transparency if they have a
background (docs/transforms.md).

Every input gets a folder: splats.ply (for the usual viewers of 3D Gaussian splatting), splats.glb (glTF),
viewer.html (a page that needs no network), mesh.glb and mesh.ply (coloured vertices), mesh_textured.glb,
turntable.webp, report.json with the distances to the views that were held out, and views/, normals/ and
transforms.json: the given views rendered from the Gaussians."""

EXAMPLES = """examples:
  # the heads of `make demo`
  python -m spinmeround_jax.reconstruct out/demo/parametric-* --out out/splats

  # all views, none held out; without the predicted normals; colours that do not change with the view
  python -m spinmeround_jax.reconstruct out/demo/parametric-0-1000000 --hold-out 0
  ... --normals 0        ... --degree 0

  # views by Blender or nerfstudio, where z is up: estimated from the cameras, or given
  python -m spinmeround_jax.reconstruct scan --up z

  # views of something else, on black
  python -m spinmeround_jax.reconstruct scan/transforms.json --background 0,0,0

  # turntable.mp4, also of heads that are finished; python -m spinmeround_jax.video makes others
  python -m spinmeround_jax.reconstruct out/demo/parametric-* --out out/splats --video

The same command resumes a killed run."""

COUNT_AT_64 = 3000  # default number of Gaussians, proportional to the pixels
MAX_DEFAULT_COUNT = 48_000
DEFAULTS = FitSettings()


# --------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("spinmeround_jax.reconstruct", DESCRIPTION, EXAMPLES)
    path = pathlib.Path
    parser.add_argument(
        "input", type=path, nargs="+", help="transforms.json, or local folders with one"
    )
    parser.add_argument("--out", type=path, default=path("out/splats"), help="local (out/splats)")
    parser.add_argument(
        "--hold-out", type=cli.integer(), default=8, metavar="N",
        help="every Nth view is held out, to measure distances; 0: none (8)",
    )  # fmt: skip
    parser.add_argument(
        "--background", default="white", help="white, black or R,G,B in [0, 1] (white)"
    )
    parser.add_argument(
        "--up", choices=scene.UPS, default="auto", metavar="AXIS",
        help="up axis of the views' world: x, y, z, -x, -y or -z, as in --up=-y; auto: from transforms.json, "
        "else estimated from the cameras; results have y up (auto)",
    )  # fmt: skip
    parser.add_argument(
        "--one-sided",
        action="store_true",
        help="accept cameras on one side only: the other side is a guess",
    )

    how = parser.add_argument_group("fitting")
    how.add_argument(
        "--steps", type=cli.integer(1), default=DEFAULTS.steps, help=f"({DEFAULTS.steps})"
    )
    how.add_argument(
        "--count",
        type=cli.integer(1),
        help="Gaussians (3000 at 64 pixels, proportional to the pixels)",
    )
    how.add_argument(
        "--degree", type=int, choices=range(MAX_DEGREE + 1), default=DEFAULTS.degree,
        help=f"degree of the spherical harmonics of colour ({DEFAULTS.degree})",
    )  # fmt: skip
    for name, what in (
        ("lpips", "perceptual distance, the paper's addition"),
        ("normals", "difference of the rendered normals from the given ones"),
        ("mask", "difference of alpha from the mask"),
    ):
        value = getattr(DEFAULTS, name)
        how.add_argument(
            f"--{name}", type=cli.real(0), default=value, metavar="W",
            help=f"weight of the {what} ({value:g}; 0: off)",
        )  # fmt: skip
    how.add_argument("--lpips-network", choices=("alexnet", "vgg16"), default="alexnet")
    how.add_argument(
        "--rate", type=cli.real(0), default=DEFAULTS.rate, help=f"learning rate ({DEFAULTS.rate:g})"
    )
    how.add_argument("--seed", type=cli.integer(), default=0, help="same seed, same result (0)")
    how.add_argument(
        "--rasteriser", choices=nvidia.RASTERISERS, default="auto",
        help="auto: splax on an NVIDIA GPU if it is installed, else the one in JAX (auto)",
    )  # fmt: skip
    how.add_argument("--no-mesh", action="store_true", help="write no meshes")
    how.add_argument("--video", action="store_true", help="write turntable.mp4, too (720 pixels)")
    how.add_argument("--overwrite", action="store_true", help="reconstruct finished heads again")
    return parser


def parse_background(text: str) -> np.ndarray:
    """(3,) colour in [0, 1]; UsageError if it is not one."""
    named = {"white": "1,1,1", "black": "0,0,0"}
    try:
        colour = np.array([float(part) for part in named.get(text, text).split(",")])
        if colour.shape != (3,) or not ((colour >= 0) & (colour <= 1)).all():
            raise ValueError("out of range")
    except ValueError as error:
        raise UsageError(
            f"--background {text}: expected white, black or R,G,B in [0, 1]"
        ) from error
    return colour


def name_inputs(inputs: list[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Folder in --out -> transforms.json.

    Raises:
        UsageError: two inputs would share a folder, or an input does not exist.
    """
    named: dict[str, pathlib.Path] = {}
    for given in inputs:
        file = given / "transforms.json" if given.is_dir() else given
        if not file.is_file():
            raise UsageError(f"{file}: no such file; give folders of sample, or transforms.json")
        name = file.resolve().parent.name or "root"
        files.name_inside(name)
        if name in named:
            raise UsageError(f"{file}: {named[name]} would have the same folder {name!r} in --out")
        named[name] = file
    return named


def default_count(size: tuple[int, int]) -> int:
    """Gaussians for views of (height, width) pixels."""
    return min(MAX_DEFAULT_COUNT, max(1, round(COUNT_AT_64 * size[0] * size[1] / 64**2)))


# --------------------------------------------------------------------------------------------------
# One head


def split(given: Scene, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the views to fit and of those held out: each `every`th, none if 0."""
    numbers = np.arange(len(given))
    held = (numbers % every == every // 2) if every else np.zeros(len(given), bool)
    return numbers[~held], numbers[held]


def fit_and_draw(
    given: Scene,
    where: str,
    settings: FitSettings,
    hold_out: int = 8,
    one_sided: bool = False,
    rasteriser: str = "auto",
    checkpoint: pathlib.Path | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Reconstruction:
    """Fit Gaussians to the views that are not held out, and render and measure all views.

    Args:
        where: file or name of the views, for messages.
        checkpoint: file to resume from, if it exists.
        on_step: called from time to time with the number of finished steps.

    Raises:
        InputError: the views cannot be used, or the fit fails.
    """
    started = time.monotonic()
    fitted, held = split(given, hold_out)
    if len(held) and len(fitted) < scene.MIN_VIEWS <= len(given):
        raise InputError(
            f"{where}: {len(given)} views, {len(held)} of them held out; at least {scene.MIN_VIEWS} "
            "must be left to fit; --hold-out 0 fits all"
        )
    to_fit = given.take(fitted)
    scene.check(to_fit, where, one_sided)
    draw = nvidia.choose(rasteriser)
    with tqdm(desc=where, total=settings.steps, unit="step", dynamic_ncols=True) as bar:

        def progress(step: int, loss: float, psnr: float) -> None:
            bar.set_postfix_str(f"loss {loss:.4f}, {psnr:.1f} dB", refresh=False)
            bar.update(step - bar.n)
            on_step(step)

        gaussians, fit_report = fit(to_fit, settings, checkpoint, progress, draw)
    drawn = views.draw_views(gaussians, given, draw=draw)
    distances = views.measure(drawn, given)
    report = {
        "generator": GENERATOR,
        "settings": dataclasses.asdict(settings),
        "image_size": list(given.size),
        "background": given.background.tolist(),
        "views": len(given),
        "up": given.up,
        "masks_from": dict(collections.Counter(given.masks_from)),
        "has_normals": int(given.has_normals.sum()),
        "held_out": [given.names[i] for i in held],
        "distances": {
            name: {
                key: round(float(np.nanmean(v[which])), 4)
                for key, v in distances.items()
                if not np.isnan(v[which]).all()
            }
            for name, which in (("fitted", fitted), ("held_out", held))
            if len(which)
        },
        "fit": {**fit_report, "overflow_drawn": drawn.overflow},
        "seconds": round(time.monotonic() - started, 1),
        "device": f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind})",
        "rasteriser": "splax" if draw is nvidia.render else "jax",
        "versions": {"spinmeround_jax": spinmeround_jax.__version__, "jax": jax.__version__},
    }
    return Reconstruction(gaussians, given, drawn, report)


def reconstruct(
    heads: Heads,
    *,
    hold_out: int = 0,
    one_sided: bool = False,
    rasteriser: str = "auto",
    **settings: Any,
) -> list[Reconstruction]:
    """3D Gaussians of each head from `Pipeline`; `save` of a result writes splats, mesh and page.

    Args:
        hold_out: every `hold_out`th view is held out, to measure distances; 0: none.
        one_sided: accept cameras on one side only.
        settings: fields of `FitSettings`, such as steps=500.

    Raises:
        InputError: the views cannot be used, or the fit fails.
    """
    results = []
    for i, images in enumerate(heads.images):
        names = [layout.view_name(n, angles) for n, angles in enumerate(heads.trajectory)]
        given = scene.of_views(images, heads.normals[i], heads.cameras, names)
        chosen = FitSettings(**{"count": default_count(given.size), **settings})
        where = heads.names[i] if heads.names else f"head {i}"
        results.append(fit_and_draw(given, where, chosen, hold_out, one_sided, rasteriser))
    return results


def reconstruct_file(
    given: Scene, file: pathlib.Path, folder: pathlib.Path, args: argparse.Namespace, command: str
) -> dict[str, Any]:
    """Fit the scene of a transforms.json and write `folder`; returns the report.

    Raises:
        InputError: the views cannot be used, or the fit fails; nothing is written.
        BlockingIOError: another process writes this folder.
    """
    names = ("steps", "degree", "lpips", "normals", "mask", "lpips_network", "rate", "seed")
    count = args.count or default_count(given.size)
    settings = FitSettings(count=count, **{name: getattr(args, name) for name in names})
    checkpoint = folder.with_name(f".{folder.name}.fit.npz")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.lock(folder, suffix="fit.lock"):
        if args.overwrite:
            checkpoint.unlink(missing_ok=True)
        result = fit_and_draw(
            given, str(file), settings, args.hold_out, args.one_sided, args.rasteriser, checkpoint
        )
        request = {**settings_of(args), "views_sha256": views_sha256(given)}
        result.report.update(command=command, input=str(file), request=request)
        result.save(folder, not args.no_mesh, overwrite=True)  # `run` has checked it
        checkpoint.unlink(missing_ok=True)
    return result.report


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the result, besides the views."""
    left_out = ("input", "out", "overwrite", "rasteriser", "video")
    return {name: value for name, value in vars(args).items() if name not in left_out}


# --------------------------------------------------------------------------------------------------
# The run


def run(args: argparse.Namespace, command: str) -> int:
    """Carry out the command; returns the exit code. InputError before anything is written."""
    files.check_writable(args.out)
    if args.video:
        mp4.check()
    named = name_inputs(args.input)
    background = parse_background(args.background)
    settings = settings_of(args)

    def is_finished(folder: pathlib.Path, views_sha256: str | None = None) -> bool:
        if args.overwrite:
            layout.is_finished(folder, {}, REPORT, GENERATOR)  # it is recovered and checked
            return False
        if views_sha256 is None:  # the views are not loaded yet: take them as unchanged
            files.recover(folder)
            recorded = (layout.read_settings(folder, REPORT, GENERATOR) or {}).get("request")
            if isinstance(recorded, dict):
                views_sha256 = recorded.get("views_sha256")
        request = {**settings, "views_sha256": views_sha256}
        return layout.is_finished(folder, {"request": request}, REPORT, GENERATOR)

    for name in named:
        is_finished(args.out / name)  # conflicts are reported before anything is fitted
    failed = 0
    for name, file in named.items():
        folder = args.out / name
        try:
            given = scene.load(file, background, args.up)
            finished = is_finished(folder, views_sha256=views_sha256(given))
            if not finished:
                report = reconstruct_file(given, file, folder, args, command)
            if args.video and not (video := folder / mp4.NAME).exists():
                write_video(video, folder, mp4.DEFAULT, nvidia.choose(args.rasteriser))
        except (InputError, ImportError, OSError) as error:
            failed += 1
            print(f"error: {cli.message(error)}", file=sys.stderr)
            continue
        if finished:
            print(f"{folder}: already done")
            continue
        kind = "held_out" if "held_out" in report["distances"] else "fitted"
        figures = (f"{key} {value:g}" for key, value in report["distances"][kind].items())
        print(
            f"{folder}: {', '.join(figures)} ({kind.replace('_', ' ')} views), {report['seconds']:g} s"
        )
        if not report["up"].startswith("y"):
            print(f"  up was {report['up']}; everything written has y up")
        if guessed := report["masks_from"].get("background"):
            print(
                f"  {guessed} of {report['views']} images have neither a mask nor alpha nor normals: "
                "everything that is not background is taken as the mask"
            )
        for what, why in report["left_out"].items():
            print(f"  no {what}: {why}")
        if report["fit"]["faults"]:
            print(f"  {report['fit']['faults']} steps were skipped: their gradient was not finite")
    return 1 if failed else 0


class _Callable(types.ModuleType):
    """This module is both `python -m spinmeround_jax.reconstruct` and `spinmeround_jax.reconstruct(heads)`."""

    def __call__(self, *args: Any, **settings: Any) -> list[Reconstruction]:
        return reconstruct(*args, **settings)


sys.modules[__name__].__class__ = _Callable


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("spinmeround_jax").setLevel(logging.INFO)
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "spinmeround_jax.reconstruct", *argv])
    return cli.main(build_parser().parse_args, lambda args: run(args, command), argv)


if __name__ == "__main__":
    cli.end(main())
