"""PanoHead's generator (An et al., CVPR 2023): its network pickle, opened safely, and what we ask of it.

A network pickle of that family carries source code that runs when it is loaded in the ordinary way.
Here it is read for its numbers and its construction arguments alone: everything in it that is
neither becomes an inert placeholder. The network is then built from the classes in the user's
checkout of the repository, as PanoHead's own `--reload_modules=True` does. So code runs that is in the
checkout, none that is in the pickle.

This is the only module of data_prep that imports PyTorch.
"""

from __future__ import annotations

import importlib
import io
import pathlib
import pickle
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from data_prep.generator import isosurface
from spinmeround_jax import cameras
from spinmeround_jax.files import InputError

_POINTS = 1_000_000  # of the density in one call, as in PanoHead's scripts


# --------------------------------------------------------------------------------------------------
# The pickle


class _Inert:
    """Stands for any object of a class, or result of a function, that we do not need."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:  # (dict, slots)
            state = state[0]
        self.state = state if isinstance(state, dict) else {}

    # A list or dictionary of a class that we do not know may be filled.
    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Persistent(_Inert):
    """An object of torch_utils.persistence: a class name, its source (not looked at), its state."""

    def __init__(self, meta: Any):
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
            raise pickle.UnpicklingError("a persistent object without a state")
        self.class_name = meta.get("class_name")
        self.state = meta["state"]


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())


def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    return data


_KNOWN = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Persistent,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
    ("dnnlib.util", "EasyDict"): dict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name)) or type(name, (_Inert,), {})


def _tensors(module: _Inert, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, as state_dict() and buffers that are not kept in it."""
    found = {}
    state = getattr(module, "state", {})
    for kind in ("_parameters", "_buffers"):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, torch.Tensor):
                found[prefix + name] = value
    for name, child in (state.get("_modules") or {}).items():
        if isinstance(child, _Inert):
            found |= _tensors(child, f"{prefix}{name}.")
    return found


def _read(pickled: pathlib.Path) -> _Persistent:
    try:
        with pickled.open("rb") as file:
            content = _Unpickler(file).load()
        network = content["G_ema"]
    except OSError as error:
        raise InputError(f"{pickled}: cannot be opened ({error.strerror})") from error
    except Exception as error:  # the file can hold anything
        raise InputError(
            f"{pickled}: not a PanoHead network pickle, such as easy-khair-180-gpc0.8-trans10-"
            f"025000.pkl ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(network, _Persistent) or network.class_name != "TriPlaneGenerator":
        raise InputError(f"{pickled}: its G_ema is no TriPlaneGenerator; is it PanoHead's?")
    return network


def load(checkout: pathlib.Path, pickled: pathlib.Path) -> torch.nn.Module:
    """PanoHead's generator on the CPU, in evaluation mode.

    Puts `checkout` on Python's path: its code will run.

    Raises:
        InputError: naming the checkout or the pickle, and what is wrong with it.
    """
    if not (checkout / "training" / "triplane.py").is_file():
        raise InputError(
            f"{checkout}: no checkout of PanoHead there (training/triplane.py is missing); "
            "git clone https://github.com/SizheAn/PanoHead and give its folder"
        )
    stored = _read(pickled)
    args, kwargs = stored.state.get("_init_args", ()), stored.state.get("_init_kwargs", {})
    # This one argument names a class, which the network's constructor imports.
    upsampler = str((kwargs.get("rendering_kwargs") or {}).get("superresolution_module", ""))
    if upsampler and not upsampler.startswith("training."):
        raise InputError(f"{pickled}: names {upsampler!r} as its super-resolution; not PanoHead's")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        network = importlib.import_module("training.triplane").TriPlaneGenerator(*args, **kwargs)
    except Exception as error:  # another version's arguments, a package of theirs that is missing
        raise InputError(
            f"{checkout}: its TriPlaneGenerator cannot be built ({type(error).__name__}: {error}); "
            "are PanoHead's own requirements installed (environment.yml)?"
        ) from error
    _copy(_tensors(stored), network, pickled)
    for name in ("neural_rendering_resolution", "rendering_kwargs"):
        if name in stored.state:  # set after construction, while it was trained
            setattr(network, name, stored.state[name])
    return network.eval().requires_grad_(False)


def _copy(tensors: dict[str, torch.Tensor], network: torch.nn.Module, path: pathlib.Path) -> None:
    wanted = dict(network.named_parameters()) | dict(network.named_buffers())
    if problems := sorted(wanted.keys() ^ tensors.keys()):
        raise InputError(
            f"{path}: its tensors are not those of the checkout's network, {len(problems)} differ "
            f"such as {problems[0]}; take the pickle and the checkout of one version"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            if tensor.shape != tensors[name].shape:
                raise InputError(
                    f"{path}: {name} has shape {tuple(tensors[name].shape)}, the checkout's network "
                    f"wants {tuple(tensor.shape)}"
                )
            tensor.copy_(tensors[name])


# --------------------------------------------------------------------------------------------------
# What is asked of it


def camera_parameters(world_to_camera: np.ndarray) -> np.ndarray:
    """(n, 4, 4) cameras of `cameras` -> (n, 25) float32, PanoHead's labels.

    PanoHead's world is ours (x right, y up, the face along +z). Its cameras look along +z with y
    down, as OpenCV's. 16 numbers of camera-to-world, then 9 of the intrinsics in image widths.
    """
    poses = cameras.camera_to_world(world_to_camera) * np.array([1.0, -1.0, -1.0, 1.0], np.float32)
    focal = cameras.FOCAL
    intrinsics = np.array([focal, 0, 0.5, 0, focal, 0.5, 0, 0, 1], np.float32)
    rows = np.broadcast_to(intrinsics, (len(poses), 9))
    return np.concatenate([poses.reshape(-1, 16), rows], axis=1).astype(np.float32)


class PanoHead:
    """A panohead.Generator: the same seed is the same person in PanoHead's own scripts.

    Args:
        network: see `load`; anything with its `z_dim`, `rendering_kwargs`, `mapping`, `synthesis`
            and `sample_mixed`.
        truncation_psi, truncation_cutoff: how near to the mean person, as in gen_samples.py.
    """

    def __init__(
        self,
        network: Any,
        device: str = "cuda",
        truncation_psi: float = 0.7,
        truncation_cutoff: int = 14,
    ):
        self._network = network.to(device)
        self._device = device
        self._truncation = {
            "truncation_psi": truncation_psi,
            "truncation_cutoff": truncation_cutoff,
        }

    def _styles(self, seed: int) -> torch.Tensor:
        """(1, layers, w_dim): of the person, conditioned on the frontal camera."""
        draw = np.random.RandomState(seed)  # so that a seed means what it means to PanoHead
        z = torch.from_numpy(draw.randn(1, self._network.z_dim)).to(self._device)
        frontal = torch.from_numpy(camera_parameters(cameras.orbit([0.0]))).to(self._device)
        return self._network.mapping(z, frontal, **self._truncation)

    @torch.no_grad()
    def images(self, seed: int, world_to_camera: np.ndarray) -> np.ndarray:
        styles = self._styles(seed)
        labels = torch.from_numpy(camera_parameters(world_to_camera)).to(self._device)
        pictures = []
        for number, label in enumerate(labels):
            torch.manual_seed(0)  # ray samples are jittered: alike in all views and runs
            # The tri-planes do not depend on the camera: made for the first view, then kept.
            picture = self._network.synthesis(
                styles,
                label[None],
                noise_mode="const",
                cache_backbone=number == 0,
                use_cached_backbone=number > 0,
            )["image"]
            picture = (picture[0].permute(1, 2, 0).float() * 127.5 + 128.0).clamp(0, 255)
            pictures.append(picture.to(torch.uint8).cpu().numpy())
        return np.stack(pictures)

    @torch.no_grad()
    def density(self, seed: int, size: int) -> tuple[np.ndarray, float]:
        styles = self._styles(seed)
        box = float(self._network.rendering_kwargs["box_warp"])
        points = torch.from_numpy(isosurface.grid(size, box)[None]).to(self._device)
        parts = []
        for start in range(0, points.shape[1], _POINTS):
            some = points[:, start : start + _POINTS]
            directions = torch.zeros_like(some)  # which the density does not depend on
            directions[..., 2] = -1.0
            torch.manual_seed(0)
            sigma = self._network.sample_mixed(some, directions, styles, noise_mode="const")[
                "sigma"
            ]
            parts.append(sigma[0, :, 0].float().cpu().numpy())
        return np.concatenate(parts).reshape(size, size, size), box
