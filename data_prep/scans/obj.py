"""Wavefront OBJ with its materials, in the file's own order of vertices.

trimesh renumbers vertices where there are texture coordinates, reads the first `mtllib` alone, and
passes over textures that it does not find.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

import numpy as np

from data_prep.rendering import shading
from data_prep.scans import companions
from data_prep.scans.parts import Look, Scan, Surface, assemble, read_texture
from spinmeround_jax.files import InputError

# Options before the name of a texture: the most arguments that each takes; they are numbers, but for
# those in _WORDS.
_OPTIONS = {"-o": 3, "-s": 3, "-t": 3, "-mm": 2, "-bm": 1, "-boost": 1, "-texres": 1}
_WORDS = {"-blendu", "-blendv", "-cc", "-clamp", "-imfchan", "-type"}


@dataclasses.dataclass
class Material:
    """colour: Kd, linear. maps: the arguments of map_Kd and map_Ka by their name in lower case."""

    colour: tuple[float, float, float] | None = None
    maps: dict[str, str] = dataclasses.field(default_factory=dict)


def read(path: pathlib.Path) -> Scan:
    """The pieces of an OBJ file, one a material.

    A material's texture counts before colours of the vertices, these before its Kd. Kd does not dim a
    texture: exporters write their default beside it.

    Raises:
        InputError: no faces, no colours, or a file that it names is not there.
        ValueError, IndexError: lines that are no numbers.
    """
    positions: list[list[str]] = []
    coordinates: list[list[str]] = []
    corners: list[tuple[int, int]] = []  # (vertex, texture coordinate or -1)
    known: dict[str, int] = {}  # a corner as written -> its number
    groups: dict[str | None, list[int]] = {}
    libraries: list[str] = []
    triangles: list[int] = groups.setdefault(None, [])
    for line in _lines(path):
        key, rest = (*line.split(None, 1), "")[:2]
        if key == "v":
            positions.append(rest.split())
        elif key == "vt":
            coordinates.append(rest.split()[:2])
        elif key == "f":
            polygon = []
            for token in rest.partition("#")[0].split():
                number = known.get(token)
                if number is None:
                    number = len(corners)
                    corners.append(_corner(token, len(positions), len(coordinates)))
                    if "-" not in token:  # negative numbers count from the line's place
                        known[token] = number
                polygon.append(number)
            for i in range(1, len(polygon) - 1):
                triangles += (polygon[0], polygon[i], polygon[i + 1])
        elif key == "usemtl":
            triangles = groups.setdefault(rest.strip(), [])
        elif key == "mtllib":
            libraries.append(rest)
    vertices = np.array([position[:3] for position in positions], np.float64).reshape(-1, 3)
    uv = np.array([(*c, "0")[:2] for c in coordinates], np.float64).reshape(-1, 2)
    colours = _vertex_colours(positions)
    materials: dict[str, Material] = {}
    for library in libraries:
        for file in _library_files(path, library):
            materials |= read_materials(file)
    table = np.array(corners, np.int64).reshape(-1, 2)
    if len(table) and (table.min() < -1 or (table.max(axis=0) >= (len(vertices), len(uv))).any()):
        raise InputError(f"{path}: its faces have vertices that are not in the file")
    surfaces = [
        _surface(
            path, name, materials.get(name or ""), np.array(faces), table, vertices, uv, colours
        )
        for name, faces in groups.items()
        if faces
    ]
    return assemble(path, surfaces, vertices)


def _lines(path: pathlib.Path) -> list[str]:
    """Lines without comments, continued ones joined."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    text = re.sub(r"\\[ \t]*(\r\n|\r|\n)", " ", text)
    lines = (line.strip() for line in re.split(r"\r\n|\r|\n", text))
    return [line for line in lines if line and line[0] != "#"]


def _corner(token: str, vertices: int, coordinates: int) -> tuple[int, int]:
    """Numbers from 0 of `a`, `a/b`, `a//c` or `a/b/c`; negative ones count back from the last so far."""
    vertex, texture = (*token.split("/"), "")[:2]
    return _number(vertex, vertices), _number(texture, coordinates) if texture else -1


def _number(token: str, count: int) -> int:
    number = int(token)
    if number == 0 or number < -count:
        raise ValueError(f"a face has number {number}")
    return number - 1 if number > 0 else count + number


def _vertex_colours(positions: list[list[str]]) -> np.ndarray | None:
    """(n, 3) linear colours written behind the positions, if every vertex has them."""
    if not positions or min(len(position) for position in positions) < 6:
        return None
    values = np.array([position[3:6] for position in positions], np.float64)
    if values.max() > 1.0:  # some write 0 to 255
        values = values / 255.0
    return shading.to_linear(values).astype(np.float32)


def _library_files(path: pathlib.Path, names: str) -> list[pathlib.Path]:
    """The files of a `mtllib` line: one, whose name may have spaces, or several."""
    try:
        return [companions.find(path, names)]
    except InputError:
        several = names.split()
        if len(several) == 1:
            raise
        return [companions.find(path, name) for name in several]


def read_materials(path: pathlib.Path) -> dict[str, Material]:
    """The materials of an MTL file by name."""
    materials: dict[str, Material] = {}
    current = Material()
    for line in _lines(path):
        key, rest = (*line.split(None, 1), "")[:2]
        key = key.lower()
        if key == "newmtl":
            current = materials.setdefault(rest.strip(), Material())
        elif key == "kd" and not rest.startswith(("spectral", "xyz")):
            numbers = [float(value) for value in rest.split()]
            current.colour = tuple((numbers * 3)[:3]) if len(numbers) < 3 else tuple(numbers[:3])
        elif key in ("map_kd", "map_ka"):
            current.maps[key] = rest
    return materials


def _surface(
    path: pathlib.Path,
    name: str | None,
    material: Material | None,
    faces: np.ndarray,
    corners: np.ndarray,
    vertices: np.ndarray,
    uv: np.ndarray,
    colours: np.ndarray | None,
) -> Surface:
    """faces: (3m,) rows of `corners` (n, 2). colours: of all vertices of the file."""
    used, faces = np.unique(faces, return_inverse=True)
    places, texture = corners[used].T
    image = None if material is None else material.maps.get("map_kd", material.maps.get("map_ka"))
    if image is None:
        if colours is not None:
            look = Look(colours[places])
        elif material is not None and material.colour is not None:
            look = Look(np.tile(np.float32(material.colour), (len(places), 1)))
        else:
            which = f"its material {name!r}" if name is not None else "it"
            raise InputError(f"{path}: {which} has neither a texture nor colours of its vertices")
    else:
        if texture.min() < 0:
            raise InputError(f"{path}: faces of material {name!r} have no texture coordinates")
        file, scale, offset, wrap = _texture_line(path, image)
        pixels = np.asarray(read_texture(path, file).convert("RGB"))
        white = np.ones((len(places), 3), np.float32)
        look = Look(white, pixels, uv[texture] * scale + offset, (wrap, wrap))
    return Surface(vertices[places], faces.reshape(-1, 3), look)


def _texture_line(
    path: pathlib.Path, arguments: str
) -> tuple[pathlib.Path, np.ndarray, np.ndarray, str]:
    """(file, scale of uv, offset of uv, wrap) of a line `map_Kd [options] name`."""
    values: dict[str, list[str]] = {}
    rest = arguments.strip()
    while (option := rest.split(" ", 1)[0].lower()) in _OPTIONS.keys() | _WORDS:
        rest = rest[len(option) :].strip()
        values[option] = []
        for _ in range(1 if option in _WORDS else _OPTIONS[option]):
            value, _, after = rest.partition(" ")
            if not after or (option in _OPTIONS and not _is_number(value)):
                break
            values[option].append(value)
            rest = after.strip()
    if [float(v) for v in values.get("-mm", [])] not in ([], [0.0], [0.0, 1.0]):
        raise InputError(f"{path}: -mm of its texture changes colours; bake it into the image")
    return (
        companions.find(path, rest),
        np.array([float(v) for v in (*values.get("-s", []), "1", "1")[:2]]),
        np.array([float(v) for v in (*values.get("-o", []), "0", "0")[:2]]),
        "clamp" if values.get("-clamp") == ["on"] else "repeat",
    )


def _is_number(token: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", token) is not None
