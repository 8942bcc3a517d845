"""Video files: reading chosen frames of a clip, and writing a clip.

Frames are ``uint8 [H, W, 3]`` in RGB, upright as players show them. PyAV decodes from the first frame on and
respects everything in the container, such as edit lists. decord gives the same pixels for 8-bit H.264. It seeks, so it
is faster if the first requested frame is several hundred frames into a clip, and slower otherwise
(``tools/bench_decoders.py``); clips for which its pixels differ (:func:`_decord_reads`) are left to PyAV. ``auto``
chooses the faster one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cogtune.config.choices import DECODER_VARIABLE, Decoder
from cogtune.data.video.container import (
    ChangesSize,
    CutShort,
    DamagedVideo,
    EmptyVideo,
    MissingVideo,
    NotAVideo,
    NoVideoStream,
    VideoError,
    VideoInfo,
    decoded_frames,
    import_av,
    moving_pictures,
    opened,
    reason_of,
)
from cogtune.data.video.cropping import crop_of
from cogtune.data.video.orientation import orientation_of, turned_by_rotation
from cogtune.data.video.probing import probe
from cogtune.data.video.stamp import FileChanged, Stamp, check_unchanged
from cogtune.system.errors import CogtuneError, counted, did_you_mean
from cogtune.system.files import write_atomic

if TYPE_CHECKING:
    import av.container
    import av.video

__all__ = [
    "CutShort",
    "DamagedVideo",
    "Decoder",
    "EmptyVideo",
    "FileChanged",
    "MissingVideo",
    "NoVideoStream",
    "NotAVideo",
    "Pixels",
    "VideoError",
    "VideoInfo",
    "iter_frames",
    "probe",
    "read_frames",
    "write_video",
]

Pixels = npt.NDArray[np.uint8]
"""A picture ``uint8 [H, W, 3]`` or pictures ``uint8 [F, H, W, 3]``, in RGB."""


def iter_frames(
    path: Path, indices: Iterable[int], decoder: Decoder | None = None, *, stamp: Stamp | None = None
) -> Iterator[Pixels]:
    """Yield the frames with these indices, ``uint8 [H, W, 3]``, in ascending order, each once.

    Args:
        path: the clip.
        indices: frame numbers from 0 in display order.
        decoder: by default ``COGTUNE_DECODER``, else ``auto``; all give the same frames.
        stamp: the file's expected state, checked after opening it and after the last frame.

    Raises:
        VideoError: the clip cannot be read, or ends before the last of ``indices``.
        FileChanged: the file does not match ``stamp``.
        CogtuneError: the decoder does not exist, or is not installed.
    """
    wanted = sorted(set(indices))
    if wanted and wanted[0] < 0:
        raise ValueError(f"a frame's index must not be negative: {wanted[0]}")
    read = _DECODERS.get(decoder or os.environ.get(DECODER_VARIABLE) or "auto")
    if read is None:
        name = decoder or os.environ[DECODER_VARIABLE]
        raise CogtuneError(
            f"no such decoder: '{name}'{did_you_mean(name, _DECODERS)}",
            f"set {DECODER_VARIABLE} to one of {', '.join(_DECODERS)}, or unset it",
        )
    return _unchanged(path, read(path, wanted, stamp), stamp)


def _unchanged(path: Path, frames: Iterator[Pixels], stamp: Stamp | None) -> Iterator[Pixels]:
    yield from frames
    check_unchanged(path, stamp)


def read_frames(path: Path, indices: Sequence[int], decoder: Decoder | None = None) -> Pixels:
    """Return the frames with these indices in the given order, ``uint8 [F, H, W, 3]``; see :func:`iter_frames`."""
    if not len(indices):
        raise ValueError("no frames requested")
    wanted = sorted(set(indices))
    frames = dict(zip(wanted, iter_frames(path, wanted, decoder), strict=True))
    return np.stack([frames[index] for index in indices])


def write_video(
    path: Path, frames: Iterable[Pixels], fps: float, comment: str = "", texts: Mapping[str, str] | None = None
) -> None:
    """Write an mp4 that plays everywhere: H.264, yuv420p, BT.709, with its index at the beginning.

    The file is written atomically, and the same frames give the same bytes.

    Args:
        path: the file, replaced if it exists.
        frames: ``uint8 [H, W, 3]`` each, all of one size, such as an array ``[F, H, W, 3]``.
        fps: frames per second.
        comment: a comment in the file's metadata.
        texts: other metadata, by the keys of mp4: ``title``, ``description``.

    Raises:
        CogtuneError: no frames, a frame of another shape or type, an odd height or width, or an error of the disk.
    """
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise CogtuneError(f"cannot write {path}: it would have no frames")
    if first.dtype != np.uint8 or first.ndim != 3 or first.shape[2] != 3:
        raise CogtuneError(
            f"cannot write {path}: expected frames of uint8 [height, width, 3], got {first.dtype} {list(first.shape)}"
        )
    height, width, _ = first.shape
    if height % 2 or width % 2:
        raise CogtuneError(
            f"cannot write {path}: H.264 requires even heights and widths, got {height}x{width}",
            f"crop it to {height - height % 2}x{width - width % 2}",
        )
    if not fps > 0:
        raise CogtuneError(f"cannot write {path}: {fps} frames per second")
    said = {"comment": comment, **(texts or {})}
    write_atomic(path, lambda aside: _encode(aside, path, chain([first], iterator), (height, width), fps, said))


# --------------------------------------------------------------------------------------------------- reading


def _iter_pyav(path: Path, wanted: list[int], stamp: Stamp | None) -> Iterator[Pixels]:
    if not wanted:
        return
    position, shape, count, crop = 0, None, 0, None
    with opened(path, stamp) as (container, stream):
        number = container.streams.video.index(stream)
        for count, frame in enumerate(decoded_frames(path, container, stream), start=1):
            if count - 1 < wanted[position]:
                continue
            # swscale's own threads cost more than they bring at these sizes
            stored: Any = frame.to_ndarray(format="rgb24", threads=1, src_colorspace=_colour_matrix(frame))
            crop = crop if shape else crop_of(path, number, (frame.height, frame.width))
            pixels = orientation_of(frame).apply(crop.apply(stored) if crop else stored)
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise ChangesSize(path, f"changes its frame size at frame {count - 1}")
            yield np.ascontiguousarray(pixels)
            position += 1
            if position == len(wanted):
                return
    raise CutShort(path, f"is incomplete: it ends after {counted(count, 'frame')}, but frame {wanted[-1]} is needed")


_UNSPECIFIED = 2
_HD = (720, 1280)


def _colour_matrix(frame: av.VideoFrame) -> int:
    """Return the ITU-T H.273 number of a frame's colour matrix.

    Without a tag it is that of players: BT.709 from a height of 720 or a width of 1280 on, else BT.601.
    """
    is_yuv = not frame.format.is_rgb
    if frame.colorspace == _UNSPECIFIED and is_yuv and (frame.height >= _HD[0] or frame.width >= _HD[1]):
        return _BT709
    return int(frame.colorspace)


_DECORD_BATCH = 8
"""Frames read from decord at a time, since whole clips of large frames would not fit in memory."""


def _iter_decord(path: Path, wanted: list[int], stamp: Stamp | None) -> Iterator[Pixels]:
    try:
        import decord
    except ImportError as error:
        raise CogtuneError(
            f"cannot import decord: {error}",
            f"run `pip install decord`, or unset {DECODER_VARIABLE}",
        ) from error
    decord.logging.set_level(decord.logging.QUIET)
    if not wanted:
        return
    # decord fills up with copies of the last frame what an edit list hides: the container is asked first
    available = probe(path).num_frames
    if wanted[-1] >= available:
        raise CutShort(
            path, f"is incomplete: it ends after {counted(available, 'frame')}, but frame {wanted[-1]} is needed"
        )
    with opened(path, stamp) as (container, stream):
        first = next(decoded_frames(path, container, stream))
        number = container.streams.video.index(stream)
        fits = _decord_reads(container, first) and crop_of(path, number, (first.height, first.width)) is None
    reader = _open_decord(path) if fits else None
    check_unchanged(path, stamp)
    if reader is None or len(reader) != available:
        yield from _iter_pyav(path, wanted, stamp)
        return
    given = 0
    try:
        for start in range(0, len(wanted), _DECORD_BATCH):
            for pixels in reader.get_batch(wanted[start : start + _DECORD_BATCH]).asnumpy():
                stored = np.rot90(pixels, -turned_by_rotation(first).turns)
                yield np.ascontiguousarray(orientation_of(first).apply(stored))
                given += 1
    except (decord.DECORDError, IndexError, RuntimeError):  # as at some narrow widths: PyAV knows whether it is damaged
        yield from _iter_pyav(path, wanted[given:], stamp)


def _open_decord(path: Path) -> Any:
    """Return a ``decord.VideoReader``; None for a file that it cannot open, such as one in a codec newer than it."""
    import decord

    with contextlib.suppress(decord.DECORDError, RuntimeError):
        return decord.VideoReader(str(path.absolute()), num_threads=1)
    return None


_DECORD_CONTAINERS = ("mp4", "matroska")
"""In others, such as MPEG-TS, it was seen to give wrong frames."""


def _decord_reads(container: av.container.InputContainer, first: av.VideoFrame) -> bool:
    """Return whether decord gives the same frames of a clip as PyAV.

    It chooses streams differently, has one matrix for colours without a tag, and mixes the fields of interlaced frames
    differently.
    """
    return (
        any(name in container.format.name for name in _DECORD_CONTAINERS)
        and len(moving_pictures(container)) == 1
        and _colour_matrix(first) == first.colorspace
        and not first.interlaced_frame
        and all(component.bits == 8 for component in first.format.components)
    )


SEEKS_FROM = 400
"""First requested frame from which on decord is faster: it seeks, while PyAV decodes all earlier frames.

In a clip of 720x1280 with a key frame every 8 seconds, 9 frames from the 600th on took PyAV 0.96 s and decord 0.34 s.
"""


def _iter_fastest(path: Path, wanted: list[int], stamp: Stamp | None) -> Iterator[Pixels]:
    seeks = bool(wanted) and wanted[0] >= SEEKS_FROM and find_spec("decord") is not None
    return (_iter_decord if seeks else _iter_pyav)(path, wanted, stamp)


_DECODERS: dict[str, Callable[[Path, list[int], Stamp | None], Iterator[Pixels]]] = {
    "auto": _iter_fastest,
    "pyav": _iter_pyav,
    "decord": _iter_decord,
}


# --------------------------------------------------------------------------------------------------- writing

_BT709, _LIMITED = 1, 1
"""ITU-T H.273's number for the matrix, primaries and transfer of BT.709, and libav's for limited range."""


_X264 = {
    "crf": "17",
    "preset": "medium",
    "x264-params": "cpu-independent=1",  # its fastest way to share out bits gives other bytes from one time to the next
}


def _encode(
    aside: Path, path: Path, frames: Iterable[Pixels], size: tuple[int, int], fps: float, texts: Mapping[str, str]
) -> None:
    av = import_av()
    height, width = size
    rate = Fraction(fps).limit_denominator(1001)
    flags = {"movflags": "+faststart", "fflags": "+bitexact"}
    try:
        with av.open(str(aside), "w", format="mp4", options=flags) as container:
            container.metadata.update({key: text for key, text in texts.items() if text})
            stream = container.add_stream("libx264", rate=rate, options=_X264)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            context = stream.codec_context
            context.thread_count = 1  # the bytes that x264 makes depend on how many threads it has
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
            for index, pixels in enumerate(frames):
                if pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
                    raise CogtuneError(
                        f"cannot write {path}: frame {index} is {pixels.dtype} {list(pixels.shape)}, "
                        f"the first one uint8 {[height, width, 3]}"
                    )
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED, threads=1)
                picture.pts, picture.time_base = index, 1 / rate
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise CogtuneError(f"cannot write {path}: {reason_of(error)}") from error
