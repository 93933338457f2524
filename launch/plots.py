"""Plots with logarithmic axes, as SVG."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from html import escape

from launch import chips

WIDTH, HEIGHT, MARGIN = 640, 400, 60
COLOURS = ("#c33", "#36c", "#393", "#a60")


@dataclasses.dataclass(frozen=True)
class Point:
    """Of a roofline: intensity in FLOPs per byte of HBM, rate in FLOP/s of one chip."""

    label: str
    chip: str
    intensity: float
    rate: float


class _Axes:
    """Both from and to the given powers of `base`; parts are added in units of the data."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], titles: tuple[str, str]):
        self._x, self._y = x, y
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
            f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(titles[0])}</text>'
            f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" '
            f'text-anchor="middle">{escape(titles[1])}</text>'
        ]

    def x(self, value: float) -> float:
        low, high = self._x
        return MARGIN + (math.log10(value) - low) / (high - low) * (WIDTH - 2 * MARGIN)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - MARGIN - (math.log10(value) - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    def ticks(self, x: Mapping[float, str], y: Mapping[float, str]) -> None:
        for value, text in x.items():
            self.text(value, None, text, 'text-anchor="middle"', down=HEIGHT - MARGIN + 18)
        for value, text in y.items():
            self.parts.append(
                f'<path d="M{MARGIN} {self.y(value):.1f}H{WIDTH - MARGIN}" stroke="#eee"/>'
                f'<text x="{MARGIN - 6}" y="{self.y(value) + 4:.1f}" text-anchor="end">{text}</text>'
            )

    def line(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        shape = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        self.parts.append(f'<polyline points="{shape}" fill="none" stroke="{colour}"/>')

    def dot(self, a: float, b: float, colour: str) -> None:
        self.parts.append(
            f'<circle cx="{self.x(a):.1f}" cy="{self.y(b):.1f}" r="4" fill="{colour}"/>'
        )

    def text(self, a: float, b: float | None, text: str, style: str = "", down: float = 0) -> None:
        """`down`: pixels below the point, or from the top where there is no `b`."""
        y = down if b is None else self.y(b) + down
        self.parts.append(f'<text x="{self.x(a):.1f}" y="{y:.1f}" {style}>{escape(text)}</text>')

    def write(self, path: pathlib.Path) -> None:
        path.write_text("".join(self.parts) + "</svg>\n")


def roofline(points: Sequence[Point], path: pathlib.Path) -> None:
    """Needed FLOP/s against FLOPs per byte, under the roofs of their chips."""
    axes = _Axes((-1, 3.5), (11, 15.2), ("FLOPs per byte of HBM", "TFLOP/s per chip"))
    axes.ticks(
        {10.0**n: f"{10.0**n:g}" for n in range(-1, 4)},
        {10.0**n: f"{10.0 ** (n - 12):g}" for n in range(11, 16)},
    )
    for name in sorted({point.chip for point in points}):
        chip = chips.CHIPS[name]
        knee = chip.flops / chip.bandwidth
        axes.line([(0.1, 0.1 * chip.bandwidth), (knee, chip.flops), (3000, chip.flops)], "#888")
        axes.text(900, chip.flops, name, 'fill="#666"', down=-5)
    for point in points:
        axes.dot(point.intensity, point.rate, COLOURS[0])
        axes.text(point.intensity, point.rate, point.label, 'dx="7"', down=12)
    axes.write(path)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], titles: tuple[str, str], path: pathlib.Path
) -> None:
    """Lines by name, of (x, y) above zero each; x are marked as they are, y by powers of ten."""
    xs = sorted({x for line in lines.values() for x, _ in line})
    ys = [y for line in lines.values() for _, y in line]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    span = math.log10(xs[0]), math.log10(xs[-1])
    axes = _Axes(
        (span[0] - 0.05, max(span[1], span[0] + 0.1) + 0.05), (low, max(high, low + 1)), titles
    )
    axes.ticks({x: f"{x:g}" for x in xs}, {10.0**n: f"{10.0**n:g}" for n in range(low, high + 1)})
    for (name, line), colour in zip(lines.items(), COLOURS, strict=False):
        axes.line(line, colour)
        for x, y in line:
            axes.dot(x, y, colour)
        axes.text(*line[0], name, f'fill="{colour}" dx="8"', down=-7)
    axes.write(path)
