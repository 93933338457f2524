"""Line charts as inline SVG, and what other charts share with them; styles in `page_style.CHARTS`."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

COLOURS = 6  # classes c0 to c5 of the style sheet
WIDTH = 480  # of a plot, in the units of its drawing


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        points: x and y, finite, in the order of x.
        colour: 0 to COLOURS - 1.
        marks: a tooltip for each point, which gets a dot; none without.
        band: lowest and highest value around each point, drawn as an area; none without.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    marks: Sequence[str] = ()
    band: Sequence[tuple[float, float]] = ()
    dashed: bool = False


def lines(
    label: str, drawn: Sequence[Line], x_ticks: Sequence[tuple[float, str]], log: bool = False
) -> str:
    """A chart with its legend.

    Args:
        label: for screen readers.
        x_ticks: where on the x axis, and their words.
        log: logarithmic y axis; all values must be positive.
    """
    scale = math.log10 if log else float
    values = [y for line in drawn for _, y in line.points]
    values += [y for line in drawn for pair in line.band for y in pair]
    low, high = padded(*(scale(f(values)) for f in (min, max)))
    first, last = (f(x for line in drawn for x, _ in line.points) for f in (min, max))
    left, top, height, bottom = 44, 8, 170, 22

    def x(value: float) -> float:
        return left + (WIDTH - left) * (value - first) / max(last - first, 1e-9)

    def y(value: float) -> float:
        return top + height * (1.0 - (scale(value) - low) / (high - low))

    def path(points: Sequence[tuple[float, float]]) -> str:
        return "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)

    parts = []
    for tick in log_ticks(low, high) if log else ticks(low, high, 4):
        parts.append(f'<path class="line" d="M{left} {y(tick):.1f}H{WIDTH}"/>')
        parts.append(text(left - 6, y(tick) + 4, f"{tick:.6g}", "end", "soft"))
    for value, words in x_ticks:
        parts.append(text(x(value), top + height + 17, words, _anchor(x(value)), "soft"))
    for line in drawn:
        css = f"c{line.colour}"
        if line.band:
            sides = [[(a, pair[i]) for (a, _), pair in zip(line.points, line.band, strict=True)]
                     for i in (0, 1)]  # fmt: skip
            parts.append(f'<path class="{css} band" d="M{path(sides[1] + sides[0][::-1])}Z"/>')
        dashed = " dashed" if line.dashed else ""
        parts.append(f'<path class="{css} curve{dashed}" d="M{path(line.points)}"/>')
        for (a, b), about in zip(line.points, line.marks, strict=bool(line.marks)):
            parts.append(
                f'<circle class="{css}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5">'
                f"<title>{html.escape(about)}</title></circle>"
            )
    legend = "".join(
        f'<span><i class="c{line.colour}"></i>{html.escape(line.name)}</span>' for line in drawn
    )
    return (
        f'<svg viewBox="0 0 {WIDTH + 16} {top + height + bottom}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(parts)}</svg><p class="legend">{legend}</p>'
    )


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


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between 10^low and 10^high; also 2 and 5 times these if there are few."""
    for factors in ((1,), (1, 2, 5), range(1, 10)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        found = [f * 10.0**p for p in powers for f in factors if low <= math.log10(f) + p <= high]
        if len(found) > 2:
            return found
    return ticks(10**low, 10**high, 4)


def padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def text(x: float, y: float, words: str, anchor: str, css: str) -> str:
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(words)}</text>"
    )


def _anchor(x: float) -> str:
    return "start" if x < 14 else "end" if x > WIDTH - 6 else "middle"
