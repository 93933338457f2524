"""One self-contained HTML page with every head of an output folder: nothing to load but itself."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax import outputs
from spinmeround_jax.view_groups import SAME_VIEW, angular_distance

PAGE = "index.html"
MAX_TILE = 256  # pixels; the page shows larger views scaled down, the files keep them
MARK = f'<meta name="generator" content="{outputs.GENERATOR}">'


def write_page(out: pathlib.Path) -> pathlib.Path:
    """Write `out/index.html` from the finished heads in `out`; returns its path.

    Raises:
        outputs.OutputError: there is an index.html that was not written here.
    """
    path = out / PAGE
    if path.exists() and MARK not in path.read_text(errors="replace"):
        raise outputs.OutputError(
            f"{path}: not written by this program; move it, or choose another --out"
        )
    heads = []
    for folder in sorted(out.iterdir()):
        hidden = folder.name.startswith(".")
        settings = None if hidden else outputs.read_settings(folder)
        if settings is not None:
            heads.append(_head(folder, settings, len(heads)))
    partial = out / f".{PAGE}.partial"
    partial.write_text(_document(heads), encoding="utf-8")
    partial.replace(path)
    return path


# --------------------------------------------------------------------------------------------------
# Pictures: views are tiles of one sheet each, embedded once as the background of a CSS class


class _Sheet:
    """Tiles (n, h, w, 3) uint8 in a nearly square grid, and how to show one of them."""

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

    def tile(self, index: int, label: str, extra: str = "") -> str:
        row, column = divmod(index, self.columns)
        x = 100 * column / max(self.columns - 1, 1)
        y = 100 * row / max(self.rows - 1, 1)
        return (
            f'<div class="tile {self.css_class} {extra}" role="img" '
            f'aria-label="{html.escape(label)}" title="{html.escape(label)}" '
            f'style="background-position:{x:.4f}% {y:.4f}%"></div>'
        )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    small = image.width * image.height <= 1024**2
    image.save(buffer, "WEBP", lossless=small, quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _read(paths: list[pathlib.Path]) -> np.ndarray:
    images = []
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if image.width > MAX_TILE:
                image = image.resize((MAX_TILE, MAX_TILE), Image.Resampling.BOX)
            images.append(np.asarray(image))
    return np.stack(images)


def _views(folder: pathlib.Path, angles: np.ndarray) -> np.ndarray:
    return _read([folder / outputs.view_name(i, pair) for i, pair in enumerate(angles)])


# --------------------------------------------------------------------------------------------------
# HTML


def _head(folder: pathlib.Path, settings: dict[str, Any], number: int) -> str:
    """One <article>; `number` makes its CSS classes its own."""
    trajectory = np.array(settings["trajectory"], np.float32).reshape(-1, 2)
    anchors = np.array(settings["anchor_angles"], np.float32).reshape(-1, 2)
    views = _Sheet(f"h{number}v", _views(folder / "views", trajectory))
    normals = _Sheet(f"h{number}n", _views(folder / "normals", trajectory))
    anchor_views = _Sheet(f"h{number}a", _views(folder / "anchors", anchors))
    anchor_normals = _Sheet(f"h{number}b", _views(folder / "anchors_normals", anchors))
    sheets = [views, normals, anchor_views, anchor_normals]

    inputs = []
    for i, angles in enumerate(settings["observed_angles"]):
        name = outputs.observed_name(i)
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
        f'<div class="stage">{views.tile(0, f"{folder.name}, view")}'
        f"{normals.tile(0, f'{folder.name}, normals')}</div>"
        f'<div class="bar"><button type="button" aria-label="play or pause">▶</button>'
        f'<input type="range" min="0" max="{views.count - 1}" value="0"'
        f' aria-label="view of {name}">'
        f"<output>{_label(trajectory[0])}</output></div></div>",
        "</div>",
        f"<h3>Anchors <small>{len(anchors)} views sampled together</small></h3>",
        _rows([anchor_views, anchor_normals], [_label(pair) for pair in anchors]),
    ]
    if settings.get("truth_angles"):
        truth, sheet = _truth(folder, settings, number, views, normals, trajectory)
        sheets.append(sheet)
        sections.append(truth)
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
    rules = "".join(sheet.rule() for sheet in sheets)
    return f"<style>{rules}</style><article>{''.join(sections)}</article>"


def _truth(
    folder: pathlib.Path,
    settings: dict[str, Any],
    number: int,
    views: _Sheet,
    normals: _Sheet,
    trajectory: np.ndarray,
) -> tuple[str, _Sheet]:
    """Known views above the sampled ones at the same angles, where there are any."""
    angles = np.array(settings["truth_angles"], np.float32).reshape(-1, 2)
    with Image.open(folder / "truth.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    side = pixels.shape[1] // len(angles)
    tiles = pixels.reshape(-1, side, len(angles), side, 3).swapaxes(1, 2)
    sheet = _Sheet(f"h{number}t", tiles.reshape(-1, side, side, 3))
    columns = []
    for i, pair in enumerate(angles):
        distance = angular_distance(trajectory, pair)
        nearest = int(distance.argmin())
        cells = []
        for row, made in enumerate([views, normals][: len(tiles)]):
            cells.append(sheet.tile(row * len(angles) + i, f"true, {_label(pair)}"))
            if distance[nearest] < SAME_VIEW:
                cells.append(made.tile(nearest, f"sampled, {_label(pair)}"))
            else:
                cells.append('<div class="tile"></div>')
        columns.append(_figure("".join(cells), _label(pair)))
    heading = "<h3>Truth <small>each true view, and below it the sampled one</small></h3>"
    return f'{heading}<div class="row">{"".join(columns)}</div>', sheet


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
    hidden = {"generator", "trajectory", "anchor_angles", "observed_angles", "truth_angles"}
    rows = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}", inner)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            rows.append(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>")

    for key, value in settings.items():
        if key not in hidden:
            add(key, value)
    return f'<div class="settings"><table>{"".join(rows)}</table></div>'


def _document(heads: list[str]) -> str:
    count = f"{len(heads)} head{'' if len(heads) == 1 else 's'}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>SpinMeRound: {count}</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>SpinMeRound</h1><p>{count}. Drag one to turn it.</p></header>
<main>{"".join(heads) or "<p>Nothing here yet.</p>"}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


CSS = """
:root{color-scheme:light dark;--page:#f6f5f2;--card:#fff;--ink:#1d1d1f;--soft:#6e6e73;
--line:#e3e1dc;--accent:#3d6fb4}
@media(prefers-color-scheme:dark){:root{--page:#131417;--card:#1c1e22;--ink:#ececee;--soft:#9a9aa2;
--line:#2e3136;--accent:#86b1ee}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header,main{max-width:1080px;margin:auto;padding:0 20px}
header{padding-top:40px}
h1{margin:0;font-size:2rem;letter-spacing:-.02em}
header p{margin:0 0 20px;color:var(--soft)}
article{background:var(--card);border:1px solid var(--line);border-radius:18px;padding:24px;
margin:0 0 28px}
h2{margin:0 0 16px;font-size:1.25rem;overflow-wrap:anywhere}
h3{margin:26px 0 8px;font-size:1rem}
small{color:var(--soft);font-weight:400;font-size:.85rem;margin-left:6px}
.tile{width:100%;aspect-ratio:1;background-repeat:no-repeat;border-radius:8px;
background-color:var(--line);box-shadow:inset 0 0 0 1px var(--line)}
.top{display:flex;gap:28px;align-items:flex-start}
.inputs{display:grid;gap:10px;width:150px;flex:none;max-height:440px;overflow:auto}
.spin{flex:1;min-width:0;max-width:840px}
.stage{display:grid;grid-template-columns:1fr 1fr;gap:12px;cursor:grab;touch-action:pan-y;
user-select:none}
.stage:active{cursor:grabbing}
.stage .tile{border-radius:14px}
.bar{display:flex;gap:12px;align-items:center;margin-top:12px}
.bar input{flex:1;min-width:0;accent-color:var(--accent)}
.bar output{width:7.5em;text-align:right;color:var(--soft);font-variant-numeric:tabular-nums}
.bar button{width:34px;height:34px;border:1px solid var(--line);border-radius:50%;background:none;
color:var(--ink);cursor:pointer;font-size:12px;line-height:1}
figure{margin:0}
figure .tile+.tile{margin-top:6px}
figcaption{margin-top:3px;color:var(--soft);font-size:.8rem;text-align:center;
font-variant-numeric:tabular-nums}
.row{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(84px,1fr);gap:8px;overflow-x:auto}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(72px,1fr));gap:6px;margin-top:10px}
details{margin-top:20px}
summary{cursor:pointer;font-weight:600}
.settings{overflow-x:auto;margin-top:10px}
table{border-collapse:collapse;font-size:.85rem}
th,td{text-align:left;vertical-align:top;padding:3px 18px 3px 0;border-bottom:1px solid var(--line);
font-weight:400;overflow-wrap:anywhere}
th{color:var(--soft);white-space:nowrap}
@media(max-width:680px){.top{flex-direction:column}.inputs{width:100%;grid-template-columns:1fr 1fr}
.spin{width:100%}}
"""

SCRIPT = """
for (const spin of document.querySelectorAll('.spin')) {
  const labels = JSON.parse(spin.dataset.labels), count = labels.length;
  const columns = +spin.dataset.columns, rows = +spin.dataset.rows;
  const [stage, bar] = spin.children, [button, slider, output] = bar.children;
  let playing = false, visible = false, last = 0, frame = 0;
  const show = (index) => {
    index = ((Math.round(index) % count) + count) % count;
    const x = 100 * (index % columns) / Math.max(columns - 1, 1);
    const y = 100 * Math.floor(index / columns) / Math.max(rows - 1, 1);
    for (const tile of stage.children) tile.style.backgroundPosition = `${x}% ${y}%`;
    slider.value = index;
    output.textContent = labels[index];
  };
  const step = (now) => {
    if (!playing || !visible) return;
    if (now - last > 5000 / count) { last = now; show(+slider.value + 1); }
    frame = requestAnimationFrame(step);
  };
  const run = () => { cancelAnimationFrame(frame); frame = requestAnimationFrame(step); };
  const play = (on) => {
    playing = on;
    button.textContent = on ? '❚❚' : '▶';
    run();
  };
  new IntersectionObserver(([entry]) => {
    visible = entry.isIntersecting;
    run();
  }).observe(stage);
  button.onclick = () => play(!playing);
  slider.oninput = () => { play(false); show(+slider.value); };
  let from = null;
  stage.onpointerdown = (event) => {
    play(false);
    stage.setPointerCapture(event.pointerId);
    from = [event.clientX, +slider.value];
  };
  stage.onpointermove = (event) => {
    if (from) show(from[1] - (event.clientX - from[0]) * count / stage.clientWidth);
  };
  stage.onpointerup = stage.onpointercancel = () => { from = null; };
  play(!matchMedia('(prefers-reduced-motion: reduce)').matches);
}
"""
