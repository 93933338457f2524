"""Untrusted JSON, checked against a schema: `read(path, record({"yaw": number(-360, 360)}))`.

Files must be regular and small, numbers finite, nesting shallow. A kind is a function (value, where) -> value
that raises ValueError naming the place and the reason.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from spinmeround_jax import files

MAX_BYTES = 64 << 20  # 2,000 views with matrices take 2 MiB
MAX_DEPTH = 32
_SHOWN = 60  # characters of a wrong value

Kind = Callable[[Any, str], Any]


def read(path: str | os.PathLike[str], kind: Kind, max_bytes: int = MAX_BYTES) -> Any:
    """The content of a JSON file (UTF-8, with or without byte order mark), as `kind` returns it.

    Raises:
        OSError: the file cannot be read, is no regular file, or is larger than `max_bytes`.
        ValueError: not JSON, or not of this kind; the message begins with the path.
    """
    path = files.as_path(path)
    return parse(files.read_bytes(path, max_bytes), kind, str(path))


def parse(content: bytes, kind: Kind, where: str) -> Any:
    """As `read`, of the bytes of a file named `where`."""
    try:
        value = json.loads(
            content.decode("utf-8-sig"), parse_float=_finite, parse_int=_integer, parse_constant=_finite
        )  # fmt: skip
        _check_depth(value)
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: not usable JSON ({reason})") from error
    try:
        return kind(value, "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:_SHOWN]} is not a finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > 20:  # beyond 64 bits; Python would take thousands of digits
        raise ValueError(f"{text[:_SHOWN]} is too large a number")
    return int(text)


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The entries in which JSON objects differ, as "name.of.entry: there -> here"."""
    before, after = _flat(there), _flat(json.loads(json.dumps(here)))
    missing = object()
    return [
        f"{name}: {_shown(before.get(name))} -> {_shown(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, missing) != after.get(name, missing)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


# --------------------------------------------------------------------------------------------------
# Kinds


def anything(value: Any, where: str) -> Any:
    return value


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    """A finite float from `low` to `high`; integers become floats, true and false are refused."""

    def check(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(where, "a number", value)
        if not (math.isfinite(value) and low <= value <= high):
            raise _wrong(where, f"a finite number{_range(low, high)}", value)
        return float(value)

    return check


def integer(low: float = -(2**63), high: float = 2**63 - 1) -> Kind:
    def check(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _wrong(where, f"an integer{_range(low, high)}", value)
        return value

    return check


def text(pattern: str = "[^\0]*", longest: int = 4096) -> Kind:
    """A string that `pattern` matches completely; NUL and lone surrogates are refused."""
    compiled = re.compile(pattern, re.DOTALL)

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise _wrong(where, f"a string of at most {longest} characters", value)
        if re.search("[\0\ud800-\udfff]", value) or not compiled.fullmatch(value):
            raise _wrong(where, f"a string like {pattern}", value)
        return value

    return check


def boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)
    return value


def one_of(*values: Any) -> Kind:
    """One of these strings, numbers, booleans or None; 1 is not true."""

    def check(value: Any, where: str) -> Any:
        if not any(type(value) is type(known) and value == known for known in values):
            raise _wrong(where, f"one of {', '.join(map(repr, values))}", value)
        return value

    return check


def nullable(kind: Kind) -> Kind:
    """`kind`, or null."""
    return lambda value, where: None if value is None else kind(value, where)


def array(kind: Kind, shortest: int = 0, longest: int = 1_000_000) -> Kind:
    """A list of `shortest` to `longest` values of one kind."""

    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or not shortest <= len(value) <= longest:
            size = str(shortest) if shortest == longest else f"{shortest} to {longest}"
            raise _wrong(where, f"a list of {size} values", value)
        return [kind(item, f"{where}[{i}]") for i, item in enumerate(value)]

    return check


def matrix(rows: int, columns: int) -> Kind:
    """A list of rows of finite numbers."""
    return array(array(number(), columns, columns), rows, rows)


def mapping(kind: Kind, longest: int = 100_000) -> Kind:
    """An object with any names and values of one kind."""

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > longest:
            raise _wrong(where, f"an object of at most {longest} entries", value)
        return {name: kind(item, _inside(where, name)) for name, item in value.items()}

    return check


def record(
    required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None, closed: bool = False
) -> Kind:
    """An object with named entries. Other entries are kept unchecked, or refused if `closed`."""
    kinds = {**required, **(optional or {})}

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        if missing := [name for name in required if name not in value]:
            raise ValueError(f"{_prefix(where)}{', '.join(map(repr, missing))} missing")
        if closed and (unknown := [name for name in value if name not in kinds]):
            raise ValueError(f"{_prefix(where)}unknown {', '.join(map(_shown, unknown[:5]))}")
        return {
            name: kinds[name](item, _inside(where, name)) if name in kinds else item
            for name, item in value.items()
        }

    return check


def _inside(where: str, name: str) -> str:
    return f"{where}.{name[:_SHOWN]}" if where else name[:_SHOWN]


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""


def _range(low: float, high: float) -> str:
    lower = "" if low in (-math.inf, -(2**63)) else f" from {low:g}"
    return lower + ("" if high in (math.inf, 2**63 - 1) else f" to {high:g}")


def _shown(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else reprlib.repr(value)  # shortens large values
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _wrong(where: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{_prefix(where)}expected {expected}, got {_shown(value)}")
