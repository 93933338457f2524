"""Checks of the records of a data set: format, camera, image, normals, identity."""

import collections
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from spinmeround_jax import cameras
from spinmeround_jax.data import records, shards
from spinmeround_jax.data.records import ViewRecord
from spinmeround_jax.files import InputError

MAX_LENGTH_ERROR = 0.03  # of a normal: 8 bits a component round it by up to 0.7 %
MAX_SHARE = 1e-3  # of an image's pixels that may have a wrong length, for odd ones in thin hair
MIN_FACING = 0.3  # mean cosine between normals and the line to the camera; a ball has 2/3
SAME_IDENTITY = 0.9999  # cosine
SHOWN_ANGLES = ((0, 0), (45, 0), (90, 0), (180, 0), (-90, 0), (30, 30))  # on the page


@dataclasses.dataclass(frozen=True)
class Task:
    """One subject of a shard, or with row -1 the shard as a file."""

    split: str
    path: pathlib.Path
    row: int
    size: int
    sha256: str = ""
    pictures: bool = False


@dataclasses.dataclass
class Findings:
    """What was found in one task."""

    task: Task
    subject: str = ""
    faults: list[str] = dataclasses.field(default_factory=list)
    identity: np.ndarray | None = None
    bytes: int = 0
    records: int = 0
    decode_seconds: float = 0.0
    angles: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    coverage: list[float] = dataclasses.field(default_factory=list)  # share of the image
    formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    pictures: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)


def check(task: Task) -> Findings:
    """All checks of one task, in a worker process. Faults are reported, never raised."""
    findings = Findings(task)
    try:
        if task.row < 0:
            if task.sha256 and (found := shards.sha256_of(task.path)) != task.sha256:
                findings.faults.append(
                    f"{task.path}: sha256 is {found}, manifest.json says {task.sha256}; "
                    "restore the shard, or write it and the manifest again"
                )
        else:
            _check_subject(task, findings)
    except InputError as error:
        findings.faults.append(str(error))
    return findings


@functools.lru_cache(maxsize=4)
def _index(path: pathlib.Path) -> shards.ShardIndex:
    return shards.read_index(path)


def _check_subject(task: Task, findings: Findings) -> None:
    index = _index(task.path)
    findings.subject = str(index.subjects[task.row])
    shown = _shown_views(index.world_to_camera[task.row]) if task.pictures else []
    for view in range(index.offsets.shape[1]):
        where = index.where(task.row, view)
        try:
            (record,) = index.read_views(task.row, [view])
            start = time.thread_time()
            rgba, normals = records.decode_view(record, task.size, where)
            findings.decode_seconds += time.thread_time() - start
        except InputError as error:
            findings.faults.append(str(error))
            continue
        findings.records += 1
        findings.bytes += int(index.lengths[task.row, view])
        findings.angles.append((record.yaw, record.pitch))
        findings.coverage.append(float((rgba[..., 3] > 127).mean()))
        for name, encoded in (("image", record.image), ("normals", record.normals)):
            findings.formats[f"{name}: {format_of(encoded)}"] += 1
        if findings.identity is None:
            findings.identity = record.id_embedding
        faults = [
            *camera_faults(record),
            *picture_faults(record, rgba, normals),
            *identity_faults(record.id_embedding, findings.identity),
        ]
        findings.faults += [f"{where} ({record.subject} view {view}): {fault}" for fault in faults]
        if view in shown:
            findings.pictures.append(thumbnail(rgba, normals))


def _shown_views(world_to_camera: np.ndarray) -> list[int]:
    """The views nearest to SHOWN_ANGLES."""
    towards = world_to_camera[:, 2, :3]  # from the head to the camera
    wanted = np.stack([cameras.orbit(*angles)[2, :3] for angles in SHOWN_ANGLES])
    return np.unique((towards @ wanted.T).argmax(0)).tolist()


def format_of(encoded: bytes) -> str:
    """E.g. 'PNG', 'WebP, lossless'."""
    if encoded[:4] != b"RIFF":
        return "PNG"
    return "WebP, lossless" if b"VP8L" in encoded[12:64] else "WebP, lossy"


def camera_faults(record: ViewRecord) -> Iterator[str]:
    """Orthonormal, at the schema's distance, where yaw and pitch say."""
    pose = np.asarray(record.world_to_camera, np.float64)
    rotation = pose[:3, :3]
    off = abs(rotation @ rotation.T - np.eye(3)).max()
    if off > 1e-4 or np.linalg.det(rotation) < 0 or (pose[3] != (0, 0, 0, 1)).any():
        yield f"world_to_camera is no rigid pose (rows differ from orthonormal by {off:.2g})"
        return
    off = abs(pose - cameras.orbit(record.yaw, record.pitch)).max()
    if off > 2e-3:
        yaw, pitch = cameras.yaw_pitch(pose)
        yield (
            f"world_to_camera stands at yaw {yaw:.2f}, pitch {pitch:.2f} or is rolled or displaced, "
            f"the record says yaw {record.yaw:.2f}, pitch {record.pitch:.2f} (off by {off:.2g})"
        )


def picture_faults(record: ViewRecord, rgba: np.ndarray, normals: np.ndarray) -> Iterator[str]:
    """Something is shown; normals are unit length inside, 0 outside, and face the camera."""
    alpha = rgba[..., 3]
    if alpha.max() < 128:
        yield "the image is empty"
        return
    length = np.sqrt(np.square(normals).sum(-1))
    inside = alpha == 255
    wrong = inside & (abs(length - 1.0) > MAX_LENGTH_ERROR)
    if wrong.sum() > MAX_SHARE * max(int(inside.sum()), 1):
        y, x = np.argwhere(wrong)[0]
        yield (
            f"{wrong.sum()} of {inside.sum()} normals inside the mask are not of unit length, "
            f"the first at row {y}, column {x}: {length[y, x]:.3f}"
        )
    outside = (alpha == 0) & (length > MAX_LENGTH_ERROR)
    if outside.any():
        y, x = np.argwhere(outside)[0]
        yield (
            f"{outside.sum()} normals outside the mask are not grey, "
            f"the first at row {y}, column {x}: {normals[y, x].round(3).tolist()}"
        )
    facing = normals[inside] @ np.asarray(record.world_to_camera)[2, :3]
    if len(facing) and facing.mean() < MIN_FACING:
        yield (
            f"normals do not face the camera (mean cosine {facing.mean():.2f}); "
            "are they in the head's frame?"
        )


def identity_faults(identity: np.ndarray, first: np.ndarray) -> Iterator[str]:
    if not records.is_identity(identity):
        yield f"id_embedding has length {np.linalg.norm(identity):.4f}"
    if not np.array_equal(identity, first):
        yield "id_embedding differs from that of the subject's first view"


def subject_faults(findings: Sequence[Findings]) -> Iterator[str]:
    """No name twice, no person in two splits."""
    seen: dict[str, Findings] = {}
    for found in findings:
        if found.subject in seen:
            other = seen[found.subject].task
            yield (
                f"{found.task.path}: subject {found.subject!r} of split {found.task.split} is also "
                f"in {other.path.name}, split {other.split}"
            )
        seen.setdefault(found.subject, found)
    splits = collections.defaultdict(list)
    for found in findings:
        if found.identity is not None:
            splits[found.task.split].append(found)
    names = list(splits)
    for i, name in enumerate(names):
        rows = np.stack([found.identity for found in splits[name]])
        for other in names[i + 1 :]:
            columns = np.stack([found.identity for found in splits[other]])
            for a, b in np.argwhere(rows @ columns.T > SAME_IDENTITY):
                one, two = splits[name][a], splits[other][b]
                yield (
                    f"{one.task.path}: {one.subject!r} of split {name} has the identity of "
                    f"{two.subject!r} of split {other} ({two.task.path.name}); "
                    "a person must be in one split"
                )


TILE = 128  # pixels


def thumbnail(rgba: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(TILE, TILE, 3) uint8 of the image on white, and of the normals."""
    picture = Image.fromarray(rgba)
    white = Image.new("RGBA", picture.size, "white")
    shown = Image.alpha_composite(white, picture).convert("RGB")
    coloured = Image.fromarray(np.rint(normals * 127 + 128).astype(np.uint8))
    return tuple(
        np.asarray(image.resize((TILE, TILE), Image.Resampling.BOX)) for image in (shown, coloured)
    )
