"""Runs the tools of others: never through a shell, never with a prompt, never without an end."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

HOW_TO_INSTALL = {
    "gcloud": "install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install",
    "xpk": "pip install xpk (in an environment of its own), see https://github.com/AI-Hypercomputer/xpk",
    "kubectl": "gcloud components install kubectl gke-gcloud-auth-plugin",
    "sbatch": "this must run where SLURM is, on a login node",
    "squeue": "this must run where SLURM is, on a login node",
    "sacct": "this must run where SLURM is, on a login node",
    "scancel": "this must run where SLURM is, on a login node",
    "ssh": "apt install openssh-client, or what your system has instead",
    "git": "apt install git, or what your system has instead",
}


class CommandError(Exception):
    """A command could not be run, failed or took too long; `code` is what to exit with."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Commands:
    """Runs commands, or with `dry_run` prints them, quoted for a shell, one a line."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float | None,
        capture: bool = False,
        stdin: str | None = None,
        quiet: bool = False,
    ) -> str:
        """Run `argv` to its end; empty in a dry run.

        Args:
            timeout: seconds; None is for what follows a log until it is interrupted.
            capture: return its standard output; otherwise that goes to the terminal as it comes.
            stdin: what it reads; otherwise it finds the end of input.
            quiet: do not announce it, for what is asked again and again.

        Raises:
            CommandError: the tool is missing (127), it failed (its own code), or ran too long (124).
        """
        if self.dry_run:
            print(shlex.join(argv) + ("" if stdin is None else f" <<'END'\n{stdin}END"))
            return ""
        if shutil.which(argv[0]) is None:
            hint = HOW_TO_INSTALL.get(argv[0], "install it")
            raise CommandError(f"{argv[0]} is not on the PATH: {hint}", 127)
        if not quiet:
            print(f"+ {shlex.join(argv)}", file=sys.stderr, flush=True)
        pipe = subprocess.PIPE if capture else None
        try:
            done = subprocess.run(
                argv, input="" if stdin is None else stdin, stdout=pipe, stderr=pipe,
                encoding="utf-8", errors="replace", timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise CommandError(f"no end after {timeout:.0f} s: {shlex.join(argv)}", 124) from error
        if done.returncode:
            told = f":\n{done.stderr.strip()}" if capture else ", see above"
            # A command killed by signal n counts as 128 + n, as in a shell.
            code = done.returncode if done.returncode > 0 else 128 - done.returncode
            raise CommandError(f"failed with {code}{told}\n  {shlex.join(argv)}", code)
        return done.stdout if capture else ""

    def say(self, text: str) -> None:
        """A line for the reader; in a dry run a comment, so that the output stays a script."""
        print(f"# {text}" if self.dry_run else text, flush=True)

    def confirm(self, question: str, yes: bool) -> bool:
        """Whether to go on: `yes`, a dry run, or the answer on the terminal."""
        if yes or self.dry_run:
            return True
        if not sys.stdin.isatty():
            raise CommandError(f"{question} There is no terminal to answer on: give --yes", 2)
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
