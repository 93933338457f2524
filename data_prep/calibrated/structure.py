"""A video or photos without cameras -> a capture in COLMAP's layout: images/ and sparse/0/."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image

from data_prep.calibrated import frames
from spinmeround_jax.files import InputError, new_folder
from spinmeround_jax.photo import images
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.prepare import Models
from spinmeround_jax.results import transforms

Moves = Literal["camera", "person"]
MAX_SIDE = 1600  # pixels: more do not help to find the cameras
_FEATURES = 4096  # of an image; the time of matching grows with their square
_FEWEST = 0.5  # of the images must find their place


def pictures_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The photos of a subject: in its folder, or in `images` there."""
    inside = folder / "images" if (folder / "images").is_dir() else folder
    return sorted(path for path in inside.iterdir() if images.is_picture_name(path))


def calibrate(
    source: pathlib.Path, folder: pathlib.Path, count: int, moves: Moves, models: Models
) -> None:
    """Make `folder` of a video or a folder of photos; it is there when it is complete.

    Args:
        count: frames to take out of a video.
        moves: what turned. If the person did, before a wall that did not, only what is seen on the person
            counts.
        models: to tell the person from the wall.

    Raises:
        InputError: unreadable images, or too few whose cameras are found.
        AssetError: PyAV or pycolmap is missing.
    """
    with new_folder(folder) as unfinished:
        for name in ("images", "person", "sparse"):
            (unfinished / name).mkdir()
        names = []
        for name, image in _images(source, count):
            names.append(f"{name}.png" if image.mode == "RGBA" else f"{name}.jpg")
            image.save(unfinished / "images" / names[-1], quality=95)
            if moves == "person":
                person = models.parser.person(np.asarray(image.convert("RGB")))
                mask = Image.fromarray(np.uint8(255 * (person > 0.5)))
                mask.save(unfinished / "person" / f"{names[-1]}.png")
        placed = _cameras(unfinished, names, moves)
        if placed < max(2, _FEWEST * len(names)):
            other = "person" if moves == "camera" else "camera"
            raise InputError(
                f"{source}: COLMAP finds the cameras of {placed} of {len(names)} images; take sharp ones with "
                f"small steps between them, locked exposure and a still face; or --moves {other}, if that is it"
            )


def _images(source: pathlib.Path, count: int) -> Iterator[tuple[str, Image.Image]]:
    """Names and images, upright and at most MAX_SIDE pixels long."""
    if source.is_file():
        for number, image in enumerate(frames.sharpest(source, count, MAX_SIDE)):
            yield f"{number:04d}", image
        return
    paths = pictures_in(source)
    names = transforms.unique_names([path.relative_to(source) for path in paths])
    for name, path in zip(names, paths, strict=True):
        picture = images.read(path)
        image = Image.fromarray(picture.pixels)
        image = image if picture.has_alpha else image.convert("RGB")
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        yield name, image


def _cameras(folder: pathlib.Path, names: list[str], moves: Moves) -> int:
    """Writes sparse/0, the largest model that COLMAP finds; returns how many images are in it."""
    try:
        import pycolmap
    except ImportError as error:
        raise AssetError(
            f"{folder.name}: cameras need pycolmap: pip install '.[captures]'"
        ) from error
    pycolmap.logging.minloglevel = pycolmap.logging.FATAL
    pictures = folder / "images"
    extraction = pycolmap.FeatureExtractionOptions()
    extraction.sift.max_num_features = _FEATURES
    reader = pycolmap.ImageReaderOptions()
    if moves == "person":
        reader.mask_path = str(folder / "person")
    sizes = {images.read_header(pictures / name).size for name in names}
    one = len(sizes) == 1  # one camera, most likely
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed = 0
    device = pycolmap.Device.cpu
    with tempfile.TemporaryDirectory() as scratch:
        database = pathlib.Path(scratch, "database.db")
        pycolmap.extract_features(
            database, pictures, image_names=names, reader_options=reader, device=device,
            extraction_options=extraction,
            camera_mode=pycolmap.CameraMode.SINGLE if one else pycolmap.CameraMode.AUTO,
        )  # fmt: skip
        pycolmap.match_exhaustive(database, device=device)
        found = pycolmap.incremental_mapping(database, pictures, scratch, options)
    if not found:
        return 0
    best = max(found.values(), key=lambda model: model.num_reg_images())
    (folder / "sparse" / "0").mkdir()
    best.write_binary(str(folder / "sparse" / "0"))
    return best.num_reg_images()
