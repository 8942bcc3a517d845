"""Cropping rectangles in containers, which PyAV cannot write."""

from __future__ import annotations

import re
import struct
from pathlib import Path


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
