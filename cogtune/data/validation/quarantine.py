"""Files of samples to leave out, written by ``dataset validate`` and read by ``dataset cache`` and ``train``.

One sample per line, then its problems as a comment. A row that makes no sample, because its path or values are invalid,
is listed by its file and line; a clip with an invalid name or link, by its name.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from cogtune.data.findings import Finding
from cogtune.data.layouts.lines import NotTextError, as_utf8, lines_of
from cogtune.data.layouts.own_files import QUARANTINE_HEADER
from cogtune.data.layouts.spelling import nfc
from cogtune.data.sources import Dataset
from cogtune.system.errors import UsageError, counted
from cogtune.system.files import os_errors_explained, read_regular, write_text

_COMMENT = "  # "
_HEADER = f"{QUARANTINE_HEADER}pass this file to `cogtune train` or `cogtune dataset cache` with --quarantine\n"
_ABOUT_ONE_ROW = frozenset({"bad-path", "bad-row", "missing-value", "outside-folder"})


def write_quarantine(path: Path, dataset: Dataset, findings: tuple[Finding, ...], *, strict: bool = False) -> int:
    """Write every sample or row with an error, with ``strict`` also those with a warning; return their number.

    Raises:
        CogtuneError: the file cannot be written.
    """
    samples = {sample.id for sample in dataset.samples}
    codes: defaultdict[str, list[str]] = defaultdict(list)
    for found in findings:
        bad = found.severity == "error" or (strict and found.severity == "warning")
        if bad and (found.where in samples or _is_about_one_row(found)):
            codes[found.where].append(found.code)
    lines = [f"{_written(where)}{_COMMENT}{', '.join(dict.fromkeys(these))}\n" for where, these in codes.items()]
    write_text(path, _HEADER + "".join(lines))
    return len(lines)


def _is_about_one_row(found: Finding) -> bool:
    # a whole file that is UTF-16 is told without a line
    return found.code in _ABOUT_ONE_ROW or (found.code == "not-utf8" and ":" in found.where)


@dataclass(frozen=True)
class Remaining:
    """A dataset without the samples in a quarantine file.

    Args:
        left_out: number of samples and rows that are left out.
        unknown: names in the file that the dataset does not have.
    """

    dataset: Dataset
    left_out: int
    unknown: tuple[str, ...]


def without_quarantined(dataset: Dataset, path: Path) -> Remaining:
    """Return the dataset without the samples that the file ``path`` names, and without their findings.

    Raises:
        UsageError: no sample remains.
        CogtuneError: the file cannot be read.
    """
    named = {nfc(where): where for where in read_quarantine(path)}
    known = {sample.id for sample in dataset.samples} | {nfc(found.where) for found in dataset.findings}
    samples = tuple(sample for sample in dataset.samples if sample.id not in named)
    if dataset.samples and not samples:
        all_of_them = counted(len(dataset.samples), "sample")
        raise UsageError(f"{path} leaves out all {all_of_them} of {dataset.root}", "fix some of them")
    findings = tuple(found for found in dataset.findings if nfc(found.where) not in named)
    unknown = tuple(where for plain, where in named.items() if plain not in known)
    return Remaining(replace(dataset, samples=samples, findings=findings), len(named) - len(unknown), unknown)


def read_quarantine(path: Path) -> dict[str, None]:
    """Return the ids that the file names, in its order.

    Raises:
        UsageError: it is not UTF-8.
        CogtuneError: it cannot be read.
    """
    with os_errors_explained(path, "read"):
        data = read_regular(path)
    try:
        data, _ = as_utf8(data)
    except NotTextError as error:
        raise UsageError(f"{path} {error}", "save the file as UTF-8") from error
    named: dict[str, None] = {}
    for number, line in lines_of(data):
        if isinstance(line, UnicodeDecodeError):
            raise UsageError(f"{path} line {number} is not UTF-8 text", "save the file as UTF-8") from line
        if line and not line.startswith("#"):
            named[_read(line)] = None
    return named


def _written(where: str) -> str:
    """Return ``where`` as written to the file: quoted as in JSON if it would be ambiguous."""
    plain = where.isprintable() and where == where.strip() and where[:1] not in ("#", '"') and _COMMENT not in where
    return where if plain else json.dumps(where)


def _read(line: str) -> str:
    text = line.rpartition(_COMMENT)[0] or line
    try:
        return str(json.loads(text)) if text.startswith('"') else text.strip()
    except ValueError:
        return text.strip()
