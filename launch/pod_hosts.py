"""What the hosts of a pod do, as the text of shell commands for ssh; every word is quoted.

Below ~/spinmeround: code/ and venv/, log, pid (of the shell around the training), exit (its exit code).
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from launch import training

ARCHIVE = "spinmeround.tar.gz"
_HOME = "$HOME/spinmeround"
_MOST = 65536  # bytes of log at a time
_RUNS = training.runs(f"{_HOME}/pid")


def install(setup: str) -> str:
    """Unpack and install, in Python 3.11 (the images of Cloud TPU have 3.10); again does no harm."""
    steps = [
        "set -e",
        f"if {_RUNS}; then exit 0; fi",  # never under a training that runs
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
    """Start the training, unless it runs; it outlives the connection."""
    # The shell around it waits for the training even when both get a SIGTERM, and notes how it ended.
    around = f'trap : TERM; echo $$ > {_HOME}/pid; "$@"; echo $? > {_HOME}/exit'
    words = training.command("python", arguments)[1:]
    return (
        f"if {_RUNS}; then echo 'the training runs already'; exit 0; fi; "
        f"cd {_HOME}/code && rm -f {_HOME}/exit {_HOME}/by_hand && "
        f"{{ nohup setsid bash -c {shlex.quote(around)} training {_HOME}/venv/bin/python "
        f"{shlex.join(words)} >> {_HOME}/log 2>&1 < /dev/null & }}"
    )


def stop() -> str:
    """SIGTERM to the training of this host, from which all hosts learn."""
    return f'touch {_HOME}/by_hand; kill -TERM -- "-$(cat {_HOME}/pid)"'


def look(offset: int) -> str:
    """Print a line "STATE BY_HAND LOG_SIZE", and the log from byte `offset` on; see `parse`."""
    return (
        f"if [ -s {_HOME}/exit ]; then s=$(cat {_HOME}/exit); elif {_RUNS}; then s=running; "
        f"else s=absent; fi; h=no; if [ -e {_HOME}/by_hand ]; then h=yes; fi; "
        f"n=$(cat {_HOME}/log 2>/dev/null | wc -c); echo $s $h $n; "
        f"if [ $n -gt {offset} ]; then tail -c +{offset + 1} {_HOME}/log | "
        f"head -c $((n - {offset})) | head -c {_MOST}; fi"
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What `look` saw."""

    state: str  # "running", "absent" (never started, or the host did not stay up), "ended"
    exit_code: int  # of a training that ended
    by_hand: bool  # it was told to stop by `stop`
    log: str
    offset: int  # to look from next


def parse(printed: str, offset: int) -> Report:
    """
    Raises:
        ValueError: that is not what `look` prints.
    """
    first, _, log = printed.partition("\n")
    words = first.split()
    if (
        len(words) != 3
        or not (words[0] in ("running", "absent") or words[0].isdecimal())
        or not words[2].isdecimal()
    ):
        raise ValueError(f"worker 0 answered {first!r}")
    size = int(words[2])
    ended = words[0].isdecimal()
    return Report(
        state="ended" if ended else words[0],
        exit_code=int(words[0]) if ended else 0,
        by_hand=words[1] == "yes",
        log=log,
        # Not what was printed: that may end within a character.
        offset=min(offset + _MOST, size) if size >= offset else 0,
    )
