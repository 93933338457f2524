"""Renders parametric people to TFRecord shards: `python -m data_prep.render_heads --help`.

Every subject is a pure function of --seed and its number, so the result does not depend on the
number of workers, and a run that was killed goes on where it stopped when started again.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

# One core per worker: the small matrix products here only get slower with more threads.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data_prep import assets, contact_sheet, render, viewpoints  # noqa: E402
from data_prep.people import id_embedding, sample_person  # noqa: E402
from data_prep.subjects import build_scene  # noqa: E402
from spinmeround_jax import cameras, records, shards  # noqa: E402
from spinmeround_jax.manifest import shard_name, write_manifest  # noqa: E402

HELD_OUT_OFFSET = 1_000_000  # held-out subjects are numbered from here: never a training subject
_SETTINGS = "render_settings.json"

EXAMPLES = """examples:
  # a small set to look at, about a minute
  python -m data_prep.render_heads --out /tmp/heads --subjects 4 --held-out 2 --views 16

  # what configs/quickstart.py trains on (2 cores: about an hour)
  python -m data_prep.render_heads --out data/heads64 --subjects 480 --held-out 40 --size 64 \\
      --samples 2

  # for 512-pixel training on a large machine
  python -m data_prep.render_heads --out data/heads512 --subjects 7000 --held-out 200 --size 512

A run that was stopped continues when the same command is given again.
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard: which subjects go into which file."""

    path: pathlib.Path
    subjects: tuple[int, ...]
    seed: int
    size: int
    views: int
    samples: int


def subject_name(seed: int, number: int) -> str:
    """E.g. 'parametric-0-000123'."""
    return f"parametric-{seed}-{number:06d}"


def person_seed(seed: int, number: int) -> int:
    """The seed of sample_person for subject `number` of data set `seed`."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


def subject_records(job: Job, number: int) -> list[records.ViewRecord]:
    """Renders all views of one subject."""
    person = sample_person(person_seed(job.seed, number))
    scene, _ = build_scene(person, job.size)
    embedding = id_embedding(person)
    out = []
    for view, (yaw, pitch) in enumerate(viewpoints.viewpoints(job.views)):
        pose = cameras.orbit(yaw, pitch)
        picture = render.render_view(scene, pose, job.size, job.samples)
        out.append(
            records.ViewRecord(
                subject=subject_name(job.seed, number),
                view=view,
                image=records.encode_image(picture.rgba),
                normals=records.encode_normals(picture.soft_normals),
                world_to_camera=pose,
                yaw=float(yaw),
                pitch=float(pitch),
                id_embedding=embedding,
                source=f"data_prep.render_heads seed={job.seed} size={job.size}",
                license=assets.LICENSE,
            )
        )
    return out


def render_shard(job: Job) -> None:
    """Writes one shard; it appears under its name only when complete."""
    with shards.ShardWriter(job.path) as writer:
        for number in job.subjects:
            writer.write_subject(subject_records(job, number))


def render_shards(jobs: list[Job], workers: int) -> Iterator[Job]:
    """Writes the shards, with several processes where that helps; yields each that is done.

    Raises:
        BrokenProcessPool: a worker was killed.
    """
    if workers == 1 or len(jobs) <= 1:
        for job in jobs:
            render_shard(job)
            yield job
        return
    # spawn: embree and jax must not be forked once they have started threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context) as pool:
        futures = {pool.submit(render_shard, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, do not render the rest first


def plan(args: argparse.Namespace) -> dict[str, list[Job]]:
    """Split -> jobs. Train and held-out subjects have different numbers, hence identities."""
    jobs = {}
    for split, count, first in (
        ("train", args.subjects, 0),
        ("held_out", args.held_out, HELD_OUT_OFFSET),
    ):
        numbers = range(first, first + count)
        total = -(-count // args.shard_subjects)
        jobs[split] = [
            Job(
                path=args.out / shard_name(split, i, total),
                subjects=tuple(numbers[i * args.shard_subjects : (i + 1) * args.shard_subjects]),
                seed=args.seed,
                size=args.size,
                views=args.views,
                samples=args.samples,
            )
            for i in range(total)
        ]
    return jobs


def _check_settings(args: argparse.Namespace) -> None:
    """Refuses to mix two different renderings in one folder."""
    names = ("subjects", "held_out", "size", "seed", "views", "samples", "shard_subjects")
    wanted = {name: getattr(args, name) for name in names}
    path = args.out / _SETTINGS
    if path.exists():
        try:
            found = dict(json.loads(path.read_text()))
        except Exception as error:  # the file can hold anything
            sys.exit(
                f"{path}: damaged ({error!r}). Restore it, or choose another --out; delete it only "
                "if all shards beside it were made with the settings given now."
            )
        if found != wanted:
            differing = {k: (found.get(k), wanted[k]) for k in wanted if found.get(k) != wanted[k]}
            sys.exit(
                f"{args.out} was begun with other settings (there, here): {differing}.\n"
                "Give the same settings to continue it, or another --out."
            )
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted, indent=2))
    temporary.replace(path)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.render_heads",
        description="Render parametric human heads (MakeHuman, CC0) to multi-view TFRecord shards.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--subjects", type=_positive, default=600, help="training subjects (600)")
    parser.add_argument("--held-out", type=int, default=40, help="subjects never trained on (40)")
    parser.add_argument("--size", type=_positive, default=64, help="pixels, square (64)")
    parser.add_argument("--seed", type=int, default=0, help="which people are drawn (0)")
    parser.add_argument(
        "--views", type=_positive, default=viewpoints.COUNT, help="views each (125)"
    )
    parser.add_argument("--samples", type=_positive, default=3, help="rays per pixel side (3)")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count(), help="processes (all)")
    parser.add_argument("--shard-subjects", type=_positive, default=10, help="per shard (10)")
    parser.add_argument(
        "--preview",
        default="contact_sheet.png",
        help="overview picture, written into --out; empty for none",
    )
    args = parser.parse_args(argv)
    if min(args.held_out, args.seed) < 0 or args.subjects > HELD_OUT_OFFSET:
        parser.error(
            f"--held-out and --seed must not be negative, --subjects at most {HELD_OUT_OFFSET}"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        assets.assets_dir()
    except assets.AssetsMissing as error:
        sys.exit(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    _check_settings(args)
    jobs = plan(args)
    everything = [job for split in jobs.values() for job in split]
    missing = [job for job in everything if not shards.is_complete(job.path)]
    total = sum(len(job.subjects) for job in everything)
    done = total - sum(len(job.subjects) for job in missing)
    with tqdm(total=total, initial=done, unit="subject", disable=None) as bar:
        try:
            for job in render_shards(missing, args.workers):
                bar.update(len(job.subjects))
        except BrokenProcessPool:
            sys.exit(
                "A worker process was killed, perhaps because memory ran out. The same command "
                "continues where this one stopped; fewer --workers need less memory."
            )
    write_manifest(
        args.out,
        {
            "image_size": args.size,
            "views": args.views,
            "seed": args.seed,
            "source": "data_prep.render_heads: parametric people of the MakeHuman base mesh",
            "license": assets.LICENSE,
            "splits": {
                split: [{"file": j.path.name, "subjects": len(j.subjects)} for j in written]
                for split, written in jobs.items()
            },
        },
    )
    if args.preview:
        numbers = everything[0].subjects[:6]
        sheet = contact_sheet.contact_sheet(
            [sample_person(person_seed(args.seed, n)) for n in numbers], max(args.size, 128)
        )
        sheet.save(args.out / pathlib.Path(args.preview).name)
    print(f"{total} subjects in {len(everything)} shards, {args.views} views each: {args.out}")


if __name__ == "__main__":
    main()
