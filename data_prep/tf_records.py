"""Reads the records with TensorFlow, for those who live there: parsing and both kinds of images.

Needs `pip install 'spinmeround_jax[tfds]'`. docs/data_format.md describes the fields.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from spinmeround_jax import ID_EMBEDDING_SIZE
from spinmeround_jax.data import records

FIELDS = {
    "schema_version": tf.io.FixedLenFeature([], tf.int64),
    "subject": tf.io.FixedLenFeature([], tf.string),
    "view": tf.io.FixedLenFeature([], tf.int64),
    "image": tf.io.FixedLenFeature([], tf.string),
    "normals": tf.io.FixedLenFeature([], tf.string),
    "world_to_camera": tf.io.FixedLenFeature([4, 4], tf.float32),
    "yaw": tf.io.FixedLenFeature([], tf.float32),
    "pitch": tf.io.FixedLenFeature([], tf.float32),
    "id_embedding": tf.io.FixedLenFeature([ID_EMBEDDING_SIZE], tf.float32),
    "source": tf.io.FixedLenFeature([], tf.string),
    "license": tf.io.FixedLenFeature([], tf.string),
}


def parse(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
    """One record's fields; `image` and `normals` still encoded."""
    return tf.io.parse_single_example(serialized, FIELDS)


def decode_picture(encoded: tf.Tensor, size: int, channels: int) -> tf.Tensor:
    """(size, size, channels) uint8 of a PNG or WebP."""
    pixels = tf.image.decode_image(encoded, channels=channels, expand_animations=False)
    return tf.ensure_shape(pixels, (size, size, channels))


def normals_decoder(channels: int) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
    """What turns stored normals into vectors, as `records.decode_view` does.

    Args:
        channels: of the stored image: 3 (PNG of components) or 4 (compact), see `channels_of`.

    Returns:
        A function of (h, w, channels) uint8, the image's (h, w) uint8 alpha and (4, 4)
        world_to_camera, which gives (h, w, 3) float32 in world space, 0 on the background.
    """
    if channels == 3:

        def components(stored, alpha, world_to_camera):
            vectors = (tf.cast(stored, tf.float32) - 128.0) / 127.0
            return vectors / tf.maximum(tf.norm(vectors, axis=-1, keepdims=True), 1.0)

        return components

    disc = records.disc().copy()
    disc[0] = 0.0  # where no normal is known
    disc = tf.constant(disc)

    def look_up(stored, alpha, world_to_camera):
        table = disc @ world_to_camera[:3, :3]
        codes = tf.cast(stored[..., 0], tf.int32) + 256 * tf.cast(stored[..., 1], tf.int32)
        return tf.gather(table, codes) * (tf.cast(alpha, tf.float32) / 255.0)[..., None]

    return look_up


def channels_of(normals: bytes) -> int:
    """Channels of a record's `normals`; all records of a data set have the same."""
    return len(records.header_of(normals, "normals")[2])
