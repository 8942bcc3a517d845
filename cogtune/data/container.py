"""What a video file is: opened, probed and decoded to its end, with every way in which it can be broken named.

Nothing here needs numpy or torch, so that a process that only looks at clips starts at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from cogtune.errors import CogtuneError

if TYPE_CHECKING:
    import av.container
    import av.video


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
        bits: of one colour of one pixel.
        hdr: ``PQ``, ``HLG`` or ``BT.2020`` when its colours are meant for a brighter or wider screen; else empty.
        alpha: whether the pixels can be see-through.
        uneven: share (0 to 1) of the frames that follow the one before much sooner or later than is usual in the clip.
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
    bits: int = 8
    hdr: str = ""
    alpha: bool = False
    uneven: float = 0.0


@dataclass(frozen=True)
class Decoded:
    """What decoding a whole clip gave.

    Args:
        frames: that came out, damaged ones too.
        damaged: of them, those that the decoder had to guess in part.
        first_damaged: index of the first of these.
        failed: packets that gave an error in place of a frame.
        failure: the first of these errors, in libav's words.
    """

    frames: int
    damaged: int = 0
    first_damaged: int = 0
    failed: int = 0
    failure: str = ""


def probe(path: Path) -> VideoInfo:
    """What the clip in ``path`` is, from its container and its first decoded frame.

    Raises:
        VideoError: the clip is missing, empty, no video, cut short or damaged.
    """
    with opened(path) as (container, stream):
        frame = _first_frame(path, container, stream)
        num_frames, uneven = _promised_frames(path, stream)
        rate = stream.average_rate or stream.guessed_rate
        duration = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        if not rate and not duration:
            raise DamagedVideo(path, "says neither its frame rate nor its duration")
        fps = float(rate) if rate else num_frames / duration
        turns = quarter_turns(frame)
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
            bits=max(component.bits for component in frame.format.components),
            hdr=_hdr(stream.codec_context),
            alpha=_has_alpha(frame, stream),
            uneven=uneven,
        )


def decode_all(path: Path, tick: Callable[[], None] = lambda: None) -> Decoded:
    """Decode a clip to its end, going on after what is damaged.

    Args:
        tick: called again and again while frames come.

    Raises:
        VideoError: the clip cannot be opened or read to its end, or its frames are not all of one size.
    """
    av = import_av()
    frames = damaged = first_damaged = failed = 0
    failure = ""
    shape = None
    with opened(path) as (container, stream):
        for packet in _demuxed(path, container, stream):
            tick()
            try:
                pictures = packet.decode()
            except av.FFmpegError as error:
                failed, failure = failed + 1, failure or reason_of(error)
                continue
            for picture in pictures:
                shape = shape or (picture.width, picture.height)
                if (picture.width, picture.height) != shape:
                    raise DamagedVideo(path, f"changes its frame size at frame {frames}")
                if picture.is_corrupt:
                    first_damaged = first_damaged if damaged else frames
                    damaged += 1
                frames += 1
    return Decoded(frames, damaged, first_damaged, failed, failure)


def check_decoded(path: Path, promised: int, decoded: Decoded) -> None:
    """See that decoding gave every frame that was promised, whole.

    Raises:
        DamagedVideo: frames came out damaged, or not at all.
        CutShort: there are fewer than promised.
    """
    if decoded.damaged or decoded.failed:
        told = []
        if decoded.damaged:
            told.append(f"{decoded.damaged} of {decoded.frames} frames, the first being frame {decoded.first_damaged}")
        if decoded.failed:
            told.append(f"{decoded.failed} packets that give no frame ({decoded.failure})")
        raise DamagedVideo(path, f"is damaged: {' and '.join(told)}")
    if decoded.frames < promised:
        raise CutShort(path, f"is cut short: it promises {promised} frames and gives {decoded.frames}")


# --------------------------------------------------------------------------------------------------- reading


def _has_alpha(frame: av.VideoFrame, stream: av.video.VideoStream) -> bool:
    """Whether a pixel has an opacity; WebM keeps it beside the picture, and says so in a tag."""
    return any(component.is_alpha for component in frame.format.components) or stream.metadata.get("alpha_mode") == "1"


def import_av() -> Any:
    """The library ``av``.

    Raises:
        CogtuneError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise CogtuneError(f"PyAV cannot be imported: {error}", "install it: pip install av") from error
    return av


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.video.VideoStream]]:
    """The container and its first stream of moving pictures, ready to decode on the calling thread."""
    av = import_av()
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
        raise DamagedVideo(path, f"cannot be opened: {reason_of(error)}") from error
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


def reason_of(error: Exception) -> str:
    """What libav or the system says went wrong, without its number."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def _promised_frames(path: Path, stream: av.video.VideoStream) -> tuple[int, float]:
    """How many frames decoding will give: entries of the index, or packets, less those an edit list hides.

    Also the share of them that are unevenly spaced in time.
    """
    index = stream.index_entries
    if stream.frames and len(index) == stream.frames:
        times = [entry.timestamp for entry in index if not entry.is_discard]
        return len(times), _uneven(times)
    with opened(path) as (container, again):
        packets = (packet for packet in _demuxed(path, container, again) if packet.size and not packet.is_discard)
        maybe = [packet.dts if packet.pts is None else packet.pts for packet in packets]
    return len(maybe), _uneven(sorted(time for time in maybe if time is not None))


def _uneven(times: Sequence[int]) -> float:
    """The share of the gaps between rising times that are over a tenth, and over a tick, off the usual one."""
    gaps = [later - earlier for earlier, later in pairwise(times)]
    if len(set(gaps)) <= 1:
        return 0.0
    usual = sorted(gaps)[len(gaps) // 2]
    return sum(abs(gap - usual) > max(1, usual / 10) for gap in gaps) / len(gaps)


_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_BT2020_PRIMARIES = 9
"""Numbers of ITU-T H.273."""


def _hdr(context: Any) -> str:
    return _HDR_TRANSFERS.get(context.color_trc) or ("BT.2020" if context.color_primaries == _BT2020_PRIMARIES else "")


def _demuxed(path: Path, container: av.container.InputContainer, stream: av.video.VideoStream) -> Iterator[Any]:
    av = import_av()
    try:
        yield from container.demux(stream)
    except av.FFmpegError as error:
        raise DamagedVideo(path, f"cannot be read to its end: {reason_of(error)}") from error


def decoded_frames(
    path: Path, container: av.container.InputContainer, stream: av.video.VideoStream
) -> Iterator[av.VideoFrame]:
    """The frames of an opened clip from the first one on.

    Raises:
        DamagedVideo: at the first frame that cannot be decoded whole.
    """
    av = import_av()
    count = 0
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:  # the decoder guessed its missing parts, and what follows builds on them
                raise DamagedVideo(path, f"is damaged at frame {count}")
            yield frame
            count += 1
    except av.FFmpegError as error:
        raise DamagedVideo(path, f"cannot be decoded beyond frame {count}: {reason_of(error)}") from error


def _first_frame(path: Path, container: av.container.InputContainer, stream: av.video.VideoStream) -> av.VideoFrame:
    """A frame from the start of a clip: of its first packet alone if that will do, which spares those in the queue."""
    av = import_av()
    with contextlib.suppress(av.FFmpegError):
        packet = next(container.demux(stream))
        for frame in [*packet.decode(), *stream.codec_context.decode(None)]:
            if not frame.is_corrupt:
                return frame
    with opened(path) as (again, stream_again):
        for frame in decoded_frames(path, again, stream_again):
            return frame
    raise DamagedVideo(path, "has a video stream without a single frame")


def quarter_turns(frame: av.VideoFrame) -> int:
    """By how many quarters players turn a frame counterclockwise."""
    return round(frame.rotation / 90) % 4
