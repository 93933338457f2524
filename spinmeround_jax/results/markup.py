"""Pieces of HTML that our pages share."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from spinmeround_jax.photo.images import encoded


def data_uri(image: Image.Image, **options: Any) -> str:
    """The image as WebP, to embed; `options` are Pillow's, such as quality=90."""
    content = encoded(image, "WEBP", **options)
    return "data:image/webp;base64," + base64.b64encode(content).decode()


def table(values: Mapping[str, Any]) -> str:
    """A row for each value; names of nested ones are joined by dots."""
    rows = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else str(key), inner)
        else:
            words = value if isinstance(value, str) else json.dumps(value)
            rows.append(f"<tr><th>{html.escape(name)}</th><td>{html.escape(words)}</td></tr>")

    add("", values)
    return f'<div class="settings"><table>{"".join(rows)}</table></div>'
