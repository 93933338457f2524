"""nerfstudio's transforms.json: what is read is compared with the pixels, hostile files, writing."""

import json
import os
import pathlib
import random
import unicodedata

import numpy as np
import pytest
from PIL import Image

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import images
from spinmeround_jax.results import transforms

WIDTH, HEIGHT, FOCAL, CENTRE = 60, 80, 150.0, (26.0, 43.0)
POINT = np.array([0.12, 0.2, 0.05])
POSES = cameras.orbit(np.array([0.0, 40.0, -70.0]), np.array([5.0, -10.0, 0.0])).astype(np.float64)


def project(pose, point, focal, centre):
    """Pixels of a world point, by an OpenGL camera."""
    x, y, z = pose[:3, :3] @ point + pose[:3, 3]
    return np.array([centre[0] - focal[0] * x / z, centre[1] + focal[1] * y / z])


def dot(where, size=(WIDTH, HEIGHT)):
    """(h, w, 3) uint8 white with a soft red dot."""
    columns, rows = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    amount = np.exp(-((columns - where[0]) ** 2 + (rows - where[1]) ** 2) / 8.0)[..., None]
    return np.rint(255 * (1 - amount * [0, 1, 1])).astype(np.uint8)


def found_dot(pixels):
    amount = 255.0 - pixels[..., 1]
    columns, rows = np.meshgrid(np.arange(pixels.shape[1]) + 0.5, np.arange(pixels.shape[0]) + 0.5)
    return np.array([(columns * amount).sum(), (rows * amount).sum()]) / amount.sum()


def write_set(folder, names=("a.png", "b.png", "c.png"), **changes):
    """Images of a point with their cameras, as nerfstudio writes them; returns the document."""
    frames = []
    for name, pose in zip(names, POSES, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = dot(project(pose, POINT, (FOCAL, FOCAL), CENTRE))
        Image.fromarray(pixels).save(path, quality=95)
        frames.append({"file_path": name, "transform_matrix": np.linalg.inv(pose).tolist()})
    about = {
        "camera_model": "OPENCV", "fl_x": FOCAL, "fl_y": FOCAL, "cx": CENTRE[0], "cy": CENTRE[1],
        "w": WIDTH, "h": HEIGHT, "k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0,
        "ply_file_path": "sparse_pc.ply", "frames": frames,
    }  # fmt: skip
    return save(folder, {**about, **changes})


def save(folder, about):
    (folder / "transforms.json").write_text(json.dumps(about))
    return about


def check_dots(folder):
    """Every dot lies where its camera says; returns what was read."""
    read = transforms.read(folder)
    assert len(read.frames) == len(POSES)
    for frame in read.frames:
        pixels = transforms.read_image(frame.image, frame.orientation).pixels
        assert pixels.shape[1::-1] == frame.intrinsics.size
        camera = frame.intrinsics
        wanted = project(frame.world_to_camera, POINT, camera.focal, camera.centre)
        assert np.linalg.norm(found_dot(pixels) - wanted) < 1.0, frame.file_path
    return read


# --------------------------------------------------------------------------------------------------
# Natural variants


def test_cameras_are_read_as_they_are(tmp_path):
    write_set(tmp_path)
    read = check_dots(tmp_path)
    for frame, pose in zip(read.frames, POSES, strict=True):
        np.testing.assert_allclose(frame.world_to_camera, pose, atol=1e-6)
        assert frame.intrinsics == transforms.Intrinsics(
            (FOCAL, FOCAL), CENTRE, (WIDTH, HEIGHT), (0.0, 0.0, 0.0, 0.0)
        )
    assert read.up is None and frame.mask is None and frame.normals is None
    assert transforms.read(tmp_path / "transforms.json").frames[0].image == tmp_path / "a.png"


@pytest.mark.parametrize("size", [(30, 40), (120, 160), (45, 60), (17, 22)])
def test_images_of_another_size_scale_the_intrinsics(tmp_path, size):
    write_set(tmp_path)
    for path in tmp_path.glob("*.png"):
        Image.open(path).resize(size, Image.Resampling.BICUBIC).save(path)
    check_dots(tmp_path)


@pytest.mark.parametrize("size", [(60, 60), (80, 60), (60, 85)])
def test_images_of_another_shape_are_refused(tmp_path, size):
    write_set(tmp_path)
    Image.open(tmp_path / "b.png").resize(size).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=rf"b\.png: {size[0]} x {size[1]} .* 60 x 80"):
        transforms.read(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("declared", [True, False])
def test_cameras_of_the_stored_pixels_leave_exif_out(tmp_path, orientation, declared):
    """COLMAP and nerfstudio never look at EXIF."""
    about = write_set(tmp_path, names=("a.jpg", "b.jpg", "c.jpg"))
    if not declared:
        save(tmp_path, {k: v for k, v in about.items() if k not in ("w", "h")})
    for path in tmp_path.glob("*.jpg"):
        exif = Image.Exif()
        exif[images.ORIENTATION] = orientation
        Image.open(path).save(path, exif=exif, quality=95)
    assert {frame.orientation for frame in check_dots(tmp_path).frames} == {orientation}


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_cameras_of_the_upright_image_apply_exif(tmp_path, orientation):
    """Their width and height are those that a viewer shows."""
    write_set(tmp_path, names=("a.jpg", "b.jpg", "c.jpg"))
    backward = {5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    turn = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}[backward]
    for path in tmp_path.glob("*.jpg"):
        exif = Image.Exif()
        exif[images.ORIENTATION] = orientation
        stored = Image.open(path).transpose(Image.Transpose[turn])
        stored.save(path, exif=exif, quality=95)
    check_dots(tmp_path)


def test_positions_in_the_upright_image_find_the_stored_pixels(tmp_path):
    stored = np.array([13.0, 50.0])
    for orientation in images.TO_STORED:
        path = tmp_path / f"{orientation}.jpg"
        exif = Image.Exif()
        exif[images.ORIENTATION] = orientation
        Image.fromarray(dot(stored)).save(path, exif=exif, quality=95)
        upright = found_dot(images.read(path).pixels)
        back = images.to_stored(upright[None], images.read_header(path))
        np.testing.assert_allclose(back[0], stored, atol=0.3, err_msg=path.name)


def without(about, *keys):
    return {key: value for key, value in about.items() if key not in keys}


def per_frame(about):
    keys = ("fl_x", "fl_y", "cx", "cy", "w", "h")
    frames = [{**frame, **{k: about[k] for k in keys}} for frame in about["frames"]]
    return {**without(about, *keys), "frames": frames}


def each(change):
    return lambda about: {**about, "frames": [frame | change(frame) for frame in about["frames"]]}


@pytest.mark.parametrize(
    "change",
    [
        lambda about: without(about, "fl_y"),
        lambda about: without(about, "w", "h"),
        lambda about: without(about, "camera_model", "k1", "k2", "p1", "p2"),
        lambda about: {**about, "distortion_params": [0.0] * 6, "k3": 0, "is_fisheye": False},
        lambda about: {**about, "camera_model": "SIMPLE_RADIAL", "w": 60.0, "cx": 26},
        lambda about: without(about, "fl_x", "fl_y")
        | {"camera_angle_x": 2 * np.arctan(30 / FOCAL), "camera_angle_y": 2 * np.arctan(40 / FOCAL)},
        per_frame,
        each(lambda frame: {"transform_matrix": frame["transform_matrix"][:3]}),
        each(lambda frame: {"transform_matrix": np.round(frame["transform_matrix"], 4).tolist()}),
        each(lambda frame: {"file_path": f"./{frame['file_path']}"}),
        each(lambda frame: {"file_path": f".\\{frame['file_path']}"}),
    ],
)  # fmt: skip
def test_natural_variants_of_the_file(tmp_path, change):
    save(tmp_path, change(write_set(tmp_path)))
    check_dots(tmp_path)


def test_without_a_principal_point_it_is_in_the_middle(tmp_path):
    about = write_set(tmp_path)
    for left in (without(about, "cx", "cy"), without(about, "cx", "cy", "w", "h")):
        save(tmp_path, left)
        assert transforms.read(tmp_path).frames[0].intrinsics.centre == (30.0, 40.0)
    for path in tmp_path.glob("*.png"):  # half as large, and nobody says what the camera was for
        Image.open(path).resize((30, 40)).save(path)
    save(tmp_path, without(about, "w", "h"))
    with pytest.raises(InputError, match="give their size as w and h"):
        transforms.read(tmp_path)


def test_a_byte_order_mark(tmp_path):
    path = tmp_path / "transforms.json"
    about = write_set(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(about).encode())
    check_dots(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "JPG"])
@pytest.mark.parametrize("stem", ["train/r_0", "train/r_0.3", "a.b.c"])
def test_names_without_a_suffix(tmp_path, stem, suffix):
    about = write_set(tmp_path, [f"{stem}{i}.{suffix}" for i in range(3)])
    for frame in about["frames"]:
        frame["file_path"] = frame["file_path"].removesuffix(f".{suffix}")
    save(tmp_path, about)
    check_dots(tmp_path)


@pytest.mark.parametrize("on_disk, written", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_with_accents_however_they_are_composed(tmp_path, on_disk, written):
    names = ["Zoë/é1.png", "Zoë/Ångström.png", "한국.png"]
    about = write_set(tmp_path, [unicodedata.normalize(on_disk, name) for name in names])
    for frame in about["frames"]:
        frame["file_path"] = unicodedata.normalize(written, frame["file_path"])
    save(tmp_path, about)
    check_dots(tmp_path)


def test_windows_paths_and_absolute_paths(tmp_path):
    about = write_set(tmp_path, [f"images/{i}.png" for i in "abc"])
    for change in (lambda name: name.replace("/", "\\"), lambda name: str(tmp_path / name)):
        frames = [f | {"file_path": change(f["file_path"])} for f in about["frames"]]
        save(tmp_path, {**about, "frames": frames})
        check_dots(tmp_path)


def test_names_of_files_in_several_folders():
    names = [pathlib.PurePath(f"images/{n}") for n in ("cam3/0001.png", "cam4/0001.png", "u.png")]
    assert transforms.unique_names(names) == ["cam3_0001", "cam4_0001", "u"]
    tricky = ["a/b_c.png", "a_b/c.png", "x/c.png", "x/c.jpg", "y/C.png", "c.png"]
    names = transforms.unique_names([pathlib.PurePath(name) for name in tricky])
    assert len({name.lower() for name in names}) == len(tricky)


# --------------------------------------------------------------------------------------------------
# Masks and normals


def mask_of(folder, alpha=None, mask=None, size=(WIDTH, HEIGHT)):
    """read_mask of an image with this alpha and this mask file."""
    rgba = np.full((size[1], size[0], 4), 255, np.uint8)
    if alpha is not None:
        rgba[..., 3] = alpha
    Image.fromarray(rgba).save(folder / "image.png")
    path = None
    if mask is not None:
        path = folder / "mask.png"
        Image.fromarray(np.asarray(mask, np.uint8)).save(path)
    return transforms.read_mask(images.read(folder / "image.png"), path)


def test_masks_are_the_mask_file_times_alpha(tmp_path):
    left = np.zeros((HEIGHT, WIDTH), np.uint8)
    left[:, : WIDTH // 2] = 255
    top = np.zeros_like(left)
    top[: HEIGHT // 2] = 255
    assert mask_of(tmp_path) is None
    np.testing.assert_array_equal(mask_of(tmp_path, alpha=left), left / 255.0)
    np.testing.assert_array_equal(mask_of(tmp_path, mask=top), top / 255.0)
    np.testing.assert_array_equal(mask_of(tmp_path, mask=top // 255), top / 255.0)  # labels 0, 1
    np.testing.assert_array_equal(mask_of(tmp_path, left, top), (left & top) / 255.0)
    half = mask_of(tmp_path, mask=np.repeat(np.repeat(top, 2, 0), 2, 1))
    np.testing.assert_array_equal(half, top / 255.0)
    with pytest.raises(InputError, match=r"mask\.png: 60 x 60 pixels, its image 60 x 80"):
        mask_of(tmp_path, mask=top[:60])


def test_a_stray_transparent_pixel_is_no_mask(tmp_path):
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[0, 0], alpha[5, 5] = 254, 0
    assert mask_of(tmp_path, alpha=alpha) is None


def test_normals_are_turned_to_the_world(tmp_path):
    about = write_set(tmp_path)
    facing = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    facing[10:70, 10:50] = [128, 128, 255]  # towards the camera
    for i, frame in enumerate(about["frames"][1:]):  # the first has none
        frame["normals_file_path"] = f"normals{i}.png"
        Image.fromarray(facing).save(tmp_path / f"normals{i}.png")
    save(tmp_path, {**about, "normals_space": "camera"})
    first, second, _ = transforms.read(tmp_path).frames
    assert transforms.read_normals(first) is None
    normals = transforms.read_normals(second)
    np.testing.assert_allclose(normals[40, 30], POSES[1][2, :3], atol=0.01)
    assert not normals[0].any()
    Image.fromarray(facing[:40]).save(tmp_path / "normals0.png")
    with pytest.raises(InputError, match=r"normals0\.png: 60 x 40 pixels"):
        transforms.read_normals(second)


# --------------------------------------------------------------------------------------------------
# Files that cannot be used


def first_frame(**changes):
    def change(about):
        return {**about, "frames": [about["frames"][0] | changes, *about["frames"][1:]]}

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda about: [], r"transforms\.json: expected an object"),
        (lambda about: {**about, "frames": []}, "frames: expected a list"),
        (lambda about: {**about, "frames": [3]}, r"frames\[0\]: expected an object"),
        (first_frame(file_path="b.png"), r"names b\.png twice"),
        (first_frame(file_path="./x/../b.png"), "no such file"),
        (first_frame(file_path="../outside.png"), "outside of"),
        (first_frame(file_path="/etc/passwd"), "outside of"),
        (first_frame(file_path="link.png"), "outside of"),
        (first_frame(mask_path="../../x.png"), "outside of"),
        (first_frame(file_path=0), "file_path"),
        (first_frame(file_path="a\0.png"), r"frames\[0\]\.file_path"),
        (first_frame(file_path="\ud800.png"), r"frames\[0\]\.file_path"),
        (first_frame(file_path="x" * 500), "not a file name"),
        (first_frame(mask_path="x\0"), "not a file name"),
        (first_frame(file_path="loop.png"), "not a file name"),
        (first_frame(file_path="pipe.png"), "no such file"),
        (first_frame(file_path="text.png"), r"text\.png: not a readable image"),
        (first_frame(normals_file_path="missing.png"), r"missing\.png: no such file"),
        (first_frame(transform_matrix=None), "transform_matrix: expected"),
        (first_frame(transform_matrix=[[1]]), "transform_matrix: expected a list of 3 to 4"),
        (first_frame(transform_matrix=np.full((4, 4), True).tolist()), "expected a number, got True"),
        (first_frame(transform_matrix=np.diag([1.0, 1, -1, 1]).tolist()), "not a rotation"),
        (first_frame(transform_matrix=np.diag([1.7, 1.7, 1.7, 1]).tolist()), "not a rotation"),
        (first_frame(transform_matrix=(np.eye(4) * [[1, 1, 1, 1e30]]).tolist()), "not a rotation"),
        (first_frame(fl_x="wide"), "fl_x: expected a number"),
        (first_frame(fl_x=True), "fl_x: expected a number, got True"),
        (first_frame(fl_x=float("nan")), "NaN is not a finite number"),
        (first_frame(cx=10**400), "too large a number"),
        (first_frame(fl_y=0), "fl_y: expected a finite number from .* got 0"),
        (first_frame(w=-60), "w: expected a finite number from"),
        (lambda about: without(about, "fl_x"), "focal length is needed"),
        (lambda about: {**without(about, "fl_x"), "camera_angle_x": 0}, "camera_angle_x: expected"),
        (lambda about: {**about, "camera_model": "OPENCV_FISHEYE"}, "OPENCV_FISHEYE .*undistort"),
        (lambda about: {**about, "is_fisheye": True}, "undistort"),
        (lambda about: {**about, "k3": 0.1}, "k3"),
        (lambda about: {**about, "normals_space": "mine"}, "normals_space"),
        (lambda about: {**about, "up": [0, 0, 0]}, "expected a direction"),
        (lambda about: {**about, "up": "z"}, "up: expected a list of 3"),
    ],
)  # fmt: skip
def test_faults_are_named(tmp_path, change, told):
    about = write_set(tmp_path / "set")
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "outside.png")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "set" / "loop.png").symlink_to("loop.png")
    (tmp_path / "set" / "text.png").write_text("not an image")
    os.mkfifo(tmp_path / "set" / "pipe.png")
    save(tmp_path / "set", change(about))
    with pytest.raises(InputError, match=told) as raised:
        transforms.read(tmp_path / "set")
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_far_camera_and_a_distorted_lens(tmp_path):
    about = write_set(tmp_path)
    about["frames"][0]["transform_matrix"][0][3] = 1e30
    save(tmp_path, about)
    with pytest.raises(InputError, match="too far"):
        transforms.read(tmp_path)
    write_set(tmp_path, k1=0.01, p2=-0.002)
    read = transforms.read(tmp_path)
    assert read.frames[0].intrinsics.distortion == (0.01, 0.0, 0.0, -0.002)
    with pytest.raises(InputError, match=r"k1 0\.01, p2 -0\.002\); undistort"):
        read.refuse_distortion()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{\0}\0", b"[" * 100_000, b"9" * 5000])
def test_files_that_are_not_json(tmp_path, content):
    (tmp_path / "transforms.json").write_bytes(content)
    with pytest.raises(InputError, match=r"transforms\.json: "):
        transforms.read(tmp_path)


def test_random_values_anywhere_are_read_or_refused(tmp_path):
    """Whatever stands in the file, nothing but an InputError of one line is raised."""
    about = write_set(tmp_path)
    chance = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        0.5,
        1e300,
        10**400,
        float("inf"),
        "",
        "a.png",
        "\0",
        [],
        [[]],
        {},
        [1] * 4,
    ]
    keys = [*without(about, "frames"), "up", "distortion_params", "is_fisheye", "camera_angle_x"]
    read = 0
    for _ in range(300):
        changed = json.loads(json.dumps(about))
        frame = chance.choice(changed["frames"])
        place = chance.choice([changed, frame, frame["transform_matrix"]])
        if place is frame["transform_matrix"]:
            place[chance.randrange(4)] = chance.choice([*values, [0, 0, 1], [0, 0, True, "x"]])
        else:
            place[chance.choice([*keys, "file_path", "mask_path", "frames"])] = chance.choice(
                values
            )
        save(tmp_path, changed)
        try:
            transforms.read(tmp_path)
            read += 1
        except InputError as error:
            assert "\n" not in str(error)
    assert 0 < read < 300


# --------------------------------------------------------------------------------------------------
# Writing


def test_what_is_written_is_read_again(tmp_path):
    (tmp_path / "views").mkdir()
    views = []
    for i, pose in enumerate(POSES):
        name = f"views/{i}.png"
        Image.fromarray(dot(project(pose, POINT, (FOCAL + i, FOCAL), CENTRE))).save(tmp_path / name)
        camera = transforms.Intrinsics((FOCAL + i, FOCAL), CENTRE, (WIDTH, HEIGHT))
        views.append(transforms.View(name, pose, camera, details={"yaw": 10.0 * i}))
    transforms.write(tmp_path / transforms.NAME, views, normals_space="camera")
    read = check_dots(tmp_path)
    np.testing.assert_array_equal(read.up, [0.0, 1.0, 0.0])
    assert [frame.intrinsics for frame in read.frames] == [view.intrinsics for view in views]
    about = json.loads((tmp_path / transforms.NAME).read_text())
    # nerfstudio takes a number from the file where it stands there, and only else from the frames.
    assert "fl_x" not in about and about["fl_y"] == FOCAL and about["cx"] == CENTRE[0]
    assert [frame["yaw"] for frame in about["frames"]] == [0.0, 10.0, 20.0]
