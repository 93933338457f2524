"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import pathlib


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Write under a hidden name, then rename: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(directory: pathlib.Path) -> None:
    """Make renames survive a power cut; some network file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
