"""The .ply files of 3D Gaussian splatting (Kerbl et al. 2023), which the usual viewers open.

One vertex per Gaussian, little-endian float32: x y z, nx ny nz (zero), f_dc_0..2, f_rest_0..44 (channel by
channel, zeros above the degree), opacity (logit), scale_0..2 (logarithms), rot_0..3 (w x y z). In the file y
is down, as viewers expect; memory and file differ by half a turn about z.
"""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import numpy as np

from spinmeround_jax.files import InputError, write_atomically
from spinmeround_jax.splats.gaussians import MAX_DEGREE, Gaussians, degree_of

_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2", "int32": "<i4"},
    **{"uint32": "<u4", "float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8"},
}
_MAX_HEADER = 64 * 1024  # bytes
MAX_GAUSSIANS = 10_000_000
# What the header says of the world. Files of other programs say nothing and are taken as y down.
_Y_DOWN = "comment y is down, x is the head's right, the face looks along z"
_Y_UP = "comment y is up"  # as this program wrote them before
REST = 3 * (
    (MAX_DEGREE + 1) ** 2 - 1
)  # readers that descend from 3DGS's own accept no other number
EXPECTED = "expected a .ply of 3D Gaussian splatting"


def _half_turn(gaussians: Gaussians, way: float) -> Gaussians:
    """The Gaussians turned by 180 degrees about z, exactly: signs change, nothing is rounded.

    A harmonic of order m takes the sign (-1)^m; within degree n the orders run from -n to n.

    Args:
        way: 1 or -1, the sign of the quaternions, so that there and back gives the same numbers.
    """
    orders = np.array([m for n in range(gaussians.degree + 1) for m in range(-n, n + 1)])
    w, x, y, z = jnp.moveaxis(gaussians.quaternions, -1, 0)
    return Gaussians(
        means=gaussians.means * jnp.array([-1.0, -1.0, 1.0]),
        log_scales=gaussians.log_scales,
        quaternions=way * jnp.stack([-z, -y, x, w], axis=-1),
        opacity_logits=gaussians.opacity_logits,
        sh=gaussians.sh * jnp.where(orders % 2, -1.0, 1.0)[:, None],
    )


def _properties(rest: int) -> list[str]:
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(rest)),
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
    ]


def write_ply(path: str | pathlib.Path, gaussians: Gaussians) -> None:
    """Write n Gaussians, y down and padded to degree 3; the file is whole or not there.

    Raises:
        ValueError: a value is not finite; nothing is written.
        OSError: the file cannot be written.
    """
    gaussians = _half_turn(gaussians, 1.0)
    sh = np.asarray(gaussians.sh, np.float32)
    n = len(sh)
    rest = np.zeros((n, 3, REST // 3), np.float32)
    rest[..., : sh.shape[1] - 1] = sh[:, 1:].transpose(0, 2, 1)
    columns = [
        np.asarray(gaussians.means, np.float32),
        np.zeros((n, 3), np.float32),
        sh[:, 0],
        rest.reshape(n, -1),
        np.asarray(gaussians.opacity_logits, np.float32)[:, None],
        np.asarray(gaussians.log_scales, np.float32),
        np.asarray(gaussians.quaternions, np.float32),
    ]
    table = np.concatenate(columns, axis=1)
    if not np.isfinite(table).all():
        raise ValueError(f"{path}: Gaussians hold values that are not finite; nothing written")
    header = ["ply", "format binary_little_endian 1.0", _Y_DOWN, f"element vertex {n}"]
    header += [f"property float {name}" for name in _properties(REST)] + ["end_header", ""]
    write_atomically(pathlib.Path(path), "\n".join(header).encode() + table.astype("<f4").tobytes())


def read_ply(path: str | pathlib.Path) -> Gaussians:
    """Read a 3DGS .ply of this program or another, into a world with y up.

    Further properties are passed over, harmonics above the highest degree that is not all zero dropped.

    Raises:
        InputError: naming the file, when it is not one or holds values that are not finite.
        OSError: the file cannot be read.
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        count, dtype, y_up = _read_header(file.read(_MAX_HEADER), path, file)
        size = path.stat().st_size - file.tell()
        if count * dtype.itemsize > size:
            raise InputError(
                f"{path}: holds {size} bytes of data, its header says {count} x {dtype.itemsize}; "
                "copy the file again"
            )
        table = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    names = set(dtype.names or ())
    rest = sum(name.startswith("f_rest_") for name in names)
    if rest % 3:
        raise InputError(f"{path}: {rest} f_rest_ properties; {EXPECTED}")
    try:
        degree_of(rest // 3 + 1)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if missing := [n for n in _properties(rest) if n not in names and n not in ("nx", "ny", "nz")]:
        raise InputError(f"{path}: no property {', '.join(missing)}; {EXPECTED}")

    def columns(*wanted: str) -> np.ndarray:
        values = np.stack([table[name].astype(np.float32) for name in wanted], axis=-1)
        if not np.isfinite(values).all():
            raise InputError(f"{path}: {wanted[0]}... hold values that are not finite")
        return values

    sh = columns(*(f"f_dc_{i}" for i in range(3)))[:, None]
    if rest:
        others = columns(*(f"f_rest_{i}" for i in range(rest)))
        sh = np.concatenate([sh, others.reshape(count, 3, -1).transpose(0, 2, 1)], axis=1)
        while sh.shape[1] > 1 and not sh[:, degree_of(sh.shape[1]) ** 2 :].any():
            sh = sh[:, : degree_of(sh.shape[1]) ** 2]
    gaussians = Gaussians(
        means=jnp.asarray(columns("x", "y", "z")),
        log_scales=jnp.asarray(columns(*(f"scale_{i}" for i in range(3)))),
        quaternions=jnp.asarray(columns(*(f"rot_{i}" for i in range(4)))),
        opacity_logits=jnp.asarray(columns("opacity")[:, 0]),
        sh=jnp.asarray(sh),
    )
    return gaussians if y_up else _half_turn(gaussians, -1.0)


def _read_header(start: bytes, path: pathlib.Path, file) -> tuple[int, np.dtype, bool]:
    """Number and layout of the vertices, whether y is up; leaves `file` at the first vertex."""
    head, found, _ = start.partition(b"end_header\n")
    lines = head.decode("ascii", "replace").split("\n")
    if not found or lines[0].strip() != "ply":
        raise InputError(f"{path}: no .ply header; {EXPECTED}")
    if "format binary_little_endian 1.0" not in (line.strip() for line in lines):
        raise InputError(f"{path}: not binary_little_endian; {EXPECTED}")
    count, fields, elements = 0, [], []
    for words in (line.split() for line in lines):
        if len(words) == 3 and words[0] == "element":
            elements.append(words[1])
            if elements == ["vertex"]:
                if not words[2].isdecimal() or not 0 < int(words[2]) <= MAX_GAUSSIANS:
                    raise InputError(
                        f"{path}: {words[2]} vertices; this reads 1 to {MAX_GAUSSIANS} Gaussians"
                    )
                count = int(words[2])
        elif words and words[0] == "property" and elements == ["vertex"]:
            if len(words) != 3 or words[1] not in _TYPES:
                raise InputError(f"{path}: {' '.join(words)!r} in its header; {EXPECTED}")
            fields.append((words[2], _TYPES[words[1]]))
    if not count or elements[0] != "vertex":
        raise InputError(f"{path}: does not begin with vertices; {EXPECTED}")
    if len({name for name, _ in fields}) != len(fields):
        raise InputError(f"{path}: names a property twice; {EXPECTED}")
    file.seek(len(head) + len(found))
    return count, np.dtype(fields), _Y_UP in (line.strip() for line in lines)
