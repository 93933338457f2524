"""From a table of layer names to every one of our parameters, strict both ways.

A table is a sequence of `Row`s; `released.py` and `diffusers.py` hold the tables. Other formats are
PyTorch's: convolutions OIHW, linear layers OI.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from spinmeround_jax.models import parameters

Shape = tuple[int, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class Row(NamedTuple):
    """One of our layers and its name in another format.

    Attributes:
        ours, theirs: "down.0.blocks.1.conv_1", "input_blocks.2.0.in_layers.2".
        matrix: their weight is a matrix where ours is a 1x1 convolution.
        channels_in, channels_out: their number, where ours may be larger; the channels we have
            beyond theirs start at zero.
    """

    ours: str
    theirs: str
    matrix: bool = False
    channels_in: int | None = None
    channels_out: int | None = None


def below(ours: str, theirs: str, parts: Iterable[tuple[str, str]], **options) -> Iterator[Row]:
    """Rows of the layers inside a block."""
    for our_part, their_part in parts:
        yield Row(f"{ours}.{our_part}", f"{theirs}.{their_part}", **options)


@dataclasses.dataclass(frozen=True)
class Target:
    """One of our parameters and the tensor it comes from.

    Attributes:
        name, shape: ours, "conv_in/kernel" (as `parameters.split` has it) and (3, 3, 153, 320).
        source_shape: of the tensor, (320, 153, 3, 3).
        axes: the tensor's axes in our order, (2, 3, 1, 0).
    """

    name: str
    shape: Shape
    source_shape: Shape
    axes: tuple[int, ...]

    def value(self, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Our parameter; what the tensor does not reach (see `Row`) is zero."""
        ones = (1,) * (len(self.axes) - len(self.source_shape))
        moved = tensor.reshape(self.source_shape + ones).transpose(self.axes)
        value = np.zeros(self.shape, dtype)
        with np.errstate(over="ignore"):  # what overflows is infinite, and for the caller to see
            value[tuple(map(slice, moved.shape))] = moved
        return value

    def tensor(self, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The inverse of `value`; ValueError if the parameter has channels that the tensor lacks."""
        moved = value.transpose(np.argsort(self.axes)).reshape(self.source_shape)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(moved, dtype)


def targets(module: nnx.Module, rows: Iterable[Row], prefix: str = "") -> dict[str, Target]:
    """Name of the source tensor -> target, for every parameter of the (perhaps abstract) `module`.

    Rows of layers that `module` lacks are passed over, so a table need not know which residual
    blocks have a shortcut.
    """
    table = {row.ours: row for row in rows}
    found: dict[str, Target] = {}
    for name, parameter in parameters.split(module)[1].items():
        layer, leaf = name.rsplit("/", 1)
        row = table[layer.replace("/", ".")]
        source = f"{prefix}{row.theirs}.{_LEAVES[leaf]}"
        if source in found:
            raise ValueError(f"{source} is claimed by both {found[source].name} and {name}")
        found[source] = _target(name, leaf, tuple(parameter.shape), row)
    return found


def _target(name: str, leaf: str, shape: Shape, row: Row) -> Target:
    if leaf == "kernel":
        *window, channels_in, channels_out = shape
        channels = (row.channels_out or channels_out, row.channels_in or channels_in)
        source_shape = channels if row.matrix else (*channels, *window)
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}[len(shape)]
        return Target(name, shape, source_shape, axes)
    if leaf == "bias" and row.channels_out:
        return Target(name, shape, (row.channels_out,), (0,))
    return Target(name, shape, shape, tuple(range(len(shape))))


def source_shapes(expected: Mapping[str, Target]) -> dict[str, Shape]:
    return {name: target.source_shape for name, target in expected.items()}


def set_aside(names: Iterable[str], patterns: Iterable[str]) -> dict[str, list[str]]:
    """The names that each shell-style pattern matches, of those that match any."""
    found: dict[str, list[str]] = {}
    for name in names:
        for pattern in patterns:
            if fnmatch.fnmatchcase(name, pattern):
                found.setdefault(pattern, []).append(name)
                break
    return found


def check(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raises ValueError naming every tensor that is missing, unknown or of the wrong shape."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of the wrong shape": [
            f"{name} is {tuple(found[name])}, expected {shape}"
            for name, shape in expected.items()
            if tuple(found.get(name, shape)) != shape
        ],
    }
    if any(problems.values()):
        raise ValueError(
            "; ".join(_listed(kind, names) for kind, names in problems.items() if names)
        )


def _listed(kind: str, names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} {kind}: {', '.join(names[:limit])}{more}"
