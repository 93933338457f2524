"""A tiny stand-in for a PanoHead checkout and its pickle: its call signatures, its cameras, a real head.

`write` makes a folder with training/triplane.py and torch_utils/persistence.py, and a network pickle in
the manner of NVIDIA's: every module carries its source code, which runs when it is unpickled naively.
Needs PyTorch.
"""

from __future__ import annotations

import importlib
import pathlib
import pickle
import sys

PERSISTENCE = """
import copy, inspect, sys

def _reconstruct_persistent_obj(meta):
    raise AssertionError("the restricted loader must not call this")

def persistent_class(original):
    source = inspect.getsource(sys.modules[original.__module__])

    class Persistent(original):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = copy.deepcopy(args), copy.deepcopy(kwargs)

        def __reduce__(self):
            state = super().__reduce__()[2]
            meta = dict(type="class", version=6, module_src=source, class_name=original.__name__,
                        state=state)
            return _reconstruct_persistent_obj, (meta,), None

    return Persistent
"""

# A field of density and colour stands for the tri-planes; rays, labels and layouts as in PanoHead.
TRIPLANE = """
import torch
from torch_utils import persistence

@persistence.persistent_class
class Mapping(torch.nn.Module):
    def __init__(self, z_dim):
        super().__init__()
        self.fc = torch.nn.Linear(z_dim, 4)
        self.register_buffer("w_avg", torch.zeros(4))

    def forward(self, z):
        return self.fc(z.float())

class Plain(torch.nn.Module):  # not persistent, as MipRayMarcher2
    pass

@persistence.persistent_class
class TriPlaneGenerator(torch.nn.Module):
    def __init__(self, z_dim, c_dim, w_dim, img_resolution, field_size, rendering_kwargs={}):
        super().__init__()
        self.z_dim, self.c_dim, self.img_resolution = z_dim, c_dim, img_resolution
        self.rendering_kwargs = rendering_kwargs
        self.neural_rendering_resolution = 64
        self.map = Mapping(z_dim)
        self.act = torch.nn.Sequential(torch.nn.Softplus())
        self.renderer = Plain()
        self.field = torch.nn.Parameter(torch.zeros(1, 4, field_size, field_size, field_size))
        self._last_planes = None
        self.backbone_runs = 0

    def mapping(self, z, c, truncation_psi=1, truncation_cutoff=None, update_emas=False):
        assert c.shape == (1, 25)
        ws = self.map.w_avg + truncation_psi * (self.map(z) - self.map.w_avg)
        return ws[:, None].repeat(1, truncation_cutoff or 14, 1)

    def _backbone(self, ws, noise_mode="random"):
        assert noise_mode == "const"
        self.backbone_runs += 1
        return self.field + 0 * ws.mean()

    def _sample(self, planes, xyz):
        # (..., z, y, x) planes, so that x runs along the last axis, as grid_sample wants it.
        grid = (2 / self.rendering_kwargs["box_warp"] * xyz)[:, None, None]
        found = torch.nn.functional.grid_sample(planes, grid, align_corners=True)
        return found[:, :, 0, 0].permute(0, 2, 1)

    def synthesis(self, ws, c, neural_rendering_resolution=None, update_emas=False, ws_bcg=None,
                  cache_backbone=False, use_cached_backbone=False, **synthesis_kwargs):
        pose, intrinsics = c[:, :16].view(-1, 4, 4), c[:, 16:25].view(-1, 3, 3)
        planes = self._last_planes
        if not use_cached_backbone:
            planes = self._backbone(ws, **synthesis_kwargs)
        if cache_backbone:
            self._last_planes = planes
        n = self.img_resolution
        centres = (torch.arange(n) + 0.5) / n
        v, u = torch.meshgrid(centres, centres, indexing="ij")
        x = (u - intrinsics[:, 0, 2]) / intrinsics[:, 0, 0]
        y = (v - intrinsics[:, 1, 2]) / intrinsics[:, 1, 1]
        directions = torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3) @ pose[0, :3, :3].T
        directions = directions / directions.norm(dim=-1, keepdim=True)
        depths = torch.linspace(2.2, 3.2, 100)
        points = pose[0, :3, 3] + depths[:, None, None] * directions
        values = self._sample(planes, points.reshape(1, -1, 3)).reshape(*points.shape[:2], 4)
        inside = points.abs()[..., [0, 2]].amax(-1) <= self.rendering_kwargs["box_warp"] / 2 - 0.1
        density = torch.where(inside, torch.nn.functional.softplus(values[..., 0] - 1), 0.0)
        alpha = 1 - torch.exp(-density * (depths[1] - depths[0]))
        through = torch.cumprod(torch.cat([torch.ones_like(alpha[:1]), 1 - alpha]), 0)
        weights = through[:-1] * alpha
        colour = (weights[..., None] * values[..., 1:]).sum(0)
        backdrop = torch.tensor([-0.8, 0.9, -0.8])
        image = colour + through[-1][:, None] * backdrop
        image = image.T.reshape(1, 3, n, n)
        return {"image": image, "image_raw": image, "image_depth": None}

    def sample_mixed(self, coordinates, directions, ws, truncation_psi=1, truncation_cutoff=None,
                     update_emas=False, **synthesis_kwargs):
        assert coordinates.shape == directions.shape
        planes = self._backbone(ws, **synthesis_kwargs)
        values = self._sample(planes, coordinates)
        return {"sigma": values[..., :1], "rgb": values[..., 1:]}
"""

MALICIOUS = """
import pathlib
pathlib.Path({mark!r}).write_text("code of the pickle ran")
"""


def write(folder: pathlib.Path, field, resolution: int = 64, mark: pathlib.Path | None = None):
    """(checkout, pickle, the network that was pickled).

    Args:
        field: (4, n, n, n) float32, density and colour in [-1, 1], axes x, y, z, of a cube of side 1.
        mark: a file that the source code in the pickle would write.
    """
    import torch

    checkout = folder / "PanoHead"
    for name, source in (("training/triplane", TRIPLANE), ("torch_utils/persistence", PERSISTENCE)):
        path = checkout / f"{name}.py"
        path.parent.mkdir(parents=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source)
    sys.path.insert(0, str(checkout))
    try:
        module = importlib.import_module("training.triplane")
        options = {"box_warp": 1, "superresolution_module": "training.superresolution.None8X"}
        torch.manual_seed(1)
        network = module.TriPlaneGenerator(
            8, 25, 4, resolution, field.shape[1], rendering_kwargs=options
        )
        network.neural_rendering_resolution = 128
        with torch.no_grad():
            network.field.copy_(torch.from_numpy(field).permute(0, 3, 2, 1)[None])
        path = folder / "easy.pkl"
        content = {"G": None, "D": None, "G_ema": network, "training_set_kwargs": {}}
        pickled = pickle.dumps(content)
        if mark is not None:
            code = MALICIOUS.format(mark=str(mark)).encode()
            assert TRIPLANE.encode() in pickled
            evil = code + b"#" * (len(TRIPLANE.encode()) - len(code))
            pickled = pickled.replace(TRIPLANE.encode(), evil)
        path.write_bytes(pickled)
    finally:
        forget(checkout)
    return checkout, path, network


def forget(checkout: pathlib.Path) -> None:
    """Undo what loading a checkout does to this process."""
    sys.path[:] = [entry for entry in sys.path if entry != str(checkout)]
    for name in list(sys.modules):
        if name.split(".")[0] in ("training", "torch_utils"):
            del sys.modules[name]
