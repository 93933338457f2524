"""Random numbers as cached latents of a data set."""

import numpy as np

from spinmeround_jax import ID_EMBEDDING_SIZE
from spinmeround_jax.data import latent_files
from spinmeround_jax.data.subjects import SubjectSource


def write_random_latents(directory, split, out, backgrounds):
    """Latents of the shape of those of Stable Diffusion's autoencoder."""
    source = SubjectSource(directory, split)
    side = source.image_size // 8
    description = latent_files.Description(
        "random", source.image_size, source.views, (side, side, 4), backgrounds, seed=0,
        normals_frame="camera",
    )  # fmt: skip
    latent_files.write_description(out, description)
    rng = np.random.default_rng(0)
    block = rng.standard_normal(description.moments_shape, np.float32).astype(np.float16)
    for index in source.indexes:
        count = len(index.subjects)
        identities = np.eye(count, ID_EMBEDDING_SIZE, dtype=np.float32)
        colours = np.zeros((count, backgrounds, 3), np.float32)
        with latent_files.shard_writer(out, index, description, identities, colours) as moments:
            moments[:] = block
