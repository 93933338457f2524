"""The command that all launchers start, and what its end means."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence

from launch.commands import CommandError, Commands

# Training ends with it after a SIGTERM: the checkpoint is written, the same command goes on. 42 is what
# XPK takes for "start again".
STOPPED = 42
MODULE = ("-m", "spinmeround_jax.train")


def split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """What stands before the first "--", for the launcher, and after it, for the training."""
    argv = list(argv)
    if "--" not in argv:
        return argv, ()
    at = argv.index("--")
    return argv[:at], tuple(argv[at + 1 :])


def check(arguments: Sequence[str], checkout: pathlib.Path | None = None) -> tuple[str, ...]:
    """The arguments of the training.

    Args:
        checkout: the folder here of which the hosts will have a copy: the config must be in it. Whether
            there is one at an absolute path only they can tell.

    Raises:
        ValueError: no config, no folder all hosts share, or characters that no host takes.
    """
    for flag, why in (
        ("--config=", "the experiment, such as --config=configs/tpu_v4.py"),
        ("--workdir=", "a folder that all hosts see, where the run goes on after an interruption"),
    ):
        if not any(argument.startswith(flag) for argument in arguments):
            raise ValueError(f"after --, the training needs {flag}...: {why}")
    for argument in arguments:
        if not argument.isprintable():
            raise ValueError(f"{argument!r}: line ends and control characters cannot be passed on")
    for config in (a.removeprefix("--config=") for a in arguments if a.startswith("--config=")):
        file = pathlib.Path(config.partition(":")[0])
        if checkout and not file.is_absolute() and not (checkout / file).is_file():
            raise ValueError(
                f"--config={config}: there is no such file in {checkout.absolute()}; run this in the "
                "checkout that the hosts have, or give the absolute path of a file on them"
            )
    return tuple(arguments)


def command(python: str, arguments: Sequence[str]) -> list[str]:
    """The training as a list of words; it ends with STOPPED where a SIGTERM stopped it."""
    return [python, *MODULE, *arguments, f"--stopped_exit_code={STOPPED}"]


def runs(pid_file: str) -> str:
    """A shell condition: the process of `pid_file` (quoted for a shell) is a training, alive.

    Its number alone could be another's after a reboot; what has died has no command line.
    """
    return f'grep -qs spinmeround_jax.train "/proc/$(cat {pid_file} 2>/dev/null)/cmdline"'


def run_main(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    act: Callable[[argparse.Namespace, tuple[str, ...], Commands], int],
) -> None:
    """Parse, act, and end the process with the right code and one line where something is wrong."""
    own, training = split(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(own)
    try:
        if training and arguments.verb != "start":
            raise ValueError("arguments of the training, after --, belong to start")
        sys.exit(act(arguments, training, Commands(arguments.dry_run)))
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def positive(text: str) -> int:
    """As a `type` of argparse: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands and run none of them"
    )


def add_yes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="do not ask")
