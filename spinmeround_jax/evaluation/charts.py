"""Plots as inline SVG: rows with their subjects and confidence intervals, and measures over the yaw."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from spinmeround_jax.evaluation.measures import Measure, Score
from spinmeround_jax.evaluation.results import CONFIDENCE, summarise
from spinmeround_jax.results import charts
from spinmeround_jax.results.charts import COLOURS, WIDTH, Line, padded, text, ticks

NAMES = 190  # to its left, for the names of rows


def rows(measure: Measure, scores: Sequence[Score]) -> str:
    """Every subject a faint dot, the mean a strong one on its confidence interval; one line per row."""
    values = [(score, score.per_subject(measure.name)) for score in scores]
    values = [(score, v[np.isfinite(v)]) for score, v in values if v is not None]
    everything = np.concatenate([v for _, v in values])
    low, high = padded(everything.min(), everything.max())
    line, top = 22, 6
    height = top + line * len(values) + 24

    def x(value: float) -> float:
        return WIDTH * (value - low) / (high - low)

    parts = []
    for tick in ticks(low, high):
        parts.append(f'<path class="line" d="M{x(tick):.1f} {top}V{height - 20}"/>')
        parts.append(text(x(tick), height - 6, f"{tick:.6g}", "middle", "soft"))
    for i, (score, v) in enumerate(values):
        y = top + line * (i + 0.5)
        kind = "c0" if score.kind == "model" else "plain"
        s = summarise(v)
        parts += [f'<circle class="{kind} faint" cx="{x(p):.1f}" cy="{y:.1f}" r="3"/>' for p in v]
        if s.subjects > 1:
            parts.append(f'<path class="{kind} bar" d="M{x(s.low):.1f} {y:.1f}H{x(s.high):.1f}"/>')
        parts.append(text(-14, y + 4, _short(score.name), "end", ""))
        about = f"{score.name}: {s.mean:.{measure.digits}f}{_interval(s, measure.digits)}"
        parts.append(
            f'<circle class="{kind}" cx="{x(s.mean):.1f}" cy="{y:.1f}" r="4.5">'
            f"<title>{html.escape(about)}</title></circle>"
        )
    return (
        f'<svg viewBox="{-NAMES} 0 {NAMES + WIDTH + 16} {height}" role="img" '
        f'aria-label="{html.escape(measure.label)} of every row">{"".join(parts)}</svg>'
    )


def over_yaw(measure: Measure, scores: Sequence[Score], yaws: np.ndarray) -> str:
    """Mean over subjects at each view, with the confidence interval of models as a band."""
    order = np.argsort(yaws, kind="stable")
    lines = []
    for score in scores:
        values = score.values.get(measure.name)
        if values is None or values.ndim != 2 or np.isnan(values).all(axis=0).any():
            continue
        lines.append((score, [summarise(values[:, i]) for i in order]))
    lines = lines[:COLOURS]
    if not lines:
        return ""
    yaws = yaws[order]
    first, last = float(yaws.min()), float(yaws.max())
    shown = yaws if len(yaws) <= 9 else np.array(ticks(first, last, 6))
    if len(yaws) > 9 and last - first > 180.0:
        shown = np.array([yaw for yaw in (-180, -90, 0, 90, 180) if first <= yaw <= last])
    drawn = []
    for i, (score, line) in enumerate(lines):
        model = score.kind == "model"
        drawn.append(
            Line(
                score.name,
                [(float(a), s.mean) for a, s in zip(yaws, line, strict=True)],
                i,
                marks=[
                    f"{score.name} at {a:g}°: {s.mean:.{measure.digits}f}"
                    + _interval(s, measure.digits)
                    for a, s in zip(yaws, line, strict=True)
                ],
                band=[(s.low, s.high) for s in line] if model and line[0].subjects > 1 else (),
                dashed=not model,
            )
        )
    return charts.lines(f"{measure.label} over yaw", drawn, [(yaw, f"{yaw:g}°") for yaw in shown])


def _short(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:29]}…"


def _interval(s, digits: int) -> str:
    if s.subjects < 2:
        return ""
    return f" ({CONFIDENCE} %: {s.low:.{digits}f} to {s.high:.{digits}f})"
