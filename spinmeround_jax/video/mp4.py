"""Turntables as MP4 that browsers, phones and social networks play.

H.264 (High, yuv420p) at a constant frame rate, tagged BT.709, with the index before the data ("faststart").
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from spinmeround_jax import cli
from spinmeround_jax.files import InputError, begun, naming, publish
from spinmeround_jax.results import transforms

NAME = "turntable.mp4"
MAX_WIDTH = 4096  # of the images; H.264 ends at twice as much
QUALITY = {"crf": "18", "preset": "medium"}  # x264's: no loss that is seen


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn around a head.

    height: of the video in pixels. fps: frames per second. seconds: of the whole turn. ease: slow at the front,
    twice as fast at the back. normals: on the right of the image.
    """

    height: int = 720
    fps: int = 30
    seconds: float = 5.0
    ease: bool = False
    normals: bool = True

    def width(self, width: int, height: int) -> int:
        """Pixels of the width at which images are shown; InputError beyond what players take."""
        if (shown := max(1, round(width * self.height / height))) > MAX_WIDTH:
            raise InputError(
                f"a video {self.height} pixels high of images of {width} x {height} would be {shown} wide, "
                f"more than {MAX_WIDTH}; make it smaller"
            )
        return shown

    def phases(self) -> np.ndarray:
        """(n,) part of the turn that lies behind each frame, in [0, 1)."""
        count = max(1, round(self.fps * self.seconds))
        phase = np.arange(count) / count
        return phase - np.sin(2 * np.pi * phase) / (2 * np.pi) if self.ease else phase

    def views(self, count: int) -> np.ndarray:
        """(n,) which of `count` views each frame shows: the nearest; without easing all equally long."""
        if self.ease:
            return np.rint(count * self.phases()).astype(int) % count
        return np.repeat(np.arange(count), max(1, round(self.fps * self.seconds / count)))


DEFAULT = Turn()


def check() -> None:
    """Raises InputError if there is no encoder."""
    try:
        importlib.import_module("av")
    except ImportError as error:
        raise InputError(
            f"MP4 needs PyAV ({error}); pip install 'spinmeround_jax[video]', or leave the video out"
        ) from error


def write(path: pathlib.Path, frames: Iterable[np.ndarray], fps: int, count: int) -> None:
    """Encode `count` (h, w, 3) uint8 sRGB frames of one size; the file is whole or not there.

    H.264 halves the colours' resolution, so an odd row or column at the end is doubled.

    Raises:
        OSError: the file cannot be written.
    """
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    def even(frame: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    bar = cli.progress(desc=str(path), total=count, unit="frame", dynamic_ncols=True)
    with bar, begun(path, wait=True) as unfinished, naming(path):
        with av.open(
            str(unfinished), "w", format="mp4", options={"movflags": "+faststart"}
        ) as video:
            stream = video.add_stream("libx264", rate=fps, options=QUALITY)
            stream.pix_fmt = "yuv420p"
            codec = stream.codec_context
            codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
            for number, frame in enumerate(map(even, frames)):
                if not number:
                    stream.height, stream.width = frame.shape[:2]
                video.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                            format="yuv420p",
                            src_color_range=ColorRange.JPEG,
                            dst_color_range=ColorRange.MPEG,
                            dst_colorspace=Colorspace.ITU709,
                            dst_color_trc=ColorTrc.BT709,
                            dst_color_primaries=ColorPrimaries.BT709,
                        )
                    )
                )
                bar.update()
            video.mux(stream.encode())
        publish(unfinished, path)


def write_views(path: pathlib.Path, folder: pathlib.Path, turn: Turn) -> None:
    """Video of the images (on white) and normal maps that a folder's transforms.json names, in their order.

    Raises:
        InputError: naming the file, if the folder cannot be read.
        OSError: the video cannot be written.
    """
    views = transforms.read(folder).frames
    with_normals = turn.normals and all(view.normals is not None for view in views)
    width, height = views[0].intrinsics.size
    size = (turn.width(width, height), turn.height)

    def pixels(file: pathlib.Path, orientation: int) -> np.ndarray:
        image = Image.fromarray(transforms.read_image(file, orientation).pixels)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
        return np.asarray(image.resize(size, Image.Resampling.LANCZOS))

    def frames(numbers: np.ndarray) -> Iterator[np.ndarray]:
        shown, frame = -1, None
        for number in numbers:
            if number != shown:
                view, shown = views[number], number
                kinds = (view.image, view.normals) if with_normals else (view.image,)
                frame = np.concatenate([pixels(kind, view.orientation) for kind in kinds], axis=1)
            yield frame

    numbers = turn.views(len(views))
    write(path, frames(numbers), turn.fps, len(numbers))
