"""What rays cost and give: seconds of a rendered view, and how far it is from one of many rays."""

from __future__ import annotations

import argparse
import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import time  # noqa: E402

import numpy as np  # noqa: E402

from data_prep.parametric.subjects import build_scene  # noqa: E402
from data_prep.render_heads import person_of, subject_name  # noqa: E402
from data_prep.rendering import render  # noqa: E402
from spinmeround_jax import cameras, cli  # noqa: E402


def run(args: argparse.Namespace) -> None:
    found: dict[int, list[tuple[float, float]]] = {samples: [] for samples in args.samples}
    building = []
    for number in range(args.subjects):
        start = time.process_time()
        scene, _ = build_scene(person_of(0, subject_name(0, number)), args.size)
        building.append(time.process_time() - start)
        for yaw in (0, 110, 180):
            pose = cameras.orbit(yaw, 0)
            true = render.on_white(render.render_view(scene, pose, args.size, args.truth).rgba)
            for samples, rows in found.items():
                start = time.process_time()
                view = render.render_view(scene, pose, args.size, samples)
                seconds = time.process_time() - start
                error = np.mean((render.on_white(view.rgba) / 255.0 - true / 255.0) ** 2)
                rows.append((seconds, -10 * np.log10(max(error, 1e-10))))
    # The first head also reads the assets.
    print(f"building a head: median {np.median(building):.2f} s of one core")
    print("| rays per pixel side | s / view | PSNR | least |\n|---|---|---|---|")
    for samples, rows in found.items():
        seconds, psnr = np.array(rows).T
        print(f"| {samples} | {seconds.mean():.3f} | {psnr.mean():.1f} | {psnr.min():.1f} |")


def main(argv: list[str] | None = None) -> int:
    example = "example: python -m benchmarks.rendering --subjects 6 --size 128"
    parser = cli.build_parser("benchmarks.rendering", __doc__, example)
    parser.add_argument("--subjects", type=int, default=6, help="(6)")
    parser.add_argument("--size", type=int, default=128, help="pixels (128)")
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument(
        "--truth", type=int, default=10, help="rays per pixel side of the truth (10)"
    )
    return cli.main(parser.parse_args, run, argv)


if __name__ == "__main__":
    cli.end(main())
