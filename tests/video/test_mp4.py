"""Videos: what a player reads in them, timing, the commands that write them, bad input."""

import dataclasses
import fractions
import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax import reconstruct
from spinmeround_jax.files import InputError
from spinmeround_jax.splats.folder import SPLATS, write_video
from spinmeround_jax.splats.ply import write_ply
from spinmeround_jax.video import __main__ as command
from spinmeround_jax.video import mp4
from tests.support.splat_scenes import random_gaussians
from tests.support.splat_views import ellipsoid, ring, write

av = pytest.importorskip("av")

COLOURS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128] * 3,
     [200, 150, 120], [60, 30, 20]], np.uint8,
)  # fmt: skip


def decoded(path) -> np.ndarray:
    """(n, h, w, 3) colours in [0, 255] by BT.709's own formula (limited range), not by FFmpeg's scaler."""
    frames = []
    with av.open(str(path)) as video:
        for frame in video.decode(video=0):
            h, w = frame.height, frame.width
            planes = frame.to_ndarray(format="yuv420p").astype(np.float64)
            luma = (planes[:h] - 16) / 219
            blue, red = (planes[h:].reshape(2, h // 2, w // 2) - 128) / 224
            blue, red = (x.repeat(2, axis=0).repeat(2, axis=1) for x in (blue, red))
            r, b = luma + 2 * (1 - 0.2126) * red, luma + 2 * (1 - 0.0722) * blue
            g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
            frames.append(255 * np.stack([r, g, b], -1))
    return np.stack(frames)


def test_colours_come_back(tmp_path):
    patches = COLOURS.reshape(2, 4, 3).repeat(32, axis=0).repeat(32, axis=1)
    mp4.write(tmp_path / "a.mp4", [patches] * 5, 30, 5)
    found = decoded(tmp_path / "a.mp4")
    assert found.shape == (5, 64, 128, 3)
    middles = found[:, 16::32, 16::32].reshape(5, 8, 3)
    assert abs(middles - COLOURS).max() < 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_what_players_ask_for(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(50)]
    mp4.write(tmp_path / "a.mp4", frames, 25, 50)
    with av.open(str(tmp_path / "a.mp4")) as video:
        (stream,) = video.streams
        codec = stream.codec_context
        assert (codec.name, codec.profile, codec.pix_fmt) == ("h264", "High", "yuv420p")
        tags = (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range)
        assert [int(tag) for tag in tags] == [1, 1, 1, 1]  # BT.709 three times, limited range
        times = [frame.pts * frame.time_base for frame in video.decode(stream)]
    assert times == [fractions.Fraction(i, 25) for i in range(50)]
    content = (tmp_path / "a.mp4").read_bytes()
    boxes, at = [], 0
    while at < len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        boxes.append(name)
        at += length
    assert boxes.index(b"moov") < boxes.index(b"mdat")  # starts before all of it has arrived


def test_odd_sizes(tmp_path):
    frame = np.full((17, 31, 3), 200, np.uint8)
    mp4.write(tmp_path / "a.mp4", [frame, frame], 30, 2)
    found = decoded(tmp_path / "a.mp4")
    assert found.shape == (2, 18, 32, 3)
    assert abs(found - 200).max() < 3  # no dark edge


def test_timing():
    turn = mp4.Turn(fps=30, seconds=2.0)
    np.testing.assert_allclose(np.diff(turn.phases()), 1 / 60, atol=1e-12)
    eased = mp4.Turn(fps=30, seconds=2.0, ease=True).phases()
    assert len(eased) == 60 and eased[0] == 0 and eased[-1] < 1
    steps = np.diff(np.append(eased, 1.0))
    assert (steps > 0).all() and steps.argmax() in (29, 30)  # fastest at the back
    assert steps[0] < 0.01 * steps.max() and steps[-1] < 0.01 * steps.max()
    # Every view is held equally long, and shown even if there are more views than frames.
    assert np.bincount(turn.views(48)).tolist() == [1] * 48
    assert np.bincount(turn.views(20)).tolist() == [3] * 20
    assert np.bincount(turn.views(500)).tolist() == [1] * 500
    eased = mp4.Turn(fps=30, seconds=2.0, ease=True).views(8)
    assert len(eased) == 60 and eased[0] == eased[-1] == 0 and set(eased) == set(range(8))


@pytest.fixture
def views(tmp_path):
    """A folder of 8 views of 24 pixels with normals, and their scene."""
    scene = ellipsoid(ring(8), 24)
    write(tmp_path / "alice", scene)
    return tmp_path / "alice", scene


def test_views(views):
    folder, scene = views
    assert command.main([str(folder), "--size", "48", "--fps", "8", "--seconds", "2"]) == 0
    found = decoded(folder / mp4.NAME)
    assert found.shape == (16, 48, 96, 3)
    coded = np.concatenate([255 * scene.images, 127.5 * (scene.normals + 1)], axis=2)
    small = found.reshape(16, 24, 2, 48, 2, 3).mean(axis=(2, 4))
    assert abs(small - coded.repeat(2, axis=0)).mean() < 4
    # Pairs of frames show one view; the next is another.
    assert abs(found[0] - found[1]).mean() < 1 < abs(found[1] - found[2]).mean()


def test_shapes(tmp_path):
    """Of other images the shape is kept; what would be endlessly wide is refused before it is drawn."""
    assert mp4.Turn(height=90).width(160, 90) == 160
    (tmp_path / "views").mkdir()
    Image.new("RGB", (4000, 20)).save(tmp_path / "views" / "a.png")
    frame = {"file_path": "views/a.png", "transform_matrix": np.eye(4).tolist()}
    about = {
        "fl_x": 1000,
        "fl_y": 1000,
        "cx": 2000,
        "cy": 10,
        "w": 4000,
        "h": 20,
        "frames": [frame],
    }
    (tmp_path / "transforms.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="wide"):
        mp4.write_views(tmp_path / "a.mp4", tmp_path, mp4.Turn())
    assert not (tmp_path / "a.mp4").exists()


def test_transparent_views_are_on_white(tmp_path):
    scene = ellipsoid(ring(8), 24, normals=False)
    hidden = scene.images * scene.masks[..., None]  # black where nothing is
    write(tmp_path / "alice", dataclasses.replace(scene, images=hidden), alpha=True)
    mp4.write_views(tmp_path / "a.mp4", tmp_path / "alice", mp4.Turn(24, 8, 1.0))
    found = decoded(tmp_path / "a.mp4")
    assert found.shape == (8, 24, 24, 3)  # without normal maps no second half
    assert abs(found[:, :2, :2] - 255).mean() < 4


def test_splats_are_drawn_at_any_size(views):
    folder, _ = views
    splats = random_gaussians(30)
    write_ply(folder / SPLATS, dataclasses.replace(splats, means=0.3 * splats.means))
    arguments = [str(folder), "--size", "33", "--fps", "4", "--seconds", "1"]
    assert command.main([*arguments, "--rasteriser", "jax", "--no-normals"]) == 0
    found = decoded(folder / mp4.NAME)
    assert found.shape == (4, 34, 34, 3)
    # The folder's report says on which background.
    (folder / "report.json").write_text('{"background": [0, 0, 1]}')
    write_video(folder / "b.mp4", folder, mp4.Turn(32, 4, 1.0, normals=False))
    corner = decoded(folder / "b.mp4")[:, :2, :2].mean(axis=(0, 1, 2))
    assert abs(corner - [0, 0, 255]).max() < 6 and found[:, :2, :2].min() > 245


def test_nothing_is_overwritten_unasked(views, capsys):
    folder, _ = views
    arguments = [str(folder), "--size", "16", "--fps", "1", "--seconds", "1"]
    (folder / mp4.NAME).write_bytes(b"mine")
    assert command.main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / mp4.NAME).read_bytes() == b"mine"
    assert command.main([*arguments, "--overwrite"]) == 0
    assert len(decoded(folder / mp4.NAME)) == 8
    assert command.main([*arguments, "--out", str(folder.parent / "videos")]) == 0
    assert len(decoded(folder.parent / "videos" / "alice.mp4")) == 8


def test_bad_folders(views, capsys):
    folder, _ = views
    assert command.main([str(folder / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    twice = [str(folder), str(folder / "views" / "..")]
    assert command.main([*twice, "--out", str(folder.parent / "videos")]) == 2
    assert "same video" in capsys.readouterr().err
    empty = folder.parent / "empty"
    empty.mkdir()
    broken = folder.parent / "broken"
    write(broken, ellipsoid(ring(8), 16))
    (broken / SPLATS).write_bytes(b"ply\nnot one")
    quick = ["--size", "16", "--fps", "1", "--seconds", "1"]
    assert command.main([str(empty), str(broken), str(folder), *quick]) == 1
    told = capsys.readouterr().err
    assert str(empty) in told and SPLATS in told and "Traceback" not in told
    assert (folder / mp4.NAME).exists()  # the others are done
    assert not (empty / mp4.NAME).exists() and not list(folder.parent.rglob(".*"))


def test_without_the_encoder(views, monkeypatch, capsys):
    """The extra is named before anything is done."""
    folder, _ = views
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"spinmeround_jax\[video\]"):
        mp4.check()
    out = folder.parent / "out"
    assert reconstruct.main([str(folder), "--out", str(out), "--video"]) == 1
    assert "[video]" in capsys.readouterr().err and not out.exists()
