"""A training on hosts reached by ssh, one process each: start, watch, stop, delete.

Examples:
  python -m launch.nodes start head-1 --hosts node1,node2 --directory /shared/spinmeround --dry-run \\
      -- --config=configs/h100.py --workdir=/shared/runs/h100
  python -m launch.nodes watch head-1 --hosts node1,node2 --directory /shared/spinmeround
  python -m launch.nodes stop head-1 --hosts node1,node2 --directory /shared/spinmeround
  python -m launch.nodes delete head-1 --hosts node1,node2 --directory /shared/spinmeround

--directory is a checkout with its .venv that all hosts see at the same place. The first host is where the
processes meet: the others must reach its --port. `stop` writes a checkpoint; `delete` kills what is left.
With another launcher, set JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT and JAX_PROCESS_ID for each process.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import shlex
from collections.abc import Sequence

from launch import training
from launch.commands import CommandError, Commands
from launch.names import check, checked


def ssh(host: str, script: str) -> list[str]:
    """No prompts: keys, or an agent, must do. The script goes to the login shell, as one word to bash."""
    return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=30",
            host, f"bash -c {shlex.quote(script)}"]  # fmt: skip


def files(arguments: argparse.Namespace, index: int) -> str:
    """Beginning of the names of what host `index` leaves: .log, .pid and .exit, quoted for a shell."""
    return shlex.quote(f"{arguments.directory}/runs/logs/{arguments.name}-{index}")


def start_script(arguments: argparse.Namespace, given: Sequence[str], index: int) -> str:
    """Start the process of host `index`, unless it runs; it outlives the connection."""
    coordinator = arguments.hosts[0].split("@")[-1]
    words = training.command(
        arguments.python,
        [
            *given,
            f"--coordinator={coordinator}:{arguments.port}",
            f"--process_count={len(arguments.hosts)}",
            f"--process_id={index}",
        ],
    )
    base = files(arguments, index)
    around = 'trap : TERM; base=$1; shift; echo $$ > "$base.pid"; "$@"; echo $? > "$base.exit"'
    return (
        f"if {training.runs(f'{base}.pid')}; then "
        f"echo {shlex.quote(f'{arguments.name} runs already')} >&2; exit 1; fi; "
        f"cd {shlex.quote(arguments.directory)} && mkdir -p runs/logs && rm -f {base}.exit && "
        f"{{ nohup setsid bash -c {shlex.quote(around)} training {base} {shlex.join(words)} "
        f">> {base}.log 2>&1 < /dev/null & }}"
    )


def kill_script(arguments: argparse.Namespace, index: int, signal: str) -> str:
    pid_file = f"{files(arguments, index)}.pid"
    return (
        f"{training.runs(pid_file)} || {{ echo {arguments.name} does not run here >&2; exit 1; }}; "
        f'kill -{signal} -- "-$(cat {pid_file})"'
    )


def start(arguments: argparse.Namespace, given: tuple[str, ...], commands: Commands) -> None:
    """On all hosts at once; where one fails, those that were started end by themselves in a while."""
    argvs = [ssh(host, start_script(arguments, given, i)) for i, host in enumerate(arguments.hosts)]
    _everywhere(argvs, commands)


def watch(arguments: argparse.Namespace, commands: Commands) -> int:
    """Follow the log of the first host until its process has ended; its exit code."""
    base = files(arguments, 0)
    follow = (
        f'tail --pid="$(cat {base}.pid)" -n 100 -F {base}.log; sleep 1; '
        f"exit $(cat {base}.exit 2>/dev/null || echo 1)"
    )
    try:
        commands.run(ssh(arguments.hosts[0], follow), timeout=None)
    except CommandError as error:
        if error.code == training.STOPPED:
            commands.say(f"{arguments.name} was stopped; the same start command resumes it")
        return_code = error.code
        if return_code in (127, 255):  # no ssh, or no connection: says nothing about the training
            raise
        return return_code
    return 0


def stop(arguments: argparse.Namespace, commands: Commands) -> None:
    """SIGTERM to the first host's process; all processes stop at the same step."""
    commands.run(ssh(arguments.hosts[0], kill_script(arguments, 0, "TERM")), timeout=120)


def delete(arguments: argparse.Namespace, commands: Commands) -> None:
    """Kill what still runs, on every host; none running is no error."""
    argvs = [
        ssh(host, f"({kill_script(arguments, i, 'KILL')}); true")
        for i, host in enumerate(arguments.hosts)
    ]
    _everywhere(argvs, commands)


def _everywhere(argvs: Sequence[Sequence[str]], commands: Commands) -> None:
    if commands.dry_run:
        for argv in argvs:
            commands.run(argv, timeout=None)
        return
    with concurrent.futures.ThreadPoolExecutor(max_workers=32) as pool:
        futures = [pool.submit(commands.run, argv, timeout=120, capture=True) for argv in argvs]
    failures = [str(future.exception()) for future in futures if future.exception()]
    if failures:
        code = next(f.exception() for f in futures if f.exception())
        raise CommandError("\n".join(failures), getattr(code, "code", 1))


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv: Sequence[str] | None = None) -> None:
    training.run_main(_parser(), argv, act)


def _hosts(text: str) -> list[str]:
    try:
        hosts = [check("host", host) for host in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if len(set(hosts)) < len(hosts):
        raise argparse.ArgumentTypeError("a host stands there twice")
    return hosts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.nodes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("name", type=checked("name"), help="of the run")
    common.add_argument("--hosts", type=_hosts, required=True, help="host,host,... in order")
    common.add_argument("--directory", type=checked("path"), required=True, help="of the checkout")
    training.add_dry_run(common)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser(
        "start", parents=[common], help="start a training: start NAME ... -- ARGUMENTS"
    )
    verb.add_argument("--port", type=training.positive, default=8476, help="default: %(default)s")
    verb.add_argument(
        "--python", default=".venv/bin/python", help="below --directory (default: %(default)s)"
    )
    verbs.add_parser("watch", parents=[common], help="follow the first host's log")
    verbs.add_parser("stop", parents=[common], help="checkpoint, then end")
    training.add_yes(verbs.add_parser("delete", parents=[common], help="kill what still runs"))
    return parser


def act(arguments: argparse.Namespace, given: tuple[str, ...], commands: Commands) -> int:
    where = shlex.join(
        [arguments.name, "--hosts", ",".join(arguments.hosts), "--directory", arguments.directory]
    )
    if arguments.verb == "start":
        start(arguments, training.check(given), commands)
        commands.say(f"Follow it: python -m launch.nodes watch {where}")
        return 0
    if arguments.verb == "watch":
        try:
            return watch(arguments, commands)
        except KeyboardInterrupt:
            print(f"\n{arguments.name} goes on. Stop it: python -m launch.nodes stop {where}")
            return 130
    if arguments.verb == "stop":
        stop(arguments, commands)
        return 0
    if not commands.confirm(f"Kill {arguments.name} without a checkpoint?", arguments.yes):
        commands.say("left as it is")
        return 1
    delete(arguments, commands)
    return 0


if __name__ == "__main__":
    main()
