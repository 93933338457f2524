"""Views of an ellipsoid whose colours and normals are known, as pictures in memory and as files."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from PIL import Image

from spinmeround_jax import cameras
from spinmeround_jax.splats.scene import Scene

AXES = np.array([0.22, 0.28, 0.25])


def ellipsoid(poses: np.ndarray, size: int, normals: bool = True) -> Scene:
    """One ray per pixel meets x^2/a^2 + y^2/b^2 + z^2/c^2 = 1; colours vary smoothly over it."""
    images, masks, maps = [], [], []
    for pose in poses:
        to_world = cameras.camera_to_world(pose).astype(np.float64)
        direction = cameras.camera_directions(size).astype(np.float64) @ to_world[:3, :3].T
        o, d = to_world[:3, 3] / AXES, direction / AXES
        a, b, c = (d * d).sum(-1), (d * o).sum(-1), o @ o - 1
        root = b * b - a * c
        hit = root > 0
        t = (-b - np.sqrt(np.maximum(root, 0))) / a
        point = to_world[:3, 3] + t[..., None] * direction
        normal = point / AXES**2
        normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
        colour = 0.5 + 0.4 * np.sin(9.0 * point + [0, 1, 2])
        images.append(np.where(hit[..., None], colour, 1.0))
        maps.append(np.where(hit[..., None], normal, 0.0))
        masks.append(hit)
    return Scene(
        images=np.stack(images).astype(np.float32),
        masks=np.stack(masks).astype(np.float32),
        normals=np.stack(maps).astype(np.float32) if normals else None,
        world_to_camera=poses,
        focal=np.full(2, cameras.FOCAL * size),
        centre=np.full(2, size / 2),
        background=np.ones(3, np.float32),
        names=tuple(f"{i}.png" for i in range(len(poses))),
        masks_from=("alpha",) * len(poses),
    )


def ring(views: int, pitch: float = 0.0, start: float = 0.0) -> np.ndarray:
    return cameras.orbit(start + np.arange(views) * 360.0 / views, pitch)


def write(folder: pathlib.Path, scene: Scene, alpha: bool = False) -> dict:
    """Pictures and transforms.json as sampling writes them; returns what the file holds."""
    for kind in ("views", "normals"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    frames = []
    poses = cameras.camera_to_world(scene.world_to_camera)
    for i, (image, mask, pose) in enumerate(zip(scene.images, scene.masks, poses, strict=True)):
        name = f"view_{i:03d}.png"
        pixels = np.rint(255 * image)
        if alpha:
            pixels = np.concatenate([pixels, 255 * mask[..., None]], -1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "views" / name)
        frames.append({"file_path": f"views/{name}", "transform_matrix": pose.tolist()})
        if scene.normals is not None:
            coded = np.rint(127.5 * (scene.normals[i] + 1)).astype(np.uint8)
            Image.fromarray(coded).save(folder / "normals" / name)
            frames[-1]["normals_file_path"] = f"normals/{name}"
    height, width = scene.size
    about = {
        "fl_x": float(scene.focal[0]), "fl_y": float(scene.focal[1]),
        "cx": width / 2, "cy": height / 2, "w": width, "h": height,
        "normals_space": "world", "frames": frames,
    }  # fmt: skip
    (folder / "transforms.json").write_text(json.dumps(about))
    return about
