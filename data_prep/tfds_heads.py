"""A data set as `tensorflow-datasets` knows them, over the same files: nothing is copied or written.

    import tensorflow_datasets as tfds
    import data_prep.tfds_heads  # registers the name

    heads = tfds.load("spinmeround_heads", data_dir="data/heads64", split="train")

An example is one view, with images decoded; `data_dir` is a folder with manifest.json, also in a
bucket. Needs `pip install 'spinmeround_jax[tfds]'`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from data_prep import tf_records
from spinmeround_jax import ID_EMBEDDING_SIZE
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.manifest import read_manifest, shard_name, views_of
from spinmeround_jax.files import InputError, as_path


class Picture(tfds.features.Image):
    """As TFDS's Image, which takes every WebP for an animation."""

    def decode_example(self, example: tf.Tensor) -> tf.Tensor:
        size, _, channels = self.shape
        return tf_records.decode_picture(example, size, channels)


class SpinmeroundHeads(tfds.core.dataset_builder.FileReaderBuilder):
    """Views of heads with normals, cameras and identities, see docs/data_format.md.

    Args:
        data_dir: folder with manifest.json.

    Raises:
        InputError: it is no data set, or its shards are not numbered as TFDS needs it.
    """

    VERSION = tfds.core.Version(f"{records.SCHEMA_VERSION}.0.0")

    def __init__(self, *, data_dir: str | os.PathLike[str], **options: Any):
        self._folder = os.fspath(data_dir)
        self._manifest = read_manifest(self._folder)
        super().__init__(data_dir=data_dir, **options)
        self._original_state = {"data_dir": data_dir, **options}
        self.info.set_file_format("tfrecord")
        self.info.set_splits(self._splits())

    def _build_data_dir(self, data_dir: str) -> tuple[str, str]:
        return self._folder, self._folder  # not <data_dir>/<name>/<version>

    def _splits(self) -> tfds.core.SplitDict:
        template = tfds.core.ShardedFileTemplate(
            data_dir=tfds.core.Path(self._folder),
            template="{SPLIT}-{SHARD_X_OF_Y}.{FILEFORMAT}",
            dataset_name=self.name,
            filetype_suffix="tfrecord",
        )
        splits = []
        for name, entries in self._manifest["splits"].items():
            for number, entry in enumerate(entries):
                wanted = shard_name(name, number, len(entries))
                if entry["file"] != wanted:
                    raise InputError(
                        f"{self._folder}: split {name!r} has {entry['file']} where TFDS expects "
                        f"{wanted}, as a shard lost all its subjects; use tf_records instead"
                    )
            splits.append(
                tfds.core.SplitInfo(
                    name=name,
                    shard_lengths=[e["subjects"] * views_of(self._manifest, name) for e in entries],
                    num_bytes=sum(entry.get("bytes", 0) for entry in entries),
                    filename_template=template.replace(split=name),
                )
            )
        return tfds.core.SplitDict([split for split in splits if split.shard_lengths])

    def _info(self) -> tfds.core.DatasetInfo:
        size = self._manifest["image_size"]
        features = {
            "schema_version": tfds.features.Scalar(np.int64),
            "subject": tfds.features.Text(),
            "view": tfds.features.Scalar(np.int64),
            "image": Picture(shape=(size, size, 4)),
            "normals": Picture(shape=(size, size, self._normals_channels())),
            "world_to_camera": tfds.features.Tensor(shape=(4, 4), dtype=np.float32),
            "yaw": tfds.features.Scalar(np.float32),
            "pitch": tfds.features.Scalar(np.float32),
            "id_embedding": tfds.features.Tensor(shape=(ID_EMBEDDING_SIZE,), dtype=np.float32),
            "source": tfds.features.Text(),
            "license": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                f"{self._manifest['source']}. License: {self._manifest['license']}. `normals` are "
                "as stored; tf_records.normals_decoder turns them into vectors."
            ),
            features=tfds.features.FeaturesDict(features),
        )

    def _normals_channels(self) -> int:
        first = next(entries[0] for entries in self._manifest["splits"].values() if entries)
        index = shards.read_index(as_path(self._folder) / first["file"])
        (record,) = index.read_views(0, [0])
        return tf_records.channels_of(record.normals)

    def _download_and_prepare(self, **_: Any) -> None:
        raise AssertionError("the files are there, as the manifest was read")
