"""One of the processes of a run, in miniature: start-up, data, loop and checkpoints are the project's.

python launch_worker.py DATA WORKDIR STEPS SECONDS_PER_STEP [LOADER_WORKERS], and JAX_COORDINATOR_ADDRESS
and so on. What is learnt is a line; losses of all steps go to WORKDIR/losses.jsonl.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp

from spinmeround_jax import sharding
from spinmeround_jax.config import DataConfig, OptimizerConfig, StageConfig
from spinmeround_jax.data import loader as data_loader
from spinmeround_jax.training import distributed, loop, optim
from spinmeround_jax.training.run_checkpoints import Checkpoints

OPTIMIZER = OptimizerConfig(
    learning_rate=0.01, warmup_steps=0, schedule="constant", weight_decay=0.0, beta1=0.9,
    beta2=0.99, max_gradient_norm=1.0, ema_decay=0.9, batch_size=12,
)  # fmt: skip
DATA = DataConfig(
    directory="", max_frontal_yaw=60.0, max_frontal_pitch=60.0, random_background=0.5,
    guidance_dropout=0.0, identity_dropout=0.0, relative_cameras=True, skip_corrupt=False,
    workers=0, prefetch=2,
)  # fmt: skip


class Log:
    """Stands in for `RunLog`; keeps what is lost, too."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def metrics(self, name: str, step: int, values: dict[str, float]) -> None:
        if "loss" in values:
            with self.path.open("a") as file:
                file.write(json.dumps([step, values["loss"]]) + "\n")

    def begin(self, name: str, step: int) -> None: ...
    def report(self, changes: list) -> None: ...
    def goodput(self, seconds: float) -> float:
        return 0.0


def main(directory: str, workdir: str, steps: str, pause: str, workers: str = "0") -> None:
    distributed.initialize()
    mesh = sharding.make_mesh()
    work = pathlib.Path(workdir)
    work.mkdir(parents=True, exist_ok=True)
    loader = data_loader.make_loader(
        dataclasses.replace(DATA, directory=directory, workers=int(workers)),
        (StageConfig(steps=int(steps), observed=(1,)),),
        OPTIMIZER.batch_size,
        4,
        seed=0,
        normals_frame="camera",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    transform = optim.optimizer(OPTIMIZER, int(steps))

    def init() -> optim.TrainState:
        return optim.init({"w": jnp.zeros((3, 3))}, transform)

    def step(state, batch):
        def loss_fn(params):
            return jnp.mean((batch.images @ params["w"] - batch.normals) ** 2)

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        state, _ = optim.update(state, loss, gradients, transform, OPTIMIZER.ema_decay)
        return state, {"loss": loss}

    step = jax.jit(step, donate_argnums=0)

    def slow_step(state, batch):
        time.sleep(float(pause))
        return step(state, batch)

    placement = sharding.replicated(mesh)
    saved = Checkpoints(work / "checkpoints", keep=2, config=OPTIMIZER)
    if saved.latest() is None:
        state = jax.jit(init, out_shardings=placement)()
    else:
        state = saved.restore(sharding.abstract(jax.eval_shape(init), placement), loader)
    print(f"from step {int(state.step)} of {jax.process_count()} process(es)", flush=True)
    try:
        loop.run(
            "line", slow_step, state, loader, saved, mesh=mesh, steps=int(steps), batch_size=12,
            cadence=loop.Cadence(log=1, evaluate=10**6, sample=10**6, checkpoint=10),
            log=Log(work / "losses.jsonl") if jax.process_index() == 0 else None,
            on_evaluate=lambda state: {}, on_sample=lambda state, step: None,
        )  # fmt: skip
    except loop.Preempted as message:
        print(message, flush=True)
    saved.close()


if __name__ == "__main__":
    distributed.HEARTBEAT_TIMEOUT = distributed.SHUTDOWN_TIMEOUT = 10
    main(*sys.argv[1:])
