"""The folder that reconstruction writes: one per head, complete or absent.

splats.ply, viewer.html          the Gaussians, and a page to spin them
mesh.glb, mesh.ply               the surface
views/, normals/, transforms.json  the given cameras, drawn from the Gaussians
turntable.webp                   images and normals side by side, moving
report.json                      settings, distances, what was left out
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax.files import InputError, new_folder
from spinmeround_jax.photo.images import to_uint8
from spinmeround_jax.results import transforms
from spinmeround_jax.results.head_folder import write_turntable
from spinmeround_jax.splats import mesh, scene, viewer, views
from spinmeround_jax.splats.gaussians import Gaussians
from spinmeround_jax.splats.ply import write_ply
from spinmeround_jax.splats.scene import Scene

REPORT = "report.json"
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
        write_ply(partial / "splats.ply", gaussians)
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
        turn = views.draw_views(gaussians, given, views.orbit(given, TURN_VIEWS))
        write_turntable(partial / "turntable.webp", 2 * turn.images - 1, turn.normals)
        report["left_out"] = {}
        try:
            write_viewer(partial / "viewer.html", gaussians, given, folder.name)
        except InputError as error:
            report["left_out"]["viewer.html"] = str(error)
        try:
            if with_mesh:
                write_meshes(partial, given, drawn)
        except InputError as error:
            report["left_out"]["mesh.glb, mesh.ply"] = str(error)
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
    surface = mesh.extract(
        drawn.images, drawn.alpha, drawn.depth, normals, given.world_to_camera, given.focal, given.centre
    )  # fmt: skip
    mesh.write_ply(folder / "mesh.ply", surface)
    mesh.write_glb(folder / "mesh.glb", surface)


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
