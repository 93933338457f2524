"""The public API: docs/api.md runs as it is written."""

import re
import subprocess
import sys

import numpy as np
import pytest

import spinmeround_jax as smr
from spinmeround_jax.photo import portraits
from spinmeround_jax.results import layout
from spinmeround_jax.splats.ply import read_ply
from tests.support.paths import ROOT


def test_the_page_runs(tmp_path, monkeypatch):
    for name in ("weights", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "api.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
        for expression, shape in re.findall(
            r"^([\w.]+\.shape)  # (\([\d, ]+\))", block, re.MULTILINE
        ):
            assert eval(expression, names) == eval(shape), expression
    (folder,) = [path for path in (tmp_path / "out" / "api").iterdir() if path.is_dir()]
    settings = layout.read_settings(folder)
    assert folder.name == "parametric-0-1000028" and settings["sampling"]["temperature"] == 0
    assert (folder.parent / "index.html").is_file()
    # Without a portrait's identity the result is another; with the same seed the same.
    assert not np.array_equal(names["nobody"].images[:, 0], names["same_face"].images[:, 0])
    assert names["new_person"].observed_images.shape[1] == 0
    assert len(read_ply(tmp_path / "out" / "api-splats" / "splats.ply").means) == 3000


def test_importing_it_is_light():
    code = "import sys, spinmeround_jax; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not {"jax", "numpy", "flax", "PIL"} & set(eval(loaded.stdout))
    with pytest.raises(AttributeError, match="nothing"):
        smr.nothing  # noqa: B018


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((16, 20, 3), np.uint8), "crop it to a square"),
        (np.zeros((16, 16, 2), np.uint8), "expected"),
        (np.full((16, 16, 3), 3.0), r"must be in \[-1, 1\]"),
        (np.zeros((8, 8, 3)), "too few"),
        ("nowhere.png", "no such file"),
    ],
)
def test_images_that_cannot_be_used(image, message):
    with pytest.raises(ValueError, match=message):
        portraits.read_image(image, 16)


def test_kinds_of_images_agree(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    as_file = portraits.read_image(tmp_path / "a.png", 16)
    np.testing.assert_allclose(portraits.read_image(pixels, 16), as_file, atol=1e-6)
    np.testing.assert_allclose(
        portraits.read_image(Image.fromarray(pixels), 16), as_file, atol=1e-6
    )
    opaque = pixels[..., :3] / np.float32(127.5) - 1.0
    whole = portraits.read_image(pixels[..., :3].copy(), 32)
    np.testing.assert_allclose(portraits.read_image(opaque, 32), whole, atol=1e-6)
