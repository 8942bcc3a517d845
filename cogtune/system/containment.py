"""Containment of links: nothing is written, deleted or published through a link that leads out of its folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TextIO

from cogtune.system import names
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained

_FOLDERS = {
    **dict.fromkeys((*names.ENTRIES, names.MEDIA, names.DATASETS, names.JOB, names.LOGS), 1),
    **dict.fromkeys((f"{names.LAUNCH}*", f"{names.DRY_RUN}*"), 1),
    **dict.fromkeys((names.SAMPLES, f"{names.CHECKPOINT}*"), 2),
}
"""Subfolders of a cache or run whose files are written, read and deleted, with the number of levels to check."""

_FILES = (".*", names.RUN_YAML, names.METRICS, names.FACTS, *names.TRACKER_FOLDERS)
"""Other names at the top of a cache or run; links with different names belong to the user."""


def leads_out(path: Path, root: Path) -> bool:
    """Return whether ``path`` lies outside the folder ``root``, with the links of both resolved."""
    real, inside = os.path.realpath(path), os.path.realpath(root)
    return real != inside and not real.startswith(inside.rstrip(os.sep) + os.sep)


def _links(folder: Path, levels: int) -> Iterator[Path]:
    with os_errors_explained(folder, "read"), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(entry.path)
            elif levels > 1 and entry.is_dir():
                yield from _links(Path(entry.path), levels - 1)


def _is_merged(folder: Path) -> bool:
    """Return whether a folder is a merged model, whose links to the base model are only read."""
    return (folder / "model_index.json").is_file()


def links_out(folder: Path) -> list[Path]:
    """Return the links in ``folder``, a cache or run folder, through which a write would reach files elsewhere."""
    found: list[Path] = []
    for place in folder.iterdir() if folder.is_dir() else ():
        levels = next((levels for name, levels in _FOLDERS.items() if fnmatch(place.name, name)), 0)
        if place.is_symlink():
            if levels or any(fnmatch(place.name, name) for name in _FILES):
                found.append(place)
        elif levels and place.is_dir() and not _is_merged(place):
            found += _links(place, levels)
    return [path for path in sorted(found) if leads_out(path, folder)]


def refuse_links_out(folder: Path) -> None:
    """Reject a cache or run folder in which a write would reach files elsewhere.

    Raises:
        CogtuneError: with every link that leads out.
    """
    refuse_links(
        links_out(folder), folder, "delete the link; cogtune does not read, write or delete anything through it"
    )


def refuse_links(links: Iterable[Path], folder: Path, hint: str) -> None:
    """Reject ``folder`` if it has any ``links``.

    Raises:
        CogtuneError: with every link and its target.
    """
    found = [f"{link} is a link to {os.path.realpath(link)}" for link in links]
    if len(found) == 1:
        raise CogtuneError(f"{found[0]}, outside of {folder}", hint)
    if found:
        raise CogtuneError(f"{len(found)} links lead out of {folder}", hint, details=found)


def open_in_place(path: Path) -> TextIO:
    """Open a file to write in place, such as a lock or a log; create it if it is missing and keep its contents.

    Raises:
        CogtuneError: it is a link, not a regular file, or cannot be opened.
    """
    with os_errors_explained(path):
        if path.is_symlink():
            raise CogtuneError(f"{path} is a link to {os.path.realpath(path)}", "delete the link")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        handle = os.fdopen(descriptor, "w", encoding="utf-8")  # of a descriptor, this cuts nothing off
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            handle.close()
            raise CogtuneError(f"cannot write {path}: it is not a regular file", "delete it")
    return handle
