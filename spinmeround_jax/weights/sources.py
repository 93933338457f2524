"""Files of named tensors, opened without running anything that stands in them.

The one module that knows PyTorch and safetensors; both are imported when a file needs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import pickle
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from spinmeround_jax import schema
from spinmeround_jax.files import InputError

SUFFIXES = (".ckpt", ".safetensors", ".bin", ".pt", ".pth")
INDEX_SUFFIX = ".index.json"  # of what is split over several files, as Hugging Face's libraries do

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
        shards: files that hold the tensors, where `path` is their index.
        metadata: text that a safetensors file holds besides.
    """

    path: pathlib.Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    bookkeeping: list[str]
    objects: list[str]
    _get: Callable[[str], np.ndarray]
    shards: tuple[pathlib.Path, ...] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self, name: str) -> np.ndarray:
        """The tensor in its own layout; bfloat16 comes as float32, which holds it exactly."""
        try:
            return self._get(name)
        except Exception as error:  # torch, safetensors and numpy each have their own
            raise InputError(f"{self.path}: {name} cannot be read ({error})") from error


def open_file(path: pathlib.Path) -> TensorFile:
    """Open safetensors, or what torch.save wrote, whatever the suffix says; or the index of several such.

    Raises:
        InputError: not such a file, damaged, unsafe, or a package is missing.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: expected a file ending in {', '.join((*SUFFIXES, INDEX_SUFFIX))}"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if what := _not_weights(head):
        raise InputError(f"{path}: {what}")
    if _is_safetensors(head, size):
        return _open_safetensors(path)
    # A zip file since PyTorch 1.6; a tar file, or pickles one after the other, before.
    if head.startswith((b"PK\x03\x04", b"\x80")) or head[257:262] == b"ustar":
        return _open_torch(path, is_zip=head.startswith(b"PK"))
    expected = "safetensors" if path.suffix == ".safetensors" else "a PyTorch file"
    raise InputError(f"{path}: not {expected}, or damaged at its beginning; get it again")


def _not_weights(head: bytes) -> str | None:
    """What a file is that begins like this, if it is something often found in the place of weights."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "empty, get the file again"
    if text.startswith(b"version https://git-lfs"):
        return (
            "a Git LFS pointer that stands for the weights; get them with `git lfs pull` in its "
            "repository, or download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return (
            "a web page saved in the place of the weights; open it in a browser to see why (a login, "
            "a licence to agree to, a wrong link), and download the file itself"
        )
    if text.startswith((b"{", b"[")):
        return "JSON text, no weights; get the file itself"
    if head.startswith(
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
    ):
        return "compressed; unpack it and give the file that was in it"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file (Keras), which is not read here; get the weights as .safetensors"
    if head.startswith(b"GGUF"):
        return "a GGUF file, of rounded weights; get the original ones as .safetensors"
    if not head.strip(b"\0"):
        return "begins with nothing but zeros: its download or copy was cut off; get it again"
    return None


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins with the length of a JSON header, and the header."""
    return 8 + int.from_bytes(head[:8], "little") <= size and head[8:9] == b"{"


def _open_shards(path: pathlib.Path) -> TensorFile:
    try:
        where = schema.read(path, _INDEX)["weight_map"]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not an index of weights ({error})") from error
    try:
        shards = {name: open_file(path.with_name(name)) for name in sorted(set(where.values()))}
    except InputError as error:
        raise InputError(f"{error} (it is named in {path.name})") from error
    for name, shard in where.items():
        if name not in shards[shard].shapes:
            raise InputError(
                f"{shards[shard].path}: {name} is not in it, though {path.name} says so"
            )
    # What the index does not name is to be refused or left out like all else.
    holders = {name: shard for shard in shards.values() for name in shard.shapes}
    holders |= {name: shards[shard] for name, shard in where.items()}
    return TensorFile(
        path=path,
        shapes={name: shard.shapes[name] for name, shard in holders.items()},
        dtypes={name: shard.dtypes[name] for name, shard in holders.items()},
        bookkeeping=sorted({name for shard in shards.values() for name in shard.bookkeeping}),
        objects=[name for shard in shards.values() for name in shard.objects],
        _get=lambda name: holders[name].read(name),
        shards=tuple(shard.path for shard in shards.values()),
    )


_FILE_NAME = schema.text(r"(?!\.{1,2}$)[^/\\]+", longest=255)  # stays in this folder
_INDEX = schema.record({"weight_map": schema.mapping(_FILE_NAME)})


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
        metadata=file.metadata() or {},
    )


def saver() -> Callable[[dict[str, np.ndarray], pathlib.Path, dict[str, str]], None]:
    """Writes named tensors and metadata to a safetensors file; InputError if the package is missing."""
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise InputError("writing .safetensors needs a package: pip install safetensors") from error
    return save_file


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


def _open_torch(path: pathlib.Path, is_zip: bool) -> TensorFile:
    try:
        import torch
    except ImportError as error:
        raise _missing("torch", path) from error
    # Files before PyTorch 1.6 cannot be mapped, and by a suffix of safetensors PyTorch is misled.
    mapped = is_zip and path.suffix != ".safetensors"
    try:
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols: the reader decides
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
            with torch.serialization.safe_globals([_stand_in(name) for name in unknown]):
                file = path if mapped else stack.enter_context(path.open("rb"))
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: damaged, or a pickle of more than tensors, which could only be read by running "
            "code that stands in it. Get the weights as .safetensors, or have the one who made the "
            f"file write them alone: torch.save(model.state_dict(), NEW) ({_first_line(error)})"
        ) from error
    except Exception as error:  # zip, pickle and storage readers each have their own
        raise InputError(
            f"{path}: damaged or no PyTorch file, get it again ({_first_line(error)})"
        ) from error
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


def _first_line(error: Exception) -> str:
    """Of PyTorch's advice, which goes on to turn off its safeguards."""
    reason = (str(error) or repr(error)).splitlines()[0]
    return reason.split(" (1)")[0].split("weights_only")[0].strip(" `,")


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
