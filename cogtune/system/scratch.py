"""Temporary folders for a block; those left by killed processes are deleted by the next one."""

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
"""Seconds within which a new temporary folder gets its lock."""

ABANDONED = 86_400.0
"""Seconds after which a temporary folder without a lock is abandoned: partly deleted, or never used."""


@contextlib.contextmanager
def scratch_folder(prefix: str, place: Path | None = None, suffix: str = "") -> Iterator[Path]:
    """Create a temporary folder for the block, and delete those with the same prefix left by killed processes.

    It may hold a copy of somebody's weights of many GB. Its ``.lock`` shows that its process is alive.

    Args:
        prefix: beginning of its name.
        place: folder to create it in, by default the system's folder for temporary files.
        suffix: end of its name.

    Raises:
        CogtuneError: it cannot be created.
    """
    root = place or Path(tempfile.gettempdir())
    _delete_left(root, prefix, suffix)
    with os_errors_explained(root):
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=root))
    try:
        with exclusive_folder(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # leftovers are deleted by the next process


def _delete_left(root: Path, prefix: str, suffix: str) -> None:
    """Delete folders with this prefix whose processes are gone, except links and other users' folders."""
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
    """Return whether a path is a folder of this user and not a link; all users share the temporary folder."""
    if path.is_symlink() or not path.is_dir():
        return False
    return not hasattr(os, "getuid") or path.lstat().st_uid == os.getuid()
