"""Plots as inline SVG: rows with their subjects and confidence intervals, and measures over the yaw."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np

from spinmeround_jax.evaluation.measures import Measure, Score
from spinmeround_jax.evaluation.results import CONFIDENCE, summarise

COLOURS = 6  # classes c0 to c5 of the report's style sheet
WIDTH = 480  # of a plot, in the units of its drawing
NAMES = 190  # to its left, for the names of rows


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def rows(measure: Measure, scores: Sequence[Score]) -> str:
    """Every subject a faint dot, the mean a strong one on its confidence interval; one line per row."""
    values = [(score, score.per_subject(measure.name)) for score in scores]
    values = [(score, v[np.isfinite(v)]) for score, v in values if v is not None]
    everything = np.concatenate([v for _, v in values])
    low, high = _padded(everything.min(), everything.max())
    line, top = 22, 6
    height = top + line * len(values) + 24

    def x(value: float) -> float:
        return WIDTH * (value - low) / (high - low)

    parts = []
    for tick in ticks(low, high):
        parts.append(f'<path class="line" d="M{x(tick):.1f} {top}V{height - 20}"/>')
        parts.append(_text(x(tick), height - 6, f"{tick:.6g}", "middle", "soft"))
    for i, (score, v) in enumerate(values):
        y = top + line * (i + 0.5)
        kind = "c0" if score.kind == "model" else "plain"
        s = summarise(v)
        parts += [f'<circle class="{kind} faint" cx="{x(p):.1f}" cy="{y:.1f}" r="3"/>' for p in v]
        if s.subjects > 1:
            parts.append(f'<path class="{kind} bar" d="M{x(s.low):.1f} {y:.1f}H{x(s.high):.1f}"/>')
        parts.append(_text(-14, y + 4, _short(score.name), "end", ""))
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
    bounds = [
        (s.low, s.high) if s.subjects > 1 and score.kind == "model" else (s.mean, s.mean)
        for score, line in lines
        for s in line
    ]
    low, high = _padded(min(b[0] for b in bounds), max(b[1] for b in bounds))
    left, top, height, bottom = 44, 8, 170, 22
    first, last = float(yaws.min()), float(yaws.max())

    def x(yaw: float) -> float:
        return left + (WIDTH - left) * (yaw - first) / max(last - first, 1e-9)

    def y(value: float) -> float:
        return top + height * (1.0 - (value - low) / (high - low))

    parts = []
    for tick in ticks(low, high, 4):
        parts.append(f'<path class="line" d="M{left} {y(tick):.1f}H{WIDTH}"/>')
        parts.append(_text(left - 6, y(tick) + 4, f"{tick:.6g}", "end", "soft"))
    shown = yaws if len(yaws) <= 9 else np.array(ticks(first, last, 6))
    if len(yaws) > 9 and last - first > 180.0:
        shown = np.array([yaw for yaw in (-180, -90, 0, 90, 180) if first <= yaw <= last])
    for yaw in shown:
        parts.append(_text(x(yaw), top + height + 17, f"{yaw:g}°", _anchor(x(yaw)), "soft"))
    for i, (score, line) in enumerate(lines):
        css = "" if score.kind == "model" else " dashed"
        if line[0].subjects > 1 and score.kind == "model":
            above = [f"{x(a):.1f} {y(s.high):.1f}" for a, s in zip(yaws, line, strict=True)]
            below = [f"{x(a):.1f} {y(s.low):.1f}" for a, s in zip(yaws, line, strict=True)]
            parts.append(f'<path class="c{i} band" d="M{"L".join(above + below[::-1])}Z"/>')
        points = [f"{x(a):.1f} {y(s.mean):.1f}" for a, s in zip(yaws, line, strict=True)]
        parts.append(f'<path class="c{i} curve{css}" d="M{"L".join(points)}"/>')
        for a, s in zip(yaws, line, strict=True):
            about = f"{score.name} at {a:g}°: {s.mean:.{measure.digits}f}"
            about += _interval(s, measure.digits)
            parts.append(
                f'<circle class="c{i}" cx="{x(a):.1f}" cy="{y(s.mean):.1f}" r="3.5">'
                f"<title>{html.escape(about)}</title></circle>"
            )
    legend = "".join(
        f'<span><i class="c{i}"></i>{html.escape(score.name)}</span>'
        for i, (score, _) in enumerate(lines)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH + 16} {top + height + bottom}" role="img" '
        f'aria-label="{html.escape(measure.label)} over yaw">{"".join(parts)}</svg>'
        f'<p class="legend">{legend}</p>'
    )


def _short(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:29]}…"


def _interval(s, digits: int) -> str:
    if s.subjects < 2:
        return ""
    return f" ({CONFIDENCE} %: {s.low:.{digits}f} to {s.high:.{digits}f})"


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _anchor(x: float) -> str:
    return "start" if x < 14 else "end" if x > WIDTH - 6 else "middle"


def _text(x: float, y: float, words: str, anchor: str, css: str) -> str:
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(words)}</text>"
    )
