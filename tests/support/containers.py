"""Clips in containers of all kinds, and cropping rectangles in them, which PyAV cannot write."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import av
import numpy as np

from cogtune.data.video.clips import write_video

HEIGHT, WIDTH = 64, 96

_ENCODERS = {
    ".wmv": ("wmv2", "yuv420p"),
    ".avi": ("mpeg4", "yuv420p"),
    ".flv": ("flv", "yuv420p"),
    ".webm": ("libvpx-vp9", "yuv420p"),
    ".ogv": ("libvpx", "yuv420p"),
    ".nut": ("mpeg4", "yuv420p"),
    ".y4m": ("wrapped_avframe", "yuv420p"),
    ".apng": ("apng", "rgb24"),
    ".ivf": ("libvpx-vp9", "yuv420p"),
    ".rm": ("rv10", "yuv420p"),
}
_FORMATS = {".ogv": "ogg", ".y4m": "yuv4mpegpipe"}


def picture() -> np.ndarray:
    across, down = np.meshgrid(np.arange(WIDTH) * 2, np.arange(HEIGHT) * 3)
    return np.stack([across, down, np.full_like(across, 128)], axis=-1).astype(np.uint8)


def clip(path: Path, *, streams: int = 1) -> Path:
    """A clip in the container that the suffix names, of 12 frames at 8 per second.

    Args:
        streams: number of video streams, if the codec need not be told.
    """
    if path.suffix in _ENCODERS:
        codec, pixel_format = _ENCODERS[path.suffix]
        with av.open(str(path), "w", format=_FORMATS.get(path.suffix)) as made:
            stream = made.add_stream(codec, rate=8)
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixel_format
            for number in range(12):
                frame = av.VideoFrame.from_ndarray(picture(), format="rgb24").reformat(format=pixel_format)
                frame.pts = number
                made.mux(stream.encode(frame))
            made.mux(stream.encode(None))
        return path
    plain = path.with_name("plain.part")
    write_video(plain, [picture()] * 12, 8)
    options = {"movflags": "frag_keyframe+empty_moov"} if path.stem == "fragments" else {}
    options |= {"live": "1"} if path.stem == "live" else {}
    with av.open(str(plain)) as source, av.open(str(path), "w", options=options) as copy:
        copies = [copy.add_stream_from_template(source.streams.video[0]) for _ in range(streams)]
        for stream in copies:
            source.seek(0)
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    copy.mux(packet)
    plain.unlink()
    return path


def with_clean_aperture(path: Path, content: bytes) -> Path:
    """An MP4 whose index, which is at its end, has a ``clap`` box after the codec's header."""
    data = bytearray(path.read_bytes())
    clap = struct.pack(">I", 8 + len(content)) + b"clap" + content
    place = data.rindex(b"moov")
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1", b"avcC"):
        place = data.index(name, place)
        size = int.from_bytes(data[place - 4 : place], "big")
        if name != b"avcC":
            data[place - 4 : place] = struct.pack(">I", size + len(clap))
    data[place - 4 + size : place - 4 + size] = clap
    path.write_bytes(data)
    return path


def with_pixel_crop(path: Path, bottom: int, top: int, left: int, right: int) -> Path:
    """A Matroska file with cropping elements in place of its colours."""
    data = path.read_bytes()
    # the element of colours with one of its own first: the random numbers of a file may have its two bytes, too
    found = re.search(rb"\x55\xb0[\x80-\xfe]\x55[\xb1-\xbd]", data)
    assert found is not None
    begin = found.start()
    length = data[begin + 2] & 0x7F
    sides = zip((0xAA, 0xBB, 0xCC, 0xDD), (bottom, top, left, right), strict=True)
    crop = b"".join(bytes((0x54, side, 0x81, pixels)) for side, pixels in sides)
    void = 3 + length - len(crop) - 2
    assert void >= 0, "there is no room for the elements"
    path.write_bytes(data[:begin] + crop + bytes((0xEC, 0x80 | void)) + bytes(void) + data[begin + 3 + length :])
    return path


# 48 x 64 pixels, the middle of which lies 4 pixels to the left of the frame's and 2 below it
CLAP = struct.pack(">IIIIiIiI", 64, 1, 48, 1, -4, 1, 2, 1)
