"""Submit a training as a SLURM job, one process per node with all its GPUs.

Example:
  python -m launch.slurm head-1 --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu --dry-run \\
      -- --config=configs/h100.py --workdir=/shared/runs/h100

Run it in a checkout on a file system that all nodes see. Before the time limit, and when preempted, the job
writes a checkpoint and queues itself again, until the training is finished.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
from collections.abc import Sequence

from launch import training
from launch.commands import Commands, add_dry_run, name, positive, run_main

OPTIONAL = ("partition", "account", "qos", "constraint")  # passed to sbatch as they are


def script(arguments: Sequence[str], python: str, gpus_per_node: int) -> str:
    """The batch script: one process per node; back into the queue after a SIGTERM."""
    devices = ",".join(str(i) for i in range(gpus_per_node))
    return f"""#!/bin/bash
# JAX would take one GPU per process; here each process has all of its node.
export JAX_LOCAL_DEVICE_IDS={devices}
srun --cpu-bind=none --kill-on-bad-exit=1 {shlex.join(training.command(python, arguments))}
code=$?
if [ $code -eq {training.STOPPED} ]; then  # stopped with a checkpoint, not finished
  scontrol requeue "$SLURM_JOB_ID" && sleep 600
fi
exit $code
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm",
        usage="%(prog)s NAME [options] -- --config=... --workdir=...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb="start")
    parser.add_argument("name", type=name, help="of the job")
    parser.add_argument("--nodes", type=positive, required=True)
    parser.add_argument("--gpus-per-node", type=positive, required=True)
    parser.add_argument("--time", required=True, help="limit of one run, such as 24:00:00")
    for flag in OPTIONAL:
        parser.add_argument(f"--{flag}", help="of sbatch")
    parser.add_argument(
        "--grace", type=positive, default=300,
        help="seconds before the time limit at which to write a checkpoint (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--python", default=".venv/bin/python", help="on the nodes (%(default)s)")
    parser.add_argument(
        "--log-dir", type=pathlib.Path, default=pathlib.Path("runs/logs"), help="(%(default)s)"
    )
    add_dry_run(parser)
    run_main(parser, argv, submit)


def submit(arguments: argparse.Namespace, given: tuple[str, ...], commands: Commands) -> int:
    """Submit the job and print how to follow and end it."""
    given = training.check(given, pathlib.Path())
    log = arguments.log_dir.resolve() / f"{arguments.name}-%j.log"
    argv = [
        "sbatch", "--parsable", f"--job-name={arguments.name}", f"--nodes={arguments.nodes}",
        "--ntasks-per-node=1", f"--gpus-per-node={arguments.gpus_per_node}", "--exclusive",
        f"--time={arguments.time}", f"--signal=TERM@{arguments.grace}", "--requeue",
        "--open-mode=append", f"--output={log}",
    ]  # fmt: skip
    argv += [f"--{flag}={value}" for flag in OPTIONAL if (value := getattr(arguments, flag))]
    if not commands.dry_run:
        arguments.log_dir.mkdir(parents=True, exist_ok=True)
    text = script(given, arguments.python, arguments.gpus_per_node)
    printed = commands.run(argv, timeout=120, capture=True, stdin=text)
    job = "JOB" if commands.dry_run else printed.strip().partition(";")[0]
    gpus = arguments.nodes * arguments.gpus_per_node
    commands.say(f"job {job}: {gpus} GPUs for up to {arguments.time} in each run, until finished")
    commands.say(f"state: squeue --jobs={job}   log: tail -F {str(log).replace('%j', job)}")
    commands.say(f"end it: scancel {job}")
    return 0


if __name__ == "__main__":
    main()
