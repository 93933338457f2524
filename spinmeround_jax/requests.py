"""The heads that `sample` is to make, planned before anything is read, read when their turn comes.

A folder of inputs may mix portraits (see `portraits`), photos, which are pictures without an identity
beside them and go through `photo` first, and sets of views of one person: folders with

    views.json    [{"file": "front.png", "yaw": 0, "pitch": 0}, {"file": "left.png", "yaw": 45}, ...]

and one or three pictures, the first at yaw 0, pitch 0 and with its identity beside it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax import cameras, schema
from spinmeround_jax.diffusion.pipeline import OBSERVED_COUNTS
from spinmeround_jax.files import InputError, named, sha256
from spinmeround_jax.photo import face_resnet, portraits, preview
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.pose import Correction
from spinmeround_jax.photo.prepare import Models, NoFace, Options, Prepared, is_ours, prepare

Angles = tuple[tuple[float, float], ...]  # yaw and pitch of each view, degrees
FRONT: Angles = ((0.0, 0.0),)


@dataclasses.dataclass(frozen=True)
class Job:
    """A head to make from `images` (m, S, S, 3), m may be 0; `source` goes to its settings."""

    name: str
    images: np.ndarray
    id_embedding: np.ndarray | None
    seed: int
    source: dict[str, Any]
    truth: portraits.Truth | None = None
    recognition: str | None = None  # SHA-256 of the model that made the identity, if known
    request: dict[str, Any] = dataclasses.field(default_factory=dict)  # see Plan.request
    notes: tuple[str, ...] = ()  # what the user should know, each naming the file
    prepared: Prepared | None = None  # of a photo: how it became a portrait

    @property
    def shown(self) -> Image.Image | None:
        """How a photo became a portrait."""
        return preview.draw(self.prepared) if self.prepared else None

    @property
    def identity(self) -> str:
        """What stands for the person, for settings.json and the page."""
        if self.id_embedding is None:
            return "none: the empty identity"
        return f"vector of recogniser {self.recognition[:12]}" if self.recognition else "given"


@dataclasses.dataclass(frozen=True)
class Photos:
    """How to make portraits of photos.

    recogniser: SHA-256 of what made the identities that the weights know; None if they record none.
    no_identity: also portraits go without the identity beside them. why_not: why photos do.
    correction: by hand, of the square that is cropped.
    """

    models: Models
    options: Options
    recogniser: str | None = None
    no_identity: bool = False
    why_not: str | None = None
    correction: Correction | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job not read yet; `load` raises InputError where it cannot be."""

    name: str  # of the folder it will be written to
    observed_angles: Angles
    seed: int
    files: tuple[pathlib.Path, ...]  # that it is made from
    load: Callable[[], Job]

    options: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # what else decides the result
    of_photo: bool = False  # taken by a camera

    def request(self) -> dict[str, Any]:
        """All that decides the result beside the run's settings, for JSON."""
        return {
            "seed": self.seed,
            "observed_angles": [list(pair) for pair in self.observed_angles],
            "files": [[path.name, _sha256(path)] for path in self.files],
            **self.options,
        }


def _sha256(path: pathlib.Path) -> str | None:
    """None where there is no such file, or none that can be read."""
    try:
        return sha256(path)
    except OSError:
        return None


def new_people(count: int, seed: int, size: int) -> list[Plan]:
    """Without identity and observed view; one for each seed from `seed` on."""
    jobs = [Job(f"new_{seed + i:04d}", _no_images(size), None, seed + i, {}) for i in range(count)]
    return [Plan(job.name, (), job.seed, (), partial(_same, job)) for job in jobs]


def interpolated(
    first: pathlib.Path, second: pathlib.Path, between: int, seed: int, size: int
) -> list[Plan]:
    """From one identity to another, both included.

    Raises:
        InputError: no identity there, or two that are opposite.
    """
    try:
        arc = slerp(portraits.read_identity(first), portraits.read_identity(second), between)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{first} and {second}: {error}") from error
    jobs = []
    for i, identity in enumerate(arc):
        fraction = round(i / (len(arc) - 1), 4)
        source = {"from": str(first), "to": str(second), "fraction": fraction}
        name = f"{first.stem}_to_{second.stem}_{i:02d}"
        # One seed for all: only the identity changes along the way.
        jobs.append(Job(name, _no_images(size), identity, seed, source))
    files = (*portraits.files_of(first), *portraits.files_of(second))
    return [
        Plan(job.name, (), seed, files, partial(_same, job), {"fraction": job.source["fraction"]})
        for job in jobs
    ]


def one_person(
    files: Sequence[pathlib.Path], angles: Angles, seed: int, size: int, photos: Photos
) -> Plan:
    """From aligned pictures of one person; the identity is the first's."""
    return _plan_views(files[0].stem, files, angles, seed, size, photos)


def from_inputs(paths: Sequence[pathlib.Path], seed: int, size: int, photos: Photos) -> list[Plan]:
    """From portraits, photos, sets of views, and folders of all these, in order of name.

    Raises:
        InputError: a folder holds neither, or two inputs have the same name.
    """
    plans = []
    for path in portraits.find(paths):
        if not portraits.is_view_set(path):
            photo = path.exists() and not portraits.has_identity(path)
            load = (
                partial(_from_photo, path, seed, size, photos)
                if photo
                else partial(_from_portrait, path, seed, size, photos)
            )
            options = (
                {**dataclasses.asdict(photos.options), "recogniser": photos.recogniser}
                if photo
                else {"no_identity": photos.no_identity}
            )
            files = portraits.files_of(path)
            name, of_photo = portraits.name_of(path), photo or is_ours(path.with_suffix(".json"))
            plans.append(Plan(name, FRONT, seed, files, load, options, of_photo))
            continue
        name = portraits.name_of(path)
        try:
            plans.append(_plan_views(name, *read_view_set(path), seed, size, photos))
        except InputError as error:  # of this input: the others go on
            plans.append(Plan(name, FRONT, seed, (), partial(_fail, error)))
    return plans


def _plan_views(
    name: str,
    files: Sequence[pathlib.Path],
    angles: Angles,
    seed: int,
    size: int,
    photos: Photos,
) -> Plan:
    load = partial(_from_views, name, files, seed, size, photos)
    options = {"no_identity": photos.no_identity}
    made_of, of_photo = (
        (*portraits.files_of(files[0]), *files[1:]),
        is_ours(files[0].with_suffix(".json")),
    )
    return Plan(name, angles, seed, made_of, load, options, of_photo)


def read_view_set(folder: pathlib.Path) -> tuple[list[pathlib.Path], Angles]:
    """Files and angles of a set of views.

    Raises:
        InputError: naming what is wrong in `views.json`.
    """
    path = folder / portraits.VIEW_SET
    try:
        views = schema.read(path, _VIEWS)
        files = [view["file"] for view in views]
        if any(pathlib.PurePath(file).name != file for file in files):
            raise ValueError('a "file" must be in the same folder')
        angles = tuple((view["yaw"], view.get("pitch", 0.0)) for view in views)
        check_angles(angles)
    except (OSError, ValueError) as error:
        wanted = '[{"file": "front.png", "yaw": 0, "pitch": 0}, ...]'
        raise InputError(f"{path}: expected {wanted}, {_COUNTS} ({error})") from error
    return [named(folder, file) for file in files], angles


_VIEWS = schema.array(
    schema.record(
        {"file": schema.text(longest=255), "yaw": schema.number()},
        {"pitch": schema.number(-90, 90)},
    )
)
_COUNTS = "1 or 3 views, the first at yaw 0, pitch 0"


def check_angles(angles: Angles) -> None:
    """Raises ValueError unless these can be observed views."""
    if len(angles) not in OBSERVED_COUNTS:
        raise ValueError(f"{_COUNTS}: got {len(angles)}")
    if not np.isfinite(angles).all() or max(abs(pitch) for _, pitch in angles) > 90.0:
        raise ValueError("angles are degrees, pitch -90 to 90")
    if any(angles[0]):
        raise ValueError("the first view is the reference, at yaw 0 and pitch 0")


def _no_images(size: int) -> np.ndarray:
    return np.zeros((0, size, size, 3), np.float32)


def _same(job: Job) -> Job:
    return job


def _fail(error: InputError) -> Job:
    raise error


def _from_portrait(path: pathlib.Path, seed: int, size: int, photos: Photos) -> Job:
    image = portraits.read_image(path, size)
    truth = portraits.read_truth(path, size)
    identity, notes = _given_identity(path, photos)
    return Job(
        path.stem, image[None], identity, seed, {"input": str(path)}, truth,
        portraits.read_recognition(path), notes=notes,
    )  # fmt: skip


def _given_identity(
    path: pathlib.Path, photos: Photos
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The identity beside a portrait, or None and what to say about it.

    Raises:
        InputError: none there, or one of another recogniser than the weights know.
    """
    if photos.no_identity:
        return None, ()
    if reason := portraits.no_identity(path):
        return None, (f"{path}: goes on without an identity: {reason}",)
    identity, made_by = portraits.read_identity(path), portraits.read_recognition(path)
    if made_by is not None and made_by != photos.recogniser:
        raise InputError(
            f"{path}: its identity is by another recogniser ({made_by[:12]}...) than the weights were "
            "trained with. Prepare the photo again with the right --front-end, or add --no-identity"
        )
    if photos.recogniser == face_resnet.sha256() and not face_resnet.is_one(identity):
        raise InputError(
            f"{path}: its identity is not a vector of {face_resnet.NAME}, which these weights know "
            "(128 numbers, then zeros). Delete it to have it made of the picture, or add --no-identity"
        )
    return identity, ()


def _from_photo(path: pathlib.Path, seed: int, size: int, photos: Photos) -> Job:
    try:
        prepared = prepare(path, photos.options, photos.models, correction=photos.correction)
    except NoFace as error:
        return _as_it_is(path, seed, size, error)
    except AssetError as error:
        raise InputError(
            f"{path}: no identity beside it ({path.stem}.npy or .json), and to take it as a photo: "
            f"{error}"
        ) from error
    except InputError as error:
        raise InputError(
            f"{error} (python -m spinmeround_jax.photo prepares photos with more options)"
        ) from error
    image = portraits.resized(prepared.image / np.float32(127.5) - 1.0, size)
    record = prepared.record()
    record.pop(
        "id_embedding", None
    )  # tells a face; results are passed on more freely than portraits
    notes = list(prepared.notes)
    if photos.why_not and not photos.no_identity:
        notes = [
            f"no identity: {photos.why_not}" if n.startswith("no identity") else n for n in notes
        ]
    return Job(
        path.stem,
        image[None],
        prepared.id_embedding,
        seed,
        {"input": str(path), "photo": record},
        recognition=prepared.recognition and prepared.recognition["sha256"],
        notes=tuple(f"{path}: {note}" for note in notes),
        prepared=prepared,
    )


def _as_it_is(path: pathlib.Path, seed: int, size: int, reason: NoFace) -> Job:
    """A square picture in which nobody is found may be a portrait all the same.

    Raises:
        InputError: it is not square.
    """
    try:
        image = portraits.read_image(path, size)
    except InputError as error:
        raise InputError(str(reason)) from error
    note = f"{path}: no face found; taken for an aligned portrait, without an identity"
    return Job(path.stem, image[None], None, seed, {"input": str(path)}, notes=(note,))


def _from_views(
    name: str, files: Sequence[pathlib.Path], seed: int, size: int, photos: Photos
) -> Job:
    images = np.stack([portraits.read_image(file, size) for file in files])
    source = {"observed": [str(file) for file in files]}
    identity, notes = _given_identity(files[0], photos)
    recognition = portraits.read_recognition(files[0])
    return Job(name, images, identity, seed, source, recognition=recognition, notes=notes)


def joined(jobs: Sequence[Job]) -> tuple[Job, Angles]:
    """One head from photos of one person, and from where each was taken, seen from the first.

    The identity is the first's.

    Raises:
        InputError: neither one photo nor three, or no face was found in one of three.
    """
    if len(jobs) == 1:
        return jobs[0], FRONT
    if len(jobs) not in OBSERVED_COUNTS:
        raise InputError(f"{len(jobs)} photos: give one, or three of the same person")
    if lost := [job.name for job in jobs if job.prepared is None]:
        raise InputError(f"{lost[0]}: how the head is turned is read from its face; none was found")
    poses = [cameras.orbit(*job.prepared.yaw_pitch) for job in jobs if job.prepared]
    yaw, pitch = cameras.yaw_pitch(cameras.relative_to(poses[0], np.stack(poses)))
    angles = [(0.0, 0.0), *((float(a), float(b)) for a, b in zip(yaw[1:], pitch[1:], strict=True))]
    images = np.concatenate([job.images for job in jobs])
    source = {"observed": [job.source for job in jobs]}
    notes = tuple(note for job in jobs for note in job.notes)
    return dataclasses.replace(jobs[0], images=images, source=source, notes=notes), tuple(angles)


def slerp(a: np.ndarray, b: np.ndarray, between: int) -> np.ndarray:
    """(between + 2, d) unit vectors along the arc from `a` to `b` (d,), both included.

    Raises:
        ValueError: when they are opposite, so that there is no one shortest arc.
    """
    a, b = (np.asarray(x, np.float64) / np.linalg.norm(x) for x in (a, b))
    angle = np.arccos(np.clip(a @ b, -1.0, 1.0))
    if np.pi - angle < 1e-3:
        raise ValueError("opposite vectors have no one arc between them")
    t = np.linspace(0.0, 1.0, between + 2)[:, None]
    if angle < 1e-3:
        arc = (1.0 - t) * a + t * b
    else:
        arc = (np.sin((1.0 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return (arc / np.linalg.norm(arc, axis=-1, keepdims=True)).astype(np.float32)
