"""The head part of the MakeHuman mesh: topology, subdivision, masks, and its morph targets.

Everything here is the same for all people; a person is a weighted sum of the morph targets.
Units: decimetres in MakeHuman's frame (x person's left, y up, z forward).
"""

import dataclasses
import functools

import numpy as np
import scipy.sparse as sp

from data_prep.parametric import assets

CUT_HEIGHT = 3.8  # faces above this y of the neutral base mesh are kept: the upper arms
_PARTS = {"skin": "body", "left_eye": "helper-l-eye", "right_eye": "helper-r-eye"}
MORPH_FOLDERS = (
    "cheek", "chin", "ears", "eyebrows", "eyes", "forehead", "head", "mouth", "neck", "nose",
    "asym",
)  # fmt: skip
_SKIPPED = ("asymm-", "head-trans", "head-angle", "neck-trans", "-shape-pointed")


@dataclasses.dataclass(frozen=True)
class Part:
    """A subdivided piece of the template.

    stencil: (m, n) sparse, rows give subdivided vertices as averages of the `n` base vertices.
    faces: (f, 3) triangles over the m vertices.  rest: (m, 3) neutral positions.
    masks: name -> (m,) float32 in [0, 1].
    """

    stencil: sp.csr_matrix
    faces: np.ndarray
    rest: np.ndarray
    masks: dict[str, np.ndarray]


@functools.lru_cache(maxsize=1)
def _kept() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Part name -> kept faces (boolean), and the sorted base vertex numbers in use."""
    mesh = assets.base_mesh()
    keep, used = {}, []
    for part, group in _PARTS.items():
        quads = mesh.quads[group]
        keep[part] = mesh.vertices[quads, 1].min(axis=1) > CUT_HEIGHT
        used.append(np.unique(quads[keep[part]]))
    used += [np.unique(mesh.quads[f"helper-{s}-eyelashes-{k}"]) for s in "lr" for k in (1, 2)]
    return keep, np.unique(np.concatenate(used))


def vertex_numbers() -> np.ndarray:
    """(n,) base.obj numbers of the vertices kept for heads; morphs are stored in this order."""
    return _kept()[1]


def rest_vertices() -> np.ndarray:
    """(n, 3) neutral positions, decimetres."""
    return assets.base_mesh().vertices[vertex_numbers()]


def local_quads(group: str) -> np.ndarray:
    """(q, 4) quads of a whole base.obj group, renumbered to the kept vertices."""
    return np.searchsorted(vertex_numbers(), assets.base_mesh().quads[group])


@functools.lru_cache(maxsize=16)
def part(name: str, level: int) -> Part:
    """Part `name` ('skin', 'left_eye', 'right_eye') after `level` Catmull-Clark steps."""
    mesh = assets.base_mesh()
    keep, numbers = _kept()
    quads = np.searchsorted(numbers, mesh.quads[_PARTS[name]][keep[name]])
    uv = mesh.uv[_PARTS[name]][keep[name]]
    used, quads = np.unique(quads, return_inverse=True)
    quads = quads.reshape(-1, 4)
    stencil = sp.csr_matrix(
        (np.ones(len(used)), (np.arange(len(used)), used)), shape=(len(used), len(numbers))
    )
    for _ in range(level):
        step, quads, uv = catmull_clark(quads, uv, stencil.shape[0])
        stencil = (step @ stencil).tocsr()
    masks = {}
    if name == "skin":
        vertex_uv = np.zeros((stencil.shape[0], 2))
        vertex_uv[quads.reshape(-1)] = uv.reshape(-1, 2)
        for mask in ("lips", "ears", "eyelids", "face", "inside-mouth"):
            masks[mask] = assets.sample_mask(mask, vertex_uv)
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    return Part(stencil, faces, stencil @ rest_vertices(), masks)


def refine_skin(values: np.ndarray, count: int) -> np.ndarray:
    """Values (n,) at the skin's unsubdivided vertices -> (count,) at the level with `count`."""
    level = next(k for k in range(4) if part("skin", k).stencil.shape[0] == count)
    used = part("skin", 0).stencil.indices
    return part("skin", level).stencil[:, used] @ values


def catmull_clark(quads: np.ndarray, uv: np.ndarray, count: int):
    """One Catmull-Clark step (1978) on a quad mesh with boundary.

    quads (q, 4) over `count` vertices, uv (q, 4, 2) per corner (subdivided bilinearly).
    Returns stencil (count + edges + q, count) sparse, quads (4 q, 4), uv (4 q, 4, 2).
    New vertices: the old ones moved, then one per edge, then one per face.
    """
    q = len(quads)
    following = np.roll(quads, -1, axis=1)
    ends = np.sort(np.stack([quads, following], -1).reshape(-1, 2), axis=1)
    edges, edge_of = np.unique(ends, axis=0, return_inverse=True)
    edge_of = edge_of.reshape(q, 4)
    e = len(edges)
    face_of = np.repeat(np.arange(q), 4)
    ones = np.ones(4 * q)
    face_points = sp.csr_matrix((ones / 4, (face_of, quads.reshape(-1))), shape=(q, count))
    touching = sp.csr_matrix((ones, (edge_of.reshape(-1), face_of)), shape=(e, q))
    inner = np.asarray(touching.sum(1)).ravel() == 2
    middles = sp.csr_matrix(
        (np.full(2 * e, 0.5), (np.repeat(np.arange(e), 2), edges.reshape(-1))), shape=(e, count)
    )
    edge_points = sp.diags(np.where(inner, 0.5, 1.0)) @ middles
    edge_points = edge_points + sp.diags(np.where(inner, 0.25, 0.0)) @ touching @ face_points

    around = sp.csr_matrix((ones, (quads.reshape(-1), face_of)), shape=(count, q))
    incident = sp.csr_matrix(
        (np.ones(2 * e), (edges.reshape(-1), np.repeat(np.arange(e), 2))), shape=(count, e)
    )
    valence = np.maximum(np.asarray(around.sum(1)).ravel(), 1)
    edge_valence = np.maximum(np.asarray(incident.sum(1)).ravel(), 1)
    on_border = np.asarray(incident @ (~inner).astype(float)).ravel() > 0
    smooth = sp.diags(1 / valence**2) @ around @ face_points
    smooth = smooth + sp.diags(2 / (valence * edge_valence)) @ incident @ middles
    smooth = smooth + sp.diags((valence - 3) / valence)
    border = sp.diags(np.full(count, 0.5)) + 0.25 * incident @ sp.diags((~inner) * 1.0) @ middles
    moved = sp.diags((~on_border) * 1.0) @ smooth + sp.diags(on_border * 1.0) @ border

    centre = count + e + np.arange(q)[:, None].repeat(4, 1)
    edge_ids = count + edge_of
    new_quads = np.stack([quads, edge_ids, centre, np.roll(edge_ids, 1, axis=1)], -1)
    uv_next = (uv + np.roll(uv, -1, axis=1)) / 2
    uv_centre = np.broadcast_to(uv.mean(1, keepdims=True), uv.shape)
    new_uv = np.stack([uv, uv_next, uv_centre, np.roll(uv_next, 1, axis=1)], 2)
    stencil = sp.vstack([moved, edge_points, face_points]).tocsr()
    return stencil, new_quads.reshape(-1, 4), new_uv.reshape(-1, 4, 2)


def _dense(name: str) -> np.ndarray:
    """Morph target as (n, 3) float32 offsets of the kept vertices."""
    numbers = vertex_numbers()
    indices, offsets = assets.read_target(name)
    place = np.clip(np.searchsorted(numbers, indices), 0, len(numbers) - 1)
    inside = numbers[place] == indices
    morph = np.zeros((len(numbers), 3), np.float32)
    morph[place[inside]] = offsets[inside]
    return morph


@functools.lru_cache(maxsize=1)
def facial_morphs() -> tuple[tuple[str, ...], np.ndarray]:
    """Names and (k, n, 3) float32 offsets of the detail morphs, one row per *axis*.

    Opposite targets ('nose-hump-decr', 'nose-hump-incr') are two separate rows; left and right
    targets are merged into one symmetric row, named without side; `asym` rows stay as they are.
    """
    rows: dict[str, np.ndarray] = {}
    for folder in MORPH_FOLDERS:
        for name in assets.target_names(folder):
            if name.startswith(_SKIPPED) or name.endswith(_SKIPPED):
                continue
            symmetric = name[2:] if name[:2] in ("l-", "r-") else name
            morph = _dense(f"{folder}/{name}")
            rows[symmetric] = rows[symmetric] + morph if symmetric in rows else morph
    return tuple(rows), np.stack(list(rows.values()))


@functools.cache
def macro_morph(name: str) -> np.ndarray:
    """(n, 3) float32 offsets of targets/macrodetails/`name`."""
    return _dense(f"macrodetails/{name}")


@functools.cache
def expression_morph(race: str, unit: str) -> np.ndarray:
    """(n, 3) float32 offsets of one expression unit, e.g. ('asian', 'mouth-corner-puller')."""
    return _dense(f"expression/units/{race}/{unit}")
