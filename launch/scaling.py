"""Ahead-of-time reports side by side: memory, collectives and what bounds, over numbers of chips.

Compile first, each into a folder of its own, then put the reports together:

  python -m launch.compile --config=configs/tpu_v4.py --topology=v4:2x2x2 --out=out/aot/8
  python -m launch.compile --config=configs/tpu_v4.py --topology=v4:4x4x4 --out=out/aot/64
  python -m launch.scaling out/aot/*/report.json --out=out/scaling.svg
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from launch import plots
from launch.chips import GIB
from launch.compile import times

OVER = {
    "devices": "chips",
    "chips-per-example": "chips per example of all views",
}


def position(report: dict[str, Any], over: str) -> float:
    """Of a report on the horizontal axis."""
    return report["devices"] / (report["batch_size"] if over == "chips-per-example" else 1)


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown, one row per report."""
    kinds = sorted({kind for report in reports for kind in report["collectives"]})
    head = ["chips", "chip", "slices", "fsdp x views", "remat", "examples per chip"]
    head += ["memory (GiB), of which temporary", "HBM traffic per example (GB)"]
    head += [f"{kind} (count, GB)" for kind in kinds]
    head += ["arithmetic, memory, interconnect at peak (ms)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for report in reports:
        share = report["batch_size"] / report["devices"]
        mesh = report["mesh"]
        row = [
            str(report["devices"]), report["chip"], str(report["slices"]),
            f"{mesh['fsdp']} x {mesh['views']}", report["remat"], f"{share:g}",
            f"{report['peak'] / GIB:.1f}, {report['temporary'] / GIB:.1f}",
            f"{report['bytes'] / share / 1e9:.1f}",
        ]  # fmt: skip
        for kind in kinds:
            found = report["collectives"].get(kind)
            row.append(f"{found['count']}, {found['bytes'] / 1e9:.3f}" if found else "-")
        row.append(", ".join(f"{1000 * t:.1f}" for t in times(report, "train").values()))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def binds_from(reports: Sequence[dict[str, Any]], over: str) -> float | None:
    """Where on the horizontal axis the interconnect begins to take longest, between two reports.

    Times are taken as powers of what is on the axis. The first position if it does from the start, None
    if it never does.
    """
    excess = []
    for report in reports:
        bound = times(report, "train")
        rest = max(bound["arithmetic"], bound["memory"])
        excess.append((position(report, over), math.log(bound["interconnect"] / rest)))
    excess.sort()
    if excess[0][1] > 0:
        return excess[0][0]
    for (x, before), (x_next, after) in itertools.pairwise(excess):
        if after > 0:
            return math.exp(math.log(x) + before / (before - after) * math.log(x_next / x))
    return None


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "reports", type=pathlib.Path, nargs="+", help="report.json of launch.compile"
    )
    parser.add_argument("--over", choices=OVER, default="devices", help="horizontal axis (devices)")
    parser.add_argument("--out", type=pathlib.Path, help="plot to write, SVG")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    reports = []
    for path in arguments.reports:
        try:
            found = json.loads(path.read_text())
            if [report["program"] for report in found] != ["train"] * len(found):
                raise ValueError("it is not of training steps")
            reports += found
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"error: {path}: no report to compare: {error}", file=sys.stderr)
            return 1
    reports.sort(key=lambda report: (position(report, arguments.over), report["devices"]))
    print(table(reports))
    where = binds_from(reports, arguments.over)
    print(
        f"\nThe interconnect binds from {where:.3g} {OVER[arguments.over]} on."
        if where
        else "\nThe interconnect binds nowhere here."
    )
    if arguments.out:
        lines: dict[str, list[tuple[float, float]]] = {}
        for report in reports:
            for name, seconds in times(report, "train").items():
                lines.setdefault(name, []).append(
                    (position(report, arguments.over), 1000 * seconds)
                )
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        titles = OVER[arguments.over], "ms of a step at each resource's peak"
        plots.curves(lines, titles, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
