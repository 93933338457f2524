"""Start training on a TPU pod or a SLURM cluster, and report in advance what it takes there.

`python -m launch.tpu`, `launch.slurm` and `launch.compile`; see docs/launching.md and docs/scale.md.
"""
