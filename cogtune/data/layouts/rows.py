"""Conversion of rows with named columns to entries, for all kinds of tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cogtune.data.findings import Finding, finding, listed
from cogtune.data.layouts.base import DatasetEntry, ListedPath, shortened
from cogtune.data.layouts.folder import LayoutOptions
from cogtune.data.layouts.lines import is_unicode
from cogtune.data.layouts.media import is_clip
from cogtune.system.errors import CogtuneError, did_you_mean

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "video": ("file_name", "video", "video_path", "path", "file_path", "filename", "filepath", "file", "clip"),
    "caption": ("prompt", "caption", "text", "description"),
    "image": ("image", "image_path", "image_file", "first_frame"),
}
"""Usual names of the columns, in the order of preference; compared in lower case, spaces and dashes as ``_``."""


_ROWS = {".csv": "line", ".tsv": "line", ".jsonl": "line", ".json": "item"}
"""What is counted in a table: lines if a text editor can open it."""


@dataclass(frozen=True)
class Columns:
    """The names of a sample's columns."""

    video: str
    caption: str
    image: str | None


def choose_columns(
    name: str, columns: Sequence[str], reading: LayoutOptions, usual_names: Mapping[str, Sequence[str]] = USUAL_NAMES
) -> Columns:
    """Return the columns to read: those that the user names, else those with usual names.

    Raises:
        CogtuneError: a column is missing or duplicate; lists all problems and the existing columns.
    """
    given = {"video": reading.video_column, "caption": reading.caption_column, "image": reading.image_column}
    chosen: dict[str, str] = {}
    problems: list[str] = []
    for role, wanted in given.items():
        column = _usual(usual_names[role], columns) if wanted is None else wanted
        if wanted is not None and wanted not in columns:
            problems.append(f"no such column: '{shortened(wanted, 60)}'{did_you_mean(wanted, columns)}")
        elif column is None:
            if role != "image":
                near = (did_you_mean(usual, columns) for usual in usual_names[role])
                usual = ", ".join(usual_names[role])
                problems.append(f"no column is named like a {role} column ({usual}){next(filter(None, near), '')}")
        elif columns.count(column) > 1:
            problems.append(f"there are {columns.count(column)} columns '{column}'")
        else:
            chosen[role] = column
    if problems:
        shown = [repr(shortened(column, 60)) for column in columns]
        if any(is_clip(PurePosixPath(column)) for column in columns):
            problems.append("its first row is a sample: add a row with the names of the columns above it")
        raise CogtuneError(
            f"cannot choose columns of {name}: {listed(shown, 20)}",
            "use --video-column, --caption-column and --image-column, or choose another layout with --format",
            details=problems,
        )
    return Columns(chosen["video"], chosen["caption"], chosen.get("image"))


def fits(columns: Sequence[str], reading: LayoutOptions) -> bool:
    """Return whether :func:`choose_columns` finds a sample's columns in ``columns``."""
    try:
        if not columns:
            return False
        choose_columns("", columns, reading)
    except CogtuneError:
        return False
    return True


def _usual(names: Sequence[str], columns: Sequence[str]) -> str | None:
    plain = {column.strip().lower().replace(" ", "_").replace("-", "_"): column for column in reversed(columns)}
    return next((plain[usual] for usual in names if usual in plain), None)


def entry_of(
    name: str, row: tuple[int, Mapping[str, Any]], columns: Columns, findings: list[Finding]
) -> DatasetEntry | None:
    """Return the entry that a numbered row of ``name`` makes, or None and findings about it."""
    number, values = row
    where = f"{name}:{number}"
    line = f"{_ROWS.get(Path(name).suffix.lower(), 'row')} {number}"
    problems = []
    for role, column in (("caption", columns.caption), ("video", columns.video), ("image", columns.image)):
        value = None if column is None else values.get(column)
        if value is None or (role == "video" and isinstance(value, str) and not value.strip()):
            if role != "image":
                message = f"{line} has no {role}: its '{column}' is {'missing' if value is None else 'empty'}"
                problems.append(finding("missing-value", where, message, "fill it in, or delete the sample"))
        elif not isinstance(value, str):
            message = f"the '{column}' of {line} is {_kind(value)}, not a string"
            problems.append(finding("bad-row", where, message, "put it in quotes"))
        elif not is_unicode(value):
            message = f"the '{column}' of {line} contains a lone surrogate, half of a character"
            problems.append(finding("not-utf8", where, message, f"save {name} as UTF-8"))
    findings += problems
    if problems:
        return None
    image = (values.get(columns.image) or "").strip() if columns.image is not None else ""
    return DatasetEntry(
        values[columns.caption].replace("\r\n", "\n").strip(),
        ListedPath(values[columns.video].strip(), where),
        ListedPath(image, where) if image else None,
    )


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "a list" if isinstance(value, list) else "an object"
