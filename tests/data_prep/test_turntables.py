"""Videos and photos of people become training data: frames, cameras, surface, the command."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data_prep import turntables
from data_prep.calibrated import frames, readers, structure
from data_prep.parametric.people import sample_person
from data_prep.parametric.subjects import build_scene
from data_prep.rendering import render
from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.files import InputError
from spinmeround_jax.photo.prepare import Models
from tests.support import shot_heads
from tests.support.loaders import loader
from tests.support.paths import ROOT

ANGLES = [(20.0 * n - 180.0, (0.0, 8.0, -8.0)[n % 3]) for n in range(18)]
DISTANCE = 3.6
SIZE, VIEWS = 64, 8


def options(subjects, out):
    return [
        "--input", str(subjects), "--out", str(out), "--license", "CC0-1.0", "--size", str(SIZE),
        "--views", str(VIEWS), "--fit-size", "64", "--fit-steps", "200", "--framing", "canonical",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of one good subject and one who was seen from one side, and the truth about the former."""
    folder = tmp_path_factory.mktemp("turntables")
    shot = shot_heads.write(folder / "subjects" / "anna", 3, ANGLES, DISTANCE)
    side = [(float(yaw), 0.0) for yaw in range(-60, 61, 10)]
    shot_heads.write(folder / "subjects" / "bert", 4, side, DISTANCE)
    code = turntables.main(options(folder / "subjects", folder / "data"))
    return folder, shot, code


def test_a_capture_becomes_data_that_training_reads(made):
    folder, _, code = made
    assert code == 0
    manifest = read_manifest(folder / "data")
    assert manifest["counts"]["train"]["subjects"] == 1 and "estimates" in manifest["source"]
    report = json.loads((folder / "data" / "validation" / "validation.json").read_text())
    assert report["faults"] == []
    assert (folder / "data" / "validation" / "validation.html").is_file()
    batch = next(iter(loader(folder / "data", batch_size=2)))
    assert batch.images.shape == (2, 3, SIZE, SIZE, 3)
    assert (batch.id_embedding == np.eye(512)[3]).all()


def test_poses_normals_and_colours_are_those_of_the_head(made):
    folder, shot, _ = made
    index = shards.read_index(folder / "data" / "train-00000-of-00001.tfrecord")
    taken = np.array([shot.angles(*angles, DISTANCE) for angles in ANGLES])
    towards = cameras.orbit(*taken.T)[:, 2, :3]
    off, errors = [], []
    for record in index.read_views(0, range(VIEWS)):
        pose = record.world_to_camera
        off.append(np.rad2deg(np.arccos(np.clip(towards @ pose[2, :3], -1, 1))).min())
        rgba, normals = records.decode_view(record, SIZE, "")
        true = shot.truth(pose, SIZE)
        both = (rgba[..., 3] > 200) & (true.rgba[..., 3] > 200)
        assert both.sum() > 0.93 * (true.rgba[..., 3] > 200).sum()
        cosine = (normals * true.normals).sum(-1)[both]
        errors.append(np.rad2deg(np.arccos(np.clip(cosine, -1, 1))))
        difference = abs(rgba[..., :3].astype(int) - true.rgba[..., :3])[both]
        # Without the move back from DISTANCE the median is three times as large.
        assert np.median(difference) < 6
    assert max(off) < 1.0
    assert np.median(np.concatenate(errors)) < 15.0


def test_who_cannot_be_used_is_told_in_one_line(made):
    folder, *_ = made
    (line,) = (folder / "data" / "rejected.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["subject"] == "bert" and "one side is never seen" in entry["reason"]
    assert "\n" not in entry["reason"] and "bert" in entry["reason"]


def test_a_killed_run_resumes(made, tmp_path):
    folder, *_ = made
    shutil.copytree(folder / "subjects", tmp_path / "subjects")
    command = [
        sys.executable,
        "-m",
        "data_prep.turntables",
        *options(tmp_path / "subjects", tmp_path / "data"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "data" / "work" / "anna.fit.npz"
    try:
        deadline = time.monotonic() + 300
        while not checkpoint.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert turntables.main(command[3:]) == 0
    name = "train-00000-of-00001.tfrecord"
    assert (tmp_path / "data" / name).read_bytes() == (folder / "data" / name).read_bytes()


def test_what_is_no_subject_is_told_at_once(tmp_path):
    with pytest.raises(InputError, match="no subjects in it"):
        turntables.find(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        turntables.find(tmp_path / "none")


# --------------------------------------------------------------------------------------------------
# Videos


def write_video(path, sharp, count=40, size=(96, 64)):
    """Stripes that are blurred but in the frames `sharp`; the upper left quarter is red."""
    av = pytest.importorskip("av", reason="videos need '.[video]'")
    width, height = size
    with av.open(str(path), "w", format="mp4") as video:
        stream = video.add_stream("libx264", rate=20, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            frame = np.full((height, width, 3), 128, np.uint8)
            if number in sharp:
                frame[:, ::4] = 255
            frame[: height // 2, : width // 2] = (250, 5, 5)
            frame[-8:] = 6 * number  # tells which it is
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode())
    return path


def test_the_sharpest_frame_of_each_part_is_taken(tmp_path):
    path = write_video(tmp_path / "turn.mp4", sharp=(3, 18, 22, 37))
    taken = [np.asarray(image) for image in frames.sharpest(path, 4, 1000)]
    assert [round(float(image[-4, :, 1].mean()) / 6) for image in taken] == [3, 18, 22, 37]
    assert taken[0].shape == (64, 96, 3)
    (small, *_) = frames.sharpest(path, 4, 48)
    assert small.size == (48, 32)


def test_a_video_that_says_it_lies_on_its_side_is_turned(tmp_path):
    """As telephones write it: the matrix of the track's header turns by 90 degrees clockwise."""
    path = write_video(tmp_path / "turn.mp4", sharp=())
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other fields
    one = 1 << 16
    content[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 64 * one, 0, 1 << 30)
    path.write_bytes(content)
    (image, *_) = frames.sharpest(path, 2, 1000)
    assert image.size == (64, 96)
    red, green, _ = np.asarray(image)[20, -12].astype(int)  # the upper left is the upper right now
    assert red > 200 and green < 60


@pytest.mark.parametrize("content", [b"", b"no video", b"#EXTM3U\n/etc/passwd\n"])
def test_what_is_no_video_is_told(tmp_path, content):
    pytest.importorskip("av", reason="videos need '.[video]'")
    path = tmp_path / "turn.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"turn\.mp4"):
        list(frames.sharpest(path, 4, 1000))


def test_a_video_cut_short_is_told(tmp_path):
    path = write_video(tmp_path / "turn.mp4", sharp=(1,))
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(InputError, match="not a readable video"):
        list(frames.sharpest(path, 4, 1000))


# --------------------------------------------------------------------------------------------------
# Cameras


def room(pose, size, focal, ball=0.7):
    """(size, size) uint8: a textured ball, or none, in a textured room, from an OpenGL camera."""
    steps = ((np.arange(size) + 0.5) / size - 0.5) / focal
    x, y = np.meshgrid(steps, -steps)
    rays = np.stack([x, y, -np.ones_like(x)], axis=-1) @ pose[:3, :3]
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    origin = -pose[:3, :3].T @ pose[:3, 3]
    middle = rays @ origin
    near, wall = (middle**2 - (origin @ origin - radius**2) for radius in (ball, 5.0))
    hits = near > 0
    far = np.where(hits, -middle - np.sqrt(np.maximum(near, 0)), -middle + np.sqrt(wall))
    points = origin + far[..., None] * rays
    grey = np.zeros(points.shape[:2])
    rng = np.random.default_rng(0)
    for frequency in (3.0, 7.0, 15.0, 31.0):
        for _ in range(4):
            wave = rng.standard_normal(3) * frequency
            grey += np.sin(points @ wave * np.where(hits, 1.0, 0.25) + rng.uniform(0, 6))
    return np.uint8(np.clip(128 + 22 * grey, 0, 255))


def test_cameras_of_photos_are_found(tmp_path):
    pytest.importorskip("pycolmap", reason="cameras need '.[captures]'")
    source, folder = tmp_path / "anna", tmp_path / "work" / "anna"
    source.mkdir()
    yaws = np.arange(0, 120, 10.0)
    truth = []
    for number, yaw in enumerate(yaws):
        pose = cameras.orbit(yaw, 10.0).astype(np.float64)
        image = Image.fromarray(room(pose, 320, 1.4)).convert("RGB")
        # Stored on its side, with EXIF's word for how to turn it back.
        exif = Image.Exif()
        exif[274] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(
            source / f"{number:02d}.jpg", quality=95, exif=exif
        )
        truth.append(pose[:3, :3])
    structure.calibrate(source, folder, 60, "camera", Models())
    photos = readers.read(folder)
    assert len(photos) >= 10
    first, *rest = photos
    number = int(first.path.stem)
    to_opencv = np.diag([1.0, -1.0, -1.0])
    for photo in rest:
        found = photo.world_to_camera[:3, :3] @ first.world_to_camera[:3, :3].T
        true = to_opencv @ truth[int(photo.path.stem)] @ truth[number].T @ to_opencv
        angle = np.rad2deg(np.arccos(np.clip((np.trace(found @ true.T) - 1) / 2, -1, 1)))
        assert angle < 1.0
    assert sorted(path.name for path in folder.parent.iterdir() if path.name[0] != ".") == ["anna"]


def test_photos_of_nothing_in_common_are_told(tmp_path):
    pytest.importorskip("pycolmap", reason="cameras need '.[captures]'")
    source = tmp_path / "anna"
    source.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(source / f"{number}.png")
    with pytest.raises(InputError, match=r"anna: COLMAP finds the cameras of 0 of 4 images"):
        structure.calibrate(source, tmp_path / "work" / "anna", 60, "camera", Models())
    assert not (tmp_path / "work" / "anna").exists()


@pytest.mark.slow
def test_a_video_of_a_person_in_a_room_becomes_data(tmp_path, monkeypatch):
    """Nothing is given but the video: cameras, landmarks, masks and identity are found."""
    av = pytest.importorskip("av", reason="videos need '.[video]'")
    pytest.importorskip("pycolmap", reason="cameras need '.[captures]'")
    size, focal, distance = 400, 1.3, 1.3
    (tmp_path / "subjects").mkdir()
    scene, _ = build_scene(sample_person(3), size)
    monkeypatch.setattr(cameras, "FOCAL", focal)  # a telephone's, nearer to the head
    with av.open(str(tmp_path / "subjects" / "anna.mp4"), "w", format="mp4") as video:
        stream = video.add_stream("libx264", rate=20, options={"crf": "14"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(48):
            pose = cameras.orbit(7.5 * number, 6.0 * np.sin(number / 5)).astype(np.float64)
            pose[2, 3] = -distance
            rgba = render.render_view(scene, pose, size, 3).rgba.astype(np.float32)
            alpha = rgba[..., 3:] / 255
            wall = room(pose, size, focal, ball=0.0)[..., None]
            image = np.uint8(rgba[..., :3] * alpha + wall * (1 - alpha))
            video.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        video.mux(stream.encode())
    monkeypatch.undo()
    assert (
        turntables.main([*options(tmp_path / "subjects", tmp_path / "data"), "--frames", "40"]) == 0
    )
    index = shards.read_index(tmp_path / "data" / "train-00000-of-00001.tfrecord")
    shot = shot_heads.Shot(scene, np.eye(3), 1.0, np.zeros(3))
    overlap, errors = [], []
    for record in index.read_views(0, range(VIEWS)):
        rgba, normals = records.decode_view(record, SIZE, "")
        true = shot.truth(record.world_to_camera, SIZE)
        inside, truly = rgba[..., 3] > 127, true.rgba[..., 3] > 127
        overlap.append((inside & truly).sum() / (inside | truly).sum())
        cosine = (normals * true.normals).sum(-1)[inside & truly]
        errors.append(np.rad2deg(np.arccos(np.clip(cosine, -1, 1))))
    print(np.round(overlap, 3), np.median(np.concatenate(errors)))
    assert min(overlap) > 0.8 and np.median(np.concatenate(errors)) < 20
    assert np.linalg.norm(record.id_embedding) == pytest.approx(1.0, abs=1e-3)
