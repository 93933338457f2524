"""The training command that the launchers start, and its exit codes."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

# The training exits with this code after a SIGTERM: a checkpoint is written, the same command resumes.
STOPPED = 42


def check(arguments: Sequence[str], checkout: pathlib.Path | None = None) -> tuple[str, ...]:
    """The arguments of the training, if it can start and resume with them.

    Args:
        checkout: folder here of which the hosts have a copy; a relative --config must exist in it.

    Raises:
        ValueError: no --config or --workdir, a config that does not exist, or control characters.
    """
    for flag, why in (
        ("--config=", "the experiment, such as --config=configs/tpu_v4.py"),
        ("--workdir=", "a folder that all hosts see, from which the run resumes"),
    ):
        if not any(argument.startswith(flag) for argument in arguments):
            raise ValueError(f"after --, the training needs {flag}...: {why}")
    for argument in arguments:
        if not argument.isprintable():
            raise ValueError(f"{argument!r}: control characters cannot be passed to the hosts")
    for config in (a.removeprefix("--config=") for a in arguments if a.startswith("--config=")):
        file = pathlib.Path(config.partition(":")[0])
        if checkout and not file.is_absolute() and not (checkout / file).is_file():
            raise ValueError(
                f"--config={config}: no such file in {checkout.absolute()}; run this in the checkout "
                "that the hosts have, or give the absolute path of a file on them"
            )
    return tuple(arguments)


def command(python: str, arguments: Sequence[str]) -> list[str]:
    """The training command as a list of words."""
    return [python, "-m", "spinmeround_jax.train", *arguments, f"--stopped_exit_code={STOPPED}"]
