"""SpinMeRound in JAX: one portrait in, 360 degrees of views and normals out.

    import spinmeround_jax as smr
    heads = smr.Pipeline.load("weights/quickstart")("portrait.png")
    heads.save("out")

Names are imported on first use, so that `import spinmeround_jax` is fast and needs no extras.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

ID_EMBEDDING_SIZE = 512  # of identities in records, files and models

_HOME = {  # name: its module
    "Pipeline": "diffusion.pipeline",
    "Heads": "results.head_folder",
    "SamplingConfig": "config",
    "ModelConfig": "models",
    "load_model": "checkpoints",
    "save_model": "checkpoints",
}
__all__ = ["cameras", "reconstruct", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return importlib.import_module(f"{__name__}.{name}")
