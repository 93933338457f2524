"""The log of a training run: TensorBoard's events, and `metrics.jsonl`, of which the run's page is made.

The page needs whole curves after a resume. TensorBoard's files would give them at a price: each start adds one,
with images, and what a kill undid stays in them. The small file is cut back to the restored step instead.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from spinmeround_jax import schema
from spinmeround_jax.config import Config
from spinmeround_jax.files import naming, read_bytes, write_atomically
from spinmeround_jax.training import run_report

START = "start"  # name of the entry that each start of the command adds
_ENTRY = schema.record(
    {
        "time": schema.number(),  # seconds since 1970
        "name": schema.text(),
        "step": schema.integer(0),
        "metrics": schema.mapping(schema.number()),
    },
    closed=True,
)
_MAX_BYTES = 1 << 30


class RunLog:
    """What one run logs; only its first process has one.

    Attributes:
        entries: of `metrics.jsonl`, oldest first. Their metric "seconds_in_steps" is the time that the steps
            since the entry before took.
    """

    def __init__(self, workdir: pathlib.Path, config: Config):
        self.workdir = workdir
        self.config = config
        self._path = workdir / "metrics.jsonl"
        self._events = SummaryWriter(str(workdir / "tensorboard"))
        self.entries = _read(self._path)
        self._rewrite()  # a line may have been cut
        self._append(START, 0, {})

    def begin(self, name: str, step: int) -> None:
        """Training `name` starts, or resumes, at this step; what was logged of later ones is dropped."""
        self.entries = [e for e in self.entries if e["name"] != name or e["step"] <= step]
        self._rewrite()

    def metrics(self, name: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._events.add_scalar(f"{name}/{key}", value, step)
        self._append(name, step, {k: v for k, v in values.items() if math.isfinite(v)})

    def image(self, name: str, step: int, image: Image.Image) -> None:
        """Also written to `samples/<name>_<step>.png`."""
        folder = self.workdir / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{name}_{step:07d}.png")
        self._events.add_image(name, np.asarray(image), step, dataformats="HWC")

    def goodput(self, seconds: float = 0.0) -> float:
        """Share of the time since the run's first start that went into steps which were kept, 0 to 1.

        The rest is start-up, compilation, evaluation, previews, checkpoints, lost steps, and the time in
        which the run was stopped.

        Args:
            seconds: in steps that are not logged yet.
        """
        kept = seconds + sum(
            entry["metrics"].get("seconds_in_steps", 0.0) for entry in self.entries
        )
        return kept / max(time.time() - self.entries[0]["time"], kept, 1e-9)

    def report(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """Write `report.html`; `changes` as `Checkpoints.history`."""
        run_report.write(
            self.workdir, self.entries, dataclasses.asdict(self.config), changes, self.goodput()
        )

    def close(self) -> None:
        self._events.close()

    def _append(self, name: str, step: int, metrics: dict[str, float]) -> None:
        entry = {"time": round(time.time(), 3), "name": name, "step": step, "metrics": metrics}
        with naming(self._path), self._path.open("ab") as file:
            file.write(_line(entry))
        self.entries.append(entry)

    def _rewrite(self) -> None:
        write_atomically(self._path, b"".join(map(_line, self.entries)))


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The entries; a last line that a kill has cut is dropped.

    Raises:
        ValueError: another line is damaged.
    """
    if not path.exists():
        return []
    *lines, _ = read_bytes(path, _MAX_BYTES).split(b"\n")
    return [
        schema.parse(
            line, _ENTRY, f"{path}, line {number} (move the file away to go on without it)"
        )
        for number, line in enumerate(lines, 1)
    ]
