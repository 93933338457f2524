"""The configs of the repository, whole and shrunk."""

import importlib

from spinmeround_jax.config import Config, from_mapping

MICRO = {
    "image_size": 16,
    "views": 4,
    "unet": {
        "model_channels": 16, "channel_mult": (1,), "attention_levels": (), "joint_levels": (),
        "heads": 2, "norm_groups": 8, "in_channels": 153, "out_channels": 8,
    },
    "autoencoder": {
        "channels": 8, "channel_mult": (1, 4), "norm_groups": 8, "latent_channels": 4,
    },
    "identity": {"heads": 4, "mlp_width": 32},
}  # fmt: skip


def micro_config(directory, **overrides) -> Config:
    """configs/quickstart.py, shrunk."""
    values = importlib.import_module("configs.quickstart").get_config()
    values.model.update(MICRO)
    values.data.directory = str(directory)
    values.latents.directory = ""
    values.optimizer.batch_size = 2
    values.optimizer.warmup_steps = 2
    values.stages = ({"steps": 3, "observed": (1,)}, {"steps": 3, "observed": (0, 1, 3)})
    values.autoencoder_training.steps = 4
    values.autoencoder_training.lpips_weight = 0.0
    values.autoencoder_training.crop = 8
    values.autoencoder_training.directory = ""
    values.held_out.heads = 2
    values.autoencoder_training.optimizer.batch_size = 2
    values.update({"log_every": 2, "sample_every": 100, "checkpoint_every": 3})
    values.update_from_flattened_dict(overrides)
    return from_mapping(Config, values)


def full_config(name) -> Config:
    return from_mapping(Config, importlib.import_module(f"configs.{name}").get_config())
