"""FLOPs that training and sampling need, counted for MFU, and the peak FLOP/s of chips.

Counted are matrix products and convolutions, as the networks are written: loops as often as they run, attention
as its plain products. XLA's cost analysis counts the body of a loop once and nothing inside Pallas kernels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spinmeround_jax import models
from spinmeround_jax.config import Config
from spinmeround_jax.models import parameters

# bfloat16 matrix FLOP/s of a chip, dense, by `jax.Device.device_kind` (JAX has two names for some).
# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e. NVIDIA: the data sheets "A100 Tensor Core GPU", "H100
# Tensor Core GPU", "H200 Tensor Core GPU"; the last two give twice the figure, with sparsity.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
Shapes = jax.ShapeDtypeStruct


def of_step(config: Config, images: bool) -> float:
    """FLOPs of a training step: three forward passes of the UNet for each example of the global batch.

    The networks of identity and loss are not counted, nor what is computed twice (`config.remat`).

    Args:
        images: the step encodes images, because latents were not computed ahead; that is added.
    """
    return config.optimizer.batch_size * (
        3.0 * of_unet(config) + (of_encoder(config) if images else 0.0)
    )


def of_unet(config: Config) -> float:
    """FLOPs of a forward pass of the UNet for one example of all views."""
    model = config.model
    graphdef, params = parameters.split(_networks(config)["unet"])
    size, v = model.latent_size, model.views
    jaxpr = jax.make_jaxpr(lambda p, *a: parameters.merge(graphdef, p)(*a))(
        params,
        Shapes((1, v, size, size, model.unet.in_channels), jnp.float32),
        Shapes((1,), jnp.float32),
        Shapes((1, model.identity.context_length, model.unet.context_dim), jnp.float32),
    )
    return _count(jaxpr.jaxpr)


def of_encoder(config: Config) -> float:
    """FLOPs of encoding the images and normals of all views of one example."""
    graphdef, params = parameters.split(_networks(config)["autoencoder"])
    size = config.model.image_size
    jaxpr = jax.make_jaxpr(lambda p, x: parameters.merge(graphdef, p).posterior(x))(
        params, Shapes((1, size, size, 3), jnp.float32)
    )
    return 2 * config.model.views * _count(jaxpr.jaxpr)


def rates(flops_per_second: float, devices: np.ndarray) -> dict[str, float]:
    """TFLOP/s on each of the devices, and MFU (model FLOPs utilisation) where their peak is known.

    MFU is of the peak in bfloat16, whatever the compute dtype. Without FLOPs there is nothing to report.
    """
    if not flops_per_second:
        return {}
    each = flops_per_second / devices.size
    peak = PEAKS.get(devices.flat[0].device_kind)
    return {"tflops_per_device": each / 1e12, **({"mfu": each / peak} if peak else {})}


def _networks(config: Config) -> dict[str, nnx.Module]:
    dtype = jnp.dtype(config.compute_dtype)
    return nnx.eval_shape(
        lambda: models.build(config.model, dtype=dtype, rngs=nnx.Rngs(0)).networks
    )


def _count(jaxpr: jax.extend.core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * np.prod(out.shape) * np.prod([shape[axis] for axis in contracted])
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * np.prod(out.shape) * np.prod(kernel) / kernel[features]
        elif equation.primitive.name == "cond":  # one branch per platform, the same arithmetic
            total += max(_count(branch.jaxpr) for branch in equation.params["branches"])
        else:
            times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            inner = (equation.params.get(name) for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
            for found in filter(None, inner):
                total += times * _count(getattr(found, "jaxpr", found))
    return total
