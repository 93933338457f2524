"""`manifest.json`: what a data set holds, and the names of its shards."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from spinmeround_jax.files import write_atomically
from spinmeround_jax.records import SCHEMA_VERSION, RecordError, version_message


def shard_name(split: str, shard: int, count: int) -> str:
    """E.g. train-00000-of-00008.tfrecord."""
    return f"{split}-{shard:05d}-of-{count:05d}.tfrecord"


def write_manifest(directory: str | os.PathLike[str], mapping: Mapping[str, Any]) -> None:
    """Write manifest.json atomically; `schema_version` is added.

    `mapping` needs image_size, views and seed (int), source and license (str), and
    splits = {split: [{"file": name of a shard in this folder, "subjects": count}, ...]}. Further
    entries are kept.

    Raises:
        RecordError: naming the entry that is missing or malformed.
    """
    path = pathlib.Path(directory) / "manifest.json"
    manifest = {"schema_version": SCHEMA_VERSION, **mapping}
    _check_manifest(manifest, path)
    write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked content of manifest.json.

    Raises:
        RecordError: no manifest, not JSON, a missing or malformed entry, another schema version.
    """
    path = pathlib.Path(directory) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(
            f"{path}: no such file; {directory} is no finished data set, write one with data_prep"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: unreadable ({error}); write it again") from error
    _check_manifest(manifest, path)
    return manifest


def _check_manifest(manifest: Any, path: pathlib.Path) -> None:
    if not isinstance(manifest, dict):
        raise RecordError(f"{path}: expected a JSON object")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(version_message(str(path), manifest.get("schema_version")))
    for name, kind in (
        ("image_size", int),
        ("views", int),
        ("seed", int),
        ("source", str),
        ("license", str),
        ("splits", dict),
    ):
        value = manifest.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise RecordError(f"{path}: {name!r} must be {kind.__name__}, got {value!r}")
    if min(manifest["image_size"], manifest["views"]) < 1:
        raise RecordError(f"{path}: image_size and views must be positive")
    for split, shards in manifest["splits"].items():
        if not isinstance(shards, list):
            raise RecordError(f"{path}: split {split!r} must be a list of shards")
        for shard in shards:
            if (
                not isinstance(shard, dict)
                or not isinstance(shard.get("file"), str)
                or not isinstance(shard.get("subjects"), int)
                or pathlib.PurePath(shard["file"]).name != shard["file"]  # stays in this folder
            ):
                raise RecordError(
                    f"{path}: split {split!r} lists {shard!r}, "
                    'expected {"file": name in this folder, "subjects": count}'
                )
