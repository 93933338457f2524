"""Files of named tensors, opened without running anything that stands in them.

The one module that knows PyTorch and safetensors; both are imported when a file needs them.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from spinmeround_jax.files import InputError

SUFFIXES = (".ckpt", ".safetensors", ".bin", ".pt", ".pth")

# Entries of a Lightning checkpoint beside its "state_dict", which say how to go on training.
LIGHTNING_ENTRIES = frozenset(
    {
        "callbacks", "datamodule_hparams_name", "datamodule_hyper_parameters", "epoch",
        "global_step", "hparams_name", "hparams_type", "hyper_parameters", "loops", "lr_schedulers",
        "MixedPrecision", "native_amp_scaling_state", "optimizer_states",
        "pytorch-lightning_version", "state",
    }
)  # fmt: skip

_HASH_BLOCK = 2**22  # bytes


@dataclasses.dataclass
class TensorFile:
    """An open file; tensors are read one by one.

    Attributes:
        shapes, dtypes: by name; dtypes are numpy's ("float32") or "bfloat16".
        bookkeeping: entries of a Lightning checkpoint that are no weights.
        objects: entries that are no tensors.
    """

    path: pathlib.Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    bookkeeping: list[str]
    objects: list[str]
    _get: Callable[[str], np.ndarray]

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own layout; bfloat16 comes as float32, which holds it exactly."""
        try:
            return self._get(name)
        except Exception as error:  # torch, safetensors and numpy each have their own
            raise InputError(f"{self.path}: {name} cannot be read ({error})") from error


def open_file(path: pathlib.Path) -> TensorFile:
    """Open a .safetensors file, or what torch.save wrote (.ckpt, .bin, .pt, .pth).

    Raises:
        InputError: not such a file, damaged, unsafe, or a package is missing.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    if not path.stat().st_size:
        raise InputError(f"{path}: empty, get the file again")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def _missing(package: str, path: pathlib.Path) -> InputError:
    return InputError(
        f"{path}: reading it needs {package}; run: pip install 'spinmeround_jax[convert]'"
    )


# --------------------------------------------------------------------------------------------------
# safetensors


_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _open_safetensors(path: pathlib.Path) -> TensorFile:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise _missing("safetensors", path) from error
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or not safetensors, get it again ({error})") from error
    slices = {name: file.get_slice(name) for name in file.keys()}
    types = {name: part.get_dtype() for name, part in slices.items()}
    return TensorFile(
        path=path,
        shapes={name: tuple(part.get_shape()) for name, part in slices.items()},
        dtypes={name: _SAFETENSORS_DTYPES.get(kind, kind) for name, kind in types.items()},
        bookkeeping=[],
        objects=[],
        # numpy knows bfloat16 by name since JAX has imported ml_dtypes.
        _get=lambda name: _no_bfloat16(file.get_tensor(name)),
    )


def _no_bfloat16(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float32) if tensor.dtype.name == "bfloat16" else tensor


# --------------------------------------------------------------------------------------------------
# PyTorch


class _Inert:
    """Stands for a class or function in a pickle that weights_only does not know.

    Lightning stores callbacks, hyperparameters and numpy scalars beside the weights. Called or
    filled, this does nothing and keeps nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertMapping:
    """As `_Inert`, for classes that may be filled like a dict, which the reader checks by type."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict:
        return OrderedDict()


def _stand_in(name: str) -> tuple[type, str]:
    return (_Inert if name.startswith("numpy") else _InertMapping), name


def _open_torch(path: pathlib.Path) -> TensorFile:
    try:
        import torch
    except ImportError as error:
        raise _missing("torch", path) from error
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # since PyTorch 1.6; older files cannot be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols: the reader decides
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
            with torch.serialization.safe_globals([_stand_in(name) for name in unknown]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: damaged, or it holds objects that cannot be read without running their code. "
            "If you trust the file, write its weights alone in PyTorch: torch.save({'state_dict': "
            "torch.load(OLD, weights_only=False)['state_dict']}, NEW). "
            f"({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # zip, pickle and storage readers each have their own
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{path}: damaged or no PyTorch file, get it again ({reason})") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected named tensors")
    bookkeeping: list[str] = []
    if isinstance(content.get("state_dict"), Mapping):
        rest = {name: value for name, value in content.items() if name != "state_dict"}
        bookkeeping = sorted(LIGHTNING_ENTRIES & rest.keys())
        # Whatever else holds tensors is for the tables to know, or to refuse.
        rest = {name: value for name, value in rest.items() if name not in bookkeeping}
        entries = [*_entries(content["state_dict"]), *_entries(rest)]
    else:
        entries = list(_entries(content))
    names = [name for name, _ in entries]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path}: {', '.join(twice)} stands there twice")
    tensors = {name: value for name, value in entries if isinstance(value, torch.Tensor)}

    def get(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return TensorFile(
        path=path,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
        bookkeeping=bookkeeping,
        objects=sorted(name for name, value in entries if name not in tensors),
        _get=get,
    )


def _entries(content: Any, prefix: str = "", depth: int = 9) -> Iterator[tuple[str, Any]]:
    """What stands in nested mappings and sequences, with the way there as its name, "a.b.0".

    Nothing known goes as deep as `depth`, but a list that holds itself would.
    """
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for name, value in items:
        if depth and isinstance(value, (Mapping, list, tuple)):
            yield from _entries(value, f"{prefix}{name}.", depth - 1)
        else:
            yield f"{prefix}{name}", value
