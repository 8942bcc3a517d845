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
"""Characters in a value; what the csv module takes by itself, 131,072, a caption may exceed."""

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass(frozen=True)
class Table:
    """The rows of a table by column name, each with the line or row it begins at."""

    columns: Sequence[str]
    rows: Sequence[tuple[int, Mapping[str, Any]]]


class _Lines:
    """An iterator over lines that can be set back, to read on after a quote that is never closed."""

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
    """What parts the values, and whether blanks in front of a value, and of its quote, count for nothing."""

    delimiter: str
    skip_blanks: bool = False


def read_delimited(
    folder: Folder, name: str, findings: list[Finding], delimiter: str, usable: Callable[[Sequence[str]], bool]
) -> Table:
    """Return the table in a file; what is wrong with its rows becomes findings.

    Args:
        delimiter: what the file's name says.
        usable: whether a header has the columns that are looked for; if not, other delimiters are tried.
    """
    data = folder.read_text(name, findings)
    if data is None:
        return Table((), ())
    raw = raw_lines(data, keepends=True)
    text = [line.decode(errors="surrogateescape") for line in raw]
    dialect = _Dialect(_delimiter_of(text, delimiter, usable))
    if dialect.delimiter != delimiter:
        folder.taken(
            name, f"read with {_DELIMITERS[dialect.delimiter]} between its values, not {_DELIMITERS[delimiter]}"
        )
    table, problems = _read(name, raw, text, dialect)
    if re.search(rf'(^|{re.escape(dialect.delimiter)})[ ]+"', "".join(text), re.MULTILINE):
        other, fewer = _read(name, raw, text, _Dialect(dialect.delimiter, skip_blanks=True))
        if other != table and len(fewer) <= len(problems):
            folder.taken(name, "read without the blanks in front of its quotes")
            table, problems = other, fewer
    findings += problems
    return table


def _delimiter_of(text: Sequence[str], delimiter: str, usable: Callable[[Sequence[str]], bool]) -> str:
    """Return what parts the values: as the file's name says, unless its header can only be read in another way."""
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
            hint = 'a text with quotes in it goes between quotes, and each quote in it is written twice ("")'
            problem = finding("bad-row", where, message, hint)
        elif columns and len(fields) != len(columns):
            there_are = counted(len(columns), "column")
            message = f"line {first} has {counted(len(fields), 'value')}, but there {_are(len(columns))} {there_are}"
            problem = finding("bad-row", where, message, "put a text between double quotes if the delimiter is in it")
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
    """Yield the rows, or what is wrong with each, with the number of the line it begins at; blank lines left out.

    Strict, since a lenient reader makes one caption of everything behind a stray quote. After such a row it goes
    on with the line after the quote.
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
