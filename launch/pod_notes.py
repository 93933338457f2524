"""Notes about pods that were asked for: all that it takes to ask again. No credentials."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from launch import names, training
from spinmeround_jax.files import write_atomically

NOTES = pathlib.Path.home() / ".local" / "state" / "spinmeround"
_KINDS = {  # what each field may be; see `names`
    "name": "name",
    "zone": "zone",
    "project": "project",
    "accelerator_type": "accelerator",
    "runtime_version": "runtime",
    "valid_until": "duration",
    "network": "name",
    "subnetwork": "name",
    "service_account": "account",
}


@dataclasses.dataclass(frozen=True)
class Pod:
    """A queued resource with one node of the same name. Empty strings leave a flag out."""

    name: str
    zone: str
    project: str = ""
    accelerator_type: str = ""
    runtime_version: str = ""
    spot: bool = False
    valid_until: str = ""
    network: str = ""
    subnetwork: str = ""
    service_account: str = ""
    setup: str = ""  # shell commands for every host
    training: tuple[str, ...] = ()  # arguments of spinmeround_jax.train

    def with_training(self, arguments: tuple[str, ...], setup: str) -> Pod:
        return dataclasses.replace(self, training=arguments, setup=setup)


def path(notes: pathlib.Path, name: str) -> pathlib.Path:
    return notes / f"{name}.json"


def write(notes: pathlib.Path, pod: Pod) -> None:
    notes.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(pod), indent=2) + "\n"
    write_atomically(path(notes, pod.name), text.encode())


def read(notes: pathlib.Path, name: str) -> Pod:
    """The note about a pod.

    Raises:
        ValueError: there is none, or it holds what no note of ours does.
    """
    file = path(notes, name)
    if not file.is_file():
        raise ValueError(
            f"{file}: no such note. Was {name} created on another machine, or with other --notes? "
            "To delete it, give --zone (and --project)"
        )
    try:
        values = json.loads(file.read_text())
        arguments = values.pop("training")
        pod = Pod(**values, training=tuple(arguments))
        for field, kind in _KINDS.items():
            value = getattr(pod, field)
            if value or field in ("name", "zone"):
                names.check(kind, value)
        if pod.name != name or not isinstance(pod.spot, bool) or not isinstance(pod.setup, str):
            raise ValueError(f"it is not about {name}")
        if pod.training:
            training.check(pod.training)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file}: damaged ({error}); delete the pod with --zone, and this file"
        ) from error
    return pod


def remove(notes: pathlib.Path, name: str) -> None:
    path(notes, name).unlink(missing_ok=True)
