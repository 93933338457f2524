"""The training loss of a finished model at one noise level, head by head."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spinmeround_jax import cameras
from spinmeround_jax.config import AblationConfig
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.evaluation.measures import Views
from spinmeround_jax.models import Model, parameters
from spinmeround_jax.training.step import loss_per_head


class Loss:
    """`loss_per_head` at `sigma`; `pipeline` is the model's, for its encoder."""

    def __init__(self, model: Model, ablation: AblationConfig, pipeline: Pipeline, sigma: float):
        self._networks, self._sigma = pipeline.networks, sigma
        split = {name: parameters.split(getattr(model, name)) for name in ("unet", "identity")}
        self._params = {name: params for name, (_, params) in split.items()}
        graphdefs = {name: graphdef for name, (graphdef, _) in split.items()}

        def loss(params, clean, batch, noise):
            return loss_per_head(
                model.config, ablation, graphdefs, params, jnp.asarray(self._networks.empty_latent[0]),
                clean, batch, jnp.float32(sigma), noise,
            )  # fmt: skip

        self._loss = jax.jit(loss)

    def __call__(
        self, views: Views, angles: np.ndarray, id_embeddings: np.ndarray, numbers: Sequence[int]
    ) -> np.ndarray:
        """(s,) losses of (s, v) views at (v, 2) angles, of which the first is observed.

        Args:
            numbers: (s,) decide the heads' noise.
        """
        heads, count = views.images.shape[:2]
        normals, poses = views.normals, cameras.orbit(*angles.T)
        if self._networks.config.normals_frame == "camera":
            normals = cameras.normals_to_camera(normals, poses)
        halves = [
            self._networks.encode(pictures.reshape(-1, *pictures.shape[2:]), kind)
            for pictures, kind in ((views.images, "image"), (normals, "normals"))
        ]
        clean = np.concatenate(halves, axis=-1)
        clean = clean.reshape(heads, count, *clean.shape[1:])
        noise = [
            np.random.default_rng([0, n]).standard_normal(clean.shape[1:], np.float32)
            for n in numbers
        ]
        batch = Batch(
            observed=np.tile(np.arange(count) < 1, (heads, 1)),
            dropped=np.zeros(heads, bool),
            identity_dropped=np.zeros(heads, bool),
            id_embedding=np.asarray(id_embeddings, np.float32),
            world_to_camera=np.tile(poses, (heads, 1, 1, 1)),
        )
        return np.asarray(self._loss(self._params, clean, batch, np.stack(noise)))
