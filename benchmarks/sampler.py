"""Time the sampling of a head of 48 views, and joint sampling against PyTorch."""

from __future__ import annotations

import dataclasses
import functools
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
from launch import programs
from spinmeround_jax import cameras, checkpoints, cli
from spinmeround_jax.config import Config, SamplingConfig, load_config
from spinmeround_jax.diffusion import denoiser, schedules, view_groups
from spinmeround_jax.diffusion.pipeline import Pipeline
from spinmeround_jax.models import Model, parameters
from spinmeround_jax.training import flops

EXAMPLES = """examples:
  # the shipped model; only the first call compiles
  python -m benchmarks.sampler --config=configs/quickstart.py --checkpoint weights/quickstart

  # the paper's model with random weights on a GPU, eight groups of views interleaved with PyTorch
  python -m benchmarks.sampler --config=configs/h100.py --against torch --groups 8 --compile \\
      --out out/sampler.json

FLOP/s count the UNet alone, over the time of everything, encoding and decoding included.
"""
_COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event of each compiled program


class Compilations:
    """Counts the programs that this process compiles."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, seconds: float, **_: Any) -> None:
        self.count += event == _COMPILED


class Stopwatch:
    """Seconds and examples by step of sampling, from the pipeline's progress reports."""

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
        """The time since the last report is decoding; encoding counts as part of the first step."""
        self._note("decoding")

    def _note(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now


def load(arguments: Any) -> tuple[Config, Model, SamplingConfig]:
    """The config with the measured model, its networks, and the settings of sampling.

    Raises:
        ValueError, OSError: the config or checkpoint does not exist.
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
        networks = programs.networks(config)
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
    """Sample heads from random portraits, repeatedly; the pipeline and the report."""
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
    joint = flops.of_unet(config) / config.model.views
    joint_steps = 2 * sampling.steps - 1 if sampling.sampler == "heun" else sampling.steps
    each = config.model.views * joint_steps * (1 if sampling.guidance_scale == 1 else 2)
    evaluations = {
        step: examples * (sampling.normals_steps if step == "normals" else each)
        for step, examples in watch.examples.items()
    }
    needed = sum(
        n * (flops.of_unet(one_view) if step == "normals" else joint)
        for step, n in evaluations.items()
    )
    later = measuring.spread([call["seconds"] for call in calls[1:]])
    return pipeline, {
        "heads": count,
        "views": arguments.views,
        "sampling": dataclasses.asdict(sampling),
        "first_call_seconds": calls[0]["seconds"],
        "later_call_seconds": later,
        "compilations": [call["compiled"] for call in calls],
        "step_seconds": {
            step: measuring.spread([call["steps"][step] for call in calls[1:]])
            for step in watch.seconds
        },
        "seconds_per_head": later["median"] / count,
        "view_evaluations": evaluations,
        "speed": measuring.speed(needed, later["median"], config.compute_dtype),
        "memory": measuring.seen_memory(),
    }


# --------------------------------------------------------------------------------------------------
# The same in PyTorch


def against_torch(
    pipeline: Pipeline, config: Config, model: Model, arguments: Any
) -> dict[str, Any]:
    """Joint sampling of groups of views, interleaved with a loop in PyTorch over the same network.

    Both start from zero (temperature 0) instead of noise, and so from the same latents.

    Raises:
        ValueError: the two give different samples.
    """
    from benchmarks import torch_unet  # PyTorch is optional and slow to import

    chosen = dataclasses.replace(pipeline.networks.sampling, temperature=0.0)
    if chosen.sampler != "euler":
        raise ValueError("--against torch: the loop in PyTorch is Euler's, config.sampling is not")
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
    network = torch_unet.TorchUNet(
        programs.networks(config)["unet"], jax.device_get(parameters.split(model.unet)[1]), views,
        config.compute_dtype, torch_unet.Options(arguments.compile, arguments.channels_last),
    )  # fmt: skip
    sigmas = schedules.karras_sigmas(chosen.steps, chosen.sigma_min, chosen.sigma_max, chosen.rho)
    theirs = torch_unet.TorchSampler(
        network,
        [jax.device_get(branch) for branch in branches],
        np.asarray(sigmas),
        chosen.guidance_scale,
    )
    difference = measuring.check_equal(
        sampled, theirs.sample(), config.compute_dtype, "joint sampling"
    )
    compared = measuring.compare(
        {"jax": run_ours, "torch": theirs.sample}, arguments.repeats, "against torch"
    )
    return {
        "torch": network.describe(), "groups": groups, "difference": difference, **compared,
        "torch_peak_bytes": network.peak_bytes(),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Command line


def run(arguments: Any) -> dict[str, Any]:
    """Measure; the report."""
    config, model, sampling = load(arguments)
    if config.model.views <= view_groups.IN_GROUP:
        raise ValueError(f"config.model.views is {config.model.views}, sampling needs at least 4")
    pipeline, report = heads(config, model, sampling, arguments)
    if arguments.against:
        report["against"] = against_torch(pipeline, config, model, arguments)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = measuring.parser("sampler", __doc__, EXAMPLES, what="heads of a call")
    parser.add_argument("--checkpoint", metavar="MODEL", help="a model (random parameters)")
    parser.add_argument("--views", type=int, default=48, help="of a head (48)")
    parser.add_argument(
        "--groups", type=int, default=8, help="of views in one call of the UNet, per device (8)"
    )
    return measuring.main(parser, argv, run)


if __name__ == "__main__":
    cli.end(main())
