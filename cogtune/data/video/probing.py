"""Probing a clip: its size, colours and orientation from one frame, the number and times of its frames from packets.

Packets are not frames: some contain a frame that is never shown, some half a frame, and some cannot be decoded because
the frames that they refer to were cut away. If the packets are ambiguous, the clip is decoded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.data.video.completeness import files_in
from cogtune.data.video.container import (
    CannotReadJoined,
    DamagedVideo,
    IsImage,
    VideoInfo,
    count_films,
    decoded_frames,
    demuxed,
    import_av,
    opened,
)
from cogtune.data.video.cropping import crop_of
from cogtune.data.video.orientation import orientation_of
from cogtune.data.video.timing import Timing, measure
from cogtune.system.files import open_regular

if TYPE_CHECKING:
    import av.container
    import av.packet
    import av.video


def probe(path: Path, tick: Callable[[], None] = lambda: None) -> VideoInfo:
    """Return the properties of a clip, from its container and first frame, or from all frames if necessary.

    Args:
        tick: called again and again while frames come.

    Raises:
        VideoError: the clip is missing, empty, not a video, incomplete or damaged.
    """
    try:
        return _probe(path, tick)
    except DamagedVideo as error:
        if (files := _files_in(path)) > 1:
            raise CannotReadJoined(path, files, error.reason) from error
        raise


def _probe(path: Path, tick: Callable[[], None]) -> VideoInfo:
    with opened(path) as (container, stream):
        start = _start(path, container, stream)
        frame = start.frame
        count, ticks = _shown_frames(path, container, stream, start, tick)
        if count == 1 and _is_picture(path, container):
            raise IsImage(path)
        bare = bool(container.format.flags & import_av().format.Flags.no_timestamps.value)
        timing = _told_timing(stream) if bare else _timing(stream, count, ticks)
        shown = orientation_of(frame)
        crop = crop_of(path, container.streams.video.index(stream), (frame.height, frame.width))
        height, width = (crop.height, crop.width) if crop else (frame.height, frame.width)
        if shown.on_its_side:
            height, width = width, height
        aspect = float(stream.sample_aspect_ratio or 1)
        return VideoInfo(
            num_frames=count,
            fps=timing.fps,
            height=height,
            width=width,
            duration=round((timing.times[-1] if timing.times else (count - 1) / timing.fps) + 1 / timing.fps, 6),
            codec=stream.codec_context.codec.canonical_name,
            pixel_format=frame.format.name,
            rotation=90 * shown.turns,
            pixel_aspect=1 / aspect if shown.on_its_side else aspect,
            bits=max(component.bits for component in frame.format.components),
            hdr=_hdr(stream.codec_context),
            alpha=_has_alpha(frame, stream),
            uneven=timing.uneven,
            mirrored=shown.mirrored,
            interlaced=_is_interlaced(path, container, stream, frame),
            rate_told=not bare or bool(stream.codec_context.framerate),
            files=_files_in(path),
            trimmed=crop is not None,
            streams=count_films(container),
            times=timing.times,
        )


def _is_picture(path: Path, container: av.container.InputContainer) -> bool:
    """Return whether a file of one frame is a still: by its format, or by its name if clips have that format, too."""
    name = container.format.name
    return name in ("ico", "image2") or name.endswith("_pipe") or path.suffix.lower() in _STILLS_IN_MP4


_STILLS_IN_MP4 = (".avif", ".heic", ".heif")
"""Suffixes of images in the container of clips."""


def _files_in(path: Path) -> int:
    with open_regular(path) as handle:
        return files_in(handle, os.fstat(handle.fileno()).st_size)


_PROGRESSIVE = frozenset({"av1", "gif", "png", "apng", "theora", "vp8", "vp9", "webp"})
"""Codecs without interlacing."""


def _is_interlaced(
    path: Path, container: av.container.InputContainer, stream: av.video.VideoStream, first: av.VideoFrame
) -> bool:
    """Return whether the first frame, or one from the middle, is interlaced: the beginning may be a title."""
    if first.interlaced_frame or stream.codec_context.codec.canonical_name in _PROGRESSIVE or not stream.duration:
        return bool(first.interlaced_frame)
    av = import_av()
    with contextlib.suppress(
        av.FFmpegError, DamagedVideo, StopIteration
    ):  # what is damaged is found by whoever looks for it
        container.seek((stream.start_time or 0) + stream.duration // 2, stream=stream)
        packet = next(demuxed(path, container, stream))
        return any(frame.interlaced_frame for frame in [*packet.decode(), *stream.codec_context.decode(None)])
    return False


_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_BT2020_PRIMARIES = 9
"""Numbers from ITU-T H.273."""


def _hdr(context: Any) -> str:
    return _HDR_TRANSFERS.get(context.color_trc) or ("BT.2020" if context.color_primaries == _BT2020_PRIMARIES else "")


def _has_alpha(frame: av.VideoFrame, stream: av.video.VideoStream) -> bool:
    """Return whether pixels have an opacity; WebM stores it separately and declares it in a tag.

    Every GIF is decoded with one, so its first frame must have a transparent pixel.
    """
    if frame.format.name == "bgra" and stream.codec_context.name == "gif":
        plane, length = memoryview(frame.planes[0]), frame.planes[0].line_size
        rows = range(0, frame.height * length, length)
        return any(min(plane[row + 3 : row + 4 * frame.width : 4]) < 255 for row in rows)
    return any(component.is_alpha for component in frame.format.components) or stream.metadata.get("alpha_mode") == "1"


# ---------------------------------------------------------------------------------------------- the first frame


@dataclass(frozen=True)
class _Start:
    """A clip's beginning.

    Args:
        frame: its first complete frame.
        clean: whether its first packet is a key frame, and its second one is shown after it.
    """

    frame: av.VideoFrame
    clean: bool


def _start(path: Path, container: av.container.InputContainer, stream: av.video.VideoStream) -> _Start:
    """Return a clip's beginning, from only its first packets if possible, which avoids decoding queued frames."""
    av = import_av()
    with contextlib.suppress(av.FFmpegError):
        packets = container.demux(stream)
        first = next(packets)
        for frame in [*first.decode(), *stream.codec_context.decode(None)]:
            if not frame.is_corrupt:
                # frames that build on what was cut away come right after the first key frame, and are shown before it
                second = next(packets)
                later = first.pts is not None and second.pts is not None and second.pts > first.pts
                return _Start(frame, first.is_keyframe and (later or not second.size))
    with opened(path) as (again, stream_again):
        for frame in decoded_frames(path, again, stream_again):
            return _Start(frame, False)
    raise DamagedVideo(path, "has a video stream without frames")


# ------------------------------------------------------------------------------------------- counting frames


def _shown_frames(
    path: Path,
    container: av.container.InputContainer,
    stream: av.video.VideoStream,
    start: _Start,
    tick: Callable[[], None],
) -> tuple[int, Sequence[int]]:
    """Return the number of frames after decoding, and their timestamps in ticks, ascending.

    The timestamps are empty if they cannot be matched to the frames.
    """
    codec = stream.codec_context.codec
    in_mp4 = "mp4" in container.format.name
    reliable = start.clean and (codec.intra_only or codec.canonical_name in _FRAMES_AS_PACKETS or in_mp4)
    index = stream.index_entries
    if (
        reliable
        and stream.frames
        and len(index) == stream.frames
        and codec.canonical_name not in _SHOWN
        and all(entry.size for entry in index)
    ):
        times = [entry.timestamp for entry in index if not entry.is_discard]
        timing = measure(times, _tick_of(stream))
        if timing is None or not timing.times:  # else these are times of decoding, and not those of showing
            return len(times), times
    shown = _shown_packets(path, codec.canonical_name, tick)
    stamps = sorted(packet.time for packet in shown if packet.time is not None)
    keys = [packet.time for packet in shown if packet.is_key and packet.time is not None]
    in_order = len(set(stamps)) == len(shown) and keys == sorted(keys)  # else the clock was set back
    whole_packets = in_mp4 or not start.frame.interlaced_frame  # else each field of a frame may be a packet
    if reliable and whole_packets and in_order and stamps[0] == shown[0].time:
        return len(shown), stamps
    frames = _decoded_times(path, tick)
    if in_order and len(stamps) == len(frames):  # not every container lets the decoder know these
        return len(frames), stamps
    known = [time for time in frames if time is not None]
    return len(frames), known if len(known) == len(frames) else ()


_FRAMES_AS_PACKETS = frozenset({"h264", "hevc", "vp8", "vp9", "av1"})
"""Codecs with one frame per packet in any container, except for those checked here; others may pack several in one, or
leave one empty. Intra-only codecs do neither."""


@dataclass(frozen=True)
class _Packet:
    """A packet's timestamp, if known, and whether it is a key frame."""

    time: int | None
    is_key: bool


def _shown_packets(path: Path, codec: str, tick: Callable[[], None]) -> list[_Packet]:
    """Return the packets with a frame that is shown."""
    is_shown: Callable[[Any], bool] = _SHOWN.get(codec, lambda _: True)
    with opened(path) as (container, stream):
        found = []
        for packet in demuxed(path, container, stream):
            tick()
            if packet.size and not packet.is_discard and is_shown(packet):
                found.append(_Packet(packet.pts, packet.is_keyframe))
        return found


def _decoded_times(path: Path, tick: Callable[[], None]) -> list[int | None]:
    """Return the timestamp of each decoded frame."""
    with opened(path) as (container, stream):
        times = []
        for frame in decoded_frames(path, container, stream):
            tick()
            times.append(frame.pts)
        return times


def _vp8_is_shown(packet: Any) -> bool:
    """Return the bit ``show_frame``, from RFC 6386, section 9.1."""
    return bool(memoryview(packet)[0] & 0x10)


def _vp9_is_shown(packet: Any) -> bool:
    """Return whether a packet shows a frame: by its uncompressed header, or since it is a superframe.

    Source: VP9 bitstream specification, 6.2 and annex B.
    """
    data = memoryview(packet)
    marker = data[-1]
    length = 2 + ((marker >> 3 & 3) + 1) * ((marker & 7) + 1)
    if marker & 0xE0 == 0xC0 and len(data) >= length and data[-length] == marker:
        return True
    place = 2 if data[0] & 0x30 == 0x30 else 3  # profile 3 has a reserved bit before it
    existing, shown = data[0] >> place & 1, data[0] >> (place - 2) & 1
    return bool(existing or shown)


_SHOWN: dict[str, Callable[[Any], bool]] = {"vp8": _vp8_is_shown, "vp9": _vp9_is_shown}
"""For codecs with frames that are never shown: whether a packet's frame is shown."""


# ---------------------------------------------------------------------------------------------------- times


def _tick_of(stream: av.video.VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 1000)


def _told_timing(stream: av.video.VideoStream) -> Timing:
    """Return the timing of a stream without a container, whose timestamps libav makes up: the rate in its header.

    Without one, it is libav's default.
    """
    return Timing(float(stream.codec_context.framerate or stream.average_rate or stream.guessed_rate or 1))


def _timing(stream: av.video.VideoStream, count: int, ticks: Sequence[int]) -> Timing:
    """Return the timing by timestamps, or without usable ones that of the container."""
    claimed = (stream.average_rate, stream.guessed_rate)
    timing = measure(ticks, _tick_of(stream), claimed)
    if timing is not None:
        return timing
    duration = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    rate = claimed[0] or (None if count == 1 else claimed[1])
    return Timing(float(rate) if rate else count / duration if duration else 1.0)
