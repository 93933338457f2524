"""From a generator's density and pictures to records: surface, filter, lists, writing; the pickle."""

import argparse
import dataclasses
import json
import pathlib
import pickle
import types

import numpy as np
import pytest

pytest.importorskip("skimage", reason="marching cubes need '.[data]'")


from data_prep import back_filter, factory, identity, panohead
from data_prep.back_filter import Scores, Thresholds
from data_prep.generator import isosurface, screening
from data_prep.rendering import cutout, render
from data_prep.workers import SubjectRejected
from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import landmarks, pose
from spinmeround_jax.photo.faces import Face
from tests.support import head_field, panohead_checkout

SIZE, GRID = 64, 64
ZOOM, OFFSET = pose.FRAMINGS["panohead"]
OPTIONS = panohead.Options(size=SIZE, grid=GRID)
BACKDROP = (30, 240, 30)
NETWORK = panohead.Network(pathlib.Path("PanoHead"), pathlib.Path("easy.pkl"), "0" * 64, "cpu")


@pytest.fixture(scope="module")
def head():
    """(vertices, faces, normals) of a bald head, framed as PanoHead's are."""
    vertices, faces, normals = head_field.bald_head(level=1)
    return ZOOM * vertices + np.array(OFFSET), faces, normals


@pytest.fixture(scope="module")
def density(head):
    vertices, _, normals = head
    return head_field.density_of(vertices, normals, GRID)


class StandIn:
    """A panohead.Generator: seed 13 has a second head's debris, 14 no head, 15 a face at the back."""

    def __init__(self, head, density):
        self.scene, self._density = head_field.scene_of(*head), density

    def images(self, seed, world_to_camera):
        pictures = []
        for camera in world_to_camera:
            rgba = render.render_view(self.scene, camera, SIZE, 1).rgba
            pictures.append(np.where(rgba[..., 3:] > 0, rgba[..., :3], BACKDROP).astype(np.uint8))
        return np.stack(pictures)

    def density(self, seed, size):
        assert size == GRID
        field = self._density.copy()
        if seed == 13:
            field[40:55, 45:62, 2:12] = 30.0
        if seed == 14:
            field[:] = -5.0
        if seed == 15:  # what is in front of the ears, also behind them
            field[:, :, : GRID // 2] = field[:, :, : GRID // 2 - 1 : -1]
        return field, 1.0


@pytest.fixture(scope="module")
def generator(head, density):
    return StandIn(head, density)


def fake_models(sees=lambda image: True):
    """Models whose detector answers as `sees` says, and whose identity is the mean colour."""

    def find(image):
        return [Face(np.zeros(4), 0.9, np.zeros((5, 2)), np.zeros((68, 3)))] * bool(sees(image))

    def identify(image, face):
        vector = np.resize(image.mean(axis=(0, 1)), 512)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    return types.SimpleNamespace(finder=types.SimpleNamespace(find=find), identify=identify)


# --------------------------------------------------------------------------------------------------
# Surface


def test_normals_of_a_known_head_through_marching_cubes():
    vertices, faces, normals = head_field.bald_head(level=2)
    field = head_field.density_of(vertices, normals, 96)
    surface = isosurface.extract(field, 1.0, 10.0, 0.1)
    found = isosurface.scene(surface.vertices, surface.faces, surface.normals)
    exact = head_field.scene_of(vertices, faces, normals)
    for yaw, pitch in ((0, 0), (60, 10), (180, 0)):
        views = [render.render_view(s, cameras.orbit(yaw, pitch), 96, 1) for s in (exact, found)]
        hit = [view.rgba[..., 3] > 0 for view in views]
        both = hit[0] & hit[1]
        assert both.sum() / (hit[0] | hit[1]).sum() > 0.97
        cosine = (views[0].normals[both] * views[1].normals[both]).sum(-1)
        assert np.median(np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))) < 3.0


def ball(radius, centre=(0, 0, 0), size=48):
    points = isosurface.grid(size, 1.0)
    distance = np.linalg.norm(points - np.array(centre), axis=1)
    return (10.0 + 500.0 * (radius - distance)).reshape(size, size, size).astype(np.float32)


def test_a_ball_is_where_it_was_put_and_looks_outward():
    centre = np.array([0.1, -0.15, 0.05])
    surface = isosurface.extract(ball(0.2, centre), 1.0, 10.0)
    outward = surface.vertices - centre
    np.testing.assert_allclose(np.linalg.norm(outward, axis=1), 0.2, atol=2e-3)
    assert ((surface.normals * outward).sum(axis=1) > 0.19).all()
    assert surface.volume == pytest.approx(4 / 3 * np.pi * 0.2**3, rel=0.01)
    assert surface.floaters < 1e-6


def test_loose_pieces_and_hollows_go_and_the_neck_is_closed():
    head, crumb, hole = ball(0.2), ball(0.06, (0.0, 0.4, 0.0)), ball(0.08)
    alone = isosurface.extract(head, 1.0, 10.0)
    joined = isosurface.extract(np.maximum(head, crumb), 1.0, 10.0)
    assert joined.floaters > 0.01
    np.testing.assert_array_equal(joined.vertices, alone.vertices)
    hollow = isosurface.extract(np.minimum(head, 20.0 - hole), 1.0, 10.0)
    assert hollow.volume == pytest.approx(alone.volume, rel=1e-3)
    # Reaching the bottom of the cube, like a neck, it gets a flat end there: still closed.
    neck = isosurface.extract(ball(0.2, (0.0, -0.5, 0.0)), 1.0, 10.0)
    edges = np.sort(neck.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()
    assert neck.volume == pytest.approx(2 / 3 * np.pi * 0.2**3, rel=0.1)


def test_density_without_a_head_is_an_error():
    with pytest.raises(InputError, match="nowhere exceeds 10"):
        isosurface.extract(np.zeros((8, 8, 8), np.float32), 1.0, 10.0)
    with pytest.raises(InputError, match="finite"):
        isosurface.extract(np.full((8, 8, 8), np.nan, np.float32), 1.0, 10.0)


# --------------------------------------------------------------------------------------------------
# Pictures


def test_edges_take_their_colour_from_inside():
    image = np.full((32, 32, 3), BACKDROP, np.uint8)
    image[8:24, 8:24] = (200, 50, 50)
    image[8] = (115, 145, 40)  # the mixed edge
    alpha = np.zeros((32, 32), np.uint8)
    alpha[8:24, 8:24] = 255
    alpha[7, 8:24] = alpha[8:24, 24] = 128  # the outline is a little larger than the picture's
    rgba = cutout.cut_out(image, alpha)
    assert (rgba[alpha > 0][:, :3] == (200, 50, 50)).all()
    assert (rgba[alpha == 0][:, :3] == 255).all()
    np.testing.assert_array_equal(rgba[..., 3], alpha)


def test_views_have_the_generators_colours_and_no_background(generator):
    angles = np.array([(0.0, 0.0), (100.0, 20.0)])
    views, _ = panohead.views_of(generator, 1, angles, OPTIONS)
    for view, (yaw, pitch) in zip(views, angles, strict=True):
        exact = render.render_view(generator.scene, cameras.orbit(yaw, pitch), SIZE)
        alpha = view.rgba[..., 3]
        assert abs(alpha.astype(int) - exact.rgba[..., 3]).mean() < 4
        colours = view.rgba[alpha > 0][:, :3].astype(int)
        assert (colours[:, 1] - colours[:, 0] < 150).all()  # no backdrop
        solid = (alpha == 255) & (exact.rgba[..., 3] == 255)
        assert abs(view.rgba[solid][:, :3].astype(int) - exact.rgba[solid][:, :3]).mean() < 12
        assert not view.normals[alpha == 0].any()


# --------------------------------------------------------------------------------------------------
# The filter


def relief(generator, seed):
    surface = panohead.surface_of(generator, seed, OPTIONS)
    scene = isosurface.scene(surface.vertices, surface.faces, surface.normals)
    poses = [cameras.orbit(yaw) for yaw in (0.0, 180.0)]
    return [render.render_view(scene, pose, 128).soft_normals @ pose[:3, :3].T for pose in poses]


def test_a_second_face_is_found_by_its_relief(generator):
    good = back_filter.mirror_similarity(*relief(generator, 1), "panohead")
    bad = back_filter.mirror_similarity(*relief(generator, 15), "panohead")
    assert good < Thresholds().mirror < bad


def test_the_window_of_the_face_holds_its_features():
    rows, columns = back_filter.face_window("panohead")
    seen = pose.project(landmarks.load_model().moved(*pose.FRAMINGS["panohead"]).mean[17:], 0, 0)
    assert (seen[:, 0] >= columns.start).all() and (seen[:, 0] <= columns.stop).all()
    assert rows.stop - rows.start < 0.5


def test_faults_name_what_speaks_against_a_head():
    usual = {f"p{i}": Scores(0.0, 0.1, 0.0, 0.05 + 1e-4 * i) for i in range(9)}
    odd = {
        "face": Scores(0.8, 0.1, 0.0, 0.05),
        "relief": Scores(None, 0.7, 0.0, 0.05),
        "crumbs": Scores(0.0, 0.1, 0.2, 0.05),
        "huge": Scores(0.0, 0.1, 0.0, 0.2),
    }
    found = back_filter.faults(usual | odd, Thresholds())
    assert found.keys() == odd.keys()
    assert found["face"] == ["a face at the back (0.80)"]
    assert "volume" in found["huge"][0]
    assert not back_filter.faults(odd, Thresholds(1.0, 1.0, 1.0, 1e9))
    assert back_filter.faults({}, Thresholds()) == {}


# --------------------------------------------------------------------------------------------------
# Screening, the lists, rendering


def look(generator, name):
    return panohead.look_at(
        generator, panohead.seed_of(name), OPTIONS, fake_models(lambda i: False)
    )


@dataclasses.dataclass(frozen=True)
class Counted:
    """Looks, and remembers at whom."""

    generator: object
    seen: list

    def look(self, name):
        self.seen.append(name)
        return look(self.generator, name)


def test_screening_resumes_filters_and_heeds_the_person(tmp_path, generator, capsys):
    names = [panohead.subject_name(seed) for seed in (1, 2, 3, 13, 14, 15)]
    counted = Counted(generator, [])
    assert not screening.screen(counted.look, names, tmp_path, {"a": 1}, share=(0, 2))
    with pytest.raises(InputError, match="missing; screen that head first"):
        screening.collect(tmp_path, names, Thresholds())
    assert screening.screen(counted.look, names, tmp_path, {"a": 1})
    assert sorted(counted.seen) == sorted(names)  # each once
    with pytest.raises(InputError, match="other settings"):
        screening.screen(counted.look, names, tmp_path, {"a": 2})

    screening.collect(tmp_path, names, Thresholds(volume=1e9))
    assert "3 of 6 heads pass" in capsys.readouterr().out
    automatic = (tmp_path / "reject_auto.txt").read_text()
    assert "panohead-000014  # the density nowhere exceeds 10" in automatic
    assert "panohead-000015  # the relief of a face at the back" in automatic
    assert "panohead-000013  # loose pieces" in automatic
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == names and lines[0]["rejected"] == []
    assert list((tmp_path / "sheets").iterdir()) == [tmp_path / "sheets" / "0000.jpg"]
    assert screening.accepted(tmp_path) == names[:3]

    by_hand = tmp_path / "reject.txt"
    by_hand.write_text(by_hand.read_text() + f"{names[1]}  # odd ear\nkeep {names[3]}\n")
    screening.collect(tmp_path, names, Thresholds(volume=1e9))  # leaves the person's list alone
    assert screening.accepted(tmp_path) == [names[0], names[2], names[3]]
    by_hand.write_text("panohead-99\n")
    with pytest.raises(InputError, match=r"reject\.txt: 'panohead-99' is not one of"):
        screening.accepted(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff", b"3", b'{"name": "x"}'])
def test_a_damaged_look_is_named(tmp_path, generator, content):
    names = ["panohead-000001"]
    screening.screen(Counted(generator, []).look, names, tmp_path, {})
    (tmp_path / "looks" / "panohead-000001.json").write_bytes(content)
    with pytest.raises(InputError, match=r"000001\.json: .*damaged, delete it"):
        screening.collect(tmp_path, names, Thresholds())


def test_rendering_without_a_screening_is_refused(tmp_path):
    with pytest.raises(InputError, match="run `screen` first"):
        screening.accepted(tmp_path)


def test_people_become_records_and_the_faceless_are_rejected(tmp_path, generator, monkeypatch):
    monkeypatch.setattr(panohead, "_generator", lambda network, options: generator)
    monkeypatch.setattr(identity, "models", lambda folder: fake_models())
    source = panohead.PanoHeads(NETWORK, OPTIONS, (1, 2, 14), 1, 4, None)
    with pytest.raises(SubjectRejected, match="nowhere exceeds"):
        source.records("panohead-000014")
    source = dataclasses.replace(source, seeds=(1, 14, 2))
    assert factory.write_dataset(source, tmp_path, 2)
    manifest = read_manifest(tmp_path)
    assert manifest["framing"] == "panohead" and "non-commercial" in manifest["license"]
    assert manifest["rejected"] == 1 and "easy.pkl" in manifest["source"]
    (entry,) = manifest["splits"]["held_out"]
    index = shards.read_index(tmp_path / entry["file"])
    assert index.subjects.tolist() == ["panohead-000002"]
    (view,) = index.read_views(0, [1])
    assert view.yaw == 90.0
    normals = records.decode_normals(view.normals, SIZE, "here")
    rgba = records.decode_image(view.image, SIZE, "here")
    assert normals[rgba[..., 3] > 250][:, 0].mean() > 0.3  # seen from +x

    monkeypatch.setattr(identity, "models", lambda folder: fake_models(lambda image: False))
    with pytest.raises(SubjectRejected, match="no face is found in its 1 frontal views"):
        source.records("panohead-000001")


@pytest.mark.parametrize("text", ["", "a", "-3", "1-", "1,,2", "4294967296"])
def test_seeds_are_checked(text):
    with pytest.raises(argparse.ArgumentTypeError):
        panohead.seeds(text)
    assert panohead.seeds("8-10,1,9") == (1, 8, 9, 10)


# --------------------------------------------------------------------------------------------------
# The network: its pickle, its cameras


@pytest.fixture
def network_module():
    pytest.importorskip("torch", reason="PanoHead needs '.[panohead]'")
    from data_prep.generator import network as panohead_network

    return panohead_network


@pytest.fixture
def written(network_module, tmp_path, density):
    points = isosurface.grid(GRID, 1.0).reshape(GRID, GRID, GRID, 3)
    colours = np.clip(2.0 * np.moveaxis(points, -1, 0), -1.0, 1.0)
    field = np.concatenate([density[None], colours]).astype(np.float32)
    checkout, path, network = panohead_checkout.write(tmp_path, field, SIZE, tmp_path / "mark")
    yield types.SimpleNamespace(checkout=checkout, path=path, network=network, folder=tmp_path)
    panohead_checkout.forget(checkout)


def test_code_in_the_pickle_does_not_run_but_its_numbers_arrive(network_module, written):
    network = network_module.load(written.checkout, written.path)
    assert not (written.folder / "mark").exists()
    expected = written.network.state_dict()
    assert network.state_dict().keys() == expected.keys()
    for name, tensor in network.state_dict().items():
        assert (tensor == expected[name]).all(), name
    assert network.neural_rendering_resolution == 128 and network.rendering_kwargs["box_warp"] == 1
    assert not network.training


def test_the_adapter_asks_as_panohead_wants_and_cameras_agree(network_module, written, density):
    network = network_module.load(written.checkout, written.path)
    people = network_module.PanoHead(network, "cpu")
    field, _ = people.density(5, GRID)
    np.testing.assert_allclose(field, density, atol=1e-3)
    angles = np.array([(0, 0), (45, 0), (90, 20), (180, 0), (-120, -20)], float)
    before = network.backbone_runs
    pictures = people.images(5, cameras.orbit(*angles.T))
    assert network.backbone_runs == before + 1  # tri-planes are made once for all views
    assert pictures.dtype == np.uint8 and pictures.shape == (5, SIZE, SIZE, 3)
    views, _ = panohead.views_of(people, 5, angles, OPTIONS)
    for picture, view in zip(pictures.astype(int), views, strict=True):
        marched = picture[..., 1] - picture[..., 0] < 150  # its own rays' outline, no backdrop
        ours = view.rgba[..., 3] > 127
        assert (marched & ours).sum() / (marched | ours).sum() > 0.95
    # Colours tell positions: red grows with x, and is seen where x is.
    front, back = views[0].rgba, views[3].rgba
    solid = front[..., 3] == 255
    assert (
        front[:, 40:][solid[:, 40:]][:, 0].mean() > front[:, :24][solid[:, :24]][:, 0].mean() + 40
    )
    solid = back[..., 3] == 255
    assert back[:, 40:][solid[:, 40:]][:, 0].mean() < back[:, :24][solid[:, :24]][:, 0].mean() - 40


def test_seeds_and_labels_are_panoheads(network_module):
    labels = network_module.camera_parameters(cameras.orbit([0.0, 90.0]))
    assert labels.shape == (2, 25)
    # Front: at (0, 0, 2.7), x right, y down, looking along -z.
    expected = np.diag([1.0, -1.0, -1.0, 1.0])
    expected[2, 3] = 2.7
    np.testing.assert_allclose(labels[0, :16].reshape(4, 4), expected, atol=1e-6)
    np.testing.assert_allclose(labels[1, [3, 7, 11]], [2.7, 0, 0], atol=1e-6)
    np.testing.assert_allclose(labels[0, 16:], [4.2634, 0, 0.5, 0, 4.2634, 0.5, 0, 0, 1], atol=1e-4)


class Evil:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("ran"),)


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps([1]), pickle.dumps({"G_ema": 3})])
def test_what_is_no_network_pickle_is_named(network_module, written, content):
    written.path.write_bytes(content)
    with pytest.raises(InputError, match=r"easy\.pkl.*PanoHead"):
        network_module.load(written.checkout, written.path)


def test_functions_named_in_a_pickle_are_not_called(network_module, written, monkeypatch):
    monkeypatch.chdir(written.folder)
    written.path.write_bytes(pickle.dumps({"G_ema": Evil()}))
    with pytest.raises(InputError, match="no TriPlaneGenerator"):
        network_module.load(written.checkout, written.path)
    assert not (written.folder / "ran").exists()


def test_another_version_is_refused(network_module, written):
    with pytest.raises(InputError, match="no checkout of PanoHead"):
        network_module.load(written.folder, written.path)
    source = (written.checkout / "training" / "triplane.py").read_text()
    newer = source.replace('register_buffer("w_avg"', 'register_buffer("w_mean"')
    newer = newer.replace("self.map.w_avg", "self.map.w_mean")
    (written.checkout / "training" / "triplane.py").write_text(newer)
    with pytest.raises(InputError, match=r"map\.w_avg.*one version"):
        network_module.load(written.checkout, written.path)


def test_the_whole_command_with_the_stand_in(
    network_module, written, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(identity, "models", lambda folder: fake_models())
    monkeypatch.setattr(panohead.identity, "check", lambda models: None)
    common = (
        f"--checkout {written.checkout} --network {written.path} --device cpu --size 64 --grid 64"
    )
    screened, out = tmp_path / "screened", tmp_path / "heads"
    panohead.main(f"screen {common} --out {screened} --seeds 0-2 --no-faces".split())
    (screened / "reject.txt").write_text("panohead-000001\n")
    panohead.main(
        f"render {common} --screening {screened} --out {out} --held-out 1 --views 3".split()
    )
    splits = read_manifest(out)["splits"]
    found = [
        name
        for split in ("train", "held_out")
        for entry in splits[split]
        for name in shards.read_index(out / entry["file"]).subjects
    ]
    assert found == ["panohead-000000", "panohead-000002"]
    assert "2 subjects in 2 shards" in capsys.readouterr().out
    for arguments, told in {
        f"render {common} --screening {screened} --out {out} --held-out 2": "2 people are left",
        f"screen {common} --out {screened} --seeds 0 --no-faces --network nothing.pkl": (
            "nothing.pkl: cannot be opened"
        ),
    }.items():
        assert panohead.main(arguments.split()) == 1
        assert told in capsys.readouterr().err
