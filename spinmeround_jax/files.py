"""Files that are whole or not there, in folders and in buckets (gs://...).

A path is a `pathlib.Path`, or for a URL the object of the same methods that `universal_pathlib` gives,
which reads and writes through fsspec. Only what differs between the two is here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO


class InputError(ValueError):
    """A file, folder or value cannot be used; the message names it and says what to do."""


def as_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a file or folder, local or a URL such as gs://bucket/folder.

    Raises:
        OSError: a URL whose packages are not installed.
    """
    if not (isinstance(path, str) and "://" in path):
        return path if not isinstance(path, (str, os.PathLike)) else pathlib.Path(path)
    try:
        from upath import UPath  # only who reads from a bucket needs it

        remote = UPath(path)
        _ = remote.fs  # imports what speaks the protocol
    except ImportError as error:
        raise OSError(
            f"{path}: cannot be reached ({error}); pip install 'spinmeround_jax[gcs]', "
            "or copy the folder to a local disk"
        ) from error
    except ValueError as error:
        raise OSError(f"{path}: cannot be reached ({error})") from error
    return remote


def path_argument(text: str) -> pathlib.Path:
    """`as_path` as a `type` of argparse."""
    try:
        return as_path(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def is_local(path: pathlib.Path) -> bool:
    return isinstance(path, pathlib.Path)


def version(path: pathlib.Path) -> int | str:
    """What is another once the file was written anew: its time, or what its bucket tells of it."""
    return path.stat().st_mtime_ns if is_local(path) else path.fs.ukey(path.path)


def read_ranges(path: pathlib.Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Bytes from start to end of each range of a file; from a bucket all are fetched at once.

    A range beyond the end gives what there is of it.

    Raises:
        OSError: whatever went wrong; the clients of object stores raise errors of their own.
    """
    if is_local(path):
        with path.open("rb", buffering=0) as file:
            read_at_random(file)
            return [os.pread(file.fileno(), end - start, start) for start, end in ranges]
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
    try:
        return path.fs.cat_ranges([path.path] * len(ranges), starts, ends, on_error="raise")
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {error!r}") from error


def read_at_random(file: IO[bytes]) -> None:
    """Tell the system not to read ahead, which would bring in several times what is wanted."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Write whole or not at all: a kill leaves the old file or the new one.

    Local files are written under a hidden name and renamed; an upload is atomic by itself.
    """
    if not is_local(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextlib.contextmanager
def begun(path: pathlib.Path, unique: bool = False) -> Iterator[pathlib.Path]:
    """A local path to write `path` at, removed at the end; `publish` gives it its name.

    It is beside `path`, under a hidden name, or for a bucket in the folder for temporary files.

    Args:
        unique: two processes may write the same file at once.
    """
    if is_local(path):
        process = f".{os.getpid()}" if unique else ""
        temporary = path.with_name(f".{path.name}{process}.tmp")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
        return
    folder = tempfile.mkdtemp(prefix="spinmeround_jax-")
    try:
        yield pathlib.Path(folder) / path.name
    finally:
        shutil.rmtree(folder)


def publish(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Give what was `begun` and is written to disk its name."""
    if is_local(path):
        os.replace(temporary, path)
        sync_directory(path.parent)
    else:
        path.fs.put_file(str(temporary), path.path)


def sync_directory(directory: pathlib.Path) -> None:
    """Make renames survive a power cut; some network file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A local folder that appears whole, or not at all, in place of an earlier one.

    Yields a hidden sibling to write into; it takes the folder's name unless there was an error.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
