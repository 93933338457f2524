"""How exactly photos are aligned, measured on heads whose landmarks and cameras are known.

    python -m data_prep.alignment --figure docs/images/alignment.png    # the table and the figure

A head seen by a known canonical camera is put into a larger photo with random shift, size and roll.
The aligner sees the photo's landmarks alone; the crop should show the head where that camera does.
The error of a landmark is its distance, in the crop of 512 pixels, from where the camera sees it.
"""

import argparse
import dataclasses
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.parametric import assets
from data_prep.parametric.landmarks import draw_landmarks, world_landmarks
from data_prep.parametric.people import sample_person
from data_prep.parametric.subjects import build_scene
from data_prep.render_heads import HELD_OUT_OFFSET, person_seed
from data_prep.rendering import render
from spinmeround_jax import cameras, cli
from spinmeround_jax.photo import align, pose
from spinmeround_jax.photo.landmarks import CHAINS, FIVE_OF_68
from spinmeround_jax.photo.pose import HeadPose, Square

YAWS = (0.0, 15.0, 30.0, 45.0)
MAX_PITCH = 10.0
DATA_SEED = 0  # whose held-out people nobody made the landmark model or a network from

_TILE = 176


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one head in one photo. errors: (68,) pixels of 512. turn: yaw and pitch error, degrees."""

    errors: np.ndarray
    turn: np.ndarray


def draw_square(rng: np.random.Generator) -> Square:
    """Where the canonical image of a head lies in a photo of some 2000 pixels."""
    return Square(rng.uniform(400, 1600, 2), rng.uniform(300, 1500), rng.uniform(-35, 35))


def crop_errors(head: HeadPose, placed: Square, seen: np.ndarray) -> np.ndarray:
    """(n,) distances in the crop, pixels of 512, of (n, 2) canonical positions that were `placed`."""
    there = head.square.from_photo(placed.to_photo(seen))
    return align.SIZE * np.linalg.norm(there - seen, axis=1)


def measure(
    heads: np.ndarray,
    yaw: float,
    points: int = 68,
    noise: float = 0.0,
    depth: bool = False,
    seed: int = 0,
) -> list[Result]:
    """Aligns each head once, turned to one side or the other, at a random pitch.

    Args:
        heads: (people, 68, 3) world landmarks. points: 68 or 5 are given to the aligner.
        noise: standard deviation of the landmarks given, per axis, fraction of the square.
        depth: whether they have a third coordinate, as insightface's `1k3d68` gives it.
    """
    rng = np.random.default_rng(seed)
    results = []
    for landmarks in heads:
        turn = np.array([yaw * rng.choice([-1, 1]), rng.uniform(-MAX_PITCH, MAX_PITCH)])
        seen, placed = pose.project(landmarks, *turn), draw_square(rng)
        found = placed.to_photo(seen)
        if depth:
            camera = cameras.orbit(*turn)[2, :3]
            found = np.column_stack([found, placed.side * (landmarks @ camera)])
        found = found + noise * placed.side * rng.standard_normal(found.shape)
        head = pose.fit(found if points == 68 else FIVE_OF_68 @ found)
        results.append(
            Result(crop_errors(head, placed, seen), np.array([head.yaw, head.pitch]) - turn)
        )
    return results


def table(heads: np.ndarray) -> str:
    """A Markdown table of everything measured."""
    lines = [
        f"| {len(heads)} held-out people | " + " | ".join(f"yaw ±{yaw:.0f}" for yaw in YAWS) + " |",
        "|---|" + "---|" * len(YAWS),
    ]
    for name, points, noise, depth in (
        ("68 landmarks with depth", 68, 0.0, True),
        ("68 landmarks", 68, 0.0, False),
        ("68 with depth, each off by 0.5 % of the crop", 68, 0.005, True),
        ("68, each off by 0.5 % of the crop", 68, 0.005, False),
        ("5 landmarks", 5, 0.0, False),
        ("5, each off by 0.5 % of the crop", 5, 0.005, False),
    ):
        cells = []
        for yaw in YAWS:
            results = measure(heads, yaw, points, noise, depth)
            errors = np.concatenate([result.errors for result in results])
            turns = np.abs([result.turn for result in results]).mean(axis=0)
            cells.append(
                f"{np.median(errors):.1f} ({np.percentile(errors, 90):.1f}); "
                f"{turns[0]:.1f}°, {turns[1]:.1f}°"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The figure


def place(render_rgba: np.ndarray, placed: Square, size: tuple[int, int]) -> np.ndarray:
    """A square picture put into a photo (h, w, 4) uint8 of a blue-grey wall."""
    rows, columns = np.indices(size[::-1])
    wall = np.stack([150 + 20 * columns / size[0], 165 - 20 * rows / size[1], 175 + 0 * rows], -1)
    points = placed.from_photo(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    side = render_rgba.shape[0]
    origin, across, down = points[0] * side, (points[1] - points[0]), (points[2] - points[0])
    affine = (
        across[0] * side,
        down[0] * side,
        origin[0],
        across[1] * side,
        down[1] * side,
        origin[1],
    )
    picture = Image.fromarray(render_rgba).convert("RGBa")
    moved = picture.transform(size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    values = np.asarray(moved, np.float32)
    mixed = values[..., :3] + wall * (1 - values[..., 3:] / 255)
    opaque = np.full((*size[::-1], 1), 255.0)
    return np.rint(np.clip(np.concatenate([mixed, opaque], -1), 0, 255)).astype(np.uint8)


def figure(numbers: list[int], yaws: list[float], seed: int = 0) -> Image.Image:
    """Rows: photo with landmarks and square, crop, what the camera sees, difference."""
    rng = np.random.default_rng(seed)
    columns = []
    for number, yaw in zip(numbers, yaws, strict=True):
        person = sample_person(person_seed(DATA_SEED, HELD_OUT_OFFSET + number))
        scene, head = build_scene(person, 256)
        turn = (yaw, float(rng.uniform(-MAX_PITCH, MAX_PITCH)))
        true = render.render_view(scene, cameras.orbit(*turn), 256).rgba
        placed = Square(rng.uniform(250, 350, 2), rng.uniform(300, 480), rng.uniform(-35, 35))
        photo = place(true, placed, (600, 600))
        seen = pose.project(world_landmarks(head), *turn)
        found = align.align(placed.to_photo(seen), (600, 600))
        wall = place(true, Square(np.array([128.0, 128.0]), 256.0, 0.0), (256, 256))
        crop = np.rint(255 * align.crop(photo, found.head.square, 256)[..., :3]).astype(np.uint8)
        difference = np.abs(crop.astype(int) - wall[..., :3]) * (true[..., 3:] > 0)
        errors = crop_errors(found.head, placed, seen)
        columns.append(
            [
                _drawn(photo, found),
                _tile(Image.fromarray(crop), f"{np.median(errors):.1f} px of 512"),
                _tile(Image.fromarray(wall[..., :3]), f"yaw {turn[0]:+.0f}, pitch {turn[1]:+.0f}"),
                _tile(Image.fromarray(255 - np.minimum(difference, 255).astype(np.uint8)), ""),
            ]
        )
    sheet = Image.new("RGB", (_TILE * len(columns), _TILE * len(columns[0])), "white")
    for x, column in enumerate(columns):
        for y, tile in enumerate(column):
            sheet.paste(tile, (x * _TILE, y * _TILE))
    return sheet


def _drawn(photo: np.ndarray, found: align.Alignment) -> Image.Image:
    image = Image.fromarray(photo[..., :3])
    pen = ImageDraw.Draw(image)
    for square, colour in ((found.start, (120, 120, 120)), (found.head.square, (0, 90, 255))):
        corners = [tuple(corner) for corner in square.corners]
        pen.line([*corners, corners[0]], fill=colour, width=5)
    for chain in CHAINS:
        pen.line([tuple(found.landmarks[i]) for i in chain], fill=(255, 230, 0), width=3)
    return _tile(image, "")


def _tile(image: Image.Image, caption: str) -> Image.Image:
    tile = image.resize((_TILE - 4, _TILE - 4), Image.Resampling.LANCZOS)
    ImageDraw.Draw(tile).text((4, 2), caption, fill=(20, 20, 20), font=ImageFont.load_default(13))
    framed = Image.new("RGB", (_TILE, _TILE), "white")
    framed.paste(tile, (2, 2))
    return framed


def run(args: argparse.Namespace) -> None:
    assets.assets_dir()
    heads = draw_landmarks(DATA_SEED, range(HELD_OUT_OFFSET, HELD_OUT_OFFSET + args.people))
    print(table(heads))
    if args.figure:
        sheet = figure([3, 8, 21, 28, 36], [0.0, -15.0, 25.0, -35.0, 45.0])
        sheet.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(args.figure, optimize=True)
        print(f"{args.figure}: {args.figure.stat().st_size} bytes")


def main(argv: list[str] | None = None) -> int:
    parser = cli.build_parser("data_prep.alignment", __doc__)
    parser.add_argument("--people", type=cli.integer(1), default=200, help="held-out people (200)")
    parser.add_argument("--figure", type=pathlib.Path, help="PNG to draw")
    return cli.main(parser.parse_args, run, argv)


if __name__ == "__main__":
    cli.end(main())
