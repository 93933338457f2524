"""The networks of a model on any number of examples: numpy arrays in, numpy arrays out.

Examples are processed in chunks of at most `max_batch` per device, split over the devices and padded to a
power of two, so that few programs are compiled, and none on a second call with the same sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

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
"""Called after every chunk with the name of the step, its finished examples and all its examples."""


class Networks:
    """One model with its sampling settings; the arguments are those of `Pipeline`.

    Attributes:
        config: the model's.
        mesh: of the devices over which examples are split.
        empty_context, empty_latent: (1, t, d), of the empty identity; (1, h, w, c), of grey images.

    Contexts of a model with a guide are the model's and the guide's, (b, t, 2 d).
    """

    def __init__(
        self,
        model: Model,
        sampling: SamplingConfig,
        ablation: AblationConfig,
        max_batch: int,
        progress: Progress | None,
        devices: Sequence[jax.Device] | None,
        guide: Model | None = None,
    ):
        self.config = model.config
        self.ablation = ablation
        self.max_batch = max_batch
        self.mesh = sharding.make_mesh(devices=devices or jax.local_devices())
        self._kernel = best_for(
            self.mesh.devices.flat[0], jnp.dtype(model.unet.dtype), self.config.attention_shapes
        )
        self._networks = {}
        self.guided_by_model = guide is not None
        guides = {f"guide's {n}": x for n, x in guide.networks.items()} if guide else {}
        guides.pop("guide's autoencoder", None)
        for name, network in {**model.networks, **guides}.items():
            graphdef, state = nnx.split(network)
            self._networks[name] = graphdef, jax.device_put(state, sharding.replicated(self.mesh))
        self._set(sampling, progress)
        size = self.config.image_size
        empty = []
        for name in self._identity_encoders():
            graphdef, state = self._networks[name]
            empty.append(np.asarray(sampling_steps.empty_context(state, graphdef=graphdef)))
        self.empty_context = np.concatenate(empty, axis=-1)
        grey = np.zeros((1, size, size, 3), np.float32)
        halves = [self.encode(grey, "image")[0], self.encode(grey, "normals")[0]]
        if ablation.no_normals:
            halves[1] = np.zeros_like(halves[1])
        self.empty_latent = np.concatenate(halves, axis=-1)

    def replace(self, sampling: SamplingConfig, progress: Progress | None) -> Networks:
        """The same networks with other sampling settings."""
        other = copy.copy(self)
        other._set(sampling, progress)
        return other

    def _set(self, sampling: SamplingConfig, progress: Progress | None) -> None:
        self.sampling = sampling
        self.progress = progress or (lambda step, done, examples: None)
        consistency = sampling.sampler == "consistency"
        schedule = schedules.consistency_sigmas if consistency else schedules.karras_sigmas
        self._sigmas = schedule(
            sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho
        )

    # -- Identity and autoencoder

    def contexts(self, id_embeddings: np.ndarray | None, heads: int) -> np.ndarray:
        """Contexts (heads, t, d) of (heads, 512) unit embeddings; None is the empty identity."""
        if id_embeddings is None or self.ablation.no_identity:
            return np.broadcast_to(self.empty_context, (heads, *self.empty_context.shape[1:]))
        batch = {"id_embedding": np.asarray(id_embeddings, np.float32)}
        return np.concatenate(
            [
                self._chunked(sampling_steps.contexts, name, batch)
                for name in self._identity_encoders()
            ],
            axis=-1,
        )

    def _identity_encoders(self) -> tuple[str, ...]:
        return ("identity", "guide's identity")[: 1 + self.guided_by_model]

    def encode(self, images: np.ndarray, kind: Literal["image", "normals"]) -> np.ndarray:
        """(n, H, W, 3) in [-1, 1] -> (n, h, w, z): this half of the mean latents, standardised."""
        half = self._chunked(
            sampling_steps.encode, "autoencoder", {"images": images}, 4 * self.max_batch
        )
        both = standardise(np.concatenate([half, half], axis=-1), self.config)
        return np.split(both, 2, axis=-1)[("image", "normals").index(kind)]

    def decode(self, sampled: np.ndarray, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(..., n, h, w, 2z) of views at (n, 2) angles -> images and normals (..., n, H, W, 3) in [-1, 1].

        Normals have unit length, or 0 on the background, in the frame of the angles, whatever the frame
        of the model is.
        """
        halves = np.stack(np.split(restore(sampled, self.config), 2, axis=-1))
        flat = {"latents": halves.reshape(-1, *halves.shape[-3:])}
        images = self._chunked(sampling_steps.decode, "autoencoder", flat, 4 * self.max_batch)
        images = images.reshape(*halves.shape[:-3], *images.shape[1:])
        normals = unit_normals(images[1])
        if self.config.normals_frame == "camera":
            normals = cameras.normals_to_world(normals, cameras.orbit(*angles.T))
        return images[0], normals

    # -- UNet

    def observed_latents(
        self,
        images: np.ndarray,
        observed_angles: np.ndarray,
        context: np.ndarray,
        seeds: np.ndarray,
    ) -> np.ndarray:
        """(b, m, H, W, 3) images at (m, 2) angles -> (b, m, h, w, 2z) latents with estimated normals.

        Context (b, t, d) and seeds (b,) are those of the heads.
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
        batch = {
            "image_latents": image_latents,
            "world_to_camera": cameras.orbit(angles[:, 0], angles[:, 1]),
            "context": self._own(context),
            "seed": seeds,
            "stream": np.stack([np.full_like(streams, 1), streams], axis=-1),
        }
        shared = (
            schedules.ddpm_sigmas(self.sampling.normals_steps),
            np.float32(self.sampling.normals_guidance),
            np.float32(self.sampling.temperature),
        )
        static = {"rays": self.config.rays, "kernel": self._kernel}
        latents = self._chunked(
            sampling_steps.normals, "unet", batch, None, "normals", *shared, **static
        )
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
            step: name for `progress`.
            observed_latents: (b, m, h, w, 2z).
            angles: (b, v, 2) of all its views.
            context: (b, t, d).
            seeds, streams: (b,) and (b, 2); together they decide an example's noise.

        Returns:
            (b, v, h, w, 2z) latents of all views.
        """
        (examples, observed), views = observed_latents.shape[:2], angles.shape[1]
        identity = bool((context != self.empty_context).any())
        informed = self.guided_by_model or observed > 0 or identity
        guided = self.sampling.guidance_scale != 1.0 and informed
        missing = ((0, 0), (0, views - observed), (0, 0), (0, 0), (0, 0))
        if self.ablation.no_image:
            observed_latents = np.tile(self.empty_latent, (examples, observed, 1, 1, 1))
        batch = {
            "observed_latents": np.pad(observed_latents, missing),
            "observed": np.tile(np.arange(views) < observed, (examples, 1)),
            "world_to_camera": cameras.orbit(angles[..., 0], angles[..., 1]),
            "context": self._own(context),
            "seed": seeds,
            "stream": streams,
        }
        guide_graphdef = guide = interval = None
        if guided and self.guided_by_model:
            guide_graphdef, guide = self._networks["guide's unet"]
            batch["guide_context"] = np.split(context, 2, axis=-1)[1]
        limits = self.sampling.guidance_sigma_min, self.sampling.guidance_sigma_max
        if guided and (limits[0] > self._sigmas[-2] or limits[1] < self._sigmas[0]):
            interval = np.float32(limits)
        shared = (
            self._own(self.empty_context),
            self.empty_latent,
            self._sigmas,
            np.float32(self.sampling.guidance_scale),
            np.float32(self.sampling.temperature if observed else 1.0),
            interval,
            guide,
        )
        static = {
            "rays": self.config.rays,
            "sampler": self.sampling.sampler,
            "guided": guided,
            "guide_graphdef": guide_graphdef,
            "shared_noise": self.sampling.shared_noise,
            "kernel": self._kernel,
        }
        return self._chunked(
            sampling_steps.joint_views, "unet", batch, None, step, *shared, **static
        )

    def _own(self, context: np.ndarray) -> np.ndarray:
        """The model's half of a context."""
        return np.split(context, 2, axis=-1)[0] if self.guided_by_model else context

    def _chunked(
        self,
        program: Callable[..., jax.Array],
        network: str,
        batch: dict[str, np.ndarray],
        size: int | None = None,
        step: str | None = None,
        *shared: Any,
        **static: Any,
    ) -> np.ndarray:
        """A program of `sampling` over arrays with a common first axis; `size` examples per device."""
        graphdef, state = self._networks[network]
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
            out = program(state, chunk, *shared, graphdef=graphdef, mesh=self.mesh, **static)
            results.append(np.array(out)[:count])
            if step:
                self.progress(step, start + count, examples)
        return np.concatenate(results)


def unit_normals(normals: np.ndarray) -> np.ndarray:
    """(..., 3) decoded normals -> unit length, or 0 (background) if shorter than 0.5."""
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.where(length < 0.5, 0.0, normals / np.maximum(length, 0.5)).astype(np.float32)
