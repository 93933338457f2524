"""The page of a training run: curves, samples, config and changes in one HTML file that loads nothing."""

from __future__ import annotations

import datetime
import html
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax.files import write_atomically
from spinmeround_jax.results import charts, markup
from spinmeround_jax.results.page_style import CHARTS, CSS

NAME = "report.html"
POINTS = 240  # of a curve; more are averaged
MARKED = 40  # points with a dot each
SAMPLES = 8  # grids of each kind, evenly over the steps
SAMPLE_WIDTH = 720  # pixels; larger grids are scaled down, the files keep them

PREVIEWS = {"diffusion": "anchors", "autoencoder": "autoencoder"}  # names of files, by training
DRAWN = (  # heading, names of metrics, logarithmic
    ("Loss", r"loss|rgb|normals", True),
    ("Loss at fixed sigmas <small>dashed: training heads</small>", r"(held_out|train)_[\d.e+-]+", True),
    ("Gap at fixed sigmas <small>held out / training - 1</small>", r"gap_.+", False),
    ("PSNR (dB) <small>dashed: training heads</small>", r".+_psnr_.+", False),
    ("Gradient norm", r"gradient_norm", True),
    ("Learning rate", r"learning_rate", False),
    ("Examples per second", r"examples_per_second", False),
)  # fmt: skip
STYLE = """
details{margin:0}
.grids{display:grid;grid-auto-flow:column;grid-auto-columns:min(100%,400px);gap:14px;overflow-x:auto}
.grids img{width:100%;display:block;border-radius:8px}
"""


def write(
    workdir: pathlib.Path,
    entries: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    changes: Sequence[Mapping[str, Any]],
    goodput: float,
) -> None:
    """Write `workdir/report.html`.

    Args:
        entries: of `RunLog`, the first of which is a start of the command.
        config: of the run, nested.
        changes: as `Checkpoints.history`.
    """
    names = [name for name in PREVIEWS if any(e["name"] == name for e in entries)]
    title = html.escape(f"Training of {config['name']}")
    sections = [
        _article("State", markup.table(_state(names, entries, config, goodput))),
        *(_training(name, entries, workdir) for name in names),
        _article("Changes", _changes(changes)) if changes else "",
        f"<article><details><summary>Config</summary>{markup.table(config)}</details></article>",
    ]
    document = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="spinmeround_jax.train">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{CSS}{CHARTS}{STYLE}</style>
</head>
<body>
<header><h1>{title}</h1><p>As of {time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}.</p></header>
<main>{"".join(sections)}</main>
</body>
</html>
"""
    write_atomically(workdir / NAME, document.encode())


def _article(heading: str, content: str) -> str:
    return f"<article><h2>{html.escape(heading)}</h2>{content}</article>"


def _changes(changes: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><th>from step {int(entry['step']):,}</th><td>{html.escape(entry['change'])}</td></tr>"
        for entry in changes
    )
    return f'<div class="settings"><table>{rows}</table></div>'


def _state(
    names: Sequence[str],
    entries: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    goodput: float,
) -> dict[str, str]:
    steps = {
        "diffusion": sum(stage["steps"] for stage in config["stages"]),
        "autoencoder": config["autoencoder_training"]["steps"],
    }
    state = {}
    for name in names:
        own = [entry for entry in entries if entry["name"] == name]
        state[name] = f"step {own[-1]['step']:,} of {steps[name]:,}"
    latest: dict[str, float] = {}
    for entry in entries:
        if names and entry["name"] == names[0]:
            latest |= entry["metrics"]
    for key, words in (
        ("loss", "{:.4g}"),
        ("examples_per_second", "{:.4g}"),
        ("tflops_per_device", "{:.4g}"),
        ("mfu", "{:.1%} of the peak in bfloat16"),
    ):
        if key in latest:
            state[key.replace("_", " ")] = words.format(latest[key])
    begun = entries[0]["time"]
    since = datetime.timedelta(seconds=max(0, int(time.time() - begun)))
    starts = sum(entry["name"] not in PREVIEWS for entry in entries)
    return {
        **state,
        "goodput": f"{goodput:.1%} of the time since the first start was in steps that were kept",
        "first start": f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(begun))}, {since} ago",
        "starts": str(starts),
    }


def _training(name: str, entries: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> str:
    own = [entry for entry in entries if entry["name"] == name]
    keys = sorted({key for entry in own for key in entry["metrics"]}, key=_in_order)
    plots = []
    for heading, pattern, log in DRAWN:
        if shown := [key for key in keys if re.fullmatch(pattern, key)]:
            plots.append(f"<div><h4>{heading}</h4>{_chart(shown, own, log)}</div>")
    samples = _samples(workdir / "samples", PREVIEWS[name], own[-1]["step"])
    return _article(name.capitalize(), f'<div class="charts">{"".join(plots)}</div>{samples}')


def _in_order(key: str) -> tuple[str, float]:
    """The number at the end of a name counts as one."""
    words, number = re.fullmatch(r"(.*?)([\d.]*)", key).groups()
    try:
        return words, float(number)
    except ValueError:
        return key, 0.0


def _chart(keys: Sequence[str], entries: Sequence[Mapping[str, Any]], log: bool) -> str:
    groups: list[str] = []  # held out and training heads have one colour
    drawn = []
    for key in keys:
        group = re.sub("held_out|train", "", key)
        groups += [] if group in groups else [group]
        points = _thinned([(e["step"], e["metrics"][key]) for e in entries if key in e["metrics"]])
        name = key.replace("_", " ")
        marks = [f"{name} at step {x:,g}: {y:.4g}" for x, y in points]
        drawn.append(
            charts.Line(
                name,
                points,
                groups.index(group) % charts.COLOURS,
                marks=marks if len(points) <= MARKED else (),
                dashed="train" in key,
            )
        )
    steps = [x for line in drawn for x, _ in line.points]
    ticks = sorted({round(tick) for tick in charts.ticks(min(steps), max(steps), 5)})
    positive = all(y > 0 for line in drawn for _, y in line.points)
    return charts.lines(
        f"{', '.join(line.name for line in drawn)} over steps",
        drawn,
        [(tick, f"{tick:,}") for tick in ticks],
        log and positive,
    )


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points, each the mean of neighbours."""
    parts = np.array_split(np.array(points, float), min(len(points), POINTS))
    return [(float(x), float(y)) for x, y in (part.mean(axis=0) for part in parts)]


def _samples(folder: pathlib.Path, name: str, last: int) -> str:
    """The grids up to step `last`, newest first, each a link to its file."""
    found = [(int(p.stem.rpartition("_")[2]), p) for p in folder.glob(f"{name}_[0-9]*.png")
             if p.stem.rpartition("_")[2].isdecimal()]  # fmt: skip
    found = sorted((step, path) for step, path in found if step <= last)
    shown = np.unique(np.linspace(0, len(found) - 1, min(len(found), SAMPLES)).round().astype(int))
    figures = []
    for step, path in (found[i] for i in reversed(shown)):
        try:
            image = Image.open(path).convert("RGB")
        except OSError:  # cut by a kill, or removed meanwhile
            continue
        image.thumbnail((SAMPLE_WIDTH, 1 << 16), Image.Resampling.LANCZOS)
        about = f"step {step:,}"
        figures.append(
            f'<figure><a href="samples/{path.name}"><img alt="samples at {about}" '
            f'src="{markup.data_uri(image, quality=85)}"></a><figcaption>{about}</figcaption></figure>'
        )
    if not figures:
        return ""
    every = f"{len(figures)} of {len(found)} grids, newest first; each opens its file"
    return f'<h3>Samples <small>{every}</small></h3><div class="grids">{"".join(figures)}</div>'
