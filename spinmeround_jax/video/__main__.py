"""Turntables of finished folders as MP4: `python -m spinmeround_jax.video --help`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from spinmeround_jax.startup import end_on_signals

    end_on_signals()

import argparse
import pathlib
import sys

from spinmeround_jax import cli, files
from spinmeround_jax.cli import UsageError
from spinmeround_jax.files import InputError
from spinmeround_jax.splats import nvidia
from spinmeround_jax.splats.folder import SPLATS, write_video
from spinmeround_jax.video import mp4

DESCRIPTION = """MP4 (H.264) of heads: what sample or reconstruct wrote, or any folder with transforms.json.

Where there are splats, every frame is drawn from them: the head turns smoothly. Otherwise the views
are shown in their order, enlarged. A folder gets turntable.mp4."""

EXAMPLES = """examples:
  # one turn in 5 seconds, 720 pixels high, normals on the right
  python -m spinmeround_jax.video out/splats/alice

  # for a post: square, slow at the front
  python -m spinmeround_jax.video out/splats/* --size 1080 --seconds 8 --ease --no-normals --out videos/

  # quick: 60 small frames
  ... --size 256 --fps 20 --seconds 3"""


def build_parser() -> argparse.ArgumentParser:
    parser = cli.build_parser("spinmeround_jax.video", DESCRIPTION, EXAMPLES)
    path = pathlib.Path
    parser.add_argument("input", type=path, nargs="+", help="folders of sample or reconstruct")
    parser.add_argument(
        "--out", type=path, help="folder for NAME.mp4 (default: turntable.mp4 in each input)"
    )
    parser.add_argument(
        "--size", type=cli.integer(16, 2160), default=mp4.DEFAULT.height, metavar="PIXELS",
        help=f"height of the video ({mp4.DEFAULT.height})",
    )  # fmt: skip
    parser.add_argument(
        "--fps", type=cli.integer(1, 120), default=mp4.DEFAULT.fps, help=f"({mp4.DEFAULT.fps})"
    )
    parser.add_argument(
        "--seconds", type=cli.real(0.1, 600), default=mp4.DEFAULT.seconds,
        help=f"of one turn ({mp4.DEFAULT.seconds:g}); views without splats are held for whole frames",
    )  # fmt: skip
    parser.add_argument("--ease", action="store_true", help="slow at the front, fast at the back")
    parser.add_argument("--no-normals", action="store_true", help="images only")
    parser.add_argument("--rasteriser", choices=nvidia.RASTERISERS, default="auto", help="(auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace videos that exist")
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code. InputError before anything is written."""
    mp4.check()
    turn = mp4.Turn(args.size, args.fps, args.seconds, args.ease, not args.no_normals)
    videos: dict[pathlib.Path, pathlib.Path] = {}
    for folder in args.input:
        name = f"{folder.resolve().name}.mp4"
        video = args.out / name if args.out else folder / mp4.NAME
        files.check_writable(video.parent)
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; give those of sample or reconstruct")
        if video in videos:
            raise UsageError(f"{folder}: {videos[video]} would have the same video {video}")
        if video.exists() and not args.overwrite:
            raise InputError(f"{video}: exists; --overwrite replaces it, --out writes elsewhere")
        videos[video] = folder
    failed = 0
    for video, folder in videos.items():
        try:
            video.parent.mkdir(parents=True, exist_ok=True)
            if (folder / SPLATS).exists():
                write_video(video, folder, turn, nvidia.choose(args.rasteriser))
            else:
                mp4.write_views(video, folder, turn)
            print(video)
        except (InputError, OSError) as error:
            failed += 1
            print(f"error: {cli.message(error)}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    stopped = "the videos written so far are complete"
    return cli.main(build_parser().parse_args, run, argv, stopped)


if __name__ == "__main__":
    cli.end(main())
