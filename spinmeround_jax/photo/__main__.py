"""Photos in, aligned portraits with identities out: `python -m spinmeround_jax.photo --help`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spinmeround_jax import cli, files, schema
from spinmeround_jax.cli import UsageError
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import align, images, preview
from spinmeround_jax.photo.landmarks import read_landmarks
from spinmeround_jax.photo.pose import FRAMINGS
from spinmeround_jax.photo.prepare import GENERATOR, Models, Options, Prepared, is_ours, prepare

DESCRIPTION = f"""Make portraits that `sample` takes from photos.

Each photo gives NAME.png ({align.SIZE} x {align.SIZE}, the head upright in its place, on white) and
NAME.json with its identity, the head's pose, and how both came about. One photo that cannot
be used does not stop the others. What was done before is skipped."""

EPILOG = """examples:
  python -m spinmeround_jax.photo --input photos/ me.jpg --out aligned/ --preview
  python -m spinmeround_jax.sample --checkpoint weights/quickstart --input aligned/ --out out/

  # for the released weights: trained with ArcFace, on heads as PanoHead crops them
  python -m spinmeround_jax.photo.fetch                       # the models, once; non-commercial
  ... --front-end insightface --framing panohead

  # without detection: landmarks.json holds {"me.jpg": [[x, y], ... 5 or 68 points]}
  ... --landmarks landmarks.json

The five points: eye on the image's left, eye on its right, tip of the nose, corner of the mouth on
the image's left, on its right; pixels of the photo as viewers show it."""


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("spinmeround_jax.photo", DESCRIPTION, EPILOG)
    path = pathlib.Path
    parser.add_argument("--input", type=path, nargs="+", required=True, help="photos or folders")
    parser.add_argument("--out", type=path, required=True, help="folder to write")
    parser.add_argument("--landmarks", type=path, help="JSON with points by hand, see below")
    parser.add_argument(
        "--face", type=cli.integer(1), default=1, metavar="N",
        help="which face, if there are several; 1 is the largest (1)",
    )  # fmt: skip
    parser.add_argument(
        "--framing", choices=sorted(FRAMINGS), default="canonical",
        help="how much of the image the head fills, as the weights have it: docs/photos.md (canonical)",
    )  # fmt: skip
    background = parser.add_mutually_exclusive_group()
    background.add_argument(
        "--background", choices=("auto", "rembg"), default="auto",
        help="source of the mask: the photo's own transparency, else segmentation; or rembg (auto)",
    )  # fmt: skip
    background.add_argument(
        "--keep-background", action="store_const", const="keep", dest="background",
        help="leave it as it is",
    )  # fmt: skip
    parser.add_argument(
        "--front-end", choices=("mediapipe", "insightface"), default="mediapipe",
        help="what finds and recognises faces: as weights trained here know it, or ArcFace (mediapipe)",
    )  # fmt: skip
    parser.add_argument("--no-identity", action="store_true", help="only the aligned image")
    parser.add_argument("--models", type=path, help="insightface's folder (as of photo.fetch)")
    parser.add_argument("--recognition", type=path, help="insightface's model (glintr100.onnx)")
    parser.add_argument(
        "--allow-other-recognition", action="store_true",
        help="accept a recognition model that is not antelopev2's, for weights trained with it",
    )  # fmt: skip
    parser.add_argument(
        "--preview", action="store_true", help="also write previews/NAME.jpg: what was found"
    )
    parser.add_argument("--overwrite", action="store_true", help="prepare finished photos again")
    return parser


def find_photos(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Photos among files and folders (not their subfolders), in order of name.

    Raises:
        UsageError: a folder without images, or two photos of one name.
    """
    found: list[pathlib.Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if not p.is_dir() and images.is_picture_name(p))
        if not inside:
            raise UsageError(f"{path}: no images in this folder ({', '.join(images.SUFFIXES)})")
        found += inside
    names: dict[str, pathlib.Path] = {}
    for path in dict.fromkeys(found):
        other = names.setdefault(path.stem, path)
        if other != path:
            raise UsageError(
                f"{path}: would become the same portrait as {other}; rename one of them"
            )
    return list(names.values())


def is_finished(folder: pathlib.Path, name: str, wanted: Mapping[str, Any]) -> bool:
    """Whether both files of this portrait are there and ours, made of the same photo as `wanted` says.

    Raises:
        InputError: made of another photo or with other options, naming them.
    """
    record = folder / f"{name}.json"
    if not (is_ours(record) and (folder / f"{name}.png").is_file()):
        return False
    found = schema.read(record, schema.record({}, {"request": schema.mapping(schema.anything)}))
    if found.get("unfinished"):
        return False
    there = found.get("request", wanted)  # portraits from before it was kept do not say
    if changes := schema.differences(there, wanted):
        raise InputError(
            f"{record}: is finished, made of another photo or with other options (there -> here: "
            f"{'; '.join(changes[:5])}); --overwrite replaces it, or choose another --out"
        )
    return True


def write(
    folder: pathlib.Path, prepared: Prepared, with_preview: bool, request: Mapping[str, Any]
) -> None:
    """Write a portrait: each file completely or not at all, the JSON, which makes it finished, last.

    After a kill in between, a stub of the JSON marks the files as unfinished.

    Args:
        request: what decided it, kept in the JSON.

    Raises:
        InputError: files of that name are there that we did not write.
    """
    image, record = folder / f"{prepared.name}.png", folder / f"{prepared.name}.json"
    if (image.exists() or record.exists()) and not is_ours(record):
        raise InputError(
            f"{prepared.path}: {image.name} or {record.name} is in the way in {folder}, not written "
            "by this program; move it, or choose another --out"
        )
    stub = {"generator": GENERATOR, "unfinished": True, "no_identity": _UNFINISHED}
    contents = [
        (record, json.dumps(stub).encode()),
        (image, images.encoded(prepared.image, "PNG")),
    ]
    if with_preview:
        sheet = _preview(folder, prepared.name)
        contents.append((sheet, images.encoded(preview.draw(prepared), "JPEG", quality=90)))
    about = {**prepared.record(), "request": request}
    contents.append((record, json.dumps(about, indent=1, allow_nan=False).encode()))
    for path, content in contents:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, content)


_UNFINISHED = "spinmeround_jax.photo was stopped while it wrote this portrait; run it again"


def _preview(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / "previews" / f"{name}.jpg"


def _sha256(path: pathlib.Path) -> str | None:
    try:
        return files.sha256(path)
    except OSError:  # an error when it is read
        return None


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code.

    Raises:
        InputError: before anything is done.
    """
    files.check_writable(args.out)
    photos = find_photos(args.input)
    given: dict[str, np.ndarray] = {}
    if args.landmarks:
        given = read_landmarks(args.landmarks)
        for name in sorted(given.keys() - {files.composed(photo.name) for photo in photos}):
            print(f"note: {args.landmarks}: {name} is not among the photos", file=sys.stderr)
    options = Options(args.face, args.framing, args.background, not args.no_identity)
    common = {**dataclasses.asdict(options), "front_end": args.front_end}
    if args.recognition:
        common["recognition_sha256"] = _sha256(args.recognition)
    requests = {}
    for photo in photos:
        points = given.get(files.composed(photo.name))
        requests[photo] = {
            **common,
            "photo_sha256": _sha256(photo),
            "landmarks": None if points is None else points.tolist(),
        }

    def is_missing(photo: pathlib.Path) -> bool:
        return (
            args.overwrite
            or not is_finished(args.out, photo.stem, requests[photo])
            or (args.preview and not _preview(args.out, photo.stem).is_file())
        )

    todo = [photo for photo in photos if is_missing(photo)]
    if args.front_end == "mediapipe" and (args.recognition or args.allow_other_recognition):
        raise UsageError("--recognition: belongs to --front-end insightface; add that")
    models = Models(args.models, args.recognition, args.allow_other_recognition, args.front_end)
    # Report what is missing before any photo.
    if any(files.composed(photo.name) not in given for photo in todo):
        _ = models.finder
    if todo and not args.no_identity and (models.has_recognition or not given):
        _ = models.recognition
    written, failed = 0, 0
    for photo in todo:
        try:
            prepared = prepare(photo, options, models, given.get(files.composed(photo.name)))
            args.out.mkdir(parents=True, exist_ok=True)
            with files.lock(args.out / photo.stem, suffix="photo.lock"):
                if not is_missing(photo):  # another process has made it
                    continue
                write(args.out, prepared, args.preview, requests[photo])
        except (InputError, OSError) as error:
            failed += 1
            where = f"{photo}: " if isinstance(error, OSError) else ""
            print(f"error: {where}{cli.message(error)}", file=sys.stderr)
            continue
        written += 1
        for note in prepared.notes:
            print(f"note: {photo}: {note}", file=sys.stderr)
    skipped = len(photos) - written - failed
    print(f"{written} written, {skipped} skipped, {failed} failed: {args.out.resolve()}")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(
        build_parser().parse_args, run, argv, "the portraits written so far are complete"
    )


if __name__ == "__main__":
    cli.end(main())
