"""Detection of changed files, by size, modification time and inode."""

from __future__ import annotations

from pathlib import Path

from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained

Stamp = tuple[int, int, int]
"""Size in bytes, modification time in nanoseconds, inode."""


class FileChanged(CogtuneError):
    """A file that was changed or replaced while it was in use."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} changed while it was being read",
            "do not change the dataset's files during a run; then run the same command again",
        )


def stamp_of(path: Path) -> Stamp:
    """Return a file's current stamp.

    Raises:
        CogtuneError: the file does not exist.
    """
    with os_errors_explained(path, "read"):
        stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def check_unchanged(path: Path, stamp: Stamp | None) -> None:
    """Check that a file still matches ``stamp``, if there is one.

    Raises:
        FileChanged: it does not.
    """
    if stamp is not None and stamp_of(path) != stamp:
        raise FileChanged(path)
