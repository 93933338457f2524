"""The result of sampling, and its folder: one per head, complete or absent.

input.png, input_normals.png     as given, and its estimated normals (input_2.png ... with more)
anchors/, anchors_normals/       the views of step 2
views/, normals/                 view_000_yaw+007.5_pitch+00.0.png ...
turntable.webp                   animation of views and normals side by side
transforms.json                  cameras (nerfstudio's convention)
truth.png                        known views of a rendered head, if given
likeness.csv                     similarity of each view to the input, by the recogniser of its identity
settings.json                    everything needed to sample the head again
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError, name_inside, new_folder
from spinmeround_jax.photo.images import to_uint8
from spinmeround_jax.photo.likeness import Likeness
from spinmeround_jax.photo.portraits import Truth
from spinmeround_jax.results import page, transforms
from spinmeround_jax.results.layout import (
    GENERATOR,
    PHOTO,
    SETTINGS,
    check_ours,
    observed_name,
    view_name,
)

TURN_SECONDS = 4.0


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sampled views of b heads; images and normals are float32 in [-1, 1], channels last.

    Normals are unit vectors in the frame of the angles, and 0 (mid-grey) on the background. Models with
    `normals_frame` "world" give them in that frame only if the head looks into the camera at yaw 0.

    Attributes:
        observed_angles, observed_images, observed_normals: (m, 2) and (b, m, h, w, 3), m may be 0.
        anchor_angles, anchor_images, anchor_normals: (k, 2) and (b, k, h, w, 3).
        trajectory, images, normals: (n, 2) and (b, n, h, w, 3), the requested views.
        names: (b,) of the folders that `save` writes.
        settings: (b,) for settings.json.
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
    names: Sequence[str] = ()
    settings: Sequence[Mapping[str, Any]] = ()

    @property
    def cameras(self) -> np.ndarray:
        """(n, 4, 4) world-to-camera matrices of the trajectory, see `cameras`."""
        return cameras.orbit(*self.trajectory.T)

    def head(self, index: int) -> Heads:
        """The head `index`, without the axis of heads."""
        shared = {"observed_angles", "anchor_angles", "trajectory"}
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        each = {k: v if k in shared or not len(v) else v[index] for k, v in values.items()}
        return Heads(**each)

    def save(
        self, out: str | os.PathLike[str], normals_space: str = "world", overwrite: bool = False
    ) -> pathlib.Path:
        """Write a folder for each head and a page into `out`; returns the page's path.

        Raises:
            InputError: a folder exists and `overwrite` is False, before anything is written; or see
                `write_head`.
        """
        out = pathlib.Path(out)
        names = self.names or [f"head_{i}" for i in range(len(self.images))]
        for name in names if not overwrite else ():
            if (folder := out / name_inside(name)).exists():
                raise InputError(f"{folder}: exists; save elsewhere, or with overwrite=True")
        for i, name in enumerate(names):
            settings = self.settings[i] if self.settings else {}
            write_head(out / name_inside(name), self.head(i), settings, normals_space)
        return page.write_page(out)


def write_head(
    folder: pathlib.Path,
    head: Heads,
    settings: Mapping[str, Any],
    normals_space: str = "world",
    truth: Truth | None = None,
    likeness: Likeness | None = None,
    photo: Image.Image | None = None,
) -> None:
    """Write one head (see `Heads.head`) to `folder`, replacing an earlier result.

    Args:
        normals_space: "world", or "camera" to rotate each normal map into its own camera.
        photo: image of `photo.preview`, for the page.

    Raises:
        InputError: pixels that are not finite, or `folder` is not a result of this program.
    """
    arrays = (head.images, head.normals, head.anchor_images, head.anchor_normals)
    if not all(np.isfinite(array).all() for array in arrays):
        raise InputError(f"{folder}: the model gave values that are not finite; nothing written")
    check_ours(folder)
    with new_folder(folder) as partial:
        _write_images(partial, head, normals_space, truth)
        transforms.write(partial / transforms.NAME, _views(head), normals_space=normals_space)
        about = {
            "generator": GENERATOR,
            "normals_space": normals_space,
            **settings,
            "observed_angles": head.observed_angles.tolist(),
            "anchor_angles": head.anchor_angles.tolist(),
            "trajectory": head.trajectory.tolist(),
            "truth_angles": truth.angles.tolist() if truth else None,
        }
        if photo:
            photo.save(partial / PHOTO, quality=90)
        if likeness:
            _write_likeness(partial / "likeness.csv", head.trajectory, likeness)
            about["likeness"] = {
                "mean": None if likeness.mean is None else round(likeness.mean, 4),
                "faces": likeness.faces,
                "recognition": likeness.recognition,
                "views": [_rounded(cosine) for cosine in likeness.similarity],
            }
        text = json.dumps(about, indent=1, ensure_ascii=True) + "\n"
        (partial / SETTINGS).write_text(text)


def _views(head: Heads) -> list[transforms.View]:
    """The views of the trajectory with their cameras."""
    height, width = head.images.shape[1:3]
    focal = cameras.FOCAL * width
    camera = transforms.Intrinsics((focal, focal), (width / 2, height / 2), (width, height))
    names = [view_name(i, angles) for i, angles in enumerate(head.trajectory)]
    poses = cameras.orbit(*head.trajectory.T)
    return [
        transforms.View(f"views/{name}", pose, camera, f"normals/{name}")
        for name, pose in zip(names, poses, strict=True)
    ]


def _write_images(
    folder: pathlib.Path, head: Heads, normals_space: str, truth: Truth | None
) -> None:
    def spaced(normals: np.ndarray, angles: np.ndarray) -> np.ndarray:
        if normals_space == "world":
            return normals
        return cameras.normals_to_camera(normals, cameras.orbit(*angles.T))

    about = {"normals_space": normals_space}
    observed_normals = spaced(head.observed_normals, head.observed_angles)
    for i, (image, normals) in enumerate(zip(head.observed_images, observed_normals, strict=True)):
        _write_png(folder / f"{observed_name(i)}.png", to_uint8(image))
        _write_png(folder / f"{observed_name(i)}_normals.png", to_uint8(normals), about)

    normals = spaced(head.normals, head.trajectory)
    anchor_normals = spaced(head.anchor_normals, head.anchor_angles)
    for name, images, angles, text in (
        ("views", head.images, head.trajectory, None),
        ("normals", normals, head.trajectory, about),
        ("anchors", head.anchor_images, head.anchor_angles, None),
        ("anchors_normals", anchor_normals, head.anchor_angles, about),
    ):
        (folder / name).mkdir()
        for i, pixels in enumerate(to_uint8(images)):
            _write_png(folder / name / view_name(i, angles[i]), pixels, text)

    write_turntable(folder / "turntable.webp", head.images, normals)
    if truth:
        rows = [truth.images]
        if truth.normals is not None:
            world = truth.normals / np.float32(127.5) - 1.0
            rows.append(to_uint8(spaced(world, truth.angles)))
        _write_png(folder / "truth.png", np.concatenate([np.concatenate(r, 1) for r in rows]))


def write_turntable(path: pathlib.Path, images: np.ndarray, normals: np.ndarray) -> None:
    """Animation (WebP) of (n, h, w, 3) images and normals in [-1, 1], side by side."""
    frames = [Image.fromarray(pair) for pair in to_uint8(np.concatenate([images, normals], axis=2))]
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=max(20, round(1000 * TURN_SECONDS / len(frames))),
        loop=0,
        quality=90,
    )


def _write_likeness(path: pathlib.Path, angles: np.ndarray, likeness: Likeness) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["view", "file", "yaw", "pitch", "identity_similarity"])
        for i, (pair, cosine) in enumerate(zip(angles, likeness.similarity, strict=True)):
            yaw, pitch = (f"{float(angle):g}" for angle in pair)
            writer.writerow([i, f"views/{view_name(i, pair)}", yaw, pitch, _rounded(cosine)])


def _rounded(cosine: float) -> float | None:
    """None, an empty cell, if there is no face."""
    return round(float(cosine), 4) if np.isfinite(cosine) else None


def _write_png(path: pathlib.Path, pixels: np.ndarray, text: dict[str, str] | None = None) -> None:
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    Image.fromarray(pixels).save(path, pnginfo=info)
