"""Model folders by name: hf://owner/name[@revision] on the Hugging Face Hub, gs://... in a bucket.

A remote folder is copied into a cache once, and looked up once per process, so that config and weights
are of one revision. Only model files are copied; nothing is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import re

import spinmeround_jax
from spinmeround_jax import files
from spinmeround_jax.files import InputError

SUMS = "SHA256SUMS"
MAX_SUMS_BYTES = 16 << 20
HUB = "hf://"

Path = str | os.PathLike[str]

_HUB_NAME = re.compile(
    r"hf://(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?",
    re.ASCII,
)


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder on this machine.

    Attributes:
        name: short, for tables and lists.
        origin: for records: the path as given, or hf://owner/name@commit.
    """

    path: pathlib.Path
    name: str
    origin: str


def is_remote(folder: Path) -> bool:
    return isinstance(folder, str) and "://" in folder


def locate(folder: Path) -> ModelFolder:
    """The model folder that a path or a name stands for, copied here first if it is remote.

    Raises:
        InputError: a malformed name, or it cannot be copied; says what to do.
    """
    if not is_remote(folder):
        path = pathlib.Path(folder)
        return ModelFolder(path, path.resolve().name, str(path))
    return _from_hub(folder) if folder.startswith(HUB) else _from_bucket(folder.rstrip("/"))


def parse_sums(content: bytes, path: pathlib.Path) -> dict[str, str]:
    """SHA-256 by name of file, from the content of `SUMS`; InputError if it is malformed."""
    sums = {}
    for line in content.decode(errors="replace").splitlines():
        if not (match := re.fullmatch("([0-9a-f]{64})  ([^/].*)", line)) or ".." in line:
            raise InputError(f"{path}: damaged; restore it from a copy ({line[:80]!a})")
        sums[match[2]] = match[1]
    return sums


# --------------------------------------------------------------------------------------------------
# Hugging Face Hub


@functools.cache
def _from_hub(name: str) -> ModelFolder:
    match = _HUB_NAME.fullmatch(name)
    if not match or ".." in name:
        raise InputError(f"{name!a}: expected hf://owner/name or hf://owner/name@revision")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise InputError(
            f"{name}: needs huggingface_hub; pip install 'spinmeround_jax[hub]', or download the "
            "repository and give its folder"
        ) from error
    repository, revision = match["repository"], match["revision"]
    # The messages of the client are not repeated: they hold addresses, which may hold passwords.
    try:
        path = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["model.json", SUMS, "weights/*"],
            library_name="spinmeround_jax",
            library_version=spinmeround_jax.__version__,
        )
    except errors.GatedRepoError:
        problem = "its owner asks for an agreement; accept it on its page, then run: hf auth login"
    except errors.RepositoryNotFoundError:
        problem = "no such repository, or a private one (then run: hf auth login)"
    except errors.RevisionNotFoundError:
        problem = f"has no revision {revision!a}"
    except errors.LocalEntryNotFoundError:
        problem = (
            "the hub cannot be reached or has a fault, and this revision is not complete in the cache "
            "($HF_HOME); connect and repeat the command, or give a local folder"
        )
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        problem = f"the hub answered {status}; try again later, or give a local folder"
    except OSError as error:
        if error.errno is None:  # of the client
            problem = f"cannot be downloaded ({type(error).__name__}); try again"
        else:
            problem = files.explain(error)
    except Exception as error:  # the client of HTTP has its own
        problem = f"cannot be downloaded ({type(error).__name__}); try again"
    else:
        return _checked(name, repository, pathlib.Path(path))
    raise InputError(f"{name}: {problem}")


def _checked(name: str, repository: str, path: pathlib.Path) -> ModelFolder:
    if not re.fullmatch("[0-9a-f]{40}", path.name):
        raise InputError(f"{name}: the hub names no commit")
    if not (path / "model.json").is_file():
        raise InputError(
            f"{name}: has no model.json; name a repository that holds a folder written by training "
            "(<workdir>/model) or by spinmeround_jax.convert"
        )
    return ModelFolder(path, repository.partition("/")[2], f"{HUB}{repository}@{path.name}")


# --------------------------------------------------------------------------------------------------
# Buckets


@functools.cache
def _from_bucket(url: str) -> ModelFolder:
    remote = files.as_path(url)
    try:
        sums = files.read_bytes(remote / SUMS, MAX_SUMS_BYTES)
        wanted = parse_sums(sums, remote / SUMS)
        # By content: a folder that is written again gets another name.
        here = files.user_cache() / "weights" / hashlib.sha256(sums).hexdigest()
        here.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(here, wait=True, suffix="download"):
            if not here.is_dir():
                with files.new_folder(here) as folder:
                    _copy(remote, wanted, folder)
                    (folder / SUMS).write_bytes(sums)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"{url}: {error.filename or error} is missing; give the URL of a model folder, with its {SUMS}"
        ) from error
    except Exception as error:  # clients of object stores have their own
        raise InputError(f"{url}: cannot be copied to this machine ({error!r})") from error
    return ModelFolder(here, url.rpartition("/")[2], url)


def _copy(remote: pathlib.Path, wanted: dict[str, str], folder: pathlib.Path) -> None:
    for name, digest in wanted.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        remote.fs.get_file((remote / name).path, str(path))
        if files.sha256(path) != digest:
            raise InputError(f"{remote / name}: damaged, its SHA-256 is not that in {SUMS}")
