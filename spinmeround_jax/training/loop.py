"""The step loop of both trainings: metrics, checkpoints, preemption, losses that are not finite."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from spinmeround_jax import cli, sharding
from spinmeround_jax.training import distributed, flops
from spinmeround_jax.training.optim import TrainState
from spinmeround_jax.training.run_checkpoints import Checkpoints

if TYPE_CHECKING:
    from spinmeround_jax.config import Config
    from spinmeround_jax.training.run_log import RunLog

_logger = logging.getLogger(__name__)

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
# Steps queued on the device after the running one. More would only hold batches in memory and delay the
# reaction to SIGTERM.
QUEUED_STEPS = 2


class NotFiniteError(FloatingPointError):
    """The loss or its gradient became NaN or infinite."""


class Preempted(Exception):
    """SIGTERM or SIGINT arrived, here or in another process; a checkpoint has been written."""


@dataclasses.dataclass(frozen=True)
class Cadence:
    """Steps between events; the last step has all of them."""

    log: int
    evaluate: int
    sample: int
    checkpoint: int

    @classmethod
    def of(cls, config: Config) -> Cadence:
        return cls(
            config.log_every,
            config.held_out.every,
            config.sample_every,
            config.checkpoint_every,
        )


@dataclasses.dataclass(frozen=True)
class Profile:
    """Steps to trace, counted from 0 at the start of the command, from `first` to before `stop`."""

    first: int
    stop: int
    folder: pathlib.Path  # TensorBoard's

    @contextlib.contextmanager
    def trace(self, step: int) -> Iterator[None]:
        """Trace what is done inside, each process into a session of its own: on a host they share a name."""
        options = jax.profiler.ProfileOptions()
        options.session_id = f"step_{step:07d}_process_{jax.process_index()}"
        with jax.profiler.trace(str(self.folder), profiler_options=options):
            yield
        print(f"The trace is in {self.folder}/plugins/profile/{options.session_id}", flush=True)


def run(
    name: str,
    step_fn: Step,
    state: TrainState,
    loader: Any,
    checkpoints: Checkpoints,
    *,
    mesh: Mesh,
    steps: int,
    batch_size: int,
    cadence: Cadence,
    log: RunLog | None,
    on_evaluate: Callable[[TrainState], Mapping[str, float]],
    on_sample: Callable[[TrainState, int], None],
    learning_rate: Callable[[int], Any] = lambda step: 0.0,
    step_flops: float = 0.0,
    skip: Collection[int] = (),
    profile: Profile | None = None,
) -> TrainState:
    """Train from `state.step` to `steps`, waiting for the device only when metrics are reported.

    Args:
        step_fn: jitted (state, batch of global arrays) -> (state, {name: scalar metric}).
        log: None in all processes but the first.
        on_evaluate: more metrics, such as losses of held-out heads.
        on_sample: draws previews of (state, step).
        learning_rate: of a step, counted from 0.
        step_flops: needed by a step on all devices; 0 reports no FLOP/s.
        skip: steps, counted from 0, whose batches are skipped.
        profile: steps of this call to trace; those that it does not reach are left out.

    Raises:
        NotFiniteError: naming the step and its examples; no checkpoint includes that step.
        Preempted: after a signal, with a checkpoint of the last step.
    """
    start = int(state.step)
    recent: list[dict[str, jax.Array]] = []  # metrics since the last report, on the device
    untimed = 0  # of them, those whose time is not counted
    compiled = False
    clock = time.monotonic()
    several = jax.process_count() > 1

    def check() -> None:
        if (bad := int(state.bad_step)) >= 0:
            raise NotFiniteError(_not_finite(name, bad, batch_size, checkpoints.steps()))

    def report(step: int, values: Mapping[str, float], *remarks: str) -> None:
        if log is None or not values:
            return
        log.metrics(name, step, values)
        figures = [
            f"{key} {value:.4g}" for key, value in values.items() if key != "seconds_in_steps"
        ]
        bar.write("  ".join([f"{name} {step}/{steps}", *figures, *remarks]))

    with contextlib.ExitStack() as stack:
        signalled = stack.enter_context(_signals(several))
        # Saving is completed however the loop ends, before signals are handled as usual again.
        stack.callback(checkpoints.wait)
        if log is not None:
            log.begin(name, start)
            stack.callback(lambda: log.report(checkpoints.history))
        trace = stack.enter_context(contextlib.ExitStack())
        bar = stack.enter_context(
            cli.progress(initial=start, total=steps, desc=name, unit="step", disable=log is None)
        )
        for step in range(start + 1, steps + 1):
            if profile and step - 1 - start == profile.first:
                jax.block_until_ready(state)
                trace.enter_context(profile.trace(step - 1))
            batch = next(loader)
            if step - 1 in skip:
                state = dataclasses.replace(state, step=state.step + 1)
            else:
                with jax.profiler.StepTraceAnnotation(name, step_num=step - 1):
                    state, metrics = step_fn(state, sharding.global_batch(mesh, batch))
                recent.append(metrics)
                if not compiled:  # compilation is not part of a step's time
                    jax.block_until_ready(metrics)
                    compiled, untimed, clock = True, 1, time.monotonic()
            if len(recent) > QUEUED_STEPS:
                jax.block_until_ready(recent[-1 - QUEUED_STEPS])
            bar.update()
            if profile and step - start == profile.stop:
                jax.block_until_ready(state)
                before = time.monotonic()
                trace.close()
                clock += time.monotonic() - before

            stop = distributed.should_stop(step) if several else bool(signalled)
            if step % cadence.log == 0 or step == steps or stop:
                check()
                now = time.monotonic()
                if fetched := jax.device_get(recent):
                    values = {k: float(np.mean([m[k] for m in fetched])) for k in fetched[-1]}
                    values["learning_rate"] = float(learning_rate(step - 1))
                    remarks = []
                    if timed := len(recent) - untimed:
                        seconds = (now - clock) / timed
                        values["seconds_in_steps"] = now - clock
                        values["examples_per_second"] = batch_size / seconds
                        values |= flops.rates(step_flops / seconds, mesh.devices)
                        left = tqdm.tqdm.format_interval(int((steps - step) * seconds))
                        remarks.append(f"{1000 * seconds:.0f} ms/step  ETA {left}")
                    if log is not None:
                        values["goodput"] = log.goodput(values.get("seconds_in_steps", 0.0))
                    report(step, values, *remarks)
                recent, untimed, clock = [], 0, now
            before = time.monotonic()
            if step % cadence.checkpoint == 0 or step == steps or stop:
                check()
                checkpoints.save(step, state, loader)
            if stop and step < steps:
                raise Preempted(
                    f"{name}: stopped at step {step} of {steps}, the checkpoint is written"
                )
            if evaluates := step % cadence.evaluate == 0 or step == steps:
                report(step, on_evaluate(state))
            if samples := step % cadence.sample == 0 or step == steps:
                on_sample(state, step)
            if log is not None and step < steps and (evaluates or samples):
                log.report(checkpoints.history)
            clock += time.monotonic() - before  # none of these counts as training time
    if signalled and not several:  # with several processes, JAX remembers the signal
        raise Preempted(f"{name}: stopped after its last step, the checkpoint is written")
    return state


def _not_finite(name: str, bad: int, batch_size: int, kept: list[int]) -> str:
    saved = "no checkpoint was written yet"
    if kept:
        saved = f"checkpoints are kept of {', '.join(map(str, kept))}, none includes that step"
    advice = "Resume with a lower learning_rate or max_gradient_norm of the optimizer"
    if name == "diffusion":
        advice += (
            f"; without this batch (--skip_steps {bad}); or from an earlier checkpoint (--from_step), as "
            "the weights may have diverged before"
        )
    return (
        f"{name}: the loss or its gradient is not finite at step {bad}, that is in examples "
        f"{bad * batch_size} to {(bad + 1) * batch_size - 1} of the loader (all counted from 0); "
        f"{saved}. {advice}"
    )


@contextlib.contextmanager
def _signals(several: bool) -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of ending the process; a second SIGINT interrupts at once.

    With several processes JAX handles SIGTERM, and SIGINT is converted to it: see
    `distributed.should_stop`.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if several:
            distributed.request_stop()
        _logger.warning("%s: finishing this step", signal.Signals(number).name)

    caught = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in caught}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
