"""Measure a model on held-out heads, beside two baselines: `python -m spinmeround_jax.evaluate --help`.

From each subject's frontal view the seven anchors and the 48 views of the ring are sampled and compared
with the true renders. The baselines, computed in the same run, need no model: the training set's mean image
at each view, and the training subject whose frontal view is nearest in pixels, shown at each view.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from spinmeround_jax import cameras, checkpoints, data, metrics, records
from spinmeround_jax.pipeline import Pipeline, sampling_defaults

EXAMPLES = """examples:
  # the table of the README
  python -m spinmeround_jax.evaluate --checkpoint weights/quickstart --data data/heads64

  # ablations, each trained with --config.ablation.<name>=True, in one table
  python -m spinmeround_jax.evaluate --data data/heads64 --checkpoint full=runs/quickstart/model \\
      --checkpoint "no identity=runs/no_identity/model"
"""

RING = 48
MEAN, NEAREST = "mean training head", "nearest training head"
TOLERANCE = 0.01  # degrees within which a stored camera is the one asked for


@dataclasses.dataclass(frozen=True)
class Views:
    """s subjects at the same n views: images, normals (s, n, h, w, 3) in [-1, 1], mask (s, n, h, w)."""

    images: np.ndarray
    normals: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Score:
    """One row of the table: per-subject means, (s,) each; consistency only where a ring was sampled."""

    name: str
    psnr: np.ndarray
    lpips: np.ndarray
    normals: np.ndarray
    consistency: np.ndarray | None = None


# --------------------------------------------------------------------------------------------------
# Data


def find_views(source: data.HeldOut, subject: int, angles: np.ndarray) -> list[int]:
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


def load_views(source: data.HeldOut, subjects: list[int], angles: np.ndarray) -> Views:
    """The listed subjects at (n, 2) angles; all subjects of a set share their viewpoints."""
    indices = find_views(source, subjects[0], angles)
    loaded = [source.load(i, indices) for i in subjects]
    return Views(
        images=np.stack([subject.images for subject in loaded]),
        normals=np.stack([subject.normals for subject in loaded]),
        mask=np.stack([subject.alpha > 0.5 for subject in loaded]),
    )


def baselines(
    train: data.HeldOut, frontal: np.ndarray, angles: np.ndarray
) -> tuple[Views, Views, np.ndarray]:
    """The mean training head, and each portrait's nearest one, at (n, 2) angles.

    Args:
        frontal: (s, h, w, 3) portraits to find neighbours of.

    Returns:
        Both as `Views` of s subjects, and the (s,) training subjects chosen.
    """
    indices = find_views(train, 0, np.concatenate([[[0.0, 0.0]], angles]))
    image_sum, normal_sum, distances = 0.0, 0.0, []
    for i in tqdm(range(len(train)), desc="baselines", unit="subject"):
        subject = train.load(i, indices)
        distances.append(np.mean((frontal - subject.images[0]) ** 2, axis=(1, 2, 3)))
        image_sum = image_sum + subject.images[1:]
        normal_sum = normal_sum + subject.normals[1:]
    nearest = np.argmin(distances, axis=0)
    everyone = (len(frontal), *np.shape(image_sum))
    mean = Views(
        images=np.broadcast_to(image_sum / len(train), everyone),
        normals=np.broadcast_to(normal_sum, everyone),  # angular error is blind to length
        mask=np.ones(everyone[:-1], bool),
    )
    return mean, load_views(train, nearest.tolist(), angles), nearest


# --------------------------------------------------------------------------------------------------
# Scores


def perceptual(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """LPIPS (AlexNet) of (s, n, h, w, 3) images, (s, n)."""
    distance = jax.jit(metrics.lpips("alexnet"))
    return np.stack([np.asarray(distance(a, b)) for a, b in zip(images, truth, strict=True)])


def score(name: str, views: Views, truth: Views, consistency: np.ndarray | None = None) -> Score:
    """Compare with the truth; normals inside the true mask."""
    return Score(
        name=name,
        psnr=metrics.psnr(views.images, truth.images).mean(1),
        lpips=perceptual(views.images, truth.images).mean(1),
        normals=np.nanmean(metrics.angular_error(views.normals, truth.normals, truth.mask), axis=1),
        consistency=consistency,
    )


def neighbour_difference(ring: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring views of a closed (s, n, h, w, 3) ring, (s,)."""
    return np.mean(abs(ring - np.roll(ring, -1, axis=1)), axis=(1, 2, 3, 4))


def table(scores: list[Score]) -> str:
    """Markdown: means over subjects, with the standard error of the mean."""

    def cell(values: np.ndarray | None, digits: int) -> str:
        if values is None:
            return "-"
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        return f"{values.mean():.{digits}f} ± {error:.{digits}f}"

    lines = [
        "| | PSNR (dB) ↑ | LPIPS ↓ | normals (°) ↓ | neighbour change / true |",
        "|---|---|---|---|---|",
    ]
    for row in scores:
        cells = [cell(row.psnr, 2), cell(row.lpips, 3), cell(row.normals, 1)]
        lines.append(" | ".join([f"| {row.name}", *cells, f"{cell(row.consistency, 2)} |"]))
    return "\n".join(lines)


def grid(rows: list[np.ndarray], path: pathlib.Path) -> None:
    """Write rows of (n, h, w, 3) images in [-1, 1] as one PNG, each row a line, scaled twice."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    pixels = np.clip(np.round(127.5 * (sheet + 1.0)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.LANCZOS).save(path)


# --------------------------------------------------------------------------------------------------
# The command


def evaluate_model(
    directory: pathlib.Path,
    name: str,
    portraits: data.HeldOut,
    args: argparse.Namespace,
    ring: Views,
) -> tuple[list[Score], Views, dict]:
    """Sample all subjects from their frontal view and compare at the anchors and along the ring.

    The second score is of the truth through the model's autoencoder: what diffusion can at best reach.
    """
    subjects = list(range(args.subjects))
    model = checkpoints.load_model(directory)
    if model.config.image_size != portraits.source.image_size:
        raise ValueError(
            f"{directory} makes {model.config.image_size} px, {args.data} holds "
            f"{portraits.source.image_size} px"
        )
    provenance = checkpoints.read_provenance(directory)
    sampling, ablation = sampling_defaults(provenance)
    overrides = {
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "sampler": args.sampler,
    }
    sampling = dataclasses.replace(
        sampling, **{key: value for key, value in overrides.items() if value is not None}
    )
    identities = np.stack([portraits.load(i, [0]).id_embedding for i in subjects])
    trajectory = cameras.turntable(RING)
    with tqdm(desc=name, unit="eval", smoothing=0.05) as bar:
        pipeline = Pipeline(
            model,
            sampling,
            ablation,
            max_batch=args.max_batch,
            progress=lambda step, evaluations: bar.update(evaluations),
        )
        bar.reset(pipeline.evaluations(len(subjects), trajectory))
        heads = pipeline.spin(
            ring.images[:, :1], identities, trajectory, args.seed + np.arange(len(subjects))
        )
    order = find_views(portraits, 0, cameras.anchors())
    ring_order = find_views(portraits, 0, trajectory)
    chosen = [ring_order.index(view) for view in order]
    truth = Views(ring.images[:, chosen], ring.normals[:, chosen], ring.mask[:, chosen])
    anchors = Views(heads.images[:, chosen], heads.normals[:, chosen], truth.mask)
    ratio = neighbour_difference(heads.images) / neighbour_difference(ring.images)
    ceiling = repeated(pipeline, truth)
    return (
        [score(name, anchors, truth, ratio), score(ceiling_name(name), ceiling, truth)],
        anchors,
        {"directory": str(directory), "sampling": dataclasses.asdict(sampling), **provenance},
    )


def repeated(pipeline: Pipeline, truth: Views) -> Views:
    """The true views, encoded and decoded."""
    images, normals = (
        pipeline.encode(pictures.reshape(-1, *pictures.shape[2:]))
        for pictures in (truth.images, truth.normals)
    )
    images, normals = pipeline.decode(np.concatenate([images, normals], axis=-1))
    shape = truth.images.shape
    return Views(images.reshape(shape), normals.reshape(shape), truth.mask)


def named(item: str) -> tuple[str, pathlib.Path]:
    """Name and folder from [NAME=]DIR."""
    name, _, directory = item.rpartition("=")
    return name or pathlib.Path(directory).resolve().name, pathlib.Path(directory)


def ceiling_name(name: str) -> str:
    return f"{name}: its autoencoder"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m spinmeround_jax.evaluate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", action="append", required=True, metavar="[NAME=]DIR",
        help="model to measure; repeat for several rows",
    )  # fmt: skip
    parser.add_argument("--data", type=pathlib.Path, required=True, help="data_prep's folder")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/evaluation"))
    parser.add_argument("--subjects", type=int, default=32, help="held-out subjects (32)")
    parser.add_argument("--steps", type=int, help="sampling steps; default: the checkpoint's")
    parser.add_argument("--guidance-scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--sampler", choices=("euler", "heun"), help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-batch", type=int, default=8, help="examples in one call (8)")
    args = parser.parse_args(argv)
    rows = [MEAN, NEAREST]
    for name, _ in map(named, args.checkpoint):
        for row in (name, ceiling_name(name)):
            if row in rows:
                parser.error(f"--checkpoint: two rows would be {row!r}; name each model: NAME=DIR")
            rows.append(row)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        portraits = data.HeldOut(args.data, "held_out")
        train = data.HeldOut(args.data, "train")
        if not 1 <= args.subjects <= len(portraits):
            raise ValueError(f"{args.data} has {len(portraits)} held-out subjects to choose from")
        ring = load_views(portraits, list(range(args.subjects)), cameras.turntable(RING))
        truth = load_views(portraits, list(range(args.subjects)), cameras.anchors())
        mean, nearest, chosen = baselines(train, ring.images[:, 0], cameras.anchors())
        scores = [
            score(MEAN, mean, truth),
            score(NEAREST, nearest, truth),
        ]
        args.out.mkdir(parents=True, exist_ok=True)
        models, pictures = {}, {}
        for name, directory in map(named, args.checkpoint):
            rows, pictures[name], models[name] = evaluate_model(
                directory, name, portraits, args, ring
            )
            scores += rows
    except (ValueError, records.RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    ranked = np.argsort(scores[2].psnr)
    for label, i in [("worst", 0), ("median", len(ranked) // 2), ("best", -1)]:
        subject = ranked[i]
        rows = [truth.images[subject], nearest.images[subject], mean.images[subject]]
        for views in pictures.values():
            rows += [views.images[subject], views.normals[subject]]
        rows.append(truth.normals[subject])
        grid(rows, args.out / f"{label}.png")
    text = table(scores)
    result = {
        "command": vars(args) | {"data": str(args.data), "out": str(args.out)},
        "models": models,
        "nearest": chosen.tolist(),
        "scores": {
            row.name: {
                key: value.tolist()
                for key, value in dataclasses.asdict(row).items()
                if isinstance(value, np.ndarray)
            }
            for row in scores
        },
    }
    (args.out / "table.md").write_text(text + "\n")
    (args.out / "scores.json").write_text(json.dumps(result, indent=1))
    print(
        f"\n{text}\n\n{args.subjects} held-out subjects, 7 anchors from the frontal view. {args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
