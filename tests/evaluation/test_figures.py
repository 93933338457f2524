"""The paper's figures from small folders of views."""

import json

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax import reconstruct, sample
from spinmeround_jax.evaluation import figures
from spinmeround_jax.results import sheet
from tests.support.view_folders import RING, view, write_head


def middle(picture, row, column, rows, columns, side):
    """Colour in the middle of a tile, counted from the lower right corner."""
    x = picture.width - sheet.MARGIN - (columns - column) * side + 3 * side // 4
    y = picture.height - sheet.MARGIN - (rows - row) * (side + sheet.GAP) + sheet.GAP
    return picture.getpixel((x, y + side // 2))


def test_compare_lays_the_same_views_below_each_other(tmp_path):
    for name in ("a", "b"):
        write_head(tmp_path / "truth" / name, RING, normals=True)
        write_head(tmp_path / "made" / name, RING[:6][::-1], change=60)
    out = tmp_path / "out.png"
    arguments = ["compare", "--truth", str(tmp_path / "truth"), "--method", str(tmp_path / "made")]
    arguments += ["--side", "32", "--heads", "1", "--yaws=-45,45,180", "--out", str(out)]
    assert figures.main(arguments) == 0
    picture = Image.open(out)
    for column, yaw in enumerate((0, 315, 45, 180)):
        red = view(yaw)[0, 0, 0]
        assert abs(middle(picture, 0, column, 2, 4, 32)[0] - red) <= 2
        found = middle(picture, 1, column, 2, 4, 32)
        if yaw == 315:  # which that folder does not have
            assert found == sheet.EMPTY
        else:
            assert abs(found[0] - red - 60) <= 2


def test_yaws_in_a_world_with_z_up(tmp_path):
    z_up = np.array(
        [[1, 0, 0], [0, 0, -1], [0, 1, 0]]
    )  # of Blender and nerfstudio: the front is -y
    write_head(tmp_path / "made" / "a", RING, world=z_up)
    out = tmp_path / "out.png"
    arguments = ["compare", "--method", str(tmp_path / "made"), "--side", "32", "--yaws=45,180"]
    assert figures.main([*arguments, "--out", str(out)]) == 0
    picture = Image.open(out)
    for column, yaw in enumerate((0, 45, 180)):
        assert abs(middle(picture, 0, column, 1, 3, 32)[0] - view(yaw)[0, 0, 0]) <= 2


@pytest.mark.parametrize("yaws", ["", "much", "0,nan", "0,,90"])
def test_angles_that_are_none(tmp_path, capsys, yaws):
    with pytest.raises(SystemExit, match="2"):
        figures.main(["compare", "--method", str(tmp_path), f"--yaws={yaws}"])
    assert "expected 1 to 48 angles" in capsys.readouterr().err


def test_what_cannot_be_drawn_is_told(tmp_path, capsys):
    write_head(tmp_path / "bare", RING, transforms=False)
    arguments = ["compare", "--method", str(tmp_path / "bare"), "--out", str(tmp_path / "x.png")]
    assert figures.main(arguments) == 1
    assert "no transforms.json" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
    assert figures.main([*arguments, "--method", str(tmp_path / "bare")]) == 2
    assert "name each method" in capsys.readouterr().err


def test_unconditional_asks_sample_for_people_and_draws_them(tmp_path, monkeypatch):
    commands = []

    def made(command):
        commands.append(command)
        for number in (5, 6):
            write_head(tmp_path / "work" / f"new_{number:04d}", RING, normals=True)
        return 0

    monkeypatch.setattr(sample, "main", made)
    out = tmp_path / "new.png"
    arguments = [
        "unconditional",
        "--checkpoint",
        "w",
        "--count",
        "2",
        "--seed",
        "5",
        "--side",
        "16",
    ]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(out), "--", "--steps", "9"]
    assert figures.main(arguments) == 0
    parsed = sample.build_parser().parse_args(commands[0])  # it is a command of sample's
    assert (parsed.unconditional, parsed.seed, parsed.steps) == (2, 5, 9)
    assert sample.parse_trajectory(parsed).shape == (8, 2)
    with Image.open(out) as picture:
        assert picture.height > 4 * 16
    monkeypatch.setattr(sample, "main", lambda command: 2)
    assert figures.main(arguments) == 1


def test_splats_are_drawn_below_the_views_they_were_fitted_to(tmp_path, monkeypatch):
    head = write_head(tmp_path / "head", RING)

    def fitted(command):
        parsed = reconstruct.build_parser().parse_args(command)
        assert parsed.steps == 7
        write_head(parsed.out / "head", RING, change=40, normals=True)
        return 0

    monkeypatch.setattr(reconstruct, "main", fitted)
    out = tmp_path / "splats.png"
    arguments = ["splats", str(head), "--work", str(tmp_path / "work"), "--out", str(out)]
    assert figures.main([*arguments, "--side", "32", "--yaws", "0,90", "--", "--steps", "7"]) == 0
    picture = Image.open(out)
    before, after, normals = (middle(picture, row, 1, 3, 2, 32) for row in range(3))
    assert abs(after[0] - before[0] - 40) <= 2
    np.testing.assert_allclose(normals, (255, 128, 128), atol=2)  # towards +x
    assert json.loads((head / "transforms.json").read_text())["frames"]
