"""Folders of views as `sample` writes them, with the yaw in the colour."""

import json

import numpy as np
from PIL import Image

from spinmeround_jax import cameras

SIZE = 16


def view(yaw, size=SIZE):
    """(size, size, 4) uint8: the yaw is told by colour, the left half is transparent."""
    rgba = np.zeros((size, size, 4), np.uint8)
    rgba[..., 0] = (yaw % 360) / 2
    rgba[..., 1] = np.arange(size)[:, None] * 255 // size
    rgba[:, size // 2 :, 3] = 255
    return rgba


def write_head(
    folder, angles, names=None, change=0, transforms=True, normals=False, size=SIZE, world=None
):
    """A head's folder; `change` is added to the red of every picture; `world` (3, 3) turns the cameras'."""
    (folder / "views").mkdir(parents=True)
    frames = []
    for i, (yaw, pitch) in enumerate(angles):
        name = names[i] if names else f"view{i}"
        pixels = view(yaw, size)
        pixels[..., 0] = np.minimum(pixels[..., 0].astype(int) + change, 255)
        Image.fromarray(pixels).save(folder / "views" / f"{name}.png")
        pose = cameras.camera_to_world(cameras.orbit(yaw, pitch))
        if world is not None:
            pose[:3] = world @ pose[:3]
        frames.append({"file_path": f"views/{name}.png", "transform_matrix": pose.tolist()})
        if normals:
            (folder / "normals").mkdir(exist_ok=True)
            towards = cameras.orbit(yaw, pitch)[2, :3]  # a plane that faces the camera
            plane = np.where(view(yaw)[..., 3:] > 0, towards, 0.0)
            pixels = np.rint(127.5 * (plane + 1.0)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "normals" / f"{name}.png")
            frames[-1]["normals_file_path"] = f"normals/{name}.png"
    if transforms:
        about = {"w": size, "h": size, "fl_x": 4 * size, "frames": frames}
        (folder / "transforms.json").write_text(json.dumps(about))
    return folder


RING = [(yaw, 0.0) for yaw in range(0, 360, 45)]
