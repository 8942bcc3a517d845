"""Whether a clip's file is one, and all of it: incomplete ones, and several that are joined end to end.

FFmpeg reads what there is of an incomplete file. Joining with ``cat`` makes one whose rest no index knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cogtune.data.video.parts import (
    ASF_HEADER,
    EBML,
    FLV,
    OGG,
    SEGMENT,
    Part,
    boxes,
    chunks,
    links,
    objects,
    riff_chunks,
    tags,
    top_elements,
)

# ----------------------------------------------------------------------------------------------- incomplete files


def has_boxes(start: bytes) -> bool:
    """Return whether a file begins like an MP4 or MOV."""
    return start[4:8] in _BOXES


def begins_like_clip(start: bytes) -> bool:
    """Return whether a file begins like a clip in one of the most common containers."""
    return has_boxes(start) or _is_avi(start) or start.startswith((EBML, OGG, FLV, ASF_HEADER))


def missing_part(handle: BinaryIO, length: int) -> str:
    """Return what is missing of an incomplete file of ``length`` bytes, by the sizes in it; else empty."""
    handle.seek(0)
    start = handle.read(16)
    if has_boxes(start):
        return _missing_boxes(handle, length)
    end = 0
    if start[:4] == EBML:
        end = max((part.end for part in _first_parts(handle, length) if _is_segment(part)), default=0)
    elif _is_avi(start):  # its outer size may be wrong by some bytes, which nobody notices
        outer = next(chunks(handle, 0, length))
        end = max((part.end for part in riff_chunks(handle, outer.start, outer.end)), default=0)
    return f"{end - length:,} of {end:,} bytes are missing" if end > length else ""


_MOST_BOUNDARY = 100
"""Bytes of a boundary that FFmpeg may count to the picture before it, where no header says how long that is."""
_MOST_EPILOGUE = 4096
"""Bytes after the last of several JPEGs in MIME parts: a boundary, and headers or text behind it."""


def ends_with_jpeg(path: Path, end: int) -> bool:
    """Return whether a JPEG ends at about byte ``end`` of a file, and no other one begins after it."""
    with path.open("rb") as file:
        file.seek(max(0, end - _MOST_BOUNDARY))
        rest = file.read(_MOST_BOUNDARY + _MOST_EPILOGUE + 1)
    _, ended, after = rest.rpartition(b"\xff\xd9")
    return bool(ended) and len(after) <= _MOST_EPILOGUE and b"\xff\xd8" not in after


def _first_parts(handle: BinaryIO, length: int) -> Iterator[Part]:
    """Yield the parts of a Matroska file up to its first segment."""
    for part in top_elements(handle, 0, length):
        yield part
        if _is_segment(part):
            return


def _is_segment(part: Part) -> bool:
    return int.from_bytes(part.name, "big") == SEGMENT


_BOXES = frozenset(b"ftyp moov mdat moof free skip wide uuid meta sidx mfra styp".split())


def _missing_boxes(handle: BinaryIO, length: int) -> str:
    """Return what is missing of an MP4 or MOV, which decoders report all frames for, or do not recognise."""
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
            return f"{position - length:,} of {position:,} bytes are missing"
    else:
        if not seen & {b"moov", b"moof", b"meta"}:  # a still (AVIF, HEIC) has the last alone
            return "it has no index, as its end was never written"
    return ""


# ----------------------------------------------------------------------------------------------- joined files


def files_in(handle: BinaryIO, length: int) -> int:
    """Return how many files of one format a file is made of, as ``cat a.mp4 b.mp4`` joins them; 1 is usual."""
    handle.seek(0)
    start = handle.read(_LONGEST)
    for is_format, parts, begins in _JOINABLE:
        if is_format(start):
            return max(1, sum(begins(part) for part in parts(handle, 0, length)))
    for beginning, size in _BEGINNINGS.items():
        if start.startswith(beginning):
            return max(1, _occurrences(handle, start[:size]))
    return 1


def _is_avi(start: bytes) -> bool:
    return start[:4] == b"RIFF" and start[8:12] == b"AVI "


_JOINABLE: tuple[
    tuple[Callable[[bytes], bool], Callable[[BinaryIO, int, int], Iterator[Part]], Callable[[Part], bool]], ...
] = (
    (lambda start: start[4:8] == b"ftyp", boxes, lambda part: part.name == b"ftyp"),
    (_is_avi, chunks, lambda part: part.name == b"AVI "),
    (lambda start: start[:16] == ASF_HEADER, objects, lambda part: part.name == ASF_HEADER),
    (lambda start: start[:3] == FLV, tags, lambda part: part.name == FLV),
    (lambda start: start[:4] == EBML, top_elements, lambda part: part.name == EBML),
    (lambda start: start[:4] == OGG, links, lambda part: part.name == OGG),
)
"""Formats of which FFmpeg reads the first file and may leave out the others: how each begins, and its parts."""

_BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": 8,
    b"nut/multimedia container\0": 25,
    b"YUV4MPEG2 ": 10,
    b"DKIF": 12,  # IVF: with its version, the length of its header, and the codec
    b".RMF\0\0\0": 7,
    bytes.fromhex("060e2b34020501010d0102010102"): 14,  # MXF's header partition
}
"""Other such formats, each with how many bytes of its beginning occur nowhere else in a file."""

_LONGEST = 32
_BLOCK = 1 << 20


def _occurrences(handle: BinaryIO, wanted: bytes) -> int:
    """Return how often a file contains ``wanted``."""
    handle.seek(0)
    count, tail = 0, b""
    while block := handle.read(_BLOCK):
        data = tail + block
        count += data.count(wanted)
        tail = data[-(len(wanted) - 1) :]
    return count
