"""What the ways to store pictures and normals cost: size, error, time to decode. `--help`."""

from __future__ import annotations

import argparse
import functools
import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from data_prep.parametric.people import sample_person
from data_prep.parametric.subjects import build_scene
from data_prep.render_heads import person_seed
from data_prep.rendering import render, viewpoints
from spinmeround_jax import cameras
from spinmeround_jax.data import records

EXAMPLES = """examples:
  # the tables of docs/data_format.md
  python -m benchmarks.formats --subjects 0 1 1000000 1000003 --views 6
"""

Encode = Callable[[np.ndarray], bytes]
PER_SUBJECT = 125 / 1024  # KiB of a view to MiB of a subject


def rendered(
    subjects: list[int], views: int, size: int, samples: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(rgba, world-space normals, world_to_camera) of every view."""
    angles = viewpoints.viewpoints()
    for subject in subjects:
        scene, _ = build_scene(sample_person(person_seed(0, subject)), size)
        for yaw, pitch in angles[np.linspace(0, len(angles) - 1, views).astype(int)]:
            pose = cameras.orbit(yaw, pitch)
            picture = render.render_view(scene, pose, size, samples)
            yield picture.rgba, picture.soft_normals, pose


def save(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def load(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.array(image)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Its result, and the least processor time of three calls in milliseconds."""
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        result = function()
        best = min(best, time.process_time() - start)
    return result, 1e3 * best


# --------------------------------------------------------------------------------------------------
# Ways


def colour_ways() -> dict[str, Encode]:
    """(h, w, 4) uint8 -> bytes."""
    ways: dict[str, Encode] = {
        "PNG": functools.partial(save, kind="PNG"),
        "WebP, lossless": functools.partial(save, kind="WEBP", lossless=True, quality=50),
    }
    for quality in (85, 90, 95):
        ways[f"WebP {quality}"] = functools.partial(save, kind="WEBP", quality=quality, exact=True)
    for quality in (85, 90, 92, 95):
        ways[f"WebP {quality}, filled"] = lambda rgba, quality=quality: save(
            records.fill_transparent(rgba), "WEBP", quality=quality, exact=True
        )
    for quality in (80, 90):
        ways[f"AVIF {quality}, filled"] = lambda rgba, quality=quality: save(
            records.fill_transparent(rgba), "AVIF",
            quality=quality, subsampling="4:4:4", speed=8, max_threads=1,
        )  # fmt: skip
    return ways


def components(normals: np.ndarray) -> np.ndarray:
    return (np.rint(normals * 127) + 128).astype(np.uint8)


def from_components(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float32) - 128) / 127


def octahedral(normals: np.ndarray, levels: int) -> np.ndarray:
    """(h, w, 3) uint8: the two coordinates of the unfolded octahedron, then the length."""
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    point = normals / np.maximum(abs(normals).sum(-1, keepdims=True), 1e-9)
    sign = np.where(point[..., :2] >= 0, 1, -1)
    folded = (1 - abs(point[..., 1::-1])) * sign
    plane = np.where(point[..., 2:] >= 0, point[..., :2], folded)
    codes = np.where(length > 0, np.rint(plane * levels) + 128, 128)
    return np.concatenate([codes, np.rint(255 * length)], -1).astype(np.uint8)


def from_octahedral(pixels: np.ndarray, levels: int) -> np.ndarray:
    plane = (pixels[..., :2].astype(np.float32) - 128) / levels
    z = 1 - abs(plane).sum(-1, keepdims=True)
    plane -= np.sign(plane) * np.maximum(-z, 0)
    vectors = np.concatenate([plane, z], -1)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors * (pixels[..., 2:] / np.float32(255))


def normal_ways() -> dict[str, tuple[Encode, Callable[[bytes], np.ndarray]]]:
    """(h, w, 3) world-space normals -> bytes, and back."""

    def of_components(kind: str, **options: Any):
        return (
            lambda normals: save(components(normals), kind, **options),
            lambda encoded: from_components(load(encoded)),
        )

    ways = {
        "components, PNG": of_components("PNG"),
        "components, WebP lossless": of_components("WEBP", lossless=True, quality=50),
        "components, WebP 100": of_components("WEBP", quality=100),
        "components, JPEG 4:4:4 95": of_components("JPEG", quality=95, subsampling=0),
        "components, AVIF 4:4:4 95": of_components(
            "AVIF", quality=95, subsampling="4:4:4", speed=8, max_threads=1
        ),
    }
    for levels in (127, 63):
        ways[f"octahedron of {levels} levels, WebP lossless"] = (
            lambda normals, levels=levels: save(
                octahedral(normals, levels), "WEBP", lossless=True, quality=50
            ),
            lambda encoded, levels=levels: from_octahedral(load(encoded), levels),
        )
    return ways


# --------------------------------------------------------------------------------------------------
# Errors


def psnr(wanted: np.ndarray, found: np.ndarray, where: np.ndarray | None = None) -> float:
    """dB on white, over the picture or a part of it; 99 where nothing differs."""
    laid = [p[..., :3] * (p[..., 3:] / 255.0) + 255.0 - p[..., 3:] for p in (wanted, found)]
    square = np.square(laid[0] - laid[1])
    error = (square if where is None else square[where]).mean()
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def angles(wanted: np.ndarray, found: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Degrees, (n,)."""
    a, b = wanted[where], found[where]
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.degrees(np.arccos(np.clip((a * b).sum(-1) / np.maximum(lengths, 1e-9), -1, 1)))


def row(name: str, cells: list[float], digits: list[int]) -> str:
    return f"| {name} | " + " | ".join(
        f"{cell:.{d}f}" for cell, d in zip(cells, digits, strict=True)
    ) + " |"  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.formats", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--subjects", type=int, nargs="+", default=[0, 1], help="numbers (0 1)")
    parser.add_argument("--views", type=int, default=8, help="of each subject (8)")
    parser.add_argument("--size", type=int, default=512, help="pixels (512)")
    parser.add_argument("--samples", type=int, default=3, help="rays per pixel side (3)")
    args = parser.parse_args(argv)
    views = list(rendered(args.subjects, args.views, args.size, args.samples))

    print("| colours | KiB / view | MiB / 125 | PSNR | least | at edges | alpha | decode ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name, encode in colour_ways().items():
        cells = []
        for rgba, _, _ in views:
            encoded = encode(rgba)
            found, milliseconds = timed(functools.partial(load, encoded))
            edge = (rgba[..., 3] > 0) & (rgba[..., 3] < 255)
            off = abs(found[..., 3].astype(int) - rgba[..., 3]).max()
            kib = len(encoded) / 1024
            cells.append((kib, psnr(rgba, found), psnr(rgba, found, edge), off, milliseconds))
        kib, whole, at_edges, off, milliseconds = np.array(cells).T
        print(row(name, [kib.mean(), kib.mean() * PER_SUBJECT, whole.mean(), whole.min(),
                         at_edges.mean(), off.max(), milliseconds.mean()],
                  [1, 1, 1, 1, 1, 0, 1]))  # fmt: skip

    print("\n| normals | KiB / view | MiB / 125 | mean ° | 99 % ° | decode ms |")
    print("|---|---|---|---|---|---|")
    ways = {**normal_ways(), "disc, WebP lossless": None}
    for name, way in ways.items():
        cells = []
        for rgba, normals, pose in views:
            if way is None:  # decoding gives the picture, too: its time is taken off
                stored = records.encode_view(rgba, normals, pose)
                record = records.ViewRecord(
                    "", 0, **stored, world_to_camera=pose, yaw=0, pitch=0,
                    id_embedding=np.zeros(0), source="", license="",
                )  # fmt: skip
                encoded = stored["normals"]
                (_, found), both = timed(lambda: records.decode_view(record, args.size, ""))  # noqa: B023
                milliseconds = both - timed(functools.partial(load, stored["image"]))[1]
            else:
                encoded = way[0](normals)
                found, milliseconds = timed(functools.partial(way[1], encoded))
            off = angles(normals, found, rgba[..., 3] >= 128)
            cells.append((len(encoded) / 1024, off.mean(), np.percentile(off, 99), milliseconds))
        kib, mean, most, milliseconds = np.array(cells).T
        print(row(name, [kib.mean(), kib.mean() * PER_SUBJECT, mean.mean(), most.mean(),
                         milliseconds.mean()], [1, 1, 2, 1, 1]))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
