"""Sampling for users: portrait -> its normals -> anchors -> views all around, the paper's three steps.

Angles are (yaw, pitch) in degrees relative to the first observed view, which is yaw 0, pitch 0. Normals are in
that view's frame, too. Without an observed view both are relative to the head.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

import spinmeround_jax
from spinmeround_jax import cameras, checkpoints
from spinmeround_jax.config import NO_ABLATION, RELEASED, AblationConfig, SamplingConfig
from spinmeround_jax.diffusion.networks import Networks, Progress
from spinmeround_jax.diffusion.samplers import SAMPLERS
from spinmeround_jax.diffusion.view_groups import IN_GROUP, anchor_angles, plan_views
from spinmeround_jax.models import Model, ModelConfig
from spinmeround_jax.photo import portraits
from spinmeround_jax.photo.portraits import ImageLike
from spinmeround_jax.results.head_folder import Heads

OBSERVED_COUNTS = (1, 3)  # the model is trained on these, and on none


class Pipeline:
    """The three steps of sampling with one model: call it with an image, or `spin` arrays.

    Args:
        model: later changes to its networks have no effect.
        sampling: settings; `RELEASED`, or those recorded with the model.
        ablation: of the model's training.
        max_batch: examples (of `model.config.views` views) per device in one call of the network; None: see
            `default_batch`.
        devices: over which examples are split; None takes all of this process.
        progress: see `networks.Progress`.
        settings: recorded with results, see `run_settings`.
        guide: a smaller or less trained model with the same latents, for autoguidance (arXiv 2406.02507)
            in place of classifier-free guidance.
    """

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        max_batch: int | None = None,
        progress: Progress | None = None,
        devices: Sequence[jax.Device] | None = None,
        guide: str | os.PathLike[str] | None = None,
        **sampling: Any,
    ) -> Pipeline:
        """The pipeline of a model folder written by `train` or `convert`.

        Args:
            dtype: compute dtype of the networks, "float32" or "bfloat16".
            guide: folder of a weaker model for autoguidance, see the class.
            sampling: fields of `SamplingConfig` to change, such as steps=24; others are the model's.

        Raises:
            InputError: a file is missing or damaged.
            ValueError: invalid settings.
        """
        description = checkpoints.describe(directory)
        chosen = dataclasses.replace(description.sampling, **sampling)
        max_batch = max_batch or default_batch()
        check(chosen, max_batch)
        weaker = None if guide is None else checkpoints.describe(guide)
        if weaker:
            check_guide(description.config, weaker.config)
        settings = run_settings(description, chosen, dtype, max_batch, weaker)
        models = [
            checkpoints.load_model(folder, jnp.dtype(dtype))
            for folder in (directory, guide)
            if folder is not None
        ]
        return cls(
            models[0],
            chosen,
            description.ablation,
            max_batch,
            progress,
            devices,
            settings,
            *models[1:],
        )

    def __init__(
        self,
        model: Model,
        sampling: SamplingConfig = RELEASED,
        ablation: AblationConfig = NO_ABLATION,
        max_batch: int | None = None,
        progress: Progress | None = None,
        devices: Sequence[jax.Device] | None = None,
        settings: Mapping[str, Any] | None = None,
        guide: Model | None = None,
    ):
        max_batch = max_batch or default_batch()
        check(sampling, max_batch)
        if model.config.views <= IN_GROUP:
            raise ValueError(f"the model has {model.config.views} views, step 3 needs at least 4")
        if guide:
            check_guide(model.config, guide.config)
        self.settings = dict(settings or {})
        self.networks = Networks(model, sampling, ablation, max_batch, progress, devices, guide)

    def replace(self, progress: Progress | None = None, **sampling: Any) -> Pipeline:
        """The same networks with other settings; nothing is loaded, nor compiled with the same `steps`.

        Args:
            progress: see `networks.Progress`.
            sampling: fields of `SamplingConfig` to change, such as guidance_scale=2.

        Raises:
            ValueError: invalid settings.
        """
        chosen = dataclasses.replace(self.networks.sampling, **sampling)
        check(chosen, self.networks.max_batch)
        other = copy.copy(self)
        other.networks = self.networks.replace(chosen, progress)
        other.settings = {**self.settings, "sampling": dataclasses.asdict(chosen)}
        return other

    def examples(
        self, trajectory: ArrayLike, observed_angles: ArrayLike = ((0.0, 0.0),)
    ) -> dict[str, int]:
        """Number of examples of each step, as counted by `progress`, for one head."""
        observed_angles = np.asarray(observed_angles, np.float32).reshape(-1, 2)
        trajectory = np.asarray(trajectory, np.float32).reshape(-1, 2)
        views = self.networks.config.views
        known = np.concatenate([observed_angles, anchor_angles(observed_angles, views)])
        groups = len(plan_views(known, trajectory, views - IN_GROUP).triplets)
        return {"normals": len(observed_angles), "anchors": 1, "views": groups}

    def __call__(
        self,
        image: ImageLike | None = None,
        identity: str | os.PathLike[str] | np.ndarray | None = None,
        trajectory: ArrayLike | None = None,
        seed: int = 0,
        resample_observed: bool = False,
    ) -> Heads:
        """Views all around one head.

        Args:
            image: a portrait, see `portraits.read_image`: a file, a PIL image or an array; None samples a
                new person, or one with this identity.
            identity: unit vector (512,) of the recogniser of the weights, or a file of one. None reads the
                identity beside the file `image`, or is the empty identity if there is none.
            trajectory: (n, 2) yaws and pitches in degrees; None is the turntable of 48 views.
            seed: same seed, same result.
            resample_observed: see `spin`.

        Raises:
            InputError: an image or identity that cannot be used, such as that of another recogniser.
        """
        file = pathlib.Path(image) if isinstance(image, (str, os.PathLike)) else None
        if identity is None and file is not None and portraits.has_identity(file):
            identity = None if portraits.no_identity(file) else file
        known = portraits.recogniser_of(self.settings.get("provenance", {})).get("sha256")
        if isinstance(identity, (str, os.PathLike)):
            identity = portraits.identity_for(pathlib.Path(identity), known)
        elif identity is not None:
            portraits.check_identity(np.asarray(identity), known, "identity")
        size = self.networks.config.image_size
        heads = self.spin(
            None if image is None else portraits.read_image(image, size)[None, None],
            None if identity is None else np.asarray(identity, np.float32)[None],
            cameras.turntable() if trajectory is None else trajectory,
            [seed],
            resample_observed=resample_observed,
        )
        source = {"input": None if file is None else str(file)}
        name = f"seed_{seed}" if file is None else file.stem
        settings = {"source": source, "seed": seed, **self.settings}
        return dataclasses.replace(heads, names=(name,), settings=(settings,))

    def sample_anchors(
        self,
        observed_latents: np.ndarray,
        observed_angles: np.ndarray,
        context: np.ndarray,
        seeds: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Step 2: the anchors that are not observed, given observed views (b, m, h, w, 2z), m may be 0.

        Returns:
            (views, 2) angles and (b, views, h, w, 2z) latents, the observed views first.
        """
        angles = anchor_angles(observed_angles, self.networks.config.views)
        known = np.concatenate([observed_angles.reshape(-1, 2), angles]).astype(np.float32)
        heads = len(observed_latents)
        latents = self.networks.sample_jointly(
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
        resampled: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Step 3: the views of the (n, 2) trajectory, given known views (b, r, h, w, 2z), the input first.

        Args:
            resampled: number of leading known views that are sampled nevertheless.

        Returns:
            (b, n, h, w, 2z) latents, and (n,) index of the equal known view, or -1.
        """
        size = self.networks.config.views - IN_GROUP
        plan = plan_views(known_angles, trajectory, size, resampled)
        heads, groups = len(known_latents), len(plan.triplets)
        latents = known_latents[:, plan.reused]  # where -1, overwritten below
        if groups:
            observed = known_latents[:, plan.triplets]  # (b, g, 3, h, w, 2z)
            observed = observed.reshape(-1, *observed.shape[2:])
            angles = np.concatenate([known_angles[plan.triplets], trajectory[plan.targets]], axis=1)
            sampled = self.networks.sample_jointly(
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

    def spin(
        self,
        images: np.ndarray | None,
        id_embeddings: np.ndarray | None,
        trajectory: ArrayLike,
        seeds: ArrayLike,
        observed_angles: ArrayLike = ((0.0, 0.0),),
        resample_observed: bool = False,
    ) -> Heads:
        """Views all around heads, given observed views, an identity, both, or neither.

        Args:
            images: (b, m, H, W, 3) in [-1, 1] on white, m of `OBSERVED_COUNTS`; None samples
                without any observed view.
            id_embeddings: (b, 512) unit vectors of the recogniser of the weights; None is the empty
                identity.
            trajectory: (n, 2) angles of the requested views.
            seeds: (b,) non-negative integers; a head's result depends on its own seed only.
            observed_angles: (m, 2) of the images, starting with (0, 0).
            resample_observed: sample the views at these angles, too, instead of returning the images:
                a turntable without jumps.

        Raises:
            ValueError: shapes or angles do not fit together.
        """
        trajectory = np.asarray(trajectory, np.float32).reshape(-1, 2)
        seeds = np.asarray(seeds, np.uint32)
        heads, size = len(seeds), self.networks.config.image_size
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

        context = self.networks.contexts(id_embeddings, heads)
        latents = self.networks.observed_latents(images, observed_angles, context, seeds)
        known_angles, known = self.sample_anchors(latents, observed_angles, context, seeds)
        views, reused = self.sample_views(
            known, known_angles, trajectory, context, seeds, observed if resample_observed else 0
        )

        known_images, known_normals = self.networks.decode(known, known_angles)
        view_images, view_normals = self.networks.decode(views, trajectory)
        # Observed views are returned as given, not through the autoencoder.
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


def default_batch() -> int:
    """`max_batch` of this machine: 2 on a CPU, where more gains little, else 8."""
    return 2 if jax.default_backend() == "cpu" else 8


def check(sampling: SamplingConfig, max_batch: int) -> None:
    """Raises ValueError naming an invalid setting."""
    if sampling.sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampling.sampler!r}")
    for name, value, least in (
        ("max_batch", max_batch, 1),
        ("steps", sampling.steps, 1 if sampling.sampler == "consistency" else 2),
        ("normals_steps", sampling.normals_steps, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= sampling.temperature <= 1:
        raise ValueError(f"temperature must be in [0, 1], got {sampling.temperature}")
    limits = sampling.guidance_sigma_min, sampling.guidance_sigma_max
    if not 0 <= limits[0] < limits[1]:
        raise ValueError(
            f"guidance_sigma_min must be at least 0 and below guidance_sigma_max, got {limits}"
        )


def check_guide(model: ModelConfig, guide: ModelConfig) -> None:
    """Raises ValueError if the guide's latents or contexts are not the model's."""
    for field in dataclasses.fields(model):
        ours, theirs = getattr(model, field.name), getattr(guide, field.name)
        if field.name != "unet" and ours != theirs:
            raise ValueError(
                f"the guide's {field.name} is {theirs}, the model's {ours}: a guide must have been "
                "trained with the same autoencoder and identity encoder"
            )


def run_settings(
    description: checkpoints.Description,
    sampling: SamplingConfig,
    dtype: str,
    max_batch: int,
    guide: checkpoints.Description | None = None,
) -> dict[str, Any]:
    """Settings of all heads of a run, for their settings.json."""
    device = jax.devices()[0]
    return {
        "image_size": description.config.image_size,
        "sampling": dataclasses.asdict(sampling),
        "dtype": dtype,
        "max_batch": max_batch,
        "device": f"{device.platform} ({device.device_kind})",
        "versions": {"spinmeround_jax": spinmeround_jax.__version__, "jax": jax.__version__},
        "provenance": {k: v for k, v in description.provenance.items() if k != "config"},
        "guide": guide and guide.provenance,
        "weights_sha256": [description.sha256, guide and guide.sha256],
    }
