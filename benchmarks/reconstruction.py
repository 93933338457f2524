"""How good splats get, fitted to true renders and to generated views, with and without each loss.

    python -m benchmarks.reconstruction --data data/heads64 --checkpoint weights/quickstart --subjects 1 2

Every subject is fitted eight times: to its true renders and to the views the model makes of its
frontal one, with and without LPIPS, with and without the normals. All fits see 42 of the 48 views of the
ring at pitch 0; every eighth is held out. They are judged

  between   at the 6 held-out views of the ring: against the views of their own kind, true or generated,
  unseen    at the data's other views within 5 degrees of the ring's pitch: against the true renders,
  beyond    likewise at those between 5 and 15 degrees.

A second table has what each loss changes, subject by subject: mean and standard error. A fit is kept in
--out and not done again; `table.md` is written after each subject.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
import time

import numpy as np
from tqdm import tqdm

from spinmeround_jax import cameras, cli
from spinmeround_jax.cli import UsageError
from spinmeround_jax.data.subjects import HeldOut
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.evaluation.parts import stamp_of
from spinmeround_jax.splats import scene, views
from spinmeround_jax.splats.fit import FitSettings, fit
from spinmeround_jax.splats.scene import Scene

RING, EVERY = 48, 8
NEAR, FAR = 5.0, 15.0  # degrees of pitch
KINDS = ("true renders", "generated views")
PLACES = ("between", "unseen", "beyond")
LOSSES = {
    "L1 + DSSIM": {"lpips": 0.0, "normals": 0.0},
    "+ LPIPS": {"normals": 0.0},
    "+ normals": {"lpips": 0.0},
    "+ LPIPS + normals": {},
}


def true_scenes(held_out: HeldOut, subject: int) -> dict[str, Scene]:
    """The "ring" in the turntable's order, and the views "unseen" and "beyond"."""
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


def generated_scene(directory: pathlib.Path, held_out: HeldOut, subject: int, ring: Scene) -> Scene:
    """The ring as the model sees it from the frontal view."""
    pipeline = Pipeline.load(directory, max_batch=2)
    portrait = 2.0 * ring.images[None, :1] - 1.0
    identity = held_out.load(subject, [0]).id_embedding[None]
    heads = pipeline.spin(portrait, identity, cameras.turntable(RING), np.zeros(1, np.int64))
    return scene.of_views(heads.images[0], heads.normals[0], ring.world_to_camera, ring.names)


def judge(given: Scene, scenes: dict[str, Scene], settings: FitSettings, desc: str) -> dict:
    """Fit to `given` without every eighth view; means of the distances at each of PLACES."""
    numbers = np.arange(RING)
    held = numbers % EVERY == EVERY // 2
    started, busy = time.monotonic(), time.process_time()
    with tqdm(desc=desc, total=settings.steps, unit="step") as bar:
        gaussians, told = fit(
            given.take(numbers[~held]),
            settings,
            progress=lambda step, loss, psnr: bar.update(step - bar.n),
        )
    result = {
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - busy,
        **told,
    }
    for place in PLACES:
        target = given.take(numbers[held]) if place == "between" else scenes[place]
        distances = views.measure(views.draw_views(gaussians, target), target)
        result[place] = {name: float(np.nanmean(values)) for name, values in distances.items()}
    return result


def table(found: dict[tuple[str, str], list[dict]]) -> str:
    """Markdown: means over subjects."""
    lines = [
        "| fitted to | losses | "
        + " | ".join(f"{place}: PSNR ↑ / SSIM ↑ / LPIPS ↓" for place in PLACES)
        + " | normals (°) ↓, unseen | subjects | CPU seconds |",
        "|---|---|" + "---|" * (len(PLACES) + 3),
    ]
    for (kind, losses), results in found.items():

        def mean(place: str, name: str, results: list[dict] = results) -> float:
            return float(np.mean([result[place][name] for result in results]))

        cells = [
            f"{mean(p, 'psnr'):.2f} / {mean(p, 'ssim'):.3f} / {mean(p, 'lpips'):.3f}"
            for p in PLACES
        ]
        cells += [f"{mean('unseen', 'normals'):.1f}", str(len(results))]
        cells += [f"{np.mean([r['cpu_seconds'] for r in results]):.0f}"]
        lines.append(f"| {kind} | {losses} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def changes(found: dict[tuple[str, str], list[dict]]) -> str:
    """Markdown: at the unseen views, differences from the fit without further losses."""
    quantities = {"psnr": 2, "lpips": 3, "normals": 1}  # decimals
    lines = [
        "| fitted to | adding | PSNR (dB) | LPIPS | normals (°) |",
        "|---|---|---|---|---|",
    ]
    for (kind, losses), results in found.items():
        plain = found.get((kind, next(iter(LOSSES))), [])
        if results is plain or not len(plain) == len(results) > 1:
            continue
        cells = []
        for name, decimals in quantities.items():
            values = [
                a["unseen"][name] - b["unseen"][name] for a, b in zip(results, plain, strict=True)
            ]
            error = np.std(values, ddof=1) / np.sqrt(len(values))
            cells.append(f"{np.mean(values):+.{decimals}f} ± {error:.{decimals}f}")
        lines.append(f"| {kind} | {losses} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    held_out = HeldOut(args.data)
    if wrong := [i for i in args.subjects if not 0 <= i < len(held_out)]:
        raise UsageError(f"--subjects {wrong[0]}: {args.data} has 0 to {len(held_out) - 1}")
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str], list[dict]] = {
        (kind, losses): []
        for kind in KINDS[: 2 if args.checkpoint else 1]
        for losses in args.losses
    }
    data, checkpoint = (stamp_of(path) if path else None for path in (args.data, args.checkpoint))
    for subject in args.subjects:
        scenes: dict[str, Scene] = {}
        given: dict[str, Scene] = {}
        for kind, losses in found:
            settings = FitSettings(
                steps=args.steps, count=args.count, degree=args.degree, **LOSSES[losses]
            )
            about = {
                "data": data, "subject": subject, "kind": kind, "losses": losses,
                "checkpoint": checkpoint if kind == KINDS[1] else None,
                "settings": dataclasses.asdict(settings),
            }  # fmt: skip
            digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
            file = args.out / f"{subject:03d}-{digest}.json"
            if file.exists():
                found[kind, losses].append(json.loads(file.read_text())["result"])
                continue
            scenes = scenes or true_scenes(held_out, subject)
            if kind not in given:
                given[kind] = (
                    scenes["ring"]
                    if kind == KINDS[0]
                    else generated_scene(args.checkpoint, held_out, subject, scenes["ring"])
                )
            result = judge(given[kind], scenes, settings, f"{subject}: {kind}, {losses}")
            file.write_text(json.dumps({**about, "result": result}, indent=1) + "\n")
            found[kind, losses].append(result)
        text = f"{table(found)}\n\n{changes(found)}"
        (args.out / "table.md").write_text(text + "\n")
        print(f"\n{text}\n", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = cli.build_parser("benchmarks.reconstruction", __doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="data_prep's folder")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="model; without: true renders only")
    parser.add_argument(
        "--subjects", type=int, nargs="+", default=[1, 2], help="numbers of held-out ones (1 2)"
    )
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="which fits (all)"
    )
    parser.add_argument("--steps", type=int, default=FitSettings().steps)
    parser.add_argument("--count", type=int, default=FitSettings().count, help="Gaussians")
    parser.add_argument("--degree", type=int, default=FitSettings().degree)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/reconstruction"))
    return cli.main(parser.parse_args, run, argv)


if __name__ == "__main__":
    cli.end(main())
