"""The subjects of a data set, and their views, decoded and composited."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.manifest import read_manifest, views_of
from spinmeround_jax.files import InputError, as_path

_BLOCK = 2**14  # pixels; blocks of this size stay in the processor's cache


class SubjectSource:
    """Random access to the subjects of a split: element i is (index of its shard, row in it).

    Raises:
        InputError: no manifest, no such split, or a shard that is missing, empty, damaged or not as the
            manifest says.
    """

    def __init__(self, directory: str | pathlib.Path, split: str):
        self.directory, self.split = as_path(directory), split
        manifest = read_manifest(directory)
        self.image_size: int = manifest["image_size"]
        stored = manifest["splits"].get(split)
        if not stored:
            raise InputError(
                f"{self.directory / 'manifest.json'}: no shards in split {split!r}; "
                f"it has {', '.join(manifest['splits']) or 'no splits'}"
            )
        self.views: int = views_of(manifest, split)
        self.indexes = [shards.read_index(self.directory / shard["file"]) for shard in stored]
        for shard, index in zip(stored, self.indexes, strict=True):
            if index.offsets.shape != (shard["subjects"], self.views):
                raise InputError(
                    f"{index.path}: holds (subjects, views) {index.offsets.shape}, manifest.json "
                    f"says {(shard['subjects'], self.views)}; write shard and manifest again"
                )
        self._ends = np.cumsum([len(index.subjects) for index in self.indexes])

    def __reduce__(self) -> tuple[Any, ...]:
        return SubjectSource, (
            self.directory,
            self.split,
        )  # worker processes read the indexes themselves

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> tuple[shards.ShardIndex, int]:
        i = range(len(self))[i]
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return self.indexes[shard], i - (int(self._ends[shard - 1]) if shard else 0)


@dataclasses.dataclass(frozen=True)
class Subject:
    """All views of one subject, or chosen ones, decoded; v views."""

    subject: str
    images: np.ndarray  # (v, h, w, 3) float32 in [-1, 1], on white
    normals: np.ndarray  # (v, h, w, 3) float32 in [-1, 1], head's frame, 0 on the background
    alpha: np.ndarray  # (v, h, w) float32 in [0, 1]
    world_to_camera: np.ndarray  # (v, 4, 4) float32, head's frame
    yaw: np.ndarray  # (v,) float32 degrees
    pitch: np.ndarray  # (v,) float32 degrees
    id_embedding: np.ndarray  # (512,) float32, unit length or 0


class HeldOut:
    """The subjects of a split in storage order, for evaluation: `HeldOut(directory).load(i)`."""

    def __init__(self, directory: str | pathlib.Path, split: str = "held_out"):
        self.source = SubjectSource(directory, split)

    def __len__(self) -> int:
        return len(self.source)

    def angles(self, i: int) -> np.ndarray:
        """(V, 2) yaw and pitch in degrees of all views of subject `i`; decodes no image."""
        index, row = self.source[i]
        return np.stack(cameras.yaw_pitch(index.world_to_camera[row]), axis=-1)

    def load(self, i: int, views: Sequence[int] | None = None) -> Subject:
        """Subject `i` with the listed views, in that order, or with all views.

        Raises:
            IndexError: no such subject or view.
            InputError: the stored data is damaged.
        """
        index, row = self.source[i]
        wanted = range(self.source.views) if views is None else views
        chosen = [range(self.source.views)[view] for view in wanted]
        found, rgba, normals = read_views(index, row, chosen, self.source.image_size)
        images, alpha = composite(rgba, np.ones(3))
        return Subject(
            subject=found[0].subject,
            images=images,
            normals=normals,
            alpha=alpha,
            world_to_camera=np.stack([record.world_to_camera for record in found]),
            yaw=np.array([record.yaw for record in found], np.float32),
            pitch=np.array([record.pitch for record in found], np.float32),
            id_embedding=found[0].id_embedding,
        )


def read_views(
    index: shards.ShardIndex,
    row: int,
    views: Sequence[int],
    size: int,
    frame: cameras.Frame = "world",
) -> tuple[list[records.ViewRecord], np.ndarray, np.ndarray]:
    """Records, (v, size, size, 4) uint8 RGBA and (v, size, size, 3) normals of some views."""
    found = index.read_views(row, views)
    rgba = np.empty((len(found), size, size, 4), np.uint8)
    normals = np.empty((len(found), size, size, 3), np.float32)
    for i, record in enumerate(found):
        where = index.where(row, record.view)
        rgba[i], _ = records.decode_view(record, size, where, normals[i], frame)
    return found, rgba, normals


def composite(rgba: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay straight-alpha images on one colour: rgb a + background (1 - a).

    Args:
        rgba: (..., 4) uint8.
        background: (3,) in [0, 1].

    Returns:
        (..., 3) float32 images in [-1, 1] and (...) float32 alpha in [0, 1].
    """
    images = np.empty((*rgba.shape[:-1], 3), np.float32)
    composite_into(images, rgba, background)
    return images, rgba[..., 3] * np.float32(1.0 / 255.0)


def composite_into(images: np.ndarray, rgba: np.ndarray, background: np.ndarray) -> None:
    """As `composite`, into a contiguous (..., 3) float32 array."""
    colours = (background * 2.0 - 1.0).astype(np.float32)
    pixels, results = rgba.reshape(-1, 4), images.reshape(-1, 3)
    buffers = np.empty((2, min(_BLOCK, len(pixels))), np.float32)
    for start in range(0, len(pixels), _BLOCK):
        block, result = pixels[start : start + _BLOCK], results[start : start + _BLOCK]
        alpha, plane = buffers[:, : len(block)]
        if not block[:, 3].any():  # above the head
            result[:] = colours
            continue
        np.multiply(block[:, 3], np.float32(1.0 / 255.0), out=alpha)
        for channel, colour in enumerate(colours):
            # c + a (x - c), plane by plane: four times faster than broadcasting over the last axis.
            np.multiply(block[:, channel], np.float32(2.0 / 255.0), out=plane)
            plane -= np.float32(1.0) + colour
            plane *= alpha
            plane += colour
            result[:, channel] = plane
        np.clip(result, -1.0, 1.0, out=result)
