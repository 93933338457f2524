"""Runs of many processes: how they connect, and how they stop after the same step.

Steps are collective: a process that stops alone leaves the others waiting. So a SIGTERM to any process goes
to JAX's preemption service, which names a step that no process has begun; all finish it, write the checkpoint
together and end.
"""

from __future__ import annotations

import os
import re
import signal

import jax
from jax.experimental import multihost_utils

# Seconds without a sign of life after which a process counts as dead, and the others end with an error.
HEARTBEAT_TIMEOUT = 60
# Seconds that an ending process waits for the others; longer than the above, so that a death is reported.
SHUTDOWN_TIMEOUT = 90

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[\w.-]+):\d{1,5}")
_asked = 0  # the last step of `should_stop`


def initialize(
    coordinator: str | None = None, process_count: int | None = None, process_id: int | None = None
) -> None:
    """Connect to the other processes of this run, if any.

    Call it before any device is used. Missing arguments are read from the environment
    (JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT, JAX_PROCESS_ID); without any of them JAX finds the
    processes of a Cloud TPU pod, SLURM, Open MPI or Kubernetes, unless the process count is 1.

    Args:
        coordinator: HOST:PORT of process 0, the same in all processes.
        process_id: 0 to process_count - 1.

    Raises:
        ValueError: some of the three are missing or invalid.
        ConnectionError: the other processes were not reached.
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
        # Without detection: a node of a SLURM cluster may be used without SLURM.
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
            return  # no cluster: this process runs alone
        raise ValueError(
            f"the environment does not describe the cluster completely: {error}"
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
    """Whether all processes stop after the finished step `step`, counted from 1 as by Orbax.

    With several processes, each must call this after every step.
    """
    global _asked
    # The service names the step after the last one asked about, which is never run if a loop ended there,
    # or if a resumed loop starts later.
    between = step != _asked + 1 and multihost_utils.reached_preemption_sync_point(_asked + 1)
    _asked = step
    return multihost_utils.reached_preemption_sync_point(step) or between


def request_stop() -> None:
    """Ask all processes to stop soon, as a SIGTERM to this one does."""
    signal.raise_signal(signal.SIGTERM)
