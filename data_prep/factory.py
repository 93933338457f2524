"""The writing loop that all sources of training data share.

A `Source` names its subjects and makes the views of one; the rest is here: several processes, a
share of the work for each of several machines (`--shard`), resuming, the list of subjects that
could not be made, and the manifest once everything is there. What is written depends on the source
and the subjects per shard, never on how many processes or machines took part.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from data_prep.workers import SubjectRejected, made
from spinmeround_jax import cameras, cli, files, schema
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.manifest import shard_name, write_manifest
from spinmeround_jax.data.records import ViewRecord
from spinmeround_jax.files import InputError, lock, write_atomically

SETTINGS = "render_settings.json"
REJECTED = "rejected.jsonl"


class Source(Protocol):
    """Where subjects come from. It is sent to worker processes, so it must be picklable."""

    def subjects(self) -> Mapping[str, Sequence[str]]:
        """Split -> names of its subjects, in order; no name twice. The same in every call."""

    def records(self, subject: str) -> list[ViewRecord]:
        """All views of one subject, a pure function of the source and the name.

        Raises:
            SubjectRejected: this one cannot be made.
        """

    def settings(self) -> dict[str, Any]:
        """All that decides what is written, for JSON; a folder holds one such set of settings."""

    def manifest(self) -> dict[str, Any]:
        """image_size, views, seed, source and license of the manifest, and further entries."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard: its file and the names of its subjects, some of which may come to be rejected."""

    split: str
    path: pathlib.Path
    subjects: tuple[str, ...]

    @property
    def rejects_path(self) -> pathlib.Path:
        """Which of its subjects were rejected: JSON lines; not there if none was."""
        return self.path.with_name(self.path.name + ".rejected.jsonl")


def plan(source: Source, out: pathlib.Path, shard_subjects: int) -> list[Job]:
    """All shards of the data set in `out`.

    Raises:
        InputError: a name is given twice, or there is no subject.
    """
    jobs, seen = [], set()
    for split, names in source.subjects().items():
        total = -(-len(names) // shard_subjects)
        for number in range(total):
            chosen = tuple(names[number * shard_subjects : (number + 1) * shard_subjects])
            jobs.append(Job(split, out / shard_name(split, number, total), chosen))
        for name in names:
            if name in seen:
                raise InputError(f"two subjects are named {name!r}; rename one of them")
            seen.add(name)
    if not jobs:
        raise InputError("there is no subject to make")
    return jobs


def rejected(job: Job) -> dict[str, str]:
    """Name -> reason of the subjects of this shard that could not be made.

    Raises:
        InputError: the file is damaged.
    """
    if not job.rejects_path.exists():
        return {}
    try:
        content = files.read_bytes(job.rejects_path, schema.MAX_BYTES)
        lines = [schema.parse(line, _REJECT, "a line") for line in content.splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{job.rejects_path}: damaged ({error}); delete it, and the same command makes "
            f"{job.path.name} again"
        ) from error
    return {line["subject"]: line["reason"] for line in lines}


_REJECT = schema.record({"subject": schema.text(), "reason": schema.text(longest=1 << 20)})


def is_done(job: Job) -> bool:
    """Whether every subject of this shard is in it, or among its rejected ones. Reads no records."""
    out = rejected(job)
    wanted = [name for name in job.subjects if name not in out]
    if not wanted:
        return True
    return shards.is_complete(job.path) and shards.read_index(job.path).subjects.tolist() == wanted


def held_out(people: Collection[str], count: int, folder: pathlib.Path) -> set[str]:
    """`count` of the people in `folder` to keep from training.

    By the hash of the name, so that neighbours in the alphabet (a studio's day) are not together.

    Raises:
        InputError: nobody would be left.
    """
    if count >= len(people):
        raise InputError(
            f"--held-out {count}: {folder} has {len(people)} people; keep one for training"
        )
    order = sorted(people, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(order[:count])


# --------------------------------------------------------------------------------------------------
# Writing


def view_records(
    subject: str,
    views: Iterable[tuple[np.ndarray, np.ndarray]],
    angles: np.ndarray,
    id_embedding: np.ndarray,
    source: str,
    license: str,
) -> list[ViewRecord]:
    """The records of a subject.

    Args:
        views: of each, rgba (s, s, 4) uint8 and normals (s, s, 3) times coverage, in the world.
        angles: (n, 2) yaws and pitches.
    """
    found = []
    for view, ((rgba, normals), (yaw, pitch)) in enumerate(zip(views, angles, strict=True)):
        pose = cameras.orbit(yaw, pitch)
        found.append(
            ViewRecord(
                subject=subject,
                view=view,
                **records.encode_view(rgba, normals, pose),
                world_to_camera=pose,
                yaw=float(yaw),
                pitch=float(pitch),
                id_embedding=id_embedding,
                source=source,
                license=license,
            )
        )
    return found


def write_shard(
    job: Job, results: Iterator[list[ViewRecord] | SubjectRejected], bar: tqdm | None = None
) -> None:
    """Writes one shard from the next results; it appears under its name only when complete.

    The list of rejected subjects comes first, so that a shard that is there has its list.

    Raises:
        BlockingIOError: another process writes it.
    """
    reasons: dict[str, str] = {}
    writer = None
    with lock(job.path.with_suffix("")), contextlib.ExitStack() as stack:
        for name in job.subjects:
            result = next(results)
            if isinstance(result, SubjectRejected):
                reasons[name] = str(result)
            else:
                if writer is None:
                    writer = stack.enter_context(shards.ShardWriter(job.path))
                writer.write_subject(result)
            if bar is not None:
                bar.update()
        _write_rejects(job, reasons)
    if writer is None:  # an earlier one, with subjects that are rejected now
        job.path.unlink(missing_ok=True)
        shards.index_path(job.path).unlink(missing_ok=True)


def _write_rejects(job: Job, reasons: Mapping[str, str]) -> None:
    if not reasons:
        job.rejects_path.unlink(missing_ok=True)
        return
    write_atomically(job.rejects_path, _lines(_reject(job, *item) for item in reasons.items()))


def _reject(job: Job, name: str, reason: str) -> dict[str, str]:
    return {"subject": name, "split": job.split, "reason": reason}


def _lines(entries: Iterator[dict[str, str]]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def check_settings(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Refuse to mix results of different settings in one folder; write `path` where it is not there.

    Raises:
        InputError: the folder was begun with other settings, or `path` cannot be read.
    """
    if not path.exists():
        write_atomically(path, json.dumps(settings, indent=2).encode())
        return
    try:
        found = schema.read(path, schema.record({}))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{error}; damaged: restore it, or choose another --out. Delete it only if everything beside it "
            "was made with the settings given now."
        ) from error
    if changes := schema.differences(found, settings):
        raise InputError(
            f"{path.parent} was begun with other settings (there -> here: {'; '.join(changes)}). Give the "
            "same settings to continue it, or another --out."
        )


def finish(source: Source, out: pathlib.Path, jobs: Sequence[Job]) -> dict[str, str]:
    """Writes the manifest and the list of all rejected subjects, which it returns by name.

    All shards must be there.

    Raises:
        InputError: every subject was rejected.
    """
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in source.subjects()}
    reasons, entries = {}, []
    for job in jobs:
        out_of_shard = rejected(job)
        kept = [name for name in job.subjects if name not in out_of_shard]
        entries += [_reject(job, *item) for item in out_of_shard.items()]
        reasons |= out_of_shard
        if kept:
            splits[job.split].append({"file": job.path.name, "subjects": len(kept)})
    if entries:
        write_atomically(out / REJECTED, _lines(iter(entries)))
    else:
        (out / REJECTED).unlink(missing_ok=True)
    if not any(splits.values()):
        raise InputError(f"every subject was rejected, see {out / REJECTED}; nothing to train on")
    count = {"rejected": len(entries)} if entries else {}
    write_manifest(out, {**source.manifest(), **count, "splits": splits})
    return reasons


def write_dataset(
    source: Source,
    out: pathlib.Path,
    shard_subjects: int,
    workers: int = 1,
    share: tuple[int, int] = (0, 1),
    retry_rejected: bool = False,
) -> bool:
    """Writes this machine's share of the data set, and the manifest if it is the last to finish.

    Args:
        share: (i, n): the shards whose number in the plan is i modulo n.
        retry_rejected: make the shards again from which subjects were rejected.

    Returns:
        Whether the whole data set is there.

    Raises:
        InputError: the folder was begun with other settings, or every subject was rejected.
        BrokenProcessPool, OSError: finished shards are kept; the same command resumes.
    """
    jobs = plan(source, out, shard_subjects)
    out.mkdir(parents=True, exist_ok=True)
    check_settings(out / SETTINGS, {**source.settings(), "shard_subjects": shard_subjects})
    mine = jobs[share[0] :: share[1]]
    todo = [j for j in mine if not is_done(j) or (retry_rejected and rejected(j))]
    _write(source, mine, todo, workers)
    missing = [job for job in jobs if not is_done(job)]
    if missing:
        print(
            f"{len(jobs) - len(missing)} of {len(jobs)} shards are there. The manifest is "
            f"written by the machine that finds all of them in {out}; if they are collected "
            "from several disks, give this command once more on all of them, without --shard."
        )
        return False
    reasons = finish(source, out, jobs)
    total = sum(len(job.subjects) for job in jobs)
    print(f"{total - len(reasons)} subjects in {len(jobs)} shards: {out}")
    if reasons:
        first = next(iter(reasons.items()))
        print(f"{len(reasons)} of {total} were rejected, see {out / REJECTED}; the first: {first}")
    return True


def _write(source: Source, mine: Sequence[Job], todo: Sequence[Job], workers: int) -> None:
    total, left = (sum(len(job.subjects) for job in some) for some in (mine, todo))
    names = [name for job in todo for name in job.subjects]
    results = made(source.records, names, workers)
    with cli.progress(total=total, initial=total - left, unit="subject") as bar:
        with contextlib.closing(results):
            for job in todo:
                write_shard(job, results, bar)


# --------------------------------------------------------------------------------------------------
# Command line


def add_arguments(
    parser: argparse.ArgumentParser, shard_subjects: int = 10, workers: int | None = None
) -> None:
    """The options of `run`, the same for all sources."""
    parser.add_argument(
        "--out", type=cli.path, required=True, help="folder to write, or a bucket's gs://..."
    )
    parser.add_argument(
        "--workers", type=cli.integer(1), default=workers or os.cpu_count(),
        help=f"processes ({workers or 'all cores'})",
    )  # fmt: skip
    parser.add_argument(
        "--shard-subjects", type=cli.integer(1), default=shard_subjects,
        help=f"subjects per shard; a kill loses the one that was being written ({shard_subjects})",
    )  # fmt: skip
    parser.add_argument(
        "--shard", type=cli.part, default=(0, 1), metavar="I/N",
        help="make the I-th of N shares of the data set, I from 0, on one of N machines (0/1, all)",
    )  # fmt: skip
    parser.add_argument(
        "--retry-rejected", action="store_true",
        help="make the shards again from which subjects were rejected",
    )  # fmt: skip


def run(source: Source, args: argparse.Namespace) -> bool:
    """`write_dataset` with the options of `add_arguments`."""
    return write_dataset(
        source, args.out, args.shard_subjects, args.workers, args.shard, args.retry_rejected
    )
