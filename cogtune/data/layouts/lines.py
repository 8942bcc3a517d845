"""The lines of a text file, for all lists and tables.

Only LF, CRLF and CR end a line; U+2028 and U+0085 do not, since a caption may contain them.
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
    """Bytes that are not text; the message follows the file's name."""


def as_utf8(data: bytes, *, is_whole: bool = True) -> tuple[bytes, str]:
    """Convert a text file's bytes to UTF-8 if their byte order mark declares another encoding.

    Args:
        is_whole: False for the beginning of a file, which may end within a character.

    Returns:
        The bytes in UTF-8, and their encoding, empty without a mark. Bytes that are not UTF-8 are found line by line.

    Raises:
        NotTextError: they do not match the mark, or are UTF-16 without a mark.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            try:
                return codecs.getincrementaldecoder(encoding)().decode(data, is_whole).encode(), encoding
            except UnicodeError as error:
                raise NotTextError(f"has a {encoding} byte order mark, but is not {encoding}: {error}") from error
    if 4 * data.count(0) > len(data):  # as text in UTF-16 has, where its letters are Latin
        raise NotTextError("looks like UTF-16 without a byte order mark")
    return data, ""


def raw_lines(data: bytes, *, keepends: bool = False) -> list[bytes]:
    """Return the lines of a text file as bytes, without its byte order mark."""
    return data.removeprefix(codecs.BOM_UTF8).splitlines(keepends)


def lines_of(data: bytes) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Yield each line by its number, from 1: its text without surrounding whitespace, or the decoding error."""
    for number, raw in enumerate(raw_lines(data), start=1):
        try:
            yield number, raw.decode().strip()
        except UnicodeDecodeError as error:
            yield number, error


def listed_lines(data: bytes) -> list[str | UnicodeDecodeError]:
    """Return the lines of a list, without blank ones at its end."""
    lines = [line for _, line in lines_of(data)]
    while lines and lines[-1] == "":
        lines.pop()
    return lines


def is_unicode(text: str) -> bool:
    """Return whether ``text`` is valid Unicode: JSON and file names may contain lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
