"""What sampling leaves on disk: one folder per head, complete or not there at all.

input.png, input_normals.png     as given, and its estimated normals (input_2.png ... with more)
anchors/, anchors_normals/       the views of step 2
views/, normals/                 view_000_yaw+007.5_pitch+00.0.png ...
turntable.webp                   views and normals side by side, moving
transforms.json                  cameras (Nerfstudio's convention)
truth.png                        known views of a rendered head, where they were given
likeness.csv                     ArcFace similarity of each view to the input, where it is known
settings.json                    everything needed to make this again
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spinmeround_jax import cameras, schema
from spinmeround_jax.diffusion.pipeline import Heads
from spinmeround_jax.files import InputError, new_folder, recover
from spinmeround_jax.photo.likeness import Likeness
from spinmeround_jax.photo.portraits import Truth
from spinmeround_jax.results import transforms

PHOTO = "photo.jpg"
SETTINGS = "settings.json"
PAGE = "index.html"  # stands among the heads, so none can have its name
GENERATOR = "spinmeround_jax.sample"
TURN_SECONDS = 4.0


def is_finished(folder: pathlib.Path, wanted: Mapping[str, Any]) -> bool:
    """Whether `folder` is a complete result of ours, made with these settings.

    Raises:
        InputError: it is one with others, naming them, or not ours.
    """
    recover(folder)
    if not folder.exists():
        return False
    check_ours(folder)
    found = read_settings(folder) or {}
    if changes := schema.differences({k: v for k, v in found.items() if k in wanted}, wanted):
        raise InputError(
            f"{folder}: is finished, made with other settings (there -> here: "
            f"{'; '.join(changes[:5])}{'; ...' if len(changes) > 5 else ''}); --overwrite replaces "
            "it, or choose another --out"
        )
    return True


def check_ours(folder: pathlib.Path) -> None:
    """Raises InputError where `folder` is there and not a result of ours to replace."""
    if folder.name == PAGE:
        raise InputError(f"{folder}: is the name of the page; rename the input")
    if (folder.exists() or folder.is_symlink()) and read_settings(folder) is None:
        raise InputError(
            f"{folder}: in the way, not written by this program; move it, or choose another --out"
        )


def read_settings(folder: pathlib.Path) -> dict[str, Any] | None:
    """`settings.json` of a folder written here, None where there is none."""
    try:
        return schema.read(folder / SETTINGS, _SETTINGS)
    except (OSError, ValueError):
        return None


_SETTINGS = schema.record({"generator": schema.one_of(GENERATOR)})


def select(heads: Heads, index: int) -> Heads:
    """The one head `index`, without the axis of heads."""
    shared = {"observed_angles", "anchor_angles", "trajectory"}
    values = {field.name: getattr(heads, field.name) for field in dataclasses.fields(heads)}
    return Heads(**{k: v if k in shared else v[index] for k, v in values.items()})


def write_head(
    folder: pathlib.Path,
    head: Heads,
    settings: dict[str, Any],
    normals_space: str = "world",
    truth: Truth | None = None,
    likeness: Likeness | None = None,
    photo: Image.Image | None = None,
) -> None:
    """Write one head (see `select`) to `folder`, replacing an earlier result.

    Everything goes to a hidden sibling first, and is renamed at the end.

    Args:
        normals_space: "world", or "camera" to rotate each normal map into its own camera.
        photo: how a photo became the input (`photo.preview`), for the page.

    Raises:
        InputError: pixels that are not finite, or `folder` is not ours to replace.
    """
    pictures = (head.images, head.normals, head.anchor_images, head.anchor_normals)
    if not all(np.isfinite(picture).all() for picture in pictures):
        raise InputError(f"{folder}: the model made values that are not finite; nothing written")
    check_ours(folder)
    with new_folder(folder) as partial:
        _write_pictures(partial, head, normals_space, truth)
        transforms.write(partial / transforms.NAME, _views(head), normals_space=normals_space)
        angles = {
            "observed_angles": head.observed_angles.tolist(),
            "anchor_angles": head.anchor_angles.tolist(),
            "trajectory": head.trajectory.tolist(),
            "truth_angles": truth.angles.tolist() if truth else None,
        }
        about = {"generator": GENERATOR, "normals_space": normals_space, **settings, **angles}
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
        _write_json(partial / SETTINGS, about)


def view_name(index: int, angles: np.ndarray) -> str:
    """view_007_yaw+052.5_pitch+00.0.png"""
    yaw, pitch = (float(angle) + 0.0 for angle in np.round(angles, 1))  # + 0.0: no minus zero
    return f"view_{index:03d}_yaw{yaw:+06.1f}_pitch{pitch:+05.1f}.png"


def observed_name(index: int) -> str:
    return f"input_{index + 1}" if index else "input"


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


def to_pixels(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> uint8; 0 becomes 128."""
    return np.rint((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def _write_pictures(
    folder: pathlib.Path, head: Heads, normals_space: str, truth: Truth | None
) -> None:
    def spaced(normals: np.ndarray, angles: np.ndarray) -> np.ndarray:
        if normals_space == "world":
            return normals
        return cameras.normals_to_camera(normals, cameras.orbit(*angles.T))

    about = {"normals_space": normals_space}
    observed_normals = spaced(head.observed_normals, head.observed_angles)
    for i, (image, normals) in enumerate(zip(head.observed_images, observed_normals, strict=True)):
        _write_png(folder / f"{observed_name(i)}.png", to_pixels(image))
        _write_png(folder / f"{observed_name(i)}_normals.png", to_pixels(normals), about)

    normals = spaced(head.normals, head.trajectory)
    anchor_normals = spaced(head.anchor_normals, head.anchor_angles)
    for name, images, angles, text in (
        ("views", head.images, head.trajectory, None),
        ("normals", normals, head.trajectory, about),
        ("anchors", head.anchor_images, head.anchor_angles, None),
        ("anchors_normals", anchor_normals, head.anchor_angles, about),
    ):
        (folder / name).mkdir()
        for i, pixels in enumerate(to_pixels(images)):
            _write_png(folder / name / view_name(i, angles[i]), pixels, text)

    pairs = to_pixels(np.concatenate([head.images, normals], axis=2))
    frames = [Image.fromarray(pair) for pair in pairs]
    frames[0].save(
        folder / "turntable.webp",
        save_all=True,
        append_images=frames[1:],
        duration=max(20, round(1000 * TURN_SECONDS / len(frames))),
        loop=0,
        quality=90,
    )
    if truth:
        rows = [truth.images]
        if truth.normals is not None:
            world = truth.normals / np.float32(127.5) - 1.0
            rows.append(to_pixels(spaced(world, truth.angles)))
        _write_png(folder / "truth.png", np.concatenate([np.concatenate(r, 1) for r in rows]))


def _write_likeness(path: pathlib.Path, angles: np.ndarray, likeness: Likeness) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["view", "file", "yaw", "pitch", "arcface_similarity"])
        for i, (pair, cosine) in enumerate(zip(angles, likeness.similarity, strict=True)):
            yaw, pitch = (f"{float(angle):g}" for angle in pair)
            writer.writerow([i, f"views/{view_name(i, pair)}", yaw, pitch, _rounded(cosine)])


def _rounded(cosine: float) -> float | None:
    """None, an empty cell, where there is no face."""
    return round(float(cosine), 4) if np.isfinite(cosine) else None


def _write_png(path: pathlib.Path, pixels: np.ndarray, text: dict[str, str] | None = None) -> None:
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    Image.fromarray(pixels).save(path, pnginfo=info)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=True) + "\n")
