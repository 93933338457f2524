"""Scans of heads: files, textures, alignment by landmarks or by a detector, the command."""

import argparse
import base64
import io
import json
import shutil
import types

import numpy as np
import pytest

pytest.importorskip("trimesh", reason="reading meshes needs '.[data]'")

import trimesh
from PIL import Image

from data_prep import meshes
from data_prep.parametric.head import build_head
from data_prep.parametric.landmarks import world_landmarks
from data_prep.parametric.people import sample_person
from data_prep.rendering import render
from data_prep.scans import alignment, textured
from data_prep.workers import SubjectRejected
from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import landmarks, pose
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.faces import Face
from spinmeround_jax.splats import mesh
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

    def identify(image, face):
        vector = np.resize(image.mean(axis=(0, 1)), 512)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    return types.SimpleNamespace(finder=types.SimpleNamespace(find=find), identify=identify)


@pytest.mark.parametrize("suffix", [".obj", ".glb", ".ply"])
def test_colours_and_normals_are_the_files(tmp_path, head, suffix):
    _, faces, _ = head
    parts = textured.read(save(tmp_path / f"head{suffix}", head, lambda values: values)).parts
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
    (part,) = textured.read(tmp_path / "split.ply").parts
    np.testing.assert_allclose(part.normals, head[2][faces].reshape(-1, 3), atol=2e-3)


def test_open_scans_look_at_the_viewer_from_behind(tmp_path):
    sheet = trimesh.Trimesh(
        [[-0.2, -0.2, 0], [0.2, -0.2, 0], [0, 0.2, 0]], [[0, 1, 2]], process=False
    )
    sheet.visual = trimesh.visual.ColorVisuals(sheet, vertex_colors=np.full((3, 4), 200, np.uint8))
    sheet.export(tmp_path / "sheet.ply")
    parts = textured.read(tmp_path / "sheet.ply").parts
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
    with pytest.raises(InputError, match=rf"bad\{suffix}: "):
        textured.read(path)


@pytest.mark.parametrize("suffix", [".stl", ".off", ".ply", ".glb", ".obj"])
def test_grey_meshes_are_named(tmp_path, head, suffix):
    path = tmp_path / f"grey{suffix}"
    trimesh.Trimesh(head[0], head[1], process=False).export(path)
    with pytest.raises(InputError, match="neither a texture nor colours"):
        textured.read(path)


# --------------------------------------------------------------------------------------------------
# Files as other programs write them: a square in the plane z = 0 that fills more than the frame

SQUARE = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]])
LEFT, RIGHT = (200, 60, 60), (60, 60, 200)
SRGB_128 = 0.2158605  # linear light of sRGB 128


def two_halves():
    return Image.fromarray(np.array([[LEFT] * 16 + [RIGHT] * 16] * 32, np.uint8))


def seen(path):
    """Mean colours of the left and the right half of the square, from the front."""
    parts = textured.read(path).parts
    rgba = textured.draw(textured.scene(parts), parts, cameras.orbit(0.0), 32, 1).rgba
    assert (rgba[..., 3] == 255).all()
    return rgba[:, 2:14, :3].mean((0, 1)), rgba[:, 18:30, :3].mean((0, 1))


def assert_halves(path, left=LEFT, right=RIGHT):
    for colour, expected in zip(seen(path), (left, right), strict=True):
        np.testing.assert_allclose(colour, expected, atol=1.5)


def write_obj(folder, mtl, library="m.mtl", texture_name="skin.png", head="", newline="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [head + f"mtllib {library}"]
    # Numbers of texture coordinates are not those of vertices, and the first vertex has no face.
    lines += ["v 9 9 9"] + ["v {} {} {}".format(*vertex) for vertex in SQUARE]
    lines += ["vt 1 1", "vt 0 1", "vt 0 0", "vt 1 0", "usemtl skin", "f 2/3 3/4 4/1 5/2"]
    (folder / "head.obj").write_bytes(newline.join(lines).encode())
    if mtl is not None:
        (folder / library).write_bytes(mtl.replace("\n", newline).encode("latin-1"))
    if texture_name:
        (folder / texture_name).parent.mkdir(exist_ok=True)
        two_halves().save(folder / texture_name)
    return folder / "head.obj"


@pytest.mark.parametrize(
    "line, there",
    [
        ("map_Kd skin.png", "skin.png"),
        ("map_Kd\tskin.png ", "skin.png"),
        ("MAP_KD Skin.PNG", "skin.png"),
        ("map_Kd C:\\scans\\anna\\skin.png", "skin.png"),
        ("map_Kd /home/anna/skin.png", "skin.png"),
        ("map_Kd .\\skin.png", "skin.png"),
        ("map_Kd maps\\skin.png", "maps/skin.png"),
        ("map_Kd skin.png", "textures/skin.png"),
        ("map_Kd ../textures/skin.png", "../textures/skin.png"),
        ('map_Kd "my skin.png"', "my skin.png"),
        ("map_Kd my skin.png", "my skin.png"),
        ("map_Kd -o 0 0 0 -s 1 1 1 -bm 0.5 my skin.png", "my skin.png"),
        ("map_Kd -clamp on -blendu off skin.png", "skin.png"),
        ("map_Kd -s 1 1 2.png", "2.png"),
        ("map_Kd t\u00e9.png", "t\u00e9.png"),
        ("map_Ka skin.png", "skin.png"),
    ],
)
def test_textures_are_found_as_programs_name_them(tmp_path, line, there):
    path = write_obj(
        tmp_path / "scan", f"newmtl skin\nKd 0.8 0.8 0.8\n{line}\n", texture_name=there
    )
    assert_halves(path)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("head", ["", "\ufeff", "# exported\n"])
def test_line_ends_and_marks_do_not_matter(tmp_path, newline, head):
    mtl = "newmtl skin\nmap_Kd skin.png\n"
    assert_halves(write_obj(tmp_path, mtl, head=head.replace("\n", newline), newline=newline))


def test_options_move_textures(tmp_path):
    path = write_obj(tmp_path, "newmtl skin\nmap_Kd -o 0.5 0 0 skin.png\n")
    assert_halves(path, RIGHT, LEFT)
    path = write_obj(tmp_path, "newmtl skin\nmap_Kd -s 0.5 1 1 skin.png\n")
    assert_halves(path, LEFT, LEFT)
    path = write_obj(tmp_path, "newmtl skin\nmap_Kd -mm 0 2 skin.png\n")
    with pytest.raises(InputError, match="-mm"):
        textured.read(path)


@pytest.mark.parametrize(
    "mtl, texture, message",
    [
        ("newmtl skin\nKd 1 1 1\nmap_Kd gone.png\n", "skin.png", "gone.png"),
        ("newmtl skin\nmap_Kd ../../skin.png\n", "../../skin.png", "skin.png"),
        ("newmtl skin\nmap_Kd skin.png\n", "SKIN.png", None),
        ("newmtl other\nKd 1 1 1\n", "skin.png", "'skin' has neither a texture nor colours"),
        (None, "skin.png", "m.mtl"),
    ],
)
def test_lost_textures_are_refused(tmp_path, mtl, texture, message):
    path = write_obj(tmp_path / "a/b", mtl, texture_name=texture)
    if message is None:  # the only one of another case; with a second one nobody can tell
        assert_halves(path)
        two_halves().save(path.parent / "Skin.png")
        message = "SKIN.png or Skin.png"
    with pytest.raises(InputError, match=message):
        textured.read(path)


def test_colours_of_an_obj_without_texture(tmp_path):
    mtl = f"newmtl skin\nKd {SRGB_128} {SRGB_128} 1\n"
    path = write_obj(tmp_path, mtl)
    assert_halves(path, (128, 128, 255), (128, 128, 255))
    text = "".join("v {} {} {} 0.2 0.4 0.6\n".format(*v) for v in SQUARE)
    (tmp_path / "head.obj").write_text(text + "f -4 -3 -2 -1\n")
    assert_halves(path, (51, 102, 153), (51, 102, 153))


def test_vertices_are_numbered_as_in_the_file(tmp_path, head):
    vertices = np.vstack([[9.0, 9.0, 9.0], SQUARE])
    mtl = "newmtl skin\nmap_Kd skin.png\n"
    np.testing.assert_array_equal(textured.read(write_obj(tmp_path, mtl)).numbered, vertices)
    for suffix in (".ply", ".glb", ".obj"):
        scan = textured.read(save(tmp_path / f"head{suffix}", head))
        np.testing.assert_allclose(
            scan.numbered[[5, 50, 500]], moved(head[0])[[5, 50, 500]], rtol=1e-6
        )


def test_quads_of_a_ply_with_coordinates_of_faces_keep_the_numbers(tmp_path):
    two_halves().save(tmp_path / "skin.png")
    lines = [
        "ply", "format ascii 1.0", "comment TextureFile C:\\scans\\Skin.png", "element vertex 4",
        *(f"property float {axis}" for axis in "xyz"), "element face 2",
        "property list uchar int vertex_indices", "property list uchar float texcoord", "end_header",
        *("{} {} {}".format(*vertex) for vertex in SQUARE),
        "3 0 1 2 6 0 0 1 0 1 1", "3 2 3 0 6 1 1 0 1 0 0",
    ]  # fmt: skip
    path = tmp_path / "head.ply"
    path.write_text("\n".join(lines) + "\n")
    assert_halves(path)
    np.testing.assert_array_equal(textured.read(path).numbered, SQUARE)
    path.write_text(path.read_text().replace("Skin.png", "gone.png"))
    with pytest.raises(InputError, match=r"gone\.png"):
        textured.read(path)


@pytest.mark.parametrize(
    "kind, value",
    [
        ("uchar", "200 60 60"),
        ("ushort", "51400 15420 15420"),
        ("float", "0.7843 0.2353 0.2353"),
        ("float", "200.0 60.0 60.0"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "diffuse_"])
def test_colours_of_a_ply_by_any_name_and_type(tmp_path, kind, value, prefix):
    lines = [
        "ply", "format ascii 1.0", "element vertex 4", *(f"property float {axis}" for axis in "xyz"),
        *(f"property {kind} {prefix}{name}" for name in ("red", "green", "blue")), "element face 1",
        "property list uchar int vertex_indices", "end_header",
        *("{} {} {} ".format(*vertex) + value for vertex in SQUARE), "4 0 1 2 3",
    ]  # fmt: skip
    (tmp_path / "head.ply").write_text("\n".join(lines) + "\n")
    assert_halves(tmp_path / "head.ply", LEFT, LEFT)


def write_gltf(path, material=None, colour=None, image=True, more_uv=None, node=None, **top):
    """The square, with the image of two halves on TEXCOORD_0, as glTF with everything inside."""
    blob, views, accessors = b"", [], []

    def view(content):
        nonlocal blob
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": len(content)})
        blob += content + b"\0" * (-len(content) % 4)
        return len(views) - 1

    def accessor(values):
        types = {"f": 5126, "B": 5121, "H": 5123}
        entry = {
            "bufferView": view(values.tobytes()),
            "count": len(values),
            "type": f"VEC{values.shape[1]}",
        }
        entry["componentType"] = types[values.dtype.char]
        if values.dtype.kind == "u":
            entry["normalized"] = True
        accessors.append(entry)
        return len(accessors) - 1

    uv = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)
    attributes = {"POSITION": accessor(SQUARE.astype(np.float32)), "TEXCOORD_0": accessor(uv)}
    if more_uv is not None:
        attributes["TEXCOORD_1"] = accessor(more_uv.astype(np.float32))
    if colour is not None:
        attributes["COLOR_0"] = accessor(colour)
    primitive = {"attributes": attributes, "mode": 6}
    tree = {
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, **(node or {})}], "meshes": [{"primitives": [primitive]}], **top,
    }  # fmt: skip
    if material is not None:
        primitive["material"] = 0
        tree["materials"] = [material]
    if image:
        stream = io.BytesIO()
        two_halves().save(stream, "PNG")
        tree["images"] = [{"bufferView": view(stream.getvalue()), "mimeType": "image/png"}]
        tree["textures"] = [{"source": 0}]
    uri = "data:application/octet-stream;base64," + base64.b64encode(blob).decode()
    tree |= {
        "buffers": [{"uri": uri, "byteLength": len(blob)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    path.write_text(json.dumps(tree))
    return path


def base_colour(**pbr):
    return {"pbrMetallicRoughness": pbr}


def grey(dtype, width=3):
    top = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    values = np.full((4, width), SRGB_128 * top)
    values[:, 3:] = top
    return (np.rint(values) if top > 1 else values).astype(dtype)


TEXTURE = {"index": 0}
HALF = tuple(
    round(255 * (1.055 * (((c / 255 + 0.055) / 1.055) ** 2.4 * SRGB_128) ** (1 / 2.4) - 0.055))
    for c in (200, 60)
)  # sRGB of half-bright 200 and 60


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.uint16])
@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("material", [None, {}, base_colour(metallicFactor=0.0)])
def test_colours_of_gltf_vertices_are_linear(tmp_path, dtype, width, material):
    path = write_gltf(tmp_path / "a.gltf", material, grey(dtype, width), image=False)
    assert_halves(path, (128,) * 3, (128,) * 3)


def test_gltf_multiplies_factor_texture_and_colours(tmp_path):
    factor = [SRGB_128] * 3 + [1.0]
    left, right = (HALF[0], HALF[1], HALF[1]), (HALF[1], HALF[1], HALF[0])
    path = tmp_path / "a.gltf"
    assert_halves(write_gltf(path, base_colour(baseColorFactor=factor)), (128,) * 3, (128,) * 3)
    assert_halves(write_gltf(path, base_colour(baseColorTexture=TEXTURE)))
    textured_factor = base_colour(baseColorTexture=TEXTURE, baseColorFactor=factor)
    assert_halves(write_gltf(path, textured_factor), left, right)
    assert_halves(
        write_gltf(path, base_colour(baseColorTexture=TEXTURE), grey(np.float32)), left, right
    )


def test_gltf_uses_the_coordinates_that_the_material_names(tmp_path):
    path = tmp_path / "a.gltf"
    right = np.full((4, 2), [0.75, 0.5])
    second = base_colour(baseColorTexture={"index": 0, "texCoord": 1})
    assert_halves(write_gltf(path, second, more_uv=right), RIGHT, RIGHT)
    with pytest.raises(InputError, match="TEXCOORD_1"):
        textured.read(write_gltf(path, second))

    def moved_by(**transform):
        return base_colour(
            baseColorTexture={"index": 0, "extensions": {"KHR_texture_transform": transform}}
        )

    assert_halves(write_gltf(path, moved_by(offset=[0.5, 0.0])), RIGHT, LEFT)
    assert_halves(write_gltf(path, moved_by(scale=[0.5, 1.0])), LEFT, LEFT)
    assert_halves(write_gltf(path, moved_by(texCoord=1), more_uv=right), RIGHT, RIGHT)
    # Half a turn about the origin, then back into the image.
    assert_halves(write_gltf(path, moved_by(rotation=np.pi, offset=[1.0, 1.0])), RIGHT, LEFT)


def test_gltf_wraps_as_its_sampler_says(tmp_path):
    material = base_colour(
        baseColorTexture={
            "index": 0,
            "extensions": {"KHR_texture_transform": {"offset": [1.0, 0.0]}},
        }
    )
    for wrap, expected in ((10497, (LEFT, RIGHT)), (33648, (RIGHT, LEFT)), (33071, (RIGHT, RIGHT))):
        path = write_gltf(tmp_path / "a.gltf", material, samplers=[{"wrapS": wrap}])
        tree = json.loads(path.read_text())
        tree["textures"][0]["sampler"] = 0
        path.write_text(json.dumps(tree))
        assert_halves(path, *expected)


def test_mirroring_nodes_keep_the_outside_outside(tmp_path):
    material = base_colour(baseColorTexture=TEXTURE)
    path = write_gltf(tmp_path / "a.gltf", material, node={"scale": [-1, 1, 1]})
    assert_halves(path, RIGHT, LEFT)
    (part,) = textured.read(path).parts
    np.testing.assert_allclose(part.normals, [[0, 0, 1]] * 4, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extensionsRequired": ["KHR_draco_mesh_compression"]}, "KHR_draco_mesh_compression"),
        ({"extensionsRequired": ["EXT_meshopt_compression"]}, "EXT_meshopt_compression"),
        ({"images": [{"uri": "gone.png"}]}, "gone.png"),
        ({"images": [{"uri": "%67one.png"}]}, "gone.png"),
        ({"images": [{"uri": "data:image/png;base64,AAAA"}]}, "cannot be read"),
        ({"textures": [{"extensions": {"KHR_texture_basisu": {"source": 0}}}]}, "PNG or JPEG"),
        ({"asset": {"version": "1.0"}}, "only 2.0"),
        ({"nodes": [{"mesh": 0, "children": [0]}]}, "two places"),
        (
            {
                "accessors": [
                    {"count": 10**9, "type": "VEC3", "componentType": 5126, "bufferView": 0}
                ]
            },
            "readable",
        ),
    ],
)
def test_gltf_that_would_be_read_wrong_is_refused(tmp_path, change, message):
    path = write_gltf(tmp_path / "a.gltf", base_colour(baseColorTexture=TEXTURE))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        textured.read(path)


@pytest.mark.parametrize("mode", ["MASK", "BLEND"])
def test_transparent_gltf_is_refused(tmp_path, mode):
    material = base_colour(baseColorTexture=TEXTURE) | {"alphaMode": mode}
    assert_halves(write_gltf(tmp_path / "a.gltf", material))
    material["pbrMetallicRoughness"]["baseColorFactor"] = [1.0, 1.0, 1.0, 0.2]
    with pytest.raises(InputError, match="transparent"):
        textured.read(write_gltf(tmp_path / "a.gltf", material))


def test_our_own_meshes_are_read(tmp_path):
    colours = np.tile(np.float32([0.2, 0.4, 0.6]), (4, 1))
    own = mesh.Mesh(
        SQUARE.astype(np.float32), np.tile(np.float32([0, 0, 1]), (4, 1)),
        np.int32([[0, 1, 2], [0, 2, 3]]), colours,
    )  # fmt: skip
    mesh.write_glb(tmp_path / "mesh.glb", own, 1.0)
    mesh.write_ply(tmp_path / "mesh.ply", own)
    for name in ("mesh.glb", "mesh.ply"):
        assert_halves(tmp_path / name, (51, 102, 153), (51, 102, 153))


def test_numbers_for_a_gltf_of_several_pieces_are_refused(tmp_path):
    path = write_gltf(tmp_path / "a.gltf", base_colour(baseColorTexture=TEXTURE))
    tree = json.loads(path.read_text())
    tree["meshes"][0]["primitives"] *= 2
    path.write_text(json.dumps(tree))
    (tmp_path / "a.landmarks.json").write_text("[0, 1, 2, 3, 0]")
    with pytest.raises(InputError, match="2 pieces"):
        alignment.read_landmarks(tmp_path / "a.landmarks.json", textured.read(path))


# --------------------------------------------------------------------------------------------------
# Alignment


def test_a_similarity_is_recovered():
    rng = np.random.default_rng(0)
    some = rng.standard_normal((12, 3))
    scale, rotation, offset = alignment.similarity(moved(some), some)
    np.testing.assert_allclose(scale * moved(some) @ rotation.T + offset, some, atol=1e-9)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    with pytest.raises(InputError, match="on one line"):
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
    parts = textured.read(path).parts
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
    with pytest.raises(InputError, match="no face is seen along x with y upward"):
        alignment.find(parts, models_that_see(lambda image: None), "y", "x")
    with pytest.raises(InputError, match="same axis"):
        alignment.find(parts, models_that_see(project), "y", "-y")


@pytest.mark.parametrize(
    "content",
    ["", "3", "[1, 2]", "[[1, 2, 3]]", "[0, 1, 2, 3, 99999999]", "[0, 1, 2, 3, -1]", '"a"'],
)
def test_landmarks_that_are_none_are_named(tmp_path, head, content):
    scan = textured.read(save(tmp_path / "head.ply", head))
    path = tmp_path / "head.landmarks.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"head\.landmarks\.json: expected"):
        alignment.read_landmarks(path, scan)


@pytest.mark.parametrize("order", [[1, 0, 2, 4, 3], [2, 1, 0, 3, 4], [0, 1, 4, 3, 2]])
def test_landmarks_that_do_not_lie_as_on_a_head_are_refused(points, order):
    five = moved(landmarks.five_of(points))
    alignment.from_landmarks(five)
    with pytest.raises(InputError, match="do not lie as on a head"):
        alignment.from_landmarks(five[order])


def test_mirrored_landmarks_are_refused(points):
    with pytest.raises(InputError, match="do not lie as on a head"):
        alignment.from_landmarks(moved(points * [-1, 1, 1]))


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
    assert meshes.main([*command.split(), "--up", "z"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_without_models_the_command_says_what_is_missing(tmp_path, scans):
    (scans / "anna.npy").unlink()
    args = argparse.Namespace(
        input=scans, held_out=0, size=32, views=2, samples=1, up="y", front="z", license="CC0",
        models=tmp_path / "nothing",
    )  # fmt: skip
    with pytest.raises(AssetError, match="missing"):
        meshes.build(args)
    args.held_out = 3
    with pytest.raises(InputError, match="has 3 people"):
        meshes.build(args)
    args.input = tmp_path / "nowhere"
    with pytest.raises(InputError, match="no meshes in it"):
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
