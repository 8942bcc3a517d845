"""Video files: what a clip is, the frames of it that are asked for, and writing one.

Frames are ``uint8 [H, W, 3]``, red, green, blue, upright as players show them. PyAV decodes, from the first
frame on: what it gives is what the container holds, edit lists and all. decord gives the same pixels on 8-bit
H.264 and can stand in by ``decoder="decord"`` or ``COGTUNE_DECODER=decord``. It seeks, so it is the faster
where the first frame wanted lies several hundred frames into a clip, and the slower elsewhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from cogtune.errors import CogtuneError, did_you_mean
from cogtune.files import write_atomic

if TYPE_CHECKING:
    import av.container
    import av.video

Pixels = npt.NDArray[np.uint8]
"""A picture ``uint8 [H, W, 3]`` or pictures ``uint8 [F, H, W, 3]``: red, green, blue."""

Decoder = Literal["pyav", "decord"]

DECODER_VARIABLE = "COGTUNE_DECODER"


class VideoError(CogtuneError):
    """A video file that cannot be used.

    ``code`` is the finding it stands for; ``reason`` goes on where the file's name ends.
    """

    code: ClassVar[str] = "damaged-video"
    advice: ClassVar[str] = "play it to see whether it is whole; then encode it again, or leave it out"

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}", self.advice)
        self.reason = reason


class MissingVideo(VideoError):
    """There is no such file."""

    code = "missing-video"
    advice = "check the path"


class EmptyVideo(VideoError):
    """The file has no bytes."""

    code = "empty-video"
    advice = "copy or download it again"


class NotAVideo(VideoError):
    """The file is in no format that the decoder knows."""

    code = "not-a-video"
    advice = "convert it to mp4 (H.264), or leave it out"


class NoVideoStream(VideoError):
    """The file has sound or data, and no pictures."""

    code = "no-video-stream"
    advice = "leave it out"


class CutShort(VideoError):
    """The file, or its frames, end before they should."""

    code = "cut-short"
    advice = "copy or download it again"


class DamagedVideo(VideoError):
    """The file opens, but cannot be decoded."""


@dataclass(frozen=True)
class VideoInfo:
    """What a clip is.

    Args:
        num_frames: frames that decoding gives, as far as the container tells.
        fps: frames a second, on average.
        height, width: pixels of a frame as shown, ``rotation`` applied.
        duration: seconds.
        codec: its short name, such as ``h264``.
        pixel_format: how the file stores pixels, such as ``yuv420p``.
        rotation: degrees counterclockwise by which players turn it: 0, 90, 180 or 270.
        pixel_aspect: width over height of one pixel; 1.0 when square.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    duration: float
    codec: str
    pixel_format: str
    rotation: int
    pixel_aspect: float


def probe(path: Path) -> VideoInfo:
    """What the clip in ``path`` is, from its container and its first decoded frame.

    Raises:
        VideoError: the clip is missing, empty, no video, cut short or damaged.
    """
    with _opened(path) as (container, stream):
        frame = _first_frame(path, container, stream)
        num_frames = _promised_frames(path, stream)
        rate = stream.average_rate or stream.guessed_rate
        duration = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        if not rate and not duration:
            raise DamagedVideo(path, "says neither its frame rate nor its duration")
        fps = float(rate) if rate else num_frames / duration
        turns = _quarter_turns(frame)
        height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        return VideoInfo(
            num_frames=num_frames,
            fps=fps,
            height=height,
            width=width,
            duration=duration or num_frames / fps,
            codec=stream.codec_context.codec.canonical_name,
            pixel_format=frame.format.name,
            rotation=90 * turns,
            pixel_aspect=float(stream.sample_aspect_ratio or 1),
        )


def count_frames(path: Path) -> int:
    """How many frames the clip really has, by decoding all of them.

    Raises:
        VideoError: the clip cannot be opened, or cannot be decoded to its end.
    """
    count = 0
    with _opened(path) as (container, stream):
        for _ in _decoded(path, container, stream):
            count += 1
    return count


def iter_frames(path: Path, indices: Iterable[int], decoder: Decoder | None = None) -> Iterator[Pixels]:
    """The frames with these indices, ``uint8 [H, W, 3]``, in rising order and each once, one at a time.

    Args:
        path: the clip.
        indices: counted from 0 in the order in which frames are shown.
        decoder: by default what ``COGTUNE_DECODER`` says, else PyAV.

    Raises:
        VideoError: the clip cannot be read, or ends before the last of ``indices``.
        CogtuneError: there is no such decoder, or it is not installed.
    """
    wanted = sorted(set(indices))
    if wanted and wanted[0] < 0:
        raise ValueError(f"a frame's index is not negative: {wanted[0]}")
    read = _DECODERS.get(decoder or os.environ.get(DECODER_VARIABLE) or "pyav")
    if read is None:
        name = decoder or os.environ[DECODER_VARIABLE]
        raise CogtuneError(
            f"there is no decoder '{name}'{did_you_mean(name, _DECODERS)}",
            f"set {DECODER_VARIABLE} to one of {', '.join(_DECODERS)}, or leave it out",
        )
    return read(path, wanted)


def read_frames(path: Path, indices: Sequence[int], decoder: Decoder | None = None) -> Pixels:
    """The frames with these indices in the order given, ``uint8 [F, H, W, 3]``; as :func:`iter_frames`."""
    if not len(indices):
        raise ValueError("no frame is asked for")
    wanted = sorted(set(indices))
    frames = dict(zip(wanted, iter_frames(path, wanted, decoder), strict=True))
    return np.stack([frames[index] for index in indices])


def write_video(path: Path, frames: Iterable[Pixels], fps: float) -> None:
    """Write an mp4 that plays everywhere: H.264, yuv420p, BT.709, its index in front.

    The file is whole or not there, and the same frames give the same bytes.

    Args:
        path: the file, replaced if it is there.
        frames: ``uint8 [H, W, 3]`` each, all of one size; an array ``[F, H, W, 3]`` will do.
        fps: frames a second.

    Raises:
        CogtuneError: no frame, a frame of another shape or type, an odd side, or a disk that refuses.
    """
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise CogtuneError(f"cannot write {path}: it would have no frames")
    if first.dtype != np.uint8 or first.ndim != 3 or first.shape[2] != 3:
        raise CogtuneError(
            f"cannot write {path}: a frame is uint8 [height, width, 3], not {first.dtype} {list(first.shape)}"
        )
    height, width, _ = first.shape
    if height % 2 or width % 2:
        raise CogtuneError(
            f"cannot write {path}: H.264 takes even heights and widths, not {height}x{width}",
            f"cut it to {height - height % 2}x{width - width % 2}",
        )
    if not fps > 0:
        raise CogtuneError(f"cannot write {path}: {fps} frames a second")
    write_atomic(path, lambda aside: _encode(aside, path, chain([first], iterator), (height, width), fps))


# --------------------------------------------------------------------------------------------------- reading


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise CogtuneError(f"PyAV cannot be imported: {error}", "install it: pip install av") from error
    return av


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.video.VideoStream]]:
    """The container and its first stream of moving pictures, ready to decode on the calling thread."""
    av = _av()
    if not path.is_file():
        raise MissingVideo(path, "is a folder" if path.is_dir() else "is not there")
    try:
        with path.open("rb") as handle:
            length = os.fstat(handle.fileno()).st_size
            if length == 0:
                raise EmptyVideo(path, "is empty")
            has_boxes = _check_boxes(path, handle, length)
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except av.InvalidDataError as error:
        if has_boxes:
            raise DamagedVideo(path, "cannot be opened: its header is damaged") from error
        raise NotAVideo(path, "is not a video") from error
    except (OSError, av.FFmpegError) as error:
        raise DamagedVideo(path, f"cannot be opened: {_reason(error)}") from error
    with container:
        pictures = [
            stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not pictures:
            raise NoVideoStream(path, "has no video stream")
        stream = pictures[0]
        if stream.codec_context is None:
            raise DamagedVideo(path, "is in a codec that this build of PyAV cannot decode")
        stream.codec_context.thread_count = 1
        yield container, stream


_BOXES = frozenset(b"ftyp moov mdat moof free skip wide uuid meta sidx mfra styp".split())


def _check_boxes(path: Path, handle: BinaryIO, length: int) -> bool:
    """Whether the file is an MP4 or MOV; if so, its boxes must be complete.

    Decoders promise all frames of a file that is cut, or call it no video at all; the boxes tell which it is.

    Raises:
        CutShort: a top-level box runs past the end of the file, or there is no index.
    """
    position, seen = 0, set()
    while position < length:
        handle.seek(position)
        header = handle.read(16)
        kind = header[4:8]
        if kind not in _BOXES:
            break
        seen.add(kind)
        size = int.from_bytes(header[:4], "big")
        if size == 1:  # the length is in the 64 bits that follow
            size = int.from_bytes(header[8:16], "big")
        elif size == 0:  # the box goes on to the end of the file
            size = length - position
        if size < 8:
            break
        position += size
        if position > length:
            raise CutShort(path, f"is cut short: {position - length:,} of {position:,} bytes are missing")
    else:
        if not seen & {b"moov", b"moof"}:
            raise CutShort(path, "is cut short: it has no index (the end of the file was never written)")
    return bool(seen)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _promised_frames(path: Path, stream: av.video.VideoStream) -> int:
    """How many frames decoding will give: entries of the index, or packets, less those an edit list hides."""
    index = stream.index_entries
    if stream.frames and len(index) == stream.frames:
        return sum(not entry.is_discard for entry in index)
    with _opened(path) as (container, again):
        return sum(1 for packet in _demuxed(path, container, again) if packet.size and not packet.is_discard)


def _demuxed(path: Path, container: av.container.InputContainer, stream: av.video.VideoStream) -> Iterator[Any]:
    av = _av()
    try:
        yield from container.demux(stream)
    except av.FFmpegError as error:
        raise DamagedVideo(path, f"cannot be read to its end: {_reason(error)}") from error


def _decoded(
    path: Path, container: av.container.InputContainer, stream: av.video.VideoStream
) -> Iterator[av.VideoFrame]:
    av = _av()
    count = 0
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:  # the decoder guessed its missing parts, and what follows builds on them
                raise DamagedVideo(path, f"is damaged at frame {count}")
            yield frame
            count += 1
    except av.FFmpegError as error:
        raise DamagedVideo(path, f"cannot be decoded beyond frame {count}: {_reason(error)}") from error


def _first_frame(path: Path, container: av.container.InputContainer, stream: av.video.VideoStream) -> av.VideoFrame:
    for frame in _decoded(path, container, stream):
        return frame
    raise DamagedVideo(path, "has a video stream without a single frame")


def _quarter_turns(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) % 4


def _iter_pyav(path: Path, wanted: list[int]) -> Iterator[Pixels]:
    if not wanted:
        return
    position, shape, count = 0, None, 0
    with _opened(path) as (container, stream):
        for count, frame in enumerate(_decoded(path, container, stream), start=1):
            if count - 1 < wanted[position]:
                continue
            # swscale's own threads cost more than they bring at these sizes
            pixels = np.rot90(frame.to_ndarray(format="rgb24", threads=1), _quarter_turns(frame))
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise DamagedVideo(path, f"changes its frame size at frame {count - 1}")
            yield np.ascontiguousarray(pixels)
            position += 1
            if position == len(wanted):
                return
    raise CutShort(path, f"is cut short: it ends after {count} frames, and frame {wanted[-1]} was asked for")


_DECORD_BATCH = 8
"""Frames that decord hands over at a time: whole clips of large frames would not fit in memory."""


def _iter_decord(path: Path, wanted: list[int]) -> Iterator[Pixels]:
    try:
        import decord
    except ImportError as error:
        raise CogtuneError(
            f"decord cannot be imported: {error}",
            f"install it: pip install decord; or unset {DECODER_VARIABLE}",
        ) from error
    decord.logging.set_level(decord.logging.QUIET)
    if not wanted:
        return
    # decord fills up with copies of the last frame what an edit list hides: the container is asked first
    available = probe(path).num_frames
    if wanted[-1] >= available:
        raise CutShort(path, f"is cut short: it ends after {available} frames, and frame {wanted[-1]} was asked for")
    try:
        reader = decord.VideoReader(str(path.absolute()), num_threads=1)
        for start in range(0, len(wanted), _DECORD_BATCH):
            yield from reader.get_batch(wanted[start : start + _DECORD_BATCH]).asnumpy()
    except (decord.DECORDError, IndexError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DamagedVideo(path, f"cannot be decoded by decord: {reason}") from error


_DECODERS: dict[str, Callable[[Path, list[int]], Iterator[Pixels]]] = {
    "pyav": _iter_pyav,
    "decord": _iter_decord,
}


# --------------------------------------------------------------------------------------------------- writing

_BT709, _LIMITED = 1, 1
"""ITU-T H.273's number for the matrix, primaries and transfer of BT.709, and libav's for limited range."""


def _encode(aside: Path, path: Path, frames: Iterable[Pixels], size: tuple[int, int], fps: float) -> None:
    av = _av()
    height, width = size
    rate = Fraction(fps).limit_denominator(1001)
    flags = {"movflags": "+faststart", "fflags": "+bitexact"}
    try:
        with av.open(str(aside), "w", format="mp4", options=flags) as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "17", "preset": "medium"})
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
        raise CogtuneError(f"cannot write {path}: {_reason(error)}") from error
