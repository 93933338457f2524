"""Files and folders that are complete or absent, local and in buckets (gs://...).

A path is a `pathlib.Path` or, for a URL, the object with the same methods of `universal_pathlib`, which
reads and writes through fsspec. The differences between the two are handled here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pathlib
import re
import shutil
import socket
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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
        from upath import UPath  # an extra, for buckets only

        remote = UPath(path)
        _ = remote.fs  # imports the client of the protocol
    except ImportError as error:
        raise OSError(
            f"{path}: cannot be reached ({error}); pip install 'spinmeround_jax[gcs]', "
            "or copy the folder to a local disk"
        ) from error
    except ValueError as error:
        raise OSError(f"{path}: cannot be reached ({error})") from error
    return remote


def user_cache() -> pathlib.Path:
    """The program's folder in the user's cache; RuntimeError if there is no home folder."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "spinmeround_jax"


def existing(path: pathlib.Path) -> pathlib.Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(found for found in (path, *path.parents) if found.exists())


def check_writable(folder: pathlib.Path) -> None:
    """Raises InputError unless `folder` can be created or written."""
    found = existing(folder)
    if not found.is_dir():
        raise InputError(f"{found}: a file is in the way; choose another folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise InputError(
            f"{found}: no permission to write; choose another folder, or change its owner"
        )


def is_local(path: pathlib.Path) -> bool:
    return isinstance(path, pathlib.Path)


def version(path: pathlib.Path) -> int | str:
    """A value that changes when the file is written: its time, or its bucket's version."""
    return path.stat().st_mtime_ns if is_local(path) else path.fs.ukey(path.path)


def read_ranges(path: pathlib.Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Bytes from start to end of each range of a file; fetched concurrently from a bucket.

    Ranges are cut at the end of the file.

    Raises:
        OSError: for any failure; clients of object stores have their own exceptions.
    """
    if is_local(path):
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # else the system reads several times the bytes needed
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            return [os.pread(file.fileno(), end - start, start) for start, end in ranges]
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
    try:
        return path.fs.cat_ranges([path.path] * len(ranges), starts, ends, on_error="raise")
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {error!r}") from error


# --------------------------------------------------------------------------------------------------
# Reading untrusted files


def open_regular(path: pathlib.Path, max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file for reading; pipes and devices may never end.

    Raises:
        OSError: naming the file, also where it is larger than `max_bytes`.
    """
    if not is_local(path):
        size = path.stat().st_size
        file = path.open("rb")
    else:
        # Opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        size, file = status.st_size, os.fdopen(descriptor, "rb")
    if max_bytes is not None and size > max_bytes:
        file.close()
        raise OSError(
            errno.EINVAL, f"{size:,} bytes, more than the {max_bytes:,} that are read", str(path)
        )
    return file


def read_bytes(path: pathlib.Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes`; OSError as of `open_regular`."""
    with open_regular(path, max_bytes) as file:
        return file.read(max_bytes)


def sha256(path: pathlib.Path, progress: Callable[[int], Any] = lambda count: None) -> str:
    """SHA-256 of a regular file in hexadecimal; `progress` is called with the size of each block."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def composed(name: str) -> str:
    """`name` in Unicode's composed form (NFC); macOS decomposes é into e and an accent."""
    return unicodedata.normalize("NFC", name)


def named(folder: pathlib.Path, name: str) -> pathlib.Path:
    """`folder / name`; parts that do not exist are replaced by existing ones with equal `composed` names."""
    path = folder
    for part in pathlib.PurePath(name).parts:
        if not (path / part).exists() and not part.isascii() and path.is_dir():
            alike = [other for other in os.listdir(path) if composed(other) == composed(part)]
            part = alike[0] if len(alike) == 1 else part
        path = path / part
    return path


def explain(error: OSError, folder: pathlib.Path | None = None) -> str:
    """One line for a user: the file, the reason, and for a full disk what to do.

    Args:
        folder: named if the error names no file.
    """
    if error.errno not in _FULL:
        place = error.filename or folder
        reason = error.strerror or str(error)
        return f"{place}: {reason}" if place and error.strerror else reason
    place = error.filename or folder
    # Worker processes use shared memory, whose errors name no file.
    for other in () if error.filename else (pathlib.Path("/dev/shm"), tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            if shutil.disk_usage(other).free < 16 << 20:
                place = f"{other} (temporary memory of this machine)"
    return (
        f"{place or 'disk'}: no space left. Finished results are kept; free some space and repeat the "
        "command"
    )


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# --------------------------------------------------------------------------------------------------
# Writing completely or not at all
#
# NAME is written as .NAME.PID.unfinished, moved to .NAME.replaced while a folder replaces it, and locked by
# .NAME.lock, all in the same folder.


@contextlib.contextmanager
def lock(path: pathlib.Path, wait: bool = False, suffix: str = "lock") -> Iterator[None]:
    """Be the only process that writes `path`, a local file or folder; buckets are not locked.

    The system releases the lock when the process dies. File systems without locks are not locked.

    Args:
        wait: for the other process, if writing takes a moment only.
        suffix: of the lock file; another one for work during which `path` is written under "lock".

    Raises:
        BlockingIOError: another process, or another thread of this one, holds the lock; it is named.
    """
    if not is_local(path):
        yield
        return
    place = path.with_name(f".{path.name}.{suffix}")
    while True:
        file = open(place, "a+", encoding="utf-8")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise BlockingIOError(
                errno.EAGAIN,
                f"{holder} is writing here; wait until it is done, or stop it",
                str(path),
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                file.close()
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(place)):
                break
        file.close()  # the last holder has removed this lock file
    try:
        with contextlib.suppress(OSError):  # the holder's name is for messages only
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        place.unlink(missing_ok=True)
        file.close()


def recover(path: pathlib.Path) -> None:
    """After a kill: restore a folder that was being replaced, remove unfinished files.

    Does nothing while another process is writing.
    """
    if is_local(path) and _leftovers(path):
        with contextlib.suppress(BlockingIOError), lock(path):
            _recover(path)


def _leftovers(path: pathlib.Path) -> list[pathlib.Path]:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+\.unfinished|replaced)")
    try:
        names = os.listdir(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path.with_name(name) for name in sorted(names) if pattern.fullmatch(name)]


def _recover(path: pathlib.Path) -> None:
    for leftover in _leftovers(path):
        if leftover.name.endswith(".replaced") and not path.exists():
            leftover.rename(path)
        else:
            _remove(leftover)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _unfinished(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")


def seal(content: bytes) -> bytes:
    """`content` with its SHA-256 at the end, for caches that are recomputed if damaged."""
    return content + hashlib.sha256(content).digest()


def unseal(content: bytes) -> bytes:
    """The inverse of `seal`; ValueError if the content was changed."""
    content, digest = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("wrong checksum")
    return content


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one.

    Local files are written under a hidden name and renamed; uploads are atomic.
    """
    with begun(path, wait=True) as unfinished, naming(path):
        unfinished.write_bytes(content)
        publish(unfinished, path)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Add `path` to errors of writing that name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def begun(path: pathlib.Path, wait: bool = False) -> Iterator[pathlib.Path]:
    """A temporary local path for the content of `path`, removed at the end; `publish` renames it.

    It is in the same folder, under a hidden name; for a bucket in the folder for temporary files.

    Raises:
        BlockingIOError: another process is writing `path`, unless `wait`; see `lock`.
    """
    if not is_local(path):
        with tempfile.TemporaryDirectory(prefix="spinmeround_jax-") as folder:
            yield pathlib.Path(folder) / path.name
        return
    with lock(path, wait):
        _recover(path)
        unfinished = _unfinished(path)
        try:
            yield unfinished
        finally:
            unfinished.unlink(missing_ok=True)


def allocate(path: pathlib.Path) -> None:
    """Reserve the disk space of a sparse local file; OSError if there is not enough.

    Writing to it through a memory map would otherwise kill the process when the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def publish(unfinished: pathlib.Path, path: pathlib.Path) -> None:
    """Flush the file of `begun` to disk, then rename or upload it to `path`."""
    if is_local(path):
        _sync(unfinished)
        os.replace(unfinished, path)
        _sync(path.parent)
    else:
        path.fs.put_file(str(unfinished), path.path)


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Write a local folder completely or not at all; it replaces an earlier one.

    Yields a hidden folder to write into, which is renamed unless an error is raised. After a kill between
    the two renames `recover` restores the earlier folder.

    Raises:
        BlockingIOError: another process is writing it; see `lock`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        _recover(folder)
        unfinished, replaced = _unfinished(folder), folder.with_name(f".{folder.name}.replaced")
        unfinished.mkdir()
        try:
            with naming(folder):
                yield unfinished
                for place, _, names in os.walk(unfinished):
                    for name in names:
                        _sync(pathlib.Path(place, name))
                    _sync(pathlib.Path(place))
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
            _sync(folder.parent)
        finally:
            _recover(folder)


def _sync(path: pathlib.Path) -> None:
    """Flush a file, or the renames in a folder, to disk."""
    # Some network file systems refuse this for folders.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def name_inside(name: str) -> str:
    """`name`, if a file or folder of results can have it.

    Raises:
        InputError: it is empty, begins with a dot (as ".." and temporary names do), or holds a separator.
    """
    if not name or name.startswith(".") or set(name) & {"/", os.sep, "\0"}:
        raise InputError(f"{name!a} cannot be the name of a folder of results; rename the input")
    return name
