"""Latents computed before training: the files, and random access to them (numpy only).

    latents.json                        of which data, by which autoencoder, see `Description`
    train-00000-of-00008.moments.npy    (S, V, 2 + k, h, w, 2z) float16
    train-00000-of-00008.subjects.npz   subjects (S,) str, id_embedding (S, 512), colours (S, k, 3),
                                        crc32 (S, V, 2 + k) uint32 of each view's moments

There is a pair of files for each TFRecord shard, with its S subjects of V views in the same order. Third
axis of the moments: the normal map, the image on white, the image on each of the subject's k colours.
Last axis: scaled mean, then scaled standard deviation, of the autoencoder's posterior. `latent_cache`
writes the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from spinmeround_jax import ID_EMBEDDING_SIZE, schema
from spinmeround_jax.data.shards import ShardIndex
from spinmeround_jax.files import (
    InputError,
    allocate,
    as_path,
    begun,
    naming,
    publish,
    read_bytes,
    read_ranges,
    write_atomically,
)

SCHEMA_VERSION = 1
NORMALS, ON_WHITE = 0, 1  # then the colours
_MAX_SUBJECTS_BYTES = 1 << 30
_REMEDY = "delete the folder and write it again (data_prep.cache_latents, or train does it)"


@dataclasses.dataclass(frozen=True)
class Description:
    """What decides the latents of a folder; those with different descriptions are not mixed."""

    autoencoder: str  # fingerprint of its weights
    image_size: int
    views: int
    latent_shape: tuple[int, int, int]  # h, w, z
    backgrounds: int  # k random colours per subject, besides white
    seed: int  # of the data set; the colours depend on it
    normals_frame: str  # of the normal maps, see cameras.Frame

    @property
    def moments_shape(self) -> tuple[int, ...]:
        """Of one subject; splits with another number of views differ in the first axis."""
        height, width, channels = self.latent_shape
        return self.views, 2 + self.backgrounds, height, width, 2 * channels


def write_description(directory: pathlib.Path, description: Description) -> None:
    """Create or continue a folder; InputError if it holds latents of another description."""
    path = directory / "latents.json"
    if path.exists():
        check_same(path, read_description(directory), description)
        return
    directory.mkdir(parents=True, exist_ok=True)
    content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(description)}
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def check_same(path: pathlib.Path, found: Description, wanted: Description) -> None:
    """Raises InputError naming the fields that differ."""
    pairs = zip(dataclasses.asdict(found).items(), dataclasses.asdict(wanted).values(), strict=True)
    if changed := [f"{name} was {a}, is {b}" for (name, a), b in pairs if a != b]:
        raise InputError(f"{path}: {'; '.join(changed)}; {_REMEDY}")


def read_description(directory: pathlib.Path) -> Description:
    """The content of `latents.json`; InputError if it is missing or damaged."""
    path = directory / "latents.json"
    try:
        content = schema.read(path, _DESCRIPTION, max_bytes=1 << 16)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; write latents with data_prep.cache_latents"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{error}; {_REMEDY}") from error
    del content["schema_version"]
    content.setdefault("normals_frame", "world")  # older folders have no choice
    return Description(**{**content, "latent_shape": tuple(content["latent_shape"])})


_DESCRIPTION = schema.record(
    {
        "schema_version": schema.one_of(SCHEMA_VERSION),
        "autoencoder": schema.text(),
        "image_size": schema.integer(1, 1 << 16),
        "views": schema.integer(1, 1 << 16),
        "latent_shape": schema.array(schema.integer(1, 1 << 16), 3, 3),
        "backgrounds": schema.integer(0, 1 << 16),
        "seed": schema.integer(0),
    },
    {"normals_frame": schema.one_of("world", "camera")},
    closed=True,
)


# --------------------------------------------------------------------------------------------------
# Shards


def paths(directory: pathlib.Path, shard: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Files of the moments and of the subjects of a TFRecord shard."""
    return directory / f"{shard.stem}.moments.npy", directory / f"{shard.stem}.subjects.npz"


def is_complete(directory: pathlib.Path, shard: pathlib.Path) -> bool:
    """Whether the latents of this TFRecord shard are complete."""
    return all(path.is_file() for path in paths(directory, shard))


@contextlib.contextmanager
def shard_writer(
    directory: pathlib.Path,
    index: ShardIndex,
    description: Description,
    id_embedding: np.ndarray,
    colours: np.ndarray,
) -> Iterator[np.ndarray]:
    """Yields the (S, V, ...) float16 map to fill; the files get their names on a clean exit.

    Args:
        id_embedding: (S, 512) float32.
        colours: (S, k, 3) float32 in [0, 1].
    """
    moments_path, subjects_path = paths(directory, index.path)
    shape = (*index.offsets.shape, *description.moments_shape[1:])
    with begun(moments_path) as unfinished:
        with naming(moments_path):
            moments = np.lib.format.open_memmap(unfinished, "w+", np.float16, shape)
            allocate(unfinished)
        yield moments
        crc32 = np.array([zlib.crc32(block) for block in moments.reshape(-1, *shape[3:])])
        moments.flush()
        del moments
        publish(unfinished, moments_path)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            subjects=index.subjects,
            id_embedding=id_embedding,
            colours=colours,
            crc32=crc32.astype(np.uint32).reshape(shape[:3]),
            shard_sha256=np.str_(index.sha256),
        )
        write_atomically(subjects_path, buffer.getvalue())  # last: see `is_complete`


class LatentSource:
    """Random access to the latents of the given shards.

    Raises:
        InputError: a shard's latents are missing, damaged, or of other subjects.
    """

    def __init__(self, directory: str | pathlib.Path, indexes: Sequence[ShardIndex]):
        self.directory, self._indexes = as_path(directory), tuple(indexes)
        self.description = read_description(self.directory)
        self._shards = {index.path.name: self._open(index) for index in indexes}

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentSource, (self.directory, self._indexes)  # a worker process maps them itself

    def read(
        self,
        index: ShardIndex,
        row: int,
        views: Sequence[int],
        background: int,
        moments: np.ndarray,
    ) -> np.ndarray:
        """Read some views of the subject in `row` of a shard.

        Args:
            background: 0 is white, then 1..k.
            moments: (v, 2, h, w, 2z) float32 buffer to fill: image, then normal map.

        Returns:
            (512,) float32 identity.
        """
        stored, id_embedding = self._shards[index.path.name]
        stored.read(row, views, (ON_WHITE + background, NORMALS), moments)
        return id_embedding[row]

    def _open(self, index: ShardIndex) -> tuple[_Moments, np.ndarray]:
        moments_path, subjects_path = paths(self.directory, index.path)
        shape = (*index.offsets.shape, *self.description.moments_shape[1:])
        try:
            moments = _Moments(moments_path)
            if moments.shape != shape or moments.dtype != np.float16:
                raise ValueError(f"holds {moments.shape} {moments.dtype}, expected {shape} float16")
            content = io.BytesIO(read_bytes(subjects_path, _MAX_SUBJECTS_BYTES))
            with np.load(content, allow_pickle=False) as stored:
                subjects, id_embedding = stored["subjects"], stored["id_embedding"]
                moments.crc32 = stored.get("crc32")  # older folders have neither
                encoded = str(stored.get("shard_sha256", ""))
            if encoded and index.sha256 and encoded != index.sha256:
                raise ValueError(f"encoded from another shard than {index.path} is now")
            if not np.array_equal(subjects, index.subjects):
                raise ValueError(f"subjects differ from those of {index.path}")
            if id_embedding.shape != (len(subjects), ID_EMBEDDING_SIZE):
                raise ValueError(f"identities are {id_embedding.shape}")
            if moments.crc32 is not None and moments.crc32.shape != shape[:3]:
                raise ValueError(f"checksums are {moments.crc32.shape}")
        except Exception as error:  # numpy, zip and its header parser each have their own
            raise InputError(f"{moments_path}: unusable latents ({error}); {_REMEDY}") from error
        return moments, id_embedding


class _Moments:
    """A .npy file from which single blocks are read.

    It is not mapped into memory: mapping reads single pages or, with read-ahead, ten times the bytes
    needed; and a file in a bucket cannot be mapped.
    """

    crc32: np.ndarray | None = None  # (S, V, 2 + k) of the blocks

    def __init__(self, path: pathlib.Path):
        self._path = path
        (start,) = read_ranges(path, [(0, 4096)])
        header = io.BytesIO(start)
        version = np.lib.format.read_magic(header)
        if version != (1, 0):
            raise ValueError(f"npy version {version}, expected 1.0")
        self.shape, fortran, self.dtype = np.lib.format.read_array_header_1_0(header)
        self._start = header.tell()
        self._block = math.prod(self.shape[3:]) * self.dtype.itemsize
        size, wanted = path.stat().st_size, self._start + math.prod(self.shape[:3]) * self._block
        if fortran or size != wanted:
            raise ValueError(f"{size} bytes, expected {wanted}")

    def read(
        self, row: int, views: Sequence[int], kinds: Sequence[int], moments: np.ndarray
    ) -> None:
        """Fill (v, kinds, h, w, 2z) float32."""
        places = [(row, int(view), kind) for view in views for kind in kinds]
        numbers = [int(np.ravel_multi_index(place, self.shape[:3])) for place in places]
        starts = [self._start + number * self._block for number in numbers]
        ranges = [(start, start + self._block) for start in starts]
        try:
            blocks = read_ranges(self._path, ranges)
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read ({error}); {_REMEDY}") from error
        targets = moments.reshape(-1, *self.shape[3:])
        for place, block, target in zip(places, blocks, targets, strict=True):
            if len(block) != self._block:
                raise InputError(f"{self._path}: became shorter while it was read; {_REMEDY}")
            if self.crc32 is not None and zlib.crc32(block) != self.crc32[place]:
                raise InputError(f"{self._path}: wrong checksum at {list(place)}; {_REMEDY}")
            target[...] = np.frombuffer(block, self.dtype).reshape(target.shape)
