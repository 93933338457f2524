"""Checks every record of a data set: `python -m data_prep.validate --help`."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep import validation_page
from spinmeround_jax import cameras, records, shards
from spinmeround_jax.files import is_local, path_argument, write_atomically
from spinmeround_jax.manifest import read_manifest
from spinmeround_jax.records import RecordError, ViewRecord

EXAMPLES = """examples:
  python -m data_prep.validate data/heads64
  python -m data_prep.validate gs://bucket/heads512 --out validation --workers 16

Writes validation.json (statistics, every fault) and validation.html (the same, with pictures). Exit
status: 0 all is well, 1 faults were found, 2 there is no data set.
"""

MAX_LENGTH_ERROR = 0.03  # of a normal: 8 bits a component round it by up to 0.7 %
MAX_SHARE = 1e-3  # of a picture's pixels that may have a wrong length, for odd ones in thin hair
MIN_FACING = 0.3  # mean cosine between normals and the line to the camera; a ball has 2/3
SAME_IDENTITY = 0.9999  # cosine
SHOWN_ANGLES = ((0, 0), (45, 0), (90, 0), (180, 0), (-90, 0), (30, 30))  # on the page


@dataclasses.dataclass(frozen=True)
class Task:
    """One subject of a shard, or with row -1 the shard as a file."""

    split: str
    path: pathlib.Path
    row: int
    size: int
    sha256: str = ""
    pictures: bool = False


@dataclasses.dataclass
class Findings:
    """What was found in one task."""

    task: Task
    subject: str = ""
    faults: list[str] = dataclasses.field(default_factory=list)
    identity: np.ndarray | None = None
    bytes: int = 0
    records: int = 0
    decode_seconds: float = 0.0
    angles: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    coverage: list[float] = dataclasses.field(default_factory=list)  # share of the picture
    formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    pictures: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)


# --------------------------------------------------------------------------------------------------
# Checks


def check(task: Task) -> Findings:
    """All checks of one task, in a worker process. What is wrong is told, never raised."""
    findings = Findings(task)
    try:
        if task.row < 0:
            if task.sha256 and (found := shards.sha256_of(task.path)) != task.sha256:
                findings.faults.append(
                    f"{task.path}: sha256 is {found}, manifest.json says {task.sha256}; "
                    "restore the shard, or write it and the manifest again"
                )
        else:
            _check_subject(task, findings)
    except RecordError as error:
        findings.faults.append(str(error))
    return findings


@functools.lru_cache(maxsize=4)
def _index(path: pathlib.Path) -> shards.ShardIndex:
    return shards.read_index(path)


def _check_subject(task: Task, findings: Findings) -> None:
    index = _index(task.path)
    findings.subject = str(index.subjects[task.row])
    shown = _shown_views(index.world_to_camera[task.row]) if task.pictures else []
    for view in range(index.offsets.shape[1]):
        where = index.where(task.row, view)
        try:
            (record,) = index.read_views(task.row, [view])
            start = time.thread_time()
            rgba, normals = records.decode_view(record, task.size, where)
            findings.decode_seconds += time.thread_time() - start
        except RecordError as error:
            findings.faults.append(str(error))
            continue
        findings.records += 1
        findings.bytes += int(index.lengths[task.row, view])
        findings.angles.append((record.yaw, record.pitch))
        findings.coverage.append(float((rgba[..., 3] > 127).mean()))
        for name, encoded in (("image", record.image), ("normals", record.normals)):
            findings.formats[f"{name}: {format_of(encoded)}"] += 1
        if findings.identity is None:
            findings.identity = record.id_embedding
        faults = [
            *camera_faults(record),
            *picture_faults(record, rgba, normals),
            *identity_faults(record.id_embedding, findings.identity),
        ]
        findings.faults += [f"{where} ({record.subject} view {view}): {fault}" for fault in faults]
        if view in shown:
            findings.pictures.append(validation_page.thumbnail(rgba, normals))


def _shown_views(world_to_camera: np.ndarray) -> list[int]:
    """The views nearest to SHOWN_ANGLES."""
    towards = world_to_camera[:, 2, :3]  # from the head to the camera
    wanted = np.stack([cameras.orbit(*angles)[2, :3] for angles in SHOWN_ANGLES])
    return np.unique((towards @ wanted.T).argmax(0)).tolist()


def format_of(encoded: bytes) -> str:
    """E.g. 'PNG', 'WebP, lossless'."""
    if encoded[:4] != b"RIFF":
        return "PNG"
    return "WebP, lossless" if b"VP8L" in encoded[12:64] else "WebP, lossy"


def camera_faults(record: ViewRecord) -> Iterator[str]:
    """Orthonormal, at the schema's distance, where yaw and pitch say."""
    pose = np.asarray(record.world_to_camera, np.float64)
    rotation = pose[:3, :3]
    off = abs(rotation @ rotation.T - np.eye(3)).max()
    if off > 1e-4 or np.linalg.det(rotation) < 0 or (pose[3] != (0, 0, 0, 1)).any():
        yield f"world_to_camera is no rigid pose (rows differ from orthonormal by {off:.2g})"
        return
    off = abs(pose - cameras.orbit(record.yaw, record.pitch)).max()
    if off > 2e-3:
        yaw, pitch = cameras.yaw_pitch(pose)
        yield (
            f"world_to_camera stands at yaw {yaw:.2f}, pitch {pitch:.2f} or is rolled or displaced, "
            f"the record says yaw {record.yaw:.2f}, pitch {record.pitch:.2f} (off by {off:.2g})"
        )


def picture_faults(record: ViewRecord, rgba: np.ndarray, normals: np.ndarray) -> Iterator[str]:
    """Something is shown; normals are unit length inside, 0 outside, and face the camera."""
    alpha = rgba[..., 3]
    if alpha.max() < 128:
        yield "the picture is empty"
        return
    length = np.sqrt(np.square(normals).sum(-1))
    inside = alpha == 255
    wrong = inside & (abs(length - 1.0) > MAX_LENGTH_ERROR)
    if wrong.sum() > MAX_SHARE * max(int(inside.sum()), 1):
        y, x = np.argwhere(wrong)[0]
        yield (
            f"{wrong.sum()} of {inside.sum()} normals inside the mask are not of unit length, "
            f"the first at row {y}, column {x}: {length[y, x]:.3f}"
        )
    outside = (alpha == 0) & (length > MAX_LENGTH_ERROR)
    if outside.any():
        y, x = np.argwhere(outside)[0]
        yield (
            f"{outside.sum()} normals outside the mask are not grey, "
            f"the first at row {y}, column {x}: {normals[y, x].round(3).tolist()}"
        )
    facing = normals[inside] @ np.asarray(record.world_to_camera)[2, :3]
    if len(facing) and facing.mean() < MIN_FACING:
        yield (
            f"normals do not face the camera (mean cosine {facing.mean():.2f}); "
            "are they in the head's frame?"
        )


def identity_faults(identity: np.ndarray, first: np.ndarray) -> Iterator[str]:
    if abs(np.linalg.norm(identity) - 1.0) > 1e-3:
        yield f"id_embedding has length {np.linalg.norm(identity):.4f}"
    if not np.array_equal(identity, first):
        yield "id_embedding differs from that of the subject's first view"


def subject_faults(findings: Sequence[Findings]) -> Iterator[str]:
    """No name twice, no person in two splits."""
    seen: dict[str, Findings] = {}
    for found in findings:
        if found.subject in seen:
            other = seen[found.subject].task
            yield (
                f"{found.task.path}: subject {found.subject!r} of split {found.task.split} is also "
                f"in {other.path.name}, split {other.split}"
            )
        seen.setdefault(found.subject, found)
    splits = collections.defaultdict(list)
    for found in findings:
        if found.identity is not None:
            splits[found.task.split].append(found)
    names = list(splits)
    for i, name in enumerate(names):
        rows = np.stack([found.identity for found in splits[name]])
        for other in names[i + 1 :]:
            columns = np.stack([found.identity for found in splits[other]])
            for a, b in np.argwhere(rows @ columns.T > SAME_IDENTITY):
                one, two = splits[name][a], splits[other][b]
                yield (
                    f"{one.task.path}: {one.subject!r} of split {name} has the identity of "
                    f"{two.subject!r} of split {other} ({two.task.path.name}); "
                    "a person must be in one split"
                )


# --------------------------------------------------------------------------------------------------
# A whole data set


def tasks(
    directory: pathlib.Path, manifest: dict[str, Any], pictures: int
) -> tuple[list[Task], list[str]]:
    """What to check, and the faults of shards that cannot be opened at all."""
    found, faults = [], []
    size = manifest["image_size"]
    for split, entries in manifest["splits"].items():
        begun = 0
        for entry in entries:
            path = directory / entry["file"]
            found.append(Task(split, path, -1, size, entry.get("sha256", "")))
            try:
                shape = shards.read_index(path).offsets.shape
            except RecordError as error:
                faults.append(str(error))
                continue
            if shape != (entry["subjects"], manifest["views"]):
                faults.append(
                    f"{path}: holds (subjects, views) {shape}, manifest.json says "
                    f"{(entry['subjects'], manifest['views'])}; write shard and manifest again"
                )
            for row in range(shape[0]):
                found.append(Task(split, path, row, size, pictures=begun < pictures))
                begun += 1
    return found, faults


def run(todo: Sequence[Task], workers: int) -> Iterator[Findings]:
    """Findings in order, by several processes where that helps."""
    if workers == 1 or len(todo) < 4:
        yield from map(check, todo)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(todo)), context) as pool:
        try:
            yield from pool.map(check, todo)
        finally:
            pool.shutdown(cancel_futures=True)


def statistics(findings: Sequence[Findings]) -> dict[str, Any]:
    """Per split: counts, bytes, formats, coverage, cameras, decoding time."""
    told = {}
    for split in dict.fromkeys(found.task.split for found in findings):
        of_split = [found for found in findings if found.task.split == split and found.records]
        if not of_split:
            continue
        sizes = np.array([found.bytes for found in of_split])
        coverage = np.concatenate([found.coverage for found in of_split])
        yaw, pitch = np.concatenate([found.angles for found in of_split]).T
        count = sum(found.records for found in of_split)
        told[split] = {
            "subjects": len(of_split),
            "records": count,
            "bytes": int(sizes.sum()),
            "mebibytes_per_subject": _range(sizes / 2**20, 2),
            "formats": dict(sum((found.formats for found in of_split), collections.Counter())),
            "coverage": _range(coverage, 4),
            "yaw": _range(yaw, 2),
            "pitch": _range(pitch, 2),
            "decode_milliseconds_per_record": round(
                1e3 * sum(found.decode_seconds for found in of_split) / count, 2
            ),
        }
    return told


def _range(values: np.ndarray, digits: int) -> dict[str, float]:
    numbers = {"min": values.min(), "mean": values.mean(), "max": values.max()}
    return {name: round(float(value), digits) for name, value in numbers.items()}


def validate(
    directory: pathlib.Path, out: pathlib.Path, workers: int, pictures: int
) -> dict[str, Any]:
    """Checks the data set in `directory`, writes validation.json and .html to `out`, returns the former.

    Raises:
        RecordError: there is no manifest.
    """
    manifest = read_manifest(directory)
    todo, faults = tasks(directory, manifest, pictures)
    findings = []
    total = sum(1 for task in todo if task.row >= 0)
    with tqdm(total=total, unit="subject", disable=None) as bar:
        for found in run(todo, workers):
            findings.append(found)
            faults += found.faults
            bar.update(found.task.row >= 0)
            bar.set_postfix(faults=len(faults))
    subjects = [found for found in findings if found.task.row >= 0]
    faults += subject_faults(subjects)
    listed = {entry["file"] for entries in manifest["splits"].values() for entry in entries}
    report = {
        "directory": str(directory),
        "manifest": {k: v for k, v in manifest.items() if k != "splits"},
        "statistics": statistics(subjects),
        "shards_without_hash": [
            task.path.name for task in todo if task.row < 0 and not task.sha256
        ],
        "unlisted_shards": sorted(
            path.name
            for path in directory.iterdir()
            if path.name.endswith(".tfrecord")
            and not path.name.startswith(".")
            and path.name not in listed
        ),
        "faults": faults,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "validation.json", (json.dumps(report, indent=2) + "\n").encode())
    page = validation_page.page(report, subjects)
    write_atomically(out / "validation.html", page.encode())
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.validate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=path_argument, help="with manifest.json; or gs://...")
    parser.add_argument("--out", type=pathlib.Path, help="local folder to write (DIR/validation)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all cores)")
    parser.add_argument(
        "--pictures", type=int, default=12, help="subjects of each split shown on the page (12)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1 or args.pictures < 0:
        parser.error("--workers must be at least 1, --pictures at least 0")
    if args.out is None and not is_local(args.directory):
        parser.error("give --out, a local folder, where the data is not on a local disk")
    out = args.out or args.directory / "validation"
    try:
        report = validate(args.directory, out, args.workers, args.pictures)
    except (RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("error: a worker process was killed; try fewer --workers", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    for fault in report["faults"][:20]:
        print(f"fault: {fault}", file=sys.stderr)
    for name, numbers in report["statistics"].items():
        size = numbers["mebibytes_per_subject"]
        print(
            f"{name}: {numbers['subjects']} subjects, {numbers['records']} records, "
            f"{size['min']} to {size['max']} MiB per subject (mean {size['mean']})"
        )
    print(f"{len(report['faults'])} faults; see {out / 'validation.html'}")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
