"""Tables of JSON objects: one per line (JSON Lines), or all in one array."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogtune.data.findings import Finding, finding, not_utf8
from cogtune.data.layouts.base import shortened
from cogtune.data.layouts.delimited import Table
from cogtune.data.layouts.folder import Folder
from cogtune.data.layouts.lines import NotTextError, as_utf8, lines_of
from cogtune.data.layouts.media import may_be_clip
from cogtune.data.layouts.spelling import normal
from cogtune.system.errors import CogtuneError
from cogtune.system.files import open_regular

_HEAD = 4096

_EXAMPLE = '{"file_name": ..., "prompt": ...}'


class _Repeated(ValueError):
    """An object with a duplicate key."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _Repeated(f"duplicate key {shortened(repeated, 60)!r}")
    return value


def is_array(path: Path) -> bool:
    """Return whether a JSON file begins like an array of objects."""
    try:
        with open_regular(path) as file:
            head, _ = as_utf8(file.read(_HEAD), is_whole=False)
    except (OSError, NotTextError):
        return False
    return b"".join(head.removeprefix(codecs.BOM_UTF8).split()).startswith((b"[{", b"[]"))


def is_map(folder: Folder, name: str) -> bool:
    """Return whether a JSON file is an object with names of clips as keys, at least one of which exists."""
    try:
        value = json.loads(as_utf8((folder.root / name).read_bytes())[0])
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or not all(isinstance(said, (str, dict)) for said in value.values()):
        return False
    there = (folder.by_spelling.get(normal(key), folder.by_stem.get(normal(key), ())) for key in value)
    return any(may_be_clip(file) for files in there for file in files)


def read_json_rows(folder: Folder, name: str, findings: list[Finding]) -> Table:
    """Return the objects in a file, with findings about its lines or items."""
    data = folder.read_text(name, findings)
    if data is None:
        return Table((), ())
    if is_array(folder.root / name):
        return _read_array(folder, name, data, findings)
    if name.lower().endswith(".json"):
        return _read_map(folder, name, data)
    rows: list[tuple[int, Mapping[str, Any]]] = []
    columns: dict[str, None] = {}
    for number, line in lines_of(data):
        if isinstance(line, UnicodeDecodeError):
            findings.append(not_utf8(name, number, line))
            continue
        if not line:
            continue
        where = f"{name}:{number}"
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            reason = f"cannot be read: {error}" if isinstance(error, _Repeated) else f"is not JSON: {error}"
            findings.append(
                finding("bad-row", where, f"line {number} {reason}", f"each line is one sample: {_EXAMPLE}")
            )
            continue
        if isinstance(value, dict):
            columns.update(dict.fromkeys(value))
            rows.append((number, value))
        else:
            findings.append(_no_object(where, f"line {number}", line))
    return Table(tuple(columns), rows)


def _read_array(folder: Folder, name: str, data: bytes, findings: list[Finding]) -> Table:
    """Return the items of an array.

    Raises:
        CogtuneError: it is not JSON.
    """
    try:
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"{name} is not UTF-8: 0x{data[error.start]:02x} in line {line}"
        findings.append(finding("not-utf8", f"{name}:{line}", message, f"save {name} as UTF-8"))
        return Table((), ())
    except (ValueError, RecursionError) as error:
        raise CogtuneError(
            f"{name} begins like a JSON array, but is not one: {error}", f"each item is one sample: {_EXAMPLE}"
        ) from error
    folder.taken(name, "JSON array read as a table with an item for each sample")
    rows: list[tuple[int, Mapping[str, Any]]] = []
    columns: dict[str, None] = {}
    for number, value in enumerate(values, start=1):
        if isinstance(value, dict):
            columns.update(dict.fromkeys(value))
            rows.append((number, value))
        else:
            findings.append(_no_object(f"{name}:{number}", f"item {number}", repr(value)))
    return Table(tuple(columns), rows)


def _read_map(folder: Folder, name: str, data: bytes) -> Table:
    """Return the rows of an object with names of clips as keys.

    Raises:
        CogtuneError: it has a duplicate key.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except ValueError as error:
        raise CogtuneError(f"{name} cannot be read: {error}", "list each clip only once") from error
    folder.taken(name, "JSON object read as a table with an entry for each clip")
    rows = [
        (number, {**(said if isinstance(said, dict) else {"text": said}), "file_name": clip})
        for number, (clip, said) in enumerate(value.items(), start=1)
    ]
    return Table(tuple(dict.fromkeys(column for _, row in rows for column in row)), rows)


def _no_object(where: str, what: str, shown: str) -> Finding:
    message = f"{what} is not a JSON object: {shortened(shown, 40)}"
    return finding("bad-row", where, message, f"each sample is an object: {_EXAMPLE}")
