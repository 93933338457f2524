"""Reading pictures: every kind that people send, and every kind of trouble."""

import importlib.util
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from spinmeround_jax.files import InputError
from spinmeround_jax.photo import images
from tests.support.bad_images import BAD_FILES, HEIC

RED, BLUE = (200, 30, 40), (20, 60, 210)


def halves(mode="RGB", size=(40, 24)):
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image.quantize(16) if mode == "P" else image.convert(mode)


def corners(path):
    pixels = images.read(path).pixels
    return pixels.shape, pixels[0, 0], pixels[-1, -1]


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.png", "RGB", {}),
        ("a.png", "RGBA", {}),
        ("a.png", "P", {}),
        ("a.jpg", "RGB", {"quality": 95, "subsampling": 0}),
        ("a.jpg", "CMYK", {"quality": 95}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.tif", "RGB", {}),
        ("a.bmp", "RGB", {}),
        ("a.gif", "P", {}),
    ],
)
def test_kinds_of_pictures(tmp_path, name, mode, options):
    halves(mode).save(tmp_path / name, **options)
    shape, left, right = corners(tmp_path / name)
    assert shape == (24, 40, 4)
    assert np.abs(left - np.array([*RED, 255.0])).max() < 12
    assert np.abs(right - np.array([*BLUE, 255.0])).max() < 12


def test_grey_and_sixteen_bits_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 40).astype(np.uint16)[None].repeat(24, 0)
    expected = np.rint(ramp[0] / 257.0)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "grey32.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.rint(ramp / 257).astype(np.uint8)).save(tmp_path / "grey.png")
    (tmp_path / "rgb16.png").write_bytes(png_of_16_bits(np.stack([ramp] * 3, axis=-1)))
    for path in sorted(tmp_path.iterdir()):
        pixels = images.read(path).pixels
        assert np.abs(pixels[0, :, 0] - expected).max() <= 1, path.name
        assert (pixels[..., 0] == pixels[..., 2]).all()


def png_of_16_bits(values):
    """Pillow cannot write such files, cameras can."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("orientation", "shape"), [(3, (24, 40)), (6, (40, 24)), (8, (40, 24))])
def test_exif_orientation(tmp_path, orientation, shape):
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves().save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    pixels = images.read(tmp_path / "a.jpg").pixels
    assert pixels.shape[:2] == shape
    # Turned by 180 and by 270 degrees clockwise, what was on the left ends up right and below.
    red_first = orientation == 6
    assert (pixels[0, 0, 0] > 128) == red_first
    assert (pixels[-1, -1, 0] > 128) != red_first


def test_transparency(tmp_path):
    image = halves("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.save(tmp_path / "a.png")
    halves().save(tmp_path / "b.png")
    assert images.read(tmp_path / "a.png").has_alpha
    assert not images.read(tmp_path / "b.png").has_alpha


def test_of_an_animation_the_first_frame(tmp_path):
    frames = [halves(), Image.new("RGB", (40, 24), (0, 255, 0))]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        picture = images.read(tmp_path / name)
        assert "2 frames" in picture.notes[0], name
        assert picture.pixels[0, 0, 0] > 150
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert images.read(tmp_path / "a.jpg").notes == ()


def test_colour_profiles(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    halves().save(tmp_path / "broken.png", icc_profile=b"no profile")
    picture = images.read(tmp_path / "broken.png")
    assert "profile" in picture.notes[0]
    assert tuple(picture.pixels[0, 0, :3]) == RED
    halves().save(tmp_path / "other.png", icc_profile=profile)  # not one for RGB
    assert "profile" in images.read(tmp_path / "other.png").notes[0]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    halves().save(tmp_path / "srgb.png", icc_profile=srgb)
    picture = images.read(tmp_path / "srgb.png")
    assert picture.notes == ()
    assert np.abs(picture.pixels[0, 0, :3] - np.array(RED, float)).max() <= 2


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        images.read(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(InputError, match="a folder"):
        images.read(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        images.read(tmp_path / "missing.png")


def test_pixels_without_colour(tmp_path):
    Image.fromarray(np.full((9, 9), 3.0, np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((9, 9), -3, np.int32)).save(tmp_path / "b.tif")
    for name in ("a.tif", "b.tif"):
        with pytest.raises(InputError, match="8 bits a channel"):
            images.read(tmp_path / name)


def test_heic(tmp_path):
    path = tmp_path / "a.heic"
    path.write_bytes(HEIC)
    wanted = "pip install pillow-heif"
    if importlib.util.find_spec("pillow_heif"):
        wanted = "not a readable image"  # it is only a header
    with pytest.raises(InputError, match=wanted):
        images.read(path)


def test_a_heic_picture(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(halves(size=(64, 64))).save(tmp_path / "a.heic", quality=95)
    shape, left, right = corners(tmp_path / "a.heic")
    assert shape == (64, 64, 4)
    assert np.abs(left - np.array([*RED, 255.0])).max() < 20
    assert np.abs(right - np.array([*BLUE, 255.0])).max() < 20
