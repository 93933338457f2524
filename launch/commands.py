"""Run external programs without a shell, without prompts and with a time limit."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

HOW_TO_INSTALL = {
    "gcloud": "install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install",
    "sbatch": "run this on a login node of the SLURM cluster",
}


class CommandError(Exception):
    """A program is missing, failed or took too long; `code` is the exit code to end with."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Commands:
    """Runs programs; with `dry_run`, prints them instead, quoted for a shell, one per line."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float | None,
        capture: bool = False,
        stdin: str = "",
        quiet: bool = False,
    ) -> str:
        """Run `argv` to its end and return what it printed, if captured; "" in a dry run.

        Args:
            timeout: seconds; None for no limit.
            capture: return standard output; otherwise it goes to the terminal.
            stdin: text for its standard input.
            quiet: do not print the command first.

        Raises:
            CommandError: the program is missing (code 127), failed (its own code) or timed out (124).
        """
        if self.dry_run:
            print(shlex.join(argv) + (f" <<'END'\n{stdin}END" if stdin else ""))
            return ""
        if shutil.which(argv[0]) is None:
            hint = HOW_TO_INSTALL.get(argv[0], "install it")
            raise CommandError(f"{argv[0]} is not on the PATH: {hint}", 127)
        if not quiet:
            print(f"+ {shlex.join(argv)}", file=sys.stderr, flush=True)
        pipe = subprocess.PIPE if capture else None
        try:
            done = subprocess.run(
                argv, input=stdin, stdout=pipe, stderr=pipe,
                encoding="utf-8", errors="replace", timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise CommandError(
                f"timed out after {timeout:.0f} s: {shlex.join(argv)}", 124
            ) from error
        if done.returncode:
            output = f":\n{done.stderr.strip()}" if capture else ", see above"
            # A program killed by signal n counts as 128 + n, as in a shell.
            code = done.returncode if done.returncode > 0 else 128 - done.returncode
            raise CommandError(f"failed with {code}{output}\n  {shlex.join(argv)}", code)
        return done.stdout if capture else ""

    def say(self, text: str) -> None:
        """Print for the reader; in a dry run as a comment, so that the output stays a script."""
        print(f"# {text}" if self.dry_run else text, flush=True)

    def confirm(self, question: str, yes: bool) -> bool:
        """Whether to go on: `yes`, a dry run, or the answer on the terminal.

        Raises:
            CommandError: there is no terminal to ask on.
        """
        if yes or self.dry_run:
            return True
        if not sys.stdin.isatty():
            raise CommandError(f"{question} There is no terminal to answer on: give --yes", 2)
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


# --------------------------------------------------------------------------------------------------
# Command lines of the form VERB ARGUMENTS [-- ARGUMENTS OF THE TRAINING]


def run_main(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    act: Callable[[argparse.Namespace, tuple[str, ...], Commands], int],
) -> None:
    """Parse, act, and exit; an error prints one line and gives a non-zero exit code."""
    own = list(sys.argv[1:] if argv is None else argv)
    at = own.index("--") if "--" in own else len(own)
    training, own = tuple(own[at + 1 :]), own[:at]
    arguments = parser.parse_args(own)
    try:
        if training and arguments.verb != "start":
            raise ValueError("only start takes arguments of the training, after --")
        sys.exit(act(arguments, training, Commands(arguments.dry_run)))
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def name(text: str) -> str:
    """argparse type: the name of a pod or job; also part of paths and of other programs' options."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name: lower-case letters, digits and dashes, a letter first, at most 63"
        )
    return text


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
