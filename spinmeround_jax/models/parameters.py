"""Networks as flat dictionaries, {"down/0/blocks/0/conv_1/kernel": array}: what is trained and stored.

Optax, shardings and checkpoints see named arrays, errors can name them, and the network is put together inside
the jitted step (functional NNX).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

Parameters = dict[str, jax.Array]


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Parameters]:
    """The structure of a network and its parameters by name; `nnx.eval_shape` networks work too.

    Raises:
        ValueError: naming a variable that is not a parameter (random state, running statistics).
    """
    graphdef, state = nnx.split(module)
    parameters = {}
    for path, variable in nnx.to_flat_state(state):
        if not isinstance(variable, nnx.Param):
            raise ValueError(
                f"{_name(path)} is a {type(variable).__name__}, expected parameters only"
            )
        parameters[_name(path)] = variable.get_value()
    return graphdef, parameters


def merge(graphdef: nnx.GraphDef, parameters: Mapping[str, jax.Array]) -> nnx.Module:
    """The inverse of `split`."""
    variables = [(_path(name), nnx.Param(value)) for name, value in parameters.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(variables))


def mismatches(expected: Mapping[str, jax.Array], found: Mapping[str, jax.Array]) -> list[str]:
    """Messages about the differences in names and shapes; none if `found` fits `expected`."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    problems = [f"missing {_listed(missing)}"] if missing else []
    problems += [f"left over {_listed(extra)}"] if extra else []
    return problems + ([_listed(shapes)] if shapes else [])


def count(parameters: Mapping[str, jax.Array]) -> int:
    """Number of scalars."""
    return sum(value.size for value in parameters.values())


def _listed(items: list[str], limit: int = 5) -> str:
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _name(path: tuple[str | int, ...]) -> str:
    return "/".join(map(str, path))


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("/"))
