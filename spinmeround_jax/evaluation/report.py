"""The report of an evaluation: one HTML file with tables, plots and images, and nothing to load."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax.evaluation import charts, published, results
from spinmeround_jax.evaluation.results import CONFIDENCE, Result
from spinmeround_jax.files import write_atomically
from spinmeround_jax.results import markup
from spinmeround_jax.results.page_style import CHARTS, CSS

LARGEST = 160  # pixels of a view in the report; the files have them as they are

STYLE = """
header,main{max-width:1280px}
p small{margin-left:0}
p{margin:.5em 0}
.scroll{overflow-x:auto}
.scores{min-width:100%}
.scores td,.scores th{white-space:nowrap;font-variant-numeric:tabular-nums;padding:5px 14px 5px 0;
font-size:.82rem}
.scores thead th{border-bottom:1px solid var(--soft);vertical-align:bottom;white-space:normal}
.scores tbody th{color:var(--ink)}
.scores .model th{font-weight:600}
.scores .best{font-weight:700}
.stamp{display:inline-block;border:1px solid var(--c1);color:var(--c1);border-radius:6px;
padding:1px 8px;font-size:.8rem;margin-bottom:8px}
.strips{display:grid;grid-template-columns:minmax(6.5em,auto) 1fr;gap:4px 12px;align-items:center;
font-size:.8rem;min-width:640px}
.strips img{width:100%;display:block;border-radius:4px}
.strips span{text-align:right;overflow-wrap:anywhere}
.angles{display:flex;color:var(--soft)}
.angles span{flex:1;text-align:center}
"""


def write(result: Result, command: dict[str, Any], path: pathlib.Path) -> None:
    """Write the report; the same result gives the same bytes."""
    write_atomically(path, _document(result, command).encode())


def _document(result: Result, command: dict[str, Any]) -> str:
    notes = "".join(
        f"<p><small>Left out: {html.escape(note)}.</small></p>" for note in result.notes
    )
    sections = [
        _article("Scores", _scores(result) + notes),
        _article("Published", _published(result.protocol)),
        _article(
            "Every subject",
            f"<p><small>A faint dot is a subject, a strong one their mean, the bar its {CONFIDENCE} % "
            "confidence interval (bootstrap over subjects).</small></p>" + _charts(result),
        ),
        _curves(result),
        _pictures(result),
        _article("How this was made", _settings(result, command)),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="spinmeround_jax.evaluate">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation: {html.escape(result.protocol)}</title>
<style>{CSS}{CHARTS}{STYLE}</style>
</head>
<body>
<header><h1>Evaluation</h1><p>{html.escape(result.sentence)}.</p></header>
<main>{"".join(sections)}</main>
</body>
</html>
"""


def _article(heading: str, content: str) -> str:
    return f"<article><h2>{html.escape(heading)}</h2>{content}</article>"


def _scores(result: Result) -> str:
    shown = result.measured()
    head = "".join(f"<th>{html.escape(measure.heading)}</th>" for measure in shown)
    body = []
    for score in result.scores:
        cells = []
        for measure in shown:
            values = score.per_subject(measure.name)
            best = score.kind == "model" and _is_best(result, score, measure)
            css = ' class="best"' if best else ""
            cells.append(f"<td{css}>{results.cell(values, measure.digits)}</td>")
        name = html.escape(score.name)
        body.append(f'<tr class="{score.kind}"><th>{name}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="scores"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        f"<p><small>Mean ± standard error over {len(result.subjects)} subjects.</small></p>"
    )


def _is_best(result: Result, score, measure) -> bool:
    """Of several models."""
    models = [s for s in result.scores if s.kind == "model"]
    found = [(s, s.per_subject(measure.name)) for s in models]
    means = {s.name: float(np.nanmean(v)) for s, v in found if v is not None}
    if len(means) < 2 or score.name not in means:
        return False
    key = {"higher": lambda v: -v, "lower": lambda v: v, "one": lambda v: abs(v - 1.0)}
    return score.name == min(means, key=lambda name: key[measure.better](means[name]))


def _published(protocol: str) -> str:
    about = published.read()
    parts = [
        f'<p class="stamp">{html.escape(about["marked"])}</p>',
        f"<p><small>{html.escape(about['source'])}; {html.escape(published.note(protocol))}.</small></p>",
    ]
    for table in about["tables"]:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in table["columns"])
        body = "".join(
            f"<tr><th>{html.escape(name)}</th>"
            + "".join(f"<td>{value:g}</td>" for value in values)
            + "</tr>"
            for name, values in table["rows"].items()
        )
        parts.append(
            f"<h3>{html.escape(table['title'])} <small>published</small></h3>"
            f'<div class="scroll"><table class="scores"><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
    return "".join(parts)


def _charts(result: Result) -> str:
    shown = (
        f"<div><h4>{html.escape(measure.heading)}</h4>{charts.rows(measure, result.scores)}</div>"
        for measure in result.measured()
    )
    return f'<div class="charts">{"".join(shown)}</div>'


def _curves(result: Result) -> str:
    if result.yaws is None or len(np.unique(result.yaws)) < 3:
        return ""
    # The models first: there are only so many distinguishable colours.
    scores = sorted(result.scores, key=lambda score: score.kind != "model")
    drawn = [
        f"<div><h4>{html.escape(measure.heading)}</h4>{chart}</div>"
        for measure in result.measured()
        if (chart := charts.over_yaw(measure, scores, result.yaws))
    ]
    if not drawn:
        return ""
    content = (
        f"<p><small>Mean over subjects at each yaw, with its {CONFIDENCE} % confidence interval; "
        f"dashed what a model is to be seen beside.</small></p><div class='charts'>{''.join(drawn)}</div>"
    )
    return _article("All around the head", content)


def _pictures(result: Result) -> str:
    parts = []
    for label, subject in result.ranked():
        columns = result.columns(subject)
        shown = results.columns_shown(len(columns))
        angles = "".join(f"<span>{html.escape(columns[i])}</span>" for i in shown)
        rows = [f'<span></span><div class="angles">{angles}</div>']
        for name, pictures in result.strips(subject):
            about = html.escape(f"{name}, {result.subjects[subject]}")
            rows.append(
                f'<span>{html.escape(name)}</span><img alt="{about}" src="{_strip(pictures[shown])}">'
            )
        parts.append(
            f"<h3>{label.capitalize()} <small>{html.escape(result.subjects[subject])}</small></h3>"
            f'<div class="scroll"><div class="strips">{"".join(rows)}</div></div>'
        )
    first = next(score.name for score in result.scores if score.kind == "model")
    measure = result.ranking().label
    about = f"<p><small>By the {html.escape(measure)} of {html.escape(first)}.</small></p>"
    return _article("Images", about + "".join(parts))


def _strip(pictures: Sequence[np.ndarray]) -> str:
    """(n, h, w, 3) uint8 side by side, as a data URI."""
    image = Image.fromarray(np.concatenate(list(pictures), axis=1))
    if image.height > LARGEST:
        width = round(image.width * LARGEST / image.height)
        image = image.resize((width, LARGEST), Image.Resampling.LANCZOS)
    return markup.data_uri(image, quality=92, method=4)


def _settings(result: Result, command: dict[str, Any]) -> str:
    models = {
        name: {key: value for key, value in about.items() if key != "config"}
        for name, about in result.details.get("models", {}).items()
    }
    return markup.table({"command": command, **models})
