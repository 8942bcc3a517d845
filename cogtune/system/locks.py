"""Locks on folders, so that one process at a time uses a folder."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cogtune.system import console
from cogtune.system.containment import open_in_place, refuse_links_out
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained

try:
    import fcntl
except ImportError:  # Windows

    def _lock(handle: TextIO) -> None:
        import msvcrt

        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]

else:

    def _lock(handle: TextIO) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


_HELD = (errno.EAGAIN, errno.EACCES)  # error codes of the two for a lock that another process holds

LOCK = ".lock"
"""The lock of the program that is using a folder."""

WORKER_LOCK = ".worker.lock"
"""The lock that the first worker of a run holds in the run's folder."""

_LOOKED_AT = 0.2
"""Seconds within which a process that only checks a lock has released it."""

_UNTOLD = 2.0
"""Seconds of waiting for another process before the user is told."""


def _held(handle: TextIO, seconds: float) -> bool:
    """Try to lock a file for ``seconds``; return whether that succeeded."""
    until = time.monotonic() + seconds
    while True:
        try:
            _lock(handle)
        except OSError as error:
            if error.errno not in _HELD:
                raise
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        else:
            return True


@contextlib.contextmanager
def exclusive_folder(folder: Path, name: str = LOCK, *, wait: bool = False, waiting: str = "") -> Iterator[None]:
    """Lock a folder while the block runs. If the holder is killed, the lock is released.

    Args:
        name: name of the lock file; a run's program and its worker each have one, since either may outlive the other.
        wait: wait for another holder instead of raising an error.
        waiting: remark for the user if the wait takes longer than a moment.

    Raises:
        CogtuneError: another process holds the lock, or a link in the folder leads out of it.
    """
    path = folder / name
    with os_errors_explained(path):
        folder.mkdir(parents=True, exist_ok=True)
    refuse_links_out(folder)
    handle = open_in_place(path)
    with handle:
        if not _held(handle, _UNTOLD if wait else _LOOKED_AT):
            if not wait:
                raise CogtuneError(
                    f"another process is using {folder}", "wait for it, stop it, or choose another folder"
                )
            console.note(waiting or f"waiting for another process that is using {folder}")
            while not _held(handle, 60.0):
                pass
        yield


def is_held(folder: Path, name: str = LOCK) -> bool:
    """Return whether a process holds the lock on a folder.

    Args:
        name: name of the lock file, as for :func:`exclusive_folder`.

    Raises:
        CogtuneError: the lock is a link, or cannot be opened.
    """
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return False
    with open_in_place(path) as handle:
        return not _held(handle, 0.0)
