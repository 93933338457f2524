"""The folder that reconstruction writes: one per head, complete or absent.

splats.ply, splats.glb           the Gaussians: 3DGS's format, glTF
viewer.html                      a page to spin them
mesh.glb, mesh.ply               the surface with colours of vertices
mesh_textured.glb                the surface with a texture
views/, normals/, transforms.json  the given cameras, drawn from the Gaussians
turntable.webp                   images and normals side by side, moving (turntable.mp4: `write_video`)
report.json                      settings, distances, what was left out
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image

from spinmeround_jax import cameras, schema
from spinmeround_jax.files import InputError, new_folder
from spinmeround_jax.photo.images import to_uint8
from spinmeround_jax.results import transforms
from spinmeround_jax.results.head_folder import write_turntable
from spinmeround_jax.splats import mesh, scene, texture, viewer, views
from spinmeround_jax.splats.gaussians import Gaussians
from spinmeround_jax.splats.gltf import write_glb
from spinmeround_jax.splats.ply import read_ply, write_ply
from spinmeround_jax.splats.rasterise import render
from spinmeround_jax.splats.scene import Scene
from spinmeround_jax.video import mp4

REPORT = "report.json"
SPLATS = "splats.ply"
GENERATOR = "spinmeround_jax.reconstruct"
TURN_VIEWS = 48


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Gaussians, the views they were fitted to, the same views drawn, and what goes to report.json."""

    gaussians: Gaussians
    given: Scene
    drawn: views.Drawn
    report: dict[str, Any]

    def save(
        self, folder: str | os.PathLike[str], with_mesh: bool = True, overwrite: bool = False
    ) -> None:
        """Write `folder`, see the module.

        Raises:
            InputError: it is there and `overwrite` is False.
        """
        folder = pathlib.Path(folder)
        if folder.exists() and not overwrite:
            raise InputError(f"{folder}: exists; save elsewhere, or with overwrite=True")
        write_folder(folder, self.gaussians, self.given, self.drawn, self.report, with_mesh)


def write_folder(
    folder: pathlib.Path,
    gaussians: Gaussians,
    given: Scene,
    drawn: views.Drawn,
    report: dict[str, Any],
    with_mesh: bool,
) -> None:
    """Write all files to a hidden folder, which is then renamed.

    Splats of which no mesh or page can be made are kept: `report` then says why, under "left_out".
    """
    with new_folder(folder) as partial:
        finished = views.for_any_size(gaussians, given)
        write_ply(partial / SPLATS, finished)
        names = [file_name(i, name) for i, name in enumerate(given.names)]
        for kind, pictures in (("views", 2 * drawn.images - 1), ("normals", drawn.normals)):
            (partial / kind).mkdir()
            for name, pixels in zip(names, to_uint8(pictures), strict=True):
                Image.fromarray(pixels).save(partial / kind / name)
        transforms.write(
            partial / transforms.NAME,
            transforms_views(given, names),
            normals_space="world",
            applied_transform=given.applied_transform[:3].tolist(),
        )
        turn = views.draw_views(
            gaussians, given, views.orbit(given, cameras.turntable(TURN_VIEWS)[:, 0])
        )
        write_turntable(partial / "turntable.webp", 2 * turn.images - 1, turn.normals)
        report["left_out"] = {}
        try:
            write_viewer(partial / "viewer.html", finished, given, folder.name)
        except InputError as error:
            report["left_out"]["viewer.html"] = str(error)
        try:
            write_glb(partial / "splats.glb", finished)
        except InputError as error:
            report["left_out"]["splats.glb"] = str(error)
        try:
            if with_mesh:
                write_meshes(partial, given, drawn)
        except InputError as error:
            report["left_out"]["mesh.glb, mesh.ply, mesh_textured.glb"] = str(error)
        write_json(partial / REPORT, report)


def file_name(index: int, given: str) -> str:
    """The view's own name as PNG, with its number if it does not begin with it."""
    stem = re.sub(r"[^A-Za-z0-9.+_-]", "_", pathlib.PurePosixPath(given).stem)[:100]
    number = f"view_{index:03d}"
    return f"{stem}.png" if stem.startswith(number) else f"{number}_{stem}.png"


def transforms_views(given: Scene, names: list[str]) -> list[transforms.View]:
    """The drawn views with the given cameras, in the scene's world."""
    height, width = given.size
    focal, centre = (tuple(map(float, pair)) for pair in (given.focal, given.centre))
    camera = transforms.Intrinsics(focal, centre, (width, height))
    return [
        transforms.View(f"views/{name}", pose, camera, f"normals/{name}")
        for name, pose in zip(names, given.world_to_camera, strict=True)
    ]


def write_video(
    path: pathlib.Path,
    folder: pathlib.Path,
    turn: mp4.Turn,
    draw: Callable[..., dict[str, jax.Array]] = render,
) -> None:
    """Video of the Gaussians in a folder of this module, from where its cameras stand.

    Raises:
        InputError: naming the file, if the folder cannot be read.
        OSError: the video cannot be written.
    """
    colour = schema.record({"background": schema.array(schema.number(0, 1), 3, 3)})
    try:
        background = np.array(schema.read(folder / REPORT, colour)["background"])
    except (OSError, ValueError):  # not there, or from before it was recorded
        background = np.ones(3)
    gaussians = read_ply(folder / SPLATS)
    given = scene.load(folder, background)
    phases = turn.phases()
    size = (turn.height, turn.width(*given.size[::-1]))

    def frames() -> Iterator[np.ndarray]:
        for drawn in views.turn(gaussians, given, 360.0 * phases, size, draw):
            kinds = (2 * drawn.images[0] - 1, drawn.normals[0])
            yield to_uint8(np.concatenate(kinds if turn.normals else kinds[:1], axis=1))

    mp4.write(path, frames(), turn.fps, len(phases))


def write_viewer(path: pathlib.Path, gaussians: Gaussians, given: Scene, title: str) -> None:
    """The page, from where the cameras stood and with their field of view."""
    middle, _ = scene.middle_and_radius(given)
    away = np.linalg.norm(scene.camera_positions(given.world_to_camera) - middle, axis=-1)
    field_of_view = 2 * np.rad2deg(np.arctan(min(given.size) / (2 * np.mean(given.focal))))
    viewer.write_page(
        path, gaussians, title, middle, float(np.median(away)), field_of_view, given.background
    )


def write_meshes(folder: pathlib.Path, given: Scene, drawn: views.Drawn) -> None:
    """The surface from the Gaussians' depth, and the given normals where there are any."""
    normals = drawn.normals
    if given.normals is not None:
        normals = np.where(given.has_normals[:, None, None, None], given.normals, normals)
    cameras_of = (given.world_to_camera, given.focal, given.centre)
    surface = mesh.extract(drawn.images, drawn.alpha, drawn.depth, normals, *cameras_of)
    textured = texture.bake(surface, drawn.images, drawn.alpha, drawn.depth, *cameras_of)
    mesh.write_ply(folder / "mesh.ply", surface)
    mesh.write_glb(folder / "mesh.glb", surface)
    texture.write_glb(folder / "mesh_textured.glb", textured)


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
