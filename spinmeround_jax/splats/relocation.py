"""A fixed number of Gaussians that find their places: Kheradmand et al., "3D Gaussian Splatting as Markov
Chain Monte Carlo" (NeurIPS 2024)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spinmeround_jax.splats.gaussians import Gaussians, covariances

DEAD = 0.005  # opacity at which a Gaussian has faded
MAX_SHARE = 51  # copies of one Gaussian made in one relocation


def add_noise(gaussians: Gaussians, key: jax.Array, weight: jax.Array) -> Gaussians:
    """Move what is nearly invisible at random, along its own covariance (Kheradmand et al., eq. 8)."""
    opacity = jax.nn.sigmoid(gaussians.opacity_logits)
    unseen = jax.nn.sigmoid(-100.0 * (opacity - DEAD))
    random = jax.random.normal(key, gaussians.means.shape) * unseen[:, None]
    shift = weight * jnp.einsum("nij,nj->ni", covariances(gaussians), random)
    return dataclasses.replace(gaussians, means=gaussians.means + shift)


@jax.jit
def relocate(gaussians: Gaussians, key: jax.Array) -> tuple[Gaussians, jax.Array]:
    """Move faded Gaussians onto visible ones, chosen by opacity, so that the image stays.

    Where k come to share a place, opacity and scale follow Kheradmand et al. (eq. 9): each has opacity
    1 - (1 - o)^(1/k), and the covariance is such that together they blend as the one did.

    Returns:
        The Gaussians, and (n,) bool, those that were changed.
    """
    opacity = jax.nn.sigmoid(gaussians.opacity_logits)
    dead = opacity <= DEAD
    alive = jnp.where(dead, -jnp.inf, jax.nn.log_sigmoid(gaussians.opacity_logits))
    any_alive = jnp.any(~dead)
    target = jax.random.categorical(key, jnp.where(any_alive, alive, 0.0), shape=(len(opacity),))
    target = jnp.where(dead, target, jnp.arange(len(opacity)))
    share = jnp.zeros(len(opacity)).at[target].add(1.0)[target]
    share = jnp.clip(share, 1.0, MAX_SHARE)
    changed = ((share > 1.0) | dead) & any_alive
    whole = jnp.minimum(opacity[target], 1.0 - 1e-6)
    new_opacity = -jnp.expm1(jnp.log1p(-whole) / share)
    scale = jnp.exp(gaussians.log_scales[target]) * _shrink(whole, new_opacity, share)[:, None]
    new_opacity = jnp.maximum(new_opacity, 1.01 * DEAD)
    at_target = jax.tree.map(lambda x: x[target], gaussians)
    moved = dataclasses.replace(
        at_target,
        log_scales=jnp.log(scale),
        opacity_logits=jnp.log(new_opacity) - jnp.log1p(-new_opacity),
    )

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(changed.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, moved, gaussians), changed


def _shrink(whole: jax.Array, part: jax.Array, share: jax.Array) -> jax.Array:
    """(n,) factor of the scales when one of opacity `whole` becomes `share` of opacity `part`."""
    terms = np.zeros((MAX_SHARE + 1, MAX_SHARE), np.float32)
    for k in range(1, MAX_SHARE + 1):
        terms[k] = terms[k - 1]
        for j in range(k):
            terms[k, j] += math.comb(k - 1, j) * (-1.0) ** j / math.sqrt(j + 1)
    powers = part[:, None] ** jnp.arange(1, MAX_SHARE + 1)
    total = jnp.sum(jnp.asarray(terms)[share.astype(jnp.int32)] * powers, axis=-1)
    # The alternating sum loses its digits for large shares; scales only ever shrink, and not to nothing.
    return jnp.clip(whole / jnp.where(total > 0, total, jnp.inf), 0.2, 1.0)


def forget(adam: optax.OptState, changed: jax.Array) -> optax.OptState:
    """Adam's moments, zero for the Gaussians that were moved."""

    def clear(moments: Gaussians) -> Gaussians:
        return jax.tree.map(
            lambda m: jnp.where(changed.reshape(-1, *[1] * (m.ndim - 1)), 0.0, m), moments
        )

    return adam._replace(mu=clear(adam.mu), nu=clear(adam.nu))
