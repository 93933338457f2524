"""Sampling for users: portrait -> its normals -> anchors -> views all around, the paper's three steps.

Arrays in, arrays out: no files and no flags. Angles are (yaw, pitch) in degrees relative to the first
observed view, which is yaw 0, pitch 0. Normals are in that view's frame too: where the portrait looks to
the side, what comes out is turned by as much, cameras and normals alike. With no view observed both are
the head's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from spinmeround_jax.config import AblationConfig, SamplingConfig, from_mapping
from spinmeround_jax.diffusion.networks import Networks, Progress
from spinmeround_jax.diffusion.view_groups import IN_GROUP, anchor_angles, plan_views
from spinmeround_jax.models import Model

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


@dataclasses.dataclass(frozen=True)
class Heads:
    """What was sampled, for b heads; images and normals are float32 in [-1, 1], channels last.

    Normals are unit vectors in the frame of the angles, and 0 (mid-grey) on the background. A model that
    learnt normals in the head's frame (`normals_frame` "world") gives them there if the head looks into
    the camera at yaw 0; of other portraits they lie in between.

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
        progress: see `networks.Progress`.
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
        if model.config.views <= IN_GROUP:
            raise ValueError(f"the model has {model.config.views} views, step 3 needs at least 4")
        self.networks = Networks(model, sampling, ablation, max_batch, progress, devices)

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
    ) -> tuple[np.ndarray, np.ndarray]:
        """Step 3: from known views (b, r, h, w, 2z), the input first, to the (n, 2) trajectory.

        Returns:
            (b, n, h, w, 2z) latents, and (n,) the index of the known view that a view is, or -1.
        """
        plan = plan_views(known_angles, trajectory, self.networks.config.views - IN_GROUP)
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
        views, reused = self.sample_views(known, known_angles, trajectory, context, seeds)

        known_images, known_normals = self.networks.decode(known, known_angles)
        view_images, view_normals = self.networks.decode(views, trajectory)
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
        observed, views = len(observed_angles), self.networks.config.views
        known = np.concatenate([observed_angles, anchor_angles(observed_angles, views)])
        groups = len(plan_views(known, trajectory, views - IN_GROUP).triplets)
        anchors = self.networks.joint_evaluations(observed, identity)
        return heads * (
            self.networks.normals_evaluations(observed)
            + anchors
            + groups * self.networks.joint_evaluations(1)
        )
