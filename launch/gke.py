"""A training on a GKE cluster, TPU or GPU, through XPK: start, watch, delete.

Examples:
  python -m launch.gke start head-1 --cluster heads --zone us-central2-b --device-type v4-64 \\
      --docker-image gcr.io/my-project/spinmeround:1 --storage runs --dry-run \\
      -- --config=configs/tpu_v4.py --workdir=/mnt/runs/tpu_v4
  python -m launch.gke watch head-1 --cluster heads --zone us-central2-b
  python -m launch.gke delete head-1 --cluster heads --zone us-central2-b

The image holds this repository as its working directory, installed with '.[train,tpu]' or '.[train,cuda]';
docs/launching.md has a Dockerfile. The cluster is made, and costs, by `xpk cluster create`.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import time
from collections.abc import Sequence

from launch import training
from launch.commands import CommandError, Commands
from launch.names import checked

# XPK gives the hosts of GPU jobs these variables; TPU hosts are found by JAX.
_GPU_HOSTS = (
    "--coordinator=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT "
    "--process_count=$NNODES --process_id=$NODE_RANK"
)


def host_command(arguments: Sequence[str], gpu: bool) -> str:
    """What a container runs, for a shell.

    XPK writes it into YAML (once between double quotes), and Kubernetes looks for $(NAME) in it.

    Raises:
        ValueError: an argument with what one of them would take for its own.
    """
    for argument in arguments:
        if found := [mark for mark in ('"', "\\", "'", "$(", "{", "}") if mark in argument]:
            raise ValueError(
                f"{argument!r} holds {' '.join(found)}, which XPK cannot carry: put the value into "
                "the config file"
            )
    # exec, so that the SIGTERM which XPK's shell passes on reaches the training.
    command = f"exec {shlex.join(training.command('python', arguments))}"
    return f"{command} {_GPU_HOSTS}" if gpu else command


def start(arguments: argparse.Namespace, given: tuple[str, ...], commands: Commands) -> None:
    gpu = not arguments.device_type.startswith("v")
    count = f"--num-nodes={arguments.nodes}" if gpu else f"--num-slices={arguments.slices}"
    capacity = [f"--{arguments.capacity}"] if arguments.capacity else []
    commands.run(
        [
            "xpk", "workload", "create", f"--workload={arguments.name}", *_where(arguments),
            f"--device-type={arguments.device_type}", count,
            f"--docker-image={arguments.docker_image}",
            *(f"--storage={name}" for name in arguments.storage),
            *capacity,
            f"--priority={arguments.priority}",
            f"--max-restarts={arguments.max_restarts}",
            "--restart-on-exit-codes=42",
            f"--termination-grace-period-seconds={arguments.grace}",
            f"--command={host_command(given, gpu)}",
        ],
        timeout=1800,
    )  # fmt: skip


def watch(arguments: argparse.Namespace, commands: Commands) -> int:
    """Follow the log of the first host until the job has ended, over its restarts."""
    name = arguments.name
    # XPK also fetches the credentials of the cluster, which kubectl needs.
    listing = ["xpk", "workload", "list", *_where(arguments), f"--filter-by-job=^{name}$"]
    first = ",".join(
        f"{label}={value}"
        for label, value in (
            ("jobset.sigs.k8s.io/jobset-name", name),
            ("jobset.sigs.k8s.io/job-index", "0"),
            ("batch.kubernetes.io/job-completion-index", "0"),
        )
    )
    log = ["kubectl", "logs", "--follow", "--ignore-errors", "--tail=100", f"--selector={first}"]
    state = ["kubectl", "get", "jobset", name, "--output=jsonpath={.status.terminalState}"]
    commands.run(listing, timeout=600)
    while True:
        try:
            commands.run(log, timeout=None)
        except CommandError as error:
            if error.code == 127:
                raise
            commands.say(f"no log yet: {error}")  # queued, or between two starts
        ended = commands.run(state, timeout=120, capture=True, quiet=True).strip()
        if commands.dry_run or ended == "Completed":
            return 0
        if ended == "Failed":
            raise CommandError(f"{name} has failed; its last words are above", 1)
        time.sleep(arguments.poll)


def delete(arguments: argparse.Namespace, commands: Commands) -> None:
    commands.run(
        [
            "xpk",
            "workload",
            "delete",
            f"--workload={arguments.name}",
            *_where(arguments),
            "--force",
        ],
        timeout=600,
    )


def _where(arguments: argparse.Namespace) -> list[str]:
    project = [f"--project={arguments.project}"] if arguments.project else []
    return [f"--cluster={arguments.cluster}", f"--zone={arguments.zone}", *project]


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv: Sequence[str] | None = None) -> None:
    training.run_main(_parser(), argv, act)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.gke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("name", type=checked("workload"), help="of the job")
    common.add_argument("--cluster", type=checked("name"), required=True)
    common.add_argument("--zone", type=checked("zone"), required=True)
    common.add_argument("--project", type=checked("project"), help="default: gcloud's")
    training.add_dry_run(common)
    verbs = parser.add_subparsers(dest="verb", required=True)

    verb = verbs.add_parser(
        "start", parents=[common], help="start a training: start NAME ... -- ARGUMENTS"
    )
    verb.add_argument("--device-type", type=checked("device"), required=True)
    verb.add_argument("--docker-image", type=checked("image"), required=True)
    verb.add_argument("--slices", type=training.positive, default=1, help="of TPUs")
    verb.add_argument("--nodes", type=training.positive, default=1, help="with GPUs")
    verb.add_argument(
        "--storage", type=checked("name"), action="append", default=[],
        help="what `xpk storage attach` named; more than once for several",
    )  # fmt: skip
    verb.add_argument("--capacity", choices=("spot", "on-demand", "flex"), help="autoprovisioning")
    verb.add_argument(
        "--priority", choices=("very-low", "low", "medium", "high", "very-high"), default="medium"
    )
    verb.add_argument(
        "--max-restarts", type=training.positive, default=1000, help="after preemptions and kills"
    )
    verb.add_argument(
        "--grace", type=training.positive, default=300,
        help="seconds from SIGTERM to SIGKILL, for the checkpoint (default: %(default)s)",
    )  # fmt: skip
    verb = verbs.add_parser("watch", parents=[common], help="follow the log to the end")
    verb.add_argument("--poll", type=float, default=30.0, help="seconds (default: %(default)s)")
    training.add_yes(verbs.add_parser("delete", parents=[common], help="end the job and remove it"))
    return parser


def act(arguments: argparse.Namespace, given: tuple[str, ...], commands: Commands) -> int:
    where = shlex.join([arguments.name, *_where(arguments)])
    if arguments.verb == "start":
        start(arguments, training.check(given, pathlib.Path()), commands)
        commands.say(f"Follow it: python -m launch.gke watch {where}")
        return 0
    if arguments.verb == "watch":
        try:
            return watch(arguments, commands)
        except KeyboardInterrupt:
            print(f"\n{arguments.name} goes on. End it: python -m launch.gke delete {where}")
            return 130
    if not commands.confirm(f"End {arguments.name} and remove it?", arguments.yes):
        commands.say("left as it is")
        return 1
    delete(arguments, commands)
    commands.say(
        f"the cluster {arguments.cluster} is still there, and costs: see xpk cluster delete"
    )
    return 0


if __name__ == "__main__":
    main()
