"""Looking at many generated heads before all their views are made: scores, sheets, reject lists.

looks/NAME.json, looks/NAME.jpg     scores and a strip of images of one head, as soon as made
scores.jsonl                        all scores, a line per head
reject_auto.txt                     names that the thresholds reject, with the reasons; made anew
reject.txt                          names that a person rejects; never written to once it is there
sheets/0000.jpg, ...                the strips, twenty on a sheet
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep import factory
from data_prep.back_filter import Scores, Thresholds, faults
from data_prep.workers import SubjectRejected, made
from spinmeround_jax import cli, schema
from spinmeround_jax.files import InputError, write_atomically
from spinmeround_jax.photo.images import encoded

SETTINGS = "screening.json"
_TILE, _CAPTION, _ROWS = 128, 16, 20  # pixels, pixels, strips on a sheet

_HEADER = """# Heads that are not to be used, one a line; everything after '#' is a remark.
# Look at sheets/*.jpg. A head that reject_auto.txt rejects and that is good after all:
# keep NAME
"""


@dataclasses.dataclass(frozen=True)
class Look:
    """Scores of a head, and (s, s, 3) uint8 images of it for a person."""

    scores: Scores
    pictures: list[np.ndarray]


def resized(picture: np.ndarray, size: int) -> np.ndarray:
    """(h, h, 3) uint8 -> (size, size, 3) uint8."""
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))


def screen(
    look: Callable[[str], Look],
    names: Sequence[str],
    out: pathlib.Path,
    settings: dict,
    workers: int = 1,
    share: tuple[int, int] = (0, 1),
) -> bool:
    """Looks at each head that was not looked at yet.

    Args:
        look: picklable; may raise SubjectRejected. settings: all that decides the scores.
        share: (i, n): of n machines, this is the i-th.

    Returns:
        Whether all of `names` were looked at.

    Raises:
        InputError: `out` was begun with other settings.
        BrokenProcessPool, OSError: what was done is kept; the same command resumes.
    """
    (out / "looks").mkdir(parents=True, exist_ok=True)
    factory.check_settings(out / SETTINGS, settings)
    mine = list(names)[share[0] :: share[1]]
    todo = [name for name in mine if not _look_path(out, name).exists()]
    with contextlib.closing(made(look, todo, workers)) as looks:
        with cli.progress(total=len(mine), initial=len(mine) - len(todo), unit="head") as bar:
            for name, result in zip(todo, looks, strict=True):
                _write_look(out, name, result)
                bar.update()
    left = sum(not _look_path(out, name).exists() for name in names)
    if left:
        print(f"{left} of {len(names)} heads are left to other machines: {out}")
    return left == 0


def _look_path(out: pathlib.Path, name: str) -> pathlib.Path:
    return out / "looks" / f"{name}.json"


def _write_look(out: pathlib.Path, name: str, result: Look | SubjectRejected) -> None:
    path = _look_path(out, name)
    if isinstance(result, SubjectRejected):
        about = {"name": name, "reason": str(result)}
    else:
        about = {"name": name, **dataclasses.asdict(result.scores)}
        strip = encoded(_strip(result.pictures), "JPEG", quality=85)
        write_atomically(path.with_suffix(".jpg"), strip)
    write_atomically(path, json.dumps(about).encode())


def _strip(pictures: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([resized(picture, _TILE) for picture in pictures], axis=1)


def _read_look(out: pathlib.Path, name: str) -> Scores | str:
    """The scores, or why there are none."""
    path = _look_path(out, name)
    try:
        about = schema.read(path, schema.record({}, {"reason": schema.text(longest=1 << 20)}))
        if "reason" in about:
            return about["reason"]
        scores = _SCORES(about, str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; screen that head first") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{error}; damaged, delete it and screen again") from error
    return Scores(**{field.name: scores[field.name] for field in dataclasses.fields(Scores)})


_SCORES = schema.record(
    {field.name: schema.nullable(schema.number()) for field in dataclasses.fields(Scores)}
)


def collect(out: pathlib.Path, names: Sequence[str], thresholds: Thresholds) -> None:
    """Writes scores.jsonl, reject_auto.txt, the sheets, and an empty reject.txt if there is none.

    Raises:
        InputError: a head was not looked at.
    """
    looks = {name: _read_look(out, name) for name in names}
    scores = {name: look for name, look in looks.items() if isinstance(look, Scores)}
    against = {name: [look] for name, look in looks.items() if isinstance(look, str)}
    against |= faults(scores, thresholds)
    lines = [
        {"name": name, **(dataclasses.asdict(look) if isinstance(look, Scores) else {})}
        | {"rejected": against.get(name, [])}
        for name, look in looks.items()
    ]
    write_atomically(out / "scores.jsonl", "".join(json.dumps(x) + "\n" for x in lines).encode())
    rejects = "".join(
        f"{name}  # {'; '.join(against[name])}\n" for name in looks if name in against
    )
    write_atomically(out / "reject_auto.txt", rejects.encode())
    if not (out / "reject.txt").exists():
        write_atomically(out / "reject.txt", _HEADER.encode())
    (out / "sheets").mkdir(exist_ok=True)
    # Those that pass come first: it is they who need a person's eyes.
    shown = sorted(scores, key=lambda name: name in against)
    for number, start in enumerate(range(0, len(shown), _ROWS)):
        sheet = _sheet(out, shown[start : start + _ROWS], scores, against)
        content = encoded(sheet, "JPEG", quality=85)
        write_atomically(out / "sheets" / f"{number:04d}.jpg", content)
    why = collections.Counter(
        reason.partition(" (")[0] for reasons in against.values() for reason in reasons
    )
    print(
        f"{len(names) - len(against)} of {len(names)} heads pass the filter; rejected: {dict(why)}"
    )
    print(f"Now look at {out / 'sheets'} and write names into {out / 'reject.txt'}.")


def _sheet(
    out: pathlib.Path,
    names: Sequence[str],
    scores: dict[str, Scores],
    against: dict[str, list[str]],
) -> Image.Image:
    strips = []
    for name in names:
        path = _look_path(out, name).with_suffix(".jpg")
        try:
            strip = Image.open(path)
            strip.load()
        except OSError as error:
            raise InputError(
                f"{path}: unreadable ({error}); delete {path.stem}.json beside it and screen again"
            ) from error
        strips.append(strip)
    width, height = strips[0].width, (_TILE + _CAPTION) * len(strips)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, strip) in enumerate(zip(names, strips, strict=True)):
        top = row * (_TILE + _CAPTION)
        sheet.paste(strip, (0, top + _CAPTION))
        score = scores[name]
        back = "-" if score.back_face is None else f"{score.back_face:.2f}"
        text = f"{name}   back face {back}, mirror {score.mirror:.2f}, loose {score.floaters:.3f}"
        colour = (190, 0, 0) if name in against else (0, 90, 0)
        if name in against:
            text += f"   REJECTED: {'; '.join(against[name])}"
        pen.text((2, top + 2), text, fill=colour, font=ImageFont.load_default(11))
    return sheet


def accepted(out: pathlib.Path) -> list[str]:
    """Names that neither the thresholds nor the person rejects, in the order of scores.jsonl.

    Raises:
        InputError: no finished screening there, or a name that it does not know.
    """
    try:
        lines = (out / "scores.jsonl").read_bytes().splitlines()
        names = [schema.parse(line, _NAMED, "scores.jsonl")["name"] for line in lines]
        automatic = (out / "reject_auto.txt").read_text()
        by_hand = (out / "reject.txt").read_text()
    except Exception as error:  # missing, or not ours
        raise InputError(f"{out}: no finished screening ({error}); run `screen` first") from error
    rejected, kept = set(_listed(automatic)), set()
    for entry in _listed(by_hand):
        first, _, name = entry.rpartition(" ")
        if first.strip() not in ("", "keep") or name not in names:
            raise InputError(
                f"{out / 'reject.txt'}: {entry!r} is not one of the heads that were screened; write "
                f"a name such as {names[0]}, or 'keep {names[0]}'"
            )
        (kept if first else rejected).add(name)
    return [name for name in names if name in kept or name not in rejected]


_NAMED = schema.record({"name": schema.text()})


def _listed(text: str) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def add_threshold_arguments(parser: argparse.ArgumentParser) -> None:
    limits = Thresholds()
    for name, what in (
        ("back_face", "detection score of a face behind"),
        ("mirror", "likeness of the back's relief with a face"),
        ("floaters", "share of loose pieces"),
        ("volume", "robust standard deviations of the head's volume"),
    ):
        default = getattr(limits, name)
        parser.add_argument(
            f"--max-{name.replace('_', '-')}", type=cli.real(), default=default,
            help=f"{what} above which a head is rejected ({default:g})",
        )  # fmt: skip
