"""How well identities tell rendered heads apart: a frontal view against the same and other heads'."""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

from spinmeround_jax import cli
from spinmeround_jax.data.subjects import HeldOut
from spinmeround_jax.photo import face_resnet, mediapipe
from spinmeround_jax.photo.images import to_uint8

YAWS = (15, 30, 45, 60)  # degrees, either side


def vectors_of(subject, finder: mediapipe.FaceFinder) -> list[np.ndarray | None]:
    """Of each view; None where no face is found."""
    found = []
    for image in to_uint8(subject.images):
        faces = finder.find(image)
        found.append(face_resnet.embed(image, faces[0].landmarks) if faces else None)
    return found


def chosen_views(angles: np.ndarray) -> list[int]:
    """The view nearest to each of YAWS on either side, at pitch 0; the most frontal one first."""
    wanted = [(0, 0)] + [(side * yaw, 0) for yaw in YAWS for side in (1, -1)]
    return [int(np.argmin(np.hypot(*(angles - want).T))) for want in wanted]


def run(args: argparse.Namespace) -> None:
    heads, finder = HeldOut(args.data, args.split), mediapipe.FaceFinder()
    vectors = []
    for i in range(min(args.heads, len(heads))):
        views = chosen_views(heads.angles(i))
        vectors.append(vectors_of(heads.load(i, views), finder))
    print(f"{len(vectors)} heads of {args.data}, {args.split}; {face_resnet.NAME}")
    print(
        "| yaw | faces found | AUC | d' | same head | lowest | other heads |\n|---|---|---|---|---|---|---|"
    )
    for column, yaw in enumerate(YAWS):
        same, other, missing = [], [], 0
        for of_one in vectors:
            for vector in of_one[1 + 2 * column : 3 + 2 * column]:
                missing += vector is None
                for another in vectors:
                    if vector is not None and another[0] is not None:
                        (same if another is of_one else other).append(float(vector @ another[0]))
        auc = stats.mannwhitneyu(same, other).statistic / (len(same) * len(other))
        spread = np.sqrt((np.var(same) + np.var(other)) / 2)
        print(
            f"| {yaw} | {2 * len(vectors) - missing} of {2 * len(vectors)} | {auc:.3f} "
            f"| {(np.mean(same) - np.mean(other)) / spread:.1f} | {np.mean(same):.2f} | {np.min(same):.2f} "
            f"| {np.mean(other):.2f} ± {np.std(other):.2f} |"
        )


def main(argv: list[str] | None = None) -> int:
    example = "example: python -m benchmarks.identity --data data/heads128"
    parser = cli.build_parser("benchmarks.identity", __doc__, example)
    parser.add_argument("--data", required=True, help="shards of rendered heads")
    parser.add_argument("--split", default="held_out", help="(held_out)")
    parser.add_argument("--heads", type=cli.integer(2), default=40, help="at most (40)")
    return cli.main(parser.parse_args, run, argv)


if __name__ == "__main__":
    cli.end(main())
