"""The parts that files of several containers consist of, as far as PyAV does not tell: where each begins and ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_MOST_PARTS = 100_000
"""Most boxes or chunks of one level that are read."""


@dataclass(frozen=True)
class Part:
    """A box, chunk or element: its name, and where its content begins and ends."""

    name: bytes
    start: int
    end: int


def boxes(handle: BinaryIO, start: int, end: int) -> Iterator[Part]:
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
        yield Part(name, begin, start + size)
        start += size


def chunks(handle: BinaryIO, start: int, _end: int) -> Iterator[Part]:
    """Yield the outer chunks of an AVI, each named by its form: ``AVI`` at the beginning, ``AVIX`` where it goes on."""
    for _ in range(_MOST_PARTS):
        handle.seek(start)
        header = handle.read(12)
        if len(header) < 12 or header[:4] != b"RIFF":
            return
        size = 8 + int.from_bytes(header[4:8], "little")
        yield Part(header[8:12], start + 12, start + size)
        start += size + size % 2


def objects(handle: BinaryIO, start: int, _end: int) -> Iterator[Part]:
    """Yield the top-level objects of an ASF (WMV)."""
    for _ in range(_MOST_PARTS):
        handle.seek(start)
        header = handle.read(24)
        size = int.from_bytes(header[16:24], "little")
        if len(header) < 24 or size < 24:
            return
        yield Part(header[:16], start + 24, start + size)
        start += size


FLV = b"FLV"
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")


def tags(handle: BinaryIO, start: int, _end: int) -> Iterator[Part]:
    """Yield the headers and tags of an FLV."""
    for _ in range(_MOST_PARTS):
        handle.seek(start)
        header = handle.read(11)
        if len(header) < 11:
            return
        if header[:3] == FLV:
            size = int.from_bytes(header[5:9], "big") + 4
            if size < 13:
                return
        elif header[0] & 0x1F in (8, 9, 18):
            size = 11 + int.from_bytes(header[1:4], "big") + 4
        else:
            return
        yield Part(header[:3], start + 11, start + size)
        start += size


EBML, SEGMENT, CLUSTER = b"\x1a\x45\xdf\xa3", 0x18538067, 0x1F43B675
"""IDs of Matroska's elements, RFC 9559; the first begins a file."""


def elements(handle: BinaryIO, start: int, end: int, wanted: int | None = None) -> Iterator[Part]:
    """Yield the EBML elements between two places, or those with the id ``wanted``, up to the first cluster."""
    for _ in range(_MOST_PARTS):
        part = _element(handle, start)
        if start >= end or part is None or int.from_bytes(part.name, "big") == CLUSTER:
            return
        stop = end if part.end == _UNKNOWN else min(end, part.end)
        if wanted is None or int.from_bytes(part.name, "big") == wanted:
            yield Part(part.name, part.start, stop)
        start = stop


def top_elements(handle: BinaryIO, start: int, _end: int) -> Iterator[Part]:
    """Yield the top-level elements of a Matroska file, and those inside an element of unknown size."""
    for _ in range(_MOST_PARTS):
        if (part := _element(handle, start)) is None:
            return
        yield part
        start = part.start if part.end == _UNKNOWN else part.end


_UNKNOWN = -1
"""The end of an element of unknown size, as a live stream has it."""


def _element(handle: BinaryIO, start: int) -> Part | None:
    """Return the EBML element at a place, which may end after the file; None if there is none."""
    handle.seek(start)
    header = handle.read(12)
    if len(header) < 2 or not header[0]:
        return None
    id_bytes = 9 - header[0].bit_length()
    rest = header[id_bytes:]
    if not rest or not rest[0]:
        return None
    size_bytes = 9 - rest[0].bit_length()
    size = int.from_bytes(rest[:size_bytes], "big") & ((1 << 7 * size_bytes) - 1)
    begin = start + id_bytes + size_bytes
    unknown = size == (1 << 7 * size_bytes) - 1
    return Part(header[:id_bytes], begin, _UNKNOWN if unknown else begin + size)


OGG = b"OggS"


def links(handle: BinaryIO, start: int, _end: int) -> Iterator[Part]:
    """Yield the first page of each link of an Ogg file; see RFC 3533, 4 and 6: its streams begin before all others."""
    beginning = False
    for _ in range(_MOST_PARTS):
        handle.seek(start)
        header = handle.read(27)
        if len(header) < 27 or header[:4] != OGG:
            return
        sizes = handle.read(header[26])
        stop = start + 27 + len(sizes) + sum(sizes)
        if header[5] & 2 and not beginning:
            yield Part(OGG, start, stop)
        beginning, start = bool(header[5] & 2), stop


def riff_chunks(handle: BinaryIO, start: int, end: int) -> Iterator[Part]:
    """Yield the chunks inside one of a RIFF file; the last may end after the file."""
    for _ in range(_MOST_PARTS):
        handle.seek(start)
        header = handle.read(8)
        if start >= end or len(header) < 8:
            return
        size = int.from_bytes(header[4:8], "little")
        yield Part(header[:4], start + 8, start + 8 + size)
        start += 8 + size + size % 2


def named(parts: Iterator[Part], name: bytes) -> Iterator[Part]:
    """Yield the parts of a name."""
    return (part for part in parts if part.name == name)
