"""The protocol `heads`: held-out rendered heads, at any of the views that data_prep renders.

Beside the truth, two baselines that need no model: the training set's mean image at each view, and the
training subject whose frontal view is nearest in pixels, shown at each view.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from spinmeround_jax import cameras
from spinmeround_jax.cli import UsageError
from spinmeround_jax.data.manifest import read_manifest
from spinmeround_jax.data.subjects import HeldOut
from spinmeround_jax.evaluation import frechet, losses, measures, models, sampling
from spinmeround_jax.evaluation.measures import Score, Views
from spinmeround_jax.evaluation.models import Candidate
from spinmeround_jax.evaluation.parts import Parts, stamp_of
from spinmeround_jax.evaluation.results import Result, Strip
from spinmeround_jax.evaluation.sampling import Variant
from spinmeround_jax.photo.images import to_uint8

RING = 48
TURNED = (30.0, -30.0)  # yaws of inputs that do not look into the camera
SIGMA = 10.0  # at which losses are compared: where what is not seen is decided
SUBJECTS = 32
MEAN, NEAREST, TRUE = "mean training head", "nearest training head", "true renders"
TOLERANCE = 0.01  # degrees within which a stored camera is the one asked for


def find_views(source: HeldOut, subject: int, angles: np.ndarray) -> list[int]:
    """Indices of a subject's views that stand at the (n, 2) yaws and pitches.

    Raises:
        ValueError: naming the first angle that was not rendered.
    """
    stored = source.angles(subject)
    indices = []
    for yaw, pitch in angles:
        turn = (stored[:, 0] - yaw + 180.0) % 360.0 - 180.0
        distance = np.maximum(abs(turn), abs(stored[:, 1] - pitch))
        if distance.min() > TOLERANCE:
            index, row = source.source[subject]
            raise ValueError(
                f"{index.path}: {index.subjects[row]} has no view at yaw {yaw:g}, pitch {pitch:g}; "
                "evaluation needs the 48-view ring that data_prep renders by default"
            )
        indices.append(int(distance.argmin()))
    return indices


def load_views(source: HeldOut, subjects: list[int], angles: np.ndarray) -> Views:
    """The listed subjects at (n, 2) angles; all subjects of a set share their viewpoints."""
    indices = find_views(source, subjects[0], angles)
    loaded = [source.load(i, indices) for i in subjects]
    return Views(
        images=np.stack([subject.images for subject in loaded]),
        normals=np.stack([subject.normals for subject in loaded]),
        mask=np.stack([subject.alpha > 0.5 for subject in loaded]),
    )


def mean_and_nearest(
    train: HeldOut, frontal: np.ndarray, angles: np.ndarray
) -> dict[str, np.ndarray]:
    """Both baselines at (n, 2) angles.

    Args:
        frontal: (s, h, w, 3) portraits to find neighbours of.

    Returns:
        "images" and "normals" (n, h, w, 3) of the mean training head, normals of any length; and
        "nearest" (s,), the training subject chosen for each portrait.
    """
    indices = find_views(train, 0, np.concatenate([[[0.0, 0.0]], angles]))
    image_sum, normal_sum, distances = 0.0, 0.0, []
    for i in tqdm(range(len(train)), desc="baselines", unit="subject"):
        subject = train.load(i, indices)
        distances.append(np.mean((frontal - subject.images[0]) ** 2, axis=(1, 2, 3)))
        image_sum = image_sum + subject.images[1:]
        normal_sum = normal_sum + subject.normals[1:]
    return {
        "images": image_sum / len(train),
        "normals": normal_sum,
        "nearest": np.argmin(distances, axis=0),
    }


def repeated(images: np.ndarray, normals: np.ndarray, mask: np.ndarray) -> Views:
    """(n, h, w, 3) views of one head as those of all s subjects of the (s, n, h, w) mask."""
    everyone = (*mask.shape, 3)
    return Views(np.broadcast_to(images, everyone), np.broadcast_to(normals, everyone), mask)


def turned_name(name: str) -> str:
    return f"{name}, input at yaw ±{TURNED[0]:g}"


def ceiling_name(name: str) -> str:
    return f"{name}: its autoencoder"


def check_rows(args: argparse.Namespace) -> None:
    """Raises UsageError unless every row of the table will have a name of its own."""
    rows = [MEAN, NEAREST, TRUE]
    for name, _ in map(models.named_model, args.checkpoint):
        for row in (name, turned_name(name), ceiling_name(name)):
            if row in rows:
                raise UsageError(
                    f"--checkpoint: two rows would be {row!r}; name each model: NAME=DIR"
                )
            rows.append(row)


# --------------------------------------------------------------------------------------------------
# The protocol


def run(args: argparse.Namespace) -> Result:
    """Measure every model and baseline; parts kept by an earlier run are not computed again.

    Raises:
        ValueError, OSError: naming what cannot be used.
    """
    protocol = _Heads(args)
    scores = protocol.references()
    for candidate in protocol.candidates:
        own, *others = [protocol.sampled(candidate, v) for v in candidate.variants]
        scores += [protocol.with_losses(candidate, own), protocol.turned(candidate), *others]
        scores.append(protocol.ceiling(candidate))
    scores = frechet.added(
        scores, protocol.strips, protocol.count, protocol.instruments, protocol.parts
    )
    return Result(
        protocol="heads",
        sentence="; ".join(
            [
                f"{protocol.count} held-out subjects, 7 anchors from the frontal view",
                *protocol.unlike,
            ]
        ),
        subjects=protocol.names,
        views=[f"{yaw:g}°" for yaw, _ in cameras.anchors()],
        yaws=cameras.anchors()[:, 0],
        scores=scores,
        strips=protocol.strips,
        columns=lambda subject: [f"{yaw:g}°" for yaw, _ in cameras.anchors()],
        details={
            "models": {candidate.name: candidate.about() for candidate in protocol.candidates},
            "nearest": protocol.baselines["nearest"].tolist(),
        },
        notes=protocol.instruments.notes,
    )


class _Heads:
    """A run of the protocol; each part has as many subjects as all devices sample at once."""

    def __init__(self, args: argparse.Namespace):
        self.portraits = HeldOut(args.data, "held_out")
        self.train = HeldOut(args.data, "train")
        self.count = args.subjects or min(SUBJECTS, len(self.portraits))
        if self.count > len(self.portraits):
            raise ValueError(
                f"{args.data} has {len(self.portraits)} held-out subjects to choose from"
            )
        self.args = args
        self.size = self.portraits.source.image_size
        self.candidates = [Candidate(item, args) for item in args.checkpoint]
        for candidate in self.candidates:
            candidate.check(self.size, args.data)
        manifest = read_manifest(args.data)
        self.unlike = [words for one in self.candidates for words in one.unlike(manifest)]
        for words in self.unlike:
            print(f"note: {words}", file=sys.stderr)
        self.instruments = measures.choose(args, self.size)
        self.wanted = self.instruments.wanted
        # The frontal view first: it is what the model is given.
        around = measures.AROUND & set(self.wanted)
        front_and_anchors = np.concatenate([np.zeros((1, 2), np.float32), cameras.anchors()])
        self.trajectory = cameras.turntable(RING) if around else front_and_anchors
        order = find_views(self.portraits, 0, self.trajectory)
        self.anchors = [order.index(i) for i in find_views(self.portraits, 0, cameras.anchors())]
        size = args.max_batch * jax.local_device_count()
        self.chunks = [
            list(range(start, min(start + size, self.count)))
            for start in range(0, self.count, size)
        ]
        common = {"protocol": "heads", "data": stamp_of(args.data), "measures": self.wanted}
        common["files"] = dict(self.instruments.files)
        self.parts = Parts(args.out / "parts", common)

    @functools.cached_property
    def names(self) -> list[str]:
        stored = (self.portraits.source[i] for i in range(self.count))
        return [str(index.subjects[row]) for index, row in stored]

    @functools.cached_property
    def baselines(self) -> dict[str, np.ndarray]:
        front = find_views(self.portraits, 0, np.zeros((1, 2)))

        def make() -> dict[str, np.ndarray]:
            frontal = np.stack([self.portraits.load(i, front).images[0] for i in range(self.count)])
            return mean_and_nearest(self.train, frontal, cameras.anchors())

        return self.parts.make({"row": "baselines", "subjects": self.count}, make)

    def truth(self, chunk: list[int]) -> tuple[Views, Views]:
        """All views of the trajectory, and the anchors."""
        ring = load_views(self.portraits, chunk, self.trajectory)
        return ring, self.instruments.looked_at(ring.at(self.anchors))

    def compare(self, views: Views, truth: Views) -> dict[str, np.ndarray]:
        """Of the anchors, all that is measured of images and normals."""
        values = measures.compare(views, truth, self.instruments)
        if measures.HAIR.name in self.wanted:
            behind = [list(abs(cameras.anchors()[:, 0])).index(180.0)]
            hair = measures.hair_difference(views.at(behind), truth.at(behind))
            values[measures.HAIR.name] = hair
        return values

    def identities(self, chunk: list[int]) -> np.ndarray:
        """(s, 512) of held-out heads."""
        return np.stack([self.portraits.load(i, [0]).id_embedding for i in chunk])

    def references(self) -> list[Score]:
        """The rows that need no model."""
        baselines, poses = self.baselines, cameras.orbit(*self.trajectory.T)

        def make(chunk: list[int], bar: tqdm) -> dict[str, np.ndarray]:
            ring, truth = self.truth(chunk)
            mean = repeated(baselines["images"], baselines["normals"], truth.mask)
            chosen = baselines["nearest"][chunk].tolist()
            nearest = load_views(self.train, chosen, cameras.anchors())
            true = measures.reprojections(ring.images, ring.normals, poses, self.wanted)
            return {
                **_prefixed("mean", self.compare(mean, truth)),
                **_prefixed("nearest", self.compare(nearest, truth)),
                **_prefixed("true", true),
            }

        found = self._made("references", {"row": "references", "of": self.count}, make)
        rows = [(MEAN, "mean"), (NEAREST, "nearest"), (TRUE, "true")]
        scores = [Score(name, "reference", _joined(found, prefix)) for name, prefix in rows]
        return [score for score in scores if score.values]

    def _made(
        self,
        name: str,
        decided: dict[str, Any],
        make: Callable[[list[int], tqdm], dict[str, np.ndarray]],
    ) -> list[dict[str, np.ndarray]]:
        """A part for each chunk of subjects, kept of an earlier run or made of (chunk, bar)."""
        found = []
        with tqdm(desc=name, unit="part", total=len(self.chunks)) as bar:
            for chunk in self.chunks:
                about = {**decided, "subjects": chunk}
                found.append(self.parts.make(about, functools.partial(make, chunk, bar)))
                bar.update()
        return found

    def _decided(self, candidate: Candidate, variant: Variant) -> dict[str, Any]:
        return {"row": "model", "seed": self.args.seed, **candidate.decided_by(variant)}

    def sampled(self, candidate: Candidate, variant: Variant) -> Score:
        """A model, sampled in one way."""
        name = models.row_name(candidate.name, variant)

        def make(chunk: list[int], bar: tqdm) -> dict[str, np.ndarray]:
            ring, truth = self.truth(chunk)
            pipeline = candidate.pipeline(variant, bar)
            seeds = self.args.seed + np.array(chunk)
            identities = self.identities(chunk)
            made = sampling.spin(
                pipeline, variant, ring.images[:, :1], identities, self.trajectory, seeds
            )
            anchors = Views(made.images, made.normals, ring.mask).at(self.anchors)
            values = self.compare(anchors, truth)
            if measures.CONSISTENCY.name in self.wanted:
                change = [measures.neighbour_difference(x.images) for x in (made, ring)]
                values[measures.CONSISTENCY.name] = change[0] / change[1]
            poses = cameras.orbit(*self.trajectory.T)
            values |= measures.reprojections(made.images, made.normals, poses, self.wanted)
            pictures = {"images": to_uint8(anchors.images), "normals": to_uint8(anchors.normals)}
            return _prefixed("value", values) | pictures

        found = self._made(name, self._decided(candidate, variant), make)
        return Score(name, "model", _joined(found, "value"))

    def turned(self, candidate: Candidate) -> Score:
        """The same from inputs at the yaws of `TURNED`: a mean over them for each anchor.

        Anchors, cameras and normals are counted from the input, as everything that comes out is.
        """
        name, own = turned_name(candidate.name), candidate.variants[0]
        angles = cameras.anchors()

        def make(chunk: list[int], bar: tqdm) -> dict[str, np.ndarray]:
            pipeline = candidate.pipeline(own, bar)
            identities, seeds = self.identities(chunk), self.args.seed + np.array(chunk)
            found = []
            for yaw in TURNED:
                portrait = load_views(self.portraits, chunk, np.array([[yaw, 0.0]])).images
                views = load_views(self.portraits, chunk, angles + [yaw, 0.0])
                normals = cameras.normals_to_camera(views.normals, cameras.orbit(yaw))
                truth = self.instruments.looked_at(dataclasses.replace(views, normals=normals))
                made = sampling.spin(pipeline, own, portrait, identities, angles, seeds)
                made = Views(made.images, made.normals, views.mask)
                found.append(measures.compare(made, truth, self.instruments))
            return _prefixed("value", {k: np.mean([x[k] for x in found], axis=0) for k in found[0]})

        decided = {**self._decided(candidate, own), "row": "turned"}
        found = self._made(name, decided, make)
        return Score(name, "model", _joined(found, "value"))

    def with_losses(self, candidate: Candidate, score: Score) -> Score:
        """`score`, and how the loss at `SIGMA` compares: held out to trained on, identities swapped.

        One view observed, the frontal one; targets are anchors, the same with the same noise each time.
        """
        if not {measures.GAP.name, measures.SWAPPED.name} & set(self.wanted):
            return score

        @functools.cache
        def loss() -> losses.Loss:
            pipeline = candidate.pipeline(candidate.variants[0])
            return losses.Loss(candidate.model, candidate.description.ablation, pipeline, SIGMA)

        def make(source: HeldOut, count: int, chunk: list[int]) -> dict[str, np.ndarray]:
            angles = cameras.turntable(candidate.model.config.views)
            views = load_views(source, chunk, angles)
            neighbours = [(i + 1) % count for i in chunk]
            own, other = (
                [source.load(i, [0]).id_embedding for i in x] for x in (chunk, neighbours)
            )
            return {
                "own": loss()(views, angles, np.stack(own), chunk),
                "other": loss()(views, angles, np.stack(other), chunk),
            }

        found = {}
        for source in (self.train, self.portraits):
            count = min(self.count, len(source))
            parts = []
            for chunk in self.chunks:
                decided = {"row": "loss", "split": source.source.split, "of": self.count}
                decided |= {"weights": candidate.weights, "sigma": SIGMA, "subjects": chunk}
                some = [i for i in chunk if i < count]
                if some:
                    parts.append(
                        self.parts.make(decided, functools.partial(make, source, count, some))
                    )
            found[source.source.split] = {
                name: np.concatenate([part[name] for part in parts]) for name in ("own", "other")
            }
        held_out, train = found["held_out"], found["train"]
        values = {
            measures.GAP.name: held_out["own"] / train["own"].mean(),
            measures.SWAPPED.name: held_out["other"] / held_out["own"].mean(),
        }
        values = {name: value for name, value in values.items() if name in self.wanted}
        return dataclasses.replace(score, values={**score.values, **values})

    def ceiling(self, candidate: Candidate) -> Score:
        """The truth through the model's autoencoder: the best that diffusion can reach."""

        def make(chunk: list[int], bar: tqdm) -> dict[str, np.ndarray]:
            _, truth = self.truth(chunk)
            pipeline = candidate.pipeline(candidate.variants[0], bar)
            again = sampling.repeat(pipeline, truth.images, truth.normals, cameras.anchors())
            repeat = Views(*again, truth.mask)
            return _prefixed("value", self.compare(repeat, truth))

        name = ceiling_name(candidate.name)
        found = self._made(name, {"row": "ceiling", "weights": candidate.weights}, make)
        return Score(name, "reference", _joined(found, "value"))

    def strips(self, subject: int) -> list[Strip]:
        """The truth, the baselines and every model's images; then the true normals and theirs."""
        angles = cameras.anchors()
        truth = self.portraits.load(subject, find_views(self.portraits, 0, angles))
        nearest = self.train.load(
            int(self.baselines["nearest"][subject]), find_views(self.train, 0, angles)
        )
        images = [
            ("true", to_uint8(truth.images)),
            (NEAREST, to_uint8(nearest.images)),
            (MEAN, to_uint8(self.baselines["images"])),
        ]
        normals = [("true normals", to_uint8(truth.normals))]
        chunk = next(chunk for chunk in self.chunks if subject in chunk)
        for candidate in self.candidates:
            for variant in candidate.variants:
                part = self.parts.get({**self._decided(candidate, variant), "subjects": chunk})
                name = models.row_name(candidate.name, variant)
                images.append((name, part["images"][subject - chunk[0]]))
                normals.append((f"{name}, normals", part["normals"][subject - chunk[0]]))
        return images + normals


def _prefixed(prefix: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _joined(found: list[dict[str, np.ndarray]], prefix: str) -> dict[str, np.ndarray]:
    """The arrays of a prefix over all parts."""
    names = [name for name in found[0] if name.startswith(f"{prefix}.")]
    return {
        name.removeprefix(f"{prefix}."): np.concatenate([part[name] for part in found])
        for name in names
    }
