"""One self-contained HTML page that shows every head of an output folder."""

from __future__ import annotations

import html
import json
import math
import pathlib
import sys
import urllib.parse
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError, write_atomically
from spinmeround_jax.results import layout, markup
from spinmeround_jax.results.page_style import CSS, SCRIPT
from spinmeround_jax.video import mp4

MAX_TILE = 256  # pixels; the page shows larger views scaled down, the files keep them
MARK = f'<meta name="generator" content="{layout.GENERATOR}">'


class _Unshowable(Exception):
    """A head's folder is damaged; the message is for the page."""


def write_page(out: pathlib.Path) -> pathlib.Path:
    """Write `out/index.html` from the finished heads in `out`; returns its path.

    Heads in damaged folders are left out; the page and stderr name them and the reason.

    Raises:
        InputError: there is an index.html that this program did not write.
    """
    path = out / layout.PAGE
    if path.is_dir() or (path.exists() and MARK not in path.read_text(errors="replace")):
        raise InputError(f"{path}: not written by this program; move it, or choose another --out")
    articles, rules, left_out = [], [], []
    for folder in sorted(out.iterdir()):
        if folder.name.startswith(".") or not (folder / layout.SETTINGS).exists():
            continue
        try:
            article, sheets = _head(folder, len(articles))
        except _Unshowable as error:
            left_out.append(f"{folder.name} ({error})")
            print(f"left out of {path}: {left_out[-1]}", file=sys.stderr)
            continue
        articles.append(article)
        rules += [sheet.rule() for sheet in sheets]
    # File names need not be text: characters that cannot be encoded become question marks.
    document = _document(articles, rules, left_out)
    write_atomically(path, document.encode(errors="replace"))
    return path


def head_page(folder: pathlib.Path) -> str:
    """The page of one finished head, without a heading, for an iframe.

    Raises:
        InputError: the folder is damaged.
    """
    try:
        article, sheets = _head(folder, 0)
    except _Unshowable as error:
        raise InputError(f"{folder}: {error}") from error
    return _document([article], [*(sheet.rule() for sheet in sheets), _FRAMED], None)


# Links to the files beside the page lead nowhere from a frame.
_FRAMED = "main{padding:0}article{margin:0;border:0;border-radius:0}.video{display:none}"

# --------------------------------------------------------------------------------------------------
# Images: tiles of one sheet each, embedded once as the background of a CSS class


class _Sheet:
    """Tiles (n, h, w, 3) uint8 in a nearly square grid, and the HTML that shows one of them."""

    def __init__(self, css_class: str, tiles: np.ndarray):
        self.css_class = css_class
        self.count = len(tiles)
        self.columns = math.ceil(math.sqrt(self.count))
        self.rows = math.ceil(self.count / self.columns)
        height, width = tiles.shape[1:3]
        sheet = np.full((self.rows * height, self.columns * width, 3), 255, np.uint8)
        for i, tile in enumerate(tiles):
            row, column = divmod(i, self.columns)
            sheet[row * height :][:height, column * width :][:, :width] = tile
        self._uri = _data_uri(Image.fromarray(sheet))

    def rule(self) -> str:
        size = f"{100 * self.columns}% {100 * self.rows}%"
        return f".{self.css_class}{{background-image:url({self._uri});background-size:{size}}}"

    def tile(self, index: int, label: str | None) -> str:
        """HTML of one tile; without a label it is hidden from screen readers."""
        row, column = divmod(index, self.columns)
        x = 100 * column / max(self.columns - 1, 1)
        y = 100 * row / max(self.rows - 1, 1)
        about = 'aria-hidden="true"'
        if label is not None:
            label = html.escape(label)
            about = f'role="img" aria-label="{label}" title="{label}"'
        return (
            f'<div class="tile {self.css_class}" {about} '
            f'style="background-position:{x:.4f}% {y:.4f}%"></div>'
        )


def _data_uri(image: Image.Image) -> str:
    small = image.width * image.height <= 1024**2
    return markup.data_uri(image, lossless=small, quality=90)


def _open(path: pathlib.Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # the file can hold anything; the other heads are shown
        file = f"{path.parent.name}/{path.name}"
        raise _Unshowable(f"{file} is {'damaged' if path.exists() else 'missing'}") from error


def _read(paths: list[pathlib.Path]) -> np.ndarray:
    images = []
    for path in paths:
        image = _open(path)
        if image.width > MAX_TILE:
            image = image.resize((MAX_TILE, MAX_TILE), Image.Resampling.BOX)
        images.append(np.asarray(image))
    return np.stack(images)


def _views(folder: pathlib.Path, angles: np.ndarray) -> np.ndarray:
    return _read([folder / layout.view_name(i, pair) for i, pair in enumerate(angles)])


# --------------------------------------------------------------------------------------------------
# HTML


def _head(folder: pathlib.Path, number: int) -> tuple[str, list[_Sheet]]:
    """One <article> and its sheets; `number` keeps their CSS classes apart from other heads'.

    Raises:
        _Unshowable: the folder is damaged.
    """
    settings = layout.read_settings(folder)
    if settings is None:
        raise _Unshowable(f"{layout.SETTINGS} is damaged, or not of this program")
    try:
        return _article(folder, settings, number)
    except _Unshowable:
        raise
    except Exception as error:  # the settings can hold anything
        reason = f"{layout.SETTINGS} and the images do not fit together: {error!r}"
        raise _Unshowable(reason) from error


def _article(
    folder: pathlib.Path, settings: dict[str, Any], number: int
) -> tuple[str, list[_Sheet]]:
    trajectory = np.array(settings["trajectory"], np.float32).reshape(-1, 2)
    anchors = np.array(settings["anchor_angles"], np.float32).reshape(-1, 2)
    views = _Sheet(f"h{number}v", _views(folder / "views", trajectory))
    normals = _Sheet(f"h{number}n", _views(folder / "normals", trajectory))
    anchor_views = _Sheet(f"h{number}a", _views(folder / "anchors", anchors))
    anchor_normals = _Sheet(f"h{number}b", _views(folder / "anchors_normals", anchors))
    sheets = [views, normals, anchor_views, anchor_normals]

    inputs = []
    for i, angles in enumerate(settings["observed_angles"]):
        name = layout.observed_name(i)
        pair = _Sheet(
            f"h{number}i{i}", _read([folder / f"{name}.png", folder / f"{name}_normals.png"])
        )
        sheets.append(pair)
        caption = "input" if len(settings["observed_angles"]) == 1 else f"input at {_label(angles)}"
        inputs.append(_figure(pair.tile(0, caption), caption))
        inputs.append(_figure(pair.tile(1, "its normals"), "its normals, estimated"))

    name = html.escape(folder.name)
    labels = html.escape(json.dumps([_label(pair) for pair in trajectory]))
    sections = [
        f"<h2>{name}</h2>",
        '<div class="top">',
        f'<div class="inputs">{"".join(inputs)}</div>' if inputs else "",
        f'<div class="spin" data-labels="{labels}" data-columns="{views.columns}"'
        f' data-rows="{views.rows}">'
        f'<div class="stage">{views.tile(0, None)}{normals.tile(0, None)}</div>'
        f'<div class="bar"><button type="button" aria-label="play">▶</button>'
        f'<input type="range" min="0" max="{views.count - 1}" value="0"'
        f' aria-label="view of {name}" aria-valuetext="{_label(trajectory[0])}">'
        # The slider announces the view; while playing, this would be read out ten times a second.
        f'<output aria-live="off">{_label(trajectory[0])}</output></div></div>',
        "</div>",
        _video(folder),
        _photo(folder, settings),
        f"<h3>Anchors <small>{len(anchors)} views sampled together</small></h3>",
        _rows([anchor_views, anchor_normals], [_label(pair) for pair in anchors]),
    ]
    if settings.get("truth_angles"):
        sampled = [(trajectory, views, normals), (anchors, anchor_views, anchor_normals)]
        truth, sheet = _truth(folder, settings, number, sampled)
        sheets.append(sheet)
        sections.append(truth)
    if settings.get("likeness"):
        sections.append(_likeness(settings["likeness"], trajectory))
    sections += [
        f"<details open><summary>All {views.count} views</summary>",
        '<div class="grid">',
        *(views.tile(i, _label(pair)) for i, pair in enumerate(trajectory)),
        "</div></details>",
        f"<details><summary>All {views.count} normal maps</summary>",
        '<div class="grid">',
        *(normals.tile(i, _label(pair)) for i, pair in enumerate(trajectory)),
        "</div></details>",
        f"<details><summary>Settings</summary>{_table(settings)}</details>",
    ]
    return f"<article>{''.join(sections)}</article>", sheets


def _video(folder: pathlib.Path) -> str:
    if not (folder / mp4.NAME).is_file():
        return ""
    link = urllib.parse.quote(f"{folder.name}/{mp4.NAME}", errors="replace")
    return f'<p class="video"><a href="{link}">Video (MP4)</a></p>'


def _photo(folder: pathlib.Path, settings: dict[str, Any]) -> str:
    """Face, crop and mask of a photo, and the kind of identity; nothing for portraits."""
    if not (folder / layout.PHOTO).is_file():
        return ""
    about = html.escape(f"identity: {settings['identity']}")
    uri = _data_uri(_open(folder / layout.PHOTO))
    return (
        f"<h3>Photo <small>landmarks, crop, mask, portrait; {about}</small></h3>"
        f'<img src="{uri}" alt="photo, crop, mask and portrait" style="max-width:100%">'
    )


def _truth(
    folder: pathlib.Path,
    settings: dict[str, Any],
    number: int,
    sampled: list[tuple[np.ndarray, _Sheet, _Sheet]],
) -> tuple[str, _Sheet]:
    """Known views above the sampled ones at the same angles, if any.

    Args:
        sampled: (n, 2) angles, images and normals; earlier entries are preferred.
    """
    angles = np.array(settings["truth_angles"], np.float32).reshape(-1, 2)
    pixels = np.asarray(_open(folder / "truth.png"))
    side = pixels.shape[1] // len(angles)
    tiles = pixels.reshape(-1, side, len(angles), side, 3).swapaxes(1, 2)
    sheet = _Sheet(f"h{number}t", tiles.reshape(-1, side, side, 3))
    columns = []
    for i, pair in enumerate(angles):
        same = next(
            (
                (int(distance.argmin()), sheets)
                for others, *sheets in sampled
                if (distance := cameras.angular_distance(others, pair)).min() < cameras.SAME_VIEW
            ),
            None,
        )
        cells = []
        for row in range(len(tiles)):
            cells.append(sheet.tile(row * len(angles) + i, f"true, {_label(pair)}"))
            if same is None:
                cells.append('<div class="tile"></div>')
            else:
                nearest, sheets = same
                cells.append(sheets[row].tile(nearest, f"sampled, {_label(pair)}"))
        columns.append(_figure("".join(cells), _label(pair)))
    heading = "<h3>Truth <small>true views, and the sampled ones below them</small></h3>"
    return f'{heading}<div class="row">{"".join(columns)}</div>', sheet


def _likeness(likeness: dict[str, Any], trajectory: np.ndarray) -> str:
    """Plot over yaw of the similarity of the views' faces, from 0 to 1; lower values are at 0."""
    if likeness["mean"] is None:
        return "<h3>Likeness <small>no face was found in any view</small></h3>"
    width, height = 720, 120
    dots = []
    for angles, cosine in zip(trajectory, likeness["views"], strict=True):
        if cosine is not None:
            x = width * ((float(angles[0]) + 180.0) % 360.0) / 360.0
            y = height * (1.0 - min(max(float(cosine), 0.0), 1.0))
            title = html.escape(f"{_label(angles)}: {cosine:.2f}")
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>')
    note = (
        f"similarity of faces to the input's, {likeness['mean']:.2f} on average over the "
        f"{int(likeness['faces'])} of {len(trajectory)} views with a face"
    )
    lines = "".join(f'<path d="M0 {height * i / 2:g}H{width}"/>' for i in range(3))
    return (
        f'<h3>Likeness <small>{note}</small></h3><div class="plot">'
        '<div class="scale"><span>1</span><span>0.5</span><span>0</span></div>'
        f'<svg viewBox="-4 -4 {width + 8} {height + 8}" role="img" aria-label="{note}">'
        f"{lines}{''.join(dots)}</svg>"
        '<div class="axis"><span>-180°</span><span>0°</span><span>180°</span></div></div>'
    )


def _rows(sheets: list[_Sheet], labels: list[str]) -> str:
    figures = (
        _figure("".join(sheet.tile(i, label) for sheet in sheets), label)
        for i, label in enumerate(labels)
    )
    return f'<div class="row">{"".join(figures)}</div>'


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _label(angles: Any) -> str:
    yaw, pitch = (round(float(angle), 1) + 0.0 for angle in angles)
    return f"{yaw:+.4g}°" + (f", up {pitch:+.4g}°" if pitch else "") if yaw or pitch else "0°"


def _table(settings: dict[str, Any]) -> str:
    hidden = {
        "generator", "trajectory", "anchor_angles", "observed_angles", "truth_angles", "likeness",
    }  # fmt: skip
    return markup.table({key: value for key, value in settings.items() if key not in hidden})


def _document(articles: list[str], rules: list[str], left_out: list[str] | None) -> str:
    """The page; without a heading if `left_out` is None."""
    count = f"{len(articles)} head{'' if len(articles) == 1 else 's'}"
    notes = "".join(f"<p>left out: {html.escape(note)}</p>" for note in left_out or ())
    heading = f"<header><h1>SpinMeRound</h1><p>{count}. Drag one to turn it.</p>{notes}</header>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>SpinMeRound: {count}</title>
<style>{CSS}{"".join(rules)}</style>
</head>
<body>
{"" if left_out is None else heading}
<main>{"".join(articles) or "<p>Nothing here yet.</p>"}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
