"""Fit splats to true renders and to generated views, with and without each loss, and compare.

    python -m benchmarks.reconstruction --data data/heads64 --checkpoint weights/quickstart --subjects 1 2

All fits see 42 of the 48 views of the ring at pitch 0. They are judged

  between   at the other 6 (every eighth), against views of their own kind, true or generated,
  unseen    at the data's other views within 5 degrees of the ring's pitch, against the true renders,
  beyond    likewise at views between 5 and 15 degrees.

The second table has the change that each loss makes, per subject: mean and standard error.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import measuring
from spinmeround_jax import cameras, cli, files
from spinmeround_jax.cli import UsageError
from spinmeround_jax.data.subjects import HeldOut
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.splats import scene, views
from spinmeround_jax.splats.fit import FitSettings, fit
from spinmeround_jax.splats.scene import Scene

RING, EVERY = 48, 8
NEAR, FAR = 5.0, 15.0  # degrees of pitch
KINDS = ("true renders", "generated views")
PLACES = ("between", "unseen", "beyond")
MEASURES = ("psnr", "ssim", "lpips")
LOSSES = {
    "L1 + DSSIM": {"lpips": 0.0, "normals": 0.0},
    "+ LPIPS": {"normals": 0.0},
    "+ normals": {"lpips": 0.0},
    "+ LPIPS + normals": {},
}

Results = dict[tuple[str, str], list[dict[str, Any]]]  # by kind and losses, of each subject


def true_scenes(held_out: HeldOut, subject: int) -> dict[str, Scene]:
    """The "ring" in the order of the turntable, and the views "unseen" and "beyond"."""
    angles = held_out.angles(subject)
    ring = []
    for yaw, _ in cameras.turntable(RING):
        off = np.maximum(abs((angles[:, 0] - yaw + 180.0) % 360.0 - 180.0), abs(angles[:, 1]))
        if off.min() > 0.01:
            raise ValueError(f"the data has no view at yaw {yaw:g}, pitch 0; it needs the ring")
        ring.append(int(off.argmin()))
    others = np.setdiff1d(np.arange(len(angles)), ring)
    pitch = abs(angles[others, 1])
    chosen = {"ring": ring, "unseen": others[pitch <= NEAR].tolist()}
    chosen["beyond"] = others[(pitch > NEAR) & (pitch <= FAR)].tolist()
    scenes = {}
    for name, numbers in chosen.items():
        loaded = held_out.load(subject, numbers)
        scenes[name] = scene.of_views(
            loaded.images,
            loaded.normals,
            loaded.world_to_camera,
            list(map(str, numbers)),
            loaded.alpha,
        )
    return scenes


def generated_scene(directory: str, held_out: HeldOut, subject: int, ring: Scene) -> Scene:
    """The ring as the model generates it from the frontal view."""
    pipeline = Pipeline.load(directory, max_batch=2)
    portrait = 2.0 * ring.images[None, :1] - 1.0
    identity = held_out.load(subject, [0]).id_embedding[None]
    heads = pipeline.spin(portrait, identity, cameras.turntable(RING), np.zeros(1, np.int64))
    return scene.of_views(heads.images[0], heads.normals[0], ring.world_to_camera, ring.names)


def judge(given: Scene, scenes: dict[str, Scene], settings: FitSettings, desc: str) -> dict:
    """Fit to `given` without every eighth view; mean distances at each of PLACES."""
    numbers = np.arange(RING)
    held = numbers % EVERY == EVERY // 2
    started = time.monotonic()
    with tqdm(desc=desc, total=settings.steps, unit="step") as bar:
        gaussians, info = fit(
            given.take(numbers[~held]),
            settings,
            progress=lambda step, loss, psnr: bar.update(step - bar.n),
        )
    result = {"seconds": time.monotonic() - started, **info}
    for place in PLACES:
        target = given.take(numbers[held]) if place == "between" else scenes[place]
        distances = views.measure(views.draw_views(gaussians, target), target)
        result[place] = {name: float(np.nanmean(values)) for name, values in distances.items()}
    return result


def tables(results: Results) -> str:
    """Markdown: means over subjects, and the change of each loss at the unseen views."""
    head = ["fitted to", "losses", *(f"{place}: PSNR, SSIM, LPIPS" for place in PLACES)]
    means, changes = [], []
    for (kind, losses), found in results.items():
        cells = [
            ", ".join(f"{np.mean([r[place][x] for r in found]):.3f}" for x in MEASURES)
            for place in PLACES
        ]
        normals, seconds = (
            np.mean([r["unseen"]["normals"] for r in found]), np.mean([r["seconds"] for r in found])
        )  # fmt: skip
        means.append([kind, losses, *cells, f"{normals:.1f}", f"{seconds:.0f}"])
        plain = results.get((kind, next(iter(LOSSES))), found)
        if found is plain or len(found) < 2:
            continue
        differences = {
            name: [a["unseen"][name] - b["unseen"][name] for a, b in zip(found, plain, strict=True)]
            for name in ("psnr", "lpips", "normals")
        }
        changes.append([kind, losses] + [
            f"{np.mean(values):+.3f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"
            for values in differences.values()
        ])  # fmt: skip
    first = measuring.table(means, [*head, "unseen: normals (°)", "seconds of one fit"])
    second = measuring.table(changes, ["fitted to", "adding", "PSNR (dB)", "LPIPS", "normals (°)"])
    return f"{first}\n\n{second}" if changes else first


def run(args: argparse.Namespace) -> None:
    held_out = HeldOut(args.data)
    if wrong := [i for i in args.subjects if not 0 <= i < len(held_out)]:
        raise UsageError(f"--subjects {wrong[0]}: {args.data} has 0 to {len(held_out) - 1}")
    kinds, results = KINDS[: 2 if args.checkpoint else 1], collections.defaultdict(list)
    for subject in args.subjects:
        scenes = true_scenes(held_out, subject)
        given = {KINDS[0]: scenes["ring"]}
        if args.checkpoint:
            given[KINDS[1]] = generated_scene(args.checkpoint, held_out, subject, scenes["ring"])
        for kind, losses in ((kind, losses) for kind in kinds for losses in args.losses):
            settings = FitSettings(
                steps=args.steps, count=args.count, degree=args.degree, **LOSSES[losses]
            )
            fitted = judge(given[kind], scenes, settings, f"{subject}: {kind}, {losses}")
            results[kind, losses].append({"subject": subject, **fitted})
        text = json.dumps({" / ".join(key): value for key, value in results.items()}, indent=1)
        files.write_atomically(args.out, text.encode())
        print(f"\n{tables(results)}\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = cli.build_parser("benchmarks.reconstruction", __doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="data_prep's folder")
    parser.add_argument("--checkpoint", metavar="MODEL", help="model; without: true renders only")
    parser.add_argument(
        "--subjects", type=int, nargs="+", default=[1, 2], help="numbers of held-out ones (1 2)"
    )
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="which fits (all)"
    )
    parser.add_argument("--steps", type=int, default=FitSettings().steps)
    parser.add_argument("--count", type=int, default=FitSettings().count, help="Gaussians")
    parser.add_argument("--degree", type=int, default=FitSettings().degree)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/reconstruction.json"))
    return cli.main(parser.parse_args, run, argv)


if __name__ == "__main__":
    cli.end(main())
