"""Cloud TPU pods as queued resources, through gcloud: create, start, watch, stop, delete.

Examples:
  python -m launch.tpu create head-1 --zone us-central2-b --accelerator-type v4-64 --spot
  python -m launch.tpu start head-1 -- --config=configs/tpu_v4.py --workdir=/mnt/runs/tpu_v4
  python -m launch.tpu watch head-1      # state and log; creates a preempted spot pod again
  python -m launch.tpu stop head-1       # checkpoint, end of the training; the pod still costs
  python -m launch.tpu delete head-1     # the pod is gone

`create` shows what it will create and asks. With --dry-run all but `watch` print a script and run
nothing. The settings of a pod are kept in ~/.local/state/spinmeround (--notes), so that later commands need
only its name. Credentials stay with gcloud.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import shlex
import tempfile
import time
from collections.abc import Sequence

from launch import pod_hosts, training
from launch.commands import CommandError, Commands, add_dry_run, name, run_main
from launch.pod_notes import NOTES, Pod, path, read, write

# The software that Google pairs with each kind of TPU; JAX itself comes with our own installation.
RUNTIMES = {
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v4": "tpu-ubuntu2204-base",
}
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
GONE = ("SUSPENDING", "SUSPENDED")
COUNTS_CHIPS = ("v5litepod", "v6e")  # other accelerator types count cores, two per chip
LOST_CONTACTS = 10  # failed polls in a row after which `watch` gives up
SETTLING = 4  # polls after which the end of a training is no sign of a preemption


# --------------------------------------------------------------------------------------------------
# The commands of gcloud


def queued(pod: Pod, verb: str, *flags: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, pod.name, *_where(pod), *flags]


def ssh(pod: Pod, worker: str, script: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", pod.name, *_where(pod),
            f"--worker={worker}", f"--command={script}"]  # fmt: skip


def again(verb: str, pod: Pod) -> str:
    return f"python -m launch.tpu {verb} {pod.name}"


def _where(pod: Pod) -> list[str]:
    project = [f"--project={pod.project}"] if pod.project else []
    return [f"--zone={pod.zone}", *project, "--quiet"]


def create(pod: Pod, commands: Commands) -> None:
    values = {
        "node-id": pod.name, "accelerator-type": pod.accelerator_type,
        "runtime-version": pod.runtime_version, "valid-until-duration": pod.valid_until,
        "network": pod.network, "subnetwork": pod.subnetwork,
        "service-account": pod.service_account,
    }  # fmt: skip
    flags = [f"--{flag}={value}" for flag, value in values.items() if value]
    flags += ["--spot"] if pod.spot else []
    commands.run(queued(pod, "create", *flags), timeout=300)


def delete(pod: Pod, commands: Commands) -> None:
    """Delete the request and, with --force, its node."""
    commands.run(queued(pod, "delete", "--force"), timeout=900)


def state_of(pod: Pod, commands: Commands) -> str:
    """The state of the queued resource; SUSPENDED if it does not exist."""
    argv = queued(pod, "describe", "--format=value(state.state)")
    try:
        return commands.run(argv, timeout=120, capture=True, quiet=True).strip()
    except CommandError as error:
        if "NOT_FOUND" in str(error):
            return "SUSPENDED"
        raise


def start(pod: Pod, commands: Commands, code: pathlib.Path) -> None:
    """Copy the committed code to all hosts, install it, and start or resume the training."""
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
    """Follow the pod until its training ends; return the training's exit code.

    A preempted spot pod is created again and the same training started, which resumes.

    Raises:
        CommandError: the pod failed, or cannot be reached.
    """
    shown, offset, lost, since_end = "", 0, 0, 0
    while True:
        try:
            state = state_of(pod, commands)
            report = look(pod, commands, offset) if state == "ACTIVE" else None
            lost = 0
        except (CommandError, ValueError) as error:  # ValueError: a malformed answer
            lost += 1
            if lost == LOST_CONTACTS or getattr(error, "code", 0) == 127:
                raise
            commands.say(f"no answer ({lost} of {LOST_CONTACTS} in a row): {error}")
            time.sleep(poll)
            continue
        if state != shown:
            commands.say(f"{time.strftime('%H:%M:%S')} {pod.name}: {state}")
            shown = state
        if report:
            print(report.log, end="", flush=True)
            more, offset = report.offset != offset, report.offset
            since_end = since_end + 1 if report.state == "ended" else 0
            if report.state == "ended" and report.exit_code == 0 and not more:
                return 0
            # Another exit code may be the first sign of a preemption, which the state shows soon.
            settled = since_end > SETTLING and not more
            # The system stopped it, and not a person: then it resumes.
            interrupted = report.exit_code == training.STOPPED and not report.by_hand
            if report.state == "absent" or (settled and interrupted):
                if not pod.training:
                    raise CommandError(f"{pod.name} is ACTIVE, but nothing was started on it", 1)
                start(pod, commands, code)
            elif settled:
                return report.exit_code
        elif state in GONE and pod.spot:
            commands.say(f"{pod.name} was preempted: creating it again")
            delete(pod, commands)
            create(pod, commands)
            shown, offset, since_end = "", 0, 0
        elif state not in WAITING:
            raise CommandError(
                f"{pod.name} is {state or 'in no state'}; find out why, then delete it:\n"
                f"  {shlex.join(queued(pod, 'describe'))}",
                1,
            )
        time.sleep(poll)


def look(pod: Pod, commands: Commands, offset: int) -> pod_hosts.Report:
    """State of the training on worker 0, and its log from byte `offset` on."""
    script = pod_hosts.look(offset)
    printed = commands.run(ssh(pod, "0", script), timeout=180, capture=True, quiet=True)
    return pod_hosts.parse(printed, offset)


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv: Sequence[str] | None = None) -> None:
    run_main(_parser(), argv, act)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("name", type=name, help="of the pod")
    common.add_argument("--notes", type=in_home, default=NOTES, help="folder (%(default)s)")
    dry = argparse.ArgumentParser(add_help=False)
    add_dry_run(dry)
    yes = argparse.ArgumentParser(add_help=False)
    yes.add_argument("--yes", action="store_true", help="do not ask")
    code = argparse.ArgumentParser(add_help=False)
    code.add_argument(
        "--code", type=pathlib.Path, default=pathlib.Path.cwd(),
        help="checkout whose last commit runs (the current folder)",
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True)
    parser.set_defaults(dry_run=False)
    verb = verbs.add_parser("create", parents=[common, dry, yes], help="create a pod, after asking")
    verb.add_argument("--zone", required=True, help="such as us-central2-b")
    verb.add_argument("--accelerator-type", type=_accelerator, required=True, help="such as v4-64")
    verb.add_argument("--project", default="", help="(gcloud's)")
    verb.add_argument("--runtime-version", default="", help="(Google's for this accelerator)")
    verb.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
    verb.add_argument("--valid-until", default="", help="give up waiting after this, such as 6h")
    for flag in ("--network", "--subnetwork", "--service-account"):
        verb.add_argument(flag, default="", help="(Google's default)")

    verb = verbs.add_parser(
        "start", parents=[common, code, dry], help="start training: start NAME -- ARGUMENTS"
    )
    verb.add_argument(
        "--setup", default="", help="shell commands for every host, such as mounting a file system"
    )
    verb = verbs.add_parser("watch", parents=[common, code], help="follow state and log, resume")
    verb.add_argument("--poll", type=float, default=30.0, help="seconds (%(default)s)")
    verb.add_argument(
        "--delete-when-done", action="store_true", help="delete the pod when the training has ended"
    )
    verbs.add_parser(
        "stop", parents=[common, dry], help="write a checkpoint, then end the training"
    )
    verb = verbs.add_parser(
        "delete", parents=[common, dry, yes], help="delete the pod, after asking"
    )
    verb.add_argument("--zone", help="needed where there is no note")
    verb.add_argument("--project", default="")
    return parser


def in_home(text: str) -> pathlib.Path:
    """A folder, "~" being the home folder."""
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # an unknown user, as in some containers
        raise argparse.ArgumentTypeError(
            f"{text}: there is no home folder; give another"
        ) from error


def _accelerator(text: str) -> str:
    if not re.fullmatch(r"v[0-9]+[a-z]*-[1-9][0-9]*", text, flags=re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form v4-64 or v5litepod-32")
    return text


def act(arguments: argparse.Namespace, given: tuple[str, ...], commands: Commands) -> int:
    """Carry out one verb; the exit code."""
    notes = arguments.notes
    if arguments.verb == "create":
        return _create(arguments, commands)
    if arguments.verb == "delete" and arguments.zone:
        pod = Pod(name=arguments.name, zone=arguments.zone, project=arguments.project)
    else:
        pod = read(notes, arguments.name)
    if arguments.verb == "start":
        pod = dataclasses.replace(
            pod, training=training.check(given, arguments.code), setup=arguments.setup
        )
        if not commands.dry_run:
            _check_committed(arguments.code, commands)
            write(notes, pod)  # first, so that `watch` can finish what fails here
            if (state := state_of(pod, commands)) != "ACTIVE":
                commands.say(f"{pod.name} is {state}; this starts the training once it is ACTIVE:")
                commands.say(f"  {again('watch', pod)}")
                return 0
        start(pod, commands, arguments.code)
        commands.say(f"{pod.name}: started. Follow it: {again('watch', pod)}")
        return 0
    if arguments.verb == "stop":
        commands.run(ssh(pod, "0", pod_hosts.stop()), timeout=180)
        commands.say(f"{pod.name}: stopping. The pod costs until: {again('delete', pod)}")
        return 0
    if arguments.verb == "watch":
        return _watch(pod, arguments, commands)
    if not commands.confirm(f"Delete {pod.name} and its disks?", arguments.yes):
        commands.say("not deleted")
        return 1
    delete(pod, commands)
    if not commands.dry_run:
        path(notes, pod.name).unlink(missing_ok=True)
    return 0


def _create(arguments: argparse.Namespace, commands: Commands) -> int:
    kind, _, number = arguments.accelerator_type.partition("-")
    runtime = arguments.runtime_version or RUNTIMES.get(kind)
    if not runtime:
        raise ValueError(
            f"--runtime-version is needed for {kind}; known are {', '.join(RUNTIMES)}. "
            "https://cloud.google.com/tpu/docs/runtimes lists them"
        )
    values = {f.name: getattr(arguments, f.name, f.default) for f in dataclasses.fields(Pod)}
    pod = Pod(**{**values, "runtime_version": runtime})
    chips = int(number) if kind in COUNTS_CHIPS else max(1, int(number) // 2)
    capacity = "spot, may be preempted; `watch` creates it again" if pod.spot else "on demand"
    for line in (
        f"This creates {pod.name}: {pod.accelerator_type}, {chips} chips, {capacity},",
        f"in {pod.zone} of {pod.project or 'the project of gcloud'}, software {runtime}.",
        "It costs chips x hours x price from when it is ACTIVE until it is deleted, used or not.",
        f"Prices per chip-hour: https://cloud.google.com/tpu/pricing; {24 * chips} chip-hours a day.",
    ):
        commands.say(line)
    if not commands.confirm(f"Create {pod.name}?", arguments.yes):
        commands.say("not created")
        return 1
    create(pod, commands)
    if not commands.dry_run:
        write(arguments.notes, pod)
    commands.say(f"{pod.name} costs until: {again('delete', pod)}")
    return 0


def _watch(pod: Pod, arguments: argparse.Namespace, commands: Commands) -> int:
    try:
        code = watch(pod, commands, arguments.code, arguments.poll)
    except KeyboardInterrupt:
        print(
            f"\n{pod.name} goes on, and costs. Watch it again: {again('watch', pod)}; "
            f"delete it: {again('delete', pod)}"
        )
        return 130
    commands.say(f"{pod.name}: the training ended with {code}")
    if arguments.delete_when_done and code != training.STOPPED:
        delete(pod, commands)
        path(arguments.notes, pod.name).unlink(missing_ok=True)
    else:
        commands.say(f"the pod costs until: {again('delete', pod)}")
    return code


def _check_committed(code: pathlib.Path, commands: Commands) -> None:
    changed = commands.run(
        ["git", "-C", str(code), "status", "--porcelain", "--untracked-files=no"],
        timeout=60, capture=True, quiet=True,
    )  # fmt: skip
    if changed:
        raise ValueError(f"{code}: the pod gets only what is committed:\n{changed.rstrip()}")


if __name__ == "__main__":
    main()
