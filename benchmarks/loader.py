"""Time the loader in this process, from images and from cached latents, and count the cores it needs."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import time
from collections.abc import Sequence

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402

from benchmarks import measuring  # noqa: E402
from spinmeround_jax import cli  # noqa: E402
from spinmeround_jax.config import DataConfig, StageConfig  # noqa: E402
from spinmeround_jax.data import latent_files, loader  # noqa: E402
from spinmeround_jax.data.subjects import SubjectSource  # noqa: E402

EXAMPLES = """example: one example per accelerator, whose step takes 0.4 s
  python -m benchmarks.loader --data data/heads512 --latents data/heads512/latents/0a1b2c3d4e5f \\
      --step-seconds 0.4
"""


def measure(
    args: argparse.Namespace, latents: pathlib.Path | None, paths: Sequence[pathlib.Path]
) -> dict[str, float]:
    """One round: seconds of the clock and of all threads, and bytes from the disk, per example.

    Args:
        latents: folder of cached latents, or None for images.
        paths: files that are read; the system's cache of them is dropped first.
    """
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    config = DataConfig(  # of configs/tpu_v4.py, without worker processes
        directory=str(args.data), max_frontal_yaw=45.0, max_frontal_pitch=30.0,
        random_background=0.5, guidance_dropout=0.15, identity_dropout=0.0, relative_cameras=True,
        skip_corrupt=True, workers=0, prefetch=0,
    )  # fmt: skip
    stages = [StageConfig(steps=10**9 // args.batch_size, observed=(0, 1, 3))]
    before, examples = _bytes_from_disk(), args.batches * args.batch_size
    batches = loader.make_loader(
        config, stages, args.batch_size, args.views, 0, "camera", args.split, latents=latents or ""
    )
    with contextlib.closing(batches):
        next(batches)  # opens files
        processor, wall = time.process_time(), time.perf_counter()
        for _ in range(args.batches):
            next(batches)
        return {
            "processor": (time.process_time() - processor) / examples,
            "wall": (time.perf_counter() - wall) / examples,
            "read": (_bytes_from_disk() - before) / (examples + args.batch_size),
        }


def _bytes_from_disk() -> int:
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def measure_all(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians of interleaved rounds of "images" and, if given, "cached latents"."""
    indexes = SubjectSource(args.data, args.split).indexes
    length = float(np.mean([index.lengths.mean() for index in indexes]))
    cases = {"images": (None, [index.path for index in indexes], round(args.views * length))}
    if args.latents:
        paths = [latent_files.paths(args.latents, index.path)[0] for index in indexes]
        shape = latent_files.read_description(args.latents).moments_shape[2:]
        used = args.views * 2 * 2 * int(np.prod(shape))  # image and normals, float16
        cases["cached latents"] = (args.latents, paths, used)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, (latents, paths, _) in cases.items():
            rounds[name].append(measure(args, latents, paths))
    results = {}
    for name, (_, _, used) in cases.items():
        middle = {key: float(np.median([r[key] for r in rounds[name]])) for key in rounds[name][0]}
        results[name] = {
            "examples_per_core_second": 1.0 / middle["processor"],
            "examples_per_second": 1.0 / middle["wall"],
            "bytes_used_per_example": used,
            "bytes_read_per_byte_used": middle["read"] / used,
        }
        if args.step_seconds:
            needed = args.examples_per_step / args.step_seconds
            results[name]["cores_per_accelerator"] = needed * middle["processor"]
    return results


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("benchmarks.loader", __doc__, EXAMPLES)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder on a local disk")
    parser.add_argument("--split", default="train", help="(train)")
    parser.add_argument("--latents", type=pathlib.Path, help="as data_prep.cache_latents wrote")
    parser.add_argument("--views", type=cli.integer(1), default=8, help="per example (8)")
    parser.add_argument("--batch-size", type=cli.integer(1), default=2, help="examples (2)")
    parser.add_argument("--batches", type=cli.integer(1), default=8, help="per round (8)")
    parser.add_argument("--rounds", type=cli.integer(1), default=5, help="interleaved (5)")
    parser.add_argument("--step-seconds", type=float, help="time of a training step")
    parser.add_argument("--examples-per-step", type=float, default=1.0, help="per accelerator (1)")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    results = measure_all(args)
    measuring.finish({**measuring.about(args), "results": results}, args.out)


def main(argv: list[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


if __name__ == "__main__":
    cli.end(main())
