"""Shared by all commands: argument types, one-line error messages, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from spinmeround_jax import files
from spinmeround_jax.files import InputError
from spinmeround_jax.startup import SIGNALS, end_on_signals

EXIT_CODES = (
    "exit code: 0 done, 1 an input cannot be used (others are done), 2 wrong usage, 130 interrupted"
)


class UsageError(InputError):
    """The arguments contradict each other; exit code 2, like the errors of argparse."""


def build_parser(
    module: str, description: str | None, examples: str | None = None
) -> argparse.ArgumentParser:
    """The parser of `python -m module`; description and examples are printed without wrapping."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=EXIT_CODES if examples is None else f"{examples.rstrip()}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # "-30,10" is a value, not an option; argparse knows it from Python 3.14 on.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    return parser


def main(
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    stopped: str = "the same command resumes",
) -> int:
    """Parse `argv` and run the command; returns the exit code.

    Args:
        stopped: message about the state that an interruption leaves.
    """
    return guarded(lambda: run(parse(argv)), stopped)


def guarded(run: Callable[[], int | None], stopped: str) -> int:
    """Call `run`; an error, Ctrl-C or SIGTERM is printed in one line and becomes the exit code."""
    try:
        with _interruptible():
            return run() or 0
    except UsageError as error:
        print(f"error: {message(error)}", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError, ImportError, BrokenProcessPool) as error:
        print(f"error: {message(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr)
        return 130


def message(error: BaseException) -> str:
    """One line about `error`."""
    text = files.explain(error) if isinstance(error, OSError) else str(error)
    if isinstance(error, BrokenProcessPool):
        text = "a worker process was killed, perhaps for lack of memory; try fewer --workers"
    elif isinstance(error, ModuleNotFoundError):
        text += "; README lists the extras that install such packages"
    text = re.sub(r"\[Errno -?\d+\] ", "", text)  # of nested errors
    return " ".join(text.split()) or type(error).__name__


def end(code: int, interrupted: bool = False) -> None:
    """End the process; if interrupted, without waiting for threads that still compile."""
    end_on_signals(code)  # else a signal during Python's own clean-up prints a traceback
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted or code == 130:
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM a KeyboardInterrupt like Ctrl-C, unless ignored or handled outside of Python."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        found = {number: signal.getsignal(number) for number in SIGNALS}
        handlers = {n: h for n, h in found.items() if h not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def progress(**options: Any) -> tqdm:
    """A progress bar; in log files it prints a line per minute."""
    interval = 0.1 if sys.stderr.isatty() else 60.0
    return tqdm(mininterval=interval, maxinterval=max(interval, 10.0), **options)


# --------------------------------------------------------------------------------------------------
# Types of arguments


def integer(least: int = 0, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def parse(text: str) -> int:
        # int() is slow for, or refuses, very many digits.
        value = int(text) if re.fullmatch(r"[+-]?\d{1,20}", text.strip()) else None
        if value is None or not least <= value <= most:
            limits = f"at least {least}" if most == 2**31 - 1 else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {limits}")
        return value

    return parse


def real(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """A finite number from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most:
            limits = f" of at least {least:g}" if math.isfinite(least) else ""
            limits += f" and at most {most:g}" if math.isfinite(most) else ""
            raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number{limits}")
        return value

    return parse


def part(text: str) -> tuple[int, int]:
    """'1/4' -> (1, 4): part 1 of 4, counted from 0."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1")
    return int(index), int(count)


def path(text: str) -> pathlib.Path:
    """A file or folder, local or in a bucket (gs://...)."""
    try:
        return files.as_path(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
