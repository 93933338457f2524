"""Prepare a photo: `prepare(path, options, models)` gives the portrait and its identity.

read -> faces and landmarks -> pose -> crop -> background -> identity: the input of the paper's first step of
sampling. The identity is that of the aligned crop on white, as in the released
code and as for rendered heads.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import numpy as np

import spinmeround_jax
from spinmeround_jax import files, schema
from spinmeround_jax.files import InputError
from spinmeround_jax.photo import align, assets, face_resnet, images, mediapipe
from spinmeround_jax.photo.align import Alignment
from spinmeround_jax.photo.assets import AssetError
from spinmeround_jax.photo.background import Parser, Remover, connected, foreground, refined
from spinmeround_jax.photo.faces import Face, FaceFinder, Recogniser
from spinmeround_jax.photo.images import Picture
from spinmeround_jax.photo.landmarks import FaceError, five_of
from spinmeround_jax.photo.pose import Correction

GENERATOR = "spinmeround_jax.photo"
Background = Literal["auto", "rembg", "keep"]
FrontEnd = Literal["mediapipe", "insightface"]

_SMALLEST_SIDE = 32  # pixels; nothing that a detector could see


class NoFace(InputError):
    """No face was found in the photo."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to prepare a photo.

    face: which, if there are several, 1 being the largest. framing: of pose.FRAMINGS. background:
    "auto" uses the photo's own alpha, else the front end's segmentation; "rembg" another remover; "keep"
    keeps it. identity: whether to make one.
    """

    face: int = 1
    framing: str = "canonical"
    background: Background = "auto"
    identity: bool = True


class Models:
    """The models, each loaded when first used.

    front_end: "mediapipe" comes with the package; "insightface" is for weights trained with ArcFace, and only
    it looks at the rest: folder, see `assets.models_folder`; recognition, another file than the folder's
    glintr100.onnx.
    """

    def __init__(
        self,
        folder: pathlib.Path | None = None,
        recognition: pathlib.Path | None = None,
        allow_other_recognition: bool = False,
        front_end: FrontEnd = "mediapipe",
    ):
        self.front_end = front_end
        self._folder = folder
        self._recognition = recognition
        self._allow_other = allow_other_recognition

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        return assets.models_folder(self._folder)

    @functools.cached_property
    def finder(self) -> FaceFinder | mediapipe.FaceFinder:
        return mediapipe.FaceFinder() if self.front_end == "mediapipe" else FaceFinder(self.folder)

    @functools.cached_property
    def recogniser(self) -> Recogniser:
        path = self._recognition or assets.require(assets.RECOGNITION, self.folder)
        if not path.is_file():
            raise AssetError(f"{path}: no such recognition model; check the path")
        return Recogniser(path, self._allow_other)

    @property
    def has_recognition(self) -> bool:
        """Whether there is a recognition model to load (which may still turn out wrong)."""
        if self.front_end == "mediapipe":
            return True
        return bool(self._recognition) or bool(assets.find(assets.RECOGNITION, self.folder))

    def identify(self, image: np.ndarray, face: Face) -> np.ndarray:
        """(512,) unit float32 of a face that `finder` found in an (h, w, 3) uint8 RGB image.

        Raises:
            FaceError: the model gave no identity.
        """
        if self.front_end == "mediapipe":
            return face_resnet.embed(image, face.landmarks)
        # Landmarks count from pixel corners, ArcFace from pixel centres.
        return self.recogniser.embed(image, face.landmarks5 - 0.5)

    @property
    def recognition(self) -> dict[str, str]:
        """Name and SHA-256 of the recogniser."""
        if self.front_end == "mediapipe":
            return {"name": face_resnet.NAME, "sha256": face_resnet.sha256()}
        return {"name": "ArcFace", "sha256": self.recogniser.sha256}

    def check(self) -> None:
        """Load the models that find and recognise faces.

        Raises:
            AssetError: something is missing, or the wrong one.
        """
        _ = self.finder, self.recognition

    @functools.cached_property
    def parser(self) -> Parser | mediapipe.Segmenter:
        return mediapipe.Segmenter() if self.front_end == "mediapipe" else Parser(self.folder)

    @functools.cached_property
    def remover(self) -> Remover:
        return Remover()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A portrait ready for `sample`, and how it was made.

    image: (512, 512, 3) uint8 on white. id_embedding: (512,) unit float32, or None with the reason
    in no_identity. crop: (512, 512, 4) float32 in [0, 1] before the background was removed. mask:
    (512, 512) float32, 1 = person. faces: all that were found, the largest first (none with
    landmarks by hand). background: where the mask comes from.
    """

    name: str
    path: pathlib.Path
    picture: Picture
    image: np.ndarray
    id_embedding: np.ndarray | None
    no_identity: str | None
    alignment: Alignment
    crop: np.ndarray
    mask: np.ndarray
    background: str
    faces: tuple[Face, ...]
    chosen: Face | None
    notes: tuple[str, ...]
    recognition: dict[str, str] | None
    front_end: FrontEnd

    @property
    def yaw_pitch(self) -> tuple[float, float]:
        """From where the photo was taken, degrees, as in `cameras.orbit`."""
        return self.alignment.head.yaw, self.alignment.head.pitch

    def record(self) -> dict[str, Any]:
        """The portrait's JSON: what `portraits.read_identity` reads, and provenance."""
        head = self.alignment.head
        height, width = self.picture.pixels.shape[:2]
        identity: dict[str, Any] = {"no_identity": self.no_identity}
        if self.id_embedding is not None:
            identity = {"id_embedding": [round(float(x), 7) for x in self.id_embedding]}
        return {
            "generator": GENERATOR,
            "version": spinmeround_jax.__version__,
            **identity,
            "recognition": self.recognition,
            "source": {
                "file": self.path.name,
                "sha256": files.sha256(self.path),
                "size": [width, height],
            },
            "pose": {"yaw": round(head.yaw, 2), "pitch": round(head.pitch, 2)},
            "alignment": {
                "framing": self.alignment.framing,
                "centre": [round(float(x), 2) for x in head.square.centre],
                "side": round(head.square.side, 2),
                "roll": round(head.square.roll, 2),
                "error": round(head.error, 4),
                "head_pixels": round(self.alignment.head_pixels, 1),
                "padded": round(self.alignment.padded, 4),
                "landmarks_from": "hand" if self.chosen is None else self.front_end,
                "landmarks": np.round(self.alignment.landmarks, 2).tolist(),
            },
            "background": self.background,
            "notes": list(self.notes),
        }


def is_ours(record: pathlib.Path) -> bool:
    """Whether this JSON file is a `Prepared.record`."""
    try:
        schema.read(record, schema.record({"generator": schema.one_of(GENERATOR)}))
    except (OSError, ValueError):  # no JSON, or none of ours
        return False
    return True


def prepare(
    path: pathlib.Path,
    options: Options,
    models: Models,
    landmarks: np.ndarray | None = None,
    correction: Correction | None = None,
) -> Prepared:
    """Turn a photo into a portrait.

    Args:
        landmarks: (5 or 68, 2) pixels of the photo as it is shown (EXIF orientation applied), to
            use instead of detection; then an identity is made only if the recognition model is
            there.
        correction: by hand, of the square that is cropped.

    Raises:
        InputError: this photo cannot be used.
        AssetError: a model is missing or the wrong one.
    """
    picture = images.read(path)
    try:
        return _prepare(path, picture, options, models, landmarks, correction)
    except FaceError as error:
        kind = NoFace if isinstance(error, _Nobody) else InputError
        raise kind(f"{path}: {error}") from error


def _prepare(
    path: pathlib.Path,
    picture: Picture,
    options: Options,
    models: Models,
    landmarks: np.ndarray | None,
    correction: Correction | None,
) -> Prepared:
    height, width = picture.pixels.shape[:2]
    if min(height, width) < _SMALLEST_SIDE:
        raise FaceError(f"{width} x {height} pixels are too few; take a larger photo")
    notes, faces, chosen = list(picture.notes), [], None
    if landmarks is None:
        faces = models.finder.find(_on_white(picture.pixels))
        chosen = _choose(faces, options.face)
        landmarks = chosen.landmarks
        if len(faces) > 1 and options.face == 1:
            notes.append(f"{len(faces)} faces; the largest is used (--face 2 is the next)")
    alignment = align.align(landmarks, (width, height), options.framing, correction)
    notes += alignment.notes
    crop = align.crop(picture.pixels, alignment.head.square)
    mask, background = _mask(crop, picture, alignment, options.background, models)
    colour = (
        foreground(crop[..., :3], mask) if background == mediapipe.Segmenter.name else crop[..., :3]
    )
    image = _on_white(_bytes(np.concatenate([colour, mask[..., None]], axis=-1)))
    id_embedding, no_identity = None, None
    try:
        id_embedding = _identity(image, alignment, options, models, chosen)
    except _NoIdentity as reason:
        no_identity = str(reason)
        notes.append(f"no identity: {no_identity}")
    return Prepared(
        name=path.stem,
        path=path,
        picture=picture,
        image=image,
        id_embedding=id_embedding,
        no_identity=no_identity,
        alignment=alignment,
        crop=crop,
        mask=mask,
        background=background,
        faces=tuple(faces),
        chosen=chosen,
        notes=tuple(notes),
        recognition=None if id_embedding is None else models.recognition,
        front_end=models.front_end,
    )


class _Nobody(FaceError):
    """No face in the photo."""


class _NoIdentity(Exception):
    """The reason why a portrait has no identity."""


def _identity(
    image: np.ndarray, alignment: Alignment, options: Options, models: Models, chosen: Face | None
) -> np.ndarray:
    """(512,) unit float32 of the portrait on white."""
    if not options.identity:
        raise _NoIdentity("none was asked for")
    if models.front_end == "mediapipe":
        # Looked for again, as in rendered heads: the vector is to depend on the portrait alone.
        faces = models.finder.find(image)
        if not faces:
            raise _NoIdentity("no face is seen in the aligned portrait")
        return models.identify(image, faces[0])
    if chosen is None and not models.has_recognition:
        raise _NoIdentity(
            f"landmarks were given by hand and no recognition model is there; get it with "
            f"{assets.FETCH_COMMAND}"
        )
    five = chosen.landmarks5 if chosen is not None else five_of(alignment.landmarks)
    at = alignment.head.square.from_photo(five) * align.SIZE
    # Between pixel centres: recognition counts pixels from their centres.
    return models.recogniser.embed(image, at - 0.5)


def _choose(faces: list[Face], number: int) -> Face:
    if not faces:
        raise _Nobody(
            "no face found; take a photo in which the face is larger, upright and lit, or give "
            "landmarks with --landmarks"
        )
    if number > len(faces):
        raise FaceError(f"--face {number}: only {len(faces)} found")
    return faces[number - 1]


def _mask(
    crop: np.ndarray, picture: Picture, alignment: Alignment, background: Background, models: Models
) -> tuple[np.ndarray, str]:
    """(512, 512) float32, 1 = person, and what it comes from."""
    alpha = crop[..., 3]
    if background == "keep":
        return alpha, "kept"
    if background == "auto" and picture.has_alpha:
        return alpha, "the photo's own transparency"
    remover = models.parser if background == "auto" else models.remover
    seen = _on_white(_bytes(crop))
    person = remover.person(seen)
    if isinstance(remover, mediapipe.Segmenter):
        person = refined(person, seen)
    size = person.shape[0]
    points = alignment.head.square.from_photo(alignment.landmarks) * size
    rows, columns = np.clip(points[:, ::-1].astype(int), 0, size - 1).T
    seed = np.zeros(person.shape, bool)
    seed[rows, columns] = True
    mask = connected(person, seed)
    if (mask[rows, columns] > 0.5).mean() < 0.5 or (mask > 0.5).mean() < 0.03:
        raise FaceError(
            f"{remover.name} does not see the person; use --background rembg or --keep-background, "
            "or cut the background out (transparent PNG)"
        )
    return mask * alpha, remover.name


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 4) uint8 with straight alpha -> (h, w, 3) uint8."""
    if pixels[..., 3].min() == 255:
        return np.ascontiguousarray(pixels[..., :3])
    alpha = pixels[..., 3:].astype(np.float32) / 255.0
    return np.rint(pixels[..., :3] * alpha + 255.0 * (1.0 - alpha)).astype(np.uint8)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(255.0 * values).astype(np.uint8)
