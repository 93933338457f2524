"""The models of a command line, and what each is sampled with."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from spinmeround_jax import checkpoints
from spinmeround_jax.config import SamplingConfig
from spinmeround_jax.data.manifest import provenance_of
from spinmeround_jax.diffusion.pipeline import Pipeline, check, check_guide
from spinmeround_jax.evaluation import parts
from spinmeround_jax.evaluation.sampling import Variant, variants
from spinmeround_jax.models import Model
from spinmeround_jax.weights import remote
from spinmeround_jax.weights.remote import ModelFolder


def named(item: str) -> tuple[str, pathlib.Path]:
    """Name and folder from [NAME=]DIR."""
    name, _, directory = item.rpartition("=")
    return name or pathlib.Path(directory).resolve().name, pathlib.Path(directory)


def named_model(item: str) -> tuple[str, ModelFolder]:
    """Name and model from [NAME=]MODEL."""
    name, _, model = item.rpartition("=")
    folder = remote.locate(model)
    return name or folder.name, folder


def row_name(model: str, variant: Variant) -> str:
    return f"{model}, {variant.label}" if variant.label else model


class Candidate:
    """A model to measure, in every way that the command line asks for.

    Raises:
        ValueError: the folder holds none, or cannot be sampled so.
    """

    def __init__(self, item: str, args: argparse.Namespace):
        self.name, folder = named_model(item)
        self.directory, self.origin = folder.path, folder.origin
        self.description = checkpoints.describe(self.directory)
        self.guide_directory = args.guide and remote.locate(args.guide).path
        if args.guide is not None:
            check_guide(self.description.config, checkpoints.describe(args.guide).config)
        names = [field.name for field in dataclasses.fields(SamplingConfig)]
        chosen = {name: value for name in names if (value := getattr(args, name, None)) is not None}
        own = Variant("", dataclasses.replace(self.description.sampling, **chosen))
        self.variants = variants(own, args.sweep)
        self.max_batch = args.max_batch
        for variant in self.variants:
            check(variant.sampling, self.max_batch)

    @functools.cached_property
    def model(self) -> Model:
        """Read only when there is something left to sample."""
        return checkpoints.load_model(self.directory)

    @functools.cached_property
    def guide(self) -> Model | None:
        return checkpoints.load_model(self.guide_directory) if self.guide_directory else None

    @functools.cached_property
    def weights(self) -> str:
        """Hash of all its files, and of its guide's."""
        folders = (self.directory, self.guide_directory)
        return " guided by ".join(parts.hash_of(folder) for folder in folders if folder)

    def decided_by(self, variant: Variant) -> dict[str, Any]:
        """All of the model that decides what is sampled."""
        return {
            "weights": self.weights,
            "sampling": dataclasses.asdict(variant.sampling),
            "anchors": variant.anchors,
            "max_batch": self.max_batch,
        }

    def check(self, size: int, where: Any) -> None:
        """Raises ValueError where it makes other than the `size` pixels of `where`."""
        if (made := self.description.config.image_size) != size:
            raise ValueError(f"{self.directory} makes {made} px, {where} holds {size} px")

    def unlike(self, manifest: Mapping[str, Any]) -> list[str]:
        """In what the heads of a data set differ from those that the weights say they learnt."""
        here, learnt, found = provenance_of(manifest), self.description.provenance, []
        framing, recogniser = learnt.get("framing"), learnt.get("recogniser")
        if framing and framing != here["framing"]:
            found.append(
                f"{self.name} learnt heads framed {framing!r}, these are framed {here['framing']!r}"
            )
        names = [
            one.get("name", "?") if isinstance(one, dict) else "no one known"
            for one in (recogniser, here["recogniser"])
        ]
        if recogniser and recogniser != here["recogniser"]:
            found.append(f"{self.name} learnt identities by {names[0]}, these are by {names[1]}")
        return found

    def pipeline(self, variant: Variant, bar: tqdm | None = None) -> Pipeline:
        """Its pipeline, which reports its progress to `bar`."""
        bar = bar or tqdm(disable=True)
        return Pipeline(
            self.model,
            variant.sampling,
            self.description.ablation,
            max_batch=self.max_batch,
            progress=lambda step, done, examples: bar.set_postfix_str(f"{step} {done}/{examples}"),
            guide=self.guide,
        )

    def about(self) -> dict[str, Any]:
        """For scores.json."""
        return {
            "directory": self.origin,
            "files": self.weights,
            "rows": {
                row_name(self.name, variant): {
                    "sampling": dataclasses.asdict(variant.sampling),
                    "anchors": variant.anchors,
                }
                for variant in self.variants
            },
            **self.description.provenance,
        }
