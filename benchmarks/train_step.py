"""How long a training step takes, where its time goes, and how that compares with plain PyTorch."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks import measuring
from launch import programs
from launch.compile import load_config
from spinmeround_jax import cameras, sharding, train
from spinmeround_jax.config import Config
from spinmeround_jax.data.batch import Batch
from spinmeround_jax.diffusion import preconditioning, schedules
from spinmeround_jax.diffusion.denoiser import condition
from spinmeround_jax.diffusion.loss import diffusion_loss
from spinmeround_jax.models import parameters
from spinmeround_jax.training import latents, loop, optim
from spinmeround_jax.training import step as diffusion_step

EXAMPLES = """examples:
  # latents of random numbers, no data needed; then with the real loader, from pictures
  python -m benchmarks.train_step --config=configs/quickstart.py --examples 4
  python -m benchmarks.train_step --config=configs/quickstart.py --examples 4 --data data/heads64

  # the paper's model on one GPU, in turns with PyTorch
  python -m benchmarks.train_step --config=configs/h100.py --config.mesh.fsdp=1 --examples 4 \\
      --against torch --compile --out out/train_step.json

MFU counts three forward passes of the UNet for a step (and one of the encoder, where there are pictures),
whatever is computed again; all times are of this process alone.
"""
# Of the relative difference of loss and gradient norm from PyTorch's, by arithmetic.
LIMITS = {"float32": 1e-3, "bfloat16": 5e-2}

Tree = Any


@dataclasses.dataclass
class Training:
    """A compiled step and what it works on; nothing is read from disk.

    Attributes:
        state: donated to the step, and replaced by what it returns.
        metrics: of the last step.
    """

    config: Config
    mesh: Mesh
    graphdefs: dict[str, nnx.GraphDef]
    step: jax.stages.Compiled
    state: optim.TrainState
    frozen: Tree
    batch: Batch
    compile_seconds: float
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def run(self, placed: Batch) -> None:
        """One step, which may still be under way afterwards."""
        self.state, self.metrics = self.step(self.state, self.frozen, placed)

    def run_to_end(self, placed: Batch) -> None:
        self.run(placed)
        jax.block_until_ready((self.state, self.metrics))


def prepare(config: Config, pictures: bool) -> Training:
    """A new model with random parameters, and a batch of random numbers.

    Args:
        pictures: batches hold pictures, which the step encodes; otherwise latents.

    Raises:
        ValueError: the devices, the batch and the config do not fit together.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(mesh, config.optimizer.batch_size, config.accumulation)
    sharding.check_views(mesh, config.model.views)
    networks = nnx.eval_shape(lambda: train.new_model(config).networks)
    graphdefs = {name: parameters.split(network)[0] for name, network in networks.items()}
    trained = ("unet", "identity") if config.train_identity_encoder else ("unet",)
    needed = set(networks) if pictures else {"unet", "identity"}
    values = {
        name: measuring.random_parameters(parameters.split(networks[name])[1])
        for name in sorted(needed)
    }
    transform = optim.optimizer(config.optimizer, sum(stage.steps for stage in config.stages))

    def init(params: Tree) -> optim.TrainState:
        return optim.init(params, transform)

    params = {name: values.pop(name) for name in trained}
    placement = sharding.state_shardings(mesh, jax.eval_shape(init, params))
    state = jax.jit(init, out_shardings=placement)(params)
    size, channels = config.model.latent_size, config.model.latent_channels
    frozen = {"networks": values, "empty_latent": np.zeros((size, size, channels), np.float32)}
    frozen = jax.device_put(frozen, sharding.replicated(mesh))
    batch = random_batch(config, pictures)
    step = jax.jit(
        diffusion_step.make_step(config, graphdefs, transform, mesh),
        donate_argnums=0,
        out_shardings=(placement, None),
    )
    start = time.perf_counter()
    compiled = step.lower(state, frozen, sharding.global_batch(mesh, batch)).compile()
    seconds = time.perf_counter() - start
    return Training(config, mesh, graphdefs, compiled, state, frozen, batch, seconds)


def random_batch(config: Config, pictures: bool) -> Batch:
    """This process's share of a batch as the loader makes them: one view is observed."""
    rng = np.random.default_rng(2 + jax.process_index())
    shapes = programs.abstract_batch(config, cached=not pictures)
    b, v = shapes.observed.shape
    b //= jax.process_count()
    identities = rng.standard_normal((b, 512), np.float32)
    values = {}
    for name in ("images", "normals", "moments"):
        if (shape := getattr(shapes, name)) is not None:
            values[name] = rng.uniform(-1.0, 1.0, (b, *shape.shape[1:])).astype(np.float32)
    return Batch(
        observed=np.broadcast_to(np.arange(v) == 0, (b, v)).copy(),
        dropped=np.zeros(b, bool),
        identity_dropped=np.zeros(b, bool),
        id_embedding=identities / np.linalg.norm(identities, axis=-1, keepdims=True),
        world_to_camera=np.tile(cameras.orbit(np.linspace(0.0, 315.0, v)), (b, 1, 1, 1)).astype(
            np.float32
        ),
        **values,
    )


# --------------------------------------------------------------------------------------------------
# Where the time goes


def breakdown(training: Training, batches: Iterator[Batch], repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each part, waiting for one to end before the next begins."""
    parts: dict[str, list[float]] = {"loader": [], "transfer": [], "step": []}
    for _ in range(repeats):
        times = [time.perf_counter()]
        batch = next(batches)
        times.append(time.perf_counter())
        placed = jax.block_until_ready(sharding.global_batch(training.mesh, batch))
        times.append(time.perf_counter())
        training.run_to_end(placed)
        times.append(time.perf_counter())
        for name, seconds in zip(parts, np.diff(times), strict=True):
            parts[name].append(float(seconds))
    return parts


def as_trained(training: Training, batches: Iterator[Batch], repeats: int) -> float:
    """Seconds per step when loading, transfer and arithmetic overlap as in `loop.run`."""
    recent: collections.deque[Tree] = collections.deque()
    start = time.perf_counter()
    for _ in range(repeats):
        training.run(sharding.global_batch(training.mesh, next(batches)))
        recent.append(training.metrics)
        if len(recent) > loop.QUEUED_STEPS:
            jax.block_until_ready(recent.popleft())
    jax.block_until_ready((training.state, training.metrics))
    return (time.perf_counter() - start) / repeats


def always(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


# --------------------------------------------------------------------------------------------------
# The same in PyTorch


def what_the_network_sees(training: Training) -> dict[str, np.ndarray]:
    """The first step's draws, made as `diffusion_step` makes them, for another implementation.

    The loss is then mean over target views of (F(x; c_noise, context) - target)^2. Returns x
    (b, v, h, w, in), c_noise (b,), context (b, t, d), target (b, v, h, w, c) and observed (b, v).
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
        batch, config.model, training.graphdefs["autoencoder"], networks.get("autoencoder"), draw
    )
    identity = parameters.merge(training.graphdefs["identity"], networks["identity"])
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
    # D = c_skip x + c_out F is `clean` for this F; the loss weighs by 1 / c_out^2.
    target = (clean - preconditioning.c_skip(level) * noisy) / preconditioning.c_out(level)
    seen |= {"target": target, "observed": batch.observed}
    return {name: np.asarray(value) for name, value in seen.items()}


def against_torch(training: Training, arguments: Any) -> dict[str, Any]:
    """Steps in turns with PyTorch's, after a comparison of the first one's loss and gradient."""
    from benchmarks import torch_unet  # PyTorch takes seconds and is not always there

    config = training.config
    problem = what_the_network_sees(training)
    unet = nnx.eval_shape(lambda: train.new_model(config).unet)
    theirs = torch_unet.TorchTraining(
        torch_unet.TorchUNet(
            unet,
            jax.device_get(training.state.params["unet"]),
            config.model.views,
            config.compute_dtype,
            torch_unet.Options(arguments.compile, arguments.channels_last),
            trained=True,
        ),
        config.optimizer,
        problem,
    )
    placed = sharding.global_batch(training.mesh, training.batch)
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
    measured = measuring.in_turns(
        {"jax": lambda: training.run_to_end(placed), "torch": theirs.step},
        arguments.repeats,
        "against torch",
    )
    return {
        "torch": theirs.unet.describe(),
        "compared": compared,
        "measured": measured,
        "torch_over_jax": measuring.ratios(measured["jax"], measured["torch"]),
        "torch_peak_bytes": theirs.unet.peak_bytes(),
    }


# --------------------------------------------------------------------------------------------------
# Command line


def run(arguments: Any) -> dict[str, Any]:
    """All figures of the report."""
    config = load_config(arguments.config, arguments.overrides)
    config = programs.with_batch(config, jax.device_count(), arguments.examples)
    if arguments.against:
        if jax.device_count() > 1 or arguments.data:
            raise ValueError("--against torch is for one device and without --data")
        # What PyTorch is given is the UNet.
        config = dataclasses.replace(config, train_identity_encoder=False)
    pictures = arguments.pictures or bool(arguments.data and not arguments.latents)
    training = prepare(config, pictures)
    report: dict[str, Any] = {"compile_seconds": training.compile_seconds}
    if arguments.against:  # first, as it needs the parameters before any step
        report["against"] = against_torch(training, arguments)
    else:
        training.run_to_end(sharding.global_batch(training.mesh, training.batch))
    with contextlib.ExitStack() as stack:
        batches = always(training.batch)
        if arguments.data:
            here = dataclasses.replace(config.data, directory=str(arguments.data))
            loader = train.open_loader(
                dataclasses.replace(config, data=here), str(arguments.latents or "")
            )
            batches = stack.enter_context(contextlib.closing(loader))
            if loader.image_size != config.model.image_size:
                raise ValueError(
                    f"{arguments.data} has pictures of {loader.image_size} pixels, the config says "
                    f"{config.model.image_size}"
                )
            next(batches)  # starts workers, opens files
        parts = breakdown(training, batches, arguments.repeats)
        overlapped = as_trained(training, batches, arguments.repeats)
    examples = config.optimizer.batch_size
    flops = 3.0 * programs.forward_flops(config) * examples
    flops += programs.encoder_flops(config) * examples if pictures else 0.0
    peak, of_what = measuring.peak_flops(config.compute_dtype)
    return report | {
        "batch": {"examples": examples, "views": config.model.views, "pictures": pictures},
        "seconds_per_step": {
            **{name: measuring.spread(seconds) for name, seconds in parts.items()},
            "as trained": overlapped,
        },
        "examples_per_second": examples / overlapped,
        "flops_per_step": flops,
        "flops_per_second": flops / overlapped,
        "peak_flops": peak,
        "peak": of_what,
        "mfu": flops / overlapped / peak,
        "memory": measuring.memory(training.step),
    }


def words(report: dict[str, Any]) -> str:
    """The report as a table."""
    batch, seconds = report["batch"], report["seconds_per_step"]
    rate = report["flops_per_second"]
    kind = "pictures" if batch["pictures"] else "latents"
    rows = [
        ("batch", f"{batch['examples']} examples of {batch['views']} views, {kind}"),
        ("compilation", f"{report['compile_seconds']:.1f} s"),
        *((f"{name} alone", measuring.seconds(seconds[name])) for name in list(seconds)[:3]),
        ("a step as trained, all overlapped", f"{seconds['as trained']:.3g} s"),
        ("examples/s", f"{report['examples_per_second']:.3g}"),
        ("arithmetic of a step", f"{report['flops_per_step'] / 1e12:.3g} TFLOP"),
        ("FLOP/s", f"{rate / 1e12:.3g} T"),
        ("MFU", f"{report['mfu']:.1%} of {report['peak_flops'] / 1e12:.3g} T: {report['peak']}"),
        *measuring.memory_rows(report["memory"]),
    ]
    if against := report.get("against"):
        rows.append(("torch", against["torch"]))
        for name, value in against["compared"].items():
            rows.append((f"first {name}", f"{value['jax']:.6g}, torch {value['torch']:.6g}"))
        rows += measuring.against_rows(against["measured"], against["torch_over_jax"])
    return measuring.table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measuring.parser("train_step", __doc__, EXAMPLES)
    parser.add_argument("--data", type=pathlib.Path, help="the real loader, on this folder")
    parser.add_argument(
        "--latents", type=pathlib.Path, help="with --data: as data_prep.cache_latents wrote"
    )
    parser.add_argument(
        "--pictures", action="store_true", help="random pictures, encoded in the step"
    )
    return measuring.main(parser, argv, run, words)


if __name__ == "__main__":
    sys.exit(main())
