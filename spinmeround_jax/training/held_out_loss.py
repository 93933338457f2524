"""The diffusion loss at fixed noise levels, with the same heads, views and noise each time.

The training loss draws a new noise level in every step and covers training heads only. These losses are
comparable between steps, and the gap between held-out and training heads measures memorisation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spinmeround_jax import sharding
from spinmeround_jax.config import Config, StageConfig
from spinmeround_jax.data import loader as data_loader
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.data.subjects import SubjectSource
from spinmeround_jax.models.attention import Execution
from spinmeround_jax.models.attention_kernels import best_for
from spinmeround_jax.training import latents
from spinmeround_jax.training.step import loss_per_head

Tree = Any
TRAINED, HELD_OUT = "train", "held_out"  # splits


def fixed_heads(config: Config) -> dict[str, Batch]:
    """By split, a batch of `config.held_out.heads` heads: nothing dropped, on white, one view observed.

    Without held-out heads in the data set there are training heads only.
    """
    plain = dataclasses.replace(
        config.data, random_background=0.0, guidance_dropout=0.0, identity_dropout=0.0,
        workers=0, prefetch=0,
    )  # fmt: skip
    splits = read_manifest(config.data.directory)["splits"]
    found = {}
    for split in (TRAINED, HELD_OUT):
        if not (splits.get(split) and config.held_out.heads):
            continue
        count = min(config.held_out.heads, len(SubjectSource(config.data.directory, split)))
        loader = data_loader.make_loader(
            plain,
            (StageConfig(steps=1, observed=(1,)),),
            count,
            config.model.views,
            config.seed,
            config.model.normals_frame,
            split,
        )
        with contextlib.closing(loader):
            found[split] = next(loader)
    return found


def fixed_losses(
    config: Config, graphdefs: dict[str, nnx.GraphDef], frozen: Tree, mesh: Mesh
) -> Callable[[Tree], dict[str, float]]:
    """Parameters by network -> "held_out_10", "train_10" and their "gap_10" for sigma 10, and so on.

    The gap is held out / train - 1.

    Args:
        frozen: as of `train.freeze`, with the autoencoder.
    """
    kernel = best_for(mesh.devices.flat[0], jnp.dtype(config.compute_dtype))
    everywhere = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def encode(params: Tree, batch: Batch) -> jax.Array:
        return latents.of_batch(batch, config.model, graphdefs["autoencoder"], params)

    heads = {}
    for split, batch in fixed_heads(config).items():
        batch = jax.device_put(batch, everywhere)
        clean = encode(frozen["networks"]["autoencoder"], batch)
        heads[split] = clean, dataclasses.replace(batch, images=None, normals=None)

    def losses(params: Tree, clean: jax.Array, batch: Batch) -> jax.Array:
        noise = jax.random.normal(jax.random.key(config.seed), clean.shape)
        return jnp.stack(
            [
                loss_per_head(
                    config.model, config.ablation, graphdefs, params, frozen["empty_latent"],
                    clean, batch, jnp.float32(sigma), noise, Execution(kernel=kernel),
                ).mean()
                for sigma in config.held_out.sigmas
            ]
        )  # fmt: skip

    # Replicated: kernels cannot be partitioned, and this is little work.
    compiled = jax.jit(
        jax.shard_map(losses, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    )

    def measure(params: Tree) -> dict[str, float]:
        params = {name: value for name, value in params.items() if name != "autoencoder"}
        found = {split: jax.device_get(compiled(params, *given)) for split, given in heads.items()}
        figures = {}
        for i, sigma in enumerate(config.held_out.sigmas):
            figures |= {f"{split}_{sigma:g}": float(loss[i]) for split, loss in found.items()}
            if HELD_OUT in found:
                figures[f"gap_{sigma:g}"] = float(found[HELD_OUT][i] / found[TRAINED][i]) - 1.0
        return figures

    return measure
