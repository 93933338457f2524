"""Takes portraits out of a rendered set, as `sample` reads them: frontal view, identity, known views.

NAME.png        the frontal view, transparent background
NAME.json       {"id_embedding": [...], "truth": [{"yaw": ..., "pitch": ...}, ...], provenance}
NAME.truth.png  the true views in a row, their normals in a second row
"""

import argparse
import json
import pathlib
import sys

import numpy as np
from PIL import Image

from data_prep.rendering import viewpoints
from spinmeround_jax.data.subjects import HeldOut
from spinmeround_jax.files import InputError, path_argument

EXAMPLES = """example, which made demo/portraits:
  python -m data_prep.export_portraits --data data/heads64 --subjects 0 8 28 36 --out demo/portraits
"""


def export(portraits: HeldOut, number: int, out: pathlib.Path) -> pathlib.Path:
    """Writes the three files of one subject; returns the portrait's path."""
    subject = portraits.load(number, viewpoints.ANCHOR_INDICES)
    index, row = portraits.source[number]
    (frontal,) = index.read_views(row, [viewpoints.ANCHOR_INDICES[0]])
    angles = np.stack([subject.yaw, subject.pitch], axis=-1)
    if abs(angles[0]).max() > 0.01:
        sys.exit(
            f"{index.path}: view 0 of {subject.subject} is not frontal; render with --views 8+"
        )
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{subject.subject}.png"
    path.write_bytes(frontal.image)
    rows = [np.concatenate(list(views), axis=1) for views in (subject.images, subject.normals)]
    pixels = np.clip(np.round(127.5 * (np.concatenate(rows) + 1.0)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".truth.png"), optimize=True)
    description = {
        "source": frontal.source,
        "license": frontal.license,
        "id_embedding": [round(float(x), 6) for x in frontal.id_embedding],
        "truth": [{"yaw": float(yaw), "pitch": float(pitch)} for yaw, pitch in angles],
    }
    path.with_suffix(".json").write_text(json.dumps(description, indent=None))
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.export_portraits",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=path_argument, required=True, help="shards' folder, or gs://..."
    )
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--subjects", type=int, nargs="+", required=True, help="from 0")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="local folder to write")
    args = parser.parse_args(argv)
    try:
        portraits = HeldOut(args.data, args.split)
        for number in args.subjects:
            if not 0 <= number < len(portraits):
                sys.exit(f"{args.data} has {len(portraits)} {args.split} subjects, no {number}")
            print(export(portraits, number, args.out))
    except (InputError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
