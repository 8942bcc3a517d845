"""Tables of comma- or tab-separated values."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogtune.data.findings import Finding, finding, not_utf8
from cogtune.data.layouts.folder import Folder
from cogtune.data.layouts.lines import raw_lines
from cogtune.system.errors import counted

_LONGEST = 2**31 - 1
"""Most characters in a value; a caption may exceed the csv module's default of 131,072."""

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass(frozen=True)
class Table:
    """The rows of a table by column name, each with its first line or its number."""

    columns: Sequence[str]
    rows: Sequence[tuple[int, Mapping[str, Any]]]


class _Lines:
    """An iterator over lines that can be rewound, to continue after an unclosed quote."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = lines
        self.next = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.next == len(self.lines):
            raise StopIteration
        self.next += 1
        return self.lines[self.next - 1]


@dataclass(frozen=True)
class _Dialect:
    """The delimiter, and whether spaces before a value and its quote are ignored."""

    delimiter: str
    skip_blanks: bool = False


def read_delimited(
    folder: Folder, name: str, findings: list[Finding], delimiter: str, usable: Callable[[Sequence[str]], bool]
) -> Table:
    """Return the table in a file, with findings about its rows.

    Args:
        delimiter: the one that the file's name implies.
        usable: whether a header has the required columns; if not, other delimiters are tried.
    """
    data = folder.read_text(name, findings)
    if data is None:
        return Table((), ())
    raw = raw_lines(data, keepends=True)
    text = [line.decode(errors="surrogateescape") for line in raw]
    dialect = _Dialect(_delimiter_of(text, delimiter, usable))
    if dialect.delimiter != delimiter:
        folder.taken(name, f"read as delimited by {_DELIMITERS[dialect.delimiter]}, not by {_DELIMITERS[delimiter]}")
    table, problems = _read(name, raw, text, dialect)
    if re.search(rf'(^|{re.escape(dialect.delimiter)})[ ]+"', "".join(text), re.MULTILINE):
        other, fewer = _read(name, raw, text, _Dialect(dialect.delimiter, skip_blanks=True))
        if other != table and len(fewer) <= len(problems):
            folder.taken(name, "read without the spaces before its quotes")
            table, problems = other, fewer
    findings += problems
    return table


def _delimiter_of(text: Sequence[str], delimiter: str, usable: Callable[[Sequence[str]], bool]) -> str:
    """Return the delimiter: the one that the file's name implies, unless only another gives the required columns."""
    header = next((line for line in text if line.strip()), "")

    def columns(by: str) -> list[str]:
        try:
            return [column.strip() for column in next(csv.reader([header], delimiter=by, skipinitialspace=True), [])]
        except csv.Error:
            return []

    if usable(columns(delimiter)):
        return delimiter
    return next((other for other in _DELIMITERS if usable(columns(other))), delimiter)


def _read(name: str, raw: Sequence[bytes], text: Sequence[str], dialect: _Dialect) -> tuple[Table, list[Finding]]:
    columns: list[str] = []
    rows: list[tuple[int, Mapping[str, Any]]] = []
    problems: list[Finding] = []
    lines = _Lines(text)
    for first, fields in _csv_rows(lines, dialect):
        where = f"{name}:{first}"
        broken = _first_not_utf8(name, raw, first, lines.next)
        problem = None
        if broken is not None:
            problem = broken
        elif isinstance(fields, csv.Error):
            message = f"line {first} cannot be read: {fields}"
            hint = 'put values that contain quotes in quotes, and double each quote in them ("")'
            problem = finding("bad-row", where, message, hint)
        elif columns and len(fields) != len(columns):
            there_are = counted(len(columns), "column")
            message = f"line {first} has {counted(len(fields), 'value')}, but there {_are(len(columns))} {there_are}"
            problem = finding("bad-row", where, message, "put values that contain the delimiter in double quotes")
        elif columns:
            rows.append((first, dict(zip(columns, fields, strict=True))))
        else:
            columns = [column.strip() for column in fields]
        if problem is not None:
            problems.append(problem)
            if not columns:
                return Table((), ()), problems
    return Table(columns, rows), problems


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _csv_rows(lines: _Lines, dialect: _Dialect) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield each row or the error in it, with the number of its first line; blank lines are skipped.

    Strict, since a lenient reader makes one caption of everything after a stray quote. After such a row it continues
    with the line after the quote.
    """
    csv.field_size_limit(_LONGEST)
    reader = csv.reader(lines, delimiter=dialect.delimiter, skipinitialspace=dialect.skip_blanks, strict=True)
    while True:
        first = lines.next + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.next = first
            yield first, error
            continue
        if any(field.strip() for field in fields):
            yield first, fields


def _first_not_utf8(name: str, raw: Sequence[bytes], first: int, last: int) -> Finding | None:
    for number, line in enumerate(raw[first - 1 : last], start=first):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return not_utf8(name, number, error)
    return None
