"""`manifest.json`: what a data set holds, and the names of its shards."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from spinmeround_jax import cameras, schema
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
    manifest = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **mapping}))
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
        manifest = schema.read(path, schema.record({}), max_bytes=1 << 30)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; {directory} is no finished data set, write one with data_prep"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{error}; write it again (manifest.json)") from error
    _check_manifest(manifest, path)
    return manifest


def told_to_weights(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the provenance of weights says of the data that they were trained on.

    data: where it comes from. recogniser: name and sha256 of what made its identities. framing: how
    heads stand in it, of `photo.pose.FRAMINGS`. The last two tell `sample` what to make of photos.
    """
    names = ("source", "license", "seed", "image_size", "views")
    return {
        "data": {name: manifest[name] for name in names if name in manifest},
        "recogniser": manifest.get("identity"),
        "framing": manifest.get("framing", "canonical"),
    }


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


def _check_manifest(manifest: Mapping[str, Any], path: pathlib.Path) -> None:
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise InputError(version_message(str(path), manifest.get("schema_version")))
    try:
        _MANIFEST(manifest, "")
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


_SHARD = schema.record(
    {
        "file": schema.text(r"(?!\.{1,2}$)[^/\\]+", longest=255),  # stays in this folder
        "subjects": schema.integer(0),
    },
    {"bytes": schema.integer(0), "sha256": schema.text("[0-9a-f]{64}|")},
)
_MANIFEST = schema.record(
    {
        "image_size": schema.integer(1, 1 << 16),
        "views": schema.integer(1, 1 << 20),
        "seed": schema.integer(),
        "source": schema.text(),
        "license": schema.text(),
        "splits": schema.mapping(schema.array(_SHARD)),
    },
    {"split_views": schema.mapping(schema.integer(1, 1 << 20))},
)
