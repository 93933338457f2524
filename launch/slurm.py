"""A training as a SLURM job, one process per node with all its GPUs: start, watch, delete.

Examples:
  python -m launch.slurm start head-1 --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu \\
      --dry-run -- --config=configs/h100.py --workdir=/shared/runs/h100
  python -m launch.slurm watch 123456      # the number that start printed
  python -m launch.slurm delete 123456

Run it from a checkout on a file system that all nodes see. Before the time limit, and when preempted, the
job writes a checkpoint and queues itself again, until the training is finished.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence

from launch import training
from launch.commands import CommandError, Commands
from launch.names import checked

RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD",
           "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")  # fmt: skip


def script(arguments: Sequence[str], python: str, gpus_per_node: int) -> str:
    """The batch script: one process per node, and back into the queue after a SIGTERM."""
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


def start(arguments: argparse.Namespace, given: tuple[str, ...], commands: Commands) -> str:
    """Submit; the number of the job."""
    log = arguments.log_dir.resolve() / f"{arguments.name}-%j.log"
    argv = [
        "sbatch", "--parsable", f"--job-name={arguments.name}", f"--nodes={arguments.nodes}",
        "--ntasks-per-node=1", f"--gpus-per-node={arguments.gpus_per_node}", "--exclusive",
        f"--time={arguments.time}", f"--signal=TERM@{arguments.grace}", "--requeue",
        "--open-mode=append", f"--output={log}",
    ]  # fmt: skip
    for flag in ("partition", "account", "qos", "constraint"):
        if value := getattr(arguments, flag):
            argv.append(f"--{flag}={value}")
    if not commands.dry_run:
        arguments.log_dir.mkdir(parents=True, exist_ok=True)
    text = script(given, arguments.python, arguments.gpus_per_node)
    return commands.run(argv, timeout=120, capture=True, stdin=text).strip().split(";")[0]


def state_of(job: str, commands: Commands) -> tuple[str, pathlib.Path]:
    """State and log file of a job; the state is empty once SLURM's controller has forgotten it."""
    told = commands.run(
        ["squeue", f"--jobs={job}", "--noheader", "--states=all", "--Format=State:30,STDOUT:1024"],
        timeout=120, capture=True, quiet=True,
    )  # fmt: skip
    state, _, log = told.strip().partition(" ")
    return state, pathlib.Path(log.strip().replace("%j", job))  # SLURM may leave it to us


def watch(job: str, commands: Commands, poll: float) -> int:
    """Print the job's states and its log until it has ended.

    Raises:
        CommandError: it ended otherwise than well.
    """
    told, offset, log = "", 0, None
    if commands.dry_run:
        state_of(job, commands)
        return 0
    while True:
        try:
            state, log = state_of(job, commands)
        except CommandError as error:
            if "Invalid job id" not in str(error):
                raise
            state = ""
        if state != told:
            commands.say(f"{time.strftime('%H:%M:%S')} job {job}: {state or 'ended'}")
            told = state
        if log and log.is_file():
            with log.open("rb") as file:
                file.seek(offset)
                sys.stdout.buffer.write(file.read())
                sys.stdout.flush()
                offset = file.tell()
        if state and state not in RUNNING:
            if state == "COMPLETED":
                return 0
            raise CommandError(f"job {job} ended as {state}; its log: {log}", 1)
        if not state:
            raise CommandError(
                f"job {job} is not in the queue any more; ask: sacct --jobs={job}", 1
            )
        time.sleep(poll)


def delete(job: str, commands: Commands) -> None:
    commands.run(["scancel", job], timeout=120)


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv: Sequence[str] | None = None) -> None:
    training.run_main(_parser(), argv, act)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("start", help="submit a training: start NAME ... -- ARGUMENTS")
    verb.add_argument("name", type=checked("name"), help="of the job")
    verb.add_argument("--nodes", type=training.positive, required=True)
    verb.add_argument("--gpus-per-node", type=training.positive, required=True)
    verb.add_argument("--time", type=checked("walltime"), required=True, help="the time limit")
    for flag in ("partition", "account", "qos", "constraint"):
        verb.add_argument(f"--{flag}", type=checked("word"))
    verb.add_argument(
        "--grace", type=training.positive, default=300,
        help="seconds before the time limit to stop at (default: %(default)s)",
    )  # fmt: skip
    verb.add_argument(
        "--python", default=".venv/bin/python", help="on the nodes (default: %(default)s)"
    )
    verb.add_argument(
        "--log-dir",
        type=pathlib.Path,
        default=pathlib.Path("runs/logs"),
        help="default: %(default)s",
    )
    training.add_dry_run(verb)
    verb = verbs.add_parser("watch", help="states and log of a job")
    verb.add_argument("job", type=checked("job"))
    verb.add_argument("--poll", type=float, default=30.0, help="seconds (default: %(default)s)")
    training.add_dry_run(verb)
    verb = verbs.add_parser("delete", help="end a job; what is not in a checkpoint is lost")
    verb.add_argument("job", type=checked("job"))
    training.add_yes(verb)
    training.add_dry_run(verb)
    return parser


def act(arguments: argparse.Namespace, given: tuple[str, ...], commands: Commands) -> int:
    if arguments.verb == "start":
        job = start(arguments, training.check(given, pathlib.Path()), commands)
        if not commands.dry_run:
            commands.say(f"job {job}. Follow it: python -m launch.slurm watch {job}")
        return 0
    if arguments.verb == "watch":
        try:
            return watch(arguments.job, commands, arguments.poll)
        except KeyboardInterrupt:
            job = arguments.job
            print(f"\njob {job} goes on. End it: python -m launch.slurm delete {job}")
            return 130
    if not commands.confirm(f"End job {arguments.job}?", arguments.yes):
        commands.say("left as it is")
        return 1
    delete(arguments.job, commands)
    return 0


if __name__ == "__main__":
    main()
