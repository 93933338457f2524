"""glTF 2.0 and GLB: geometry, nodes, and the colours of materials as the specification combines them.

Base colour = baseColorFactor x baseColorTexture x COLOR_0, factors and COLOR_0 linear (sections 3.7.2
and 3.9.2). Light, metal and emission beside a base colour are not drawn.
"""

from __future__ import annotations

import base64
import pathlib
import struct
import urllib.parse
from typing import Any

import numpy as np

from data_prep.scans import companions
from data_prep.scans.parts import Look, Scan, Surface, assemble, read_texture
from spinmeround_jax import schema
from spinmeround_jax.files import InputError

_DTYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_WRAPS = {10497: "repeat", 33648: "mirror", 33071: "clamp"}
_TRIANGLES, _STRIP, _FAN = 4, 5, 6
_EXTENSIONS = {  # whose files are read right; those of materials that are not here change light only
    "EXT_texture_webp", "KHR_lights_punctual", "KHR_mesh_quantization", "KHR_texture_transform",
}  # fmt: skip
_TRANSPARENT = 0.5  # alpha below which a surface is seen through


class _File:
    """The JSON of a file and what its accessors, images and buffers hold."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        content = path.read_bytes()
        chunk = None
        if content[:4] == b"glTF":
            content, chunk = _chunks(content)
        self.tree: dict[str, Any] = schema.parse(content, schema.record({}), str(path))
        if str(self.tree["asset"]["version"]).split(".")[0] != "2":
            raise InputError(f"{path}: glTF {self.tree['asset']['version']}; only 2.0 is read")
        for name in self.tree.get("extensionsRequired", []):
            if name not in _EXTENSIONS and not name.startswith("KHR_materials_"):
                raise InputError(f"{path}: needs the extension {name}; export it without")
        self.buffers = [
            chunk if "uri" not in buffer else self._uri(buffer["uri"])
            for buffer in self.tree.get("buffers", [])
        ]
        self._images: dict[int, Any] = {}

    def _uri(self, uri: str) -> bytes:
        if uri.startswith("data:"):
            return base64.b64decode(uri.partition("base64,")[2], validate=True)
        return companions.find(self.path, urllib.parse.unquote(uri)).read_bytes()

    def _view(self, index: int) -> tuple[memoryview, int | None]:
        view = self.tree["bufferViews"][index]
        start = view.get("byteOffset", 0)
        content = memoryview(self.buffers[view["buffer"]])[start : start + view["byteLength"]]
        if len(content) != view["byteLength"]:
            raise ValueError("a buffer is cut short")
        return content, view.get("byteStride")

    def accessor(self, index: int) -> np.ndarray:
        """(count, width); float64 in [0, 1] or [-1, 1] where the file's integers are normalised."""
        accessor = self.tree["accessors"][index]
        count, width = accessor["count"], _WIDTHS[accessor["type"]]
        dtype = np.dtype(_DTYPES[accessor["componentType"]])

        def array(where: dict, dtype: np.dtype, count: int, width: int) -> np.ndarray:
            content, stride = self._view(where["bufferView"])
            strides = (stride or width * dtype.itemsize, dtype.itemsize)
            return np.ndarray((count, width), dtype, content, where.get("byteOffset", 0), strides)

        if "bufferView" not in accessor:
            raise InputError(
                f"{self.path}: its geometry is compressed, or left out; export it again"
            )
        values = array(accessor, dtype, count, width).copy()
        if "sparse" in accessor:
            sparse = accessor["sparse"]
            places = sparse["indices"]
            kind = np.dtype(_DTYPES[places["componentType"]])
            chosen = array(places, kind, sparse["count"], 1)[:, 0]
            values[chosen] = array(sparse["values"], dtype, sparse["count"], width)
        if accessor.get("normalized") and dtype.kind in "iu":
            return np.maximum(values / np.iinfo(dtype).max, -1.0)
        return values

    def image(self, texture: dict):
        """The RGB or RGBA image of one of the file's textures."""
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {})
        index = webp.get("source", texture.get("source"))
        if index is None:
            raise InputError(
                f"{self.path}: a texture is of a kind that is not read; use PNG or JPEG"
            )
        if index not in self._images:
            image = self.tree["images"][index]
            if "uri" in image and not image["uri"].startswith("data:"):
                source = companions.find(self.path, urllib.parse.unquote(image["uri"]))
            elif "uri" in image:
                source = self._uri(image["uri"])
            else:
                source = bytes(self._view(image["bufferView"])[0])
            self._images[index] = read_texture(self.path, source)
        return self._images[index]


def _chunks(content: bytes) -> tuple[bytes, bytes | None]:
    """JSON and binary chunk of a GLB file."""
    found: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= len(content):
        length, kind = struct.unpack_from("<I4s", content, at)
        if at + 8 + length > len(content):
            raise ValueError("cut short")
        found.setdefault(kind, content[at + 8 : at + 8 + length])
        at += 8 + length
    return found[b"JSON"], found.get(b"BIN\0")


def read(path: pathlib.Path) -> Scan:
    """The triangles of the file's scene, one piece a primitive of a node.

    Raises:
        InputError: no faces, no colours, a file that it names is not there, an extension is not read.
        Exception: of many kinds, where the file breaks the specification.
    """
    file = _File(path)
    surfaces, numbered = [], []
    for pose, mesh in _placed(file.tree):
        for primitive in file.tree["meshes"][mesh]["primitives"]:
            if primitive.get("mode", _TRIANGLES) not in (_TRIANGLES, _STRIP, _FAN):
                continue  # points and lines
            surface = _surface(file, primitive, pose)
            surfaces.append(surface)
            numbered.append(surface.vertices)
    return assemble(path, surfaces, numbered[0] if len(numbered) == 1 else None)


def _placed(tree: dict) -> list[tuple[np.ndarray, int]]:
    """(4x4 pose, number of the mesh) of the nodes of the scene."""
    nodes = tree.get("nodes", [])
    if "scenes" in tree:
        roots = tree["scenes"][tree.get("scene", 0)].get("nodes", [])
    else:
        children = {child for node in nodes for child in node.get("children", [])}
        roots = [index for index in range(len(nodes)) if index not in children]
    stack = [(np.eye(4), index) for index in reversed(roots)]
    seen: set[int] = set()
    found = []
    while stack:
        above, index = stack.pop()
        if index in seen:
            raise ValueError("a node hangs in two places")
        seen.add(index)
        node = nodes[index]
        pose = above @ _matrix(node)
        if "mesh" in node:
            found.append((pose, node["mesh"]))
        stack += [(pose, child) for child in reversed(node.get("children", []))]
    return found


def _matrix(node: dict) -> np.ndarray:
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = node.get("rotation", (0.0, 0.0, 0.0, 1.0))
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.array(node.get("scale", (1.0, 1.0, 1.0)))
    matrix[:3, 3] = node.get("translation", (0.0, 0.0, 0.0))
    return matrix


def _surface(file: _File, primitive: dict, pose: np.ndarray) -> Surface:
    if "KHR_draco_mesh_compression" in primitive.get("extensions", {}):
        raise InputError(f"{file.path}: its geometry is compressed; export it without Draco")
    positions = file.accessor(primitive["attributes"]["POSITION"]).astype(np.float64)
    vertices = positions @ pose[:3, :3].T + pose[:3, 3]
    if "indices" in primitive:
        order = file.accessor(primitive["indices"])[:, 0].astype(np.int64)
    else:
        order = np.arange(len(vertices))
    mode = primitive.get("mode", _TRIANGLES)
    if mode == _TRIANGLES:
        faces = order.reshape(-1, 3)
    elif mode == _STRIP:  # every other triangle is turned
        faces = np.stack([order[:-2], order[1:-1], order[2:]], axis=1)
        faces[1::2] = faces[1::2, ::-1]
    else:
        faces = np.stack([np.full(len(order) - 2, order[0]), order[1:-1], order[2:]], axis=1)
    if np.linalg.det(pose[:3, :3]) < 0:  # a mirroring node turns faces inside out
        faces = faces[:, ::-1]
    return Surface(vertices, faces, _look(file, primitive, faces, len(vertices)))


def _look(file: _File, primitive: dict, faces: np.ndarray, count: int) -> Look:
    attributes = primitive["attributes"]
    material = file.tree["materials"][primitive["material"]] if "material" in primitive else {}
    factor, reference = _base_colour(material)
    if factor is None and reference is None and "COLOR_0" not in attributes:
        raise InputError(f"{file.path}: has neither a texture nor colours of its vertices")
    colours = np.tile(np.array(factor or (1.0,) * 4, np.float64)[:4], (count, 1))
    if "COLOR_0" in attributes:
        given = file.accessor(attributes["COLOR_0"])
        if given.dtype.kind not in "f":
            raise InputError(f"{file.path}: its COLOR_0 are integers that are not normalised")
        colours[:, : given.shape[1]] *= given
    uv, texture, wrap = None, None, ("repeat", "repeat")
    if reference is not None:
        texture, uv, wrap = _texture(file, reference, attributes)
    look = Look(
        colours[:, :3].astype(np.float32),
        None if texture is None else np.ascontiguousarray(texture[..., :3]),
        uv,
        wrap,
    )
    if material.get("alphaMode", "OPAQUE") != "OPAQUE":
        alpha = colours[faces, 3].mean(axis=1)
        if texture is not None and texture.shape[-1] == 4:
            middle = uv[faces].mean(axis=1) % 1.0
            columns = (middle[:, 0] * texture.shape[1]).astype(int)
            rows = (
                ((1.0 - middle[:, 1]) * texture.shape[0]).astype(int).clip(0, texture.shape[0] - 1)
            )
            alpha = alpha * texture[rows, columns, 3] / 255.0
        cutoff = (
            material.get("alphaCutoff", 0.5) if material["alphaMode"] == "MASK" else _TRANSPARENT
        )
        if (alpha < cutoff).any():
            raise InputError(
                f"{file.path}: material {material.get('name', '')!r} is partly transparent, as hair on "
                "cards is; remove it, or bake it opaque"
            )
    return look


def _base_colour(material: dict) -> tuple[list[float] | None, dict | None]:
    """(factor, reference to a texture) of a material, None where it has none."""
    gloss = material.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness")
    if gloss is not None:
        return gloss.get("diffuseFactor"), gloss.get("diffuseTexture")
    pbr = material.get("pbrMetallicRoughness", {})
    factor, texture = pbr.get("baseColorFactor"), pbr.get("baseColorTexture")
    if texture is None and "emissiveTexture" in material:  # scans that glow instead of being lit
        return [*material.get("emissiveFactor", (0.0,) * 3), 1.0], material["emissiveTexture"]
    return factor, texture


def _texture(
    file: _File, reference: dict, attributes: dict
) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
    """(pixels (h, w, 3 or 4) uint8, uv (n, 2) v upward, wrap) of a material's texture."""
    transform = reference.get("extensions", {}).get("KHR_texture_transform", {})
    name = f"TEXCOORD_{transform.get('texCoord', reference.get('texCoord', 0))}"
    if name not in attributes:
        raise InputError(f"{file.path}: its texture needs {name}, which the mesh does not have")
    uv = file.accessor(attributes[name]).astype(np.float64)
    turn = transform.get("rotation", 0.0)
    uv = uv * np.array(transform.get("scale", (1.0, 1.0)))
    uv = uv @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    uv = uv + np.array(transform.get("offset", (0.0, 0.0)))
    texture = file.tree["textures"][reference["index"]]
    sampler = file.tree["samplers"][texture["sampler"]] if "sampler" in texture else {}
    wrap = tuple(_WRAPS[sampler.get(key, 10497)] for key in ("wrapS", "wrapT"))
    return np.asarray(file.image(texture)), np.stack([uv[:, 0], 1.0 - uv[:, 1]], axis=1), wrap
