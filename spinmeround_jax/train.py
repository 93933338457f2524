"""Train SpinMeRound: `python -m spinmeround_jax.train --help`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals(exit_code_option="--stopped_exit_code", code=0)

import argparse
import contextlib
import dataclasses
import logging
import pathlib
import platform
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from spinmeround_jax import checkpoints, cli, files, models, sharding
from spinmeround_jax.config import Config, load_config
from spinmeround_jax.data import latent_cache
from spinmeround_jax.data import loader as data_loader
from spinmeround_jax.data.manifest import training_provenance
from spinmeround_jax.diffusion.denoiser import deny_normals, standardise
from spinmeround_jax.diffusion.samplers import SAMPLERS
from spinmeround_jax.models import Autoencoder, Model, parameters
from spinmeround_jax.models.unet import REMAT
from spinmeround_jax.training import distributed, flops, held_out_loss, loop, optim, previews
from spinmeround_jax.training.autoencoder import train_autoencoder
from spinmeround_jax.training.run_checkpoints import Checkpoints
from spinmeround_jax.training.run_log import RunLog
from spinmeround_jax.training.step import make_step
from spinmeround_jax.weights import remote

DESCRIPTION = """Train SpinMeRound, or resume training.

SIGTERM or Ctrl-C, to any process, finishes the step, writes a checkpoint and exits with 0; the same command
resumes. The finished model is in <workdir>/model. <workdir>/report.html shows curves and samples, also while
the run goes on; <workdir>/tensorboard (`tensorboard --logdir`) holds them too."""

EXAMPLES = """examples:
  # the small model, on one CPU or GPU, into runs/quickstart:
  python -m spinmeround_jax.train --config=configs/quickstart.py

  # any value of the config can be overridden; elements of a tuple by index
  python -m spinmeround_jax.train --config=configs/quickstart.py --workdir=/tmp/run \\
      --config.optimizer.batch_size=4 --config.ablation.no_normals=True --config.stages[0].steps=1000

  # the same command on every host of a TPU pod or SLURM job; elsewhere, on each host n of N:
  python -m spinmeround_jax.train --config=configs/h100.py --workdir=/shared/run \\
      --coordinator=HOST:PORT --process_count=N --process_id=n        (docs/launching.md)

  # after a loss that is not finite: a lower learning rate, from an earlier checkpoint, without that batch;
  # checkpoints and model record the changes
  python -m spinmeround_jax.train --config=configs/quickstart.py --config.optimizer.learning_rate=5e-4 \\
      --from_step=8000 --skip_steps 8123"""

Tree = Any

# --------------------------------------------------------------------------------------------------
# The run


def train(
    config: Config,
    workdir: pathlib.Path,
    from_step: int | None = None,
    skip_steps: Collection[int] = (),
    profile: tuple[int, int] | None = None,
) -> pathlib.Path:
    """Train, or resume training.

    A run may be resumed with other settings of the optimizer and other stages after its step, also with more
    steps after its end; its checkpoints and its model record the changes.

    Args:
        from_step: step of a kept checkpoint of the diffusion model to go back to; only done once, however
            often the run is resumed with it.
        skip_steps: steps of the diffusion model, counted from 0, whose batches are skipped.
        profile: first step to trace and the one after the last, of the diffusion model, counted from 0 where
            this call starts or resumes it.

    Returns:
        The folder of the finished model, for `checkpoints.load_model`.

    Raises:
        loop.Preempted: after SIGTERM or SIGINT; call again to resume.
        loop.NotFiniteError: the loss is NaN or infinite.
        ValueError: the config does not fit itself, the data or the run in `workdir`.
    """
    # -- Devices
    mesh = sharding.make_mesh(config.mesh)
    main_process = jax.process_index() == 0
    check(config, mesh)
    if remote.is_remote(config.init_from):  # a resumed run starts from the same revision
        config = dataclasses.replace(config, init_from=remote.locate(config.init_from).origin)

    # -- Data
    steps = sum(stage.steps for stage in config.stages)
    loader = open_loader(config, latents="")  # now, so that faults appear before the autoencoder
    if loader.image_size != config.model.image_size:
        raise ValueError(
            f"config.model.image_size is {config.model.image_size}, the images in "
            f"{config.data.directory} have {loader.image_size} pixels"
        )

    # -- Networks: pretrained, or an autoencoder trained here and the others new
    pretrained = load_pretrained(config) if config.init_from else None
    workdir.mkdir(parents=True, exist_ok=True)
    log = RunLog(workdir, config) if main_process else None
    if pretrained:
        autoencoder = pretrained.autoencoder
        mean, std = pretrained.config.latent_mean, pretrained.config.latent_std
    else:
        autoencoder, mean, std = train_autoencoder(config, workdir, mesh, log)
    if not config.model.latent_std:
        model = dataclasses.replace(config.model, latent_mean=mean, latent_std=std)
        config = dataclasses.replace(config, model=model)
    if config.latents.directory:
        # Many hosts would write the same files: for them data_prep.cache_latents does it before.
        cache = latent_cache.cache_latents if jax.process_count() == 1 else latent_cache.check_cache
        frame = config.model.normals_frame
        cached = latent_cache.folder(config.latents.directory, autoencoder, frame)
        cache(
            autoencoder, cached, config.data.directory,
            backgrounds=config.latents.backgrounds, normals_frame=frame,
        )  # fmt: skip
        loader.close()
        loader = open_loader(config, str(cached))
    graphdefs, frozen = freeze(config, autoencoder, pretrained, mesh)

    # -- State: shapes first, then where each array lives, then the values
    transform = optim.optimizer(config.optimizer, steps)

    def init(params: Tree = None) -> optim.TrainState:
        return optim.init(params or trained_part(config, new_model(config)), transform)

    abstract = jax.eval_shape(init)
    placement = sharding.state_shardings(mesh, abstract)
    saved = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, config=config)
    if from_step is not None:
        saved.go_back(from_step)
    if (latest := saved.latest()) is not None:
        if latest > steps:
            raise ValueError(
                f"{workdir}: is at step {latest}, and config.stages end at {steps}; add "
                "steps, or go back with --from_step"
            )
        state = saved.restore(sharding.abstract(abstract, placement), loader)
        for entry in saved.history if main_process else ():
            print(f"from step {entry['step']}: {entry['change']}")
    elif pretrained:
        # Through the host: the loaded arrays are on one device, the state is on all.
        pretrained_params = jax.device_get(trained_part(config, pretrained))
        state = jax.jit(init, out_shardings=placement)(pretrained_params)
    else:
        state = jax.jit(init, out_shardings=placement)()
    del pretrained
    for step in sorted(skip_steps):
        if step >= int(state.step):
            saved.note(step, "its batch is passed over")
    if main_process:
        print(describe(config, state, mesh), flush=True)

    # -- Step
    step_fn = jax.jit(
        make_step(config, graphdefs, transform, mesh),
        donate_argnums=0,
        out_shardings=(placement, None),
    )

    # -- Previews
    subjects = previews.held_out(config, count=4)

    def on_sample(state: optim.TrainState, step: int) -> None:
        params = sharding.gathered({**frozen["networks"], **state.ema}, mesh)
        if log is not None:
            log.image("anchors", step, previews.anchors(graphdefs, params, config, subjects))

    # -- Held-out heads
    losses = held_out_loss.fixed_losses(config, graphdefs, frozen, mesh)

    def on_evaluate(state: optim.TrainState) -> dict[str, float]:
        return losses({**frozen["networks"], **state.ema})

    # -- Loop
    with contextlib.closing(loader):
        state = loop.run(
            "diffusion",
            lambda state, batch: step_fn(state, frozen, batch),
            state,
            loader,
            saved,
            mesh=mesh,
            steps=steps,
            batch_size=config.optimizer.batch_size,
            cadence=loop.Cadence.of(config),
            log=log,
            on_evaluate=on_evaluate,
            on_sample=on_sample,
            learning_rate=optim.learning_rate(config.optimizer, steps),
            step_flops=flops.of_step(config, images=not config.latents.directory),
            skip=skip_steps,
            profile=profile and loop.Profile(*profile, workdir / "tensorboard"),
        )
    saved.close()

    # -- The model, with averaged weights
    params = {**frozen["networks"], **state.ema}
    networks = {name: parameters.merge(graphdefs[name], params[name]) for name in graphdefs}
    provenance = {
        "command": shlex.join(["python", "-m", "spinmeround_jax.train", *sys.argv[1:]]),
        "hardware": hardware(),
        **training_provenance(config, steps, saved.history),
    }
    # Its checkpoint is kept: after a kill in between the same command writes the model again.
    model = Model(config.model, **networks)
    checkpoints.save_model(workdir / "model", model, provenance, overwrite=True)
    if log is not None:
        log.close()
        print(f"The model is in {workdir / 'model'}")
    return workdir / "model"


def open_loader(config: Config, latents: str) -> data_loader.Loader:
    return data_loader.make_loader(
        config.data,
        config.stages,
        config.optimizer.batch_size,
        config.model.views,
        config.seed,
        config.model.normals_frame,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        latents=latents,
    )


# --------------------------------------------------------------------------------------------------
# Networks


def check(config: Config, mesh: Mesh) -> None:
    """Raises ValueError if values of the config are invalid or do not fit together."""
    for name, value, choices in (
        ("compute_dtype", config.compute_dtype, ("float32", "bfloat16")),
        ("sampling.sampler", config.sampling.sampler, tuple(SAMPLERS)),
        ("model.rays", config.model.rays, ("true", "released")),
        ("model.normals_frame", config.model.normals_frame, ("camera", "world")),
        ("remat", config.remat, tuple(REMAT)),
    ):
        if value not in choices:
            raise ValueError(f"config.{name} must be one of {', '.join(choices)}, got {value!r}")
    for name in (
        "log_every",
        "sample_every",
        "checkpoint_every",
        "keep_checkpoints",
        "accumulation",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"config.{name} must be at least 1, got {getattr(config, name)}")
    measured = config.held_out
    if measured.every < 1 or measured.heads < 0 or not all(s > 0 for s in measured.sigmas):
        raise ValueError(f"config.held_out: every and sigmas must be positive, got {measured}")
    if config.consistency_halvings < 0 or (config.consistency_halvings and not config.init_from):
        raise ValueError(
            "config.consistency_halvings must not be negative, and needs config.init_from"
        )
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed must be 0 to {2**32 - 1}, got {config.seed}")
    checkpoints.check_config(config.model)
    for optimizer in (config.optimizer, config.autoencoder_training.optimizer):
        optim.learning_rate(optimizer, 1)
    nnx.eval_shape(lambda: new_model(config).networks)
    sharding.check_batch_size(mesh, config.optimizer.batch_size, config.accumulation)
    sharding.check_views(mesh, config.model.views)
    trains_autoencoder = config.autoencoder_training.steps > 0
    if bool(config.init_from) == trains_autoencoder:
        raise ValueError(
            "either config.init_from names a folder with pretrained weights, or "
            "config.autoencoder_training.steps is positive: "
            f"got {config.init_from!r} and {config.autoencoder_training.steps}"
        )
    crop, pixels = config.autoencoder_training.crop, config.model.autoencoder.downsampling
    whole = config.model.image_size
    if trains_autoencoder and not (0 < crop <= whole and crop % pixels == 0):
        raise ValueError(
            f"config.autoencoder_training.crop must be a multiple of {pixels}, at most "
            f"model.image_size, got {crop}"
        )
    if not config.init_from and not config.train_identity_encoder:
        raise ValueError("train_identity_encoder = False needs pretrained weights in init_from")
    if config.ablation.no_image and config.ablation.no_identity:
        raise ValueError(
            "ablation: no_image and no_identity together leave nothing to condition on"
        )


def load_pretrained(config: Config) -> Model:
    """The model of `config.init_from`; ValueError if its networks are not the config's."""
    model = checkpoints.load_model(config.init_from, jnp.dtype(config.compute_dtype))
    for part in ("unet", "autoencoder", "identity"):
        found, expected = getattr(model.config, part), getattr(config.model, part)
        if found != expected:
            raise ValueError(f"{config.init_from}: {part} is {found}, the config says {expected}")
    for name in ("latent_mean", "latent_std"):
        found, given = getattr(model.config, name), getattr(config.model, name)
        if given and given != found:
            raise ValueError(
                f"{config.init_from}: was trained with {name} {found}, the config says {given}; leave "
                "it empty to use that of the weights"
            )
    kind = checkpoints.read_provenance(config.init_from).get("kind")
    for name in ("rays", "normals_frame"):
        found, expected = getattr(model.config, name), getattr(config.model, name)
        if kind != "initialisation for training" and found != expected:
            raise ValueError(
                f"{config.init_from}: was trained with {name} {found!r}, the config says model.{name} = "
                f"{expected!r}: inputs would have another meaning"
            )
    return model


def new_model(config: Config) -> Model:
    dtype = jnp.dtype(config.compute_dtype)
    return models.build(config.model, dtype=dtype, rngs=nnx.Rngs(config.seed))


def trained_part(config: Config, model: Model) -> dict[str, parameters.Parameters]:
    """Parameters of the trained networks, by network."""
    names = ("unet", "identity") if config.train_identity_encoder else ("unet",)
    return {name: parameters.split(model.networks[name])[1] for name in names}


def freeze(
    config: Config, autoencoder: Autoencoder, pretrained: Model | None, mesh: Mesh
) -> tuple[dict[str, nnx.GraphDef], Tree]:
    """The structure of all networks, and the arrays that the step reads but does not train.

    The latter are {"networks": parameters by network, "empty_latent": (h, w, 2 z) of a zero image}.
    """
    graphdefs = nnx.eval_shape(lambda: new_model(config).networks)
    graphdefs = {name: parameters.split(module)[0] for name, module in graphdefs.items()}
    fixed = {"autoencoder": autoencoder}
    if not config.train_identity_encoder:
        assert pretrained is not None  # see `check`
        fixed["identity"] = pretrained.identity
    size = config.model.image_size
    graphdef, params = parameters.split(autoencoder)
    grey = jax.jit(
        lambda params: parameters.merge(graphdef, params).encode(jnp.zeros((1, size, size, 3)))[0]
    )(params)
    empty_latent = standardise(jnp.concatenate([grey, grey], axis=-1), config.model)
    frozen = {
        "networks": {name: parameters.split(module)[1] for name, module in fixed.items()},
        "empty_latent": deny_normals(empty_latent) if config.ablation.no_normals else empty_latent,
    }
    # Through the host: arrays of one device cannot be copied to other processes.
    return graphdefs, jax.device_put(jax.device_get(frozen), sharding.replicated(mesh))


# --------------------------------------------------------------------------------------------------
# Reports


def describe(config: Config, state: optim.TrainState, mesh: Mesh) -> str:
    counts = ", ".join(
        f"{name} {parameters.count(params):,}" for name, params in state.params.items()
    )
    return (
        f"{config.name}: training {counts} parameters in {config.compute_dtype} on {hardware()}, "
        f"batch {config.optimizer.batch_size} x {config.model.views} views over "
        f"{mesh.devices.size} device(s), from step {int(state.step)}"
    )


def hardware() -> str:
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    kind = cpu if device.platform == "cpu" else device.device_kind
    return f"{jax.device_count()} x {device.platform} ({kind})"


# --------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("spinmeround_jax.train", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--config", required=True, metavar="FILE",
        help="of configs/; --config.NAME=VALUE overrides a value",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", type=pathlib.Path,
        help="folder of the run, resumed if it holds one (runs/<config.name>)",
    )  # fmt: skip
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT",
        help="address of process 0; not needed on TPU pods and SLURM",
    )  # fmt: skip
    parser.add_argument(
        "--process_count", type=cli.integer(1), metavar="N",
        help="number of processes, with --coordinator; 1 runs alone",
    )  # fmt: skip
    parser.add_argument(
        "--process_id", type=cli.integer(), metavar="N", help="index of this process, from 0"
    )
    parser.add_argument(
        "--stopped_exit_code", type=cli.integer(0, 255), default=0, metavar="CODE",
        help="exit code after SIGTERM or Ctrl-C, for restarting schedulers (0)",
    )  # fmt: skip
    parser.add_argument(
        "--from_step", type=cli.integer(), metavar="N",
        help="go back to this kept checkpoint of the diffusion model; later ones are deleted",
    )  # fmt: skip
    parser.add_argument(
        "--skip_steps", type=cli.integer(), nargs="+", default=[], metavar="N",
        help="steps of the diffusion model, counted from 0, whose batches are skipped",
    )  # fmt: skip
    parser.add_argument(
        "--profile", type=step_range, metavar="FIRST:STOP",
        help="write a trace of these steps of the diffusion model, counted from 0 where this command "
        "starts, such as 10:15, into <workdir>/tensorboard, for xprof or TensorBoard",
    )  # fmt: skip
    args, args.overrides = parser.parse_known_args(argv)
    if wrong := [word for word in args.overrides if not word.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    return args


def step_range(text: str) -> tuple[int, int]:
    """An argument FIRST:STOP."""
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and len(text) < 20 and int(first) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:STOP, such as 10:15")
    return int(first), int(stop)


@contextlib.contextmanager
def only_trainer(workdir: pathlib.Path) -> Iterator[None]:
    """Lock `workdir`, and remove it afterwards if it is empty.

    Raises:
        InputError: it cannot be written.
        BlockingIOError: another process trains there; it is named.
    """
    if jax.process_index():  # the first process holds the lock
        yield
        return
    files.check_writable(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        with files.lock(workdir / "checkpoints"):
            yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            workdir.rmdir()


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    # Orbax logs every step of its work, and errors once per thread; they are raised, too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        config = load_config(args.config, args.overrides)
        distributed.initialize(args.coordinator, args.process_count, args.process_id)
        workdir = args.workdir or pathlib.Path("runs") / config.name
        with only_trainer(workdir):
            train(config, workdir, args.from_step, frozenset(args.skip_steps), args.profile)
    except loop.Preempted as message:
        print(f"{message}. The same command resumes.", flush=True)
        return args.stopped_exit_code
    except KeyboardInterrupt:
        print("stopped outside of the training loop. The same command resumes.", flush=True)
        cli.end(args.stopped_exit_code, interrupted=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(parse_arguments, run, argv)


if __name__ == "__main__":
    cli.end(main())
