"""Shell commands for the hosts of a pod, run through ssh; every word is quoted.

Below ~/spinmeround on a host: code/, venv/, log, pid (of the shell around the training), exit (its exit code).
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence

from launch import training

ARCHIVE = "spinmeround.tar.gz"
_HOME = "$HOME/spinmeround"
_CHUNK = 65536  # bytes of log at a time
# Whether the process is a training and alive: after a reboot its number may be another program's.
_RUNS = f'grep -qs spinmeround_jax.train "/proc/$(cat {_HOME}/pid 2>/dev/null)/cmdline"'


def install(setup: str) -> str:
    """Unpack and install, in Python 3.11 (the images of Cloud TPU have 3.10). Can be repeated."""
    steps = [
        "set -e",
        f"if {_RUNS}; then exit 0; fi",  # never under a running training
        f"mkdir -p {_HOME}/code",
        f"tar -xzf $HOME/{ARCHIVE} -C {_HOME}/code",
        f"cd {_HOME}/code",
        "python3 -m pip install --quiet --user 'uv>=0.5'",
        f"$HOME/.local/bin/uv venv --quiet --allow-existing --python 3.11 {_HOME}/venv",
        f"$HOME/.local/bin/uv pip install --quiet --python {_HOME}/venv/bin/python "
        "-c constraints.txt -e '.[train,tpu]'",
    ]
    return "; ".join([*steps, *([setup] if setup else [])])


def start(arguments: Sequence[str]) -> str:
    """Start the training, unless it runs already. It outlives the connection."""
    # The shell around the training waits for it even when both get a SIGTERM, and notes the exit code.
    around = f'trap : TERM; echo $$ > {_HOME}/pid; "$@"; echo $? > {_HOME}/exit'
    words = training.command("python", arguments)[1:]
    return (
        f"if {_RUNS}; then echo 'the training runs already'; exit 0; fi; "
        f"cd {_HOME}/code && rm -f {_HOME}/exit {_HOME}/by_hand && "
        f"{{ nohup setsid bash -c {shlex.quote(around)} training {_HOME}/venv/bin/python "
        f"{shlex.join(words)} >> {_HOME}/log 2>&1 < /dev/null & }}"
    )


def stop() -> str:
    """Send SIGTERM to the training of this host; the other hosts stop with it."""
    return f'touch {_HOME}/by_hand; kill -TERM -- "-$(cat {_HOME}/pid)"'


def look(offset: int) -> str:
    """Print a line "STATE BY_HAND LOG_SIZE" and the log from byte `offset` on, for `parse`."""
    return (
        f"if [ -s {_HOME}/exit ]; then s=$(cat {_HOME}/exit); elif {_RUNS}; then s=running; "
        f"else s=absent; fi; h=no; if [ -e {_HOME}/by_hand ]; then h=yes; fi; "
        f"n=$(cat {_HOME}/log 2>/dev/null | wc -c); echo $s $h $n; "
        f"if [ $n -gt {offset} ]; then tail -c +{offset + 1} {_HOME}/log | "
        f"head -c $((n - {offset})) | head -c {_CHUNK}; fi"
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What `look` printed.

    Attributes:
        state: "running", "ended" (with `exit_code`; `by_hand` if by `stop`), or "absent" (never started, or
            the host was restarted).
        offset: where the next `look` starts.
    """

    state: str
    exit_code: int
    by_hand: bool
    log: str
    offset: int


def parse(printed: str, offset: int) -> Report:
    """Read what `look(offset)` printed.

    Raises:
        ValueError: something else was printed.
    """
    first, _, log = printed.partition("\n")
    found = re.fullmatch(r"(?:(running|absent)|([0-9]+)) (yes|no) ([0-9]+)", first)
    if not found:
        raise ValueError(f"worker 0 answered {first!r}")
    size = int(found[4])
    return Report(
        state=found[1] or "ended",
        exit_code=int(found[2] or 0),
        by_hand=found[3] == "yes",
        log=log,
        # Not by what was printed: that may end within a character. A shorter log is a new one.
        offset=min(offset + _CHUNK, size) if size >= offset else 0,
    )
