"""The layout of tables with a row for each sample: CSV, TSV, JSON Lines and Parquet, with any column names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from cogtune.config.choices import DataFormat
from cogtune.data.findings import Finding, listed
from cogtune.data.layouts.base import Layout, LayoutContent, shortened, to_samples
from cogtune.data.layouts.delimited import Table, read_delimited
from cogtune.data.layouts.folder import Folder
from cogtune.data.layouts.json_rows import is_array, is_map, read_json_rows
from cogtune.data.layouts.rows import Columns, choose_columns, entry_of, fits
from cogtune.system.errors import CogtuneError

_STEM = "metadata"
"""The name of the dataset's table, whatever other tables the folder has."""

_SUFFIXES: dict[str, DataFormat] = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".parquet": "parquet"}

_DELIMITERS: dict[DataFormat, str] = {"csv": ",", "tsv": "\t"}

_TRAINING = "train"
"""The subfolder whose table is read if several have one."""


@dataclass(frozen=True)
class _Found:
    """A table: its path in the dataset, its format, and how it differs from the documentation."""

    name: str
    format: DataFormat
    how: str = ""

    @property
    def is_metadata(self) -> bool:
        return PurePosixPath(self.name).stem.lower() == _STEM


def _read(folder: Folder) -> LayoutContent:
    found, reading = _the_table(folder), folder.reading
    name, findings = found.name, list[Finding]()
    if found.how:
        folder.taken(name, found.how)
    if (problem := folder.outside(name, name)) is not None:
        return LayoutContent(name, [], [problem])
    if found.format == "parquet":
        table, columns = _read_parquet(folder, name)
    else:
        if found.format in _DELIMITERS:
            delimiter = _DELIMITERS[found.format]
            table = read_delimited(folder, name, findings, delimiter, lambda header: fits(header, reading))
        else:
            table = read_json_rows(folder, name, findings)
        if not table.columns:
            return LayoutContent(name, [], findings)
        columns = choose_columns(name, table.columns, reading)
    entries = [entry for row in table.rows if (entry := entry_of(name, row, columns, findings)) is not None]
    samples = to_samples(folder, entries, findings, base=PurePosixPath(name).parent)
    used = [column for column in (columns.video, columns.caption, columns.image) if column is not None]
    return LayoutContent(f"{name}: {', '.join(used)}", samples, findings)


# ------------------------------------------------------------------------------------------------ which table


def _tables(folder: Folder) -> list[_Found]:
    """Return every table in the folder itself."""
    names = [name for name in folder.top if name.isprintable()]
    return [
        _Found(name, _SUFFIXES[suffix]) for name in names if (suffix := PurePosixPath(name).suffix.lower()) in _SUFFIXES
    ]


def _almost_tables(folder: Folder) -> list[_Found]:
    """Return tables with other names or places than documented: JSON arrays, and those of subfolders."""
    arrays = [_Found(name, "jsonl") for name in folder.top if _is_array(folder, name)]
    return arrays or list(_below(folder)) or [_Found(name, "jsonl") for name in folder.top if _is_map(folder, name)]


def _is_map(folder: Folder, name: str) -> bool:
    return name.lower().endswith(".json") and not folder.leads_out(name) and is_map(folder, name)


def _below(folder: Folder) -> Iterator[_Found]:
    for sub in folder.subfolders:
        how = f"table read from the folder {sub}/, which its paths are relative to"
        for name in folder.files_in(sub):
            path = PurePosixPath(name)
            if path.stem.lower() != _STEM:
                continue
            if path.suffix.lower() in _SUFFIXES:
                yield _Found(f"{sub}/{name}", _SUFFIXES[path.suffix.lower()], how)
            elif _is_array(folder, f"{sub}/{name}"):
                yield _Found(f"{sub}/{name}", "jsonl", how)


def _is_array(folder: Folder, name: str) -> bool:
    return name.lower().endswith(".json") and not folder.leads_out(name) and is_array(folder.root / name)


def _the_table(folder: Folder) -> _Found:
    """Return the table to read: in the requested format, the one called metadata, else the only one."""
    root, wanted = folder.root, folder.reading.format
    tables = _tables(folder)
    meant = [table for table in tables if wanted in (None, table.format)]
    if not meant:
        meant = [table for table in _almost_tables(folder) if wanted in (None, table.format)]
        of_training = [table for table in meant if PurePosixPath(table.name).parts[0].lower() == _TRAINING]
        if len(of_training) == 1:
            return _with_others(of_training[0], meant)
    if not meant:
        there = f"; it has {listed([table.name for table in tables], 3)}" if tables else ""
        raise CogtuneError(f"no .{wanted} file in {root}{there}", "choose another --format")
    meant = [table for table in meant if table.is_metadata] or meant
    if len(meant) > 1:
        formats = sorted({table.format for table in meant})
        choice = f", or use --format {' or '.join(formats)}" if len(formats) > 1 else ""
        advice = f"rename the right one to {_STEM}{PurePosixPath(meant[0].name).suffix}{choice}; "
        raise CogtuneError(
            f"{root} contains several tables: {listed([table.name for table in meant])}",
            "pass the folder of one of them" if meant[0].how else f"{advice}use --format sidecar to read none of them",
        )
    return meant[0]


def _with_others(table: _Found, meant: list[_Found]) -> _Found:
    """Return the table of the training split, with a note about the others."""
    others = [other.name for other in meant if other != table]
    how = f"{table.how}; {listed(others, 3)} {'is' if len(others) == 1 else 'are'} not read" if others else table.how
    return _Found(table.name, table.format, how)


def _detect(folder: Folder) -> DataFormat | None:
    tables = _tables(folder)
    return tables[0].format if tables else None


def _almost(folder: Folder) -> DataFormat | None:
    tables = _almost_tables(folder)
    return tables[0].format if tables else None


# ---------------------------------------------------------------------------------------------------- Parquet


def _read_parquet(folder: Folder, name: str) -> tuple[Table, Columns]:
    """Return the rows, and the chosen columns, since only those are read.

    Raises:
        CogtuneError: pyarrow is not installed, the file is damaged, or a column does not contain text.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CogtuneError(
            f"reading {name} requires pyarrow, which is not installed", "run `pip install 'cogtune[parquet]'`"
        ) from error

    path = folder.root / name
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = choose_columns(name, schema.names, folder.reading)
            used = [column for column in (columns.video, columns.caption, columns.image) if column is not None]
            wrong = [
                f"'{column}' contains {shortened(str(schema.field(column).type), 80)}"
                for column in used
                if not _is_text(pyarrow.types, schema.field(column).type)
            ]
            if wrong:
                raise CogtuneError(
                    f"{name} does not contain paths and captions as text",
                    "use --format datasets if the table contains the clips themselves; else store their paths in it",
                    details=wrong,
                )
            values = file.read(columns=used).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CogtuneError(f"cannot read {path}: {reason}", "restore the file or create it again") from error
    return Table(schema.names, list(enumerate(values, start=1))), columns


def _is_text(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind))


TABLE = Layout(
    ("csv", "tsv", "jsonl", "parquet"),
    "table",
    f"a table {_STEM}.csv, .tsv, .jsonl or .parquet, with a column of paths and one of captions",
    _detect,
    _read,
    _almost,
    has_columns=True,
    names_clips=True,
)
