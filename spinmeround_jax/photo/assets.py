"""The model files of the insightface front end, which cannot be shipped: what, whose, from where.

    python -m spinmeround_jax.photo.fetch

gets them. They live in one folder: `--models`, else $SPINMEROUND_MODELS, else
~/.cache/spinmeround_jax/models. Every file is checked against its SHA-256; the values were compared
in several public repositories that pin the same files (docs/photos.md).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Literal

from spinmeround_jax import files
from spinmeround_jax.files import InputError

_INSIGHTFACE = (
    "insightface's pretrained models are for non-commercial research only "
    "(https://github.com/deepinsight/insightface#license)"
)
_FACE_PARSING = (
    "MIT (https://github.com/yakhyo/face-parsing); trained on CelebAMask-HQ, a data set for "
    "non-commercial research"
)
_ARC2FACE = "see https://huggingface.co/FoivosPar/Arc2Face; trained on WebFace42M"

Need = Literal["always", "asked"]


class AssetError(InputError):
    """A model file is missing or not the right one; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """A zip file with several models. size in bytes."""

    name: str
    url: str
    sha256: str
    size: int


@dataclasses.dataclass(frozen=True)
class Asset:
    """One model file.

    sha256: None where no public record of it was found: then the hash of the first download is
    kept beside the file and later ones are held to it. size: bytes, None if unknown. archive: the
    zip it comes in, under any folder. need: "always", or only when "asked" for by name.
    """

    name: str
    purpose: str
    licence: str
    url: str
    sha256: str | None
    size: int | None
    archive: Archive | None = None
    need: Need = "always"


ANTELOPEV2 = Archive(
    "antelopev2.zip",
    "https://github.com/deepinsight/insightface/releases/download/v0.7/antelopev2.zip",
    "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
    360_662_982,
)


def _antelopev2(name: str, purpose: str, sha256: str, size: int | None) -> Asset:
    return Asset(name, purpose, _INSIGHTFACE, ANTELOPEV2.url, sha256, size, ANTELOPEV2)


DETECTOR = _antelopev2(
    "scrfd_10g_bnkps.onnx", "finds faces and five landmarks",
    "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91", 16_923_827,
)  # fmt: skip
LANDMARKS = _antelopev2(
    "1k3d68.onnx", "68 landmarks",
    "df5c06b8a0c12e422b2ed8947b8869faa4105387f199c477af038aa01f9a45cc", 143_607_619,
)  # fmt: skip
RECOGNITION = _antelopev2(
    "glintr100.onnx", "the identity (ArcFace, Glint360K)",
    "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf", 260_665_334,
)  # fmt: skip
PARSING = Asset(
    "face_parsing_resnet34.onnx", "separates the person from the background (BiSeNet)", _FACE_PARSING,
    "https://github.com/yakhyo/face-parsing/releases/download/weights/resnet34.onnx",
    "5b805bba7b5660ab7070b5a381dcf75e5b3e04199f1e9387232a77a00095102e", 93_632_554,
)  # fmt: skip
ARC2FACE = Asset(
    "arcface.onnx", "the identity for Arc2Face's own weights (not the released model)",
    _ARC2FACE,
    "https://huggingface.co/FoivosPar/Arc2Face/resolve/"
    "da2f1e9aa3954dad093213acfc9ae75a68da6ffd/arcface.onnx",
    None, None, need="asked",
)  # fmt: skip

ASSETS = (DETECTOR, LANDMARKS, RECOGNITION, PARSING, ARC2FACE)
FETCH_COMMAND = "python -m spinmeround_jax.photo.fetch"


def models_folder(given: pathlib.Path | None = None) -> pathlib.Path:
    """`given`, else $SPINMEROUND_MODELS, else the user's cache.

    Raises:
        AssetError: there is no home folder.
    """
    if given is not None:
        return given
    if os.environ.get("SPINMEROUND_MODELS"):
        return pathlib.Path(os.environ["SPINMEROUND_MODELS"])
    try:
        return files.user_cache() / "models"
    except RuntimeError as error:  # neither $HOME nor an entry for this user
        raise AssetError(
            "no home folder; say where models are: --models or $SPINMEROUND_MODELS"
        ) from error


def find(asset: Asset, folder: pathlib.Path) -> pathlib.Path | None:
    """The asset's file in `folder`, or where insightface itself keeps it below; None if not there."""
    places = (folder, folder / "antelopev2", folder / "antelopev2" / "antelopev2")
    return next((p / asset.name for p in places if (p / asset.name).is_file()), None)


def require(asset: Asset, folder: pathlib.Path) -> pathlib.Path:
    """As `find`.

    Raises:
        AssetError: not there.
    """
    path = find(asset, folder)
    if path is None:
        raise AssetError(
            f"{folder / asset.name}: missing; it {asset.purpose}. Get it with {FETCH_COMMAND}, or "
            f"copy it there"
        )
    return path


def recorded_hash(asset: Asset, folder: pathlib.Path) -> str | None:
    """The published SHA-256, else the one kept of the first download."""
    record = folder / f"{asset.name}.sha256"
    if asset.sha256 is None and record.is_file():
        return record.read_text().split()[0]
    return asset.sha256


def check_recognition(path: pathlib.Path, allow_other: bool) -> str:
    """The file's SHA-256.

    Raises:
        AssetError: it is not the model that the weights were trained with, and no other is allowed.
    """
    found = files.sha256(path)
    if found != RECOGNITION.sha256 and not allow_other:
        raise AssetError(
            f"{path}: not the recognition model that the weights were trained with "
            f"({RECOGNITION.name} of antelopev2, SHA-256 {RECOGNITION.sha256[:12]}..., this is "
            f"{found[:12]}...). Another model's vectors give another person's face. Get the right "
            f"one with {FETCH_COMMAND}, or add --allow-other-recognition if your weights were trained "
            "with this one"
        )
    return found
