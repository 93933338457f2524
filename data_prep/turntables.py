"""Training data from videos or photos of people: `python -m data_prep.turntables --help`.

subjects/anna.mp4               a video of one turn around a head
subjects/bert/*.jpg             photos all around a head
subjects/cleo/                  a capture that has cameras already, in one of the layouts of data_prep.captures

Cameras come from COLMAP, masks from the segmentation of photos, normals from a surface that is fitted to the
photos: they are estimates.
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

from data_prep import factory, identity, validate  # noqa: E402
from data_prep.calibrated import frames, readers, structure, surface  # noqa: E402
from data_prep.calibrated.views import place  # noqa: E402
from data_prep.captures import IDENTITY  # noqa: E402
from data_prep.rendering.render import on_white  # noqa: E402
from data_prep.workers import SubjectRejected  # noqa: E402
from spinmeround_jax import cli  # noqa: E402
from spinmeround_jax.cli import UsageError  # noqa: E402
from spinmeround_jax.data.records import ViewRecord  # noqa: E402
from spinmeround_jax.files import InputError, is_local  # noqa: E402
from spinmeround_jax.photo import portraits  # noqa: E402
from spinmeround_jax.photo.assets import AssetError  # noqa: E402
from spinmeround_jax.photo.pose import FRAMINGS  # noqa: E402
from spinmeround_jax.photo.prepare import Models  # noqa: E402

_SIDEWAYS, _UPWARDS = 35.0, 25.0  # degrees: some view must show the face, for training, too
_FACE_SIZE, _FACES = 256, 5  # pixels and number of the views that the identity comes from

EXAMPLES = """examples:
  # every video and every subfolder is a person; needs '.[captures,video]'
  python -m data_prep.turntables --input subjects/ --out data/mine --license "CC-BY-4.0, Example Lab"

  # the camera stood still and the person turned; six people kept for evaluation
  python -m data_prep.turntables --input subjects/ --out data/mine --license ... --moves person --held-out 6

Then look at OUT/validation/validation.html, and at rejected.jsonl. The same command resumes a killed run.
"""


def find(folder: pathlib.Path) -> list[str]:
    """Names of the videos and subfolders of `folder` that are subjects.

    Raises:
        InputError: there are none.
    """
    try:
        inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        found = [
            path.name
            for path in inside
            if (path.is_file() and path.suffix.lower() in frames.SUFFIXES)
            or (path.is_dir() and (readers.kind_of(path) or structure.pictures_in(path)))
        ]
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error
    if not found:
        raise InputError(
            f"{folder}: no subjects in it; each is a video ({', '.join(frames.SUFFIXES)}) or a subfolder with "
            "photos"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Turntables:
    """A factory.Source. work: folder of what is made on the way, kept to resume. See the command's options."""

    folder: pathlib.Path
    work: pathlib.Path
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    size: int
    views: int
    frames: int
    moves: structure.Moves
    fit_size: int
    fit_steps: int
    framing: str
    license: str
    recogniser: str
    models: pathlib.Path | None

    def subjects(self) -> dict[str, tuple[str, ...]]:
        return {"train": self.train, "held_out": self.held_out}

    def records(self, subject: str) -> list[ViewRecord]:
        try:
            return view_records(self, identity.models(self.models, self.recogniser), subject)
        except AssetError:
            raise
        except InputError as error:
            raise SubjectRejected(str(error)) from error

    def settings(self) -> dict[str, Any]:
        names = "\n".join((*self.train, "", *self.held_out)).encode()
        left_out = ("folder", "work", "train", "held_out", "models")
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}
        return {
            "source": "data_prep.turntables",
            "subjects": len(self.train) + len(self.held_out),
            "names_sha256": hashlib.sha256(names).hexdigest(),
            **options,
        }

    def manifest(self) -> dict[str, Any]:
        return {
            "image_size": self.size,
            "views": self.views,
            "seed": 0,
            "source": f"data_prep.turntables: photographs of {self.folder.name}; normals are estimates, of "
            "surfaces fitted to the photographs",
            "license": self.license,
            "framing": self.framing,
            "identity": identity.models(self.models, self.recogniser).recognition,
        }


def view_records(source: Turntables, models: Models, subject: str) -> list[ViewRecord]:
    """The views of one subject.

    Raises:
        InputError, SubjectRejected: it cannot be used.
        AssetError: a model is needed that is not there.
    """
    given, capture = source.folder / subject, source.folder / subject
    if given.is_file() or not readers.kind_of(given):
        capture = source.work / subject
        if not readers.kind_of(capture):
            structure.calibrate(given, capture, source.frames, source.moves, models)
    photos = readers.read(capture)
    scale, rotation, offset = place(capture, photos, models)
    zoom, shift = FRAMINGS[source.framing]
    where = (zoom * scale, rotation, zoom * offset + np.array(shift))
    shots = surface.cut_out_views(photos, where, source.size, models)
    front = [v for v in shots if abs(v.yaw) <= _SIDEWAYS and abs(v.pitch) <= _UPWARDS]
    if len(shots) < source.views or not front:
        raise InputError(
            f"{given}: {len(shots)} images can be used, {len(front)} of them from the front; "
            f"--views {source.views} and one from the front are needed"
        )
    checkpoint = source.work / f"{subject}.fit.npz"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    shape = surface.fit_surface(shots, str(given), source.fit_size, source.fit_steps, checkpoint)
    if (given / IDENTITY).is_file():
        embedding = portraits.read_identity(given / IDENTITY)
    else:
        front = sorted(front, key=lambda view: np.hypot(view.yaw, view.pitch))[:_FACES]
        drawn = [surface.moved_back(v, shape, _FACE_SIZE)[0] for v in front]
        embedding = identity.embed(models, [on_white(rgba) for rgba in drawn])
    chosen = surface.spread(shots, source.views)
    return factory.view_records(
        subject,
        (surface.moved_back(view, shape, source.size) for view in chosen),
        np.array([(view.yaw, view.pitch) for view in chosen]),
        embedding,
        f"data_prep.turntables {subject}",
        source.license,
    )


def build(args: argparse.Namespace) -> Turntables:
    """The source that the options describe.

    Raises:
        InputError: no subjects, or fewer than are to be held out.
        AssetError: a model is missing.
    """
    names = find(args.input)
    chosen = factory.held_out(names, args.held_out, args.input)
    train, held_out = (
        tuple(name for name in names if (name in chosen) == kept) for kept in (False, True)
    )
    identity.models(args.models, args.recogniser).check()
    return Turntables(
        args.input.resolve(), args.work.resolve(), train, held_out, args.size, args.views, args.frames,
        args.moves, args.fit_size, args.fit_steps, args.framing, args.license, args.recogniser, args.models,
    )  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("data_prep.turntables", __doc__, EXAMPLES)
    parser.add_argument("--input", type=pathlib.Path, required=True, help="folder of subjects")
    parser.add_argument("--license", required=True, help="of the images, written into the data")
    factory.add_arguments(parser, workers=1)
    parser.add_argument("--work", type=pathlib.Path, help="local, to resume from (OUT/work)")
    for name, least, default, what in (
        ("held-out", 0, 0, "people not trained on"),
        ("size", 1, 512, "pixels, square"),
        ("views", 8, 24, "of each person, spread over the turn"),
        ("frames", 8, 60, "taken out of a video"),
        ("fit-size", 32, 128, "pixels of the views to which surfaces are fitted"),
        ("fit-steps", 1, 1000, "of the fit"),
    ):
        parser.add_argument(
            f"--{name}", type=cli.integer(least), default=default, help=f"{what} ({default})"
        )
    parser.add_argument(
        "--moves", choices=("camera", "person"), default="camera",
        help="what turned; the person: only the person is matched, since the wall stands still (camera)",
    )  # fmt: skip
    parser.add_argument(
        "--framing", choices=sorted(FRAMINGS), default="close",
        help="how much of the image the head fills, see docs/photos.md (close)",
    )  # fmt: skip
    parser.add_argument(
        "--recogniser", choices=("mediapipe", "insightface"), default="mediapipe",
        help="whose faces, masks and identities: those that come with this project, or ArcFace's (mediapipe)",
    )  # fmt: skip
    parser.add_argument("--models", type=pathlib.Path, help="folder of photo.fetch's models")
    args = parser.parse_args(argv)
    if args.work is None:
        if not is_local(args.out):
            raise UsageError("give --work, a local folder, where --out is not on a local disk")
        args.work = pathlib.Path(args.out) / "work"
    return args


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    if not factory.run(build(args), args):
        return 0
    out = (args.out if is_local(args.out) else args.work) / "validation"
    report = validate.validate(args.out, out, args.workers, pictures=100)
    print(f"{len(report['faults'])} faults; look at {out / 'validation.html'}")
    return 1 if report["faults"] else 0


def main(argv: list[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


if __name__ == "__main__":
    cli.end(main())
