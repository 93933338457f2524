"""The command, on small pictures of an ellipsoid."""

import dataclasses
import json
import os
import shutil

import av
import numpy as np
import pytest
import trimesh
from PIL import Image

from spinmeround_jax import files, reconstruct
from spinmeround_jax.splats import folder as splat_outputs
from spinmeround_jax.splats import scene as scenes
from spinmeround_jax.splats.ply import read_ply
from spinmeround_jax.video import mp4
from tests.support.splat_views import ellipsoid, ring, write

FAST = ["--lpips", "0", "--steps", "20", "--count", "200", "--degree", "0"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A head written and reconstructed: its folder, the result's, the exit code."""
    root = tmp_path_factory.mktemp("reconstruct")
    write(root / "in" / "alice", ellipsoid(ring(16), 24))
    code = reconstruct.main([str(root / "in" / "alice"), "--out", str(root / "out"), *FAST])
    return root / "in" / "alice", root / "out" / "alice", code


def test_what_is_written(done):
    _, folder, code = done
    assert code == 0
    assert sorted(p.name for p in folder.parent.iterdir()) == ["alice"]  # no checkpoint is left
    assert read_ply(folder / "splats.ply").means.shape == (200, 3)
    report = json.loads((folder / "report.json").read_text())
    assert report["masks_from"] == {"normals": 16} and report["views"] == 16
    assert report["up"].startswith("y")
    assert report["held_out"] == ["views/view_004.png", "views/view_012.png"]
    assert set(report["distances"]) == {"fitted", "held_out"}
    assert report["distances"]["held_out"]["psnr"] > 15.0
    assert report["left_out"] == {}
    assert len(trimesh.load(folder / "mesh.glb", force="mesh").faces) > 500
    textured = trimesh.load(folder / "mesh_textured.glb", force="mesh")
    assert len(textured.faces) > 500 and textured.visual.material.baseColorTexture.size == (
        512,
        512,
    )
    (cloud,) = trimesh.load(folder / "splats.glb").geometry.values()
    assert len(cloud.vertices) == 200
    page = (folder / "viewer.html").read_text()
    assert "<title>" in page and "alice" in page
    with Image.open(folder / "turntable.webp") as turn:
        assert (turn.n_frames, turn.size) == (48, (48, 24))


def test_the_drawn_views_are_a_set_of_views_like_the_given_ones(done):
    given, folder, _ = done
    drawn, true = scenes.load(folder), scenes.load(given)
    np.testing.assert_allclose(drawn.world_to_camera, true.world_to_camera, atol=1e-5)
    assert drawn.names == true.names
    assert np.mean((drawn.images - true.images) ** 2) < 0.02
    scenes.check(drawn, "drawn")


def test_done_before(done, capsys):
    given, folder, _ = done
    stamp = (folder / "report.json").stat().st_mtime_ns
    arguments = [str(given), "--out", str(folder.parent), *FAST]
    assert reconstruct.main(arguments) == 0
    assert "already done" in capsys.readouterr().out
    assert (folder / "report.json").stat().st_mtime_ns == stamp
    assert reconstruct.main([*arguments, "--seed", "1"]) == 1
    told = capsys.readouterr().err
    assert "seed: 0 -> 1" in told and "--overwrite" in told and "steps" not in told
    assert (folder / "report.json").stat().st_mtime_ns == stamp


def test_video_of_a_finished_head(done, monkeypatch, capsys):
    given, folder, _ = done
    monkeypatch.setattr(mp4, "DEFAULT", mp4.Turn(height=32, fps=4, seconds=1.0))
    arguments = [str(given), "--out", str(folder.parent), *FAST, "--video"]
    assert reconstruct.main(arguments) == 0
    assert "already done" in capsys.readouterr().out
    with av.open(str(folder / mp4.NAME)) as video:
        assert [f.to_ndarray(format="rgb24").shape for f in video.decode(video=0)] == [
            (32, 64, 3)
        ] * 4
    stamp = (folder / mp4.NAME).stat().st_mtime_ns
    assert reconstruct.main(arguments) == 0
    assert (folder / mp4.NAME).stat().st_mtime_ns == stamp
    (folder / mp4.NAME).unlink()


def test_views_are_known_by_what_they_hold(done, tmp_path, capsys):
    """Not by their path: moved they are the same, and other views at the same path are not."""
    given, folder, _ = done
    arguments = ["--out", str(folder.parent), *FAST]
    moved = tmp_path / "alice"
    shutil.copytree(given, moved)
    assert reconstruct.main([str(moved), *arguments]) == 0
    assert "already done" in capsys.readouterr().out
    picture = sorted((moved / "views").iterdir())[0]
    with Image.open(picture) as image:
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(picture)
    stamp = (folder / "report.json").stat().st_mtime_ns
    assert reconstruct.main([str(moved), *arguments]) == 1
    told = capsys.readouterr().err
    assert "views_sha256" in told and "--overwrite" in told and "Traceback" not in told
    assert (folder / "report.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("kept", ["replaced", "unfinished"])
def test_after_a_kill_while_it_was_replaced(done, tmp_path, capsys, kept):
    given, folder, _ = done
    out = tmp_path / "out"
    shutil.copytree(folder, out / f".alice.{'replaced' if kept == 'replaced' else '1.unfinished'}")
    if kept == "unfinished":
        shutil.copytree(folder, out / "alice")
    assert reconstruct.main([str(given), "--out", str(out), *FAST]) == 0
    assert "already done" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["alice"]


def test_only_one_process_makes_a_folder(done, tmp_path, capsys):
    given, _, _ = done
    with files.lock(tmp_path / "alice", suffix="fit.lock"):
        assert reconstruct.main([str(given), "--out", str(tmp_path), *FAST]) == 1
    assert f"process {os.getpid()} on" in capsys.readouterr().err


def test_one_bad_input_does_not_stop_the_others(tmp_path, capsys):
    few = tmp_path / "few"
    write(few, ellipsoid(ring(6), 24))
    good = tmp_path / "good"
    write(good, dataclasses.replace(ellipsoid(ring(9), 24), normals=None))
    arguments = [str(few), str(good), "--out", str(tmp_path / "out"), "--hold-out", "0", *FAST]
    assert reconstruct.main(arguments) == 1
    told = capsys.readouterr()
    assert "few/transforms.json: 6 views; reconstruction needs at least 8" in told.err
    assert "9 of 9 images" in told.out and "that is not background" in told.out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good"]
    report = json.loads((tmp_path / "out" / "good" / "report.json").read_text())
    assert set(report["distances"]) == {"fitted"} and "normals" not in report["distances"]["fitted"]


def test_views_held_out_are_counted(tmp_path, capsys):
    write(tmp_path / "a", ellipsoid(ring(8), 24))
    assert reconstruct.main([str(tmp_path / "a"), "--out", str(tmp_path / "out"), *FAST]) == 1
    assert "8 views, 1 of them held out" in capsys.readouterr().err


def test_wrong_usage(tmp_path, capsys):
    write(tmp_path / "a", ellipsoid(ring(8), 24))
    mine = tmp_path / "out" / "a"
    mine.mkdir(parents=True)
    (mine / "keep.txt").write_text("not ours")
    for arguments, told in [
        ([str(tmp_path / "nowhere")], "no such file"),
        ([str(tmp_path / "a"), str(tmp_path / "a")], "the same folder"),
        ([str(tmp_path / "a"), "--background", "pink"], "--background pink"),
        ([str(tmp_path / "a"), "--background", "2,0,0"], "--background 2,0,0"),
        ([str(tmp_path / "a")], "in the way"),
    ]:
        assert reconstruct.main([*arguments, "--out", str(tmp_path / "out"), *FAST]) == 2
        assert told in capsys.readouterr().err
    assert [p.name for p in mine.iterdir()] == ["keep.txt"]


def test_names_of_views():
    assert splat_outputs.file_name(3, "views/view_003_yaw.png") == "view_003_yaw.png"
    assert splat_outputs.file_name(3, "a/IMG 7<b>.jpeg") == "view_003_IMG_7_b_.png"
    assert len(splat_outputs.file_name(0, "x" * 500 + ".png")) < 130
