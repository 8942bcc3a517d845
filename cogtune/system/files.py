"""Atomic writes: to a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cogtune.system.errors import CogtuneError

PARTIAL_SUFFIX = ".partial"
"""Suffix of unfinished files and folders; leftovers with it are safe to delete."""


def sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders, and persists a rename by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse to sync a folder; the rename itself still holds
        pass
    finally:
        os.close(descriptor)


AGAIN = "run the same command again"
"""The end of a :class:`DiskFull` hint; callers that know the command to run replace it."""


class DiskFull(CogtuneError):
    """The disk is full."""


_FULL = {
    errno.ENOSPC: f"free some space on that disk, then {AGAIN}",
    errno.EDQUOT: f"your disk quota is used up: free some space, then {AGAIN}",
}

_HINTS = {
    errno.EFBIG: "that file system or a limit of your shell forbids files of this size: choose another place",
    errno.EACCES: "check who owns it and its permissions",
    errno.EROFS: "that file system is read-only: choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file stands where a folder is needed: choose another path",
    errno.EISDIR: "pass a file",
    errno.EINVAL: "pass a regular file",
}

_WRITE_FAILURES = ("I/O error", "PytorchStreamWriter failed", "inline_container.cc", "iostream error")
"""Messages of safetensors and torch, in their own exception types, for a full disk."""


@contextlib.contextmanager
def os_errors_explained(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn an ``OSError`` about ``path``, in any form, into a :class:`CogtuneError` that says what to do.

    Raises:
        CogtuneError: instead of any OSError or a library's own error for a failed write; :class:`DiskFull` if the disk
            is full.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise _failure(f"cannot {doing} {path}: {reason}", error.errno or 0) from error
    except CogtuneError:
        raise
    except Exception as error:
        if not any(sign in str(error) for sign in _WRITE_FAILURES):
            raise
        number = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else errno.ENOSPC
        raise _failure(f"cannot {doing} {path}: {os.strerror(number)}", number) from error


def _failure(message: str, number: int) -> CogtuneError:
    return DiskFull(message, _FULL[number]) if number in _FULL else CogtuneError(message, _HINTS.get(number, ""))


@functools.cache
def _ordinary_mode() -> int:
    """Return the default permissions of a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def finish_file(path: Path) -> None:
    """Give a written file ordinary permissions (safetensors makes it private) and sync it to the disk."""
    path.chmod(_ordinary_mode())
    with path.open("r+b") as handle:  # Windows syncs what may be written alone
        os.fsync(handle.fileno())


def temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{PARTIAL_SUFFIX}")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` create a file under a temporary name next to ``path``, then rename it.

    The file is synced to disk before the rename, so after a crash ``path`` is the old file or the new one.

    Raises:
        CogtuneError: the file cannot be written (full disk, permissions); nothing is left behind.
    """
    aside = temporary_path(path)
    with os_errors_explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(aside)
            finish_file(aside)
            aside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
    # From here on the new file is complete under its final name, even if the sync fails.
    with contextlib.suppress(OSError):
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` atomically."""
    write_atomic(path, lambda aside: aside.write_bytes(text.encode()))


def open_regular(path: Path) -> BinaryIO:
    """Open an ordinary file to read its bytes.

    Raises:
        OSError: it does not exist, or is not an ordinary file but a pipe or device, which may block forever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, "is a folder" if number == errno.EISDIR else "is not an ordinary file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """Return the bytes of an ordinary file of any size.

    Raises:
        OSError: as :func:`open_regular`.
    """
    with open_regular(path) as file:
        return file.read()


def special_files(folder: Path) -> list[str]:
    """List the pipes, devices and sockets in a folder at any depth; reading them could block forever."""
    return [
        f"{path} is not an ordinary file"
        for path in sorted(folder.rglob("*"))
        if path.exists() and not path.is_file() and not path.is_dir()
    ]


def read_bytes(path: Path, most: int) -> bytes:
    """Return the bytes of an ordinary file.

    Raises:
        CogtuneError: it cannot be read, or has more than ``most`` bytes.
    """
    with os_errors_explained(path, "read"), open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise CogtuneError(f"{path} is too large: {most:,} bytes are the most that is read", "is it the right file?")
    return data
