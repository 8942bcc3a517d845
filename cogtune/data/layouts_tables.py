"""Tables with a row for each sample: CSV, TSV, JSON Lines and Parquet, with columns of any names."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.config import DataFormat
from cogtune.data.findings import Finding, finding, listed
from cogtune.data.layouts import Content, Layout, Reading, not_utf8, read_text_bytes, shortened, to_samples
from cogtune.data.layouts_rows import Columns, choose_columns, entry_of
from cogtune.errors import CogtuneError
from cogtune.files import explained

_STEM = "metadata"
"""The table of this name is the dataset's, whatever other tables lie beside it."""


@dataclass(frozen=True)
class _Table:
    """The rows of a table by column name, each with the line or row it begins at."""

    columns: Sequence[str]
    rows: Sequence[tuple[int, Mapping[str, Any]]]


def _read(root: Path, reading: Reading) -> Content:
    name, table_format = _the_table(root, reading)
    findings: list[Finding] = []
    if table_format == "parquet":
        table, columns = _read_parquet(root, name, reading)
    else:
        table = _READERS[table_format](root, name, findings)
        if not table.columns:
            return Content(name, [], findings)
        columns = choose_columns(name, table.columns, reading)
    entries = [entry for row in table.rows if (entry := entry_of(name, row, columns, findings)) is not None]
    samples = to_samples(root, entries, reading, findings)
    used = [column for column in (columns.video, columns.caption, columns.image) if column is not None]
    return Content(f"{name}: {', '.join(used)}", samples, findings)


# ------------------------------------------------------------------------------------------------ which table


def _tables(root: Path) -> list[tuple[str, DataFormat]]:
    """Every table in the folder itself, with its format."""
    found: list[tuple[str, DataFormat]] = []
    with explained(root, "read"):
        for path in sorted(root.iterdir()):
            suffix = path.suffix.lower()
            if suffix in _SUFFIXES and path.name.isprintable() and not path.name.startswith(".") and path.is_file():
                found.append((path.name, _SUFFIXES[suffix]))
    return found


def _the_table(root: Path, reading: Reading) -> tuple[str, DataFormat]:
    """The table to read: of those in the format asked for, the one called metadata, else the only one."""
    tables = _tables(root)
    meant = [table for table in tables if reading.format in (None, table[1])]
    if not meant:
        there = f"; {listed([name for name, _ in tables], 3)} is there" if tables else ""
        raise CogtuneError(f"there is no .{reading.format} file in {root}{there}", "give another --format")
    meant = [table for table in meant if Path(table[0]).stem.lower() == _STEM] or meant
    if len(meant) > 1:
        formats = sorted({table_format for _, table_format in meant})
        choice = f", or choose with --format {' or '.join(formats)}" if len(formats) > 1 else ""
        raise CogtuneError(
            f"{root} holds several tables: {listed([name for name, _ in meant])}",
            f"call the right one {_STEM}{Path(meant[0][0]).suffix}{choice}; --format beside reads none of them",
        )
    return meant[0]


def _detect(root: Path, _reading: Reading) -> DataFormat | None:
    tables = _tables(root)
    return tables[0][1] if tables else None


# ---------------------------------------------------------------------------------------------- comma and tab


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


def _read_delimited(root: Path, name: str, findings: list[Finding], delimiter: str) -> _Table:
    data = read_text_bytes(root, name, findings)
    if data is None:
        return _Table((), ())
    raw = data.splitlines(keepends=True)
    columns: list[str] = []
    rows: list[tuple[int, Mapping[str, Any]]] = []
    lines = _Lines([line.decode(errors="surrogateescape") for line in raw])
    for first, fields in _csv_rows(lines, delimiter):
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
            count = f"{len(fields)} value{'' if len(fields) == 1 else 's'}"
            message = f"line {first} has {count}, but there are {len(columns)} columns"
            problem = finding("bad-row", where, message, "put a text between double quotes if the delimiter is in it")
        elif columns:
            rows.append((first, dict(zip(columns, fields, strict=True))))
        else:
            columns = [column.strip() for column in fields]
        if problem is not None:
            findings.append(problem)
            if not columns:
                return _Table((), ())
    return _Table(columns, rows)


def _csv_rows(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """The rows, or what is wrong with each, with the number of the line it begins at; blank lines left out.

    Strict, since a lenient reader makes one caption of everything behind a stray quote. After such a row it goes
    on with the line after the quote.
    """
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
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


def _read_csv(root: Path, name: str, findings: list[Finding]) -> _Table:
    return _read_delimited(root, name, findings, ",")


def _read_tsv(root: Path, name: str, findings: list[Finding]) -> _Table:
    return _read_delimited(root, name, findings, "\t")


# ------------------------------------------------------------------------------------------------- JSON Lines


def _read_json_lines(root: Path, name: str, findings: list[Finding]) -> _Table:
    data = read_text_bytes(root, name, findings)
    columns: dict[str, None] = {}
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, raw in enumerate((data or b"").splitlines(), start=1):
        where = f"{name}:{number}"
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            findings.append(not_utf8(name, number, error))
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = f"line {number} is not JSON: {error}"
            findings.append(
                finding("bad-row", where, message, 'a line is one sample: {"file_name": ..., "prompt": ...}')
            )
            continue
        if not isinstance(value, dict):
            message = f"line {number} holds {shortened(line.strip(), 40)}, not names with values"
            findings.append(
                finding("bad-row", where, message, 'a line is one sample: {"file_name": ..., "prompt": ...}')
            )
            continue
        columns.update(dict.fromkeys(value))
        rows.append((number, value))
    return _Table(tuple(columns), rows)


# ---------------------------------------------------------------------------------------------------- Parquet


def _read_parquet(root: Path, name: str, reading: Reading) -> tuple[_Table, Columns]:
    """The rows, with the columns chosen, since only those are read.

    Raises:
        CogtuneError: pyarrow is not installed, the file is damaged, or a column holds something else than text.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CogtuneError(
            f"reading {name} takes pyarrow, which is not installed", "pip install 'cogtune[parquet]'"
        ) from error

    path = root / name
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = choose_columns(name, schema.names, reading)
            used = [column for column in (columns.video, columns.caption, columns.image) if column is not None]
            wrong = [
                f"'{column}' holds {shortened(str(schema.field(column).type), 80)}"
                for column in used
                if not _is_text(pyarrow.types, schema.field(column).type)
            ]
            if wrong:
                raise CogtuneError(
                    f"{name} does not hold text where paths and captions should be",
                    "`--format datasets` reads clips that are stored inside; else put their paths into the table",
                    details=wrong,
                )
            values = file.read(columns=used).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CogtuneError(f"cannot read {path}: {reason}", "restore the file or make it again") from error
    return _Table(schema.names, list(enumerate(values, start=1))), columns


def _is_text(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind))


_READERS: dict[DataFormat, Callable[[Path, str, list[Finding]], _Table]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_json_lines,
}

_SUFFIXES: dict[str, DataFormat] = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".parquet": "parquet"}

TABLE = Layout(
    ("csv", "tsv", "jsonl", "parquet"),
    "table",
    f"a table {_STEM}.csv, .tsv, .jsonl or .parquet, with a column of paths and one of captions",
    _detect,
    _read,
)
