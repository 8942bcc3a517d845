"""Video files: opening and decoding them completely, with an error for each kind of damage.

Needs neither numpy nor torch, so that a process that only inspects clips starts at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cogtune.data.video.completeness import ends_with_jpeg, has_boxes, missing_part
from cogtune.data.video.numbered import as_clip
from cogtune.data.video.stamp import Stamp, check_unchanged
from cogtune.system.errors import CogtuneError, counted
from cogtune.system.files import open_regular
from cogtune.system.sniffing import HEAD, image_kind, sniff

if TYPE_CHECKING:
    import av.container
    import av.packet
    import av.video


class VideoError(CogtuneError):
    """A video file that cannot be used.

    ``code`` is that of its finding; ``reason`` continues the file's name.
    """

    code: ClassVar[str] = "damaged-video"
    advice: ClassVar[str] = "check whether it plays to its end; then encode it again, or remove it"

    def __init__(self, path: Path, reason: str, advice: str = "") -> None:
        super().__init__(f"{path} {reason}", advice or self.advice)
        self.reason = reason


class MissingVideo(VideoError):
    """A missing file."""

    code = "missing-video"
    advice = "check the path"


class EmptyVideo(VideoError):
    """An empty file."""

    code = "empty-video"
    advice = "copy or download it again"


class NotAVideo(VideoError):
    """A file in no format that the decoder knows."""

    code = "not-a-video"
    advice = "convert it to mp4 (H.264), or remove it"


class IsImage(NotAVideo):
    """A still."""

    def __init__(self, path: Path, what: str = "an image") -> None:
        super().__init__(path, f"is {what}, not a clip", f"if it is one of numbered images, {as_clip(path.name)}")


class NoVideoStream(VideoError):
    """A file with audio or data, but without video."""

    code = "no-video-stream"
    advice = "remove it"


class CutShort(VideoError):
    """An incomplete file, or one with too few frames."""

    code = "cut-short"
    advice = "copy or download it again"


class DamagedVideo(VideoError):
    """A file that opens, but cannot be decoded."""


class ChangesSize(DamagedVideo):
    """A file with frames of several sizes."""

    advice = "encode it again at one size with `ffmpeg -i IN OUT`, or remove it"


SPLIT_OR_JOIN = "split it, or join the files with FFmpeg: ffmpeg -f concat -i LIST.txt -c copy OUT.mp4"
"""What to do about files that are joined end to end."""


class CannotReadJoined(DamagedVideo):
    """Several files that are joined end to end, which cannot be decoded as one."""

    def __init__(self, path: Path, files: int, reason: str) -> None:
        super().__init__(path, f"is {files} files joined end to end, and {reason}", SPLIT_OR_JOIN)


@dataclass(frozen=True)
class VideoInfo:
    """A clip's properties.

    Args:
        num_frames: number of frames after decoding.
        fps: frames per second by their timestamps, without the pauses of an uneven clip.
        height, width: pixels of a frame as shown, ``mirrored`` and ``rotation`` applied.
        duration: seconds from the first frame to the end of the last, which counts as one of usual length.
        codec: its short name, such as ``h264``.
        pixel_format: how the file stores pixels, such as ``yuv420p``.
        rotation: degrees counterclockwise by which players rotate it: 0, 90, 180 or 270.
        pixel_aspect: width over height of one pixel as shown; 1.0 when square.
        bits: per channel.
        hdr: ``PQ``, ``HLG`` or ``BT.2020`` if its colours are HDR or wide-gamut; else empty.
        alpha: whether pixels can be transparent.
        uneven: fraction of the clip's time by which frames come sooner or later than usual.
        mirrored: whether players mirror it before they rotate it.
        interlaced: whether each frame has two fields.
        rate_told: whether the file has a frame rate; if not, ``fps`` is a guess.
        files: number of files that are joined end to end in this one; 1 is usual.
        trimmed: whether the container's cropping rectangle is applied.
        streams: number of video streams, without stills; the largest is read, or the first of these.
        times: seconds from the first frame to each, ascending; empty if they are evenly spaced at ``fps``.
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
    files: int = 1
    trimmed: bool = False
    streams: int = 1
    times: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VideoInfo:
        """Return the object from JSON of its ``dataclasses.asdict``."""
        return cls(**{**fields, "times": tuple(fields["times"])})

    def time_of(self, index: int) -> float:
        """Return when a frame is shown, in seconds from the first one."""
        return self.times[index] if self.times else index / self.fps


@dataclass(frozen=True)
class DecodeResult:
    """The result of decoding a whole clip.

    Args:
        frames: number of frames, including damaged ones.
        damaged: number of frames that the decoder had to conceal errors in.
        first_damaged: index of the first of these.
        failed: number of packets that gave an error, not a frame.
        failure: libav's message of the first of these errors.
        interlaced: whether any frame has two fields.
    """

    frames: int
    damaged: int = 0
    first_damaged: int = 0
    failed: int = 0
    failure: str = ""
    interlaced: bool = False


def decode_all(path: Path, tick: Callable[[], None] = lambda: None) -> DecodeResult:
    """Decode a clip completely, continuing after damage.

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
    """Check that decoding gave every declared frame without damage.

    Raises:
        DamagedVideo: frames are damaged or missing.
        CutShort: there are fewer frames than declared.
    """
    if decoded.damaged or decoded.failed:
        told = []
        if decoded.damaged:
            told.append(f"{decoded.damaged} of {decoded.frames} frames, first frame {decoded.first_damaged}")
        if decoded.failed:
            told.append(f"{decoded.failed} packets without a frame ({decoded.failure})")
        raise DamagedVideo(path, f"is damaged: {' and '.join(told)}")
    if decoded.frames < promised:
        raise CutShort(path, f"is incomplete: it declares {counted(promised, 'frame')} and gives {decoded.frames}")


# --------------------------------------------------------------------------------------------------- reading


def import_av() -> Any:
    """Return the library ``av``.

    Raises:
        CogtuneError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise CogtuneError(f"cannot import PyAV: {error}", "run `pip install av`") from error
    return av


@contextlib.contextmanager
def opened(
    path: Path, stamp: Stamp | None = None
) -> Iterator[tuple[av.container.InputContainer, av.video.VideoStream]]:
    """Open a clip's container and the best of its video streams, ready to decode on the calling thread.

    Raises:
        VideoError: it cannot be opened, or has no video.
        FileChanged: the file does not match ``stamp``.
    """
    av = import_av()
    if not path.is_file():
        raise MissingVideo(path, "is a folder" if path.is_dir() else "does not exist")
    try:
        with open_regular(path) as handle:
            length = os.fstat(handle.fileno()).st_size
            if length == 0:
                raise EmptyVideo(path, "is empty")
            start = handle.read(HEAD)
            if (instead := sniff(start)) is not None:  # FFmpeg would open whatever a list names
                raise NotAVideo(path, f"is {instead.what}, not a clip", instead.advice)
            if (kind := image_kind(start)) and kind != "an AVIF image":  # which may be an animation
                raise IsImage(path, kind)
            if missing := missing_part(handle, length):
                raise CutShort(path, f"is incomplete: {missing}")
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except av.InvalidDataError as error:
        if has_boxes(start):
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
            raise DamagedVideo(path, "uses a codec that this build of PyAV cannot decode")
        stream.codec_context.thread_count = 1
        yield container, stream


_OF_OTHER_FILES = frozenset({"concat", "dash", "hls", "imf", "sdp"})
"""FFmpeg's names of formats that refer to other files, which it would read wherever they are."""


def _is_animated_webp(path: Path) -> bool:
    """Return whether the header has the animation flag of the WebP container specification."""
    with path.open("rb") as file:
        head = file.read(21)
    return head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def moving_pictures(container: av.container.InputContainer) -> list[av.video.VideoStream]:
    """Return the video streams, best first: those that can be decoded, then by their number of pixels.

    Cover pictures are not among them; a film comes before its preview or poster.
    """
    kinds = import_av().stream.Disposition
    streams = [stream for stream in container.streams.video if not stream.disposition & kinds.attached_pic]
    return sorted(streams, key=_rank, reverse=True)


def count_films(container: av.container.InputContainer) -> int:
    """Return the number of video streams that can be decoded and are no stills."""
    return sum(_rank(stream)[:2] == (True, True) for stream in moving_pictures(container))


def _rank(stream: av.video.VideoStream) -> tuple[bool, bool, int]:
    """Return whether a stream can be decoded, whether it moves, and its number of pixels."""
    context: Any = stream.codec_context
    still = stream.frames == 1 or bool(stream.disposition & import_av().stream.Disposition.timed_thumbnails)
    return context is not None, not still, context.width * context.height if context is not None else 0


def reason_of(error: Exception) -> str:
    """Return the message of libav or the system, without its number."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def demuxed(
    path: Path, container: av.container.InputContainer, stream: av.video.VideoStream
) -> Iterator[av.packet.Packet[av.video.VideoStream]]:
    """Yield the packets of an opened clip, from the first key frame on if it has one, and a final empty one.

    Packets before a key frame refer to frames that were cut away, and give no picture.

    Raises:
        DamagedVideo: the file cannot be read completely.
        CutShort: it ends early.
    """
    av = import_av()
    leading: list[Any] | None = []
    end = 0
    try:
        for packet in container.demux(stream):
            end = packet.pos + packet.size if packet.pos is not None and packet.size else end
            if leading is None or packet.is_keyframe:
                leading = None
                yield packet
            else:
                leading.append(packet)
    except av.FFmpegError as error:
        if container.format.name != _MIME_PARTS or not ends_with_jpeg(path, end):
            raise DamagedVideo(path, f"cannot be read completely: {reason_of(error)}") from error
    else:
        if container.format.name == _MIME_PARTS and not ends_with_jpeg(path, end):
            raise CutShort(path, "is incomplete: it ends in the middle of a picture")
    yield from leading or ()


_MIME_PARTS = "mpjpeg"
"""FFmpeg's name of JPEGs as network cameras send them. To it, the last boundary is invalid, half a picture the end."""


def decoded_frames(
    path: Path, container: av.container.InputContainer, stream: av.video.VideoStream
) -> Iterator[av.VideoFrame]:
    """Yield the frames of an opened clip.

    Raises:
        DamagedVideo: a frame cannot be decoded without errors.
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
