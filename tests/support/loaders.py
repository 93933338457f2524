"""Loaders of a small data set."""

from spinmeround_jax.config import DataConfig, StageConfig
from spinmeround_jax.data import loader as data_loader


def configure(directory, **changes) -> DataConfig:
    values = {
        "directory": str(directory),
        "max_frontal_yaw": 50.0,
        "max_frontal_pitch": 20.0,
        "random_background": 0.5,
        "guidance_dropout": 0.15,
        "identity_dropout": 0.4,
        "relative_cameras": False,
        "skip_corrupt": False,
        "workers": 0,
        "prefetch": 0,
    }
    return DataConfig(**{**values, **changes})


def loader(directory, steps=7, batch_size=4, views=3, seed=0, observed=(0, 1, 2), **changes):
    """A loader of one stage; keyword arguments go to make_loader or the DataConfig."""
    options = {
        name: changes.pop(name)
        for name in (
            "process_index",
            "process_count",
            "split",
            "stages",
            "latents",
            "normals_frame",
        )
        if name in changes
    }
    stages = options.pop("stages", (StageConfig(steps, observed),))
    options.setdefault("normals_frame", "world")
    config = configure(directory, **changes)
    return data_loader.make_loader(config, stages, batch_size, views, seed, **options)
