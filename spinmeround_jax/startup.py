"""Ctrl-C and SIGTERM while a command imports its packages, which takes seconds, and at its very end.

Imports almost nothing: a signal before it runs still prints a traceback.
"""

import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_on_signals(code: int = 130, exit_code_option: str = "") -> None:
    """End the process at once on a signal, printing one line.

    Ignored signals, as in the background of a script, stay ignored.

    Args:
        exit_code_option: command-line option that sets another code.
    """
    for word, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if exit_code_option and name == exit_code_option and value.isdecimal():
            code = min(int(value), 255)

    def stop(number: int, frame: object) -> None:
        os.write(2, b"stopped\n")
        os._exit(code)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
