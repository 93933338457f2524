"""Gaussians and a camera -> image, alpha, depth and normals; differentiable, with fixed shapes.

EWA splatting as in Kerbl et al. (SIGGRAPH 2023): perspective projection linearised at each centre, a
low-pass filter of 0.3 square pixels, blending from front to back. The image is cut into tiles; each
tile blends the nearest `capacity` Gaussians that reach it, in order of depth, and counts those it had no
room for. All arithmetic is batched matrix products and elementwise, so that one program serves CPU, GPU
and TPU.

It differs from the original in three ways: blending never stops early (there, at a transmittance of
1e-4); a Gaussian reaches exactly the pixels where its alpha is at least 1/255 (there, also at most three
standard deviations); Gaussians beyond `capacity` are left out.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spinmeround_jax.splats import gaussians as gs
from spinmeround_jax.splats.gaussians import Gaussians

LOW_PASS = 0.3  # px^2, added to the projected covariance
MAX_ALPHA = 0.99
MIN_ALPHA = 1.0 / 255.0
NEAR = 0.01  # nearer Gaussians are not drawn
FRUSTUM = 1.3  # half fields of view beyond which the linearisation does not follow a centre
SMALL_TILE, TILE = 4, 8  # px; the smaller is faster up to images of SMALL pixels
SMALL = 96 * 96
CAPACITY = 256  # Gaussians per tile
_PIXELS_AT_ONCE = 4096  # bounds the memory: pixels blended together
_CHUNK = 32  # Gaussians whose transmittances are accumulated by one matrix product
_precise = jax.lax.Precision.HIGHEST


@functools.partial(jax.jit, static_argnames=("size", "capacity", "tile"))
def render(
    gaussians: Gaussians,
    world_to_camera: jax.Array,
    focal: jax.Array | float | tuple[float, float],
    size: int | tuple[int, int],
    background: jax.Array | float = 1.0,
    centre: jax.Array | tuple[float, float] | None = None,
    capacity: int = CAPACITY,
    tile: int | None = None,
) -> dict[str, jax.Array]:
    """Draw n Gaussians.

    Args:
        world_to_camera: (4, 4) rigid pose of an OpenGL camera, see `cameras.py`.
        focal: focal length in pixels, or one for x and one for y.
        size: of the image in pixels, or (height, width); like `capacity` and `tile`, fixed when compiled.
        background: colour in [0, 1], or (3,) of them.
        centre: (2,) x and y of the principal point in pixels, where 0.5 is the first pixel's centre;
            default the middle.
        capacity: Gaussians per tile.
        tile: pixels of a tile's side; default by the size of the image.

    Returns:
        rgb: (h, w, 3) in [0, 1] (the harmonics may exceed 1), on the background.
        alpha: (h, w) in [0, 1].
        depth: (h, w) mean distance along the optical axis, 0 where nothing is.
        normals: (h, w, 3) in the world, blended like the colours on zero: shorter than 1 at edges.
        overflow: () int, pairs of tile and Gaussian that were left out for want of capacity.
    """
    height, width = (size, size) if isinstance(size, int) else size
    focal = jnp.broadcast_to(jnp.asarray(focal, jnp.float32), (2,))
    if centre is None:
        centre = (width / 2, height / 2)
    centre = jnp.asarray(centre, jnp.float32)
    if tile is None:
        tile = SMALL_TILE if height * width <= SMALL else TILE
    projected = project(gaussians, world_to_camera, focal, (height, width), centre)
    blended, overflow = _blend(projected, (height, width), capacity, tile)
    alpha = 1.0 - blended[..., -1]
    background = jnp.broadcast_to(jnp.asarray(background, jnp.float32), (3,))
    return {
        "rgb": blended[..., :3] + blended[..., -1:] * background,
        "alpha": alpha,
        "depth": jnp.where(alpha > MIN_ALPHA, blended[..., 3] / jnp.maximum(alpha, MIN_ALPHA), 0.0),
        "normals": blended[..., 4:7],
        "overflow": overflow,
    }


def project(
    gaussians: Gaussians,
    world_to_camera: jax.Array,
    focal: jax.Array,
    size: tuple[int, int],
    centre: jax.Array,
) -> dict[str, jax.Array]:
    """The Gaussians on the image plane, sorted from near to far.

    Returns:
        mean (n, 2) px; conic (n, 3), the inverse covariance's xx, xy, yy; reach (n, 2) px, half width
        and height of the box in which alpha can be 1/255, negative if none; log_opacity (n,);
        features (n, 7): colour, depth, normal.
    """
    rotation, translation = world_to_camera[:3, :3], world_to_camera[:3, 3]
    flip = jnp.array([1.0, -1.0, -1.0])  # x right, y down, z forward, as pixels run
    rotation = flip[:, None] * rotation
    points = jnp.einsum("ij,nj->ni", rotation, gaussians.means, precision=_precise)
    points = points + flip * translation
    in_front = points[:, 2] > NEAR
    # A harmless depth for those behind: what is masked later must not make gradients NaN.
    x, y = points[:, 0], points[:, 1]
    z = jnp.where(in_front, points[:, 2], 1.0)
    mean = jnp.stack([x, y], -1) / z[:, None] * focal + centre

    # Jacobian of the projection, Kerbl et al. eq. 5; a centre far outside would blow it up.
    height, width = size
    half = jnp.array([width, height], jnp.float32) / (2.0 * focal)
    shift = centre / focal - half  # of the image's middle
    slope = jnp.clip(
        jnp.stack([x, y], -1) / z[:, None], -FRUSTUM * half - shift, FRUSTUM * half - shift
    )
    zero = jnp.zeros_like(z)
    jacobian = jnp.stack(
        [
            jnp.stack([focal[0] / z, zero, -focal[0] * slope[:, 0] / z], -1),
            jnp.stack([zero, focal[1] / z, -focal[1] * slope[:, 1] / z], -1),
        ],
        -2,
    )
    axes = gs.rotations(gaussians.quaternions) * jnp.exp(gaussians.log_scales)[:, None, :]
    axes = jnp.einsum("nij,jk,nkl->nil", jacobian, rotation, axes, precision=_precise)
    xx = jnp.sum(axes[:, 0] ** 2, -1) + LOW_PASS
    xy = jnp.sum(axes[:, 0] * axes[:, 1], -1)
    yy = jnp.sum(axes[:, 1] ** 2, -1) + LOW_PASS
    # The determinant as a sum of squares (Lagrange), free of cancellation for needles.
    minors = jnp.cross(axes[:, 0], axes[:, 1])
    det = jnp.sum(minors**2, -1) + LOW_PASS * (xx + yy) - LOW_PASS**2
    conic = jnp.stack([yy, -xy, xx], -1) / det[:, None]

    log_opacity = jax.nn.log_sigmoid(gaussians.opacity_logits)
    spread = 2.0 * (log_opacity - np.log(MIN_ALPHA))  # squared standard deviations that still count
    drawn = in_front & (spread > 0.0)
    reach = jnp.sqrt(jnp.maximum(spread, 0.0)[:, None] * jnp.stack([xx, yy], -1))
    camera = -rotation.T @ (flip * translation)
    features = jnp.concatenate(
        [gs.colours(gaussians, camera), z[:, None], gs.normals(gaussians, camera)], -1
    )
    order = jnp.argsort(jnp.where(drawn, points[:, 2], jnp.inf))
    return {
        "mean": mean[order],
        "conic": conic[order],
        "reach": jax.lax.stop_gradient(jnp.where(drawn[:, None], reach, -1.0)[order]),
        "log_opacity": log_opacity[order],
        "features": features[order],
    }


def _blend(
    projected: dict[str, jax.Array], size: tuple[int, int], capacity: int, tile: int
) -> tuple[jax.Array, jax.Array]:
    """(h, w, 8) blended features and, last, the transmittance; pairs left out."""
    height, width = size
    rows, columns = -(-height // tile), -(-width // tile)
    count = len(projected["mean"])
    capacity = -(-min(capacity, count) // _CHUNK) * _CHUNK
    packed = jnp.concatenate(
        [
            projected["mean"],
            projected["conic"],
            projected["log_opacity"][:, None],
            projected["features"],
        ],
        -1,
    )
    # The row behind the last: no opacity. Tiles with room to spare point there.
    packed = jnp.concatenate([packed, jnp.zeros((1, packed.shape[-1])).at[0, 5].set(-1e4)])
    mean, reach = jax.lax.stop_gradient((projected["mean"], projected["reach"]))
    low, high = mean - reach, mean + reach
    low = jnp.where(reach < 0.0, jnp.inf, low)

    middle = (tile - 1) / 2
    offsets = np.arange(tile, dtype=np.float32) - middle
    v, u = (grid.ravel() for grid in np.meshgrid(offsets, offsets, indexing="ij"))
    monomials = np.stack([u * u, u * v, v * v, u, v, np.ones_like(u)], -1)

    def blend_tile(corner: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = corner + 0.5  # the first pixel's centre
        hit = jnp.all((high >= first) & (low <= first + (tile - 1)), axis=-1)
        hits = jnp.cumsum(hit)
        chosen = jnp.searchsorted(hits, jnp.arange(1, capacity + 1))
        near = packed[chosen]
        x, y = near[:, 0] - first[0] - middle, near[:, 1] - first[1] - middle
        a, b, c, log_opacity = (near[:, i] for i in range(2, 6))
        exponent = jnp.stack(
            [
                -0.5 * a,
                -b,
                -0.5 * c,
                a * x + b * y,
                b * x + c * y,
                log_opacity - 0.5 * (a * x * x + c * y * y) - b * x * y,
            ]
        )
        alpha = jnp.exp(jnp.matmul(monomials, exponent, precision=_precise))
        alpha = jnp.where(alpha < MIN_ALPHA, 0.0, jnp.minimum(alpha, MAX_ALPHA))
        passed = jnp.log1p(-alpha).reshape(tile * tile, -1, _CHUNK)
        chunk = jnp.sum(passed, -1)
        before = jnp.matmul(chunk, _strictly_before(capacity // _CHUNK), precision=_precise)
        within = jnp.matmul(passed, _strictly_before(_CHUNK), precision=_precise)
        weights = alpha * jnp.exp(within + before[..., None]).reshape(alpha.shape)
        blended = jnp.matmul(weights, near[:, 6:], precision=_precise)
        left = jnp.exp(jnp.sum(chunk, -1, keepdims=True))
        return jnp.concatenate([blended, left], -1), jnp.maximum(hits[-1] - capacity, 0)

    corners = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
    corners = jnp.asarray(corners[..., ::-1].reshape(-1, 2) * tile, jnp.float32)
    at_once = max(1, _PIXELS_AT_ONCE // tile**2)
    if len(corners) <= at_once:
        blended, overflow = jax.vmap(blend_tile)(corners)
    else:
        # Recomputed in the backward pass, so that memory does not grow with the image.
        blended, overflow = jax.lax.map(jax.checkpoint(blend_tile), corners, batch_size=at_once)
    blended = blended.reshape(rows, columns, tile, tile, -1).transpose(0, 2, 1, 3, 4)
    blended = blended.reshape(rows * tile, columns * tile, -1)[:height, :width]
    return blended, jnp.sum(overflow)


@functools.cache
def _strictly_before(n: int) -> np.ndarray:
    """(n, n) ones where the row comes before the column: an exclusive sum as a matrix product."""
    return np.triu(np.ones((n, n), np.float32), 1)
