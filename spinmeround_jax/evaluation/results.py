"""Results of an evaluation as files: tables for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax.evaluation import measures
from spinmeround_jax.evaluation.measures import Score
from spinmeround_jax.files import write_atomically
from spinmeround_jax.photo.images import encoded

COLUMNS = 9  # views of a subject that are shown
CONFIDENCE = 95  # percent
RESAMPLINGS = 4000  # of the subjects, for confidence intervals

Strip = tuple[str, np.ndarray]
"""A row of images of one subject: what it is, and (n, h, w, 3) uint8."""


@dataclasses.dataclass(frozen=True)
class Result:
    """s subjects at n views, judged by one protocol.

    Attributes:
        protocol, sentence: its name; what was compared with what, in words.
        subjects: (s) names. views: (n) names, such as "45°". yaws: (n,) degrees, or None.
        scores: the rows of the tables.
        strips: all rows of images of a subject by its number, the truth first; images of a row of
            the tables go by its name. columns: what their views are, such as "45°".
        details: more for scores.json. notes: what could not be measured, and why.
    """

    protocol: str
    sentence: str
    subjects: Sequence[str]
    views: Sequence[str]
    yaws: np.ndarray | None
    scores: Sequence[Score]
    strips: Callable[[int], list[Strip]]
    columns: Callable[[int], list[str]]
    details: dict[str, Any]
    notes: Sequence[str]

    def measured(self) -> list[measures.Measure]:
        """The measures that any row has."""
        return [
            m for m in measures.ALL if any(s.per_subject(m.name) is not None for s in self.scores)
        ]

    def ranking(self) -> measures.Measure:
        """The values by which subjects are ranked: the first model's PSNR, or the first measure it has."""
        first = next(score for score in self.scores if score.kind == "model")
        return next(m for m in self.measured() if first.per_subject(m.name) is not None)

    def ranked(self) -> list[tuple[str, int]]:
        """The worst, the median and the best subject of the first model."""
        first, measure = next(s for s in self.scores if s.kind == "model"), self.ranking()
        values = first.per_subject(measure.name)
        order = np.argsort(-values if measure.better == "lower" else values, kind="stable")
        order = order[np.isfinite(values[order])]
        found = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
        return [(label, int(i)) for label, i in found.items()]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of one measure over subjects: mean, its standard error, a confidence interval.

    The interval is the percentile bootstrap's (Efron and Tibshirani 1993, ch. 13) over subjects;
    error, low and high are NaN for a single subject.
    """

    mean: float
    error: float
    low: float
    high: float
    subjects: int


def summarise(values: np.ndarray) -> Summary:
    """Of (s,) values; those that are NaN are left out."""
    values = values[np.isfinite(values)]
    count, mean = len(values), float(values.mean())
    if count < 2:
        return Summary(mean, np.nan, np.nan, np.nan, count)
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLINGS, count))
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(values[draws].mean(axis=1), [tail, 100 - tail])
    error = values.std(ddof=1) / np.sqrt(count)
    return Summary(mean, float(error), float(low), float(high), count)


def cell(values: np.ndarray | None, digits: int) -> str:
    """ "16.19 ± 0.41": mean over subjects and its standard error."""
    if values is None:
        return "-"
    s = summarise(values)
    error = "" if np.isnan(s.error) else f" ± {s.error:.{digits}f}"
    return f"{s.mean:.{digits}f}{error}"


def table(result: Result) -> str:
    """Markdown: means over subjects, with the standard error of the mean."""
    shown = result.measured()
    lines = [
        "| | " + " | ".join(measure.heading for measure in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for score in result.scores:
        cells = [cell(score.per_subject(m.name), m.digits) for m in shown]
        lines.append(f"| {_plain(score.name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plain(name: str) -> str:
    """A name as it is, not as Markdown or HTML."""
    return re.sub(r"([\\`*\[\]|<>&])", r"\\\1", " ".join(name.split()))


def write(result: Result, command: dict[str, Any], out: pathlib.Path) -> None:
    """table.md, scores.json, scores.csv, summary.csv, and worst, median and best.png in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table.md", (table(result) + "\n").encode())
    _write_json(result, command, out / "scores.json")
    rows = [
        (score.name, subject, measure.name, value)
        for score in result.scores
        for measure in result.measured()
        if (values := score.per_subject(measure.name)) is not None and measure != measures.FID
        for subject, value in zip(result.subjects, values, strict=True)
    ]
    _write_csv(out / "scores.csv", ("row", "subject", "measure", "value"), rows)
    rows = [
        (score.name, measure.name, s.mean, s.error, s.low, s.high, s.subjects)
        for score in result.scores
        for measure in result.measured()
        if (values := score.per_subject(measure.name)) is not None
        for s in [summarise(values)]
    ]
    interval = f"{CONFIDENCE}%"
    heading = ("mean", "standard error", f"{interval} from", f"{interval} to", "subjects")
    _write_csv(out / "summary.csv", ("row", "measure", *heading), rows)
    for label, subject in result.ranked():
        shown = columns_shown(len(result.columns(subject)))
        grid([strip[shown] for _, strip in result.strips(subject)], out / f"{label}.png")


def columns_shown(count: int) -> list[int]:
    """At most `COLUMNS` of so many views, evenly spread."""
    return (
        list(range(count)) if count <= COLUMNS else [i * count // COLUMNS for i in range(COLUMNS)]
    )


def _write_json(result: Result, command: dict[str, Any], path: pathlib.Path) -> None:
    scores, per_view, summary = {}, {}, {}
    for score in result.scores:
        means = {m.name: score.per_subject(m.name) for m in result.measured()}
        means = {name: values for name, values in means.items() if values is not None}
        scores[score.name] = {name: _numbers(values) for name, values in means.items()}
        per_view[score.name] = {n: _numbers(score.values[n]) for n in means
                                if score.values[n].ndim == 2}  # fmt: skip
        summary[score.name] = {
            name: _numbers(dataclasses.asdict(summarise(values))) for name, values in means.items()
        }
    content = {
        "protocol": result.protocol,
        "compared": result.sentence,
        "command": command,
        **result.details,
        "notes": list(result.notes),
        "subjects": list(result.subjects),
        "views": list(result.views),
        "scores": scores,
        "summary": summary,
        "per_view": per_view,
    }
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _numbers(values: Any) -> Any:
    """For JSON, which has no NaN."""
    if isinstance(values, dict):
        return {key: _numbers(value) for key, value in values.items()}
    if isinstance(values, np.ndarray | list):
        return [_numbers(value) for value in values]
    if isinstance(values, int):
        return values
    return float(values) if np.isfinite(values) else None


def _write_csv(path: pathlib.Path, heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    for row in rows:
        writer.writerow(
            [("" if not np.isfinite(x) else f"{x:.7g}") if isinstance(x, float) else x for x in row]
        )
    write_atomically(path, text.getvalue().encode())


def grid(rows: Sequence[np.ndarray], path: pathlib.Path) -> None:
    """Write rows of (n, h, w, 3) uint8 images as one PNG, small ones scaled twice."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    image = Image.fromarray(sheet)
    if rows[0].shape[2] <= 128:
        image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.LANCZOS)
    write_atomically(path, encoded(image, "PNG"))
