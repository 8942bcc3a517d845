"""A container's own structure, as far as PyAV does not tell: files joined end to end, and cropping rectangles.

Joining with ``cat`` makes a file whose rest no index knows. A cropping rectangle is in Matroska's ``PixelCrop``
elements (RFC 9559) or in the ``clap`` box of MP4 and MOV (ISO/IEC 14496-12, 12.1.4); FFmpeg's own programs and players
apply it, its decoders do not.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MOST_PARTS = 100_000
"""Most boxes or chunks of one level that are read."""


@dataclass(frozen=True)
class Crop:
    """The part of a stored frame that is shown, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def apply(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return that part of a stored frame ``[H, W, 3]``."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]

    def fits(self, height: int, width: int) -> bool:
        """Return whether it is a smaller part of a frame of that size."""
        within = self.top >= 0 and self.left >= 0 and self.height > 0 and self.width > 0
        within = within and self.top + self.height <= height and self.left + self.width <= width
        return within and (self.height, self.width) != (height, width)


@dataclass(frozen=True)
class _Part:
    """A box, chunk or element: its name, and where its content begins and ends."""

    name: bytes
    start: int
    end: int


# ----------------------------------------------------------------------------------------------- joined files


def files_in(handle: BinaryIO, length: int) -> int:
    """Return how many files of one format a file is made of, as ``cat a.mp4 b.mp4`` joins them; 1 is usual."""
    handle.seek(0)
    start = handle.read(16)
    for is_format, parts, begins in _JOINABLE:
        if is_format(start):
            return max(1, sum(begins(part) for part in parts(handle, 0, length)))
    return 1


def _boxes(handle: BinaryIO, start: int, end: int) -> Iterator[_Part]:
    """Yield the boxes of an MP4 or MOV between two places; see ISO/IEC 14496-12, 4.2."""
    for _ in range(_MOST_PARTS):
        handle.seek(start)
        header = handle.read(16)
        if start + 8 > end or len(header) < 8:
            return
        size, name, begin = int.from_bytes(header[:4], "big"), header[4:8], start + 8
        if size == 1:
            size, begin = int.from_bytes(header[8:16], "big"), start + 16
        elif size == 0:
            size = end - start
        if size < begin - start or start + size > end:
            return
        yield _Part(name, begin, start + size)
        start += size


def _chunks(handle: BinaryIO, start: int, _end: int) -> Iterator[_Part]:
    """Yield the outer chunks of an AVI, each named by its form: ``AVI`` at the beginning, ``AVIX`` where it goes on."""
    for _ in range(_MOST_PARTS):
        handle.seek(start)
        header = handle.read(12)
        if len(header) < 12 or header[:4] != b"RIFF":
            return
        size = 8 + int.from_bytes(header[4:8], "little")
        yield _Part(header[8:12], start + 12, start + size)
        start += size + size % 2


def _objects(handle: BinaryIO, start: int, _end: int) -> Iterator[_Part]:
    """Yield the top-level objects of an ASF (WMV)."""
    for _ in range(_MOST_PARTS):
        handle.seek(start)
        header = handle.read(24)
        size = int.from_bytes(header[16:24], "little")
        if len(header) < 24 or size < 24:
            return
        yield _Part(header[:16], start + 24, start + size)
        start += size


def _tags(handle: BinaryIO, start: int, _end: int) -> Iterator[_Part]:
    """Yield the headers and tags of an FLV."""
    for _ in range(_MOST_PARTS):
        handle.seek(start)
        header = handle.read(11)
        if len(header) < 11:
            return
        if header[:3] == _FLV:
            size = int.from_bytes(header[5:9], "big") + 4
            if size < 13:
                return
        elif header[0] & 0x1F in (8, 9, 18):
            size = 11 + int.from_bytes(header[1:4], "big") + 4
        else:
            return
        yield _Part(header[:3], start + 11, start + size)
        start += size


_FLV = b"FLV"
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")

_JOINABLE: tuple[
    tuple[Callable[[bytes], bool], Callable[[BinaryIO, int, int], Iterator[_Part]], Callable[[_Part], bool]], ...
] = (
    (lambda start: start[4:8] == b"ftyp", _boxes, lambda part: part.name == b"ftyp"),
    (lambda start: start[:4] == b"RIFF" and start[8:12] == b"AVI ", _chunks, lambda part: part.name == b"AVI "),
    (lambda start: start == _ASF_HEADER, _objects, lambda part: part.name == _ASF_HEADER),
    (lambda start: start[:3] == _FLV, _tags, lambda part: part.name == _FLV),
)
"""Formats of which FFmpeg reads the first file and may leave out the others: how each begins, and its parts."""


# ----------------------------------------------------------------------------------------------- cropping


def crop_of(path: Path, video: int, size: tuple[int, int]) -> Crop | None:
    """Return the cropping rectangle of a video track; None if its whole frames are shown.

    Args:
        video: the track's number among the file's video tracks, from 0.
        size: height and width of a decoded frame; a rectangle that does not fit into it is ignored.
    """
    crop = _crop_told(path, video)
    return crop if crop is not None and crop.fits(*size) else None


def _crop_told(path: Path, video: int) -> Crop | None:
    with contextlib.suppress(OSError, ValueError, ArithmeticError, struct.error), path.open("rb") as handle:
        length = handle.seek(0, 2)
        handle.seek(0)
        start = handle.read(16)
        if start[4:8] in (b"ftyp", b"moov", b"wide", b"mdat", b"free", b"skip"):
            crops = _of_boxes(handle, length)
        elif start[:4] == _EBML:
            crops = _of_matroska(handle, length)
        else:
            return None
        return next((crop for number, crop in enumerate(crops) if number == video), None)
    return None


def _of_boxes(handle: BinaryIO, length: int) -> Iterator[Crop | None]:
    """Yield the clean aperture of each video track of an MP4 or MOV."""
    for moov in _named(_boxes(handle, 0, length), b"moov"):
        for track in _named(_boxes(handle, moov.start, moov.end), b"trak"):
            found = [track]
            for name in (b"mdia", b"minf"):
                found = [inner for part in found for inner in _named(_boxes(handle, part.start, part.end), name)]
            inside = [part for media in found for part in _boxes(handle, media.start, media.end)]
            if any(part.name == b"vmhd" for part in inside):
                yield _clean_aperture(handle, [part for part in inside if part.name == b"stbl"])
        return  # FFmpeg reads the first index only


def _clean_aperture(handle: BinaryIO, tables: list[_Part]) -> Crop | None:
    """Return the crop of the first sample entry."""
    for table in tables:
        for described in _named(_boxes(handle, table.start, table.end), b"stsd"):
            for entry in _boxes(handle, described.start + 8, described.end):
                handle.seek(entry.start + 24)
                width, height = struct.unpack(">2H", handle.read(4))
                for box in _named(_boxes(handle, entry.start + 78, entry.end), b"clap"):
                    handle.seek(box.start)
                    numbers = struct.unpack(">IIIIiIiI", handle.read(32))
                    w, h, x, y = (Fraction(*numbers[place : place + 2]) for place in (0, 2, 4, 6))
                    left, top = x + (width - w) / 2, y + (height - h) / 2
                    return Crop(round(top), round(left), round(h), round(w))
                return None
    return None


_EBML, _SEGMENT, _TRACKS, _TRACK, _CLUSTER = b"\x1a\x45\xdf\xa3", 0x18538067, 0x1654AE6B, 0xAE, 0x1F43B675
_VIDEO, _WIDTH, _HEIGHT, _BOTTOM, _TOP, _LEFT, _RIGHT = 0xE0, 0xB0, 0xBA, 0x54AA, 0x54BB, 0x54CC, 0x54DD


def _of_matroska(handle: BinaryIO, length: int) -> Iterator[Crop | None]:
    """Yield the crop of each video track of a Matroska or WebM file."""
    for segment in _elements(handle, 0, length, _SEGMENT):
        for tracks in _elements(handle, segment.start, segment.end, _TRACKS):
            for track in _elements(handle, tracks.start, tracks.end, _TRACK):
                for video in _elements(handle, track.start, track.end, _VIDEO):
                    found = {}
                    for part in _elements(handle, video.start, video.end):
                        handle.seek(part.start)
                        found[int.from_bytes(part.name, "big")] = int.from_bytes(
                            handle.read(min(8, part.end - part.start)), "big"
                        )
                    top, left = found.get(_TOP, 0), found.get(_LEFT, 0)
                    height = found.get(_HEIGHT, 0) - top - found.get(_BOTTOM, 0)
                    yield Crop(top, left, height, found.get(_WIDTH, 0) - left - found.get(_RIGHT, 0))
            return


def _elements(handle: BinaryIO, start: int, end: int, wanted: int | None = None) -> Iterator[_Part]:
    """Yield the EBML elements between two places, or those with the id ``wanted``, up to the first cluster."""
    for _ in range(_MOST_PARTS):
        handle.seek(start)
        header = handle.read(12)
        if start >= end or len(header) < 2 or not header[0]:
            return
        id_bytes = 9 - header[0].bit_length()
        name = header[:id_bytes]
        rest = header[id_bytes:]
        if int.from_bytes(name, "big") == _CLUSTER or not rest or not rest[0]:
            return
        size_bytes = 9 - rest[0].bit_length()
        size = int.from_bytes(rest[:size_bytes], "big") & ((1 << 7 * size_bytes) - 1)
        begin = start + id_bytes + size_bytes
        unknown = size == (1 << 7 * size_bytes) - 1
        stop = end if unknown else min(end, begin + size)
        if wanted is None or int.from_bytes(name, "big") == wanted:
            yield _Part(name, begin, stop)
        start = stop


def _named(parts: Iterator[_Part], name: bytes) -> Iterator[_Part]:
    return (part for part in parts if part.name == name)
