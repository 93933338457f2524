"""`manifest.json`: what a data set holds, and the names of its shards."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from spinmeround_jax import cameras
from spinmeround_jax.data import shards
from spinmeround_jax.data.records import SCHEMA_VERSION, version_message
from spinmeround_jax.files import InputError, as_path, write_atomically


def shard_name(split: str, shard: int, count: int) -> str:
    """E.g. train-00000-of-00008.tfrecord."""
    return f"{split}-{shard:05d}-of-{count:05d}.tfrecord"


def write_manifest(directory: str | os.PathLike[str], mapping: Mapping[str, Any]) -> None:
    """Write manifest.json atomically.

    `mapping` needs image_size, views and seed (int), source and license (str), and
    splits = {split: [{"file": name of a shard in this folder, "subjects": count}, ...]}. Further
    entries are kept. `schema_version` is added, and what the shards' indexes tell: `bytes` and
    `sha256` of each shard, `counts` of each split, and the range of the `cameras`.

    Raises:
        InputError: naming the entry that is missing or malformed.
    """
    path = as_path(directory) / "manifest.json"
    manifest = {"schema_version": SCHEMA_VERSION, **mapping}
    _check_manifest(manifest, path)
    manifest |= _told_by_indexes(path.parent, manifest["splits"])
    write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked content of manifest.json.

    Raises:
        InputError: no manifest, not JSON, a missing or malformed entry, another schema version.
    """
    path = as_path(directory) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; {directory} is no finished data set, write one with data_prep"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: unreadable ({error}); write it again") from error
    _check_manifest(manifest, path)
    return manifest


def views_of(manifest: Mapping[str, Any], split: str) -> int:
    """Records of each subject in a split."""
    return manifest.get("split_views", {}).get(split, manifest["views"])


def _told_by_indexes(
    directory: pathlib.Path, splits: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Entries `splits`, `counts` and `cameras`; shards that are not (yet) there add nothing."""
    told: dict[str, list[dict[str, Any]]] = {}
    counts, yaws, pitches = {}, [], []
    for split, entries in splits.items():
        told[split] = []
        for entry in entries:
            path = directory / entry["file"]
            told[split].append({**entry, **(facts := shards.facts(path))})
            if facts:
                angles = cameras.yaw_pitch(shards.read_index(path).world_to_camera)
                yaws += [float(angles[0].min()), float(angles[0].max())]
                pitches += [float(angles[1].min()), float(angles[1].max())]
        counts[split] = {
            "shards": len(entries),
            "subjects": sum(entry["subjects"] for entry in entries),
            "bytes": sum(entry.get("bytes", 0) for entry in told[split]),
        }
    entries = {"splits": told, "counts": counts}
    if yaws:
        ranges = {"yaw": yaws, "pitch": pitches}
        entries["cameras"] = {
            name: [round(min(values), 3), round(max(values), 3)] for name, values in ranges.items()
        }
    return entries


def _check_manifest(manifest: Any, path: pathlib.Path) -> None:
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: expected a JSON object")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise InputError(version_message(str(path), manifest.get("schema_version")))
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
            raise InputError(f"{path}: {name!r} must be {kind.__name__}, got {value!r}")
    if min(manifest["image_size"], manifest["views"]) < 1:
        raise InputError(f"{path}: image_size and views must be positive")
    split_views = manifest.get("split_views", {})
    if not isinstance(split_views, dict) or not all(
        type(views) is int and views > 0 for views in split_views.values()
    ):
        raise InputError(
            f"{path}: 'split_views' must give positive numbers of views, got {split_views!r}"
        )
    for split, entries in manifest["splits"].items():
        if not isinstance(entries, list):
            raise InputError(f"{path}: split {split!r} must be a list of shards")
        for shard in entries:
            if (
                not isinstance(shard, dict)
                or not isinstance(shard.get("file"), str)
                or not isinstance(shard.get("subjects"), int)
                or pathlib.PurePath(shard["file"]).name != shard["file"]  # stays in this folder
                or not isinstance(shard.get("bytes", 0), int)
                or not re.fullmatch("[0-9a-f]{64}|", str(shard.get("sha256", "")))
            ):
                raise InputError(
                    f"{path}: split {split!r} lists {shard!r}, "
                    'expected {"file": name in this folder, "subjects": count} and, '
                    'if known, "bytes" and "sha256"'
                )
