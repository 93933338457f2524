"""A plain tf.data pipeline that makes the batches of `spinmeround_jax.data`, to compare with."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from data_prep import tf_records
from spinmeround_jax.data import records, shards, tfrecord

THREADS = 2  # of tf.data; the comparison is in processor time, which they all add to


def write_examples(
    path: pathlib.Path, chosen: Sequence[tuple[shards.ShardIndex, int, Sequence[int]]]
) -> int:
    """The records of the chosen (shard, row, views) one after another, as sequential readers like it.

    Returns:
        Channels of the stored normals.
    """
    channels = 0
    with path.open("wb") as file:
        for index, row, views in chosen:
            for record in index.read_views(row, views):
                file.write(tfrecord.frame(records.serialize(record)))
                channels = tf_records.channels_of(record.normals)
    return channels


def batches(
    path: pathlib.Path, size: int, channels: int, views: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches for ever, of images on random colours, normals, cameras and identities, in order."""
    to_vectors = tf_records.normals_decoder(channels)

    def one_view(number, serialized):
        fields = tf_records.parse(serialized)
        rgba = tf_records.decode_picture(fields["image"], size, 4)
        stored = tf_records.decode_picture(fields["normals"], size, channels)
        seed = tf.stack([number // views, 0])  # one colour for all views of an example
        colour = tf.random.stateless_uniform([3], seed) * 2.0 - 1.0
        alpha = tf.cast(rgba[..., 3:], tf.float32) / 255.0
        image = colour + alpha * (tf.cast(rgba[..., :3], tf.float32) / 127.5 - 1.0 - colour)
        return {
            "images": image,
            "normals": to_vectors(stored, rgba[..., 3], fields["world_to_camera"]),
            "world_to_camera": fields["world_to_camera"],
            "id_embedding": fields["id_embedding"],
        }

    dataset = tf.data.TFRecordDataset(str(path)).repeat().enumerate()
    dataset = dataset.map(one_view, num_parallel_calls=THREADS)
    dataset = dataset.batch(views).batch(batch_size).prefetch(1)
    options = tf.data.Options()
    options.threading.private_threadpool_size = THREADS
    return dataset.with_options(options).as_numpy_iterator()
