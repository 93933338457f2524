"""Settings of the pods that were created, on disk, so that a pod can be created again. No credentials."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from launch import training
from spinmeround_jax import schema
from spinmeround_jax.files import write_atomically

NOTES = "~/.local/state/spinmeround"


@dataclasses.dataclass(frozen=True)
class Pod:
    """A queued resource with one node of the same name. An empty string leaves a flag out."""

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

    def __post_init__(self) -> None:
        if self.training:
            training.check(self.training)


_KINDS = dict.fromkeys((field.name for field in dataclasses.fields(Pod)), schema.text())
_POD = schema.record(
    {**_KINDS, "spot": schema.boolean, "training": schema.array(schema.text())}, closed=True
)


def path(notes: pathlib.Path, name: str) -> pathlib.Path:
    return notes / f"{name}.json"


def write(notes: pathlib.Path, pod: Pod) -> None:
    notes.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(pod), indent=2) + "\n"
    write_atomically(path(notes, pod.name), text.encode())


def read(notes: pathlib.Path, name: str) -> Pod:
    """The settings of a pod.

    Raises:
        ValueError: there is no note about it, or the note is damaged.
    """
    file = path(notes, name)
    if not file.is_file():
        raise ValueError(
            f"{file}: no such note. Was {name} created on another machine, or with other --notes? "
            "To delete it, give --zone (and --project)"
        )
    try:
        values = schema.read(file, _POD)
        pod = Pod(**{**values, "training": tuple(values["training"])})
        if pod.name != name:
            raise ValueError(f"it is about {pod.name}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file}: damaged ({error}); delete the pod with --zone, and this file"
        ) from error
    return pod
