"""Temporary folders that go with the block that uses them; what a killed process left, the next one deletes."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained
from cogtune.system.locks import LOCK, exclusive_folder

SETTLED = 60.0
"""Seconds after which a temporary folder is locked if it ever will be."""

ABANDONED = 86_400.0
"""Seconds after which a temporary folder without a lock has nobody: half of it was deleted, or nothing was begun."""


@contextlib.contextmanager
def scratch_folder(prefix: str, place: Path | None = None, suffix: str = "") -> Iterator[Path]:
    """Make a temporary folder for the block, and delete those of the same name that killed processes left.

    It may hold a copy of somebody's weights, of many GB. Its ``.lock`` says that its process is alive.

    Args:
        prefix: what its name begins with.
        place: the folder that it is made in, by default the system's for temporary files.
        suffix: what its name ends in.

    Raises:
        CogtuneError: it cannot be made.
    """
    root = place or Path(tempfile.gettempdir())
    _delete_left(root, prefix, suffix)
    with os_errors_explained(root):
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=root))
    try:
        with exclusive_folder(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what stays, the next one deletes


def _delete_left(root: Path, prefix: str, suffix: str) -> None:
    """Delete the folders of this name whose processes are gone; others' and links are left alone."""
    for folder in root.glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}"):
        with contextlib.suppress(CogtuneError, OSError):
            if not _is_own_folder(folder):
                continue
            lock, now = folder / LOCK, time.time()
            is_settled = now - lock.lstat().st_mtime > SETTLED if os.path.lexists(lock) else False
            if is_settled or now - folder.stat().st_mtime > ABANDONED:
                with exclusive_folder(folder):  # or its own process is at work on it
                    shutil.rmtree(folder, ignore_errors=True)


def _is_own_folder(path: Path) -> bool:
    """Return whether a path is a folder of this user's and no link; the system's temporary folder is everybody's."""
    if path.is_symlink() or not path.is_dir():
        return False
    return not hasattr(os, "getuid") or path.lstat().st_uid == os.getuid()
