"""Files that are whole or not there, in folders and in buckets (gs://...).

A path is a `pathlib.Path`, or for a URL the object of the same methods that `universal_pathlib` gives,
which reads and writes through fsspec. Only what differs between the two is here.
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
from typing import IO, Any, BinaryIO

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


def existing(path: pathlib.Path) -> pathlib.Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(found for found in (path, *path.parents) if found.exists())


def check_writable(folder: pathlib.Path) -> None:
    """Raises InputError unless `folder` can be made or written; found out before hours of work."""
    found = existing(folder)
    if not found.is_dir():
        raise InputError(f"{found}: a file is in the way; choose another folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise InputError(f"{found}: may not be written; choose another folder, or change its owner")


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


# --------------------------------------------------------------------------------------------------
# Reading what others wrote


def open_regular(path: pathlib.Path, max_bytes: int | None = None) -> BinaryIO:
    """Open a file for reading: not a folder, pipe or device, which may never end.

    Raises:
        OSError: naming the file, also where it is larger than `max_bytes`.
    """
    if not is_local(path):
        size = path.stat().st_size
        file = path.open("rb")
    else:
        # A pipe without a writer would block until somebody opens it.
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
    """The content of a regular file of at most `max_bytes`; OSError as in `open_regular`."""
    with open_regular(path, max_bytes) as file:
        return file.read(max_bytes)


def sha256(path: pathlib.Path, progress: Callable[[int], Any] = lambda count: None) -> str:
    """SHA-256 of a regular file in hexadecimal; `progress` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def composed(name: str) -> str:
    """`name` with composed letters: macOS writes é as e and an accent, others as one character."""
    return unicodedata.normalize("NFC", name)


def named(folder: pathlib.Path, name: str) -> pathlib.Path:
    """`folder / name`; a part that is not there is spelled as what is there and equal once `composed`."""
    path = folder
    for part in pathlib.PurePath(name).parts:
        if not (path / part).exists() and not part.isascii() and path.is_dir():
            alike = [other for other in os.listdir(path) if composed(other) == composed(part)]
            part = alike[0] if len(alike) == 1 else part
        path = path / part
    return path


def explain(error: OSError, folder: pathlib.Path | None = None) -> str:
    """One line for a user: the file, what is wrong, and for a full disk what to do.

    Args:
        folder: written to, named where the error names no file.
    """
    if error.errno not in _FULL:
        place = error.filename or folder
        reason = error.strerror or str(error)
        return f"{place}: {reason}" if place and error.strerror else reason
    place = error.filename or folder
    # Worker processes pass arrays through shared memory, whose errors name no file.
    for other in () if error.filename else (pathlib.Path("/dev/shm"), tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            if shutil.disk_usage(other).free < 16 << 20:
                place = f"{other} (temporary memory of this machine)"
    return (
        f"{place or 'disk'}: no space left. What was finished is kept; free some space and give the "
        "same command again"
    )


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# --------------------------------------------------------------------------------------------------
# Writing whole or not at all
#
# What is being written to NAME is .NAME.PID.unfinished, a folder about to be replaced .NAME.replaced,
# the lock of its writer .NAME.lock, all beside it.


@contextlib.contextmanager
def lock(path: pathlib.Path, wait: bool = False, suffix: str = "lock") -> Iterator[None]:
    """Be the only process that writes `path`, a local file or folder (in buckets: one of several).

    The lock belongs to the process: with its death, however it comes, the next one gets it. On file
    systems that know no locks there is none.

    Args:
        wait: until the other is done, for what takes a moment.
        suffix: of the lock's name; another one for work that ends with writing `path` under "lock".

    Raises:
        BlockingIOError: another process, or another thread of this one, holds it; names which.
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
        file.close()  # it was the last holder's, who has removed it
    try:
        with contextlib.suppress(OSError):  # the name of the holder is for messages only
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        place.unlink(missing_ok=True)
        file.close()


def recover(path: pathlib.Path) -> None:
    """After a kill: puts back a folder that was about to be replaced, removes what was unfinished.

    Leaves all as it is where another process is writing.
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
    """`content` with its SHA-256 at the end, for files that are made again when damaged."""
    return content + hashlib.sha256(content).digest()


def unseal(content: bytes) -> bytes:
    """The content of what was `seal`ed; ValueError where it is not as it was."""
    content, digest = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("wrong checksum")
    return content


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Write whole or not at all: a kill leaves the old file or the new one.

    Local files are written under a hidden name and renamed; an upload is atomic by itself.
    """
    with begun(path, wait=True) as unfinished, naming(path):
        unfinished.write_bytes(content)
        publish(unfinished, path)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Errors of writing, which name no file of themselves, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def begun(path: pathlib.Path, wait: bool = False) -> Iterator[pathlib.Path]:
    """A local path to write `path` at, removed at the end; `publish` gives it its name.

    It is beside `path`, under a hidden name, or for a bucket in the folder for temporary files.

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
    """Take the room of a local sparse file now: a full disk kills who writes to it through memory.

    Raises:
        OSError: there is not enough.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def publish(unfinished: pathlib.Path, path: pathlib.Path) -> None:
    """Give what was `begun` its name, when it is on the disk."""
    if is_local(path):
        _sync(unfinished)
        os.replace(unfinished, path)
        _sync(path.parent)
    else:
        path.fs.put_file(str(unfinished), path.path)


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A local folder that appears whole, or not at all, in place of an earlier one.

    Yields a hidden sibling to write into; it takes the folder's name unless there was an error. Killed
    between the two renames, the earlier folder is there again after `recover`.

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
    """Make a file, or the renames in a folder, survive a power cut."""
    # Some network file systems cannot for folders, and need not.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def name_inside(name: str) -> str:
    """`name`, if it can be that of a file or folder in a folder of results.

    Raises:
        InputError: it is empty, begins with a dot (as "..", and our temporary names), or leads elsewhere.
    """
    if not name or name.startswith(".") or set(name) & {"/", os.sep, "\0"}:
        raise InputError(f"{name!a} cannot be the name of a folder of results; rename the input")
    return name
