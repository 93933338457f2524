"""Checks every record of a data set: `python -m data_prep.validate --help`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_prep.validation import page
from data_prep.validation.checks import Findings, Task, check, subject_faults
from spinmeround_jax import cli
from spinmeround_jax.cli import UsageError
from spinmeround_jax.data import shards
from spinmeround_jax.data.manifest import read_manifest, views_of
from spinmeround_jax.files import InputError, is_local, write_atomically

EXAMPLES = """examples:
  python -m data_prep.validate data/heads64
  python -m data_prep.validate gs://bucket/heads512 --out validation --workers 16

Writes validation.json (statistics, every fault) and validation.html (the same, with images). Exit
status: 0 all is well, 1 faults were found, 2 there is no data set.
"""


# --------------------------------------------------------------------------------------------------
# Checks


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
            except InputError as error:
                faults.append(str(error))
                continue
            if shape != (entry["subjects"], views_of(manifest, split)):
                faults.append(
                    f"{path}: holds (subjects, views) {shape}, manifest.json says "
                    f"{(entry['subjects'], views_of(manifest, split))}; write shard and manifest again"
                )
            for row in range(shape[0]):
                found.append(Task(split, path, row, size, pictures=begun < pictures))
                begun += 1
    return found, faults


def findings(todo: Sequence[Task], workers: int) -> Iterator[Findings]:
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
    summary = {}
    for split in dict.fromkeys(found.task.split for found in findings):
        of_split = [found for found in findings if found.task.split == split and found.records]
        if not of_split:
            continue
        sizes = np.array([found.bytes for found in of_split])
        coverage = np.concatenate([found.coverage for found in of_split])
        yaw, pitch = np.concatenate([found.angles for found in of_split]).T
        count = sum(found.records for found in of_split)
        summary[split] = {
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
    return summary


def _range(values: np.ndarray, digits: int) -> dict[str, float]:
    numbers = {"min": values.min(), "mean": values.mean(), "max": values.max()}
    return {name: round(float(value), digits) for name, value in numbers.items()}


def validate(
    directory: pathlib.Path, out: pathlib.Path, workers: int, pictures: int
) -> dict[str, Any]:
    """Checks the data set in `directory`, writes validation.json and .html to `out`, returns the former.

    Raises:
        InputError: there is no manifest.
    """
    try:
        manifest = read_manifest(directory)
    except InputError as error:  # exit code 1 means faults in a data set
        raise UsageError(str(error)) from error
    todo, faults = tasks(directory, manifest, pictures)
    checked = []
    total = sum(1 for task in todo if task.row >= 0)
    with cli.progress(total=total, unit="subject") as bar:
        for found in findings(todo, workers):
            checked.append(found)
            faults += found.faults
            bar.update(found.task.row >= 0)
            bar.set_postfix(faults=len(faults))
    subjects = [found for found in checked if found.task.row >= 0]
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
    document = page.page(report, subjects)
    write_atomically(out / "validation.html", document.encode())
    return report


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("data_prep.validate", __doc__, EXAMPLES)
    parser.add_argument("directory", type=cli.path, help="with manifest.json; or gs://...")
    parser.add_argument("--out", type=pathlib.Path, help="local folder to write (DIR/validation)")
    parser.add_argument(
        "--workers", type=cli.integer(1), default=os.cpu_count(), help="processes (all cores)"
    )
    parser.add_argument(
        "--pictures",
        type=cli.integer(),
        default=12,
        help="subjects of each split shown on the page (12)",
    )
    args = parser.parse_args(argv)
    if args.out is None and not is_local(args.directory):
        raise UsageError("give --out, a local folder, where the data is not on a local disk")
    return args


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    out = args.out or args.directory / "validation"
    report = validate(args.directory, out, args.workers, args.pictures)
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


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv, "nothing was written")


if __name__ == "__main__":
    cli.end(main())
