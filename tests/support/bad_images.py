"""Image files that cannot be read, and why."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(kind="PNG", mode="RGB", size=(200, 100)):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def bomb():
    """A PNG that says it has 100 million pixels, in 70 bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64)


BAD_FILES = {
    "empty.jpg": (b"", "an empty file"),
    "text.jpg": (b"hello", "not a readable image"),
    "cut.png": (encoded()[:9000], "cut short"),
    "cut.jpg": (encoded("JPEG")[:9000], "cut short"),
    "cut.webp": (encoded("WEBP")[:3000], "not a readable image"),
    "cut.tif": (encoded("TIFF")[:900], "not a readable image"),
    "header.png": (encoded()[:20], "not a readable image"),
    "huge.png": (bomb(), "more than 64 million pixels"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable image"),
    "noise.png": (np.random.default_rng(1).bytes(4000), "not a readable image"),
}
