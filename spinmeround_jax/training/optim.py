"""AdamW on float32 master weights, its schedule, and the moving average of the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spinmeround_jax.config import OptimizerConfig

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of training, input and output of every step.

    Attributes:
        params, ema: float32 pytrees of one structure.
        step: () int32, number of updates; random keys depend on it.
        bad_step: () int32, the first step whose loss or gradient was not finite, else -1.
    """

    params: Tree
    ema: Tree
    opt_state: Tree
    step: jax.Array
    bad_step: jax.Array


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warmup from 0, then constant, or a cosine to 0 at `steps`.

    Raises:
        ValueError: for another schedule.
    """
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.schedule == "constant":
        main = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(
            config.learning_rate, max(1, steps - config.warmup_steps)
        )
    else:
        raise ValueError(f"schedule must be 'constant' or 'cosine', got {config.schedule!r}")
    return (
        optax.join_schedules([warmup, main], [config.warmup_steps]) if config.warmup_steps else main
    )


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; vectors (norms and biases) are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def step_key(seed: int, stream: int, step: jax.Array) -> jax.Array:
    """The random key of a step; it depends on nothing else, so that a resumed run draws the same.

    Args:
        stream: distinguishes trainings with one seed. Initialisers of parameters fold in numbers from 0,
            this function from a million.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1_000_000 + stream), step)


def init(params: Tree, transform: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the moving average starts at the parameters."""
    return TrainState(
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=transform.init(params),
        step=jnp.zeros((), jnp.int32),
        bad_step=-jnp.ones((), jnp.int32),
    )


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
    """min(decay, (1 + t) / (10 + t)): a short average early on forgets the initialisation."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def update(
    state: TrainState,
    loss: jax.Array,
    gradients: Tree,
    transform: optax.GradientTransformation,
    decay: float,
) -> tuple[TrainState, jax.Array]:
    """One step of the optimizer and of the moving average.

    Returns:
        The new state, and the gradients' global norm before clipping.
    """
    norm = optax.global_norm(gradients)
    updates, opt_state = transform.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = ema_decay(decay, state.step)
    ema = jax.tree.map(lambda e, p: keep * e + (1.0 - keep) * p, state.ema, params)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
    return TrainState(params, ema, opt_state, state.step + 1, bad_step), norm
