"""What may be a name. Commands get their arguments without a shell, but hosts have one: be strict."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

# kind: (pattern, what it allows)
_KINDS = {
    "name": (
        r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?",
        "lower-case letters, digits and dashes, a letter first, at most 63",
    ),
    "workload": (
        r"[a-z]([a-z0-9-]{0,37}[a-z0-9])?",  # GKE adds to it, and cuts at 63
        "lower-case letters, digits and dashes, a letter first, at most 39",
    ),
    "project": (
        r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]",
        "a project ID: 6 to 30 lower-case letters, digits and dashes",
    ),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone such as us-central2-b"),
    "accelerator": (r"v[0-9]+[a-z]*-[0-9]+", "an accelerator type such as v4-64 or v5litepod-32"),
    "device": (r"[a-z0-9]+(-[a-z0-9]+)+", "a device type such as v5litepod-32 or h100-mega-80gb-8"),
    "runtime": (r"[a-z0-9][a-z0-9.-]*", "a TPU software version such as tpu-ubuntu2204-base"),
    "account": (r"[a-z0-9-]+@[a-z0-9.-]+", "the e-mail address of a service account"),
    "image": (r"[a-z0-9][a-z0-9._/:@-]*", "a Docker image such as gcr.io/PROJECT/NAME:TAG"),
    "duration": (r"[1-9][0-9]*[smhd]", "a time such as 90m, 6h or 2d"),
    "host": (
        r"([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*",
        "a host name or address, with USER@ before it if need be",
    ),
    "path": (r"/[^\x00-\x1f\x7f]*", "an absolute path"),
    "word": (r"[A-Za-z0-9_][A-Za-z0-9_.,:+-]*", "letters, digits and _.,:+-"),
    "walltime": (
        r"([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}",
        "a SLURM time such as 24:00:00 or 2-00:00:00",
    ),
    "job": (r"[0-9]+", "the number of a SLURM job"),
}


def check(kind: str, value: str) -> str:
    """`value` itself.

    Raises:
        ValueError: it is no such name; says what is.
    """
    pattern, allowed = _KINDS[kind]
    if not re.fullmatch(pattern, value, flags=re.ASCII):
        raise ValueError(f"{value!r} cannot be used: expected {allowed}")
    return value


def checked(kind: str) -> Callable[[str], str]:
    """As a `type` of argparse."""

    def convert(value: str) -> str:
        try:
            return check(kind, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert
