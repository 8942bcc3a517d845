"""Whether a file is still the one that it was: its size, modification time and inode."""

from __future__ import annotations

from pathlib import Path

from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained

Stamp = tuple[int, int, int]
"""Size in bytes, modification time in nanoseconds, inode."""


class FileChanged(CogtuneError):
    """A file that was changed, or exchanged for another, between two looks at it."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} changed while it was being read",
            "leave the dataset's files alone until this is done; then run the same command again",
        )


def stamp_of(path: Path) -> Stamp:
    """Return how a file stands now.

    Raises:
        CogtuneError: there is no such file.
    """
    with os_errors_explained(path, "read"):
        stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def check_unchanged(path: Path, stamp: Stamp | None) -> None:
    """See that a file stands as it stood at ``stamp``; without one, nothing is looked at.

    Raises:
        FileChanged: it does not.
    """
    if stamp is not None and stamp_of(path) != stamp:
        raise FileChanged(path)
