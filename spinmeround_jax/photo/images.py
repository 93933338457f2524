"""Reading any image file: pixels in sRGB, upright or as stored, or one `InputError`.

Files are hostile until decoded: the header is checked before any pixel is, only formats whose
decoders are libraries are tried (no PostScript), and an image larger than MAX_PIXELS is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from spinmeround_jax.files import InputError

MAX_PIXELS = 64_000_000  # 256 MB once decoded; today's telephones make 12 to 50 million
# A PNG's text or profile may be as large as all of them together; the limit of one is 1 MB else (Pillow#8363).
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# What a folder is searched for.
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".avif",
    ".heic", ".heif",
)  # fmt: skip
_FORMATS = (
    "PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "HEIF", "PPM", "TGA",
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_MEGA = 1_000_000

ORIENTATION = 274  # EXIF's tag: how stored pixels are turned to be upright
# EXIF orientation -> (2, 2) matrix from upright to stored directions, x right and y down.
TO_STORED = {
    1: ((1, 0), (0, 1)), 2: ((-1, 0), (0, 1)), 3: ((-1, 0), (0, -1)), 4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)), 6: ((0, 1), (-1, 0)), 7: ((0, -1), (-1, 0)), 8: ((0, -1), (1, 0)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Picture:
    """pixels: (h, w, 4) uint8 sRGB with straight alpha. notes: what was lost or changed, if any."""

    pixels: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def has_alpha(self) -> bool:
        """Whether a part worth mentioning (0.5 %) is transparent."""
        return float((self.pixels[..., 3] < 128).mean()) > 0.005


@dataclasses.dataclass(frozen=True)
class Header:
    """size: width and height of the stored pixels. orientation: EXIF's, a key of TO_STORED."""

    size: tuple[int, int]
    orientation: int

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height once the orientation is applied."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def read(path: pathlib.Path, upright: bool = True) -> Picture:
    """The image in a file; of an animation the first frame.

    Greyscale, palette, CMYK and 16-bit images become 8-bit RGBA; colour profiles are applied.

    Args:
        upright: turn the pixels as the EXIF data says. Calibrated cameras describe the stored pixels.

    Raises:
        InputError: no such file, empty, not an image, cut short, too large, HEIC without its
            reader, or a kind of pixels that has no colours.
    """
    with _opened(path) as image:
        return _decode(path, image, upright)


def read_header(path: pathlib.Path) -> Header:
    """Size and orientation, without decoding pixels.

    Raises:
        InputError: no such file, empty, not an image, too large, or HEIC without its reader.
    """
    with _opened(path) as image:
        return Header(image.size, _orientation(image))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of an image that is not decoded yet, a key of TO_STORED.

    A PNG may hold EXIF data behind its pixels, which Pillow would decode to get there: it is left out.
    """
    known = image.format != "PNG" or "exif" in image.info
    orientation = image.getexif().get(ORIENTATION, 1) if known else 1
    return orientation if orientation in TO_STORED else 1


def to_stored(points: np.ndarray, header: Header) -> np.ndarray:
    """(n, 2) positions in the upright image -> positions in the stored pixels."""
    turn = np.array(TO_STORED[header.orientation], np.float64)
    middle = np.array(header.upright_size) / 2.0
    return (points - middle) @ turn.T + np.array(header.size) / 2.0


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Image.Image]:
    """The file's image, not decoded yet; whatever goes wrong with it becomes an InputError."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder, not an image")
        if not path.is_file():
            reason = "not a regular file" if path.exists() else "no such file; check the path"
            if path.is_symlink():
                reason = f"a link to {os.readlink(path)}, where there is no file; fix the link"
            raise InputError(f"{path}: {reason}")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: an empty file; copy or download it again")
        _register_heif(path)
        with warnings.catch_warnings():
            # MAX_PIXELS is our limit; files with odd metadata are read without comment.
            warnings.simplefilter("ignore")
            Image.init()  # all decoders of this Pillow, and those registered with it
            known = [kind for kind in _FORMATS if kind in Image.OPEN]
            with Image.open(path, formats=known) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(f"{path}: {width} x {height} pixels; {_too_large()}")
                yield image
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: not a readable image (of {', '.join(_FORMATS)}); save it again as PNG or JPEG"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {_too_large()}") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        if "MAX_TEXT" in reason:
            raise InputError(
                f"{path}: more than {PngImagePlugin.MAX_TEXT_MEMORY >> 20} MiB of text or colour profile "
                "beside the pixels; save it again without metadata"
            ) from error
        raise InputError(
            f"{path}: not a readable image, perhaps cut short; copy it again ({reason})"
        ) from error


def is_picture_name(path: pathlib.Path) -> bool:
    """Whether a file found in a folder looks like an image by its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _decode(path: pathlib.Path, image: Image.Image, upright: bool) -> Picture:
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG with a depth map or a second lens
        notes.append(f"{frames} frames or pages; only the first is used")
    turns = upright and _orientation(image) != 1
    image.load()
    turned = ImageOps.exif_transpose(image) if turns else image
    profile = image.info.get("icc_profile")
    if turned.mode.startswith(("I", "F")):
        turned = _eight_bits(path, turned)
    if profile:
        turned, note = _to_srgb(turned, profile)
        notes += [note] if note else []
    return Picture(np.asarray(turned.convert("RGBA")), tuple(notes))


def _eight_bits(path: pathlib.Path, image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits, integer 0 to 65535 or floating-point 0 to 1, in 8 bits."""
    values = np.asarray(image).astype(np.float32)
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise InputError(
            f"{path}: pixel values outside 0 to {top:g} have no colour; save it with 8 bits a channel"
        )
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str | None]:
    """Applies a colour profile (Display P3 of telephones, the press's CMYK, a scanner's grey)."""
    alpha = None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if image.mode not in (
            "RGB",
            "RGBA",
            "CMYK",
        ):  # grey or a palette, perhaps with transparency
            grey = image.mode in ("1", "L", "LA")
            image = image.convert("RGBA")
            alpha = image.getchannel("A")
            image = image.convert("L" if grey and space == "GRAY" else "RGB")
        wanted = "RGBA" if image.mode == "RGBA" else "RGB"
        applied = ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode=wanted
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        applied, note = image, "its colour profile cannot be read; taken for sRGB"
    else:
        note = None
    if alpha is not None:
        applied.putalpha(alpha)
    return applied, note


def _register_heif(path: pathlib.Path) -> None:
    """Makes Pillow read HEIC with pillow-heif, where it is installed."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIF_BRANDS:
        return
    try:
        import pillow_heif
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path}: a HEIC image; pip install pillow-heif, or save it as JPEG"
        ) from error
    pillow_heif.register_heif_opener()


def _too_large() -> str:
    return f"more than {MAX_PIXELS // _MEGA} million pixels; make it smaller"


def encoded(image: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    """The bytes of an image file, such as "PNG"; `image` may be an array of uint8, `options` are Pillow's."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, form, **options)
    return buffer.getvalue()


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[-1, 1] -> uint8; 0 becomes 128, and so does what is not a number."""
    return np.rint((np.clip(np.nan_to_num(image), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
