"""Time one evaluation of the multi-view UNet, also against PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import measuring
from launch import programs
from spinmeround_jax import cli
from spinmeround_jax.config import Config, load_config
from spinmeround_jax.models import parameters
from spinmeround_jax.models.attention import Execution
from spinmeround_jax.models.attention_kernels import best_for

EXAMPLES = """examples:
  # the paper's UNet on 8 views of 32x32 latents, float32, interleaved with diffusers' modules
  python -m benchmarks.forward --config=configs/tpu_v4.py --config.model.image_size=256 \\
      --config.compute_dtype=float32 --against torch
"""
# Largest root mean square of the difference from PyTorch, in standard deviations of PyTorch's output.
LIMITS = {"float32": 1e-3, "bfloat16": 0.2}

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw_inputs(config: Config, examples: int) -> Arrays:
    """Inputs of the UNet, unit normal: x (b, v, h, w, c), c_noise (b,) and context (b, t, d)."""
    model, rng = config.model, np.random.default_rng(1)
    size = model.latent_size
    shapes = (
        (examples, model.views, size, size, model.unet.in_channels),
        (examples,),
        (examples, model.identity.context_length, model.unet.context_dim),
    )
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def compile_forward(
    config: Config, network: nnx.Module, values: parameters.Parameters, inputs: Arrays
) -> jax.stages.Compiled:
    """(parameters, *inputs) -> output, for the first device."""
    graphdef, _ = parameters.split(network)
    how = Execution(
        kernel=best_for(
            jax.devices()[0], jnp.dtype(config.compute_dtype), config.model.attention_shapes
        )
    )
    run = jax.jit(lambda values, *given: parameters.merge(graphdef, values)(*given, how=how))
    return run.lower(values, *inputs).compile()


def check_equal(ours: np.ndarray, theirs: np.ndarray, dtype: str, what: str) -> dict[str, float]:
    """Difference of the outputs of two implementations, in standard deviations of the second's.

    Raises:
        ValueError: it is larger than rounding in `dtype` explains.
    """
    error = np.abs(np.asarray(ours, np.float64) - theirs) / np.std(theirs)
    found = {"largest": float(error.max()), "rms": float(np.sqrt(np.mean(error**2)))}
    if not found["rms"] < LIMITS[dtype]:
        raise ValueError(
            f"{what}: ours and PyTorch's differ by {found['rms']:.2g} deviations in {dtype} "
            f"(limit {LIMITS[dtype]:g}): they are not the same function"
        )
    return found


def run(arguments: Any) -> dict[str, Any]:
    """Measure; the report."""
    config = load_config(arguments.config, arguments.overrides)
    network = programs.networks(config)["unet"]
    host = measuring.random_parameters(parameters.split(network)[1])
    inputs = draw_inputs(config, arguments.examples)
    values, *given = jax.device_put((host, *inputs), jax.devices()[0])
    compiled = compile_forward(config, network, values, tuple(given))
    output = np.asarray(compiled(values, *given))
    report: dict[str, Any] = {"memory": measuring.memory(compiled)}
    cases: dict[str, Callable[[], Any]] = {
        "jax": lambda: jax.block_until_ready(compiled(values, *given))
    }
    if arguments.against:
        from benchmarks import torch_unet  # PyTorch is optional and slow to import

        theirs = torch_unet.TorchUNet(
            network, host, config.model.views, config.compute_dtype,
            torch_unet.Options(arguments.compile, arguments.channels_last),
        )  # fmt: skip
        tensors = [theirs.input(x) for x in inputs]
        found = theirs.evaluate(*tensors)
        report["difference"] = check_equal(output, found, config.compute_dtype, "the UNet's output")
        report["torch"] = theirs.describe()
        cases["torch"] = functools.partial(theirs.evaluate, *tensors, fetch=False)
    report |= measuring.compare(cases, arguments.repeats, "forward")
    flops = arguments.examples * programs.forward_flops(config)
    for name, seconds in report["seconds"].items():
        report[f"{name}_speed"] = measuring.speed(
            flops, seconds["wall"]["median"], config.compute_dtype
        )
    return report


def main(argv: Sequence[str] | None = None) -> int:
    return measuring.main(measuring.parser("forward", __doc__, EXAMPLES), argv, run)


if __name__ == "__main__":
    cli.end(main())
