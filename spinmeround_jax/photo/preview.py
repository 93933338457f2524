"""An image of how a portrait was made: the photo with landmarks, crop, mask, result."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spinmeround_jax.photo.landmarks import CHAINS
from spinmeround_jax.photo.pose import Square
from spinmeround_jax.photo.prepare import Prepared

_HEIGHT, _CAPTION, _GAP = 420, 26, 8
_PAPER, _INK = (255, 255, 255), (30, 30, 30)
_FOUND, _FITTED, _START, _BOX = (255, 210, 0), (0, 220, 255), (160, 160, 160), (90, 255, 90)


def panels(prepared: Prepared) -> dict[str, Image.Image]:
    """RGB: photo (box, landmarks, fitted landmarks, FFHQ's square, ours), crop, mask, portrait."""
    yaw, pitch = prepared.yaw_pitch
    square = prepared.alignment.head.square
    return {
        f"photo; yaw {yaw:+.0f}, pitch {pitch:+.0f}, roll {square.roll:+.0f}": _photo(prepared),
        "crop": _on_checks(prepared.crop),
        f"mask: {prepared.background}": Image.fromarray(_bytes(prepared.mask)).convert("RGB"),
        "portrait": Image.fromarray(prepared.image),
    }


def draw(prepared: Prepared) -> Image.Image:
    """The `panels` side by side, each with its name above."""
    sized = [
        (caption, panel.resize((max(1, round(panel.width * _HEIGHT / panel.height)), _HEIGHT)))
        for caption, panel in panels(prepared).items()
    ]
    width = sum(panel.width for _, panel in sized) + _GAP * (len(sized) - 1)
    sheet = Image.new("RGB", (width, _HEIGHT + _CAPTION), _PAPER)
    pen, left = ImageDraw.Draw(sheet), 0
    for caption, panel in sized:
        sheet.paste(panel, (left, _CAPTION))
        pen.text((left + 2, 5), caption, fill=_INK, font=ImageFont.load_default(14))
        pen.rectangle(
            [left, _CAPTION, left + panel.width - 1, _CAPTION + _HEIGHT - 1], outline=_START
        )
        left += panel.width + _GAP
    return sheet


def _photo(prepared: Prepared) -> Image.Image:
    """The part of the photo around the squares, with everything drawn on it."""
    alignment = prepared.alignment
    corners = np.concatenate([alignment.start.corners, alignment.head.square.corners])
    low, high = corners.min(axis=0), corners.max(axis=0)
    margin = 0.15 * (high - low).max()
    height, width = prepared.picture.pixels.shape[:2]
    low = np.clip(np.floor(low - margin), 0, [width - 1, height - 1]).astype(int)
    high = np.clip(np.ceil(high + margin), low + 1, [width, height]).astype(int)
    shown = prepared.picture.pixels[low[1] : high[1], low[0] : high[0]]
    scale = 1000 / (high - low).max()
    panel = _on_checks(shown.astype(np.float32) / 255.0)
    panel = panel.resize(tuple(max(1, round(side * scale)) for side in panel.size))
    pen = ImageDraw.Draw(panel)

    def at(points: np.ndarray) -> list[tuple[float, float]]:
        return [tuple(point) for point in (np.asarray(points) - low) * scale]

    def outline(square: Square, colour: tuple[int, int, int], line: int) -> None:
        corners = at(square.corners)
        pen.line([*corners, corners[0]], fill=colour, width=line)

    outline(alignment.start, _START, 3)
    outline(alignment.head.square, _FITTED, 6)
    for number, face in enumerate(prepared.faces, start=1):
        (left, top), (right, bottom) = at(face.box.reshape(2, 2))
        pen.rectangle([left, top, right, bottom], outline=_BOX, width=3)
        pen.text((left + 4, top + 2), str(number), fill=_BOX, font=ImageFont.load_default(28))
    for chain in CHAINS:
        pen.line(at(alignment.head.landmarks[list(chain)]), fill=_FITTED, width=3)
    _dots(pen, at(alignment.landmarks), _FOUND, 7 if len(alignment.landmarks) == 5 else 4)
    return panel


def _dots(
    pen: ImageDraw.ImageDraw,
    points: list[tuple[float, float]],
    colour: tuple[int, int, int],
    radius: float,
) -> None:
    for x, y in points:
        pen.ellipse(
            [x - radius, y - radius, x + radius, y + radius], outline=(0, 0, 0), fill=colour
        )


def _on_checks(values: np.ndarray) -> Image.Image:
    """(h, w, 4) float32 over a chequerboard, so that transparency is seen."""
    rows, columns = np.indices(values.shape[:2]) // max(4, values.shape[0] // 40)
    checks = (0.75 + 0.15 * ((rows + columns) % 2))[..., None]
    return Image.fromarray(
        _bytes(values[..., :3] * values[..., 3:] + checks * (1 - values[..., 3:]))
    )


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(255.0 * np.clip(values, 0.0, 1.0)).astype(np.uint8)
