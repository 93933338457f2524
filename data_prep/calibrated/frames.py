"""A video of a turn around a head -> its sharpest frames, upright."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image
from scipy import ndimage

from spinmeround_jax import files
from spinmeround_jax.files import InputError
from spinmeround_jax.photo.assets import AssetError

SUFFIXES = (".mp4", ".mov", ".m4v")
_MAX_SECONDS = 600.0
_LOOKED_AT = 480  # pixels of the longer side in which sharpness is measured
_HDR = (16, 18)  # transfer characteristics PQ and HLG (ITU-T H.273): other colours than sRGB's


def sharpest(path: pathlib.Path, count: int, max_side: int) -> Iterator[Image.Image]:
    """The frame with the most detail (variance of the Laplacian) of each of `count` equal parts of a video.

    Frames are turned as the video's rotation says and at most `max_side` pixels long.

    Raises:
        InputError: unreadable, without a length, longer than ten minutes, HDR.
        AssetError: PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise AssetError(f"{path}: videos need PyAV: pip install '.[video]'") from error
    try:
        # This demuxer alone: others read lists of further files.
        with files.open_regular(path) as file, av.open(file, format="mov") as video:
            if not video.streams.video:
                raise InputError(f"{path}: no video in it")
            stream = video.streams.video[0]
            stream.thread_type = "AUTO"
            seconds = float((stream.duration or 0) * stream.time_base)
            if not 0 < seconds <= _MAX_SECONDS:
                raise InputError(
                    f"{path}: {seconds:.0f} seconds long; give the turn alone, up to {_MAX_SECONDS:.0f} seconds"
                )
            if stream.codec_context.color_trc in _HDR:
                raise InputError(f"{path}: an HDR video; convert it to SDR, or record without HDR")
            start = float((stream.start_time or 0) * stream.time_base)
            part, best, most = 0, None, -1.0
            for frame in video.decode(stream):
                now = min(count - 1, int(count * (float(frame.time) - start) / seconds))
                if now > part and best is not None:
                    yield _upright(best, max_side)
                    part, best, most = now, None, -1.0
                if (detail := _detail(frame)) > most:
                    best, most = frame, detail
            if best is not None:
                yield _upright(best, max_side)
    except InputError:
        raise
    except Exception as error:  # the file can hold anything
        raise InputError(
            f"{path}: not a readable video, perhaps cut short; copy it again ({error})"
        ) from error


def _shrunk(frame, longest: int) -> tuple[int, int]:
    """Width and height, even, of a frame that is made at most `longest` pixels long."""
    scale = min(1.0, longest / max(frame.width, frame.height))
    return tuple(max(2, 2 * round(scale * side / 2)) for side in (frame.width, frame.height))


def _detail(frame) -> float:
    width, height = _shrunk(frame, _LOOKED_AT)
    grey = frame.reformat(width=width, height=height, format="gray").to_ndarray()
    return float(ndimage.laplace(grey.astype(np.float32)).var())


def _upright(frame, max_side: int) -> Image.Image:
    width, height = _shrunk(frame, max_side)
    image = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    return Image.fromarray(np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90))))
