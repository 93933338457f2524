"""Export portraits of a rendered data set for `sample`: frontal view, identity, known views.

NAME.png        the frontal view, transparent background
NAME.json       {"id_embedding": [...], "truth": [{"yaw": ..., "pitch": ...}, ...], provenance}
NAME.truth.png  the true views in a row, their normals in a second row
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep.rendering import viewpoints
from spinmeround_jax import cli
from spinmeround_jax.cli import UsageError
from spinmeround_jax.data.manifest import provenance_of, read_manifest
from spinmeround_jax.data.subjects import HeldOut
from spinmeround_jax.files import InputError, name_inside, write_atomically
from spinmeround_jax.photo.images import encoded, to_uint8

EXAMPLES = """example, which made demo/portraits:
  python -m data_prep.export_portraits --data data/heads64 --subjects 0 8 28 36 --out demo/portraits
"""


def export(
    portraits: HeldOut, number: int, out: pathlib.Path, recogniser: Mapping[str, Any] | None
) -> pathlib.Path:
    """Writes the three files of one subject; returns the portrait's path.

    Args:
        recogniser: name and sha256 of what made the set's identities, if it is known.
    """
    subject = portraits.load(number, viewpoints.ANCHOR_INDICES)
    index, row = portraits.source[number]
    (frontal,) = index.read_views(row, [viewpoints.ANCHOR_INDICES[0]])
    angles = np.stack([subject.yaw, subject.pitch], axis=-1)
    if abs(angles[0]).max() > 0.01:
        raise InputError(
            f"{index.path}: view 0 of {subject.subject} is not frontal; render with --views 8+"
        )
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name_inside(subject.subject)}.png"
    if path.exists() and path.read_bytes() != frontal.image:
        raise InputError(f"{path}: another image is in the way; choose another --out")
    write_atomically(path, frontal.image)
    rows = [np.concatenate(list(views), axis=1) for views in (subject.images, subject.normals)]
    sheet = encoded(to_uint8(np.concatenate(rows)), "PNG", optimize=True)
    write_atomically(path.with_suffix(".truth.png"), sheet)
    description = {
        "source": frontal.source,
        "license": frontal.license,
        "id_embedding": [round(float(x), 6) for x in frontal.id_embedding],
        **({"recognition": recogniser} if recogniser else {}),
        "truth": [{"yaw": float(yaw), "pitch": float(pitch)} for yaw, pitch in angles],
    }
    write_atomically(path.with_suffix(".json"), json.dumps(description).encode())
    return path


def run(args: argparse.Namespace) -> None:
    portraits = HeldOut(args.data, args.split)
    recogniser = provenance_of(read_manifest(args.data))["recogniser"]
    for number in args.subjects:
        if number >= len(portraits):
            raise UsageError(
                f"--subjects {number}: {args.data} has {len(portraits)} {args.split} subjects"
            )
        print(export(portraits, number, args.out, recogniser))


def main(argv: list[str] | None = None) -> int:
    parser = cli.build_parser("data_prep.export_portraits", __doc__, EXAMPLES)
    parser.add_argument("--data", type=cli.path, required=True, help="shards' folder, or gs://...")
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--subjects", type=cli.integer(), nargs="+", required=True, help="from 0")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="local folder to write")
    return cli.main(parser.parse_args, run, argv)


if __name__ == "__main__":
    cli.end(main())
