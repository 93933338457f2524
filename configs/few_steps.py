"""The small model tuned to sample in two evaluations of the network (ECT, arXiv 2406.14548).

Data:      as configs/quickstart.py, whose run comes first
Command:   python -m spinmeround_jax.train --config=configs/few_steps.py
Hardware:  CPU; a step is a third dearer than one of configs/quickstart.py
Expected:  not yet run
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """`configs/quickstart.py` from its weights; guidance is not part of what is learnt."""
    config = quickstart.get_config()
    config.name = "few_steps"
    config.init_from = "runs/quickstart/model"
    config.autoencoder_training.steps = 0
    config.consistency_halvings = 8
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    config.optimizer.ema_decay = 0.999
    config.stages = ({"steps": 2000, "observed": (0, 1, 1, 3)},)
    config.held_out.heads = 0  # these losses are of diffusion
    config.sampling.sampler = "consistency"
    config.sampling.steps = 2
    return config
