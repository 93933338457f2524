"""The protocol `folders`: any methods' views on disk, judged against the true ones on disk."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from spinmeround_jax import cameras
from spinmeround_jax.evaluation import frechet, measures, view_folders
from spinmeround_jax.evaluation.measures import REPROJECTION, REPROJECTION_NORMALS, Score, Views
from spinmeround_jax.evaluation.models import named
from spinmeround_jax.evaluation.parts import Parts, stamp_of
from spinmeround_jax.evaluation.results import Result, Strip
from spinmeround_jax.evaluation.view_folders import Frame
from spinmeround_jax.files import InputError
from spinmeround_jax.photo.images import to_uint8

BATCH = 8  # views compared at once
GAP = 60.0  # degrees; cameras further apart are no ring to follow a surface along


def run(args: argparse.Namespace) -> Result:
    """Judge every method at the views that the truth and all methods have.

    Raises:
        ValueError, OSError: naming what cannot be used.
    """
    methods = dict(named(item) for item in args.method)
    truth = view_folders.find_heads(args.truth)

    def judged(frame: Frame) -> bool:
        return frame.name not in args.leave_out and not (
            "front" in args.leave_out and _front(frame)
        )

    return judge(args, truth, methods, "folders", args.masked, judged)


def _front(frame: Frame) -> bool:
    angles = frame.yaw_pitch
    return angles is not None and max(map(abs, angles)) < cameras.SAME_VIEW


@dataclasses.dataclass(frozen=True)
class _Subject:
    """truth: the views judged. made: of each method, the same views. folders: of truth and methods."""

    name: str
    truth: list[Frame]
    made: dict[str, list[Frame]]
    folders: dict[str, pathlib.Path]


def judge(
    args: argparse.Namespace,
    truth: Mapping[str, pathlib.Path],
    methods: Mapping[str, pathlib.Path],
    protocol: str,
    masked: bool,
    judged: Callable[[Frame], bool] = lambda frame: True,
    details: Mapping[str, object] | None = None,
) -> Result:
    """Judge methods' folders against heads on disk.

    Args:
        truth: folders of the true heads by name.
        methods: folders of a method's heads.
        masked: make everything outside of the true mask white, in the truth and in the methods'.
        judged: which of the true views count.
    """
    subjects, notes = _subjects(args, truth, methods, judged)
    first = view_folders.load(subjects[0].truth[0], args.size)[0]
    size = min(first.shape[:2])
    instruments = measures.choose(args, size)
    common = {
        "protocol": protocol, "measures": instruments.wanted, "files": dict(instruments.files),
        "size": args.size, "masked": masked, "match": args.match,
    }  # fmt: skip
    kept = Parts(args.out / "parts", common)
    names = list(dict.fromkeys(frame.name for subject in subjects for frame in subject.truth))
    scores = []
    for method in methods:
        found = []
        for subject in tqdm(subjects, desc=method, unit="subject"):
            decided = {
                "row": "folders",
                "truth": stamp_of(subject.folders["truth"]),
                "made": stamp_of(subject.folders[method]),
                "views": [[f.name, g.name] for f, g in _pairs(subject, method)],
            }
            found.append(
                kept.make(
                    decided, lambda s=subject, m=method: _measured(s, m, args, masked, instruments)
                )
            )
        scores.append(Score(method, "model", _aligned(found, subjects, names)))

    def strips(subject: int) -> list[Strip]:
        return _strips(subjects[subject], methods, args.size, masked)

    scores = frechet.added(scores, strips, len(subjects), instruments, kept)
    views = f"{len(names)} views" if len(names) != 1 else "1 view"
    return Result(
        protocol=protocol,
        sentence=f"{len(subjects)} subjects, {views} each, against {args.truth}"
        + (", white outside of the true mask" if masked else ""),
        subjects=[subject.name for subject in subjects],
        views=names,
        yaws=_yaws(subjects, names),
        scores=scores,
        strips=strips,
        columns=lambda i: [_label(frame) for frame in subjects[i].truth],
        details={
            "methods": {name: str(folder) for name, folder in methods.items()},
            **(details or {}),
        },
        notes=notes + instruments.notes,
    )


def _subjects(
    args: argparse.Namespace,
    truth: Mapping[str, pathlib.Path],
    methods: Mapping[str, pathlib.Path],
    judged: Callable[[Frame], bool],
) -> tuple[list[_Subject], list[str]]:
    """Subjects that the truth and all methods have, and notes about those left out."""
    heads = {name: view_folders.find_heads(folder) for name, folder in methods.items()}
    if len(truth) == 1:  # one head on each side belongs together, whatever its name
        (name,) = truth
        heads = {m: {name: next(iter(h.values()))} if len(h) == 1 else h for m, h in heads.items()}
    notes, found = [], []
    for method, its in heads.items():
        if missing := [name for name in truth if name not in its]:
            notes.append(f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}: "
                         f"{len(missing)} of {len(truth)} subjects are not in {methods[method]}")  # fmt: skip
    shared = [name for name in truth if all(name in its for its in heads.values())]
    if not shared:
        folders = ", ".join(map(str, methods.values()))
        raise InputError(
            f"{args.truth} and {folders}: no head is in all of them, by its folder's name"
        )
    for name in shared[: args.subjects]:
        frames = [frame for frame in view_folders.read_frames(truth[name]) if judged(frame)]
        if not frames:
            raise InputError(f"{truth[name]}: no view of it is to be judged")
        chosen: dict[str, list[int | None]] = {}
        others = {method: view_folders.read_frames(heads[method][name]) for method in methods}
        for method, its in others.items():
            where = f"{truth[name]} and {heads[method][name]}"
            chosen[method] = view_folders.matches(frames, its, args.match, where)
        rows = [i for i in range(len(frames)) if all(c[i] is not None for c in chosen.values())]
        if not rows:
            raise InputError(f"{truth[name]}: no view of it is in all methods' folders")
        if len(rows) < len(frames):
            notes.append(f"{name or truth[name]}: {len(frames) - len(rows)} of {len(frames)} views "
                         "are not in all methods' folders")  # fmt: skip
        found.append(
            _Subject(
                name or pathlib.Path(truth[name]).resolve().name,
                [frames[i] for i in rows],
                {method: [others[method][c[i]] for i in rows] for method, c in chosen.items()},
                {"truth": truth[name], **{method: heads[method][name] for method in methods}},
            )
        )
    return found, notes


def _pairs(subject: _Subject, method: str) -> list[tuple[Frame, Frame]]:
    return list(zip(subject.truth, subject.made[method], strict=True))


def _measured(
    subject: _Subject,
    method: str,
    args: argparse.Namespace,
    masked: bool,
    instruments: measures.Instruments,
) -> dict[str, np.ndarray]:
    """(n,) of every measure of views, and () of those of a ring."""
    pairs = _pairs(subject, method)
    values: dict[str, list[np.ndarray]] = {}
    rings = []
    for start in range(0, len(pairs), BATCH):
        loaded = [_loaded(*pair, args.size, masked) for pair in pairs[start : start + BATCH]]
        truth, views = (_stacked([pair[side] for pair in loaded]) for side in (0, 1))
        truth = instruments.looked_at(truth)
        for name, value in measures.compare(views, truth, instruments).items():
            values.setdefault(name, []).append(value[0])
        rings.append(views)
    together = {name: np.concatenate(parts) for name, parts in values.items()}
    together |= _along_ring(subject.made[method], rings, instruments.wanted)
    # Some of a subject's views may lack what others have, such as normals.
    return {name: value for name, value in together.items() if value.shape in ((), (len(pairs),))}


def _stacked(views: list[Views]) -> Views:
    """Of one subject, (1, n, ...).

    Raises:
        InputError: they are of several sizes.
    """
    if len(shapes := {one.images.shape[2:4] for one in views}) > 1:
        raise InputError(f"views of one head are {shapes} pixels; bring them to one with --size")
    images = np.concatenate([one.images for one in views], axis=1)
    normals = None
    if all(one.normals is not None for one in views):
        normals = np.concatenate([one.normals for one in views], axis=1)
    return Views(images, normals, np.concatenate([one.mask for one in views], axis=1))


def _loaded(true: Frame, made: Frame, size: int | None, masked: bool) -> tuple[Views, Views]:
    """Truth and method, (1, 1, h, w, 3)."""
    truth, true_normals, mask = view_folders.load(true, size)
    image, normals, _ = view_folders.load(made, size)
    if image.shape != truth.shape:
        raise InputError(
            f"{made.image}: {image.shape[1]} x {image.shape[0]} pixels, {true.image} has "
            f"{truth.shape[1]} x {truth.shape[0]}; bring both to one with --size"
        )
    if mask is None:
        if masked:
            raise InputError(
                f"{true.image}: no mask: neither transparency nor mask_path, nor normals"
            )
        mask = np.ones(truth.shape[:2], bool)
    if masked:
        truth, image = (np.where(mask[..., None], x, np.float32(1.0)) for x in (truth, image))

    def one(image: np.ndarray, normals: np.ndarray | None) -> Views:
        normals = None if normals is None else normals[None, None]
        return Views(image[None, None], normals, mask[None, None])

    return one(truth, true_normals), one(image, normals)


def _along_ring(
    frames: list[Frame], views: list[Views], wanted: Sequence[str]
) -> dict[str, np.ndarray]:
    """Reprojection, where a method's cameras go all around and it has normals."""
    if not {REPROJECTION.name, REPROJECTION_NORMALS.name} & set(wanted):
        return {}
    if any(f.world_to_camera is None for f in frames) or any(v.normals is None for v in views):
        return {}
    together = _stacked(views)
    poses = np.stack([frame.world_to_camera for frame in frames])
    yaws = np.array([frame.yaw_pitch[0] for frame in frames]) % 360.0
    order = np.argsort(yaws, kind="stable")
    if np.diff(np.append(yaws[order], yaws[order[0]] + 360.0)).max() > GAP:
        return {}
    images, normals = together.images[:, order], together.normals[:, order]
    found = measures.reprojections(images, normals, poses[order], wanted, frames[0].focal)
    return {name: value[0] for name, value in found.items()}


def _aligned(
    found: list[dict[str, np.ndarray]], subjects: list[_Subject], names: list[str]
) -> dict[str, np.ndarray]:
    """(s,) and (s, n) arrays; NaN where a subject lacks a view or a measure."""
    values: dict[str, np.ndarray] = {}
    for i, (part, subject) in enumerate(zip(found, subjects, strict=True)):
        columns = [names.index(frame.name) for frame in subject.truth]
        for name, value in part.items():
            shape = (len(subjects),) if value.ndim == 0 else (len(subjects), len(names))
            array = values.setdefault(name, np.full(shape, np.nan))
            array[i if value.ndim == 0 else (i, columns)] = value
    return values


def _yaws(subjects: list[_Subject], names: list[str]) -> np.ndarray | None:
    """(n,) where each view is of one yaw, within a few degrees, in all subjects."""
    seen: dict[str, list[float]] = {name: [] for name in names}
    for subject in subjects:
        for frame in subject.truth:
            if (angles := frame.yaw_pitch) is None:
                return None
            seen[frame.name].append(angles[0])
    yaws = []
    for values in seen.values():
        turned = (np.array(values) - values[0] + 180.0) % 360.0 - 180.0
        if np.ptp(turned) > 10.0:
            return None
        yaws.append((values[0] + turned.mean() + 180.0) % 360.0 - 180.0)
    return np.round(yaws, 1)


def _label(frame: Frame) -> str:
    if (angles := frame.yaw_pitch) is None:
        return frame.name
    yaw, pitch = map(round, angles)
    return f"{yaw}°" + (f", up {pitch}°" if pitch else "")


def _strips(
    subject: _Subject, methods: Mapping[str, pathlib.Path], size: int | None, masked: bool
) -> list[Strip]:
    pairs = {method: _pairs(subject, method) for method in methods}
    loaded = {m: [_loaded(*pair, size, masked) for pair in p] for m, p in pairs.items()}
    first = next(iter(loaded.values()))
    strips = [("true", np.concatenate([to_uint8(truth.images[0]) for truth, _ in first]))]
    for method, both in loaded.items():
        strips.append((method, np.concatenate([to_uint8(views.images[0]) for _, views in both])))
    if all(truth.normals is not None for truth, _ in first):
        normals = np.concatenate([to_uint8(truth.normals[0]) for truth, _ in first])
        strips.append(("true normals", normals))
    for method, both in loaded.items():
        if all(views.normals is not None for _, views in both):
            normals = np.concatenate([to_uint8(views.normals[0]) for _, views in both])
            strips.append((f"{method}, normals", normals))
    return strips
