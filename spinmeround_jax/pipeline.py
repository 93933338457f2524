"""Sampling for users: portrait -> its normals -> anchors -> views all around, the paper's three steps.

Arrays in, arrays out: no files and no flags. Each step is one jitted program with the loop over
sigmas inside; all heads, inputs and groups of views of a step are one batch, cut into chunks of at
most `max_batch` examples per device, which are split over the devices. Chunks are padded to a power
of two, so that few programs are ever compiled, and none on a second call with the same sizes.

Angles are (yaw, pitch) in degrees relative to the first observed view, which is yaw 0, pitch 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from spinmeround_jax import cameras, samplers, sampling_steps, schedules, sharding
from spinmeround_jax.config import AblationConfig, SamplingConfig, from_mapping
from spinmeround_jax.denoiser import restore, standardise
from spinmeround_jax.models import Model
from spinmeround_jax.models.attention_kernels import best_for
from spinmeround_jax.view_groups import IN_GROUP, anchor_angles, plan_views

# The released code's values; 6.1 is its in-painting weight, free of the resolution (guidance.py).
RELEASED = SamplingConfig(
    steps=50,
    sampler="euler",
    sigma_min=0.002,
    sigma_max=700.0,
    rho=7.0,
    guidance_scale=3.5,
    shared_noise=True,
    normals_steps=50,
    normals_guidance=6.1,
    temperature=1.0,
)
NO_ABLATION = AblationConfig(no_identity=False, no_normals=False, no_image=False)

OBSERVED_COUNTS = (1, 3)  # what the model is trained on, besides none


def sampling_defaults(provenance: Mapping[str, Any]) -> tuple[SamplingConfig, AblationConfig]:
    """How a model wants to be sampled, from the "sampling" and "ablation" of its provenance.

    A model that does not say, as the released one, is sampled as the release is.

    Raises:
        ValueError: naming the field that is wrong.
    """
    where = "model.json, provenance"
    sampling = provenance.get("sampling", dataclasses.asdict(RELEASED))
    ablation = provenance.get("ablation", dataclasses.asdict(NO_ABLATION))
    return (
        from_mapping(SamplingConfig, sampling, f"{where}.sampling"),
        from_mapping(AblationConfig, ablation, f"{where}.ablation"),
    )


Progress = Callable[[str, int], None]
"""Called after every chunk with the step's name and the UNet evaluations (view x sigma) it took."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """What was sampled, for b heads; images and normals are float32 in [-1, 1], channels last.

    Normals are unit vectors in world space, and 0 (mid-grey) on the background.

    Attributes:
        observed_angles, observed_images, observed_normals: (m, 2) and (b, m, h, w, 3), m may be 0.
        anchor_angles, anchor_images, anchor_normals: (k, 2) and (b, k, h, w, 3).
        trajectory, images, normals: (n, 2) and (b, n, h, w, 3), the views asked for.
    """

    observed_angles: np.ndarray
    observed_images: np.ndarray
    observed_normals: np.ndarray
    anchor_angles: np.ndarray
    anchor_images: np.ndarray
    anchor_normals: np.ndarray
    trajectory: np.ndarray
    images: np.ndarray
    normals: np.ndarray


class Pipeline:
    """The three steps of sampling with one model, on numpy arrays.

    Args:
        model: the networks; they are split once here, so later changes to them are not seen.
        sampling: `RELEASED`, or the values that the model was trained to be sampled with.
        ablation: what the model was denied in training.
        max_batch: examples (of `model.config.views` views) of one call of the network, per device.
        devices: over which the examples are split; None takes all of this process.
        progress: see `Progress`.
    """

    def __init__(
        self,
        model: Model,
        sampling: SamplingConfig = RELEASED,
        ablation: AblationConfig = NO_ABLATION,
        max_batch: int = 8,
        progress: Progress | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        if sampling.sampler not in samplers.SAMPLERS:
            names = ", ".join(samplers.SAMPLERS)
            raise ValueError(f"sampler must be one of {names}, got {sampling.sampler!r}")
        if max_batch < 1 or sampling.steps < 2 or sampling.normals_steps < 1:
            raise ValueError("max_batch and normals_steps must be at least 1, steps at least 2")
        if not 0 <= sampling.temperature <= 1:
            raise ValueError(f"temperature must be in [0, 1], got {sampling.temperature}")
        if model.config.views <= IN_GROUP:
            raise ValueError(f"the model has {model.config.views} views, step 3 needs at least 4")
        self.config = model.config
        self.sampling = sampling
        self.ablation = ablation
        self.max_batch = max_batch
        self.progress = progress or (lambda step, evaluations: None)
        self._mesh = sharding.make_mesh(devices=devices or jax.local_devices())
        self._kernel = best_for(self._mesh.devices.flat[0], jnp.dtype(model.unet.dtype))
        self._unet, self._autoencoder, self._identity = (
            (graphdef, jax.device_put(state, sharding.replicated(self._mesh)))
            for graphdef, state in map(nnx.split, (model.unet, model.autoencoder, model.identity))
        )
        self._sigmas = schedules.karras_sigmas(
            sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho
        )
        size = self.config.image_size
        graphdef, state = self._identity
        self.empty_context = np.asarray(sampling_steps.empty_context(state, graphdef=graphdef))
        grey = np.zeros((1, size, size, 3), np.float32)
        halves = [self.encode(grey, "image")[0], self.encode(grey, "normals")[0]]
        if ablation.no_normals:
            halves[1] = np.zeros_like(halves[1])
        self._empty_latent = np.concatenate(halves, axis=-1)

    # -- networks, in chunks

    def contexts(self, id_embeddings: np.ndarray | None, heads: int) -> np.ndarray:
        """Context (heads, t, d) of (heads, 512) unit embeddings; of the empty identity for None."""
        if id_embeddings is None or self.ablation.no_identity:
            return np.broadcast_to(self.empty_context, (heads, *self.empty_context.shape[1:]))
        graphdef, state = self._identity
        batch = {"id_embedding": np.asarray(id_embeddings, np.float32)}
        contexts = functools.partial(sampling_steps.contexts, graphdef=graphdef, mesh=self._mesh)
        return self._chunked(contexts, state, batch)

    def encode(self, pictures: np.ndarray, kind: Literal["image", "normals"]) -> np.ndarray:
        """(n, H, W, 3) in [-1, 1] -> (n, h, w, z): that half of the mean latents."""
        graphdef, state = self._autoencoder
        encode = functools.partial(sampling_steps.encode, graphdef=graphdef, mesh=self._mesh)
        half = self._chunked(encode, state, {"images": pictures}, 4 * self.max_batch)
        both = standardise(np.concatenate([half, half], axis=-1), self.config)
        return np.split(both, 2, axis=-1)[("image", "normals").index(kind)]

    def decode(self, sampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(..., h, w, 2z) -> images and unit normals, each (..., H, W, 3) in [-1, 1]."""
        graphdef, state = self._autoencoder
        halves = np.stack(np.split(restore(sampled, self.config), 2, axis=-1))
        flat = halves.reshape(-1, *halves.shape[-3:])
        decode = functools.partial(sampling_steps.decode, graphdef=graphdef, mesh=self._mesh)
        images = self._chunked(decode, state, {"latents": flat}, 4 * self.max_batch)
        images = images.reshape(*halves.shape[:-3], *images.shape[1:])
        return images[0], unit_normals(images[1])

    # -- steps

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
                mesh=self._mesh,
            )

        def report(examples):
            self.progress("normals", examples * self.sampling.normals_steps)

        latents = self._chunked(step, state, batch, report=report)
        return np.concatenate([image_latents, np.split(latents, 2, axis=-1)[1]], axis=-1)

    def sample_anchors(
        self,
        observed_latents: np.ndarray,
        observed_angles: np.ndarray,
        context: np.ndarray,
        seeds: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Step 2: observed views (b, m, h, w, 2z), m may be 0, and the other anchors jointly.

        Returns:
            (views, 2) angles and (b, views, h, w, 2z) latents, the observed views first.
        """
        angles = anchor_angles(observed_angles, self.config.views)
        known = np.concatenate([observed_angles.reshape(-1, 2), angles]).astype(np.float32)
        heads = len(observed_latents)
        latents = self.sample_jointly(
            "anchors",
            observed_latents,
            np.tile(known, (heads, 1, 1)),
            context,
            seeds,
            np.tile(np.array([2, 0]), (heads, 1)),
        )
        return known, latents

    def sample_views(
        self,
        known_latents: np.ndarray,
        known_angles: np.ndarray,
        trajectory: np.ndarray,
        context: np.ndarray,
        seeds: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Step 3: from known views (b, r, h, w, 2z), the input first, to the (n, 2) trajectory.

        Returns:
            (b, n, h, w, 2z) latents, and (n,) the index of the known view that a view is, or -1.
        """
        plan = plan_views(known_angles, trajectory, self.config.views - IN_GROUP)
        heads, groups = len(known_latents), len(plan.triplets)
        latents = known_latents[:, plan.reused]  # where -1, overwritten below
        if groups:
            observed = known_latents[:, plan.triplets]  # (b, g, 3, h, w, 2z)
            observed = observed.reshape(-1, *observed.shape[2:])
            angles = np.concatenate([known_angles[plan.triplets], trajectory[plan.targets]], axis=1)
            sampled = self.sample_jointly(
                "views",
                observed,
                np.tile(angles, (heads, 1, 1)),
                np.repeat(context, groups, axis=0),
                np.repeat(seeds, groups),
                np.tile(np.stack([np.full(groups, 3), np.arange(groups)], -1), (heads, 1)),
            )
            sampled = sampled.reshape(heads, groups, *sampled.shape[1:])
            latents[:, plan.targets] = sampled[:, :, IN_GROUP:]
        return latents, plan.reused

    # -- the whole story

    def spin(
        self,
        images: np.ndarray | None,
        id_embeddings: np.ndarray | None,
        trajectory: np.ndarray,
        seeds: ArrayLike,
        observed_angles: ArrayLike = ((0.0, 0.0),),
    ) -> Heads:
        """From observed views, or from an identity alone, or from nothing, to views all around.

        Args:
            images: (b, m, H, W, 3) in [-1, 1] on white, m of `OBSERVED_COUNTS`; None samples
                without any observed view.
            id_embeddings: (b, 512) unit ArcFace embeddings; None is the empty identity. With
                neither this samples new people.
            trajectory: (n, 2) angles of the views wanted.
            seeds: (b,) non-negative integers: a head's result depends on its own seed only.
            observed_angles: (m, 2) of the images, starting with (0, 0).

        Raises:
            ValueError: when shapes or angles do not fit together.
        """
        trajectory = np.asarray(trajectory, np.float32).reshape(-1, 2)
        seeds = np.asarray(seeds, np.uint32)
        heads, size = len(seeds), self.config.image_size
        if images is None:
            images = np.zeros((heads, 0, size, size, 3), np.float32)
            observed_angles = np.zeros((0, 2))
        observed_angles = np.asarray(observed_angles, np.float32).reshape(-1, 2)
        observed = len(observed_angles)
        if images.shape != (heads, observed, size, size, 3):
            raise ValueError(
                f"expected images {(heads, observed, size, size, 3)} in [-1, 1], got {images.shape}"
            )
        if observed and (observed not in OBSERVED_COUNTS or observed_angles[0].any()):
            raise ValueError("give 1 or 3 observed views, the first at yaw 0, pitch 0")
        if id_embeddings is not None and np.shape(id_embeddings) != (heads, 512):
            raise ValueError(f"expected {heads} identities of 512, got {np.shape(id_embeddings)}")

        context = self.contexts(id_embeddings, heads)
        latents = self.observed_latents(images, observed_angles, context, seeds)
        known_angles, known = self.sample_anchors(latents, observed_angles, context, seeds)
        views, reused = self.sample_views(known, known_angles, trajectory, context, seeds)

        known_images, known_normals = self.decode(known)
        view_images, view_normals = self.decode(views)
        # An observed view is shown as it was given, not as the autoencoder repeats it.
        known_images[:, :observed] = images
        for target in np.flatnonzero((reused >= 0) & (reused < observed)):
            view_images[:, target] = images[:, reused[target]]
        return Heads(
            observed_angles=observed_angles,
            observed_images=known_images[:, :observed],
            observed_normals=known_normals[:, :observed],
            anchor_angles=known_angles[observed:],
            anchor_images=known_images[:, observed:],
            anchor_normals=known_normals[:, observed:],
            trajectory=trajectory,
            images=view_images,
            normals=view_normals,
        )

    def evaluations(
        self,
        heads: int,
        trajectory: np.ndarray,
        observed_angles: ArrayLike = ((0.0, 0.0),),
        identity: bool = True,
    ) -> int:
        """What `progress` will have been told in all after `spin`; `()` angles for images=None."""
        observed_angles = np.asarray(observed_angles, np.float32).reshape(-1, 2)
        observed, views = len(observed_angles), self.config.views
        known = np.concatenate([observed_angles, anchor_angles(observed_angles, views)])
        groups = len(plan_views(known, trajectory, views - IN_GROUP).triplets)
        anchors = self.joint_evaluations(observed, identity)
        return heads * (
            self.normals_evaluations(observed) + anchors + groups * self.joint_evaluations(1)
        )

    def normals_evaluations(self, observed: int) -> int:
        """What one head's `observed_latents` of so many views take."""
        denied = self.ablation.no_normals or self.ablation.no_image
        return 0 if denied else observed * self.sampling.normals_steps

    def joint_evaluations(self, observed: int, identity: bool = True) -> int:
        """What `sample_jointly` takes for one example, so many of its views being observed."""
        has_identity = identity and not self.ablation.no_identity
        return self.config.views * self._calls(self._guided(observed, has_identity))

    # -- what the steps are made of

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
            return np.tile(self._empty_latent, (heads, observed, 1, 1, 1))
        latents = self.estimate_normals(
            self.encode(images.reshape(-1, size, size, 3), "image"),
            np.tile(observed_angles, (heads, 1)),
            np.repeat(context, observed, axis=0),
            np.repeat(seeds, observed),
            np.tile(np.arange(observed), heads),
        )
        return latents.reshape(heads, observed, *latents.shape[1:])

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
        guided = self._guided(observed, bool((context != self.empty_context).any()))
        missing = ((0, 0), (0, views - observed), (0, 0), (0, 0), (0, 0))
        if self.ablation.no_image:
            observed_latents = np.tile(self._empty_latent, (examples, observed, 1, 1, 1))
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
                self._empty_latent,
                self._sigmas,
                np.float32(self.sampling.guidance_scale),
                np.float32(self.sampling.temperature if observed else 1.0),
                graphdef=graphdef,
                rays=self.config.rays,
                sampler=self.sampling.sampler,
                guided=guided,
                shared_noise=self.sampling.shared_noise,
                kernel=self._kernel,
                mesh=self._mesh,
            )

        def report(examples):
            self.progress(step, examples * views * self._calls(guided))

        return self._chunked(program, state, batch, report=report)

    # -- private

    def _guided(self, observed: int, identity: bool) -> bool:
        """Whether there is anything to guide with."""
        return self.sampling.guidance_scale != 1.0 and (observed > 0 or identity)

    def _calls(self, guided: bool) -> int:
        """UNet evaluations of each view in a joint sample."""
        steps = self.sampling.steps
        return (2 * steps - 1 if self.sampling.sampler == "heun" else steps) * (2 if guided else 1)

    def _chunked(self, program, state, batch, size=None, report=None) -> np.ndarray:
        """`program(state, batch)` over a dictionary of arrays with a common first axis."""
        devices = self._mesh.devices.size
        size = (size or self.max_batch) * devices
        examples = len(next(iter(batch.values())))
        split = sharding.batch_sharding(self._mesh)
        results = []
        for start in range(0, examples, size):
            count = min(size, examples - start)
            padded = min(size, 1 << (count - 1).bit_length())
            padded += -padded % devices
            rows = start + np.minimum(np.arange(padded), count - 1)
            chunk = {name: jax.device_put(a[rows], split) for name, a in batch.items()}
            results.append(np.array(program(state, chunk))[:count])
            if report:
                report(count)
        return np.concatenate(results)


def unit_normals(normals: np.ndarray) -> np.ndarray:
    """(..., 3) decoded normals to unit length; shorter than 0.5 is background: 0 (mid-grey)."""
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.where(length < 0.5, 0.0, normals / np.maximum(length, 0.5)).astype(np.float32)


def slerp(a: np.ndarray, b: np.ndarray, between: int) -> np.ndarray:
    """(between + 2, d) unit vectors along the arc from `a` to `b` (d,), both included.

    Raises:
        ValueError: when they are opposite, so that there is no one shortest arc.
    """
    a, b = (np.asarray(x, np.float64) / np.linalg.norm(x) for x in (a, b))
    angle = np.arccos(np.clip(a @ b, -1.0, 1.0))
    if np.pi - angle < 1e-3:
        raise ValueError("opposite vectors have no one arc between them")
    t = np.linspace(0.0, 1.0, between + 2)[:, None]
    if angle < 1e-3:
        arc = (1.0 - t) * a + t * b
    else:
        arc = (np.sin((1.0 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return (arc / np.linalg.norm(arc, axis=-1, keepdims=True)).astype(np.float32)
