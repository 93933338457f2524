"""The chunks of a .glb and the arrays of its attributes, read by glTF 2.0's text."""

import json
import struct

import numpy as np

COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
TYPES = {5121: "u1", 5123: "<u2", 5125: "<u4", 5126: "<f4"}


def chunks(content: bytes) -> tuple[dict, bytes]:
    """JSON and binary, whose lengths and marks are checked (section 4.4)."""
    magic, version, length = struct.unpack_from("<4sII", content)
    assert (magic, version, length) == (b"glTF", 2, len(content))
    json_length, json_mark = struct.unpack_from("<I4s", content, 12)
    start = 20 + json_length
    binary_length, binary_mark = struct.unpack_from("<I4s", content, start)
    assert (json_mark, binary_mark) == (b"JSON", b"BIN\0")
    assert json_length % 4 == binary_length % 4 == 0
    assert start + 8 + binary_length == len(content)
    return json.loads(content[20:start]), content[start + 8 :]


def attributes(content: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """The only primitive, and name -> (n,) or (n, k) values of its attributes, whose bounds are checked."""
    tree, binary = chunks(content)
    (primitive,) = (p for m in tree["meshes"] for p in m["primitives"])
    found = {}
    for name, index in primitive["attributes"].items():
        accessor = tree["accessors"][index]
        view = tree["bufferViews"][accessor["bufferView"]]
        start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
        assert start % 4 == 0 and "byteStride" not in view
        columns, dtype = COLUMNS[accessor["type"]], np.dtype(TYPES[accessor["componentType"]])
        assert accessor["count"] * columns * dtype.itemsize <= view["byteLength"]
        values = np.frombuffer(binary, dtype, accessor["count"] * columns, start)
        values = values.reshape(-1, columns) if columns > 1 else values
        if "min" in accessor:
            np.testing.assert_allclose(values.min(0), np.ravel(accessor["min"]), rtol=1e-6)
            np.testing.assert_allclose(values.max(0), np.ravel(accessor["max"]), rtol=1e-6)
        found[name] = values
    return primitive, found
