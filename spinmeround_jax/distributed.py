"""Many processes as one run: how they find each other, and how they stop at the same step.

Stopping. Steps are collective: a process that stops alone leaves the others waiting for ever. So a
SIGTERM to any process goes to JAX's preemption service, which tells all processes of a step none of
them has begun; all finish it, write the checkpoint together and end.
"""

from __future__ import annotations

import os
import re
import signal

import jax
from jax.experimental import multihost_utils

# A process that says nothing for so long is taken for dead and the others end with an error. Long
# enough for a stalled network or host, short beside what a waiting pod costs.
HEARTBEAT_TIMEOUT = 60  # seconds
# How long a process that ends waits for the others to end; one that fails waits in vain.
SHUTDOWN_TIMEOUT = 90  # seconds, more than the above: a death is to be told as one

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[\w.-]+):\d{1,5}")
_asked = 0  # the last step of `should_stop`


def initialize(
    coordinator: str | None = None, process_count: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes of this run; with a single one do nothing.

    Call it before anything touches a device. What is not given is taken from the environment
    (JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT, JAX_PROCESS_ID); with none of them JAX finds the
    processes of a Cloud TPU pod, SLURM, Open MPI or Kubernetes. A process count of 1 forbids that.

    Args:
        coordinator: HOST:PORT where process 0 listens, the same in all processes.
        process_id: 0 to process_count - 1.

    Raises:
        ValueError: some of the three are missing, or cannot be.
        ConnectionError: the others did not come, or a cluster was found that cannot be joined.
    """
    flagged = coordinator is not None
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    process_count = _number("process_count", process_count)
    process_id = _number("process_id", process_id)
    if process_count == 1 and not process_id:
        return
    if process_count is None and process_id is None and not flagged:
        _join_cluster()
        return
    given = {"coordinator": coordinator, "process_count": process_count, "process_id": process_id}
    if missing := [name for name, value in given.items() if value is None]:
        raise ValueError(
            f"--{', --'.join(missing)} missing: give --coordinator, --process_count and "
            "--process_id together (or JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT and "
            "JAX_PROCESS_ID), or none of them"
        )
    if not _ADDRESS.fullmatch(coordinator):
        raise ValueError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if not 0 <= process_id < process_count:
        raise ValueError(f"--process_id must be in 0..{process_count - 1}, got {process_id}")
    try:
        # What is said here is all there is: a node of a SLURM cluster may be used without SLURM.
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except RuntimeError as error:
        raise ConnectionError(
            f"process {process_id} of {process_count} did not reach the others through "
            f"{coordinator}: {error}"
        ) from error


def _join_cluster() -> None:
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT
        )
    except ValueError as error:
        if "coordinator_address should be defined" in str(error):
            return  # JAX found no cluster: a process of its own
        raise ValueError(
            f"what the environment tells of a cluster is not enough: {error}"
        ) from error
    except RuntimeError as error:
        raise ConnectionError(
            f"looking for other processes failed: {error}. With --process_count=1 this one runs alone"
        ) from error


def _number(name: str, value: int | None) -> int | None:
    if value is not None:
        return value
    variable = f"JAX_{name.upper()}"
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"{variable} must be a number, got {text!r}")
    return int(text)


def should_stop(step: int) -> bool:
    """Whether the step just made, counted from 1, is the one after which all processes stop.

    Of several processes, every one must ask after every step. Steps are counted as Orbax counts them,
    which asks the same service when it saves.
    """
    global _asked
    # The step to stop after is the one that follows those asked about when the signal came. That one
    # is never made where a loop ended or a resumed one had not begun.
    between = step != _asked + 1 and multihost_utils.reached_preemption_sync_point(_asked + 1)
    _asked = step
    return multihost_utils.reached_preemption_sync_point(step) or between


def request_stop() -> None:
    """Ask all processes to stop soon, as a SIGTERM to this one does."""
    signal.raise_signal(signal.SIGTERM)
