"""JSON of strangers: what fits comes back, everything else is one line that names file and place."""

import json
import math
import os

import pytest

from spinmeround_jax import schema

VIEW = schema.record({"yaw": schema.number(-360, 360)}, {"file": schema.text(longest=20)})


def written(folder, content):
    path = folder / "views.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_what_fits_comes_back(tmp_path):
    given = [{"yaw": 45, "file": "ä.png", "more": None}, {"yaw": -1.5}]
    for content in (json.dumps(given).encode(), b"\xef\xbb\xbf" + json.dumps(given).encode()):
        found = schema.read(written(tmp_path, content), schema.array(VIEW, 1))
        assert found == given and isinstance(found[0]["yaw"], float)
    assert schema.read(written(tmp_path, [[1, 2], [3, 4]]), schema.matrix(2, 2)) == [[1, 2], [3, 4]]
    assert schema.read(written(tmp_path, {"a": None}), schema.mapping(schema.nullable(VIEW)))


@pytest.mark.parametrize(
    "content, where",
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'[{"yaw": NaN}]', "finite"),
        (b'[{"yaw": -Infinity}]', "finite"),
        (b'[{"yaw": 1e999}]', "finite"),
        (b'[{"yaw": %s}]' % (b"1" * 400), "large"),
        (b"[" * 100_000 + b"]" * 100_000, "deep"),
        (b"[" * 40 + b"]" * 40, "deep"),
        (b'{"yaw": 1}', "a list"),
        (b"[]", "a list"),
        (b"[1]", "[0]: expected an object"),
        (b"[{}]", "'yaw' missing"),
        (b'[{"yaw": true}]', "[0].yaw"),
        (b'[{"yaw": "1"}]', "[0].yaw"),
        (b'[{"yaw": 1}, {"yaw": 361}]', "[1].yaw"),
        (b'[{"yaw": 1, "file": "a\\u0000b"}]', "[0].file"),
        (b'[{"yaw": 1, "file": "\\ud800"}]', "[0].file"),
        (b'[{"yaw": 1, "file": "%s"}]' % (b"x" * 30), "[0].file"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, content, where):
    path = written(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        schema.read(path, schema.array(VIEW, 1))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and where in message
    assert len(message) < len(str(path)) + 200 and message.isascii()


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (schema.number(), 1.5, "1.5"),
        (schema.number(0), 0, -1e-9),
        (schema.integer(1, 4), 4, 5),
        (schema.integer(), 7, 7.0),
        (schema.integer(), 0, False),
        (schema.boolean, True, 1),
        (schema.one_of("world", "camera"), "camera", "World"),
        (schema.one_of(1, None), None, True),
        (schema.text("[0-9a-f]{4}"), "00ff", "00ff0"),
        (schema.array(schema.number(), 3, 3), [1, 2, 3], [1, 2]),
        (schema.matrix(2, 3), [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5]]),
        (schema.mapping(schema.number()), {"a": 1}, {"a": "b"}),
        (schema.record({}, {"a": schema.number()}, closed=True), {"a": 1}, {"b": 1}),
        (schema.nullable(schema.number()), None, "x"),
    ],
)
def test_kinds(kind, good, bad):
    assert kind(good, "") == good
    with pytest.raises(ValueError, match=r"expected|unknown"):
        kind(bad, "")


def test_numbers_made_elsewhere_are_checked_too():
    with pytest.raises(ValueError, match="finite"):
        schema.number()(math.nan, "sigma")


def test_only_regular_files_of_limited_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "large.json").write_bytes(b" " * 2000)
    for name in ("pipe", "zero", "loop", "folder", "large", "none"):
        with pytest.raises(OSError, match=name):
            schema.read(tmp_path / f"{name}.json", schema.anything, max_bytes=1000)
