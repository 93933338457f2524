"""Renders parametric people to TFRecord shards: `python -m data_prep.render_heads --help`.

Every subject is a pure function of --seed and its number, so the result does not depend on the
number of workers, and a run that was killed resumes.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import dataclasses
import os
import pathlib
from typing import Any

# One core per worker: the small matrix products here only get slower with more threads.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402

from data_prep import factory, rendered_identity  # noqa: E402
from data_prep.parametric import assets  # noqa: E402
from data_prep.parametric.people import Person, sample_person  # noqa: E402
from data_prep.parametric.subjects import build_scene  # noqa: E402
from data_prep.rendering import contact_sheet, render, viewpoints  # noqa: E402
from spinmeround_jax import cameras, cli  # noqa: E402
from spinmeround_jax.cli import UsageError  # noqa: E402
from spinmeround_jax.data import records  # noqa: E402
from spinmeround_jax.files import write_atomically  # noqa: E402
from spinmeround_jax.photo.images import encoded  # noqa: E402
from spinmeround_jax.photo.pose import FRAMINGS  # noqa: E402

PEOPLE = 2  # how subjects are drawn and drawn from a number; 1 was before colours were independent
HELD_OUT_OFFSET = 1_000_000  # held-out subjects are numbered from here: never a training subject

EXAMPLES = """examples:
  # a small set to look at, about a minute
  python -m data_prep.render_heads --out /tmp/heads --subjects 4 --held-out 2 --views 16

  # the data of configs/quickstart.py: many people, each from 24 of the 125 viewpoints
  python -m data_prep.render_heads --out data/heads128 --subjects 1600 --held-out 40 --size 128 \\
      --train-views 24

  # for 512-pixel training on a large machine
  python -m data_prep.render_heads --out data/heads512 --subjects 7000 --held-out 200 --size 512

  # the second of four machines that share the work (and --out, or its files are collected later)
  python -m data_prep.render_heads --out data/heads512 --subjects 7000 --held-out 200 --size 512 \\
      --shard 1/4

A run that was stopped continues when the same command is given again.
"""


def subject_name(seed: int, number: int) -> str:
    """E.g. 'parametric-0-000123'."""
    return f"parametric-{seed}-{number:06d}"


def person_seed(seed: int, number: int) -> int:
    """The seed of sample_person for subject `number` of data set `seed`."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


def person_of(seed: int, name: str) -> Person:
    """Who `subject_name` names in data set `seed`."""
    return sample_person(person_seed(seed, int(name.rpartition("-")[2])))


@dataclasses.dataclass(frozen=True)
class ParametricHeads:
    """A factory.Source: `count` training and `held_out` other people of data set `seed`.

    size: pixels. views: of viewpoints.viewpoints. train_views: how many of them a training subject
    has, see viewpoints.drawn; None is all. samples: rays per pixel side. framing: of photo.pose.FRAMINGS.
    """

    count: int
    held_out: int
    size: int
    seed: int
    views: int
    samples: int
    train_views: int | None = None
    framing: str = "close"

    def subjects(self) -> dict[str, list[str]]:
        """Train and held-out subjects have different numbers, hence identities."""
        return {
            split: [subject_name(self.seed, number) for number in range(first, first + count)]
            for split, first, count in (
                ("held_out", HELD_OUT_OFFSET, self.held_out),  # first: who trains needs them early
                ("train", 0, self.count),
            )
        }

    def records(self, subject: str) -> list[records.ViewRecord]:
        person = person_of(self.seed, subject)
        scene, _ = build_scene(person, self.size, self.framing)
        identity = rendered_identity.embed(scene)
        angles = self._viewpoints(subject)
        pictures = (
            render.render_view(scene, cameras.orbit(*angle), self.size, self.samples)
            for angle in angles
        )
        return factory.view_records(
            subject,
            ((picture.rgba, picture.soft_normals) for picture in pictures),
            angles,
            identity,
            f"data_prep.render_heads seed={self.seed} size={self.size}",
            assets.LICENSE,
        )

    def _viewpoints(self, subject: str) -> np.ndarray:
        views = viewpoints.viewpoints(self.views)
        number = int(subject.rpartition("-")[2])
        if number >= HELD_OUT_OFFSET or self.train_views is None:
            return views
        rng = np.random.default_rng([4409, self.seed, number])
        return views[viewpoints.drawn(views, self.train_views, rng)]

    def settings(self) -> dict[str, Any]:
        return {
            "subjects": self.count,
            "held_out": self.held_out,
            "size": self.size,
            "seed": self.seed,
            "views": self.views,
            "train_views": self.train_views or self.views,
            "samples": self.samples,
            "framing": self.framing,
            "people": PEOPLE,
            "identity": rendered_identity.about(),
        }

    def manifest(self) -> dict[str, Any]:
        held_out = {"split_views": {"held_out": self.views}} if self.train_views else {}
        return {
            "image_size": self.size,
            "views": self.train_views or self.views,
            **held_out,
            "framing": self.framing,
            "identity": rendered_identity.about(),
            "seed": self.seed,
            "source": "data_prep.render_heads: parametric people of the MakeHuman base mesh",
            "license": assets.LICENSE,
        }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser(
        "data_prep.render_heads",
        "Render parametric human heads (MakeHuman, CC0) to multi-view TFRecord shards.",
        EXAMPLES,
    )
    factory.add_arguments(parser)
    parser.add_argument(
        "--subjects", type=cli.integer(1), default=600, help="training subjects (600)"
    )
    parser.add_argument(
        "--held-out", type=cli.integer(), default=40, help="subjects never trained on (40)"
    )
    parser.add_argument("--size", type=cli.integer(1), default=64, help="pixels, square (64)")
    parser.add_argument("--seed", type=cli.integer(), default=0, help="which people are drawn (0)")
    parser.add_argument(
        "--views", type=cli.integer(1), default=viewpoints.COUNT, help="views each (125)"
    )
    parser.add_argument(
        "--train-views", type=cli.integer(1), metavar="N",
        help="training subjects are seen from N of the --views, drawn for each of them; anchors and "
        "frontal views are always among them (all)",
    )  # fmt: skip
    parser.add_argument("--samples", type=cli.integer(1), default=4, help="rays per pixel side (4)")
    parser.add_argument(
        "--framing", choices=sorted(FRAMINGS), default="close",
        help="how much of the image the head fills, see docs/photos.md (close)",
    )  # fmt: skip
    parser.add_argument(
        "--preview",
        default="contact_sheet.png",
        help="overview image, written into --out; empty for none",
    )
    args = parser.parse_args(argv)
    if pathlib.Path(args.preview).name == "..":
        raise UsageError(f"--preview {args.preview}: expected the name of a PNG file")
    if args.subjects > HELD_OUT_OFFSET:
        raise UsageError(f"--subjects {args.subjects}: at most {HELD_OUT_OFFSET}")
    if args.train_views is not None:
        try:
            viewpoints.drawn(
                viewpoints.viewpoints(args.views), args.train_views, np.random.default_rng(0)
            )
        except ValueError as error:
            raise UsageError(f"--train-views {args.train_views}: {error}") from error
    return args


def run(args: argparse.Namespace) -> None:
    assets.assets_dir()
    rendered_identity.face_finder()
    source = ParametricHeads(
        args.subjects, args.held_out, args.size, args.seed, args.views, args.samples,
        args.train_views, args.framing,
    )  # fmt: skip
    complete = factory.run(source, args)
    if args.preview and complete:
        names = source.subjects()["train"][: min(6, args.shard_subjects)]
        sheet = contact_sheet.contact_sheet(
            [person_of(args.seed, name) for name in names], max(args.size, 128), args.framing
        )
        write_atomically(args.out / pathlib.Path(args.preview).name, encoded(sheet, "PNG"))


def main(argv: list[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


if __name__ == "__main__":
    cli.end(main())
