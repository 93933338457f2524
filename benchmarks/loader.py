"""How fast the loader is, and how many of its cores an accelerator needs: `--help`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402

from spinmeround_jax import cli  # noqa: E402
from spinmeround_jax.cli import UsageError  # noqa: E402
from spinmeround_jax.config import DataConfig, StageConfig  # noqa: E402
from spinmeround_jax.data import latent_files, loader, records, shards  # noqa: E402
from spinmeround_jax.data.manifest import read_manifest, shard_name, write_manifest  # noqa: E402
from spinmeround_jax.data.subjects import SubjectSource  # noqa: E402

EXAMPLES = """examples:
  # pictures, cached latents of the size of the paper's model, tf.data where TensorFlow is installed
  python -m benchmarks.loader --data data/heads512 --random-latents

  # with real latents; one example per accelerator, whose step takes 0.4 s
  python -m benchmarks.loader --data data/heads512 --latents data/heads512/latents/0a1b2c3d4e5f \\
      --step-seconds 0.4 --examples-per-step 1

Everything runs in this process, without worker processes. Processor time is that of all its threads,
so that other programs on the machine do not count; wall time is told beside it.
"""


@dataclasses.dataclass
class Case:
    """One way to make batches."""

    name: str
    open: Callable[[], Iterator[Any]]  # begins anew
    files: Sequence[pathlib.Path]  # that it reads
    used_bytes: int | None  # per example, of what the files hold of it
    measured: list[dict[str, float]] = dataclasses.field(default_factory=list)


def measure(case: Case, batches: int, batch_size: int) -> dict[str, float]:
    """One round: processor and wall time, and bytes that came from the disk, per example."""
    for path in case.files:
        _drop_from_cache(path)
    before = _bytes_from_disk()
    iterator = case.open()
    with contextlib.closing(iterator) if hasattr(iterator, "close") else contextlib.nullcontext():
        next(iterator)  # opens files, compiles graphs
        decode_before, lay_before = _DECODING.seconds, _LAYING.seconds
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(batches):
            next(iterator)
        examples = batches * batch_size
        return {
            "cpu_seconds": (time.process_time() - cpu) / examples,
            "wall_seconds": (time.perf_counter() - wall) / examples,
            "decode_seconds": (_DECODING.seconds - decode_before) / examples,
            "lay_seconds": (_LAYING.seconds - lay_before) / examples,
            "disk_bytes": (_bytes_from_disk() - before) / (examples + batch_size),
        }


class _Timed:
    """Counts the processor time that a function takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.seconds, self._function = 0.0, function

    def __call__(self, *args: Any) -> Any:
        start = time.thread_time()
        try:
            return self._function(*args)
        finally:
            self.seconds += time.thread_time() - start


_DECODING = _Timed(records.decode_view)
_LAYING = _Timed(loader.composite_into)


def _drop_from_cache(path: pathlib.Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_from_disk() -> int:
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


# --------------------------------------------------------------------------------------------------
# Cases


def data_config(directory: pathlib.Path) -> DataConfig:
    """The values of configs/tpu_v4.py that make batches, without worker processes."""
    return DataConfig(
        directory=str(directory), max_frontal_yaw=45.0, max_frontal_pitch=30.0,
        random_background=0.5, guidance_dropout=0.15, identity_dropout=0.0, relative_cameras=True,
        skip_corrupt=True, workers=0, prefetch=0,
    )  # fmt: skip


def our_case(
    name: str, directory: pathlib.Path, args: argparse.Namespace, latents: pathlib.Path | None
) -> Case:
    source = SubjectSource(directory, args.split)
    if latents:
        description = latent_files.read_description(latents)
        used = args.views * 2 * 2 * int(np.prod(description.moments_shape[2:]))  # float16, two each
        files = [latent_files.paths(latents, index.path)[0] for index in source.indexes]
    else:
        files = [index.path for index in source.indexes]
        mean = np.mean([index.lengths.mean() for index in source.indexes])
        used = round(args.views * float(mean))
    stages = [StageConfig(steps=10**9 // args.batch_size, observed=(0, 1, 3))]
    return Case(
        name,
        lambda: loader.make_loader(
            data_config(directory), stages, args.batch_size, args.views, 0,
            "camera", args.split,
            latents=latents or "",
        ),
        files,
        used,
    )  # fmt: skip


def drawn(case: Case, batches: int) -> list[tuple[shards.ShardIndex, int, list[int]]]:
    """(shard, row, views) of the examples in the first batches of one of our cases."""
    reads, read_views = [], shards.ShardIndex.read_views

    def noted(index: shards.ShardIndex, row: int, views: Sequence[int]) -> Any:
        reads.append((index, row, list(views)))
        return read_views(index, row, views)

    shards.ShardIndex.read_views = noted
    try:
        with contextlib.closing(case.open()) as iterator:
            for _ in range(batches):
                next(iterator)
    finally:
        shards.ShardIndex.read_views = read_views
    return reads


def tf_case(args: argparse.Namespace, ours: Case, folder: pathlib.Path) -> Case:
    """The very examples of our case, their records one after another in a file."""
    from benchmarks import tf_data  # TensorFlow takes seconds and is not always there

    chosen = drawn(ours, args.batches + 1)
    path = folder / "examples.tfrecord"
    channels = tf_data.write_examples(path, chosen)
    size = read_manifest(args.data)["image_size"]
    return Case(
        "tf.data, the same records in order",
        lambda: tf_data.batches(path, size, channels, args.views, args.batch_size),
        [path],
        path.stat().st_size // len(chosen),
    )


def split_into_small_shards(
    directory: pathlib.Path, split: str, out: pathlib.Path, subjects: int
) -> None:
    """The first subjects of a data set, each in a shard of its own."""
    source = SubjectSource(directory, split)
    count = min(subjects, len(source))
    entries = []
    for number in range(count):
        index, row = source[number]
        path = out / shard_name(split, number, count)
        with shards.ShardWriter(path) as writer:
            writer.write_subject(index.read_views(row, range(source.views)))
        entries.append({"file": path.name, "subjects": 1})
    manifest = {**read_manifest(directory), "splits": {split: entries}}
    write_manifest(out, manifest)


def write_random_latents(
    directory: pathlib.Path, split: str, out: pathlib.Path, backgrounds: int
) -> None:
    """Numbers in place of latents, with the shape of those of Stable Diffusion's autoencoder."""
    source = SubjectSource(directory, split)
    side = source.image_size // 8
    shape = (side, side, 4)
    description = latent_files.Description(
        "random", source.image_size, source.views, shape, backgrounds, seed=0,
        normals_frame="camera",
    )  # fmt: skip
    latent_files.write_description(out, description)
    rng = np.random.default_rng(0)
    block = rng.standard_normal(description.moments_shape, np.float32).astype(np.float16)
    for index in source.indexes:
        count = len(index.subjects)
        identities = np.eye(count, records.ID_EMBEDDING_SIZE, dtype=np.float32)
        colours = np.zeros((count, backgrounds, 3), np.float32)
        with latent_files.shard_writer(out, index, description, identities, colours) as moments:
            moments[:] = block


# --------------------------------------------------------------------------------------------------
# Telling


def summary(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds; None where a figure does not apply."""
    middle = {
        name: float(np.median([round_[name] for round_ in case.measured]))
        for name in case.measured[0]
    }
    per_core = 1.0 / middle["cpu_seconds"]
    told: dict[str, Any] = {
        "examples_per_core_second": round(per_core, 2),
        "examples_per_second": round(1.0 / middle["wall_seconds"], 2),
        "cpu_milliseconds_per_example": round(1e3 * middle["cpu_seconds"], 2),
        "decoding_share": round(middle["decode_seconds"] / middle["cpu_seconds"], 3) or None,
        "background_share": round(middle["lay_seconds"] / middle["cpu_seconds"], 3) or None,
        "bytes_used_per_example": case.used_bytes,
        "bytes_read_per_byte_used": round(middle["disk_bytes"] / case.used_bytes, 3),
    }
    if args.step_seconds:
        needed = args.examples_per_step / args.step_seconds / per_core
        told["cores_per_accelerator"] = round(needed, 3)
    return told


COLUMNS = {
    "examples_per_core_second": "examples / s / core",
    "examples_per_second": "examples / s, wall",
    "cpu_milliseconds_per_example": "processor ms / example",
    "decoding_share": "decoding",
    "background_share": "background",
    "bytes_used_per_example": "bytes used / example",
    "bytes_read_per_byte_used": "read from disk / used",
    "cores_per_accelerator": "cores / accelerator",
}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    names = [name for name in COLUMNS if any(name in told for told in results.values())]
    lines = ["| | " + " | ".join(COLUMNS[name] for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for case, told in results.items():
        cells = [
            "-" if (value := told.get(name)) is None
            else f"{value:.0%}" if name.endswith("share")
            else f"{value:,}"
            for name in names
        ]  # fmt: skip
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("benchmarks.loader", __doc__, EXAMPLES)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder on a local disk")
    parser.add_argument("--split", default="train", help="(train)")
    latents = parser.add_mutually_exclusive_group()
    latents.add_argument("--latents", type=pathlib.Path, help="as data_prep.cache_latents wrote")
    latents.add_argument(
        "--random-latents", action="store_true",
        help="numbers of the same size in a temporary folder: 32 MB per subject at 512 pixels",
    )  # fmt: skip
    parser.add_argument("--views", type=int, default=8, help="per example (8)")
    parser.add_argument("--batch-size", type=int, default=2, help="examples (2)")
    parser.add_argument("--batches", type=int, default=8, help="per round (8)")
    parser.add_argument("--rounds", type=int, default=5, help="the cases take turns in each (5)")
    parser.add_argument(
        "--small-shards", type=int, default=8, help="how many shards of one subject (8, 0: none)"
    )
    parser.add_argument("--step-seconds", type=float, help="what a training step takes")
    parser.add_argument(
        "--examples-per-step", type=float, default=1.0, help="per accelerator, with it (1)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--temporary", type=pathlib.Path, help="folder for what is made (system's)")
    args = parser.parse_args(argv)
    if min(args.views, args.batch_size, args.batches, args.rounds) < 1 or args.small_shards < 0:
        raise UsageError("--views, --batch-size, --batches, --rounds must be positive")
    return args


def measure_all(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Measures all cases in turn; `folder` is for what they need."""
    latents = args.latents
    if args.random_latents:
        latents = folder / "latents"
        write_random_latents(args.data, args.split, latents, backgrounds=2)
    cases = [our_case("pictures", args.data, args, None)]
    if args.small_shards:
        small = folder / "small"
        small.mkdir()
        split_into_small_shards(args.data, args.split, small, args.small_shards)
        cases.append(our_case("pictures, one subject per shard", small, args, None))
    if importlib.util.find_spec("tensorflow"):
        cases.append(tf_case(args, cases[0], folder))
    else:
        print("tf.data is left out, as TensorFlow is not installed", file=sys.stderr)
    if latents:
        cases.append(our_case("cached latents", args.data, args, latents))
    records.decode_view, loader.composite_into = _DECODING, _LAYING
    for _ in range(args.rounds):
        for case in cases:
            case.measured.append(measure(case, args.batches, args.batch_size))
    return {case.name: summary(case, args) for case in cases}


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.temporary) as folder:
        results = measure_all(args, pathlib.Path(folder))
    print(table(results))
    if args.out:
        settings = {name: str(value) for name, value in vars(args).items() if value is not None}
        machine = (
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        )
        report = {"settings": settings, "machine": machine, "results": results}
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


if __name__ == "__main__":
    cli.end(main())
