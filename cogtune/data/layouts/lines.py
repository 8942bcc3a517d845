"""The lines of a text file, for every list and table alike: so a list of prompts has the lines that a dataset's has.

Lines end in LF, CRLF or CR, and nothing else: not in U+2028 or U+0085, which may stand inside a caption.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class NotTextError(ValueError):
    """Bytes that are no text; what is wrong with them, to stand behind the file's name."""


def as_utf8(data: bytes, *, is_whole: bool = True) -> tuple[bytes, str]:
    """Turn a text file's bytes into UTF-8, if its byte order mark says that they are something else.

    Args:
        is_whole: False for the beginning of a file, which may be cut inside a character.

    Returns:
        The bytes in UTF-8, and the encoding that they were in; empty where no mark said so. What is wrong in
        them, if they are not UTF-8, is found line by line.

    Raises:
        NotTextError: they are not in the encoding that the mark names, or are UTF-16 without a mark.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            try:
                return codecs.getincrementaldecoder(encoding)().decode(data, is_whole).encode(), encoding
            except UnicodeError as error:
                raise NotTextError(f"begins as {encoding} does, and is not: {error}") from error
    if 4 * data.count(0) > len(data):  # as text in UTF-16 has, where its letters are Latin
        raise NotTextError("looks like UTF-16, but does not begin with a byte order mark")
    return data, ""


def raw_lines(data: bytes, *, keepends: bool = False) -> list[bytes]:
    """Return the lines of a text file as bytes, without its byte order mark."""
    return data.removeprefix(codecs.BOM_UTF8).splitlines(keepends)


def lines_of(data: bytes) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Yield each line by its number, from 1: its text without surrounding blanks, or what is not UTF-8 in it."""
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
