"""The models of a command line, and what each is sampled with."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from typing import Any

from tqdm import tqdm

from spinmeround_jax import checkpoints
from spinmeround_jax.diffusion.pipeline import Pipeline, sampling_defaults
from spinmeround_jax.evaluation import parts
from spinmeround_jax.evaluation.sampling import Variant, variants
from spinmeround_jax.models import Model


def named(item: str) -> tuple[str, pathlib.Path]:
    """Name and folder from [NAME=]DIR."""
    name, _, directory = item.rpartition("=")
    return name or pathlib.Path(directory).resolve().name, pathlib.Path(directory)


def row_name(model: str, variant: Variant) -> str:
    return f"{model}, {variant.label}" if variant.label else model


class Candidate:
    """A model to measure, in every way that the command line asks for.

    Raises:
        ValueError: the folder holds none, or cannot be sampled so.
    """

    def __init__(self, item: str, args: argparse.Namespace):
        self.name, self.directory = named(item)
        self.provenance = checkpoints.read_provenance(self.directory)
        try:
            sampling, self.ablation = sampling_defaults(self.provenance)
        except ValueError as error:
            raise ValueError(f"{self.directory}: {error}") from error
        names = ("steps", "guidance_scale", "sampler", "temperature")
        chosen = {name: getattr(args, name) for name in names}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        own = Variant("", dataclasses.replace(sampling, **chosen))
        self.variants = variants(own, args.sweep)
        self.max_batch = args.max_batch

    @functools.cached_property
    def model(self) -> Model:
        """Read only when there is something left to sample."""
        return checkpoints.load_model(self.directory)

    @functools.cached_property
    def weights(self) -> str:
        """Hash of all its files."""
        return parts.hash_of(self.directory)

    def decided_by(self, variant: Variant) -> dict[str, Any]:
        """All of the model that decides what is sampled."""
        return {
            "weights": self.weights,
            "sampling": dataclasses.asdict(variant.sampling),
            "anchors": variant.anchors,
            "max_batch": self.max_batch,
        }

    def pipeline(self, variant: Variant, bar: tqdm, size: int, where: Any) -> Pipeline:
        """Its pipeline, telling `bar`.

        Raises:
            ValueError: it makes other than the `size` pixels of `where`, or the variant is no way
                to sample.
        """
        if self.model.config.image_size != size:
            raise ValueError(
                f"{self.directory} makes {self.model.config.image_size} px, {where} holds {size} px"
            )
        return Pipeline(
            self.model,
            variant.sampling,
            self.ablation,
            max_batch=self.max_batch,
            progress=lambda step, evaluations: bar.update(evaluations),
        )

    def about(self) -> dict[str, Any]:
        """For scores.json."""
        return {
            "directory": str(self.directory),
            "files": self.weights,
            "rows": {
                row_name(self.name, variant): {
                    "sampling": dataclasses.asdict(variant.sampling),
                    "anchors": variant.anchors,
                }
                for variant in self.variants
            },
            **self.provenance,
        }
