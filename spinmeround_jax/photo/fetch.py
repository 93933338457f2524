"""Get the model files of the photo front end: `python -m spinmeround_jax.photo.fetch --help`."""

from __future__ import annotations

import argparse
import http.client
import os
import pathlib
import shutil
import sys
import urllib.request
import zipfile
from collections.abc import Sequence

from tqdm import tqdm

from spinmeround_jax import cli, files
from spinmeround_jax.photo import assets
from spinmeround_jax.photo.assets import Archive, Asset, AssetError

EPILOG = """examples:
  python -m spinmeround_jax.photo.fetch                       # what preparing photos needs
  python -m spinmeround_jax.photo.fetch --list                # what that is, licences, sizes
  python -m spinmeround_jax.photo.fetch --from antelopev2.zip resnet34.onnx    # without a network
  python -m spinmeround_jax.photo.fetch --also arcface.onnx   # for weights trained from Arc2Face

An interrupted download resumes. A file with a wrong SHA-256 is deleted."""

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_LARGEST = 2 << 30  # bytes of a file of unknown size


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser(
        "spinmeround_jax.photo.fetch",
        "Get the model files that preparing photos needs, and say whose they are.",
        EPILOG,
    )
    optional = [asset.name for asset in assets.ASSETS if asset.need == "asked"]
    parser.add_argument(
        "--models", type=pathlib.Path, help="folder ($SPINMEROUND_MODELS, or in your cache)"
    )
    parser.add_argument("--list", action="store_true", help="only say what is needed and there")
    parser.add_argument("--also", nargs="+", choices=optional, default=[], help="further models")
    parser.add_argument(
        "--from", dest="sources", type=pathlib.Path, nargs="+", default=[], metavar="FILE",
        help="files you have: the zip, or models; each is known by its content",
    )  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code."""
    folder = assets.models_folder(args.models)
    wanted = [a for a in assets.ASSETS if a.need == "always" or a.name in args.also]
    if args.list:
        print(f"folder: {folder}\n")
        print("\n\n".join(describe(asset, folder) for asset in assets.ASSETS))
        return 0
    failed = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in args.sources:
            take(source, folder)
        for asset in wanted:
            if assets.find(asset, folder) is None:
                print(describe(asset, folder), file=sys.stderr)
                fetch(asset, folder)
    except (AssetError, OSError) as error:
        print(f"error: {cli.message(error)}", file=sys.stderr)
        failed = 1
    for asset in wanted:
        failed |= not report(asset, folder)
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(build_parser().parse_args, run, argv)


def describe(asset: Asset, folder: pathlib.Path) -> str:
    size = "size unknown" if asset.size is None else f"{asset.size / 1e6:.0f} MB"
    if asset.archive:
        size += f", in {asset.archive.name} of {asset.archive.size / 1e6:.0f} MB"
    hash_ = asset.sha256 or "no published one known; that of the first download is kept"
    there = assets.find(asset, folder)
    return (
        f"{asset.name}: {asset.purpose} ({size}, {'there' if there else 'missing'})\n"
        f"  from: {asset.url}\n  SHA-256: {hash_}\n  licence: {asset.licence}"
    )


def report(asset: Asset, folder: pathlib.Path) -> bool:
    """Prints whether a wanted file is there and right; returns it."""
    path = assets.find(asset, folder)
    if path is None:
        print(f"missing  {asset.name}")
        return False
    expected = assets.recorded_hash(asset, folder)
    right = expected in (None, files.sha256(path))
    print(f"{'ok     ' if right else 'WRONG  '}  {path}")
    if not right:
        print(f"         its SHA-256 is not {expected}; delete it and fetch it again")
    return right


def fetch(asset: Asset, folder: pathlib.Path) -> None:
    """Downloads one asset, or the archive it is in with all others of that archive.

    Raises:
        AssetError: the download fails, or is not the right file.
    """
    if asset.archive is None:
        partial = folder / f"{asset.name}.part"
        download(asset.url, partial, asset.size)
        _install(partial, asset, folder)
        return
    partial = folder / f"{asset.archive.name}.part"
    download(asset.url, partial, asset.archive.size)
    _check(partial, asset.archive.sha256, asset.archive.url)
    extract(partial, asset.archive, folder)
    partial.unlink()


def take(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies a local file that is one of the assets, or takes the assets out of a local archive.

    Raises:
        AssetError: no such file, or none of ours by its SHA-256.
    """
    if not source.is_file():
        raise AssetError(f"{source}: no such file; check the path")
    found = files.sha256(source)
    archives = {asset.archive for asset in assets.ASSETS if asset.archive}
    for archive in archives:
        if found == archive.sha256:
            extract(source, archive, folder)
            return
    for asset in assets.ASSETS:
        if found == asset.sha256 or (asset.sha256 is None and source.name == asset.name):
            partial = folder / f"{asset.name}.part"
            shutil.copyfile(source, partial)
            _install(partial, asset, folder)
            return
    raise AssetError(
        f"{source}: its SHA-256 {found} is none of the files needed; see --list, download it again"
    )


def download(url: str, partial: pathlib.Path, size: int | None) -> None:
    """Download to `partial`, resuming from what is there; never more than `size` bytes.

    Raises:
        AssetError: the server cannot be reached, refuses, or stops early.
        BlockingIOError: another process downloads the same file.
    """
    with files.lock(partial):
        have = partial.stat().st_size if size is not None and partial.is_file() else 0
        if size is not None and have >= size:
            return  # whole, or another file: its hash will tell
        headers = {"User-Agent": "spinmeround_jax", "Range": f"bytes={have}-"}
        request = urllib.request.Request(url, headers=headers)
        left = (_LARGEST if size is None else size) - have
        try:
            with (
                urllib.request.urlopen(request, timeout=_TIMEOUT) as response,
                partial.open("ab") as file,
                tqdm(total=size, unit="B", unit_scale=True, desc=partial.stem) as bar,
            ):
                if response.status != 206:  # the server starts from the beginning
                    left, have = left + have, 0
                file.truncate(have)
                bar.update(have)
                while chunk := response.read(_CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise AssetError(
                            f"{url}: sends more than the file has; get it elsewhere (--from)"
                        )
                    file.write(chunk)
                    bar.update(len(chunk))
        except (OSError, http.client.HTTPException) as error:
            raise AssetError(
                f"{url}: cannot be downloaded ({error}); try again, or get it elsewhere and give it "
                "with --from"
            ) from error
        got = partial.stat().st_size
        if size is not None and got < size:
            raise AssetError(
                f"{url}: stopped after {got} of {size} bytes; run this again to resume"
            )


def extract(path: pathlib.Path, archive: Archive, folder: pathlib.Path) -> None:
    """Takes our assets out of a zip file; where it would put them is ignored.

    Raises:
        AssetError: not a zip file, a model is not in it, or not the right one.
    """
    wanted = [asset for asset in assets.ASSETS if asset.archive == archive]
    try:
        with zipfile.ZipFile(path) as zipped:
            members = {pathlib.PurePosixPath(m.filename).name: m for m in zipped.infolist()}
            for asset in wanted:
                if asset.name not in members:
                    raise AssetError(f"{path}: no {asset.name} in it; download it again")
                partial = folder / f"{asset.name}.part"
                if asset.size not in (None, members[asset.name].file_size):
                    raise AssetError(
                        f"{path}: its {asset.name} has a wrong size; download it again"
                    )
                with zipped.open(members[asset.name]) as inside, partial.open("wb") as file:
                    shutil.copyfileobj(inside, file)
                _install(partial, asset, folder)
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise AssetError(f"{path}: a broken zip file; download it again ({error})") from error


def _install(partial: pathlib.Path, asset: Asset, folder: pathlib.Path) -> None:
    expected = assets.recorded_hash(asset, folder)
    if expected is None:
        record = folder / f"{asset.name}.sha256"
        record.write_text(f"{files.sha256(partial)}  {asset.name}\n")
        print(
            f"{asset.name}: no published SHA-256 is known; {record} now holds this one's, and "
            "later downloads must match it",
            file=sys.stderr,
        )
    else:
        _check(partial, expected, asset.url)
    os.replace(partial, folder / asset.name)


def _check(path: pathlib.Path, expected: str, url: str) -> None:
    found = files.sha256(path)
    if found != expected:
        path.unlink()
        raise AssetError(
            f"{url}: what came has SHA-256 {found}, not {expected}; deleted. Try again; if it stays "
            "so, the file was changed there: do not use it"
        )


if __name__ == "__main__":
    cli.end(main())
