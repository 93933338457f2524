"""Photos around a head -> its surface -> views of it as the canonical camera would take them, with normals.

Photographs have no normals. The surface is that of 3D Gaussians fitted to the photos; the colours stay the
photos' own: each is moved straight back to the distance of all cameras, by the depth of the surface.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from data_prep.calibrated.readers import Photo
from data_prep.calibrated.views import Options, View, canonical_position, canonical_view
from data_prep.rendering import render, shading
from spinmeround_jax import cameras
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import background, images
from spinmeround_jax.photo.prepare import Models
from spinmeround_jax.splats import mesh, nvidia, views
from spinmeround_jax.splats import scene as splats_scene
from spinmeround_jax.splats.fit import FitSettings, fit
from spinmeround_jax.splats.scene import Scene

MARGIN = 0.85  # of the canonical focal length: the surface reaches beyond the images
_FINER = 1.5  # pixels of the photos' views to one of the data's
_SMALLEST = 256  # pixels that segmentation looks at
_PERSON = 0.03  # of a view must be person


def cut_out_views(
    photos: Sequence[Photo],
    where: tuple[float, np.ndarray, np.ndarray],
    size: int,
    models: Models,
) -> list[View]:
    """The photos that show a person, cut out, with one focal length, for data of `size` pixels.

    Raises:
        InputError: an unreadable photo, or a camera in the head.
    """
    distances = [np.linalg.norm(canonical_position(photo, where)) for photo in photos]
    focal = MARGIN * cameras.FOCAL * float(min(distances)) / cameras.RADIUS
    options = Options(max(_SMALLEST, round(_FINER * size / MARGIN)), True, None, None)
    found = []
    for photo in photos:
        view = canonical_view(photo, where, options, focal)
        if photo.mask is None and not images.read(photo.path).has_alpha:
            view = _cut_out(view, models)
        if (view.rgba[..., 3] > 127).mean() > _PERSON:
            found.append(view)
    return found


def _cut_out(view: View, models: Models) -> View:
    """The person in the middle, without the background's colour at the edges; as `photo.prepare` does."""
    rgba = view.rgba.astype(np.float32) / 255.0
    seen = render.on_white(view.rgba)
    person = background.refined(models.parser.person(seen), seen)
    middle = np.zeros(person.shape, bool)
    quarter = len(person) // 4
    middle[quarter:-quarter, quarter:-quarter] = True
    alpha = background.connected(person, middle) * rgba[..., 3]
    rgba = np.dstack([background.foreground(rgba[..., :3], alpha), alpha])
    return dataclasses.replace(view, rgba=np.rint(255.0 * rgba).astype(np.uint8))


def fit_surface(
    shots: Sequence[View], where: str, size: int, steps: int, checkpoint: pathlib.Path
) -> render.Scene:
    """The closed surface that the views show, in the canonical frame.

    Args:
        where: the subject, for messages.
        size: pixels to which views are reduced for the fit.
        checkpoint: to resume from.

    Raises:
        InputError: too few views, one side without any, or no surface.
    """
    small = [Image.fromarray(v.rgba).resize((size, size), Image.Resampling.BOX) for v in shots]
    rgba = np.stack(small).astype(np.float32) / 255.0
    alpha = rgba[..., 3:]
    poses = np.stack([cameras.orbit(view.yaw, view.pitch) for view in shots])
    poses[:, 2, 3] = [-view.distance for view in shots]
    given = Scene(
        images=(rgba[..., :3] * alpha + 1.0 - alpha).astype(np.float16),
        masks=alpha[..., 0].astype(np.float16),
        normals=None,
        world_to_camera=poses,
        focal=np.full(2, shots[0].focal * size),
        centre=np.full(2, size / 2),
        background=np.ones(3, np.float32),
        names=tuple(view.name for view in shots),
        masks_from=("mask",) * len(small),
    )
    splats_scene.check(given, where)
    draw = nvidia.choose("auto")
    # The images' look does not matter here, their geometry does: no perceptual distance.
    settings = FitSettings(steps=steps, count=round(3000 * (size / 64) ** 2), lpips=0.0)
    gaussians, _ = fit(given, settings, checkpoint, draw=draw)
    drawn = views.draw_views(gaussians, given, draw=draw)
    surface = mesh.extract(
        drawn.images, drawn.alpha, drawn.depth, drawn.normals, poses, given.focal, given.centre
    )
    count = len(surface.vertices)
    part = render.Mesh(
        surface.vertices, surface.faces, surface.normals, surface.colours, np.zeros(count), shading.CLOTH
    )  # fmt: skip
    return render.Scene([part], shading.make_light(0.0, 0.0, 1.0, 0.0))


def moved_back(
    view: View, surface: render.Scene, size: int, samples: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """The view from `cameras.RADIUS` in its direction.

    Args:
        samples: rays per pixel side, odd.

    Returns:
        (size, size, 4) uint8, straight alpha, and (size, size, 3) normals of the surface times alpha, in the
        head's frame.

    Raises:
        InputError: the surface is not in the image.
    """
    pose = cameras.orbit(view.yaw, view.pitch)
    drawn = render.render_view(surface, pose, size, samples)
    depth = cameras.RADIUS - drawn.positions @ pose[2, :3]
    known = np.isfinite(depth) & (drawn.normals != 0).any(-1)
    if not known.any():
        raise InputError(f"{view.name}: nothing of the head's surface is seen from there")
    # The surface is smoother than the head: beyond its edge it goes on as at its edge.
    nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    depth, normals = depth[tuple(nearest)], drawn.normals[tuple(nearest)]
    steps = ((np.arange(size) + 0.5) / size - 0.5) / cameras.FOCAL
    # From a camera that stands RADIUS away to one at the photo's distance.
    enlarged = depth / np.maximum(depth - cameras.RADIUS + view.distance, 1e-3)
    rows, columns = enlarged * steps[:, None], enlarged * steps
    at = len(view.rgba) * (view.focal * np.stack([rows, columns]) + 0.5) - 0.5
    pixels = view.rgba.astype(np.float32) / 255.0
    pixels[..., :3] *= pixels[..., 3:]
    sampled = np.stack(
        [ndimage.map_coordinates(pixels[..., c], at, order=1) for c in range(4)], axis=-1
    )
    colours = sampled[..., :3] / np.maximum(sampled[..., 3:], 1e-3)
    rgba = np.dstack([colours, sampled[..., 3:]])
    rgba = np.rint(255.0 * np.clip(rgba, 0, 1)).astype(np.uint8)
    rgba[rgba[..., 3] == 0] = (255, 255, 255, 0)
    return rgba, normals * (rgba[..., 3:] / np.float32(255.0))


def spread(views: Sequence[View], count: int) -> list[View]:
    """`count` views: the most frontal, then again and again the one furthest from all chosen."""
    angles = np.array([(view.yaw, view.pitch) for view in views])
    directions = cameras.orbit(*angles.T)[:, 2, :3]
    chosen = [int(directions[:, 2].argmax())]
    while len(chosen) < count:
        chosen.append(int((directions @ directions[chosen].T).max(axis=1).argmin()))
    return [views[i] for i in chosen]
