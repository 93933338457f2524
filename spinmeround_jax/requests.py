"""The heads that `sample` is to make: listed before any input is read, each read in its turn.

A folder of inputs may mix portraits (see `portraits`), photos (images without an identity beside them; `photo`
aligns them) and sets of views of one person: folders with 1 or 3 images and

    views.json    [{"file": "front.png", "yaw": 0, "pitch": 0}, {"file": "left.png", "yaw": 45}, ...]
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from spinmeround_jax import cameras, schema
from spinmeround_jax.diffusion.pipeline import OBSERVED_COUNTS
from spinmeround_jax.files import InputError, named, sha256
from spinmeround_jax.photo import portraits, preview
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.pose import Correction
from spinmeround_jax.photo.prepare import Models, NoFace, Options, Prepared, is_ours, prepare

Angles = tuple[tuple[float, float], ...]  # yaw and pitch of each view, degrees
FRONT: Angles = ((0.0, 0.0),)


@dataclasses.dataclass(frozen=True)
class Job:
    """The inputs of one head.

    Attributes:
        images: (m, S, S, 3) float32 in [-1, 1], m may be 0.
        id_embedding: (512,) unit vector, or None for the empty identity.
        source: where the inputs come from, for settings.json.
        recognition: SHA-256 of the recogniser that computed the identity, if known.
        notes: what the user should know; each names the file.
        prepared: of a photo: how it became a portrait.
    """

    name: str
    images: np.ndarray
    id_embedding: np.ndarray | None
    seed: int
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    truth: portraits.Truth | None = None
    recognition: str | None = None
    notes: tuple[str, ...] = ()
    prepared: Prepared | None = None

    @property
    def preview(self) -> Image.Image | None:
        """Face, crop and mask of a photo."""
        return preview.draw(self.prepared) if self.prepared else None

    @property
    def identity(self) -> str:
        """The kind of identity, for settings.json and the page."""
        if self.id_embedding is None:
            return "none: the empty identity"
        return f"vector of recogniser {self.recognition[:12]}" if self.recognition else "given"


@dataclasses.dataclass(frozen=True)
class Photos:
    """How photos become portraits.

    Attributes:
        recogniser: SHA-256 of the recogniser that the weights were trained with; None if unknown.
        no_identity: sample portraits without their identities, too.
        why_not: why photos get no identity; None if they do.
        correction: manual, of the crop.
    """

    models: Models
    options: Options
    recogniser: str | None = None
    no_identity: bool = False
    why_not: str | None = None
    correction: Correction | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A head whose inputs are not read yet; `load` raises InputError if they cannot be.

    Attributes:
        name: of the folder that it will be written to.
        files: that it is made from.
        options: everything else that decides the result.
        of_photo: whether a camera took the image.
    """

    name: str
    observed_angles: Angles
    seed: int
    files: tuple[pathlib.Path, ...]
    load: Callable[[], Job]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of_photo: bool = False

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """All that decides the result besides the run's settings, as JSON."""
        return {
            "seed": self.seed,
            "observed_angles": [list(pair) for pair in self.observed_angles],
            "files": [[path.name, _sha256(path)] for path in self.files],
            **self.options,
        }


def _sha256(path: pathlib.Path) -> str | None:
    try:
        return sha256(path)
    except OSError:  # there is none, or it cannot be read: `load` reports it
        return None


def new_people(count: int, seed: int, size: int) -> list[Request]:
    """Heads without identity and observed view, one for each seed from `seed` on."""
    jobs = [Job(f"new_{n:04d}", _no_images(size), None, n) for n in range(seed, seed + count)]
    return [Request(job.name, (), job.seed, (), partial(_same, job)) for job in jobs]


def interpolated(
    first: pathlib.Path, second: pathlib.Path, between: int, seed: int, size: int, photos: Photos
) -> list[Request]:
    """Heads along the arc between two identities, both included, all with one seed.

    Raises:
        InputError: an identity is missing or by another recogniser, or the two are opposite.
    """
    a, b = (portraits.identity_for(path, photos.recogniser) for path in (first, second))
    try:
        arc = slerp(a, b, between)
    except ValueError as error:
        raise InputError(f"{first} and {second}: {error}") from error
    files = (*portraits.files_of(first), *portraits.files_of(second))
    requests = []
    for i, identity in enumerate(arc):
        fraction = {"fraction": round(i / (len(arc) - 1), 4)}
        source = {"from": str(first), "to": str(second), **fraction}
        name = f"{first.stem}_to_{second.stem}_{i:02d}"
        job = Job(name, _no_images(size), identity, seed, source)
        requests.append(Request(name, (), seed, files, partial(_same, job), fraction))
    return requests


def one_person(
    files: Sequence[pathlib.Path],
    angles: Angles,
    seed: int,
    size: int,
    photos: Photos,
    name: str | None = None,
) -> Request:
    """A head from aligned images of one person; the identity is the one beside the first image."""
    name = name or files[0].stem
    load = partial(_from_views, name, files, seed, size, photos)
    options = {"no_identity": photos.no_identity}
    sources = (*portraits.files_of(files[0]), *files[1:])
    of_photo = is_ours(files[0].with_suffix(".json"))
    return Request(name, angles, seed, sources, load, options, of_photo)


def from_inputs(
    paths: Sequence[pathlib.Path], seed: int, size: int, photos: Photos
) -> list[Request]:
    """Heads from portraits, photos, sets of views, and folders of these, in order of name.

    Raises:
        InputError: a folder holds none of them, or two inputs have the same name.
    """
    requests = []
    for path in portraits.find(paths):
        name, read, options = portraits.name_of(path), _from_portrait, {}
        if portraits.is_view_set(path):
            try:
                requests.append(one_person(*read_view_set(path), seed, size, photos, name))
            except InputError as error:  # reported in its turn: the other inputs are sampled
                requests.append(Request(name, FRONT, seed, (), partial(_fail, error)))
            continue
        if is_photo := path.exists() and not portraits.has_identity(path):
            read = _from_photo
            options = {**dataclasses.asdict(photos.options), "recogniser": photos.recogniser}
        else:
            options = {"no_identity": photos.no_identity}
        load = partial(read, path, seed, size, photos)
        of_photo = is_photo or is_ours(path.with_suffix(".json"))
        sources = portraits.files_of(path)
        requests.append(Request(name, FRONT, seed, sources, load, options, of_photo))
    return requests


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
    image, truth = portraits.read_image(path, size), portraits.read_truth(path, size)
    identity, notes = _given_identity(path, photos)
    recognition = portraits.read_recognition(path)
    source = {"input": str(path)}
    return Job(path.stem, image[None], identity, seed, source, truth, recognition, notes)


def _from_views(
    name: str, files: Sequence[pathlib.Path], seed: int, size: int, photos: Photos
) -> Job:
    images = np.stack([portraits.read_image(file, size) for file in files])
    identity, notes = _given_identity(files[0], photos)
    recognition = portraits.read_recognition(files[0])
    source = {"observed": [str(file) for file in files]}
    return Job(name, images, identity, seed, source, None, recognition, notes)


def _given_identity(
    path: pathlib.Path, photos: Photos
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The identity beside a portrait, or None and the reason as a note.

    Raises:
        InputError: there is none, or the weights were trained with another recogniser.
    """
    if photos.no_identity:
        return None, ()
    if reason := portraits.no_identity(path):
        return None, (f"{path}: sampled without an identity: {reason}",)
    return portraits.identity_for(path, photos.recogniser), ()


def _from_photo(path: pathlib.Path, seed: int, size: int, photos: Photos) -> Job:
    source: dict[str, Any] = {"input": str(path)}
    try:
        prepared = prepare(path, photos.options, photos.models, correction=photos.correction)
    except NoFace as no_face:
        try:  # a square image may be a portrait all the same
            image = portraits.read_image(path, size)
        except InputError as error:
            raise InputError(str(no_face)) from error
        note = f"{path}: no face found; taken as an aligned portrait, without an identity"
        return Job(path.stem, image[None], None, seed, source, notes=(note,))
    except AssetError as error:
        raise InputError(
            f"{path}: has no identity beside it ({path.stem}.npy or .json), and cannot be prepared as a "
            f"photo: {error}"
        ) from error
    except InputError as error:
        raise InputError(
            f"{error} (python -m spinmeround_jax.photo prepares photos with more options)"
        ) from error
    # Without the vector, which identifies a person: results are shared more freely than portraits.
    source["photo"] = {k: v for k, v in prepared.record().items() if k != "id_embedding"}
    notes = list(prepared.notes)
    if photos.why_not and not photos.no_identity:
        reason = f"no identity: {photos.why_not}"
        notes = [reason if note.startswith("no identity") else note for note in notes]
    return Job(
        path.stem,
        portraits.resized(prepared.image / np.float32(127.5) - 1.0, size)[None],
        prepared.id_embedding,
        seed,
        source,
        recognition=prepared.recognition and prepared.recognition["sha256"],
        notes=tuple(f"{path}: {note}" for note in notes),
        prepared=prepared,
    )


def joined(jobs: Sequence[Job]) -> tuple[Job, Angles]:
    """One job from photos of one person, and their angles relative to the first; its identity is kept.

    Raises:
        InputError: neither one photo nor three, or no face was found in one of three.
    """
    if len(jobs) == 1:
        return jobs[0], FRONT
    if len(jobs) not in OBSERVED_COUNTS:
        raise InputError(f"{len(jobs)} photos: give one, or three of the same person")
    if lost := [job.name for job in jobs if job.prepared is None]:
        raise InputError(
            f"{lost[0]}: no face was found, from which the angle of the head is estimated"
        )
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
        ValueError: they are opposite, so that the shortest arc is not unique.
    """
    a, b = (np.asarray(x, np.float64) / np.linalg.norm(x) for x in (a, b))
    angle = np.arccos(np.clip(a @ b, -1.0, 1.0))
    if np.pi - angle < 1e-3:
        raise ValueError("opposite vectors have no unique arc between them")
    t = np.linspace(0.0, 1.0, between + 2)[:, None]
    if angle < 1e-3:
        arc = (1.0 - t) * a + t * b
    else:
        arc = (np.sin((1.0 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return (arc / np.linalg.norm(arc, axis=-1, keepdims=True)).astype(np.float32)
