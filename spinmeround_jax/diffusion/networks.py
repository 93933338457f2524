"""The networks of a model on any number of examples: numpy arrays in, numpy arrays out.

What a step of sampling does is one jitted program with the loop over sigmas inside (`sampling_steps`). Its
examples are one batch, cut into chunks of at most `max_batch` per device, which are split over the
devices. Chunks are padded to a power of two, so that few programs are ever compiled, and none on a
second call with the same sizes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spinmeround_jax import cameras, sharding
from spinmeround_jax.config import AblationConfig, SamplingConfig
from spinmeround_jax.diffusion import sampling as sampling_steps
from spinmeround_jax.diffusion import schedules
from spinmeround_jax.diffusion.denoiser import restore, standardise
from spinmeround_jax.models import Model
from spinmeround_jax.models.attention_kernels import best_for

Progress = Callable[[str, int, int], None]
"""Called after every chunk: the step, how many of its examples are done, and of how many."""


class Networks:
    """One model with its settings of sampling; the arguments are those of `Pipeline`.

    Attributes:
        config: the model's.
        sampling, ablation: as given.
        mesh: of the devices over which examples are split.
        empty_context, empty_latent: (1, t, d), of no identity; (1, h, w, c), of grey pictures.
    """

    def __init__(
        self,
        model: Model,
        sampling: SamplingConfig,
        ablation: AblationConfig,
        max_batch: int,
        progress: Progress | None,
        devices: Sequence[jax.Device] | None,
    ):
        self.config = model.config
        self.ablation = ablation
        self.max_batch = max_batch
        self.mesh = sharding.make_mesh(devices=devices or jax.local_devices())
        self._kernel = best_for(
            self.mesh.devices.flat[0], jnp.dtype(model.unet.dtype), self.config.attention_shapes
        )
        self._unet, self._autoencoder, self._identity = (
            (graphdef, jax.device_put(state, sharding.replicated(self.mesh)))
            for graphdef, state in map(nnx.split, (model.unet, model.autoencoder, model.identity))
        )
        self._set(sampling, progress)
        size = self.config.image_size
        graphdef, state = self._identity
        self.empty_context = np.asarray(sampling_steps.empty_context(state, graphdef=graphdef))
        grey = np.zeros((1, size, size, 3), np.float32)
        halves = [self.encode(grey, "image")[0], self.encode(grey, "normals")[0]]
        if ablation.no_normals:
            halves[1] = np.zeros_like(halves[1])
        self.empty_latent = np.concatenate(halves, axis=-1)

    def replace(self, sampling: SamplingConfig, progress: Progress | None) -> Networks:
        """The same networks, sampled with other settings."""
        other = copy.copy(self)
        other._set(sampling, progress)
        return other

    def _set(self, sampling: SamplingConfig, progress: Progress | None) -> None:
        self.sampling = sampling
        self.progress = progress or (lambda step, done, examples: None)
        self._sigmas = schedules.karras_sigmas(
            sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho
        )

    # -- the small ones

    def contexts(self, id_embeddings: np.ndarray | None, heads: int) -> np.ndarray:
        """Context (heads, t, d) of (heads, 512) unit embeddings; of the empty identity for None."""
        if id_embeddings is None or self.ablation.no_identity:
            return np.broadcast_to(self.empty_context, (heads, *self.empty_context.shape[1:]))
        graphdef, state = self._identity
        batch = {"id_embedding": np.asarray(id_embeddings, np.float32)}
        contexts = functools.partial(sampling_steps.contexts, graphdef=graphdef, mesh=self.mesh)
        return self._chunked(contexts, state, batch)

    def encode(self, pictures: np.ndarray, kind: Literal["image", "normals"]) -> np.ndarray:
        """(n, H, W, 3) in [-1, 1] -> (n, h, w, z): that half of the mean latents."""
        graphdef, state = self._autoencoder
        encode = functools.partial(sampling_steps.encode, graphdef=graphdef, mesh=self.mesh)
        half = self._chunked(encode, state, {"images": pictures}, 4 * self.max_batch)
        both = standardise(np.concatenate([half, half], axis=-1), self.config)
        return np.split(both, 2, axis=-1)[("image", "normals").index(kind)]

    def decode(self, sampled: np.ndarray, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(..., n, h, w, 2z) of views at (n, 2) angles -> images and normals in [-1, 1].

        Both (..., n, H, W, 3). Normals have unit length, or are 0 on the background, and are in the frame
        in which the angles are counted, whatever the model's own is.
        """
        graphdef, state = self._autoencoder
        halves = np.stack(np.split(restore(sampled, self.config), 2, axis=-1))
        flat = halves.reshape(-1, *halves.shape[-3:])
        decode = functools.partial(sampling_steps.decode, graphdef=graphdef, mesh=self.mesh)
        images = self._chunked(decode, state, {"latents": flat}, 4 * self.max_batch)
        images = images.reshape(*halves.shape[:-3], *images.shape[1:])
        normals = unit_normals(images[1])
        if self.config.normals_frame == "camera":
            normals = cameras.normals_to_world(normals, cameras.orbit(*angles.T))
        return images[0], normals

    # -- the UNet

    def observed_latents(
        self,
        images: np.ndarray,
        observed_angles: np.ndarray,
        context: np.ndarray,
        seeds: np.ndarray,
    ) -> np.ndarray:
        """(b, m, H, W, 3) images at (m, 2) angles -> (b, m, h, w, 2z) latents, normals estimated.

        With the context (b, t, d) and the seed (b,) of each head.
        """
        heads, observed, size = images.shape[:3]
        if not observed or self.ablation.no_image:
            return np.tile(self.empty_latent, (heads, observed, 1, 1, 1))
        latents = self.estimate_normals(
            self.encode(images.reshape(-1, size, size, 3), "image"),
            np.tile(observed_angles, (heads, 1)),
            np.repeat(context, observed, axis=0),
            np.repeat(seeds, observed),
            np.tile(np.arange(observed), heads),
        )
        return latents.reshape(heads, observed, *latents.shape[1:])

    def estimate_normals(
        self,
        image_latents: np.ndarray,
        angles: np.ndarray,
        context: np.ndarray,
        seeds: np.ndarray,
        streams: np.ndarray,
    ) -> np.ndarray:
        """Step 1: (n, h, w, z) latents of views at (n, 2) angles -> (n, h, w, 2z) with normals.

        One view at a time, DDPM sigmas, Euler, no guidance; the image's own latent is unchanged.
        """
        if self.ablation.no_normals:
            return np.concatenate([image_latents, np.zeros_like(image_latents)], axis=-1)
        graphdef, state = self._unet
        batch = {
            "image_latents": image_latents,
            "world_to_camera": cameras.orbit(angles[:, 0], angles[:, 1]),
            "context": context,
            "seed": seeds,
            "stream": np.stack([np.full_like(streams, 1), streams], axis=-1),
        }

        def step(state, batch):
            return sampling_steps.normals(
                state,
                batch,
                schedules.ddpm_sigmas(self.sampling.normals_steps),
                np.float32(self.sampling.normals_guidance),
                np.float32(self.sampling.temperature),
                graphdef=graphdef,
                rays=self.config.rays,
                kernel=self._kernel,
                mesh=self.mesh,
            )

        latents = self._chunked(step, state, batch, name="normals")
        return np.concatenate([image_latents, np.split(latents, 2, axis=-1)[1]], axis=-1)

    def sample_jointly(
        self,
        step: str,
        observed_latents: np.ndarray,
        angles: np.ndarray,
        context: np.ndarray,
        seeds: np.ndarray,
        streams: np.ndarray,
    ) -> np.ndarray:
        """Sample v views of each example jointly, of which the first m are observed.

        Args:
            step: what `progress` is told.
            observed_latents: (b, m, h, w, 2z).
            angles: (b, v, 2) of all its views.
            context: (b, t, d).
            seeds, streams: (b,) and (b, 2); together they decide an example's noise.

        Returns:
            (b, v, h, w, 2z) latents of all views.
        """
        (examples, observed), views = observed_latents.shape[:2], angles.shape[1]
        identity = bool((context != self.empty_context).any())
        guided = self.sampling.guidance_scale != 1.0 and (observed > 0 or identity)
        missing = ((0, 0), (0, views - observed), (0, 0), (0, 0), (0, 0))
        if self.ablation.no_image:
            observed_latents = np.tile(self.empty_latent, (examples, observed, 1, 1, 1))
        batch = {
            "observed_latents": np.pad(observed_latents, missing),
            "observed": np.tile(np.arange(views) < observed, (examples, 1)),
            "world_to_camera": cameras.orbit(angles[..., 0], angles[..., 1]),
            "context": context,
            "seed": seeds,
            "stream": streams,
        }
        graphdef, state = self._unet

        def program(state, batch):
            return sampling_steps.joint_views(
                state,
                batch,
                self.empty_context,
                self.empty_latent,
                self._sigmas,
                np.float32(self.sampling.guidance_scale),
                np.float32(self.sampling.temperature if observed else 1.0),
                graphdef=graphdef,
                rays=self.config.rays,
                sampler=self.sampling.sampler,
                guided=guided,
                shared_noise=self.sampling.shared_noise,
                kernel=self._kernel,
                mesh=self.mesh,
            )

        return self._chunked(program, state, batch, name=step)

    def _chunked(self, program, state, batch, size=None, name=None) -> np.ndarray:
        """`program(state, batch)` over a dictionary of arrays with a common first axis."""
        devices = self.mesh.devices.size
        size = (size or self.max_batch) * devices
        examples = len(next(iter(batch.values())))
        split = sharding.batch_sharding(self.mesh)
        results = []
        for start in range(0, examples, size):
            count = min(size, examples - start)
            padded = min(size, 1 << (count - 1).bit_length())
            padded += -padded % devices
            rows = start + np.minimum(np.arange(padded), count - 1)
            chunk = {name: jax.device_put(a[rows], split) for name, a in batch.items()}
            results.append(np.array(program(state, chunk))[:count])
            if name:
                self.progress(name, start + count, examples)
        return np.concatenate(results)


def unit_normals(normals: np.ndarray) -> np.ndarray:
    """(..., 3) decoded normals to unit length; shorter than 0.5 is background: 0 (mid-grey)."""
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.where(length < 0.5, 0.0, normals / np.maximum(length, 0.5)).astype(np.float32)
