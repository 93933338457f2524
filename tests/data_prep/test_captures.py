"""Calibrated photos: four layouts, where the head is, canonical views, the command."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from data_prep import captures
from data_prep.calibrated import readers
from data_prep.calibrated import views as capture_views
from data_prep.calibrated.readers import Photo
from data_prep.parametric.head import build_head
from data_prep.parametric.landmarks import world_landmarks
from data_prep.parametric.people import sample_person
from data_prep.rendering import render
from spinmeround_jax import cameras
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import images, portraits
from spinmeround_jax.photo.assets import AssetError
from tests.support import head_field

SIZE = 64
WIDTH, HEIGHT = 110, 160
DISTORTION = np.array([0.08, -0.05, 0.004, -0.003])
ANGLES = ((3.0, 2.0), (45.0, 5.0), (-50.0, -10.0), (20.0, -15.0), (150.0, 10.0))
# The capture's world: metres, z up, somewhere.
SCALE = 0.4
ROTATION = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
OFFSET = np.array([0.3, -0.2, 1.5])
OPTIONS = capture_views.Options(SIZE, False, None, None)
CV = np.diag([1.0, -1.0, -1.0])


def to_world(points):
    return SCALE * points @ ROTATION.T + OFFSET


WHERE = (1 / SCALE, ROTATION.T, -ROTATION.T @ OFFSET / SCALE)  # back to the canonical frame


def photo_at(yaw, pitch, distance=cameras.RADIUS, aim=(0.0, 0.0, 0.0), path=None, mask=None):
    """A photo from that direction, not quite toward the middle, tilted, with a lens that distorts."""
    orbit = cameras.orbit(yaw, pitch)[:3, :3].astype(float)
    roll = np.deg2rad(10.0)
    tilt = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    turn = cameras.orbit(*aim[:2])[:3, :3].astype(float)
    rotation = CV @ tilt @ turn @ orbit @ ROTATION.T
    position = to_world(distance * orbit[2])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ position
    return Photo(
        path, mask, pose, np.array([300.0, 305.0]), np.array([WIDTH / 2 + 3, HEIGHT / 2 - 5]), DISTORTION
    )  # fmt: skip


def paint(points):
    """sRGB of a canonical point: tells where it is."""
    return np.clip(0.5 + np.array([1.5, 1.5, 2.0]) * points, 0, 1)


def shoot(scene, photo):
    """(h, w, 4) uint8 of the head as the lens sees it, without light."""
    columns, rows = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    rays = photo.directions(np.stack([columns.ravel(), rows.ravel()], axis=1))
    rays = rays @ photo.world_to_camera[:3, :3] @ ROTATION / SCALE
    origin = (photo.position - OFFSET) @ ROTATION / SCALE
    hits = scene.cast(np.broadcast_to(origin, rays.shape), rays)
    hit = hits["primID"] >= 0
    rgba = np.zeros((len(rays), 4))
    rgba[hit, :3] = paint(origin + hits["tfar"][hit, None] * rays[hit])
    rgba[hit, 3] = 1
    return np.rint(255 * rgba).astype(np.uint8).reshape(HEIGHT, WIDTH, 4)


@pytest.fixture(scope="module")
def scene():
    return head_field.scene_of(*head_field.bald_head(level=1))


@pytest.fixture(scope="module")
def points():
    return world_landmarks(build_head(sample_person(3), 1))


def write_ours(folder, scene, points):
    """A capture in our layout with landmarks and an identity; returns its photos."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, given, photos = [], {}, []
    for number, (yaw, pitch) in enumerate(ANGLES):
        path = folder / f"photo{number}.png"
        photo = photo_at(yaw, pitch, 2.4 + 0.1 * number, (1.0, -1.0), path)
        Image.fromarray(shoot(scene, photo)).save(path)
        photos.append(photo)
        entries.append(
            {
                "file": path.name,
                "world_to_camera": photo.world_to_camera.tolist(),
                "fl_x": 300.0, "fl_y": 305.0,
                "cx": float(photo.centre[0]), "cy": float(photo.centre[1]),
                **dict(zip(("k1", "k2", "p1", "p2"), DISTORTION.tolist(), strict=True)),
            }
        )  # fmt: skip
        if abs(yaw) < 90:
            given[path.name] = photo.project(to_world(points)).tolist()
    (folder / "cameras.json").write_text(json.dumps(entries))
    (folder / "landmarks.json").write_text(json.dumps(given))
    np.save(folder / "identity.npy", np.eye(512, dtype=np.float32)[7])
    return photos


def same(found, expected):
    assert [photo.path.name for photo in found] == [photo.path.name for photo in expected]
    for a, b in zip(found, expected, strict=True):
        for name in ("world_to_camera", "focal", "centre", "distortion"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-6, err_msg=name)


# --------------------------------------------------------------------------------------------------
# Layouts


def test_our_layout(tmp_path, scene, points):
    photos = write_ours(tmp_path / "anna", scene, points)
    same(readers.read(tmp_path / "anna"), photos)


def test_nerfstudios_layout(tmp_path, scene, points):
    photos = write_ours(tmp_path / "anna", scene, points)
    (tmp_path / "anna" / "cameras.json").unlink()
    frames = [
        {
            "file_path": photo.path.name,
            "transform_matrix": (
                np.linalg.inv(photo.world_to_camera) @ np.diag([1, -1, -1, 1])
            ).tolist(),
            "cx": photo.centre[0],
        }
        for photo in photos
    ]
    about = {"fl_x": 300.0, "fl_y": 305.0, "cy": photos[0].centre[1], "camera_model": "OPENCV"}
    about |= dict(zip(("k1", "k2", "p1", "p2"), DISTORTION.tolist(), strict=True))
    path = tmp_path / "anna" / "transforms.json"
    path.write_text(json.dumps({**about, "frames": frames}))
    same(readers.read(tmp_path / "anna"), photos)
    path.write_text(json.dumps({**about, "camera_model": "OPENCV_FISHEYE", "frames": frames}))
    with pytest.raises(InputError, match=r"OPENCV_FISHEYE.*undistort"):
        readers.read(tmp_path / "anna")


def test_blenders_layout(tmp_path):
    for name in ("a", "b"):
        Image.new("RGBA", (80, 60)).save(tmp_path / f"{name}.png")
    frames = [{"file_path": f"./{n}", "transform_matrix": np.eye(4).tolist()} for n in ("a", "b")]
    about = {"camera_angle_x": 2 * np.arctan(0.5), "frames": frames}
    (tmp_path / "transforms.json").write_text(json.dumps(about))
    first = readers.read(tmp_path)[0]
    np.testing.assert_allclose(first.focal, 80)
    np.testing.assert_allclose(first.centre, [40, 30])


@pytest.mark.parametrize("suffix", ["txt", "bin"])
def test_colmaps_layout(tmp_path, suffix):
    pycolmap = pytest.importorskip("pycolmap", reason="COLMAP needs '.[captures]'")
    folder, model = tmp_path / "anna", tmp_path / "anna" / "sparse" / "0"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    model.mkdir(parents=True)
    photos = [
        photo_at(*angles, path=folder / "images" / f"{i}.jpg") for i, angles in enumerate(ANGLES)
    ]
    lines = []
    for number, photo in enumerate(photos, start=1):
        Image.new("RGB", (WIDTH, HEIGHT)).save(photo.path)
        x, y, z, w = pycolmap.Rotation3d(photo.world_to_camera[:3, :3]).quat
        t = photo.world_to_camera[:3, 3]
        lines += [f"{number} {w} {x} {y} {z} {t[0]} {t[1]} {t[2]} 1 {photo.path.name}", ""]
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "masks" / "0.jpg.png")
    numbers = [300.0, 305.0, *photos[0].centre, *DISTORTION]
    (model / "cameras.txt").write_text(f"1 OPENCV {WIDTH} {HEIGHT} {' '.join(map(str, numbers))}\n")
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    (model / "points3D.txt").write_text("")
    if suffix == "bin":
        stored = pycolmap.Reconstruction(str(model))
        for path in model.iterdir():
            path.unlink()
        stored.write_binary(str(model))
    found = readers.read(folder)
    same(found, photos)
    assert found[0].mask == folder / "masks" / "0.jpg.png" and found[1].mask is None
    (model / f"cameras.{suffix}").write_bytes(b"1 WHAT 3")
    with pytest.raises(InputError, match="not a readable COLMAP model"):
        readers.read(folder)


def test_nersembles_layout(tmp_path):
    place = tmp_path / "017" / "sequences" / "EXP-1-head" / "frame_00000"
    for name in ("images-2x", "alpha_map"):
        (place / name).mkdir(parents=True)
    intrinsics = np.array([[8000.0, 0, 1100], [0, 8010, 1600], [0, 0, 1]])
    serials = ["220700191", "222200036", "222200037"]
    poses = {
        serial: photo_at(*ANGLES[i]).world_to_camera.tolist() for i, serial in enumerate(serials)
    }
    for serial in serials[:2]:  # the third was not downloaded
        Image.new("RGB", (1100, 1604)).save(place / "images-2x" / f"cam_{serial}.png")
        Image.new("L", (1100, 1604)).save(place / "alpha_map" / f"cam_{serial}.png")
    path = tmp_path / "017" / "calibration" / "camera_params.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"world_2_cam": poses, "intrinsics": intrinsics.tolist()}))
    first, second = readers.read(tmp_path / "017", "EXP-1-head", 0)
    assert first.path.name == "cam_220700191.png" and second.mask.name == "cam_222200036.png"
    np.testing.assert_allclose(first.focal, [4000, 4005])
    np.testing.assert_allclose(first.centre, [550.25, 800.25])
    assert readers.read(tmp_path / "017")[0].path == first.path
    with pytest.raises(InputError, match="no sequence FREE"):
        readers.read(tmp_path / "017", "FREE")
    with pytest.raises(InputError, match="no images of frame 3"):
        readers.read(tmp_path / "017", "EXP-1-head", 3)
    Image.new("RGB", (1100, 1200)).save(place / "images-2x" / "cam_220700191.png")
    with pytest.raises(InputError, match="its camera describes an image of 2200 x 3208"):
        readers.read(tmp_path / "017")  # cropped


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.pop("fl_x"),
        lambda e: e.update(fl_x="wide"),
        lambda e: e.update(fl_x=-3.0),
        lambda e: e.update(k1=float("nan")),
        lambda e: e.update(world_to_camera=[[1, 2]]),
        lambda e: e.update(world_to_camera=np.zeros((4, 4)).tolist()),
        lambda e: e.update(file="missing.png"),
        lambda e: e.update(file="../../outside.png"),
        lambda e: e.update(mask="missing.png"),
        lambda e: e.update(file=3),
        lambda e: e.update(file="photo0.png"),
    ],
)
def test_wrong_cameras_are_named(tmp_path, scene, points, change):
    write_ours(tmp_path / "anna", scene, points)
    path = tmp_path / "anna" / "cameras.json"
    entries = json.loads(path.read_text())
    change(entries[1])
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"\.(json|png): |outside|missing|twice"):
        readers.read(tmp_path / "anna")


@pytest.mark.parametrize("content", ["", "3", "[3]", "{", '{"frames": 3}', "[" * 100_000])
@pytest.mark.parametrize("name", ["cameras.json", "transforms.json", "camera_params.json"])
def test_files_that_are_none_are_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        readers.read(tmp_path)


# --------------------------------------------------------------------------------------------------
# Geometry


def test_directions_undo_the_lens():
    photo = photo_at(10, 5)
    pixels = np.array([[0.0, 0], [WIDTH, HEIGHT], [50, 20]])
    np.testing.assert_allclose(photo.pixels(photo.directions(pixels)), pixels, atol=1e-6)


def test_a_photo_turned_to_the_canonical_camera_shows_the_same(scene, tmp_path):
    for number, (yaw, pitch) in enumerate(ANGLES):
        photo = photo_at(yaw, pitch, aim=(1.5, -1.0), path=tmp_path / f"{number}.png")
        Image.fromarray(shoot(scene, photo)).save(photo.path)
        view = capture_views.canonical_view(photo, WHERE, OPTIONS)
        assert (view.yaw, view.pitch) == pytest.approx((yaw, pitch), abs=1e-4)
        assert view.distance == pytest.approx(cameras.RADIUS, abs=1e-5)
        exact = render.render_view(scene, cameras.orbit(yaw, pitch), SIZE, 3)
        # The photo is a narrow portrait: compare where it shows something.
        alpha, wanted = view.rgba[..., 3] / 255, exact.rgba[..., 3] / 255
        middle = np.s_[8:46, 14:50]
        assert np.abs(alpha - wanted)[middle].mean() < 0.03
        solid = (view.rgba[..., 3] == 255) & np.isfinite(exact.positions[..., 0])
        difference = np.abs(view.rgba[solid][:, :3] - 255 * paint(exact.positions[solid]))
        assert solid.sum() > 400 and np.median(difference) < 4


def test_landmarks_of_photos_meet_in_space(points):
    photos = [photo_at(*angles) for angles in ANGLES[:4]]
    seen = [photo.project(to_world(points)) for photo in photos]
    np.testing.assert_allclose(capture_views.triangulate(photos, seen), to_world(points), atol=1e-5)
    wrong = seen[1] + 30.0  # a detector's blunder in one photo
    found = capture_views.triangulate(photos, [seen[0], wrong, *seen[2:]])
    np.testing.assert_allclose(found, to_world(points), atol=1e-4)
    with pytest.raises(InputError, match="found in 1 of its photos"):
        capture_views.triangulate(photos[:1], seen[:1])
    with pytest.raises(InputError, match="from one place"):
        capture_views.triangulate(photos[:1] * 2, seen[:1] * 2)
    with pytest.raises(InputError, match="do not meet"):
        capture_views.triangulate(photos[:2], [seen[0], seen[1][::-1] + [0.0, 60.0]])


def test_photos_without_a_mask_need_a_word(scene, tmp_path):
    photo = photo_at(0, 0, path=tmp_path / "a.jpg", mask=None)
    Image.fromarray(shoot(scene, photo)[..., :3]).save(photo.path)
    with pytest.raises(InputError, match=r"a\.jpg: no mask"):
        capture_views.canonical_view(photo, WHERE, OPTIONS)
    kept = capture_views.Options(SIZE, True, None, None)
    assert capture_views.canonical_view(photo, WHERE, kept).rgba[20:40, 20:44, 3].min() == 255
    mask = photo_at(0, 0, path=photo.path, mask=tmp_path / "mask.png")
    Image.fromarray(shoot(scene, photo)[..., 3]).save(mask.mask)
    view = capture_views.canonical_view(mask, WHERE, OPTIONS)
    exact = render.render_view(scene, cameras.orbit(0), SIZE, 3).rgba[..., 3]
    assert np.abs(view.rgba[..., 3].astype(int) - exact)[8:46, 14:50].mean() < 8
    Image.new("L", (3, 3)).save(mask.mask)
    with pytest.raises(InputError, match=r"mask\.png: 3 x 3 pixels"):
        capture_views.canonical_view(mask, WHERE, OPTIONS)


# --------------------------------------------------------------------------------------------------
# Image and camera belong together


def change_capture(folder, change):
    """Rewrites a capture: `change(image, camera, landmarks)` of each photo, landmarks may be None."""
    entries = json.loads((folder / "cameras.json").read_text())
    given = json.loads((folder / "landmarks.json").read_text())
    for entry in entries:
        path = folder / entry["file"]
        points = given.get(entry["file"])
        points = change(path, entry, None if points is None else np.array(points))
        if points is not None:
            given[entry["file"]] = points.tolist()
    (folder / "cameras.json").write_text(json.dumps(entries))
    (folder / "landmarks.json").write_text(json.dumps(given))


def store_sideways(path, entry, points):
    """As a telephone held upright stores photos; the camera is calibrated on the stored pixels."""
    turn = np.array(images.TO_STORED[6])
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    middle, stored_middle = np.array([WIDTH, HEIGHT]) / 2, np.array([HEIGHT, WIDTH]) / 2
    whole = np.eye(4)
    whole[:2, :2] = turn
    entry["world_to_camera"] = (whole @ entry["world_to_camera"]).tolist()
    entry["fl_x"], entry["fl_y"] = entry["fl_y"], entry["fl_x"]
    centre = turn @ (np.array([entry["cx"], entry["cy"]]) - middle) + stored_middle
    entry["cx"], entry["cy"] = centre.tolist()
    entry["p2"], entry["p1"] = (turn @ [entry["p2"], entry["p1"]]).tolist()
    return None if points is None else (points - middle) @ turn.T + stored_middle


def halve(path, entry, points):
    """Smaller copies of the photos, the camera still that of the originals."""
    entry |= {"w": WIDTH, "h": HEIGHT}
    Image.open(path).resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.BOX).save(path)
    return None if points is None else points / 2


@pytest.mark.parametrize(("change", "tolerance"), [(store_sideways, 1.0), (halve, 10.0)])
def test_photos_that_differ_from_their_camera_give_the_same_views(
    tmp_path, scene, points, change, tolerance
):
    write_ours(tmp_path, scene, points)
    before, _ = captures.read_capture(tmp_path, OPTIONS, None)
    change_capture(tmp_path, change)
    after, _ = captures.read_capture(tmp_path, OPTIONS, None)
    for one, other in zip(before, after, strict=True):
        assert (one.name, one.yaw) == (other.name, pytest.approx(other.yaw, abs=0.1))
        difference = np.abs(one.rgba.astype(int) - other.rgba)[8:46, 14:50]
        assert difference.mean() < tolerance, one.name


def test_photos_of_another_shape_than_their_camera_are_refused(tmp_path, scene, points):
    write_ours(tmp_path, scene, points)
    change_capture(tmp_path, lambda path, entry, points: entry.update(w=HEIGHT, h=HEIGHT))
    with pytest.raises(InputError, match=r"photo0\.png: 110 x 160 pixels.*160 x 160"):
        captures.read_capture(tmp_path, OPTIONS, None)


def test_faces_are_looked_for_upright(tmp_path, scene, points):
    write_ours(tmp_path, scene, points)
    upright = json.loads((tmp_path / "landmarks.json").read_text())
    before, _ = captures.read_capture(tmp_path, OPTIONS, None)
    change_capture(tmp_path, store_sideways)
    (tmp_path / "landmarks.json").unlink()
    names = iter(f"photo{i}.png" for i in range(5))

    def find(image):
        assert image.shape[:2] == (HEIGHT, WIDTH)
        seen = upright.get(next(names))
        if seen is None:
            return []
        landmarks = np.column_stack([seen, np.zeros(68)])
        return [types.SimpleNamespace(landmarks=landmarks, landmarks5=landmarks[:5, :2])]

    models = types.SimpleNamespace(finder=types.SimpleNamespace(find=find))
    after, _ = captures.read_capture(tmp_path, OPTIONS, models)
    found = {view.name: view.yaw for view in after}
    assert found == {view.name: pytest.approx(view.yaw, abs=6) for view in before}


def test_photos_of_one_name_in_several_folders(tmp_path, scene, points):
    """As rigs and nerfstudio leave them: cam1/0001.png, cam2/0001.png."""
    write_ours(tmp_path, scene, points)
    before, _ = captures.read_capture(tmp_path, OPTIONS, None)
    entries = json.loads((tmp_path / "cameras.json").read_text())
    given = json.loads((tmp_path / "landmarks.json").read_text())
    for number, entry in enumerate(entries[:2]):
        (tmp_path / f"cam{number}").mkdir()
        new = f"cam{number}/0001.png"
        (tmp_path / entry["file"]).rename(tmp_path / new)
        given[new] = given.pop(entry["file"])
        entry["file"] = new
    (tmp_path / "cameras.json").write_text(json.dumps(entries))
    (tmp_path / "landmarks.json").write_text(json.dumps(given))
    after, identity = captures.read_capture(tmp_path, OPTIONS, None)
    assert [view.yaw for view in after] == [view.yaw for view in before]
    assert [view.name for view in after[:1]] == ["cam0_0001"]
    captures.write_capture(tmp_path / "out", "anna", after, identity, OPTIONS, "")
    written = sorted(p.name for p in (tmp_path / "out" / "views" / "anna" / "images").iterdir())
    assert written == ["cam0_0001.png", "cam1_0001.png", *(f"photo{i}.png" for i in (2, 3, 4))]
    given["0001.png"] = given.pop("cam0/0001.png")
    (tmp_path / "landmarks.json").write_text(json.dumps(given))
    with pytest.raises(InputError, match=r"'0001\.png' names 2 photos.*cam0/0001\.png"):
        captures.read_capture(tmp_path, OPTIONS, None)


def test_colmap_calibrates_stored_pixels_of_its_own_size(tmp_path):
    """Written by COLMAP's own library; the photos on disk have half the size and an EXIF rotation."""
    pycolmap = pytest.importorskip("pycolmap", reason="COLMAP needs '.[captures]'")
    model = tmp_path / "sparse" / "0"
    model.mkdir(parents=True)
    stored = pycolmap.Reconstruction()
    camera = pycolmap.Camera(
        model="FULL_OPENCV", width=400, height=300, camera_id=1,
        params=[500.0, 510.0, 190.0, 160.0, 0.1, 0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 0.0],
    )  # fmt: skip
    stored.add_camera_with_trivial_rig(camera)
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    for number in range(2):
        photo = photo_at(*ANGLES[number])
        name = f"cam{number}/IMG_1.jpg"
        image = pycolmap.Image(name=name, camera_id=1, image_id=number + 1)
        rotation = pycolmap.Rotation3d(photo.world_to_camera[:3, :3])
        pose = pycolmap.Rigid3d(rotation, photo.world_to_camera[:3, 3])
        stored.add_image_with_trivial_frame(image, pose)
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        Image.new("RGB", (200, 150)).save(tmp_path / "images" / name, exif=exif)
    (tmp_path / "masks" / "cam0").mkdir(parents=True)
    Image.new("L", (200, 150)).save(tmp_path / "masks" / "cam0" / "IMG_1.jpg.PNG")
    stored.write(str(model))
    first, second = readers.read(tmp_path)
    np.testing.assert_allclose(first.focal, [250.0, 255.0])
    np.testing.assert_allclose(first.centre, [95.0, 80.0])
    np.testing.assert_allclose(first.distortion, [0.1, 0.0, 0.0, 0.01])
    assert first.orientation == 6 and second.mask is None
    assert first.mask.name == "IMG_1.jpg.PNG"
    Image.new("RGB", (150, 150)).save(tmp_path / "images" / "cam1" / "IMG_1.jpg")
    with pytest.raises(InputError, match=r"IMG_1\.jpg: 150 x 150 pixels.*400 x 300"):
        readers.read(tmp_path)


def test_one_of_several_colmap_models_is_not_taken_silently(tmp_path):
    for number in range(2):
        (tmp_path / "sparse" / str(number)).mkdir(parents=True)
        (tmp_path / "sparse" / str(number) / "cameras.txt").touch()
    with pytest.raises(InputError, match="sparse: holds 2 models"):
        readers.read(tmp_path)
    (tmp_path / "sparse" / "0" / "cameras.txt").unlink()
    (tmp_path / "sparse" / "0").rmdir()
    assert readers.kind_of(tmp_path) == "colmap"


# --------------------------------------------------------------------------------------------------
# The command


def test_captures_become_views_and_portraits(tmp_path, scene, points, capsys):
    write_ours(tmp_path / "in" / "anna", scene, points)
    write_ours(tmp_path / "in" / "bert", scene, points)
    (tmp_path / "in" / "bert" / "photo2.png").write_bytes(b"not a picture")
    command = f"--input {tmp_path / 'in'} --out {tmp_path / 'out'} --size {SIZE}".split()
    assert captures.main(command) == 1
    told = capsys.readouterr()
    assert "1 of 2 captures" in told.out and "photo2.png" in told.err
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["subject"] == "bert"

    portrait = portraits.read(tmp_path / "out" / "portraits" / "anna.png", SIZE)
    assert portrait.id_embedding[7] == 1.0 and portrait.truth.normals is None
    # The mean head stands for this one: directions are found to within some degrees.
    found = sorted([float(yaw) for yaw, _ in portrait.truth.angles])
    np.testing.assert_allclose(found, sorted(yaw for yaw, _ in ANGLES[1:]), atol=6)
    folder = tmp_path / "out" / "views" / "anna"
    about = json.loads((folder / "transforms.json").read_text())
    assert len(about["frames"]) == 5
    first = about["frames"][0]
    position = np.array(first["transform_matrix"])[:3, 3]
    distance = np.linalg.norm(position)
    assert first["fl_x"] == pytest.approx(cameras.FOCAL * SIZE * distance / cameras.RADIUS)
    picture = np.asarray(Image.open(folder / first["file_path"]))
    exact = render.render_view(scene, cameras.orbit(*ANGLES[0]), SIZE, 1).rgba
    both = ((picture[..., 3] > 127) & (exact[..., 3] > 127))[8:46]
    either = ((picture[..., 3] > 127) | (exact[..., 3] > 127))[8:46]
    assert both.sum() / either.sum() > 0.9

    # Mended: only what was missing is made.
    stamp = (folder / "transforms.json").stat().st_mtime_ns
    picture = tmp_path / "in" / "anna" / "photo2.png"
    (tmp_path / "in" / "bert" / "photo2.png").write_bytes(picture.read_bytes())
    assert captures.main(command) == 0
    assert (folder / "transforms.json").stat().st_mtime_ns == stamp
    assert not (tmp_path / "out" / "rejected.jsonl").exists()
    assert captures.main([*command, "--keep-background"]) == 1
    assert "other settings" in capsys.readouterr().err

    # Other photos of the same names are not taken for those that were used.
    for name in ("photo2.png", "landmarks.json"):
        path = tmp_path / "in" / "anna" / name
        before, made = path.read_bytes(), portrait.path.read_bytes()
        path.write_bytes((tmp_path / "in" / "anna" / "photo3.png").read_bytes())
        assert captures.main(command) == 1
        assert "made of other photos" in capsys.readouterr().err
        assert portrait.path.read_bytes() == made
        path.write_bytes(before)
    assert captures.main(command) == 0


def test_without_landmarks_the_models_find_the_head(tmp_path, scene, points):
    write_ours(tmp_path / "anna", scene, points)
    given = json.loads((tmp_path / "anna" / "landmarks.json").read_text())
    (tmp_path / "anna" / "landmarks.json").unlink()
    (tmp_path / "anna" / "identity.npy").unlink()
    order = iter(
        [*(np.array(given.get(f"photo{i}.png", 0)) for i in range(5)), *[np.zeros((68, 2))] * 9]
    )

    def find(image):
        seen = next(order)
        if seen.shape != (68, 2):
            return []
        return [
            types.SimpleNamespace(
                landmarks=np.column_stack([seen, np.zeros(68)]), landmarks5=seen[:5]
            )
        ]

    models = types.SimpleNamespace(
        finder=types.SimpleNamespace(find=find),
        identify=lambda image, face: np.eye(512)[3],
    )
    views, embedding = captures.read_capture(tmp_path / "anna", OPTIONS, models)
    assert embedding[3] == 1.0 and len(views) == 5
    assert abs(views[0].yaw - ANGLES[0][0]) < 6 and views[-1].yaw == pytest.approx(150, abs=6)


def test_what_is_missing_is_told_at_once(tmp_path, scene, points):
    with pytest.raises(InputError, match="no captures in it"):
        captures.find(tmp_path)
    write_ours(tmp_path / "anna", scene, points)
    (tmp_path / "anna" / "identity.npy").unlink()
    args = captures.parse_arguments(
        f"--input {tmp_path} --out {tmp_path / 'out'} --models {tmp_path / 'none'}".split()
    )
    with pytest.raises(AssetError, match="missing"):
        captures.run(args)
