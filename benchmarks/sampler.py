"""How long a head of 48 views takes, and how joint sampling compares with plain PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import measuring
from benchmarks.forward import check_equal
from launch import programs
from launch.compile import load_config
from spinmeround_jax import cameras, checkpoints, train
from spinmeround_jax.config import Config, SamplingConfig
from spinmeround_jax.diffusion import denoiser, schedules, view_groups
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.models import Model, parameters

EXAMPLES = """examples:
  # the shipped model; the first call compiles, the others must not
  python -m benchmarks.sampler --config=configs/quickstart.py --checkpoint weights/quickstart

  # the paper's model with random weights on a GPU, in turns with PyTorch: eight groups of views jointly
  python -m benchmarks.sampler --config=configs/h100.py --against torch --groups 8 --compile \\
      --out out/sampler.json

FLOP/s are those of the UNet alone over the time of everything, encoding and decoding too.
"""
_COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of JAX, one for each program


class Compilations:
    """Counts the programs that are compiled while this process lives."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, seconds: float, **_: Any) -> None:
        self.count += event == _COMPILED


class Stopwatch:
    """Seconds and examples of a call by step, from the pipeline's reports of progress."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.seconds: dict[str, float] = {}
        self.examples: dict[str, int] = {}
        self._last = time.perf_counter()

    def __call__(self, step: str, done: int, examples: int) -> None:
        self.examples[step] = examples
        self._note(step)

    def stop(self) -> None:
        """What came after the last report is decoding; encoding counts as the first step's."""
        self._note("decoding")

    def _note(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now


def load(arguments: Any) -> tuple[Config, Model, SamplingConfig]:
    """The config with the model that is measured, its networks, and how it is sampled.

    Raises:
        ValueError, OSError: there is no such config or checkpoint.
    """
    config = load_config(arguments.config, arguments.overrides)
    dtype = jnp.dtype(config.compute_dtype)
    sampling = config.sampling
    if arguments.checkpoint:
        model = checkpoints.load_model(arguments.checkpoint, dtype)
        config = dataclasses.replace(config, model=model.config)
        if not any(word.startswith("--config.sampling.") for word in arguments.overrides):
            sampling = checkpoints.describe(arguments.checkpoint).sampling
    else:
        networks = nnx.eval_shape(lambda: train.new_model(config).networks)
        model = Model(config.model, **{name: randomised(net) for name, net in networks.items()})
    return config, model, sampling


def randomised(network: nnx.Module) -> nnx.Module:
    """An abstract network with random parameters."""
    graphdef, shapes = parameters.split(network)
    return parameters.merge(graphdef, measuring.random_parameters(shapes))


# --------------------------------------------------------------------------------------------------
# Whole heads


def heads(
    config: Config, model: Model, sampling: SamplingConfig, arguments: Any
) -> tuple[Pipeline, dict[str, Any]]:
    """Portraits of random numbers through all steps, again and again."""
    compilations, watch = Compilations(), Stopwatch()
    pipeline = Pipeline(model, sampling, max_batch=arguments.groups, progress=watch)
    count, size = arguments.examples * jax.device_count(), config.model.image_size
    rng = np.random.default_rng(3)
    images = rng.uniform(-1.0, 1.0, (count, 1, size, size, 3)).astype(np.float32)
    identities = rng.standard_normal((count, 512), np.float32)
    identities /= np.linalg.norm(identities, axis=-1, keepdims=True)
    trajectory = cameras.turntable(arguments.views)

    calls: list[dict[str, Any]] = []
    for seed in range(1 + arguments.repeats):
        before, start = compilations.count, time.perf_counter()
        watch.start()
        pipeline.spin(images, identities, trajectory, np.full(count, seed))
        watch.stop()
        seconds = time.perf_counter() - start
        compiled = compilations.count - before
        calls.append({"seconds": seconds, "compiled": compiled, "steps": watch.seconds})
        print(f"call {seed + 1}: {seconds:.3g} s, {compiled} compilations", file=sys.stderr)

    one_view = dataclasses.replace(config, model=dataclasses.replace(config.model, views=1))
    joint = programs.forward_flops(config) / config.model.views
    joint_steps = 2 * sampling.steps - 1 if sampling.sampler == "heun" else sampling.steps
    each = config.model.views * joint_steps * (1 if sampling.guidance_scale == 1 else 2)
    evaluations = {
        step: examples * (sampling.normals_steps if step == "normals" else each)
        for step, examples in watch.examples.items()
    }
    flops = sum(
        n * (programs.forward_flops(one_view) if step == "normals" else joint)
        for step, n in evaluations.items()
    )
    later = measuring.spread([call["seconds"] for call in calls[1:]])
    steps = {
        step: measuring.spread([call["steps"][step] for call in calls[1:]])
        for step in calls[-1]["steps"]
    }
    return pipeline, {
        "heads": count,
        "views": arguments.views,
        "sampling": dataclasses.asdict(sampling),
        "first_call_seconds": calls[0]["seconds"],
        "later_call_seconds": later,
        "compilations": [call["compiled"] for call in calls],
        "step_seconds": steps,
        "seconds_per_head": later["median"] / count,
        "views_per_second": count * arguments.views / later["median"],
        "evaluations": evaluations,
        "flops": flops,
        "flops_per_second": flops / later["median"],
    }


# --------------------------------------------------------------------------------------------------
# The same in PyTorch


def against_torch(
    pipeline: Pipeline, config: Config, model: Model, arguments: Any
) -> dict[str, Any]:
    """Joint sampling of groups of views, in turns with a loop in PyTorch over the same network.

    Both start from zero instead of noise (temperature 0), so that both start alike; it takes as long.

    Raises:
        ValueError: the two give different samples.
    """
    from benchmarks import torch_unet  # PyTorch takes seconds and is not always there

    chosen = dataclasses.replace(pipeline.networks.sampling, temperature=0.0)
    if chosen.sampler != "euler":
        raise ValueError("--against torch: PyTorch's loop here is Euler's, sampling.sampler is not")
    ours = Pipeline(model, chosen, pipeline.networks.ablation, max_batch=arguments.groups)
    rng, groups, size = np.random.default_rng(4), arguments.groups, config.model.latent_size
    given = rng.standard_normal((groups, 1, size, size, config.model.latent_channels), np.float32)
    identities = rng.standard_normal((groups, 512), np.float32)
    identities /= np.linalg.norm(identities, axis=-1, keepdims=True)
    context = ours.networks.contexts(identities, groups)
    front = np.zeros((1, 2), np.float32)
    run_ours = functools.partial(
        ours.sample_anchors, given, front, context, np.zeros(groups, np.uint32)
    )
    angles, sampled = run_ours()

    views = len(angles)
    observed = np.broadcast_to(np.arange(views) == 0, (groups, views))
    latents = np.zeros((groups, views, *given.shape[2:]), np.float32)
    latents[:, :1] = given
    poses = np.tile(cameras.orbit(angles[:, 0], angles[:, 1]), (groups, 1, 1, 1))
    conditional = denoiser.condition(
        jnp.asarray(context), jnp.asarray(observed), jnp.asarray(latents), jnp.asarray(poses),
        config.model.rays,
    )  # fmt: skip
    branches = [conditional]
    if chosen.guidance_scale != 1.0:
        empty = (jnp.asarray(x) for x in (ours.networks.empty_context, ours.networks.empty_latent))
        branches.insert(0, denoiser.unconditional(conditional, *empty))
    unet = nnx.eval_shape(lambda: train.new_model(config).unet)
    network = torch_unet.TorchUNet(
        unet, jax.device_get(parameters.split(model.unet)[1]), views, config.compute_dtype,
        torch_unet.Options(arguments.compile, arguments.channels_last),
    )  # fmt: skip
    sigmas = schedules.karras_sigmas(chosen.steps, chosen.sigma_min, chosen.sigma_max, chosen.rho)
    theirs = torch_unet.TorchSampler(
        network,
        [jax.device_get(branch) for branch in branches],
        np.asarray(sigmas),
        chosen.guidance_scale,
    )
    difference = check_equal(sampled, theirs.sample(), config.compute_dtype, "joint sampling")
    measured = measuring.in_turns(
        {"jax": run_ours, "torch": theirs.sample}, arguments.repeats, "against torch"
    )
    return {
        "torch": network.describe(),
        "groups": groups,
        "difference": difference,
        "measured": measured,
        "torch_over_jax": measuring.ratios(measured["jax"], measured["torch"]),
        "torch_peak_bytes": network.peak_bytes(),
    }


# --------------------------------------------------------------------------------------------------
# Command line


def run(arguments: Any) -> dict[str, Any]:
    """All figures of the report."""
    config, model, sampling = load(arguments)
    if config.model.views <= view_groups.IN_GROUP:
        raise ValueError(f"config.model.views is {config.model.views}, sampling needs at least 4")
    pipeline, report = heads(config, model, sampling, arguments)
    peak, of_what = measuring.peak_flops(config.compute_dtype)
    report |= {"peak_flops": peak, "peak": of_what, "memory": measuring.seen_memory()}
    report["mfu"] = report["flops_per_second"] / peak
    if arguments.against:
        report["against"] = against_torch(pipeline, config, model, arguments)
    return report


def words(report: dict[str, Any]) -> str:
    """The report as a table."""
    first, *later = report["compilations"]
    evaluations = ", ".join(f"{step} {n:,}" for step, n in report["evaluations"].items())
    rate = report["flops_per_second"]
    rows = [
        ("heads of a call", f"{report['heads']} of {report['views']} views"),
        ("first call", f"{report['first_call_seconds']:.3g} s, {first} compilations"),
        ("later calls", measuring.seconds(report["later_call_seconds"])),
        ("compilations in later calls", f"{sum(later)}"),
        *((f"of it {step}", measuring.seconds(s)) for step, s in report["step_seconds"].items()),
        ("seconds per head", f"{report['seconds_per_head']:.3g}"),
        ("views/s", f"{report['views_per_second']:.3g}"),
        ("evaluations of the UNet (views)", evaluations),
        ("arithmetic of the UNet", f"{report['flops'] / 1e12:.3g} TFLOP"),
        ("FLOP/s", f"{rate / 1e12:.3g} T"),
        ("MFU", f"{report['mfu']:.1%} of {report['peak_flops'] / 1e12:.3g} T: {report['peak']}"),
        *measuring.memory_rows(report["memory"]),
    ]
    if against := report.get("against"):
        rows.append(("torch", against["torch"]))
        rows.append(("joint samples at once", f"{against['groups']}"))
        rows.append(("largest difference", f"{against['difference']['largest']:.1e} deviations"))
        rows += measuring.against_rows(against["measured"], against["torch_over_jax"])
    return measuring.table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measuring.parser("sampler", __doc__, EXAMPLES, what="heads of a call")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="a model (random parameters)")
    parser.add_argument("--views", type=int, default=48, help="of a head (48)")
    parser.add_argument(
        "--groups", type=int, default=8, help="of views in one call of the UNet, per device (8)"
    )
    return measuring.main(parser, argv, run, words)


if __name__ == "__main__":
    sys.exit(main())
