"""The files that a mesh names: materials, textures, buffers, as other machines' programs write names."""

from __future__ import annotations

import pathlib
import re

from spinmeround_jax.files import InputError, composed


def find(mesh: pathlib.Path, name: str) -> pathlib.Path:
    """The file that the one at `mesh` calls `name`.

    Backslashes divide folders, quotes do not count, the case may differ. Of an absolute path, or one
    that leads nowhere, the last part is looked for beside the mesh and in `textures`, there or one
    folder up. Nothing is read from further up.

    Raises:
        InputError: there is none, or several differ in case only.
    """
    cleaned = name.strip().strip("\"'").strip().replace("\\", "/")
    steps = [step for step in cleaned.split("/") if step not in ("", ".")]
    if steps:
        places = [[*steps[:-1]]] if not re.match(r"/|[A-Za-z]:", cleaned) else []
        places = [place for place in places if place.count("..") <= 1]
        for place in (*places, [], ["textures"], ["..", "textures"]):
            found = _walk(mesh, name, [*place, steps[-1]])
            if found is not None and found.is_file():
                return found
    raise InputError(
        f"{mesh}: it needs the file {name.strip()!r}, which is not there; put it beside the mesh"
    )


def _walk(mesh: pathlib.Path, name: str, steps: list[str]) -> pathlib.Path | None:
    at = mesh.parent
    for step in steps:
        if step == "..":
            at = at.resolve().parent
            continue
        if not at.is_dir():
            return None
        entries = [entry for entry in at.iterdir() if _folded(entry.name) == _folded(step)]
        exact = [entry for entry in entries if entry.name == step]
        if not entries:
            return None
        if len(entries) > 1 and not exact:
            raise InputError(
                f"{mesh}: {name.strip()!r} may be {' or '.join(sorted(e.name for e in entries))}; "
                "rename the other"
            )
        at = (exact or entries)[0]
    return at


def _folded(name: str) -> str:
    return composed(name).casefold()
