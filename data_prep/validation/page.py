"""The page of `data_prep.validate`: statistics, faults, where the cameras stand, some subjects."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.validation.checks import Findings
from spinmeround_jax.photo.images import encoded

MAX_LISTED = 500  # faults; validation.json has all

CSS = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: #287a3c; } .bad { color: #b3261e; }
ol.faults { max-height: 24rem; overflow: auto; font: 13px/1.4 ui-monospace, monospace; }
figure { margin: 0 0 1rem; } img { max-width: 100%; image-rendering: auto; }
svg { background: #8881; } .grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); }
@media (prefers-color-scheme: dark) { .good { color: #7fd494; } .bad { color: #ff8a80; } }
"""


def page(report: dict[str, Any], findings: Sequence[Findings]) -> str:
    """One self-contained HTML document."""
    faults = report["faults"]
    verdict = (
        f'<p class="bad"><b>{len(faults)} fault{"s" * (len(faults) > 1)}</b></p>'
        if faults
        else '<p class="good"><b>No faults.</b></p>'
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name="viewport" content="width=device-width">',
        f"<title>{html.escape(report['directory'])}: validation</title><style>{CSS}</style>",
        f"<h1>{html.escape(report['directory'])}</h1>",
        verdict,
        _fault_list(faults),
    ]
    for split, numbers in report["statistics"].items():
        parts.append(f"<h2>{html.escape(split)}</h2>")
        parts.append(_table(numbers))
        of_split = [found for found in findings if found.task.split == split]
        parts.append(_camera_plot([a for found in of_split for a in found.angles]))
        parts.append('<div class="grid">')
        parts += [_strip(found) for found in of_split if found.pictures]
        parts.append("</div>")
    parts.append("<h2>Manifest</h2>")
    parts.append(_table(report["manifest"]))
    for name in ("shards_without_hash", "unlisted_shards"):
        if report[name]:
            names = ", ".join(map(html.escape, report[name][:50]))
            parts.append(f"<p>{name.replace('_', ' ')} ({len(report[name])}): {names}</p>")
    return "\n".join(parts) + "\n"


def _fault_list(faults: Sequence[str]) -> str:
    if not faults:
        return ""
    items = "".join(f"<li>{html.escape(fault)}</li>" for fault in faults[:MAX_LISTED])
    more = len(faults) - MAX_LISTED
    rest = f"<p>and {more} more, in validation.json</p>" if more > 0 else ""
    return f'<ol class="faults">{items}</ol>{rest}'


def _table(numbers: dict[str, Any]) -> str:
    rows = []
    for name, value in numbers.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        label = html.escape(name.replace("_", " "))
        rows.append(f"<tr><th>{label}<td>{html.escape(str(value))}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _camera_plot(angles: Sequence[tuple[float, float]]) -> str:
    """Every distinct viewpoint as a dot, yaw to the right, pitch up."""
    dots = "".join(
        f'<circle cx="{yaw + 180:.1f}" cy="{90 - pitch:.1f}" r="1.6" fill="#3b74c4"/>'
        for yaw, pitch in sorted({(round(y, 1), round(p, 1)) for y, p in angles})
    )
    return (
        '<figure><svg viewBox="0 0 360 180" width="540" height="270" role="img" '
        'aria-label="where the cameras stand">'
        '<path d="M0 90H360M180 0V180" stroke="#8886"/>'
        f"{dots}</svg><figcaption>Where the cameras stand: yaw from -180 to 180 degrees, "
        "pitch from -90 to 90.</figcaption></figure>"
    )


def _strip(found: Findings) -> str:
    pictures, normals = zip(*found.pictures, strict=True)
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in (pictures, normals)])
    name = html.escape(found.subject)
    marked = f' <span class="bad">{len(found.faults)} faults</span>' if found.faults else ""
    return (
        f'<figure><img loading="lazy" width="{sheet.shape[1]}" alt="views of {name}" '
        f'src="data:image/webp;base64,{base64.b64encode(encoded(sheet, "WEBP", quality=85)).decode()}">'
        f"<figcaption>{name}{marked}</figcaption></figure>"
    )
