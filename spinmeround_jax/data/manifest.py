"""`manifest.json`: the description of a data set, and the names of its shards."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spinmeround_jax import cameras, schema
from spinmeround_jax.data import shards
from spinmeround_jax.data.records import SCHEMA_VERSION, version_message
from spinmeround_jax.files import InputError, as_path, write_atomically

if TYPE_CHECKING:  # the config imports the networks, which worker processes do not need
    from spinmeround_jax.config import Config


def shard_name(split: str, shard: int, count: int) -> str:
    """E.g. train-00000-of-00008.tfrecord."""
    return f"{split}-{shard:05d}-of-{count:05d}.tfrecord"


def write_manifest(directory: str | os.PathLike[str], mapping: Mapping[str, Any]) -> None:
    """Write manifest.json atomically.

    `mapping` needs image_size, views and seed (int), source and license (str), and
    splits = {split: [{"file": name of a shard in this folder, "subjects": count}, ...]}. Further
    entries are kept. `schema_version` is added and, from the shards' indexes, `bytes` and `sha256` of each
    shard, `counts` of each split, and the range of the `cameras`.

    Raises:
        InputError: naming the entry that is missing or malformed.
    """
    path = as_path(directory) / "manifest.json"
    manifest = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **mapping}))
    _check_manifest(manifest, path)
    manifest |= _from_indexes(path.parent, manifest["splits"])
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
            f"{path}: no such file; {directory} is not a finished data set, write one with data_prep"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{error}; write it again (manifest.json)") from error
    _check_manifest(manifest, path)
    return manifest


def provenance_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that goes into the provenance of weights trained on the data set.

    data: where it comes from. recogniser: name and sha256 of the face recogniser of its identities.
    framing: crop of the heads, a key of `photo.pose.FRAMINGS`. `sample` prepares photos by the last two.
    """
    names = ("source", "license", "seed", "image_size", "views")
    return {
        "data": {name: manifest[name] for name in names if name in manifest},
        "recogniser": manifest.get("identity"),
        "framing": manifest.get("framing", "canonical"),
    }


def training_provenance(
    config: Config, steps: int, history: list[dict[str, Any]]
) -> dict[str, Any]:
    """Provenance of the weights of a run after `steps` steps."""
    try:
        manifest = read_manifest(config.data.directory)
    except (InputError, OSError):  # the data were moved
        manifest = {}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": config.seed,
        "steps": steps,
        "history": history,
        **provenance_of(manifest),
        "sampling": dataclasses.asdict(config.sampling),
        "ablation": dataclasses.asdict(config.ablation),
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
    }


def views_of(manifest: Mapping[str, Any], split: str) -> int:
    """Records of each subject in a split."""
    return manifest.get("split_views", {}).get(split, manifest["views"])


def _from_indexes(
    directory: pathlib.Path, splits: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Entries `splits`, `counts` and `cameras`; shards that do not exist (yet) add nothing."""
    found: dict[str, Any] = {"splits": {}, "counts": {}}
    angles = []
    for split, entries in splits.items():
        indexed = [{**entry, **shards.metadata(directory / entry["file"])} for entry in entries]
        for entry in indexed:
            if "bytes" in entry and shards.is_complete(path := directory / entry["file"]):
                index = shards.read_index(path)
                angles.append(np.reshape(cameras.yaw_pitch(index.world_to_camera), (2, -1)))
        found["splits"][split] = indexed
        found["counts"][split] = {
            "shards": len(entries),
            "subjects": sum(entry["subjects"] for entry in entries),
            "bytes": sum(entry.get("bytes", 0) for entry in indexed),
        }
    if angles:
        yaw, pitch = (
            [round(float(limit), 3) for limit in (values.min(), values.max())]
            for values in np.concatenate(angles, axis=1)
        )
        found["cameras"] = {"yaw": yaw, "pitch": pitch}
    return found


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
