"""The paper's model: 512 pixels, 8 views, 859,961,608 parameters in the UNet, on one node of 8 H100s.

Command:   python -m spinmeround_jax.train --config=configs/h100.py --workdir=/shared/runs/h100
           on more nodes, by python -m launch.slurm or over ssh (docs/launching.md), with a larger batch:
           --config.optimizer.batch_size=128 for 4 nodes
Hardware:  8 x H100 with 80 GB, 4 examples of 8 views each; '.[train,cuda]'
Before:    `weights/init` and `data/panohead512`, as for configs/tpu_v4.py; latents computed ahead, because
           eight GPUs in one process read and decode 512 images a step:
           python -m data_prep.cache_latents --help, and --config.latents.directory=DIR
Expected:  not yet run to its end. Compiled ahead of time a step takes 44.8 GiB of 75 on each GPU, 13.3 of them
           state:
           python -m launch.compile --config=configs/h100.py --topology=h100:1x8 --examples=4 --effort=O2
           (jax 0.10.2, cuDNN 9.28, 2026-11-23). Where memory runs out, config.accumulation = 2 or 4 computes
           the same in less
"""

from ml_collections import ConfigDict

from configs import tpu_v4


def get_config() -> ConfigDict:
    """`configs/tpu_v4.py` on GPUs."""
    config = tpu_v4.get_config()
    config.name = "h100"
    config.mesh.fsdp = 1  # all of it fits on each GPU
    config.data.workers = 16  # per process, and one process has the node
    config.data.prefetch = 32
    return config
