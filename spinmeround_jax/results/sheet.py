"""Labelled grids of square images, for figures and previews."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, MARGIN = 6, 8  # pixels
INK, PAPER, EMPTY = (29, 29, 31), (255, 255, 255), (240, 240, 238)

Tile = np.ndarray | None
"""(h, w, 3) uint8, or None for an empty place."""


def sheet(
    rows: Sequence[Sequence[Tile]],
    labels: Sequence[str],
    headings: Sequence[tuple[str, int]],
    columns: Sequence[str],
    side: int,
) -> Image.Image:
    """Rows of square tiles with their labels at the left.

    Args:
        labels: of rows. columns: of tiles.
        headings: over groups of columns: text and number of columns; a gap separates groups.
        side: pixels of a tile.
    """
    font = ImageFont.load_default(max(11, side // 10))
    line = font.size + 6
    left = MARGIN + max((round(font.getlength(label)) for label in labels), default=0) + 10
    starts, x = [], left
    for _, count in headings:
        starts.append(x)
        x += count * side + 2 * GAP
    top = MARGIN + line * (2 if any(words for words, _ in headings) else 1)
    size = (x - 2 * GAP + MARGIN, top + len(rows) * (side + GAP) - GAP + MARGIN)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    place = [
        s + i * side for s, (_, count) in zip(starts, headings, strict=True) for i in range(count)
    ]
    for (words, count), start in zip(headings, starts, strict=True):
        draw.text((start + count * side / 2, MARGIN), words, INK, font, anchor="ma")
    for words, x in zip(columns, place, strict=True):
        draw.text((x + side / 2, top - line + 2), words, INK, font, anchor="ma")
    for i, (label, tiles) in enumerate(zip(labels, rows, strict=True)):
        y = top + i * (side + GAP)
        draw.text((left - 10, y + side / 2), label, INK, font, anchor="rm")
        for x, tile in zip(place, tiles, strict=True):
            if tile is None:
                draw.rectangle((x, y, x + side - 1, y + side - 1), EMPTY)
            else:
                how = Image.Resampling.LANCZOS
                picture.paste(Image.fromarray(tile).resize((side, side), how), (x, y))
    return picture


def degrees(yaw: float) -> str:
    return f"{yaw:+g}°" if yaw % 180.0 else f"{yaw:g}°"
