"""Ways to sample one model, to be compared, beside those that `Pipeline` has."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spinmeround_jax import cameras
from spinmeround_jax.config import SamplingConfig
from spinmeround_jax.diffusion.pipeline import Heads, Pipeline
from spinmeround_jax.diffusion.samplers import SAMPLERS

DIRECT_STREAM = 4  # of random numbers: steps 1 to 3 have theirs


@dataclasses.dataclass(frozen=True)
class Variant:
    """sampling: its settings. anchors: False leaves out step 2, see `spin_directly`.

    label: what it changes, such as "steps 12"; "" is the checkpoint's own way.
    """

    label: str
    sampling: SamplingConfig
    anchors: bool = True


def variants(own: Variant, sweeps: Sequence[str]) -> list[Variant]:
    """`own`, then one for each value of each sweep, all other settings being those of `own`.

    Args:
        sweeps: items such as "steps=12,24,48", "anchors=false"; "steps=4,8:sampler=euler,unipc" is every
            combination of the two.

    Raises:
        ValueError: naming the item.
    """
    found = [own]
    for item in sweeps:
        for chosen in itertools.product(*(_values(part, item) for part in item.split(":"))):
            settings = dict(chosen)
            anchors = settings.pop("anchors", own.anchors)
            found.append(
                Variant(
                    ", ".join(f"{key.replace('_', ' ')} {_shown(value)}" for key, value in chosen),
                    dataclasses.replace(own.sampling, **settings),
                    anchors,
                )
            )
    return found


def _values(part: str, item: str) -> list[tuple[str, Any]]:
    """(setting, value) for each value of SETTING=VALUE,VALUE."""
    types = typing.get_type_hints(SamplingConfig) | {"anchors": bool}
    key, equals, values = part.partition("=")
    if not equals or key not in types:
        raise ValueError(
            f"--sweep {item}: expected SETTING=VALUE,VALUE; settings are {', '.join(types)}"
        )
    found = []
    for text in values.split(","):
        try:
            value = _read(types[key], text)
        except ValueError as error:
            kind = types[key].__name__
            raise ValueError(f"--sweep {item}: {text!r} is not a {kind}") from error
        if key == "sampler" and value not in SAMPLERS:
            raise ValueError(f"--sweep {item}: sampler must be one of {', '.join(SAMPLERS)}")
        found.append((key, value))
    return found


def _shown(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else format(value, "g" if isinstance(value, float) else "")
    )


def _read(kind: type, text: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    value = kind(text)
    if kind is float and not np.isfinite(value):
        raise ValueError(text)
    return value


def repeat(
    pipeline: Pipeline, images: np.ndarray, normals: np.ndarray, angles: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(s, n, h, w, 3) views at (n, 2) angles, and normals, through the autoencoder.

    The best that sampling can do.
    """
    shape = images.shape
    if pipeline.networks.config.normals_frame == "camera":
        normals = cameras.normals_to_camera(normals, cameras.orbit(*angles.T))
    halves = [
        pipeline.networks.encode(pictures.reshape(-1, *shape[-3:]), kind)
        for pictures, kind in ((images, "image"), (normals, "normals"))
    ]
    latents = np.concatenate(halves, axis=-1)
    return pipeline.networks.decode(latents.reshape(*shape[:2], *latents.shape[1:]), angles)


def spin(
    pipeline: Pipeline,
    variant: Variant,
    images: np.ndarray,
    id_embeddings: np.ndarray | None,
    trajectory: np.ndarray,
    seeds: ArrayLike,
) -> Heads:
    """From one view, (b, 1, H, W, 3), in the way of `variant`; see `Pipeline.spin`."""
    way = pipeline.spin if variant.anchors else functools.partial(spin_directly, pipeline)
    return way(images, id_embeddings, trajectory, seeds)


def spin_directly(
    pipeline: Pipeline,
    images: np.ndarray,
    id_embeddings: np.ndarray | None,
    trajectory: np.ndarray,
    seeds: ArrayLike,
) -> Heads:
    """`Pipeline.spin` from one view without step 2: every group of views observes the input alone.

    The paper's anchors are what groups of views have in common; this shows what they are good for.
    Groups are neighbours in yaw, as many as the network samples at once.

    Args:
        images: (b, 1, H, W, 3). The others as in `Pipeline.spin`.

    Returns:
        `Heads` without anchors.
    """
    trajectory = np.asarray(trajectory, np.float32).reshape(-1, 2)
    seeds, front = np.asarray(seeds, np.uint32), np.zeros((1, 2), np.float32)
    heads = len(seeds)
    context = pipeline.networks.contexts(id_embeddings, heads)
    observed = pipeline.networks.observed_latents(images, front, context, seeds)
    groups = _groups(trajectory, pipeline.networks.config.views)
    angles = np.concatenate(
        [np.broadcast_to(front, (len(groups), 1, 2)), trajectory[groups]], axis=1
    )
    sampled = pipeline.networks.sample_jointly(
        "views",
        np.repeat(observed, len(groups), axis=0),
        np.tile(angles, (heads, 1, 1)),
        np.repeat(context, len(groups), axis=0),
        np.repeat(seeds, len(groups)),
        np.tile([(DIRECT_STREAM, group) for group in range(len(groups))], (heads, 1)),
    )
    latents = np.empty((heads, len(trajectory), *sampled.shape[2:]), np.float32)
    latents[:, groups] = sampled.reshape(heads, len(groups), *sampled.shape[1:])[:, :, 1:]
    given = _is_front(trajectory)  # shown as it was given, as `Pipeline.spin` does
    latents[:, given] = observed
    views, normals = pipeline.networks.decode(latents, trajectory)
    views[:, given] = images
    _, observed_normals = pipeline.networks.decode(observed, front)
    nothing = np.empty((heads, 0, *views.shape[2:]), np.float32)
    return Heads(
        observed_angles=front,
        observed_images=images,
        observed_normals=observed_normals,
        anchor_angles=np.empty((0, 2), np.float32),
        anchor_images=nothing,
        anchor_normals=nothing,
        trajectory=trajectory,
        images=views,
        normals=normals,
    )


def _groups(trajectory: np.ndarray, views: int) -> np.ndarray:
    """(g, views - 1) indices of those sampled together; the last one repeated to fill up."""
    size = views - 1
    order = np.argsort(trajectory[:, 0] % 360.0, kind="stable")
    order = order[~_is_front(trajectory[order])]
    parts = np.array_split(order, -(-len(order) // size))
    return np.stack([np.pad(part, (0, size - len(part)), mode="edge") for part in parts])


def _is_front(angles: np.ndarray) -> np.ndarray:
    """(n,) bool of (n, 2) angles: the view that was given."""
    return abs(angles).max(axis=1) < cameras.SAME_VIEW
