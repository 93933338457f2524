"""What each input is worth: the small model trained on for a while without it.

Data:      as configs/quickstart.py, whose run comes first
Command:   python -m spinmeround_jax.train --config=configs/ablation.py:no_identity
           and :no_image, :no_normals, and :full, which is trained on for as long with everything
Hardware:  2 CPU cores
Expected:  docs/results.md has the table of the shipped weights
"""

from ml_collections import ConfigDict

from configs import quickstart

WITHOUT = ("no_identity", "no_image", "no_normals")


def get_config(which: str = "full") -> ConfigDict:
    """`configs/quickstart.py`, starting from its weights, without one input or with all.

    Raises:
        ValueError: `which` is neither one of WITHOUT nor "full".
    """
    if which not in ("full", *WITHOUT):
        raise ValueError(f"configs/ablation.py:{which}: give full, {', '.join(WITHOUT)}")
    config = quickstart.get_config()
    config.name = f"ablation_{which}"
    config.init_from = "runs/quickstart/model"
    config.autoencoder_training.steps = 0
    config.ablation = ConfigDict({name: name == which for name in WITHOUT})
    config.optimizer.learning_rate = 3e-4
    config.optimizer.ema_decay = 0.995
    config.stages = ({"steps": 500, "observed": (1,)},)  # what the table measures
    config.sample_every = 10**6
    return config
