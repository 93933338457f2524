"""Scans of heads: files, textures, alignment by landmarks or by a detector, the command."""

import argparse
import json
import shutil
import types

import numpy as np
import pytest

pytest.importorskip("trimesh", reason="reading meshes needs '.[data]'")

import trimesh
from PIL import Image

from data_prep import factory, meshes
from data_prep.parametric.head import build_head
from data_prep.parametric.landmarks import world_landmarks
from data_prep.parametric.people import sample_person
from data_prep.rendering import render
from data_prep.scans import alignment, textured
from data_prep.workers import SubjectRejected
from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.photo import landmarks, pose
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.faces import Face
from tests.support import head_field

SIZE = 64
ROTATION = cameras.orbit(35.0, 20.0)[:3, :3].astype(float) @ np.array(
    [[0, 1, 0], [0, 0, 1], [1, 0, 0.0]]
)
SCALE, OFFSET = 170.0, np.array([30.0, -80.0, 1200.0])  # a scan in millimetres, somewhere


@pytest.fixture(scope="module")
def head():
    """(vertices, faces, normals) of a bald head in the canonical frame."""
    return head_field.bald_head(level=1)


@pytest.fixture(scope="module")
def points():
    """(68, 3) landmarks of the same head."""
    return world_landmarks(build_head(sample_person(3), 1))


def moved(values):
    return SCALE * values @ ROTATION.T + OFFSET


def texture():
    """Red grows to the right, green upward: (256, 256, 3) uint8."""
    x, y = np.meshgrid(np.linspace(0, 255, 256), np.linspace(255, 0, 256))
    return np.stack([x, y, np.full_like(x, 60)], axis=-1).round().astype(np.uint8)


def uv_of(vertices):
    """The canonical frame's x and y, in [-0.5, 0.5], onto the texture."""
    return np.clip(vertices[:, :2] + 0.5, 0, 1)


def save(path, head, transform=moved):
    """Writes the head; what cannot hold textures gets colours of its vertices."""
    vertices, faces, _ = head
    uv = uv_of(vertices)
    mesh = trimesh.Trimesh(transform(vertices), faces, process=False)
    if path.suffix == ".ply":
        colours = np.column_stack([255 * uv, np.full(len(uv), 60)]).round().astype(np.uint8)
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colours)
    else:
        material = (
            trimesh.visual.material.SimpleMaterial(image=Image.fromarray(texture()))
            if path.suffix == ".obj"
            else trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(texture()))
        )
        mesh.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    path.parent.mkdir(parents=True, exist_ok=True)
    mesh.export(path)
    return path


def models_that_see(points, calls=None):
    """A detector that finds the true landmarks, where the camera of meshes.find sees them."""

    def find(image):
        if calls is not None:
            calls.append(image)
        seen = points(image)
        if seen is None:
            return []
        landmarks68 = np.column_stack([seen, np.zeros(68)])
        return [Face(np.zeros(4), 0.9, landmarks.five_of(seen), landmarks68)]

    def embed(image, five):
        vector = np.resize(image.mean(axis=(0, 1)), 512)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    return types.SimpleNamespace(
        finder=types.SimpleNamespace(find=find), recogniser=types.SimpleNamespace(embed=embed)
    )


@pytest.mark.parametrize("suffix", [".obj", ".glb", ".ply"])
def test_colours_and_normals_are_the_files(tmp_path, head, suffix):
    _, faces, _ = head
    parts = textured.read(save(tmp_path / f"head{suffix}", head, lambda values: values))
    (part,) = parts
    assert len(part.faces) == len(faces)
    pose35 = cameras.orbit(35.0, 5.0)
    view = textured.draw(textured.scene(parts), parts, pose35, SIZE, 3)
    exact = render.render_view(head_field.scene_of(*head), pose35, SIZE, 3)
    np.testing.assert_array_equal(view.rgba[..., 3], exact.rgba[..., 3])
    solid = view.rgba[..., 3] == 255
    where = view.positions[solid]
    expected = np.column_stack([255 * uv_of(where), np.full(solid.sum(), 60)])
    difference = np.abs(view.rgba[solid][:, :3] - expected)
    inner = (np.abs(where[:, :2]) < 0.45).all(axis=1)
    assert np.median(difference[inner]) < 2 and difference[inner].mean() < 4
    assert (view.rgba[view.rgba[..., 3] == 0] == (255, 255, 255, 0)).all()
    cosine = (view.normals[solid] * exact.normals[solid]).sum(-1)
    assert np.median(np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))) < 1.0


def test_seams_of_the_texture_do_not_show_in_normals(tmp_path, head):
    vertices, faces, _ = head
    split = trimesh.Trimesh(
        vertices[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3), process=False
    )
    split.visual = trimesh.visual.ColorVisuals(
        split, vertex_colors=np.full((faces.size, 4), 200, np.uint8)
    )
    split.export(tmp_path / "split.ply")
    (part,) = textured.read(tmp_path / "split.ply")
    np.testing.assert_allclose(part.normals, head[2][faces].reshape(-1, 3), atol=2e-3)


def test_open_scans_look_at_the_viewer_from_behind(tmp_path):
    sheet = trimesh.Trimesh(
        [[-0.2, -0.2, 0], [0.2, -0.2, 0], [0, 0.2, 0]], [[0, 1, 2]], process=False
    )
    sheet.visual = trimesh.visual.ColorVisuals(sheet, vertex_colors=np.full((3, 4), 200, np.uint8))
    sheet.export(tmp_path / "sheet.ply")
    parts = textured.read(tmp_path / "sheet.ply")
    for yaw, expected in ((0.0, 1.0), (180.0, -1.0)):
        view = textured.draw(textured.scene(parts), parts, cameras.orbit(yaw), 32, 1)
        hit = view.rgba[..., 3] > 0
        assert hit.sum() > 50
        np.testing.assert_allclose(view.normals[hit][:, 2], expected, atol=1e-5)


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", b"ply\nformat ascii 1.0\nelement vertex 1\nend_header\n", b"v 0 0 nan\n"],
)
@pytest.mark.parametrize("suffix", [".obj", ".glb", ".ply"])
def test_files_that_are_no_meshes_are_named(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(textured.MeshError, match=rf"bad\{suffix}: "):
        textured.read(path)


def test_grey_meshes_and_lost_textures_are_named(tmp_path, head):
    trimesh.Trimesh(head[0], head[1], process=False).export(tmp_path / "grey.stl")
    with pytest.raises(textured.MeshError, match="neither a texture nor colours"):
        textured.read(tmp_path / "grey.stl")


# --------------------------------------------------------------------------------------------------
# Alignment


def test_a_similarity_is_recovered():
    rng = np.random.default_rng(0)
    some = rng.standard_normal((12, 3))
    scale, rotation, offset = alignment.similarity(moved(some), some)
    np.testing.assert_allclose(scale * moved(some) @ rotation.T + offset, some, atol=1e-9)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    with pytest.raises(alignment.AlignmentError, match="on one line"):
        alignment.similarity(np.outer(np.arange(5.0), [1, 2, 3]), rng.standard_normal((5, 3)))


def test_landmarks_put_a_scan_in_its_place(points):
    for given, most in ((points, 0.015), (landmarks.five_of(points), 0.02)):
        scale, rotation, offset = alignment.from_landmarks(moved(given))
        back = scale * moved(points) @ rotation.T + offset
        # Heads differ, and the similarity is to the mean head: 0.015 is 12 pixels of 512.
        assert np.linalg.norm(back - points, axis=1).mean() < most
        turn = np.rad2deg(np.arccos((np.trace(rotation @ ROTATION) - 1) / 2))
        assert turn < 6 and scale * SCALE == pytest.approx(1.0, abs=0.08)


def test_a_detector_puts_a_scan_in_its_place(tmp_path, head, points, monkeypatch):
    # z up and the face along -y, in centimetres: what --up z --front=-y is for.
    turned = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    path = save(tmp_path / "scan.ply", head, lambda values: 25.0 * values @ turned.T + 7.0)
    parts = textured.read(path)
    wanted = 25.0 * points @ turned.T + 7.0
    places, calls = [], []
    original = alignment._seen

    def seen(parts, models, place):
        places.append(place)
        return original(parts, models, place)

    def project(image):
        scale, rotation, offset = places[-1]
        at = pose.project(scale * wanted @ rotation.T + offset, 0.0, 0.0) * 512
        return at if ((at > 0) & (at < 512)).all() else None

    monkeypatch.setattr(alignment, "_seen", seen)
    found = alignment.find(parts, models_that_see(project, calls), "z", "-y")
    back = found[0] * wanted @ found[1].T + found[2]
    assert np.linalg.norm(back - points, axis=1).mean() < 0.015
    assert len(calls) >= 2 and np.ptp(calls[-1].astype(int)) > 100
    with pytest.raises(alignment.AlignmentError, match="no face is seen along x with y upward"):
        alignment.find(parts, models_that_see(lambda image: None), "y", "x")
    with pytest.raises(alignment.AlignmentError, match="same axis"):
        alignment.find(parts, models_that_see(project), "y", "-y")


@pytest.mark.parametrize(
    "content",
    ["", "3", "[1, 2]", "[[1, 2, 3]]", "[0, 1, 2, 3, 99999999]", "[0, 1, 2, 3, -1]", '"a"'],
)
def test_landmarks_that_are_none_are_named(tmp_path, head, content):
    parts = textured.read(save(tmp_path / "head.ply", head))
    path = tmp_path / "head.landmarks.json"
    path.write_text(content)
    with pytest.raises(alignment.AlignmentError, match=r"head\.landmarks\.json: expected"):
        alignment.read_landmarks(path, parts)


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def scans(tmp_path, head, points):
    folder = tmp_path / "scans"
    for name in ("anna.ply", "bert/smile.ply", "bert/neutral.ply", "carl.ply"):
        path = save(folder / name, head)
        path.with_suffix(".landmarks.json").write_text(json.dumps(moved(points).tolist()))
        np.save(path.with_suffix(".npy"), np.eye(512, dtype=np.float32)[len(name)])
    return folder


def test_a_folder_of_scans_becomes_records_without_models(tmp_path, scans, capsys):
    (scans / "carl.ply").write_bytes(b"not a mesh")
    out = tmp_path / "data"
    command = f"--input {scans} --out {out} --license CC0 --size 48 --views 4 --samples 1"
    command += " --workers 1 --held-out 1 --shard-subjects 2"
    meshes.main(command.split())
    manifest = read_manifest(out)
    assert manifest["license"] == "CC0" and manifest["rejected"] == 1
    found = {
        split: [
            name for entry in entries for name in shards.read_index(out / entry["file"]).subjects
        ]
        for split, entries in manifest["splits"].items()
    }
    assert sorted(name for names in found.values() for name in names) == [
        "anna.ply",
        "bert/neutral.ply",
        "bert/smile.ply",
    ]
    assert sum(any("bert" in name for name in names) for names in found.values()) == 1
    (line,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert line["subject"] == "carl.ply" and "not a readable mesh" in line["reason"]
    assert "1 of 4 were rejected" in capsys.readouterr().out
    split = next(split for split, names in found.items() if "anna.ply" in names)
    entry = manifest["splits"][split][0]
    index = shards.read_index(out / entry["file"])
    (view,) = index.read_views(index.subjects.tolist().index("anna.ply"), [0])
    normals = records.decode_normals(view.normals, 48, "here")
    middle = normals[20:30, 20:28]
    assert middle[..., 2].mean() > 0.7  # the face looks along +z

    # Mended and tried again.
    shutil.copy(scans / "anna.ply", scans / "carl.ply")
    meshes.main([*command.split(), "--retry-rejected"])
    assert "rejected" not in read_manifest(out)
    with pytest.raises(SystemExit, match="other settings"):
        meshes.main([*command.split(), "--up", "z"])


def test_without_models_the_command_says_what_is_missing(tmp_path, scans):
    (scans / "anna.npy").unlink()
    args = argparse.Namespace(
        input=scans, held_out=0, size=32, views=2, samples=1, up="y", front="z", license="CC0",
        models=tmp_path / "nothing",
    )  # fmt: skip
    with pytest.raises(AssetError, match="missing"):
        meshes.build(args)
    args.held_out = 3
    with pytest.raises(factory.FactoryError, match="has 3 people"):
        meshes.build(args)
    args.input = tmp_path / "nowhere"
    with pytest.raises(factory.FactoryError, match="no meshes in it"):
        meshes.build(args)


def test_identity_comes_from_frontal_views(scans, points):
    (scans / "anna.npy").unlink()
    source = meshes.Meshes(scans, ("anna.ply",), (), 32, 8, 1, "y", "z", "CC0", None)
    seen = []

    def find(image):
        seen.append(image)
        return np.zeros((68, 2))

    views = meshes.view_records(source, models_that_see(find), scans / "anna.ply")
    assert len(seen) == 1 and len(views) == 8  # of eight views around, one is frontal
    with pytest.raises(SubjectRejected, match="no face is found"):
        meshes.view_records(source, models_that_see(lambda image: None), scans / "anna.ply")
