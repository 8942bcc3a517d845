"""What a video file is: opened, probed and decoded to its end, with every way in which it can be broken named.

Nothing here needs numpy or torch, so that a process that only looks at clips starts at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from cogtune.data.video.stamp import Stamp, check_unchanged
from cogtune.system.errors import CogtuneError, counted
from cogtune.system.files import open_regular
from cogtune.system.sniffing import HEAD, sniff

if TYPE_CHECKING:
    import av.container
    import av.packet
    import av.video


class VideoError(CogtuneError):
    """A video file that cannot be used.

    ``code`` is the finding it stands for; ``reason`` goes on where the file's name ends.
    """

    code: ClassVar[str] = "damaged-video"
    advice: ClassVar[str] = "play it to see whether it is whole; then encode it again, or leave it out"

    def __init__(self, path: Path, reason: str, advice: str = "") -> None:
        super().__init__(f"{path} {reason}", advice or self.advice)
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


class ChangesSize(DamagedVideo):
    """The frames are not all of one size."""

    advice = "encode it again at one size (`ffmpeg -i IN OUT` does), or leave it out"


@dataclass(frozen=True)
class VideoInfo:
    """What a clip is.

    Args:
        num_frames: frames that decoding gives.
        fps: frames a second by their timestamps; of an uneven clip, outside its pauses.
        height, width: pixels of a frame as shown, ``mirrored`` and ``rotation`` applied.
        duration: seconds from the first frame to the end of the last, which counts as long as the usual one.
        codec: its short name, such as ``h264``.
        pixel_format: how the file stores pixels, such as ``yuv420p``.
        rotation: degrees counterclockwise by which players turn it: 0, 90, 180 or 270.
        pixel_aspect: width over height of one pixel as shown; 1.0 when square.
        bits: of one colour of one pixel.
        hdr: ``PQ``, ``HLG`` or ``BT.2020`` when its colours are meant for a brighter or wider screen; else empty.
        alpha: whether the pixels can be see-through.
        uneven: share (0 to 1) of the clip's time by which frames come sooner or later than is usual in it.
        mirrored: whether players change left and right, before they turn it.
        interlaced: whether each frame holds the rows of two moments.
        rate_told: whether the file says anything of time; if not, ``fps`` is a guess.
        times: seconds from the first frame to each, rising; empty when they are evenly spaced at ``fps``.
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
    mirrored: bool = False
    interlaced: bool = False
    rate_told: bool = True
    times: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VideoInfo:
        """Return what ``dataclasses.asdict`` gave, read back from JSON."""
        return cls(**{**fields, "times": tuple(fields["times"])})

    def time_of(self, index: int) -> float:
        """When a frame is shown, in seconds from the first one on."""
        return self.times[index] if self.times else index / self.fps


@dataclass(frozen=True)
class DecodeResult:
    """What decoding a whole clip gave.

    Args:
        frames: that came out, damaged ones too.
        damaged: of them, those that the decoder had to guess in part.
        first_damaged: index of the first of these.
        failed: packets that gave an error in place of a frame.
        failure: the first of these errors, in libav's words.
        interlaced: whether any frame holds the rows of two moments.
    """

    frames: int
    damaged: int = 0
    first_damaged: int = 0
    failed: int = 0
    failure: str = ""
    interlaced: bool = False


def decode_all(path: Path, tick: Callable[[], None] = lambda: None) -> DecodeResult:
    """Decode a clip to its end, going on after what is damaged.

    Args:
        tick: called again and again while frames come.

    Raises:
        VideoError: the clip cannot be opened or read to its end, or its frames are not all of one size.
    """
    av = import_av()
    frames = damaged = first_damaged = failed = 0
    failure = ""
    interlaced = False
    shape = None
    with opened(path) as (container, stream):
        for packet in demuxed(path, container, stream):
            tick()
            try:
                pictures = packet.decode()
            except av.FFmpegError as error:
                failed, failure = failed + 1, failure or reason_of(error)
                continue
            for picture in pictures:
                shape = shape or (picture.width, picture.height)
                if (picture.width, picture.height) != shape:
                    raise ChangesSize(path, f"changes its frame size at frame {frames}")
                if picture.is_corrupt:
                    first_damaged = first_damaged if damaged else frames
                    damaged += 1
                interlaced = interlaced or bool(picture.interlaced_frame)
                frames += 1
    return DecodeResult(frames, damaged, first_damaged, failed, failure, interlaced)


def check_decoded(path: Path, promised: int, decoded: DecodeResult) -> None:
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
        raise CutShort(path, f"is cut short: it promises {counted(promised, 'frame')} and gives {decoded.frames}")


# --------------------------------------------------------------------------------------------------- reading


def import_av() -> Any:
    """Return the library ``av``.

    Raises:
        CogtuneError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise CogtuneError(f"PyAV cannot be imported: {error}", "install it: pip install av") from error
    return av


@contextlib.contextmanager
def opened(
    path: Path, stamp: Stamp | None = None
) -> Iterator[tuple[av.container.InputContainer, av.video.VideoStream]]:
    """Open a clip's container and the best of its video streams, ready to decode on the calling thread.

    Raises:
        VideoError: it cannot be opened, or holds no moving pictures.
        FileChanged: it is another file than the one that stood at ``stamp``.
    """
    av = import_av()
    if not path.is_file():
        raise MissingVideo(path, "is a folder" if path.is_dir() else "is not there")
    try:
        with open_regular(path) as handle:
            length = os.fstat(handle.fileno()).st_size
            if length == 0:
                raise EmptyVideo(path, "is empty")
            if (instead := sniff(handle.read(HEAD))) is not None:  # FFmpeg would open whatever a list names
                raise NotAVideo(path, f"is {instead.what}, not a clip", instead.advice)
            has_boxes = _check_boxes(path, handle, length)
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except av.InvalidDataError as error:
        if has_boxes:
            raise DamagedVideo(path, "cannot be opened: its header is damaged") from error
        raise NotAVideo(path, "is not a video") from error
    except (OSError, av.FFmpegError) as error:
        raise DamagedVideo(path, f"cannot be opened: {reason_of(error)}") from error
    with container:
        check_unchanged(path, stamp)
        if container.format.name in _OF_OTHER_FILES:
            raise NotAVideo(path, "is a list of other files, not a clip")
        if container.format.name == "webp_pipe" and _is_animated_webp(path):
            raise NotAVideo(path, "is an animated WebP, which this build of PyAV cannot decode")
        if not (streams := moving_pictures(container)):
            raise NoVideoStream(path, "has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise DamagedVideo(path, "is in a codec that this build of PyAV cannot decode")
        stream.codec_context.thread_count = 1
        yield container, stream


_OF_OTHER_FILES = frozenset({"concat", "dash", "hls", "imf", "sdp"})
"""What FFmpeg calls formats that name other files, which would be read wherever they are."""


def _is_animated_webp(path: Path) -> bool:
    """Return whether the header has the flag for animation of the WebP container specification."""
    with path.open("rb") as file:
        head = file.read(21)
    return head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def moving_pictures(container: av.container.InputContainer) -> list[av.video.VideoStream]:
    """Return the streams of moving pictures, best first: those that can be decoded, then by their pixels.

    A cover picture is none of them; of what may be a preview, a poster and the film itself, the film comes first.
    """
    kinds = import_av().stream.Disposition
    streams = [stream for stream in container.streams.video if not stream.disposition & kinds.attached_pic]

    def rank(stream: av.video.VideoStream) -> tuple[bool, bool, int]:
        context: Any = stream.codec_context
        still = stream.frames == 1 or bool(stream.disposition & kinds.timed_thumbnails)
        return context is not None, not still, context.width * context.height if context is not None else 0

    return sorted(streams, key=rank, reverse=True)


_BOXES = frozenset(b"ftyp moov mdat moof free skip wide uuid meta sidx mfra styp".split())


def _check_boxes(path: Path, handle: BinaryIO, length: int) -> bool:
    """Return whether the file is an MP4 or MOV; if so, its boxes must be complete.

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
        if not seen & {b"moov", b"moof", b"meta"}:  # a still (AVIF, HEIC) has the last alone
            raise CutShort(path, "is cut short: it has no index (the end of the file was never written)")
    return bool(seen)


def reason_of(error: Exception) -> str:
    """Return what libav or the system says went wrong, without its number."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def demuxed(
    path: Path, container: av.container.InputContainer, stream: av.video.VideoStream
) -> Iterator[av.packet.Packet[av.video.VideoStream]]:
    """Yield the packets of an opened clip, from the first key frame on if it has one, and the empty one that ends them.

    What comes before a key frame builds on frames that were cut away, and gives no picture.

    Raises:
        DamagedVideo: the file cannot be read to its end.
    """
    av = import_av()
    leading: list[Any] | None = []
    try:
        for packet in container.demux(stream):
            if leading is None or packet.is_keyframe:
                leading = None
                yield packet
            else:
                leading.append(packet)
    except av.FFmpegError as error:
        raise DamagedVideo(path, f"cannot be read to its end: {reason_of(error)}") from error
    yield from leading or ()


def decoded_frames(
    path: Path, container: av.container.InputContainer, stream: av.video.VideoStream
) -> Iterator[av.VideoFrame]:
    """Yield the frames of an opened clip from the first one on.

    Raises:
        DamagedVideo: at the first frame that cannot be decoded whole.
    """
    av = import_av()
    count = 0
    for packet in demuxed(path, container, stream):
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            raise DamagedVideo(path, f"cannot be decoded beyond frame {count}: {reason_of(error)}") from error
        for frame in frames:
            if frame.is_corrupt:  # the decoder guessed its missing parts, and what follows builds on them
                raise DamagedVideo(path, f"is damaged at frame {count}")
            yield frame
            count += 1
