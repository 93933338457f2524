"""The paper's figures, stored as data and never mixed with measurements."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any


def read() -> dict[str, Any]:
    """published.json: "marked" and "source" as sentences, and "tables" with columns and rows."""
    file = importlib.resources.files("spinmeround_jax.evaluation") / "published.json"
    return json.loads(file.read_text(encoding="utf-8"))


def note(protocol: str) -> str:
    """How comparable the results of a protocol are with the paper's."""
    if protocol == "nersemble":
        return (
            "the same cameras; the choice of frames and the crop are ours, the paper states neither"
        )
    return "other people, other images: not to be compared with the figures above"


def text(protocol: str) -> str:
    """All tables in Markdown, marked as published."""
    published = read()
    lines = [f"Published, {published['source']}.", f"These are {published['marked']};"]
    lines[-1] += f" {note(protocol)}."
    for table in published["tables"]:
        lines += ["", f"| {table['title']} (published) | " + " | ".join(table["columns"]) + " |"]
        lines.append("|---" * (len(table["columns"]) + 1) + "|")
        for name, values in table["rows"].items():
            lines.append(f"| {name} | " + " | ".join(f"{value:g}" for value in values) + " |")
    return "\n".join(lines)
