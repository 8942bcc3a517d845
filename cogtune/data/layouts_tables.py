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
from cogtune.data.layouts import (
    Content,
    Entry,
    Layout,
    Place,
    Reading,
    not_utf8,
    read_text_bytes,
    shortened,
    to_samples,
)
from cogtune.errors import CogtuneError, did_you_mean
from cogtune.files import explained

_STEM = "metadata"
"""The table of this name is the dataset's, whatever other tables lie beside it."""

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "video": ("file_name", "video", "video_path", "path", "file_path", "filename", "filepath", "file", "clip"),
    "caption": ("prompt", "caption", "text", "description"),
    "image": ("image", "image_path", "image_file", "first_frame"),
}
"""What people call the columns, in the order of preference; compared in lower case, blanks and dashes as ``_``."""


@dataclass(frozen=True)
class _Table:
    """The rows of a table by column name, each with the line or row it begins at."""

    columns: Sequence[str]
    rows: Sequence[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class _Columns:
    """The names of the columns that a sample is made of."""

    video: str
    caption: str
    image: str | None


def _read(root: Path, reading: Reading) -> Content:
    name, table_format = _the_table(root, reading)
    findings: list[Finding] = []
    if table_format == "parquet":
        table, columns = _read_parquet(root, name, reading)
    else:
        table = _READERS[table_format](root, name, findings)
        if not table.columns:
            return Content(name, [], findings)
        columns = _choose(name, table.columns, reading)
    entries = [entry for row in table.rows if (entry := _entry(name, row, columns, findings)) is not None]
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


# ---------------------------------------------------------------------------------------------- which columns


def _choose(name: str, columns: Sequence[str], reading: Reading) -> _Columns:
    """The columns to read, as the user names them, else by their usual names.

    Raises:
        CogtuneError: one is missing, or there twice; with all that is wrong and the columns there are.
    """
    given = {"video": reading.video_column, "caption": reading.caption_column, "image": reading.image_column}
    chosen: dict[str, str] = {}
    problems: list[str] = []
    for role, wanted in given.items():
        column = _usual(role, columns) if wanted is None else wanted
        if wanted is not None and wanted not in columns:
            problems.append(f"there is no column '{shortened(wanted, 60)}'{did_you_mean(wanted, columns)}")
        elif column is None:
            if role != "image":
                near = (did_you_mean(usual, columns) for usual in USUAL_NAMES[role])
                usual = ", ".join(USUAL_NAMES[role])
                problems.append(f"no column has a usual name for the {role} ({usual}){next(filter(None, near), '')}")
        elif columns.count(column) > 1:
            problems.append(f"there are {columns.count(column)} columns '{column}'")
        else:
            chosen[role] = column
    if problems:
        shown = [repr(shortened(column, 60)) for column in columns]
        commas = "; its values have to be parted by commas" if name.endswith(".csv") and len(columns) == 1 else ""
        raise CogtuneError(
            f"{name} cannot be read by its columns: {listed(shown, 20)}{commas}",
            "name them with --video-column, --caption-column and --image-column; --format chooses another layout",
            details=problems,
        )
    return _Columns(chosen["video"], chosen["caption"], chosen.get("image"))


def _usual(role: str, columns: Sequence[str]) -> str | None:
    plain = {column.strip().lower().replace(" ", "_").replace("-", "_"): column for column in reversed(columns)}
    return next((plain[usual] for usual in USUAL_NAMES[role] if usual in plain), None)


# ------------------------------------------------------------------------------------------- from row to entry


def _entry(name: str, row: tuple[int, Mapping[str, Any]], columns: _Columns, findings: list[Finding]) -> Entry | None:
    number, values = row
    where = f"{name}:{number}"
    line = f"row {number}" if name.lower().endswith(".parquet") else f"line {number}"
    problems = []
    for role, column in (("caption", columns.caption), ("video", columns.video), ("image", columns.image)):
        value = None if column is None else values.get(column)
        if value is None or (role == "video" and isinstance(value, str) and not value.strip()):
            if role != "image":
                message = f"{line} has no {role}: its '{column}' is {'missing' if value is None else 'empty'}"
                problems.append(finding("missing-value", where, message, "fill it in, or delete the sample"))
        elif not isinstance(value, str):
            message = f"the '{column}' of {line} is {_kind(value)}, not a text"
            problems.append(finding("bad-row", where, message, "put it in quotes"))
        elif not _is_unicode(value):
            message = f"the '{column}' of {line} holds half a character (a lone surrogate)"
            problems.append(finding("not-utf8", where, message, f"save {name} again as UTF-8"))
    findings += problems
    if problems:
        return None
    image = (values.get(columns.image) or "").strip() if columns.image is not None else ""
    return Entry(
        values[columns.caption].replace("\r\n", "\n").strip(),
        Place(values[columns.video].strip(), where),
        Place(image, where) if image else None,
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "a list" if isinstance(value, list) else "an object"


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


def _read_parquet(root: Path, name: str, reading: Reading) -> tuple[_Table, _Columns]:
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
            columns = _choose(name, schema.names, reading)
            used = [column for column in (columns.video, columns.caption, columns.image) if column is not None]
            wrong = [
                f"'{column}' holds {shortened(str(schema.field(column).type), 80)}"
                for column in used
                if not _is_text(pyarrow.types, schema.field(column).type)
            ]
            if wrong:
                raise CogtuneError(
                    f"{name} does not hold text where paths and captions should be",
                    "cogtune reads clips from files: write them out, and put their paths into the table",
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
