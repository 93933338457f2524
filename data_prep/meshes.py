"""Training data from textured head meshes, such as scans: `python -m data_prep.meshes --help`.

scans/anna.obj (with its .mtl and texture)      a person with one scan
scans/anna.landmarks.json                       optional: 5 or 68 points on it
scans/anna.npy                                  optional: her ArcFace vector
scans/bert/neutral.glb, scans/bert/smile.glb    several scans of one person
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import dataclasses
import hashlib
import os
import pathlib
from typing import Any

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402

from data_prep import factory, identity  # noqa: E402
from data_prep.rendering import viewpoints  # noqa: E402
from data_prep.rendering.render import on_white  # noqa: E402
from data_prep.scans import alignment, textured  # noqa: E402
from data_prep.scans.parts import Scan  # noqa: E402
from data_prep.workers import SubjectRejected  # noqa: E402
from spinmeround_jax import cameras, cli  # noqa: E402
from spinmeround_jax.data import records  # noqa: E402
from spinmeround_jax.files import InputError  # noqa: E402
from spinmeround_jax.photo import portraits  # noqa: E402
from spinmeround_jax.photo.assets import AssetError  # noqa: E402
from spinmeround_jax.photo.prepare import Models  # noqa: E402

LANDMARKS = ".landmarks.json"

EXAMPLES = """examples:
  # a folder of scans; the face detector finds where the faces are (needs '.[photo]' and its models)
  python -m data_prep.meshes --input scans/ --out data/scans512 --license "CC-BY-4.0, Example Lab"

  # scans whose up is z and that look along -y, five people kept for evaluation
  python -m data_prep.meshes --input scans/ --out data/scans512 --license ... --up z --front=-y \\
      --held-out 5

The five landmarks: eye on the image's left, eye on its right, tip of the nose, corner of the mouth on
the image's left, on its right; in the mesh's coordinates, or as numbers of vertices. With landmarks
and an ArcFace vector (.npy) beside every mesh no model is needed. What cannot be used is listed in
rejected.jsonl; fix it and give --retry-rejected.
"""


def find(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Person -> meshes below `folder`, both in order of name. A subfolder is one person.

    Raises:
        InputError: there are none.
    """
    people: dict[str, list[pathlib.Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in textured.SUFFIXES):
        inside = path.relative_to(folder)
        person = inside.parts[0] if len(inside.parts) > 1 else inside.stem
        people.setdefault(person, []).append(path)
    if not people:
        raise InputError(
            f"{folder}: no meshes in it ({', '.join(textured.SUFFIXES)}); check the path"
        )
    return people


@dataclasses.dataclass(frozen=True)
class Meshes:
    """A factory.Source. paths: of the meshes below `folder` by subject, per split."""

    folder: pathlib.Path
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    size: int
    views: int
    samples: int
    up: str
    front: str
    license: str
    models: pathlib.Path | None

    def subjects(self) -> dict[str, tuple[str, ...]]:
        return {"train": self.train, "held_out": self.held_out}

    def records(self, subject: str) -> list[records.ViewRecord]:
        return view_records(self, identity.models(self.models), self.folder / subject)

    def settings(self) -> dict[str, Any]:
        names = "\n".join((*self.train, "", *self.held_out)).encode()
        return {
            "source": "data_prep.meshes",
            "meshes": len(self.train) + len(self.held_out),
            "names_sha256": hashlib.sha256(names).hexdigest(),
            "size": self.size,
            "views": self.views,
            "samples": self.samples,
            "up": self.up,
            "front": self.front,
            "license": self.license,
        }

    def manifest(self) -> dict[str, Any]:
        return {
            "image_size": self.size,
            "views": self.views,
            "seed": 0,
            "source": f"data_prep.meshes: textured meshes of {self.folder.name}",
            "license": self.license,
        }


def place(
    path: pathlib.Path, scan: Scan, models: Models, up: str, front: str
) -> tuple[float, np.ndarray, np.ndarray]:
    """(scale, rotation, offset) that takes the mesh to the canonical frame.

    Raises:
        InputError: landmarks that do not fit, or no face is found.
    """
    beside = path.with_name(path.stem + LANDMARKS)
    if beside.exists():
        return alignment.from_landmarks(alignment.read_landmarks(beside, scan))
    return alignment.find(scan.parts, models, up, front)


def view_records(source: Meshes, models: Models, path: pathlib.Path) -> list[records.ViewRecord]:
    """All views of one mesh.

    Raises:
        SubjectRejected: unreadable, cannot be aligned, or no face can be recognised.
        AssetError: a model is needed that is not there.
    """
    name = path.relative_to(source.folder).as_posix()
    try:
        scan = textured.read(path)
        where = place(path, scan, models, source.up, source.front)
        parts = [part.moved(*where) for part in scan.parts]
        scene = textured.scene(parts)
        angles = viewpoints.viewpoints(source.views)
        views = [
            textured.draw(scene, parts, cameras.orbit(*angle), source.size, source.samples)
            for angle in angles
        ]
        if path.with_suffix(".npy").exists():
            embedding = portraits.read_identity(path.with_suffix(".npy"))
        else:
            front = [on_white(views[number].rgba) for number in identity.frontal(angles)]
            embedding = identity.embed(models, front)
    except AssetError:
        raise
    except InputError as error:
        raise SubjectRejected(str(error)) from error
    return factory.view_records(
        name,
        ((view.rgba, view.soft_normals) for view in views),
        angles,
        embedding,
        f"data_prep.meshes {path.name}",
        source.license,
    )


def build(args: argparse.Namespace) -> Meshes:
    """The source that the options describe.

    Raises:
        InputError: no meshes, or fewer people than are to be held out.
        AssetError: a mesh needs a model that is not there.
    """
    people = find(args.input)
    chosen = factory.held_out(people, args.held_out, args.input)
    split: dict[bool, list[str]] = {False: [], True: []}
    paths = []
    for person, scans in people.items():
        split[person in chosen] += [path.relative_to(args.input).as_posix() for path in scans]
        paths += scans
    models = identity.models(args.models)
    if not all(path.with_name(path.stem + LANDMARKS).exists() for path in paths):
        identity.check_detector(models)
    if not all(path.with_suffix(".npy").exists() for path in paths):
        identity.check(models)
    return Meshes(
        args.input.resolve(), tuple(split[False]), tuple(split[True]), args.size, args.views,
        args.samples, args.up, args.front, args.license, args.models,
    )  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("data_prep.meshes", __doc__, EXAMPLES)
    parser.add_argument("--input", type=pathlib.Path, required=True, help="folder of meshes")
    parser.add_argument("--license", required=True, help="of the scans, written into the data")
    factory.add_arguments(parser)
    parser.add_argument(
        "--held-out", type=cli.integer(), default=0, help="people not trained on (0)"
    )
    parser.add_argument("--size", type=cli.integer(1), default=512, help="pixels, square (512)")
    parser.add_argument("--views", type=cli.integer(1), default=viewpoints.COUNT, help="(125)")
    parser.add_argument("--samples", type=cli.integer(1), default=3, help="rays per pixel side (3)")
    for name, default in (("up", "y"), ("front", "z")):
        parser.add_argument(
            f"--{name}", choices=list(alignment.AXES), default=default,
            help=f"axis of the meshes; used where there are no landmarks ({default})",
        )  # fmt: skip
    parser.add_argument("--models", type=pathlib.Path, help="folder of photo.fetch's models")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    factory.run(build(args), args)


def main(argv: list[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


if __name__ == "__main__":
    cli.end(main())
