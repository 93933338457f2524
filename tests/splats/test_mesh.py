"""The mesh of views whose depth and normals are known in closed form, and its files."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from spinmeround_jax import cameras
from spinmeround_jax.files import InputError
from spinmeround_jax.splats import mesh, texture
from tests.support.gltf import attributes, chunks

SIZE = 48
AXES = np.array([0.18, 0.23, 0.16])
CELLS = 64
CELL = 2 * AXES.max() / CELLS


def egg(
    centre: np.ndarray | tuple[float, ...] = (0.0, 0.0, 0.0), noise: float = 0.0
) -> dict[str, np.ndarray]:
    """What 30 cameras, some above and below, see of an ellipsoid coloured by its normals."""
    around = cameras.turntable(24)
    beyond = [(yaw, pitch) for pitch in (-60.0, 60.0) for yaw in (0.0, 120.0, -120.0)]
    poses = cameras.orbit(*np.concatenate([around, beyond]).T)
    views: dict[str, list[np.ndarray]] = {"images": [], "alpha": [], "depth": [], "normals": []}
    for pose in poses.astype(np.float64):
        eye = -pose[:3, :3].T @ pose[:3, 3] - centre
        rays = cameras.camera_directions(SIZE) @ pose[:3, :3]
        a = np.sum((rays / AXES) ** 2, -1)
        b = np.sum(rays / AXES * (eye / AXES), -1)
        within = b**2 - a * (np.sum((eye / AXES) ** 2) - 1.0)
        hit = within > 0
        depth = np.where(hit, (-b - np.sqrt(np.maximum(within, 0.0))) / a, 0.0)
        normals = (eye + depth[..., None] * rays) / AXES**2
        normals *= hit[..., None] / np.linalg.norm(normals, axis=-1, keepdims=True)
        views["images"].append(np.where(hit[..., None], 0.5 + 0.5 * normals, 1.0))
        views["alpha"].append(hit.astype(np.float64))
        views["depth"].append(depth)
        views["normals"].append(normals)
    arrays = {name: np.stack(values) for name, values in views.items()}
    wrong = np.random.default_rng(0).normal(size=arrays["depth"].shape)
    arrays["depth"] += noise * wrong * arrays["alpha"]
    focal = np.full(2, cameras.FOCAL * SIZE)
    return {
        **arrays,
        "world_to_camera": poses,
        "focal": focal,
        "centre": np.full(2, SIZE / 2),
        "resolution": CELLS,
    }


def distances(made: mesh.Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every vertex: distance from the ellipsoid, angle between normals (degrees), true normal."""
    scaled = np.linalg.norm(made.vertices / AXES, axis=-1)
    normals = made.vertices / AXES**2
    slope = np.linalg.norm(normals, axis=-1, keepdims=True)
    distance = (scaled - 1.0) * scaled / slope[:, 0]  # to first order
    normals = normals / slope
    cosine = np.sum(normals * made.normals, -1)
    return distance, np.rad2deg(np.arccos(np.clip(cosine, -1.0, 1.0))), normals


@pytest.fixture(scope="module")
def made() -> mesh.Mesh:
    return mesh.extract(**egg())


def test_an_ellipsoid_comes_back(made):
    distance, angle, normals = distances(made)
    assert np.median(abs(distance)) < 0.05 * CELL
    assert abs(distance).max() < 2.0 * CELL
    assert np.median(angle) < 2.0 and np.quantile(angle, 0.99) < 10.0
    assert abs(made.colours - (0.5 + 0.5 * normals)).mean() < 0.02
    assert np.linalg.norm(made.normals, axis=-1) == pytest.approx(1.0, abs=1e-3)


def test_it_is_closed_and_turned_outward(made):
    surface = trimesh.Trimesh(made.vertices, made.faces, process=False)
    assert surface.is_watertight and surface.is_winding_consistent
    assert surface.body_count == 1 and surface.euler_number == 2
    assert surface.volume == pytest.approx(
        4 / 3 * np.pi * AXES.prod(), rel=0.02
    )  # positive: outward
    assert np.sum(made.vertices * made.normals, -1).min() > 0


def test_noise_averages_out():
    distance, angle, _ = distances(mesh.extract(**egg(noise=0.5 * CELL)))
    assert np.median(abs(distance)) < 0.3 * CELL and np.median(angle) < 5.0


def test_what_other_views_see_through_is_left_out():
    views = egg()
    # Two cameras see a brim around the egg, which the others deny.
    rows = np.s_[:2, SIZE // 2 - 6 : SIZE // 2 + 6]
    brim = views["alpha"][rows] == 0
    views["alpha"][rows] = 1.0
    views["depth"][rows] = np.where(brim, cameras.RADIUS, views["depth"][rows])
    views["normals"][rows] = np.where(brim[..., None], (0.0, 0.0, 1.0), views["normals"][rows])
    del views["resolution"]
    points = mesh.oriented_points(**views)
    off = abs(np.linalg.norm(points.positions / AXES, axis=-1) - 1.0)
    assert (off < 1e-3).sum() > 5000 and (off > 0.2).sum() < 0.05 * brim.sum()


def test_of_two_pieces_the_larger_is_kept():
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(4000, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    small = np.arange(4000) < 1000
    positions = np.where(small[:, None], [0.3, 0.2, 0.0] + 0.05 * normals, 0.15 * normals)
    both = mesh.Points(positions, normals, np.where(small[:, None], 0.0, 1.0), np.ones(4000))
    kept = mesh.poisson(both, CELLS)
    surface = trimesh.Trimesh(kept.vertices, kept.faces, process=False)
    assert surface.body_count == 1 and surface.is_watertight
    np.testing.assert_allclose(surface.bounds, [[-0.15] * 3, [0.15] * 3], atol=0.01)
    assert kept.colours.min() > 0.9


def test_what_leaves_the_picture_below_gets_a_flat_cap():
    low = (0.0, -0.22, 0.0)
    capped = mesh.extract(**egg(centre=low))
    surface = trimesh.Trimesh(capped.vertices, capped.faces, process=False)
    assert surface.is_watertight and surface.volume > 0
    floor = capped.vertices[:, 1].min()
    frame = 0.5 * cameras.RADIUS / cameras.FOCAL
    assert -1.15 * frame < floor < -0.8 * frame  # the picture's lower edge, not the egg's
    flat = abs(surface.triangles_center[:, 1] - floor) < 0.1 * CELL
    assert (surface.face_normals[flat, 1] < -0.95).mean() > 0.95
    area = np.pi * AXES[0] * AXES[2] * (1 - ((floor - low[1]) / AXES[1]) ** 2)
    assert surface.area_faces[flat].sum() == pytest.approx(area, rel=0.15)


# --------------------------------------------------------------------------------------------------
# Files


def test_ply_is_read_back(made, tmp_path):
    mesh.write_ply(tmp_path / "a.ply", made)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]
    read = trimesh.load(tmp_path / "a.ply", process=False)
    np.testing.assert_allclose(read.vertices, made.vertices, atol=1e-6)
    np.testing.assert_array_equal(read.faces, made.faces)
    np.testing.assert_allclose(read.vertex_normals, made.normals, atol=1e-3)
    colours = read.visual.vertex_colors[:, :3] / 255.0
    np.testing.assert_allclose(colours, made.colours, atol=0.51 / 255)


def test_glb_is_what_gltf_asks_for(made, tmp_path):
    mesh.write_glb(tmp_path / "a.glb", made)
    tree, _ = chunks((tmp_path / "a.glb").read_bytes())
    assert tree["asset"]["version"] == "2.0"
    (primitive,) = (p for m in tree["meshes"] for p in m["primitives"])
    assert primitive.get("mode", 4) == 4
    assert set(tree["extensionsUsed"]) == set(
        tree["materials"][primitive["material"]]["extensions"]
    )

    assert {"min", "max"} <= set(tree["accessors"][primitive["attributes"]["POSITION"]])
    _, values = attributes((tmp_path / "a.glb").read_bytes())
    assert set(values) == {"POSITION", "NORMAL", "COLOR_0"}
    positions = values["POSITION"]
    np.testing.assert_allclose(positions, mesh.METRES_PER_UNIT * made.vertices, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(values["NORMAL"], axis=-1), 1.0, atol=1e-3)
    linear = values["COLOR_0"]
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(srgb, made.colours, atol=1e-4)
    read = trimesh.load(tmp_path / "a.glb", process=False).to_mesh()
    np.testing.assert_array_equal(read.faces, made.faces)
    # Whatever stands above the mesh in the scene moves nothing.
    loaded = trimesh.load(tmp_path / "a.glb").to_mesh()
    np.testing.assert_allclose(loaded.bounds, [positions.min(0), positions.max(0)], atol=1e-6)


def test_front_is_plus_z_and_up_is_plus_y(tmp_path):
    """A dent-free egg shifted up and towards the frontal camera is found there, in metres."""
    shift = np.array([0.0, 0.05, 0.1])
    mesh.write_glb(tmp_path / "a.glb", mesh.extract(**egg(centre=shift)))
    middle = trimesh.load(tmp_path / "a.glb").to_mesh().centroid
    np.testing.assert_allclose(middle, 0.6 * shift, atol=0.002)


# --------------------------------------------------------------------------------------------------
# Texture


@pytest.fixture(scope="module")
def textured(made) -> texture.Textured:
    return texture.bake(
        made, **{k: v for k, v in egg().items() if k not in ("normals", "resolution")}
    )


def test_charts_do_not_overlap(made, textured):
    given, faces, uv = texture.unwrap(made, 512)
    np.testing.assert_array_equal(given[faces], made.faces)  # the same surface, cut
    assert uv.min() >= 0 and uv.max() <= 1
    corners = uv[faces]
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    assert (area < 0).all()  # counter-clockwise where v points down: nothing is mirrored or folded
    # Points of the square each lie in one face at most.
    points = np.random.default_rng(0).uniform(size=(1000, 1, 2))
    sides = []
    for i in range(3):
        along, beside = corners[:, i - 2] - corners[:, i], points - corners[:, i]
        sides.append(along[:, 0] * beside[..., 1] - along[:, 1] * beside[..., 0])
    hits = (np.max(sides, axis=0) < 0).sum(-1)
    assert hits.max() == 1 and (hits == 1).mean() > 0.25
    np.testing.assert_array_equal(textured.vertices[textured.faces], made.vertices[made.faces])


def test_the_texture_shows_what_the_views_show(textured, tmp_path):
    """Read by trimesh: the colours at the vertices are those of the ellipsoid there."""
    texture.write_glb(tmp_path / "a.glb", textured)
    tree, _ = chunks((tmp_path / "a.glb").read_bytes())
    (material,) = tree["materials"]
    assert set(material["extensions"]) == {"KHR_materials_unlit"} == set(tree["extensionsUsed"])
    assert tree["images"][0]["mimeType"] == "image/png"
    read = trimesh.load(tmp_path / "a.glb", process=False).to_mesh()
    np.testing.assert_allclose(read.vertices, mesh.METRES_PER_UNIT * textured.vertices, atol=1e-6)
    colours = read.visual.to_color().vertex_colors[:, :3] / 255.0
    normals = read.vertices / AXES**2
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    assert abs(colours - (0.5 + 0.5 * normals)).mean() < 0.02


def test_unseen_texels_take_the_vertices_colours(made):
    views = egg()
    views["images"][:] = 0.0
    views["depth"][:] *= 1.1  # behind the surface: of no texel
    views = {k: v for k, v in views.items() if k not in ("normals", "resolution")}
    textured = texture.bake(made, **views)
    at = np.floor(512 * textured.uv).astype(int)
    colours = textured.image[at[:, 1], at[:, 0]] / 255.0
    normals = textured.vertices / AXES**2
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    assert abs(colours - (0.5 + 0.5 * normals)).mean() < 0.02


# --------------------------------------------------------------------------------------------------
# Bad input


def nothing(views):
    views["alpha"][:] = 0.0


def empty_depth(views):
    views["depth"][:] = 0.0


def not_a_number(views):
    views["depth"][3, 20, 20] = np.nan


def endless(views):
    views["normals"][0, 0, 0] = np.inf


def few(views):
    views["alpha"][:, :-2] = 0.0
    views["alpha"][:, -2:, 8:] = 0.0
    views["alpha"][0, 24, 20:28] = 1.0


def other_size(views):
    views["normals"] = views["normals"][:, ::2]


def averted(views):
    views["normals"] = -views["normals"]


def too_fine(views):
    views["resolution"] = 5000


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nothing, "show nothing"),
        (empty_depth, "show nothing"),
        (not_a_number, "not finite"),
        (endless, "not finite"),
        (few, r"show \d+ points"),
        (other_size, "do not fit together"),
        (averted, "show 0 points"),
        (too_fine, "resolution 5000"),
    ],
)
def test_bad_input_is_one_clear_error(spoil, message):
    views = egg()
    spoil(views)
    with pytest.raises(InputError, match=message) as error:
        mesh.extract(**views)
    assert "\n" not in str(error.value)


def test_points_in_one_place():
    points = mesh.Points(
        np.zeros((300, 3)), np.tile([0.0, 0.0, 1.0], (300, 1)), np.ones((300, 3)), np.ones(300)
    )
    with pytest.raises(InputError, match="one place"):
        mesh.poisson(points)
