"""An image with its background, and the coverage of the head -> straight-alpha colours."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def cut_out(image: np.ndarray, alpha: np.ndarray, edge: int = 2) -> np.ndarray:
    """(h, w, 4) uint8 with straight alpha, white where alpha is 0.

    At the silhouette the image mixes head and background, and its outline need not be exactly that
    of `alpha`. So colours within `edge` pixels of it are taken from the nearest pixel further inside.

    Args:
        image: (h, w, 3) uint8. alpha: (h, w) uint8.
    """
    inside = ndimage.binary_erosion(alpha == 255, iterations=edge, border_value=1)
    if not inside.any():
        inside = alpha == alpha.max()
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    colours = image[tuple(nearest)]
    colours[alpha == 0] = 255
    return np.concatenate([colours, alpha[..., None]], axis=-1)
