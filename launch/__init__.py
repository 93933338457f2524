"""Starts training where the accelerators are, watches it, and takes everything down again.

`python -m launch.tpu` Cloud TPU pods, `launch.gke` GKE through XPK, `launch.slurm`, `launch.nodes` hosts
reached by ssh. See docs/launching.md.
"""
