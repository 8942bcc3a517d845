"""The lines of a text file, for every list and table alike: so a list of prompts has the lines that a dataset's has.

Lines end in LF, CRLF or CR, and nothing else: not in U+2028 or U+0085, which may stand inside a caption.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

MARKS_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_utf16(data: bytes) -> bool:
    """Return whether a text file says that it is UTF-16 (or UTF-32)."""
    return data.startswith(MARKS_UTF16)


def raw_lines(data: bytes, *, keepends: bool = False) -> list[bytes]:
    """Return the lines of a text file as bytes, without its byte order mark."""
    return data.removeprefix(codecs.BOM_UTF8).splitlines(keepends)


def lines_of(data: bytes) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Each line by its number, from 1: its text without surrounding blanks, or what is not UTF-8 in it."""
    for number, raw in enumerate(raw_lines(data), start=1):
        try:
            yield number, raw.decode().strip()
        except UnicodeDecodeError as error:
            yield number, error


def listed_lines(data: bytes) -> list[str | UnicodeDecodeError]:
    """Return the lines of a list, blank ones at its end left out."""
    lines = [line for _, line in lines_of(data)]
    while lines and lines[-1] == "":
        lines.pop()
    return lines


def is_unicode(text: str) -> bool:
    """Return whether ``text`` is whole: JSON and file names may hold half a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
