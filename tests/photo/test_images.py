"""Reading pictures: every kind that people send, and every kind of trouble."""

import importlib.util
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

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


def test_exif_behind_the_pixels_is_left_out_everywhere(tmp_path):
    """Pillow finds it in a PNG that is decoded, not in its header: both must say the same."""
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    path, buffer = tmp_path / "a.png", io.BytesIO()
    halves().save(buffer, "PNG", exif=exif)
    chunks, content = [], buffer.getvalue()
    at = 8
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big") + 12
        chunks.append(content[at : at + size])
        at += size
    (moved,) = [chunk for chunk in chunks if chunk[4:8] == b"eXIf"]
    chunks.remove(moved)
    path.write_bytes(content[:8] + b"".join([*chunks[:-1], moved, chunks[-1]]))
    header, pixels = images.read_header(path), images.read(path).pixels
    assert header.orientation == 1 and header.size == halves().size == pixels.shape[1::-1]
    path.write_bytes(content)
    assert images.read_header(path).orientation == 6
    assert images.read(path).pixels.shape[:2] == halves().size


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


def linear_profile(space):
    """An ICC profile of version 2 in which values are proportional to light; primaries of sRGB."""

    def xyz(*values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78),
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
    }
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)  # the identity
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
        tags |= {
            b"rXYZ": xyz(0.4361, 0.2225, 0.0139),
            b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
            b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        }
    table, data = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(
        ">I4sI4s4s4s", start + len(data), bytes(4), 0x02100000, b"mntr", space.ljust(4), b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + data


@pytest.mark.parametrize(
    ("mode", "space"),
    [
        ("L", b"GRAY"), ("LA", b"GRAY"), ("I;16", b"GRAY"), ("1", b"GRAY"), ("P", b"RGB"),
        ("PA", b"RGB"), ("RGB", b"RGB"), ("RGBA", b"RGB"), ("L", b"RGB"),
    ],
)  # fmt: skip
def test_profiles_of_all_kinds_of_pixels_are_applied(tmp_path, mode, space):
    # 129 of 255 in linear light is 188 in sRGB.
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 129 * 257, np.uint16))
    elif mode == "1":
        image = Image.new("1", (4, 4), 1)
    else:
        image = Image.new("RGBA" if mode.endswith("A") else "RGB", (4, 4), (129, 129, 129))
        if mode == "P":
            image = image.quantize()
        elif mode == "PA":
            image = image.convert("RGB").quantize()
            image.info["transparency"] = 0
        elif mode.endswith("A"):
            image.putalpha(77)
            image = image.convert(mode)
        else:
            image = image.convert(mode)
    image.save(tmp_path / "a.png", icc_profile=linear_profile(space))
    picture = images.read(tmp_path / "a.png")
    assert picture.notes == ()
    expected = 255 if mode == "1" else 188
    assert np.abs(picture.pixels[..., :3].astype(int) - expected).max() <= 1
    alpha = {"RGBA": 77, "LA": 77, "PA": 0}.get(mode, 255)
    assert (picture.pixels[..., 3] == alpha).all()


def test_a_profile_that_does_not_fit_the_pixels_is_told(tmp_path):
    halves().save(tmp_path / "a.png", icc_profile=linear_profile(b"GRAY"))
    picture = images.read(tmp_path / "a.png")
    assert "taken for sRGB" in picture.notes[0] and tuple(picture.pixels[0, 0, :3]) == RED


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_a_png_with_megabytes_of_text_is_sound(tmp_path, kind):
    path, info, profile = tmp_path / "a.png", PngImagePlugin.PngInfo(), None
    if kind == "iCCP":  # what follows a profile's last tag is padding
        profile = linear_profile(b"RGB") + bytes(3 << 20)
    else:
        add = info.add_text if kind == "zTXt" else info.add_itxt
        add("history", "edited " * (3 << 17), zip=True)
    halves().save(path, pnginfo=info, icc_profile=profile)
    assert images.read(path).pixels.shape == (24, 40, 4)
    assert images.read_header(path).size == (40, 24)


def test_a_png_that_unpacks_to_endless_text_is_told(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("history", "0" * (65 << 20), zip=True)
    halves().save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match="64 MiB of text or colour profile"):
        images.read(tmp_path / "a.png")


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
