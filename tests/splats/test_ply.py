"""3DGS .ply files: layout, round trip, hostile files."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError
from spinmeround_jax.splats.ply import read_ply, write_ply
from spinmeround_jax.splats.rasterise import render
from tests.support.splat_scenes import random_gaussians


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_round_trip(tmp_path, degree):
    written = random_gaussians(7, degree)
    write_ply(tmp_path / "a.ply", written)
    read = read_ply(tmp_path / "a.ply")
    assert read.degree == degree
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(written), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_layout(tmp_path):
    """As the original's: the other harmonics channel by channel."""
    scene = random_gaussians(3, 1)
    write_ply(tmp_path / "a.ply", scene)
    head, body = (tmp_path / "a.ply").read_bytes().split(b"end_header\n", 1)
    names = [line.split()[-1].decode() for line in head.splitlines() if b"property" in line]
    assert names[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    assert names[9:54] == [f"f_rest_{i}" for i in range(45)]
    assert names[54:] == [
        "opacity",
        "scale_0",
        "scale_1",
        "scale_2",
        *(f"rot_{i}" for i in range(4)),
    ]
    table = np.frombuffer(body, "<f4").reshape(3, len(names))
    # Red's fifteen first; y, z, x, and half a turn about z changes the signs of x and y.
    np.testing.assert_array_equal(table[:, 9:12], scene.sh[:, 1:, 0] * np.array([-1, 1, -1]))
    np.testing.assert_array_equal(table[:, 12:24], 0)
    np.testing.assert_array_equal(table[:, 54], scene.opacity_logits)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_file_shows_the_same_head_with_y_down(tmp_path, degree):
    """Drawn with the file's numbers as they are, by a camera turned with them, pictures are equal."""
    scene = random_gaussians(20, degree)
    write_ply(tmp_path / "a.ply", scene)
    content = (tmp_path / "a.ply").read_bytes()
    as_written = tmp_path / "b.ply"
    as_written.write_bytes(re.sub(rb"comment y is down[^\n]*\n", b"comment y is up\n", content))
    turned = read_ply(as_written)
    np.testing.assert_array_equal(turned.means, scene.means * np.float32([-1, -1, 1]))
    pose = cameras.orbit(30.0, 10.0)
    images = [
        render(gaussians, jnp.asarray(camera, jnp.float32), cameras.FOCAL * 32, 32, capacity=64)[
            "rgb"
        ]
        for gaussians, camera in ((scene, pose), (turned, pose @ np.diag([-1.0, -1.0, 1.0, 1.0])))
    ]
    assert np.ptp(images[0]) > 0.2
    np.testing.assert_allclose(images[0], images[1], atol=2e-5)


def test_other_programs_files(tmp_path):
    """Doubles, further properties, no normals, further elements; y down, as is the custom."""
    scene = random_gaussians(4, 0)
    names = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"]
    names += [f"scale_{i}" for i in range(3)] + [f"rot_{i}" for i in range(4)]
    table = np.zeros(4, [("label", "u1"), *((name, "<f8") for name in names)])
    parts = [scene.means, scene.sh[:, 0], scene.opacity_logits[:, None], scene.log_scales]
    for name, column in zip(names, np.concatenate([*parts, scene.quaternions], 1).T, strict=True):
        table[name] = column
    head = "ply\nformat binary_little_endian 1.0\nelement vertex 4\nproperty uchar label\n"
    head += "".join(f"property double {name}\n" for name in names)
    head += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    (tmp_path / "a.ply").write_bytes(head.encode() + table.tobytes() + b"\x00")
    read = read_ply(tmp_path / "a.ply")
    np.testing.assert_array_equal(read.means, scene.means * np.float32([-1, -1, 1]))
    np.testing.assert_array_equal(read.log_scales, scene.log_scales)


def test_bad_files_are_named(tmp_path):
    file = tmp_path / "bad.ply"
    write_ply(file, random_gaussians(5, 1))
    good = file.read_bytes()
    for content, told in [
        (b"", "no .ply header"),
        (b"not a ply at all", "no .ply header"),
        (good[:-1], "copy the file again"),
        (good.replace(b"binary_little_endian", b"ascii"), "not binary_little_endian"),
        (good.replace(b"vertex 5", b"vertex 0"), "0 vertices"),
        (good.replace(b"vertex 5", b"vertex 99999999999"), "99999999999 vertices"),
        (good.replace(b"vertex 5", b"vertex -5"), "-5 vertices"),
        (good.replace(b"element vertex", b"element points"), "does not begin with vertices"),
        (good.replace(b"property float opacity", b"property float opaqueX"), "no property opacity"),
        (good.replace(b"property float rot_3", b"property float rot_2"), "twice"),
        (good.replace(b"float f_rest_44", b"float g_rest_44"), "f_rest_"),
        (good.replace(b"property float x\n", b"property list uchar float x\n"), "in its header"),
        (good[:-4] + np.float32(np.nan).tobytes(), "not finite"),
    ]:
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.ply") as raised:
            read_ply(file)
        assert told in str(raised.value), content[:40]


def test_nothing_is_written_of_what_is_not_finite(tmp_path):
    scene = random_gaussians(3)
    with pytest.raises(ValueError, match="not finite"):
        write_ply(tmp_path / "a.ply", dataclasses.replace(scene, means=scene.means * np.nan))
    assert not list(tmp_path.iterdir())
