"""Draws the pictures of the README. After `make demo`: .venv/bin/python docs/figures.py"""

import pathlib
import sys

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_prep.parametric.people import sample_person  # noqa: E402
from data_prep.render_heads import person_seed  # noqa: E402
from data_prep.rendering.contact_sheet import contact_sheet  # noqa: E402

IMAGES = ROOT / "docs" / "images"
PEOPLE = (1000000, 1000008, 1000028, 1000036, 1000013, 1000019)  # held out, seed 0
SHOWN = ("parametric-0-1000000", "parametric-0-1000036")  # of demo/portraits


def anchors(demo: pathlib.Path, scale: int = 2) -> Image.Image:
    """A block for each head: input and anchors, their normals, the true renders."""
    blocks = []
    for name in SHOWN:
        rows = []
        for first, folder in (("input", "anchors"), ("input_normals", "anchors_normals")):
            paths = [demo / name / f"{first}.png", *sorted((demo / name / folder).iterdir())]
            rows.append(np.concatenate([_read(path) for path in paths], axis=1))
        truth = _read(demo / name / "truth.png")
        rows.append(truth[: len(rows[0])])
        blocks.append(np.concatenate(rows))
    picture = Image.fromarray(np.concatenate(blocks))
    size = (scale * picture.width, scale * picture.height)
    return picture.resize(size, Image.Resampling.BICUBIC)


def _read(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


if __name__ == "__main__":
    anchors(ROOT / "out" / "demo").save(IMAGES / "anchors.png", optimize=True)
    people = [sample_person(person_seed(0, number)) for number in PEOPLE]
    contact_sheet(people, size=192).save(IMAGES / "heads.jpg", quality=90)
