"""A parametric head as a calibrated capture in our layout, in a world of its own, and the truth about it."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
from PIL import Image

from data_prep.parametric.landmarks import world_landmarks
from data_prep.parametric.people import sample_person
from data_prep.parametric.subjects import build_scene
from data_prep.rendering import render
from data_prep.scans import alignment
from spinmeround_jax import cameras
from tests.support import needs_heads  # noqa: F401

# The capture's world: metres, z up, somewhere.
SCALE = 0.4
ROTATION = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
OFFSET = np.array([0.3, -0.2, 1.5])
_TO_OPENCV = np.diag([1.0, -1.0, -1.0])


@dataclasses.dataclass(frozen=True)
class Shot:
    """scene: in its own canonical frame. turn, scale, offset: from there to the frame in which the head's
    landmarks lie best on the mean head's: x -> scale * turn x + offset."""

    scene: render.Scene
    turn: np.ndarray
    scale: float
    offset: np.ndarray

    def truth(self, pose: np.ndarray, size: int) -> render.RenderedView:
        """The view of a camera of the data set; normals in the data set's frame."""
        rotation = pose[:3, :3] @ self.turn
        place = (-pose[:3, :3].T @ pose[:3, 3] - self.offset) @ self.turn / self.scale
        own = np.eye(4)
        own[:3, :3], own[:3, 3] = rotation, -rotation @ place
        view = render.render_view(self.scene, own, size, 3)
        return dataclasses.replace(view, normals=view.normals @ self.turn.T)

    def angles(self, yaw: float, pitch: float, distance: float) -> tuple[float, float]:
        """Where a photo of `write` stands in the data set's frame."""
        place = self.scale * self.turn @ (distance * cameras.orbit(yaw, pitch)[2, :3]) + self.offset
        return (
            float(np.rad2deg(np.arctan2(place[0], place[2]))),
            float(np.rad2deg(np.arcsin(place[1] / np.linalg.norm(place)))),
        )


def write(
    folder: pathlib.Path, person: int, angles, distance: float = 3.6, size: int = 160
) -> Shot:
    """Photos with transparency, cameras.json, landmarks.json and identity.npy."""
    folder.mkdir(parents=True)
    scene, head = build_scene(sample_person(person), size)
    points = world_landmarks(head)
    rng = np.random.default_rng(person)
    entries, seen = [], {}
    for number, (yaw, pitch) in enumerate(angles):
        pose = cameras.orbit(yaw, pitch).astype(np.float64)
        place = distance * pose[2, :3]
        # Not quite toward the middle, tilted.
        rotation = cameras.orbit(*rng.uniform(-1, 1, 2))[:3, :3] @ pose[:3, :3]
        pose[:3, :3], pose[:3, 3] = rotation, -rotation @ place
        name = f"{number:02d}.png"
        Image.fromarray(render.render_view(scene, pose, size, 3).rgba).save(folder / name)
        camera = np.eye(4)
        camera[:3, :3] = _TO_OPENCV @ rotation @ ROTATION.T
        camera[:3, 3] = -camera[:3, :3] @ (SCALE * ROTATION @ place + OFFSET)
        focal = cameras.FOCAL * size
        numbers = {"fl_x": focal, "fl_y": focal, "cx": size / 2, "cy": size / 2}
        entries.append({"file": name, "world_to_camera": camera.tolist(), **numbers})
        if abs(yaw) < 60:
            ahead = (points - place) @ rotation.T
            flat = ahead[:, :2] * (1, -1) / -ahead[:, 2:]
            seen[name] = (focal * flat + size / 2).tolist()
    (folder / "cameras.json").write_text(json.dumps(entries))
    (folder / "landmarks.json").write_text(json.dumps(seen))
    np.save(folder / "identity.npy", np.eye(512, dtype=np.float32)[person % 512])
    scale, turn, offset = alignment.from_landmarks(points)
    return Shot(scene, turn, scale, offset)
