"""Time a training step and its parts, also against PyTorch."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from launch import programs
from spinmeround_jax import cameras, cli, sharding, train
from spinmeround_jax.config import Config, load_config
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.diffusion import preconditioning, schedules
from spinmeround_jax.diffusion.denoiser import condition
from spinmeround_jax.diffusion.loss import diffusion_loss
from spinmeround_jax.models import parameters
from spinmeround_jax.training import flops, latents, loop, optim

EXAMPLES = """examples:
  # random latents, no data needed; then with the real loader, from images
  python -m benchmarks.train_step --config=configs/quickstart.py --examples 4
  python -m benchmarks.train_step --config=configs/quickstart.py --examples 4 --data data/heads64

  # the paper's model on one GPU, interleaved with PyTorch
  python -m benchmarks.train_step --config=configs/h100.py --config.mesh.fsdp=1 --examples 4 \\
      --against torch --compile --out out/train_step.json

MFU counts three forward passes of the UNet per step (and one of the encoder, with images), and nothing that
is computed twice.
"""
# Largest allowed relative difference of loss and gradient norm from PyTorch's.
LIMITS = {"float32": 1e-3, "bfloat16": 5e-2}

Tree = Any


@dataclasses.dataclass
class Training:
    """A compiled step and its arguments, from random numbers.

    Attributes:
        state: donated to the step, and replaced by its result.
        metrics: of the last step.
    """

    config: Config
    program: programs.TrainStep
    step: jax.stages.Compiled
    compile_seconds: float
    state: optim.TrainState
    frozen: Tree
    batch: Batch
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def place(self, batch: Batch) -> Batch:
        """On the devices."""
        return sharding.global_batch(self.program.mesh, batch)

    def run(self, placed: Batch) -> None:
        """One step; it may still be running afterwards."""
        self.state, self.metrics = self.step(self.state, self.frozen, placed)

    def run_to_end(self, placed: Batch) -> None:
        self.run(placed)
        jax.block_until_ready((self.state, self.metrics))


def prepare(config: Config, images: bool) -> Training:
    """A new model with random parameters, and a random batch.

    Args:
        images: batches hold images, which the step encodes; otherwise latents.

    Raises:
        ValueError: the devices, the batch and the config do not fit together.
    """
    program = programs.train_step(config, jax.devices(), cached=not images)
    start = time.perf_counter()
    step = program.step.lower(program.state, program.frozen, program.batch).compile()
    seconds = time.perf_counter() - start
    params = {
        name: measuring.random_parameters(shapes) for name, shapes in program.state.params.items()
    }
    placement = jax.tree.map(lambda x: x.sharding, program.state)
    state = jax.jit(lambda params: optim.init(params, program.transform), out_shardings=placement)(
        params
    )
    networks = program.frozen["networks"]
    frozen = {
        "networks": {name: measuring.random_parameters(x) for name, x in networks.items()},
        "empty_latent": np.zeros(program.frozen["empty_latent"].shape, np.float32),
    }
    frozen = jax.device_put(frozen, sharding.replicated(program.mesh))
    return Training(config, program, step, seconds, state, frozen, random_batch(program.batch))


def random_batch(shapes: Batch) -> Batch:
    """This process's share of a global batch of these shapes; one view of each example is observed."""
    rng = np.random.default_rng(2 + jax.process_index())
    b, v = shapes.observed.shape
    b //= jax.process_count()
    identities = rng.standard_normal((b, 512), np.float32)
    values = {}
    for name in ("images", "normals", "moments"):
        if (shape := getattr(shapes, name)) is not None:
            values[name] = rng.uniform(-1.0, 1.0, (b, *shape.shape[1:])).astype(np.float32)
    poses = cameras.orbit(np.linspace(0.0, 315.0, v)).astype(np.float32)
    return Batch(
        observed=np.broadcast_to(np.arange(v) == 0, (b, v)).copy(),
        dropped=np.zeros(b, bool),
        identity_dropped=np.zeros(b, bool),
        id_embedding=identities / np.linalg.norm(identities, axis=-1, keepdims=True),
        world_to_camera=np.tile(poses, (b, 1, 1, 1)),
        **values,
    )


# --------------------------------------------------------------------------------------------------
# Where the time goes


def breakdown(training: Training, batches: Iterator[Batch], repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each part, one after another."""
    parts: dict[str, list[float]] = {"loader": [], "transfer": [], "step": []}
    for _ in range(repeats):
        times = [time.perf_counter()]
        batch = next(batches)
        times.append(time.perf_counter())
        placed = jax.block_until_ready(training.place(batch))
        times.append(time.perf_counter())
        training.run_to_end(placed)
        times.append(time.perf_counter())
        for name, seconds in zip(parts, np.diff(times), strict=True):
            parts[name].append(float(seconds))
    return parts


def as_trained(training: Training, batches: Iterator[Batch], repeats: int) -> float:
    """Seconds per step when loading, transfer and arithmetic overlap, as in `loop.run`."""
    recent: collections.deque[Tree] = collections.deque()
    start = time.perf_counter()
    for _ in range(repeats):
        training.run(training.place(next(batches)))
        recent.append(training.metrics)
        if len(recent) > loop.QUEUED_STEPS:
            jax.block_until_ready(recent.popleft())
    jax.block_until_ready((training.state, training.metrics))
    return (time.perf_counter() - start) / repeats


# --------------------------------------------------------------------------------------------------
# The same in PyTorch


def what_the_network_sees(training: Training) -> dict[str, np.ndarray]:
    """The random numbers of the first step, as `diffusion_step` draws them, for another implementation.

    The loss is the mean over target views of (F(x; c_noise, context) - target)^2. Returns x (b, v, h, w, in),
    c_noise (b,), context (b, t, d), target (b, v, h, w, c) and observed (b, v).
    """
    config, batch = training.config, jax.tree.map(jnp.asarray, training.batch)
    key = optim.step_key(config.seed, 1, jnp.zeros((), jnp.int32))
    sigma_key, noise_key, posterior_key = jax.random.split(key, 3)
    targets = jnp.sum(~batch.observed, axis=1)
    sigma = schedules.lognormal_sigmas(
        sigma_key, targets.shape, config.noise.mean, config.noise.std, targets
    )
    shape = (*batch.observed.shape, *training.frozen["empty_latent"].shape)
    noise = jax.random.normal(noise_key, shape)
    draw = jax.random.normal(posterior_key, shape) if config.latents.sample else None
    networks = training.frozen["networks"]
    clean = latents.of_batch(
        batch,
        config.model,
        training.program.graphdefs["autoencoder"],
        networks.get("autoencoder"),
        draw,
    )
    identity = parameters.merge(training.program.graphdefs["identity"], networks["identity"])
    conditioning = condition(
        identity(batch.id_embedding), batch.observed, clean, batch.world_to_camera,
        config.model.rays,
    )  # fmt: skip
    seen: dict[str, jax.Array] = {}

    def network(x: jax.Array, c_noise: jax.Array, context: jax.Array) -> jax.Array:
        seen.update(x=x, c_noise=c_noise, context=context)
        return jnp.zeros(clean.shape)

    diffusion_loss(network, clean, sigma, noise, conditioning)
    level = sigma[:, None, None, None, None]
    noisy = clean + level * noise
    # D = c_skip x + c_out F equals `clean` for this F; the loss is weighted by 1 / c_out^2.
    target = (clean - preconditioning.c_skip(level) * noisy) / preconditioning.c_out(level)
    seen |= {"target": target, "observed": batch.observed}
    return {name: np.asarray(value) for name, value in seen.items()}


def against_torch(training: Training, arguments: Any) -> dict[str, Any]:
    """Steps interleaved with PyTorch's, after comparing loss and gradient norm of the first one."""
    from benchmarks import torch_unet  # PyTorch is optional and slow to import

    config = training.config
    problem = what_the_network_sees(training)
    theirs = torch_unet.TorchTraining(
        torch_unet.TorchUNet(
            programs.networks(config)["unet"],
            jax.device_get(training.state.params["unet"]),
            config.model.views,
            config.compute_dtype,
            torch_unet.Options(arguments.compile, arguments.channels_last),
            trained=True,
        ),
        config.optimizer,
        problem,
    )
    placed = training.place(training.batch)
    training.run_to_end(placed)
    found = theirs.step()
    compared = {}
    for name, value in found.items():
        ours = float(training.metrics[name])
        compared[name] = {"jax": ours, "torch": value}
        if not abs(ours - value) < LIMITS[config.compute_dtype] * abs(value):
            raise ValueError(
                f"the first step's {name} is {ours:.6g} here and {value:.6g} in PyTorch: they are not "
                "the same step"
            )
    timed = measuring.compare(
        {"jax": lambda: training.run_to_end(placed), "torch": theirs.step},
        arguments.repeats,
        "against torch",
    )
    return {
        "torch": theirs.unet.describe(), "first_step": compared, **timed,
        "torch_peak_bytes": theirs.unet.peak_bytes(),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Command line


def run(arguments: Any) -> dict[str, Any]:
    """Measure; the report."""
    config = load_config(arguments.config, arguments.overrides)
    config = programs.with_batch(config, jax.device_count(), arguments.examples)
    if arguments.against:
        if jax.device_count() > 1 or arguments.data:
            raise ValueError("--against torch is for one device and without --data")
        config = dataclasses.replace(config, train_identity_encoder=False)  # PyTorch has the UNet
    images = arguments.images or bool(arguments.data and not arguments.latents)
    training = prepare(config, images)
    placed = training.place(training.batch)
    examples = config.optimizer.batch_size
    report: dict[str, Any] = {
        "batch": {"examples": examples, "views": config.model.views, "images": images},
        "compile_seconds": training.compile_seconds,
    }
    if arguments.against:  # first, with the parameters before any step
        report["against"] = against_torch(training, arguments)
    else:
        training.run_to_end(placed)
    if arguments.profile:
        report["operations"] = measuring.largest_operations(lambda: training.run_to_end(placed))
    with contextlib.ExitStack() as stack:
        batches = itertools.repeat(training.batch)
        if arguments.data:
            batches = stack.enter_context(contextlib.closing(open_loader(config, arguments)))
            next(batches)  # starts workers, opens files
        parts = breakdown(training, batches, arguments.repeats)
        seconds = as_trained(training, batches, arguments.repeats)
    return report | {
        "seconds_per_step": {
            **{f"{name} alone": measuring.spread(values) for name, values in parts.items()},
            "as trained": seconds,
        },
        "examples_per_second": examples / seconds,
        "speed": measuring.speed(flops.of_step(config, images), seconds, config.compute_dtype),
        "memory": measuring.memory(training.step),
    }


def open_loader(config: Config, arguments: Any) -> Any:
    """The loader of training, on --data and --latents.

    Raises:
        ValueError: the images have another size than the config's.
    """
    here = dataclasses.replace(config.data, directory=str(arguments.data))
    loader = train.open_loader(dataclasses.replace(config, data=here), str(arguments.latents or ""))
    if loader.image_size != config.model.image_size:
        loader.close()
        raise ValueError(
            f"{arguments.data} has images of {loader.image_size} pixels, the config says "
            f"{config.model.image_size}"
        )
    return loader


def main(argv: Sequence[str] | None = None) -> int:
    parser = measuring.parser("train_step", __doc__, EXAMPLES)
    parser.add_argument("--data", type=pathlib.Path, help="the real loader, on this folder")
    parser.add_argument("--latents", type=pathlib.Path, help="with --data: cached latents")
    parser.add_argument("--images", action="store_true", help="random images, encoded in the step")
    parser.add_argument(
        "--profile", action="store_true", help="the ten largest operations, in --out"
    )
    return measuring.main(parser, argv, run)


if __name__ == "__main__":
    cli.end(main())
