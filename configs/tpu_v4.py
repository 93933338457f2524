"""The paper's model: 512 pixels, 8 views, 859,961,608 parameters in the UNet, on TPU v4.

Command:   python -m spinmeround_jax.train --config=configs/tpu_v4.py --workdir=/shared/runs/tpu_v4
Hardware:  TPU v4, at least 32 chips for the batch below (one example of 8 views per chip)
Before:    `weights/init`, from Stable Diffusion 1.5's autoencoder and Arc2Face's UNet and text encoder:
           python -m spinmeround_jax.convert --sd15 DIR --arc2face DIR --out weights/init
           (or --released spmr.ckpt, to go on from there; docs/conversion.md);
           `data/panohead512`, written by `data_prep`: 7k subjects with 125 views each
Expected:  not yet run to its end
"""

import dataclasses

from ml_collections import ConfigDict

from spinmeround_jax.config import Config, DataConfig, StageConfig
from spinmeround_jax.models import ModelConfig
from spinmeround_jax.sharding import MeshConfig


def get_config() -> ConfigDict:
    """The values of a `spinmeround_jax.config.Config`; what is not named here is the default there."""
    config = Config(
        name="tpu_v4",
        # Normals are learnt in each view's own frame; the release has them in the head's ("world").
        model=dataclasses.replace(ModelConfig.full_size(), normals_frame="camera"),
        init_from="weights/init",
        mesh=MeshConfig(fsdp=8),  # and nothing computed again: five examples per chip fit so
        data=DataConfig(
            directory="data/panohead512",
            skip_corrupt=True,  # counted and logged; one bad record must not end weeks of training
            workers=8,
            prefetch=16,
        ),
        stages=(
            StageConfig(steps=600_000, observed=(1,)),
            StageConfig(steps=1_000_000, observed=(0, 1, 3)),
        ),
    )
    return ConfigDict(dataclasses.asdict(config))
