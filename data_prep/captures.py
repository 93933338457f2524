"""Calibrated photographs of real people, for evaluation: `python -m data_prep.captures --help`.

Photographs have no normals and cameras of their own: they are not for training. Each person gets

    views/NAME/transforms.json, images/*.png    each photo, cut out, from an upright camera at the same
                                                place that looks at the head's centre
    portraits/NAME.png, .json, .truth.png       input of `sample`: the most frontal view, its identity,
                                                and the other views as truth
    rejected.jsonl                              captures that could not be used, with the reasons
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from data_prep import factory, identity  # noqa: E402
from data_prep.calibrated import readers  # noqa: E402
from data_prep.calibrated.views import (  # noqa: E402
    LANDMARKS,
    Options,
    View,
    canonical_view,
    place,
    transforms_views,
)
from data_prep.rendering.render import on_white  # noqa: E402
from data_prep.workers import SubjectRejected, made  # noqa: E402
from spinmeround_jax import cli, files, schema  # noqa: E402
from spinmeround_jax.files import InputError, new_folder, write_atomically  # noqa: E402
from spinmeround_jax.photo import portraits  # noqa: E402
from spinmeround_jax.photo.assets import AssetError  # noqa: E402
from spinmeround_jax.photo.images import encoded  # noqa: E402
from spinmeround_jax.photo.prepare import Models  # noqa: E402
from spinmeround_jax.results import transforms  # noqa: E402

IDENTITY = "identity.npy"
_SIDEWAYS, _UPWARDS = 35.0, 25.0  # degrees: photos that show enough of a face to tell who it is

EXAMPLES = """examples:
  # every subfolder is a capture; needs '.[photo]' and its models, for COLMAP also '.[captures]'
  python -m data_prep.captures --input captures/ --out data/captures

  # NeRSemble: participants, one frame of one sequence each
  python -m data_prep.captures --input nersemble/ --out data/nersemble --sequence EXP-1-head --frame 0

  python -m spinmeround_jax.sample --checkpoint weights/... --input data/captures/portraits --out out/

Without models: landmarks.json in a capture, {"photo.png": [[x, y], ... 5 or 68 points]} for two photos
or more, and identity.npy, an ArcFace vector. A killed run resumes.
"""


# --------------------------------------------------------------------------------------------------
# The command


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes one capture; can be pickled."""

    folder: pathlib.Path
    out: pathlib.Path
    options: Options
    models: pathlib.Path | None

    def make(self, name: str) -> int:
        """Writes everything of capture `name`; returns the number of its views.

        Raises:
            SubjectRejected: it cannot be used.
        """
        folder = self.folder / name
        try:
            made_of = inputs_sha256(folder, self.options)  # first: they may change in the meantime
            views, embedding = read_capture(folder, self.options, identity.models(self.models))
            write_capture(self.out, name, views, embedding, self.options, made_of)
        except AssetError:
            raise
        except InputError as error:
            raise SubjectRejected(str(error)) from error
        return len(views)


def inputs_sha256(folder: pathlib.Path, options: Options) -> str:
    """SHA-256 of all that decides a capture's views: photos, masks, cameras, landmarks, identity."""
    photos, digest = readers.read(folder, options.sequence, options.frame), hashlib.sha256()
    beside = [path for path in (folder / LANDMARKS, folder / IDENTITY) if path.is_file()]
    used = [path for photo in photos for path in (photo.path, photo.mask) if path]
    for path in (*used, *beside):
        digest.update(f"{path.relative_to(folder).as_posix()} {files.sha256(path)}\n".encode())
    for photo in photos:
        for array in (photo.world_to_camera, photo.focal, photo.centre, photo.distortion):
            digest.update(np.asarray(array, np.float64).tobytes())
    return digest.hexdigest()


def is_finished(out: pathlib.Path, folder: pathlib.Path, options: Options) -> bool:
    """Whether the capture in `folder` is in `out`.

    Raises:
        InputError: it is, but was made of other photos, cameras, landmarks or another identity.
    """
    record = out / "portraits" / f"{folder.name}.json"
    if not record.is_file():
        return False
    kept = transforms.read_json(record, schema.record({}, {"made_of": schema.text()}))
    if kept.get("made_of", "") not in ("", inputs_sha256(folder, options)):  # "": of before
        raise InputError(
            f"{record}: was made of other photos, cameras, landmarks or another identity than are now in "
            f"{folder}; delete it to make this capture again, or choose another --out"
        )
    return True


def read_capture(
    folder: pathlib.Path, options: Options, models: Models
) -> tuple[list[View], np.ndarray]:
    """All views of a capture, the most frontal first, and the (512,) identity."""
    photos = readers.read(folder, options.sequence, options.frame)
    where = place(folder, photos, models)
    names = transforms.unique_names([photo.path.relative_to(folder) for photo in photos])
    views = [
        dataclasses.replace(canonical_view(photo, where, options), name=name)
        for photo, name in zip(photos, names, strict=True)
    ]
    views.sort(key=lambda view: np.hypot(view.yaw, view.pitch))
    if (folder / IDENTITY).exists():
        return views, portraits.read_identity(folder / IDENTITY)
    front = [v for v in views if abs(v.yaw) <= _SIDEWAYS and abs(v.pitch) <= _UPWARDS]
    return views, identity.embed(models, [on_white(view.rgba) for view in front])


def write_capture(
    out: pathlib.Path,
    name: str,
    views: Sequence[View],
    embedding: np.ndarray,
    options: Options,
    made_of: str,
) -> None:
    """Write views and portrait; the portrait's JSON, which makes a capture finished, comes last.

    Args:
        made_of: see `inputs_sha256`.
    """
    with new_folder(out / "views" / name) as unfinished:
        (unfinished / "images").mkdir()
        for view in views:
            Image.fromarray(view.rgba).save(unfinished / "images" / f"{view.name}.png")
        transforms.write(unfinished / transforms.NAME, transforms_views(views, options.size))
    portrait = out / "portraits" / f"{name}.png"
    portrait.parent.mkdir(exist_ok=True)
    front, *others = views
    write_atomically(portrait, encoded(front.rgba, "PNG"))
    sheet = np.concatenate([on_white(view.rgba) for view in others], axis=1)
    write_atomically(portrait.with_suffix(portraits.TRUTH_SUFFIX), encoded(sheet, "PNG"))
    record = {
        "id_embedding": [round(float(x), 7) for x in embedding],
        "pose": {"yaw": front.yaw, "pitch": front.pitch},
        "truth": [{"yaw": view.yaw, "pitch": view.pitch} for view in others],
        "source": "data_prep.captures",
        "made_of": made_of,
    }
    write_atomically(portrait.with_suffix(".json"), json.dumps(record).encode())


def find(folder: pathlib.Path) -> list[str]:
    """Names of the captures in `folder`.

    Raises:
        InputError: there are none.
    """
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and readers.kind_of(p))
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from error
    if not inside:
        raise InputError(
            f"{folder}: no captures in it; each is a subfolder with cameras.json, transforms.json, "
            "a COLMAP model or NeRSemble's camera_params.json"
        )
    return [path.name for path in inside]


def run(args: argparse.Namespace) -> int:
    """Make all captures; returns the exit code.

    Raises:
        InputError: no captures, a model is missing, or `--out` holds others; see `is_finished`.
    """
    names = find(args.input)
    folders = [args.input / name for name in names]
    if not all((folder / LANDMARKS).exists() for folder in folders):
        identity.check_detector(identity.models(args.models))
    if not all((folder / IDENTITY).exists() for folder in folders):
        identity.check(identity.models(args.models))
    options = Options(args.size, args.keep_background, args.sequence, args.frame)
    args.out.mkdir(parents=True, exist_ok=True)
    factory.check_settings(args.out / "captures.json", dataclasses.asdict(options))
    todo = [folder.name for folder in folders if not is_finished(args.out, folder, options)]
    maker = Maker(args.input, args.out, options, args.models)
    reasons: dict[str, str] = {}
    with cli.progress(total=len(names), initial=len(names) - len(todo), unit="capture") as bar:
        with contextlib.closing(made(maker.make, todo, args.workers)) as results:
            for name, result in zip(todo, results, strict=True):
                if isinstance(result, SubjectRejected):
                    reasons[name] = str(result)
                bar.update()
    _write_rejected(args.out, reasons)
    print(f"{len(names) - len(reasons)} of {len(names)} captures: {args.out}")
    for name, reason in reasons.items():
        print(f"rejected: {name}: {reason}", file=sys.stderr)
    return 1 if reasons else 0


def _write_rejected(out: pathlib.Path, reasons: Mapping[str, str]) -> None:
    if not reasons:
        (out / factory.REJECTED).unlink(missing_ok=True)
        return
    lines = [json.dumps({"subject": n, "reason": r}) + "\n" for n, r in reasons.items()]
    write_atomically(out / factory.REJECTED, "".join(lines).encode())


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("data_prep.captures", __doc__, EXAMPLES)
    parser.add_argument("--input", type=pathlib.Path, required=True, help="folder of captures")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--size", type=cli.integer(1), default=512, help="pixels, square (512)")
    parser.add_argument("--sequence", help="of NeRSemble (the first that is there)")
    parser.add_argument(
        "--frame", type=cli.integer(), help="of NeRSemble (the first that is there)"
    )
    parser.add_argument(
        "--keep-background", action="store_true", help="of photos without mask or transparency"
    )
    parser.add_argument("--models", type=pathlib.Path, help="folder of photo.fetch's models")
    parser.add_argument("--workers", type=cli.integer(1), default=1, help="processes (1)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


if __name__ == "__main__":
    cli.end(main())
