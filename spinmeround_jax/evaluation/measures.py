"""Measures of a set of views, and which of them can be computed here."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
from collections.abc import Collection, Mapping
from typing import Literal

import jax
import numpy as np

from spinmeround_jax import cameras, metrics
from spinmeround_jax.evaluation import reprojection
from spinmeround_jax.evaluation.fid import InceptionFeatures
from spinmeround_jax.photo import recognition
from spinmeround_jax.photo.recognition import Recogniser


@dataclasses.dataclass(frozen=True)
class Measure:
    """name: its key in files. label: its heading. digits: after the point, in tables.

    better: "one" is a ratio to the truth.
    """

    name: str
    label: str
    digits: int
    better: Literal["higher", "lower", "one"]

    @property
    def heading(self) -> str:
        return self.label + {"higher": " ↑", "lower": " ↓", "one": ""}[self.better]


PSNR = Measure("psnr", "PSNR (dB)", 2, "higher")
L2 = Measure("l2", "L2", 4, "lower")
SSIM = Measure("ssim", "SSIM", 3, "higher")
LPIPS = Measure("lpips", "LPIPS", 3, "lower")
LPIPS_VGG = Measure("lpips_vgg", "LPIPS (VGG)", 3, "lower")
NORMALS = Measure("normals", "normals (°)", 1, "lower")
CONSISTENCY = Measure("consistency", "neighbour change / true", 2, "one")
REPROJECTION = Measure("reprojection", "reprojection (dB)", 2, "higher")
REPROJECTION_NORMALS = Measure("reprojection_normals", "reprojection, normals (°)", 1, "lower")
ARCFACE = Measure("arcface", "ArcFace similarity", 3, "higher")
SECOND = Measure("second_recognition", "second recognition", 3, "higher")
HAIR = Measure("hair", "hair behind (ΔE00)", 1, "lower")
GAP = Measure("held_out_gap", "loss, held out / trained on", 2, "one")
SWAPPED = Measure("swapped_identity", "loss, another's identity / own", 2, "lower")
FID = Measure("fid", "FID", 1, "lower")
ALL = (
    PSNR, L2, SSIM, LPIPS, LPIPS_VGG, ARCFACE, SECOND, FID, NORMALS, HAIR, GAP, SWAPPED,
    CONSISTENCY, REPROJECTION, REPROJECTION_NORMALS,
)  # fmt: skip
NAMES = tuple(measure.name for measure in ALL)
AROUND = {m.name for m in (CONSISTENCY, REPROJECTION, REPROJECTION_NORMALS)}  # of a whole turntable
SMALLEST_SURFACE = 32  # pixels
INSTALL = "pip install 'spinmeround_jax[evaluate]'"


@dataclasses.dataclass(frozen=True)
class Views:
    """s subjects at the same n views: images, normals (s, n, h, w, 3) in [-1, 1], mask (s, n, h, w).

    Normals are None where a method has none; the mask says where the truth has them. `landmarks5` are the
    landmarks of the truth's faces, see `Instruments.looked_at`.
    """

    images: np.ndarray
    normals: np.ndarray | None
    mask: np.ndarray
    landmarks5: np.ndarray | None = None

    def at(self, indices: list[int]) -> Views:
        """These of the n views."""
        normals = None if self.normals is None else self.normals[:, indices]
        return Views(self.images[:, indices], normals, self.mask[:, indices])


@dataclasses.dataclass(frozen=True)
class Score:
    """One row of the tables: its measures, (s,) per subject or (s, n) per subject and view.

    kind: "model" (or another method), or "reference", which a model is to be seen beside.
    """

    name: str
    kind: Literal["model", "reference"]
    values: Mapping[str, np.ndarray]

    def per_subject(self, name: str) -> np.ndarray | None:
        """(s,) means over the views that could be measured; None if nothing was."""
        values = self.values.get(name)
        if values is None or np.isnan(values).all():
            return None
        if values.ndim == 1:
            return values
        some = ~np.isnan(values).all(axis=1)
        means = np.full(len(values), np.nan)
        means[some] = np.nanmean(values[some], axis=1)
        return means


@dataclasses.dataclass(frozen=True)
class Instruments:
    """wanted: names of the measures that can be computed. notes: a line for each that cannot.

    recognisers: by measure. inception: of FID. files: SHA-256 of their files, by measure.
    """

    wanted: tuple[str, ...]
    notes: list[str]
    recognisers: Mapping[str, Recogniser]
    inception: InceptionFeatures | None
    files: Mapping[str, str]

    def looked_at(self, truth: Views) -> Views:
        """`truth` with the landmarks of its faces, where a recogniser is used."""
        if not self.recognisers:
            return truth
        finder = next(iter(self.recognisers.values()))
        return dataclasses.replace(truth, landmarks5=finder.find(truth.images))


def choose(args: argparse.Namespace, size: int) -> Instruments:
    """The instruments for images of `size` pixels: all that are available and not skipped.

    Raises:
        InputError: a model's file cannot be used.
    """
    missing = {}
    if size < metrics.LPIPS_SMALLEST:
        reason = f"needs {metrics.LPIPS_SMALLEST} pixels, these images have {size}"
        missing |= dict.fromkeys((LPIPS.name, LPIPS_VGG.name), reason)
    if importlib.util.find_spec("skimage") is None:
        missing[HAIR.name] = f"needs scikit-image: {INSTALL}"
    if size < metrics.SSIM_WINDOW:
        missing[SSIM.name] = f"needs {metrics.SSIM_WINDOW} pixels, these images have {size}"
    reprojections = (REPROJECTION.name, REPROJECTION_NORMALS.name)
    if size < SMALLEST_SURFACE:
        reason = f"needs {SMALLEST_SURFACE} pixels to find a surface in, these images have {size}"
        missing |= dict.fromkeys(reprojections, reason)
    recognisers, files = {}, {}
    for measure, option in ((ARCFACE, "recognition"), (SECOND, "second_recognition")):
        if path := getattr(args, option):
            recognisers[measure.name] = Recogniser(path, args.models)
            files[measure.name] = recognisers[measure.name].sha256
        else:
            missing[measure.name] = f"needs --{option.replace('_', '-')} MODEL"
    inception = None
    if args.inception:
        inception = InceptionFeatures(args.inception)
        files[FID.name] = inception.sha256
    else:
        missing[FID.name] = "needs --inception MODEL"
    skipped = set(args.skip)
    wanted = tuple(name for name in NAMES if name not in skipped and name not in missing)
    labels = {measure.name: measure.label for measure in ALL}
    notes = [f"{labels[name]} {why}" for name, why in missing.items() if name not in skipped]
    recognisers = {name: r for name, r in recognisers.items() if name in wanted}
    return Instruments(wanted, notes, recognisers, inception, files)


def perceptual(images: np.ndarray, truth: np.ndarray, network: str = "alexnet") -> np.ndarray:
    """LPIPS of (s, n, h, w, 3) images, (s, n)."""
    distance = jax.jit(metrics.lpips(network))  # one function for all calls, so compiled once
    return np.stack([np.asarray(distance(a, b)) for a, b in zip(images, truth, strict=True)])


def compare(views: Views, truth: Views, instruments: Instruments) -> dict[str, np.ndarray]:
    """(s, n) of every wanted measure that needs no more than a view and its truth.

    Normals are compared inside the true mask, where both have them; NaN where it is empty. Faces are
    recognised at the landmarks of the true view; NaN where that shows none, as from behind.

    Args:
        truth: as from `Instruments.looked_at`.
    """
    made = {
        PSNR.name: lambda: metrics.psnr(views.images, truth.images),
        L2.name: lambda: metrics.l2(views.images, truth.images),
        SSIM.name: lambda: metrics.ssim(views.images, truth.images),
        LPIPS.name: lambda: perceptual(views.images, truth.images),
        LPIPS_VGG.name: lambda: perceptual(views.images, truth.images, "vgg16"),
    }
    for name, recogniser in instruments.recognisers.items():
        made[name] = functools.partial(_recognised, recogniser, views, truth)
    if views.normals is not None and truth.normals is not None:
        made[NORMALS.name] = lambda: metrics.angular_error(views.normals, truth.normals, truth.mask)
    return {name: make() for name, make in made.items() if name in instruments.wanted}


def _recognised(recogniser: Recogniser, views: Views, truth: Views) -> np.ndarray:
    both = (recogniser.embed(x.images, truth.landmarks5) for x in (views, truth))
    return recognition.similarity(*both)


def hair_difference(behind: Views, truth: Views) -> np.ndarray:
    """(s,) CIEDE2000 between mean colours of the back of the head, of views (s, 1, ...) from behind.

    Its middle, where every head of the canonical framing has hair, a hat, or the skin of a bald one: a
    disc of 0.15 image widths, 0.1 above the centre; that part of it that the true mask covers.
    """
    size = truth.mask.shape[-1]
    rows, columns = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    disc = np.hypot(rows + 0.1, columns) < 0.15
    return metrics.colour_difference(behind.images, truth.images, truth.mask & disc)[:, 0]


def neighbour_difference(ring: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring views of a closed (s, n, h, w, 3) ring, (s,)."""
    return np.mean(abs(ring - np.roll(ring, -1, axis=1)), axis=(1, 2, 3, 4))


def reprojections(
    images: np.ndarray,
    normals: np.ndarray,
    world_to_camera: np.ndarray,
    wanted: Collection[str],
    focal: float = cameras.FOCAL,
) -> dict[str, np.ndarray]:
    """(s,) of a ring's consistency in three dimensions, each view against its neighbours.

    Args:
        images, normals: (s, n, h, w, 3). world_to_camera: (n, 4, 4). focal: image widths.
    """
    names = {REPROJECTION.name: "psnr", REPROJECTION_NORMALS.name: "normals"}
    if not set(names) & set(wanted):
        return {}
    results = [
        reprojection.reprojection(one, its_normals, world_to_camera, focal=focal)
        for one, its_normals in zip(images, normals, strict=True)
    ]

    def mean(values: np.ndarray) -> float:
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    return {
        name: np.array([mean(found[key]) for found in results])
        for name, key in names.items()
        if name in wanted
    }
