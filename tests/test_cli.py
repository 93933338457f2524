"""The skeleton of commands: exit codes, one line for each error, types of arguments."""

import argparse
import errno
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

from spinmeround_jax import cli
from spinmeround_jax.files import InputError
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    "error, code, text",
    [
        (InputError("a.png: empty\n  file"), 1, "a.png: empty file"),
        (InputError("a: unreadable ([Errno 2] No such file: 'b')"), 1, "unreadable (No such file"),
        (cli.UsageError("leave out --views"), 2, "leave out --views"),
        (FileNotFoundError(errno.ENOENT, "No such file", "b.npy"), 1, "b.npy: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "free some space"),
        (BrokenProcessPool("x"), 1, "fewer --workers"),
        (KeyboardInterrupt(), 130, "stopped; all is kept"),
    ],
)
def test_errors_become_a_line_and_an_exit_code(capsys, error, code, text):
    def run(args):
        raise error

    assert cli.main(lambda argv: argparse.Namespace(), run, [], stopped="all is kept") == code
    told = capsys.readouterr().err
    assert text in told and told.count("\n") == 1 and "Errno" not in told


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: 1 // 0, "")


@pytest.mark.parametrize(
    "kind, text, value",
    [
        (cli.integer(1), "3", 3), (cli.integer(), "-1", None), (cli.integer(1, 9), "10", None),
        (cli.integer(), "9" * 5000, None), (cli.integer(), "1e3", None),
        (cli.real(0), "0.5", 0.5), (cli.real(0), "-0.1", None), (cli.real(), "nan", None),
        (cli.real(), "much", None),
        (cli.part, "1/4", (1, 4)), (cli.part, "2/2", None), (cli.part, "-1/2", None),
        (cli.part, "", None), (cli.part, "1/0", None),
    ],
)  # fmt: skip
def test_types_of_arguments(capsys, kind, text, value):
    parser = cli.build_parser("command", None)
    parser.add_argument("--value", type=kind)
    if value is None:
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([f"--value={text}"])
        assert "argument --value" in capsys.readouterr().err
    else:
        assert parser.parse_args(["--value", text]).value == value


def test_negative_angles_are_values():
    parser = cli.build_parser("command", None)
    parser.add_argument("--yaw-pitch")
    assert parser.parse_args(["--yaw-pitch", "-30,10"]).yaw_pitch == "-30,10"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_running_is_told_in_a_line(capsys, number):
    if number == signal.SIGINT:  # ignored where tests run in the background
        signal.signal(number, signal.default_int_handler)
    before = signal.getsignal(number)
    assert cli.guarded(lambda: os.kill(os.getpid(), number), "all is kept") == 130
    assert capsys.readouterr().err == "stopped; all is kept\n"
    assert signal.getsignal(number) == before


SENDS_ITSELF_A_SIGNAL = """
import os, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "numpy":  # what every command imports
            os.kill(os.getpid(), int(sys.argv.pop()))

sys.meta_path.insert(0, Finder())
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "command, number, code",
    [
        (["spinmeround_jax.train", "--stopped_exit_code=42"], signal.SIGTERM, 42),
        (["spinmeround_jax.train", "--stopped_exit_code", "42"], signal.SIGINT, 42),
        (["spinmeround_jax.train"], signal.SIGTERM, 0),
        (["spinmeround_jax.sample"], signal.SIGINT, 130),
        (["spinmeround_jax.reconstruct"], signal.SIGINT, 130),
        (["spinmeround_jax.evaluate"], signal.SIGTERM, 130),
        (["spinmeround_jax.photo"], signal.SIGINT, 130),
        (["spinmeround_jax.evaluation.figures"], signal.SIGTERM, 130),
        (["data_prep.validate"], signal.SIGINT, 130),
        (["data_prep.export_portraits"], signal.SIGTERM, 130),
        (["data_prep.render_heads"], signal.SIGINT, 130),
        (["data_prep.cache_latents"], signal.SIGTERM, 130),
    ],
)
def test_a_signal_during_the_imports_is_told_in_a_line(command, number, code):
    run = subprocess.run(
        [sys.executable, "-c", SENDS_ITSELF_A_SIGNAL, *command, str(int(number))],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (code, "", "stopped\n")
