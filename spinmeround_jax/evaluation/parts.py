"""A cache of arrays that an evaluation computes, named by the hash of everything that decides them.

A part is used only if everything that decides it is the same: model, data, settings, seed, subjects,
PROTOCOL_VERSION, JAX and the device. Nothing is ever overwritten; parts that are no longer needed go with
the folder.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from spinmeround_jax import __version__, checkpoints, files

# Increase it with every change of sampling, of a measure or of a protocol that changes numbers.
PROTOCOL_VERSION = 1
MAX_BYTES = 1 << 32  # of a part


class Parts:
    """The parts in `directory`; `common` describes what all of them depend on."""

    def __init__(self, directory: pathlib.Path, common: Mapping[str, Any]):
        self.directory = directory
        self.common = {"environment": environment(), **common}

    def get(self, decided_by: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """The arrays of a part; None if they are not there, or the file is damaged."""
        path, about = self._where(decided_by)
        if not path.exists():
            return None
        try:
            content = files.unseal(files.read_bytes(path, MAX_BYTES))
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            if arrays.pop("about").item() != about:
                raise ValueError("it belongs to other inputs")
        except Exception as error:  # the file can hold anything
            print(f"{path}: damaged, computed again ({error})", file=sys.stderr)
            return None
        return arrays

    def make(
        self, decided_by: Mapping[str, Any], make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The arrays of a part, computed and kept if they are not there."""
        arrays = self.get(decided_by)
        if arrays is None:
            arrays = make()
            path, about = self._where(decided_by)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, about=np.array(about), **arrays)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, files.seal(buffer.getvalue()))
        return arrays

    def _where(self, decided_by: Mapping[str, Any]) -> tuple[pathlib.Path, str]:
        about = json.dumps({**self.common, **decided_by}, sort_keys=True)
        return self.directory / f"{hashlib.sha256(about.encode()).hexdigest()[:20]}.npz", about


@functools.cache
def environment() -> dict[str, str]:
    """Versions and devices that results depend on."""
    devices = jax.devices()
    return {
        "version": f"{__version__}, protocol {PROTOCOL_VERSION}",
        "jax": jax.__version__,
        "devices": f"{len(devices)} {devices[0].platform} ({devices[0].device_kind})",
    }


def hash_of(path: pathlib.Path) -> str:
    """SHA-256 of a model folder: all its files and their names, but the card, which people may edit.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    card = path / checkpoints.CARD
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p != card):
        digest.update(f"{file.relative_to(path)}\n{files.sha256(file)}\n".encode())
    return digest.hexdigest()


def stamp_of(folder: pathlib.Path) -> str:
    """Hash of the names, sizes and times of a folder's files: data too large to be read twice.

    In the folder of a data set others write, too: pages of `validate`, latents, indexes made again.
    There only manifest and shards count.
    """
    if (folder / "manifest.json").is_file():
        found = [folder / "manifest.json", *sorted(folder.glob("*.tfrecord"))]
    else:
        found = sorted(p for p in folder.rglob("*") if p.is_file())
    about = [(str(p.relative_to(folder)), p.stat().st_size, files.version(p)) for p in found]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
