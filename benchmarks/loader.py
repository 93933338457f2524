"""Time the loader in this process, from images and from cached latents, and count the cores it needs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402

from benchmarks import measuring  # noqa: E402
from spinmeround_jax import cli  # noqa: E402
from spinmeround_jax.config import DataConfig, StageConfig  # noqa: E402
from spinmeround_jax.data import latent_files, loader, records  # noqa: E402
from spinmeround_jax.data.subjects import SubjectSource  # noqa: E402

EXAMPLES = """examples:
  # images, and random latents of the size of Stable Diffusion's
  python -m benchmarks.loader --data data/heads512 --random-latents

  # real latents; one example per accelerator, whose step takes 0.4 s
  python -m benchmarks.loader --data data/heads512 --latents data/heads512/latents/0a1b2c3d4e5f \\
      --step-seconds 0.4
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A source of batches.

    Attributes:
        latents: folder of cached latents; None for images.
        paths: files that it reads.
        bytes_used: bytes of these files that one example needs.
    """

    latents: pathlib.Path | None
    paths: Sequence[pathlib.Path]
    bytes_used: int


def find_case(args: argparse.Namespace, latents: pathlib.Path | None) -> Case:
    """The case of a data set, or of latents of it."""
    source = SubjectSource(args.data, args.split)
    if latents is None:
        length = float(np.mean([index.lengths.mean() for index in source.indexes]))
        return Case(None, [index.path for index in source.indexes], round(args.views * length))
    shape = latent_files.read_description(latents).moments_shape[2:]
    paths = [latent_files.paths(latents, index.path)[0] for index in source.indexes]
    return Case(latents, paths, args.views * 2 * 2 * int(np.prod(shape)))  # two float16 arrays


def batches(case: Case, args: argparse.Namespace) -> Iterator[Any]:
    """Batches with the data settings of configs/tpu_v4.py, without worker processes."""
    config = DataConfig(
        directory=str(args.data), max_frontal_yaw=45.0, max_frontal_pitch=30.0,
        random_background=0.5, guidance_dropout=0.15, identity_dropout=0.0, relative_cameras=True,
        skip_corrupt=True, workers=0, prefetch=0,
    )  # fmt: skip
    stages = [StageConfig(steps=10**9 // args.batch_size, observed=(0, 1, 3))]
    return loader.make_loader(
        config,
        stages,
        args.batch_size,
        args.views,
        0,
        "camera",
        args.split,
        latents=case.latents or "",
    )


def measure(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """One round, its files read from the disk: seconds and bytes per example."""
    for path in case.paths:
        with path.open("rb") as file:  # drop it from the system's cache
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, examples = _bytes_from_disk(), args.batches * args.batch_size
    with contextlib.closing(batches(case, args)) as iterator:
        next(iterator)  # opens files
        processor, wall = time.process_time(), time.perf_counter()
        for _ in range(args.batches):
            next(iterator)
        return {
            "processor": (time.process_time() - processor) / examples,
            "wall": (time.perf_counter() - wall) / examples,
            "read": (_bytes_from_disk() - before) / (examples + args.batch_size),
        }


def _bytes_from_disk() -> int:
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def write_random_latents(
    directory: pathlib.Path, split: str, out: pathlib.Path, backgrounds: int
) -> None:
    """Random numbers as cached latents, with the shape of those of Stable Diffusion's autoencoder."""
    source = SubjectSource(directory, split)
    side = source.image_size // 8
    description = latent_files.Description(
        "random",
        source.image_size,
        source.views,
        (side, side, 4),
        backgrounds,
        seed=0,
        normals_frame="camera",
    )
    latent_files.write_description(out, description)
    rng = np.random.default_rng(0)
    block = rng.standard_normal(description.moments_shape, np.float32).astype(np.float16)
    for index in source.indexes:
        count = len(index.subjects)
        identities = np.eye(count, records.ID_EMBEDDING_SIZE, dtype=np.float32)
        colours = np.zeros((count, backgrounds, 3), np.float32)
        with latent_files.shard_writer(out, index, description, identities, colours) as moments:
            moments[:] = block


def summary(case: Case, rounds: Sequence[dict[str, float]], args: argparse.Namespace) -> dict:
    """Medians over the rounds."""
    middle = {name: float(np.median([r[name] for r in rounds])) for name in rounds[0]}
    found = {
        "examples_per_core_second": 1.0 / middle["processor"],
        "examples_per_second": 1.0 / middle["wall"],
        "bytes_used_per_example": case.bytes_used,
        "bytes_read_per_byte_used": middle["read"] / case.bytes_used,
    }
    if args.step_seconds:
        needed = args.examples_per_step / args.step_seconds
        found["cores_per_accelerator"] = needed * middle["processor"]
    return found


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("benchmarks.loader", __doc__, EXAMPLES)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder on a local disk")
    parser.add_argument("--split", default="train", help="(train)")
    latents = parser.add_mutually_exclusive_group()
    latents.add_argument("--latents", type=pathlib.Path, help="as data_prep.cache_latents wrote")
    latents.add_argument(
        "--random-latents", action="store_true",
        help="in a temporary folder: 32 MB per subject at 512 pixels",
    )  # fmt: skip
    parser.add_argument("--temporary", type=pathlib.Path, help="folder for these (the system's)")
    parser.add_argument("--views", type=cli.integer(1), default=8, help="per example (8)")
    parser.add_argument("--batch-size", type=cli.integer(1), default=2, help="examples (2)")
    parser.add_argument("--batches", type=cli.integer(1), default=8, help="per round (8)")
    parser.add_argument(
        "--rounds", type=cli.integer(1), default=5, help="the cases take turns in each (5)"
    )
    parser.add_argument("--step-seconds", type=float, help="time of a training step")
    parser.add_argument("--examples-per-step", type=float, default=1.0, help="per accelerator (1)")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    return parser.parse_args(argv)


def measure_all(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Measure all cases, interleaved; `folder` is for random latents."""
    cases = {"images": find_case(args, None)}
    latents = args.latents
    if args.random_latents:
        latents = folder / "latents"
        write_random_latents(args.data, args.split, latents, backgrounds=2)
    if latents:
        cases["cached latents"] = find_case(args, latents)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, case in cases.items():
            rounds[name].append(measure(case, args))
    return {name: summary(case, rounds[name], args) for name, case in cases.items()}


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.temporary) as folder:
        results = measure_all(args, pathlib.Path(folder))
    settings = {name: str(value) for name, value in vars(args).items() if value is not None}
    report = {"settings": settings, "machine": measuring.machine(), "results": results}
    measuring.finish(report, args.out)


def main(argv: list[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


if __name__ == "__main__":
    cli.end(main())
