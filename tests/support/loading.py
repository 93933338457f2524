"""Tensors of another format straight into a network, for tests; `convert` goes by way of files."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spinmeround_jax.models import parameters
from spinmeround_jax.weights import mapping


def load(module, targets, tensors):
    """Fill the (perhaps abstract) `module` in place with float32 from arrays by name."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    mapping.check(mapping.source_shapes(targets), shapes)
    graphdef, values = parameters.split(module)
    for name, target in targets.items():
        values[target.name] = jnp.asarray(target.value(tensors[name], np.dtype(np.float32)))
    nnx.update(module, nnx.state(parameters.merge(graphdef, values)))
