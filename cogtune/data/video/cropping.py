"""Cropping rectangles of containers, which PyAV does not tell.

They are in Matroska's ``PixelCrop`` elements (RFC 9559) or in the ``clap`` box of MP4 and MOV (ISO/IEC 14496-12,
12.1.4). FFmpeg's own programs and players apply them, its decoders do not.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cogtune.data.video.parts import EBML, SEGMENT, Part, boxes, elements, named

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


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
        elif start[:4] == EBML:
            crops = _of_matroska(handle, length)
        else:
            return None
        return next((crop for number, crop in enumerate(crops) if number == video), None)
    return None


def _of_boxes(handle: BinaryIO, length: int) -> Iterator[Crop | None]:
    """Yield the clean aperture of each video track of an MP4 or MOV."""
    for moov in named(boxes(handle, 0, length), b"moov"):
        for track in named(boxes(handle, moov.start, moov.end), b"trak"):
            found = [track]
            for name in (b"mdia", b"minf"):
                found = [inner for part in found for inner in named(boxes(handle, part.start, part.end), name)]
            inside = [part for media in found for part in boxes(handle, media.start, media.end)]
            if any(part.name == b"vmhd" for part in inside):
                yield _clean_aperture(handle, [part for part in inside if part.name == b"stbl"])
        return  # FFmpeg reads the first index only


def _clean_aperture(handle: BinaryIO, tables: list[Part]) -> Crop | None:
    """Return the crop of the first sample entry."""
    for table in tables:
        for described in named(boxes(handle, table.start, table.end), b"stsd"):
            for entry in boxes(handle, described.start + 8, described.end):
                handle.seek(entry.start + 24)
                width, height = struct.unpack(">2H", handle.read(4))
                for box in named(boxes(handle, entry.start + 78, entry.end), b"clap"):
                    handle.seek(box.start)
                    numbers = struct.unpack(">IIIIiIiI", handle.read(32))
                    w, h, x, y = (Fraction(*numbers[place : place + 2]) for place in (0, 2, 4, 6))
                    left, top = x + (width - w) / 2, y + (height - h) / 2
                    return Crop(round(top), round(left), round(h), round(w))
                return None
    return None


_TRACKS, _TRACK, _VIDEO = 0x1654AE6B, 0xAE, 0xE0
_WIDTH, _HEIGHT, _BOTTOM, _TOP, _LEFT, _RIGHT = 0xB0, 0xBA, 0x54AA, 0x54BB, 0x54CC, 0x54DD


def _of_matroska(handle: BinaryIO, length: int) -> Iterator[Crop | None]:
    """Yield the crop of each video track of a Matroska or WebM file."""
    for segment in elements(handle, 0, length, SEGMENT):
        for tracks in elements(handle, segment.start, segment.end, _TRACKS):
            for track in elements(handle, tracks.start, tracks.end, _TRACK):
                for video in elements(handle, track.start, track.end, _VIDEO):
                    found = {}
                    for part in elements(handle, video.start, video.end):
                        handle.seek(part.start)
                        found[int.from_bytes(part.name, "big")] = int.from_bytes(
                            handle.read(min(8, part.end - part.start)), "big"
                        )
                    top, left = found.get(_TOP, 0), found.get(_LEFT, 0)
                    height = found.get(_HEIGHT, 0) - top - found.get(_BOTTOM, 0)
                    yield Crop(top, left, height, found.get(_WIDTH, 0) - left - found.get(_RIGHT, 0))
            return
