"""Cloud TPU pods as queued resources, through gcloud: create, start, watch, stop, delete.

Examples:
  # What would be run, as a script to read or to paste:
  python -m launch.tpu create head-1 --zone us-central2-b --accelerator-type v4-64 --spot --dry-run

  python -m launch.tpu create head-1 --zone us-central2-b --accelerator-type v4-64 --spot
  python -m launch.tpu start head-1 -- --config=configs/tpu_v4.py --workdir=/mnt/runs/tpu_v4
  python -m launch.tpu watch head-1      # its state and its log; brings it back when preempted
  python -m launch.tpu stop head-1       # checkpoint and end of the training; the pod stays, and costs
  python -m launch.tpu delete head-1     # the pod is gone

`create` and `start` note what they did in ~/.local/state/spinmeround (--notes), so that the other commands
need the name alone. Notes hold no credentials: gcloud has them.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import tempfile
import time
from collections.abc import Sequence

from launch import pod_hosts, training
from launch.commands import CommandError, Commands
from launch.names import checked
from launch.pod_notes import NOTES, Pod, read, remove, write

# The software that Google pairs with each kind of TPU; JAX itself comes with our own installation.
RUNTIMES = {
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v4": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v2": "tpu-ubuntu2204-base",
}
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
GONE = ("SUSPENDING", "SUSPENDED")
LOST_CONTACTS = 10  # polls in a row that may fail before `watch` gives up
SETTLING = 4  # polls after a training's end before it is believed that the pod stays


# --------------------------------------------------------------------------------------------------
# The commands of gcloud


def queued(pod: Pod, verb: str, *flags: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, pod.name, *_where(pod), *flags]


def ssh(pod: Pod, worker: str, script: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", pod.name, *_where(pod),
            f"--worker={worker}", f"--command={script}"]  # fmt: skip


def _where(pod: Pod) -> list[str]:
    project = [f"--project={pod.project}"] if pod.project else []
    return [f"--zone={pod.zone}", *project, "--quiet"]


def create(pod: Pod, commands: Commands) -> None:
    flags = [
        f"--node-id={pod.name}",
        f"--accelerator-type={pod.accelerator_type}",
        f"--runtime-version={pod.runtime_version}",
    ]
    flags += ["--spot"] if pod.spot else []
    for flag, value in (
        ("valid-until-duration", pod.valid_until),
        ("network", pod.network),
        ("subnetwork", pod.subnetwork),
        ("service-account", pod.service_account),
    ):
        flags += [f"--{flag}={value}"] if value else []
    commands.run(queued(pod, "create", *flags), timeout=300)


def delete(pod: Pod, commands: Commands) -> None:
    """The request and, with --force, its nodes."""
    commands.run(queued(pod, "delete", "--force"), timeout=900)


def state_of(pod: Pod, commands: Commands) -> str:
    """One of the states of a queued resource, or GONE's last where there is none of this name."""
    try:
        told = commands.run(
            queued(pod, "describe", "--format=value(state.state)"),
            timeout=120,
            capture=True,
            quiet=True,
        )
    except CommandError as error:
        if "NOT_FOUND" in str(error):
            return "SUSPENDED"
        raise
    return told.strip()


def start(pod: Pod, commands: Commands, code: pathlib.Path) -> None:
    """Copy the committed code to all hosts, install it there, and begin or go on with the training."""
    with tempfile.TemporaryDirectory() as folder:
        archive = pathlib.Path(folder) / pod_hosts.ARCHIVE
        commands.run(
            ["git", "-C", str(code), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
            timeout=120,
        )
        commands.run(
            ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(archive),
             f"{pod.name}:{pod_hosts.ARCHIVE}", *_where(pod), "--worker=all"],
            timeout=900,
        )  # fmt: skip
    commands.run(ssh(pod, "all", pod_hosts.install(pod.setup)), timeout=1800)
    commands.run(ssh(pod, "all", pod_hosts.start(pod.training)), timeout=300)


# --------------------------------------------------------------------------------------------------
# Watching


def watch(pod: Pod, commands: Commands, code: pathlib.Path, poll: float) -> int:
    """Follow the pod until its training ends; the exit code of the training.

    A spot pod that was preempted is asked for again, and the same training started, which resumes.

    Raises:
        CommandError: the pod failed, or cannot be reached.
    """
    if commands.dry_run:
        state_of(pod, commands)
        commands.run(ssh(pod, "0", pod_hosts.look(0)), timeout=None)
        if pod.spot:
            commands.say("and after a preemption:")
            delete(pod, commands)
            create(pod, commands)
        if pod.training:
            commands.say("where no training runs:")
            start(pod, commands, code)
        return 0
    told, offset, lost, since_end = "", 0, 0, 0
    while True:
        try:
            state = state_of(pod, commands)
            report = look(pod, commands, offset) if state == "ACTIVE" else None
            lost = 0
        except (CommandError, ValueError) as error:  # ValueError: an answer that makes no sense
            lost += 1
            if lost == LOST_CONTACTS or getattr(error, "code", 0) == 127:
                raise
            commands.say(f"no answer ({lost} of {LOST_CONTACTS} in a row): {error}")
            time.sleep(poll)
            continue
        if state != told:
            commands.say(f"{time.strftime('%H:%M:%S')} {pod.name}: {state}")
            told = state
        if report:
            print(report.log, end="", flush=True)
            more, offset = report.offset != offset, report.offset
            since_end = since_end + 1 if report.state == "ended" else 0
            if report.state == "ended" and report.exit_code == 0 and not more:
                return 0
            # Other ends may be the first sign of a preemption, which the state shows soon.
            settled = since_end > SETTLING and not more
            if report.state == "absent" or (settled and _interrupted(report)):
                if not pod.training:
                    raise CommandError(f"{pod.name} is ACTIVE, but nothing was started on it", 1)
                start(pod, commands, code)
            elif settled:
                return report.exit_code
        elif state in GONE and pod.spot:
            commands.say(f"{pod.name} was preempted: asking for another one")
            delete(pod, commands)
            create(pod, commands)
            told, offset, since_end = "", 0, 0
        elif state not in WAITING:
            raise CommandError(
                f"{pod.name} is {state or 'in no state'}; this tells why, then delete it:\n"
                f"  {shlex.join(queued(pod, 'describe'))}",
                1,
            )
        time.sleep(poll)


def look(pod: Pod, commands: Commands, offset: int) -> pod_hosts.Report:
    """What worker 0 is at, and its log from byte `offset` on."""
    script = pod_hosts.look(offset)
    printed = commands.run(ssh(pod, "0", script), timeout=180, capture=True, quiet=True)
    return pod_hosts.parse(printed, offset)


def _interrupted(report: pod_hosts.Report) -> bool:
    """Whether the system, not a person, stopped the training: then it is to go on."""
    return report.exit_code == training.STOPPED and not report.by_hand


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv: Sequence[str] | None = None) -> None:
    training.run_main(_parser(), argv, act)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("name", type=checked("name"), help="of the pod")
    common.add_argument(
        "--notes",
        type=pathlib.Path,
        default=NOTES,
        help="folder of the notes (default: %(default)s)",
    )
    training.add_dry_run(common)
    code = argparse.ArgumentParser(add_help=False)
    code.add_argument(
        "--code", type=pathlib.Path, default=pathlib.Path.cwd(),
        help="the checkout whose last commit runs (default: here)",
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True)

    verb = verbs.add_parser("create", parents=[common], help="ask for a pod")
    verb.add_argument("--zone", type=checked("zone"), required=True)
    verb.add_argument("--accelerator-type", type=checked("accelerator"), required=True)
    verb.add_argument("--project", type=checked("project"), help="default: gcloud's")
    verb.add_argument(
        "--runtime-version", type=checked("runtime"), help="default: Google's for this accelerator"
    )
    verb.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
    verb.add_argument(
        "--valid-until", type=checked("duration"), help="give up waiting after it, such as 6h"
    )
    verb.add_argument("--network", type=checked("name"))
    verb.add_argument("--subnetwork", type=checked("name"))
    verb.add_argument("--service-account", type=checked("account"))

    verb = verbs.add_parser(
        "start", parents=[common, code], help="start training on it: start NAME -- ARGUMENTS"
    )
    verb.add_argument(
        "--setup", default="", help="shell commands for every host, such as mounting a file system"
    )
    verb = verbs.add_parser("watch", parents=[common, code], help="state, log, and resurrection")
    verb.add_argument("--poll", type=float, default=30.0, help="seconds (default: %(default)s)")
    verb.add_argument(
        "--delete-when-done", action="store_true", help="delete the pod once the training has ended"
    )
    verbs.add_parser("stop", parents=[common], help="checkpoint, then end the training")
    verb = verbs.add_parser("delete", parents=[common], help="give the pod back")
    training.add_yes(verb)
    verb.add_argument("--zone", type=checked("zone"), help="where there is no note")
    verb.add_argument("--project", type=checked("project"))
    return parser


def act(arguments: argparse.Namespace, given: tuple[str, ...], commands: Commands) -> int:
    name, notes = arguments.name, arguments.notes
    if arguments.verb == "create":
        pod = _new_pod(arguments)
        create(pod, commands)
        if not commands.dry_run:
            write(notes, pod)
        commands.say(f"{name} costs from when it is ACTIVE until: {_again('delete', name)}")
        return 0
    if arguments.verb == "delete" and arguments.zone:
        pod = Pod(name=name, zone=arguments.zone, project=arguments.project or "")
    else:
        pod = read(notes, name)
    if arguments.verb == "start":
        pod = pod.with_training(training.check(given, arguments.code), arguments.setup)
        if not commands.dry_run:
            _check_committed(arguments.code, commands)
            write(notes, pod)  # first: `watch` does what is left undone here
            if (state := state_of(pod, commands)) != "ACTIVE":
                commands.say(f"{name} is {state}; this starts it when it is ACTIVE:")
                commands.say(f"  {_again('watch', name)}")
                return 0
        start(pod, commands, arguments.code)
        commands.say(f"{name}: started. Follow it: {_again('watch', name)}")
        return 0
    if arguments.verb == "stop":
        commands.run(ssh(pod, "0", pod_hosts.stop()), timeout=180)
        commands.say(f"{name}: told to stop. The pod costs on until: {_again('delete', name)}")
        return 0
    if arguments.verb == "watch":
        return _watch(pod, arguments, commands)
    if not commands.confirm(f"Delete {name} and all that is on its disks?", arguments.yes):
        commands.say("left as it is")
        return 1
    delete(pod, commands)
    if not commands.dry_run:
        remove(notes, name)
    return 0


def _watch(pod: Pod, arguments: argparse.Namespace, commands: Commands) -> int:
    try:
        code = watch(pod, commands, arguments.code, arguments.poll)
    except KeyboardInterrupt:
        print(
            f"\n{pod.name} goes on, and costs. Watch it again: {_again('watch', pod.name)}; "
            f"end it: {_again('delete', pod.name)}"
        )
        return 130
    if commands.dry_run:
        return 0
    commands.say(f"{pod.name}: the training ended with {code}")
    if arguments.delete_when_done and code != training.STOPPED:
        delete(pod, commands)
        remove(arguments.notes, pod.name)
    else:
        commands.say(f"the pod costs on until: {_again('delete', pod.name)}")
    return code


def _new_pod(arguments: argparse.Namespace) -> Pod:
    kind = arguments.accelerator_type.split("-")[0]
    runtime = arguments.runtime_version or RUNTIMES.get(kind)
    if runtime is None:
        raise ValueError(
            f"--runtime-version is needed for {kind}; known are {', '.join(RUNTIMES)}. "
            "https://cloud.google.com/tpu/docs/runtimes lists them"
        )
    return Pod(
        name=arguments.name,
        zone=arguments.zone,
        project=arguments.project or "",
        accelerator_type=arguments.accelerator_type,
        runtime_version=runtime,
        spot=arguments.spot,
        valid_until=arguments.valid_until or "",
        network=arguments.network or "",
        subnetwork=arguments.subnetwork or "",
        service_account=arguments.service_account or "",
    )


def _check_committed(code: pathlib.Path, commands: Commands) -> None:
    changed = commands.run(
        ["git", "-C", str(code), "status", "--porcelain", "--untracked-files=no"],
        timeout=60, capture=True, quiet=True,
    )  # fmt: skip
    if changed:
        raise ValueError(f"{code}: not committed, so the pod would not get it:\n{changed.rstrip()}")


def _again(verb: str, name: str) -> str:
    return f"python -m launch.tpu {verb} {name}"


if __name__ == "__main__":
    main()
