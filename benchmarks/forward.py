"""How long one evaluation of the multi-view UNet takes, also against plain PyTorch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import measuring
from launch import programs
from launch.compile import load_config
from spinmeround_jax import train
from spinmeround_jax.config import Config
from spinmeround_jax.models import parameters
from spinmeround_jax.models.attention import Execution
from spinmeround_jax.models.attention_kernels import best_for

EXAMPLES = """examples:
  # the paper's UNet on 8 views of 32x32 latents, float32, in turns with diffusers' modules
  python -m benchmarks.forward --config=configs/tpu_v4.py --config.model.image_size=256 \\
      --config.compute_dtype=float32 --against torch
"""
# Of the largest difference from PyTorch's output, in deviations of that output, by arithmetic.
LIMITS = {"float32": 1e-3, "bfloat16": 0.5}

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw_inputs(config: Config, examples: int) -> Arrays:
    """Of the UNet: x (b, v, h, w, c), c_noise (b,) and context (b, t, d), unit normal."""
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
    """How far apart the outputs of the two implementations are, in deviations of the reference's.

    Raises:
        ValueError: further than rounding in `dtype` explains, so that times would compare two things.
    """
    error = np.abs(np.asarray(ours, np.float64) - theirs) / np.std(theirs)
    found = {"largest": float(error.max()), "rms": float(np.sqrt(np.mean(error**2)))}
    if not found["largest"] < LIMITS[dtype]:
        raise ValueError(
            f"{what}: ours and PyTorch's differ by up to {found['largest']:.2g} deviations in {dtype}, "
            f"the limit is {LIMITS[dtype]:g}: they are not the same function"
        )
    return found


def run(arguments: Any) -> dict[str, Any]:
    """All figures of the report."""
    config = load_config(arguments.config, arguments.overrides)
    network = nnx.eval_shape(lambda: train.new_model(config).unet)
    host = measuring.random_parameters(parameters.split(network)[1])
    inputs = draw_inputs(config, arguments.examples)
    device = jax.devices()[0]
    values, *given = jax.device_put((host, *inputs), device)
    compiled = compile_forward(config, network, values, tuple(given))
    output = np.asarray(compiled(values, *given))
    report: dict[str, Any] = {"memory": measuring.memory(compiled)}

    cases: dict[str, Callable[[], Any]] = {
        "jax": lambda: jax.block_until_ready(compiled(values, *given))
    }
    if arguments.against:
        from benchmarks import torch_unet  # PyTorch takes seconds and is not always there

        options = torch_unet.Options(arguments.compile, arguments.channels_last)
        theirs = torch_unet.TorchUNet(
            network, host, config.model.views, config.compute_dtype, options
        )
        tensors = [theirs.input(x) for x in inputs]
        found = theirs.evaluate(*tensors)
        report["difference"] = check_equal(output, found, config.compute_dtype, "the UNet's output")
        report["torch"] = theirs.describe()
        cases["torch"] = functools.partial(theirs.evaluate, *tensors, fetch=False)
    del host
    measured = measuring.in_turns(cases, arguments.repeats, "forward")
    flops = arguments.examples * programs.forward_flops(config)
    peak, of_what = measuring.peak_flops(config.compute_dtype)
    report |= {"flops": flops, "peak_flops": peak, "peak": of_what, "measured": measured}
    for name, rounds in measured.items():
        median = measuring.spread([round_["wall"] for round_ in rounds])["median"]
        report[f"{name}_flops_per_second"] = flops / median
    if "torch" in measured:
        report["torch_over_jax"] = measuring.ratios(measured["jax"], measured["torch"])
        report["torch_peak_bytes"] = theirs.peak_bytes()
    return report


def words(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [("arithmetic", f"{report['flops'] / 1e12:.3g} TFLOP")]
    if "torch" in report["measured"]:
        rows.append(("torch", report["torch"]))
        rows.append(("largest difference", f"{report['difference']['largest']:.1e} deviations"))
    rows += measuring.against_rows(report["measured"], report.get("torch_over_jax", {}))
    for name in report["measured"]:
        rate = report[f"{name}_flops_per_second"]
        rows.append(
            (f"{name}, FLOP/s", f"{rate / 1e12:.3g} T, {rate / report['peak_flops']:.0%} of peak")
        )
    rows.append(("peak", f"{report['peak_flops'] / 1e12:.3g} TFLOP/s: {report['peak']}"))
    rows += measuring.memory_rows(report["memory"])
    return measuring.table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measuring.parser("forward", __doc__, EXAMPLES)
    return measuring.main(parser, argv, run, words)


if __name__ == "__main__":
    sys.exit(main())
