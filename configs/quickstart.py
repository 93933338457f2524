"""The quickstart model: 128 pixels, 8 views, rendered heads, small enough for a CPU.

Data:      python -m data_prep.render_heads --out data/heads128 --subjects 1600 --held-out 40 --size 128 \\
               --train-views 24
Command:   python -m spinmeround_jax.train --config=configs/quickstart.py
Hardware:  CPU; an example (8 views, forward and backward) is 24 GFLOP; two idle cores make 4.2 a second
Expected:  not yet run to its end. weights/quickstart are of its predecessor: 64 pixels, 480 heads, 4 latent
           channels, normals in the head's frame, 54,000 examples
"""

import dataclasses

from ml_collections import ConfigDict

from spinmeround_jax.config import (
    AutoencoderTrainingConfig,
    Config,
    DataConfig,
    HeldOutConfig,
    LatentsConfig,
    NoiseConfig,
    OptimizerConfig,
    SamplingConfig,
    StageConfig,
)
from spinmeround_jax.models import ModelConfig


def get_config() -> ConfigDict:
    """The values of a `spinmeround_jax.config.Config`; what is not named here is the default there."""
    config = Config(
        name="quickstart",
        model=ModelConfig.quickstart(),
        train_identity_encoder=True,  # one small layer, learnt with the UNet
        compute_dtype="float32",
        data=DataConfig(
            directory="data/heads128",
            max_frontal_yaw=35.0,
            max_frontal_pitch=25.0,
            random_background=0.2,  # the portraits of the demo are on white; the paper's share is a half
            guidance_dropout=0.1,
            identity_dropout=0.3,  # our choice: the portrait tells more than the vector
        ),
        latents=LatentsConfig(directory="data/heads128/latents", backgrounds=1, sample=False),
        # coarse shape has 5 times, fine detail a tenth of the latents' unit deviation
        noise=NoiseConfig(mean=0.0, std=1.8),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=100,
            schedule="cosine",
            beta2=0.995,
            ema_decay=0.9995,
            batch_size=4,  # more, smaller steps: on a CPU time grows with the batch
        ),
        stages=(
            StageConfig(steps=8000, observed=(1,)),
            StageConfig(steps=4000, observed=(0, 1, 1, 3)),
        ),
        autoencoder_training=AutoencoderTrainingConfig(
            steps=3000,
            directory="",
            crop=64,  # four times as many images for the same time
            kl_weight=1e-4,
            optimizer=OptimizerConfig(
                learning_rate=2e-3,
                warmup_steps=100,
                schedule="cosine",
                weight_decay=0.0,
                beta2=0.99,
                ema_decay=0.998,
                batch_size=8,  # single views, of image and normals: 16 images
            ),
        ),
        held_out=HeldOutConfig(every=500, heads=16, sigmas=(1.0, 3.0, 10.0)),
        sampling=SamplingConfig(
            steps=12, sigma_max=80.0, guidance_scale=1.0, normals_steps=24, normals_guidance=1.0
        ),
        log_every=50,
        sample_every=1000,
        checkpoint_every=250,
        keep_checkpoints=2,
    )
    return ConfigDict(dataclasses.asdict(config))
